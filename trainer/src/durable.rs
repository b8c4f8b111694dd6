//! Files and folders that are whole or absent, whatever happens to the machine meanwhile.
//!
//! What is written is synced under another name and then renamed; the folder that holds the name is synced after that.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use crate::failpoint;

/// Replaces a file by `contents`: a reader, or the machine after a crash, sees the old file or the new one.
pub(crate) fn replace_file(path: &Path, contents: &[u8]) -> io::Result<()> {
    let parent = parent(path)?;
    let mut name = std::ffi::OsString::from(".partial-");
    name.push(path.file_name().unwrap_or_default());
    let partial = parent.join(name);
    let written = (|| {
        let mut file = File::create(&partial)?;
        failpoint::reached();
        file.write_all(contents)?;
        failpoint::reached();
        file.sync_all()?;
        failpoint::reached();
        std::fs::rename(&partial, path)
    })();
    if let Err(error) = written {
        // The first error is the one to report; what is left is hidden and overwritten by the next attempt.
        drop(std::fs::remove_file(&partial));
        return Err(error);
    }
    sync(parent)
}

/// Gives a synced folder its name.
pub(crate) fn rename_dir(from: &Path, to: &Path) -> io::Result<()> {
    failpoint::reached();
    std::fs::rename(from, to)?;
    sync(parent(to)?)
}

/// Makes sure that a file's contents, or a folder's entries, are on the disk.
pub(crate) fn sync(path: &Path) -> io::Result<()> {
    failpoint::reached();
    File::open(path)?.sync_all()
}

fn parent(path: &Path) -> io::Result<&Path> {
    match path.parent() {
        Some(parent) if parent == Path::new("") => Ok(Path::new(".")),
        Some(parent) => Ok(parent),
        None => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} has no parent folder", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_leaves_nothing_else_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("summary.json");
        for contents in ["a longer first text", "second"] {
            replace_file(&path, contents.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), contents);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_replacement_that_fails_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("name");
        std::fs::create_dir_all(path.join("inside")).unwrap();
        assert!(replace_file(&path, b"text").is_err());
        assert!(path.join("inside").is_dir());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
