//! The folders of checkpoints by name, and the files within them by hash.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::{CheckpointError, FileRecord, PARTIAL};
use crate::failpoint;

const STEP: &str = "step-";
const READ_BYTES: usize = 1 << 20;

/// The folder of the checkpoint after `step` steps.
pub(super) fn of_step(checkpoints: &Path, step: u64) -> PathBuf {
    checkpoints.join(format!("{STEP}{step}"))
}

/// The hidden name that stands for `folder` until it is whole.
pub(super) fn partial(folder: &Path) -> PathBuf {
    hidden(folder, "")
}

/// The hidden name that `folder` has while it is removed.
pub(super) fn doomed(folder: &Path) -> PathBuf {
    hidden(folder, "old-")
}

/// The steps that there are checkpoints of, oldest first.
pub(super) fn steps(checkpoints: &Path) -> Result<Vec<u64>, CheckpointError> {
    let names = names(checkpoints)?;
    let mut steps: Vec<u64> = names.iter().filter_map(|name| name.strip_prefix(STEP)?.parse().ok()).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// Removes what interrupted attempts have left behind.
pub(super) fn remove_partial(checkpoints: &Path) -> Result<(), CheckpointError> {
    for name in names(checkpoints)?.iter().filter(|name| name.starts_with(PARTIAL)) {
        remove(&checkpoints.join(name))?;
    }
    Ok(())
}

/// Removes a folder, or a file, if it is there.
pub(super) fn remove(folder: &Path) -> Result<(), CheckpointError> {
    failpoint::reached();
    let is_file = folder.symlink_metadata().is_ok_and(|metadata| !metadata.is_dir());
    match if is_file { std::fs::remove_file(folder) } else { std::fs::remove_dir_all(folder) } {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(CheckpointError::unwritable(folder, error)),
        _ => Ok(()),
    }
}

/// Removes a folder so that it is never seen half removed.
pub(super) fn remove_whole(folder: &Path) -> Result<(), CheckpointError> {
    let doomed = doomed(folder);
    remove(&doomed)?;
    failpoint::reached();
    match std::fs::rename(folder, &doomed) {
        Ok(()) => {
            failpoint::reached();
            remove(&doomed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(CheckpointError::unwritable(folder, error)),
    }
}

/// Size and hash of a file. A pipe or a device has neither, and might never end.
pub(super) fn record(path: &Path) -> io::Result<FileRecord> {
    if !path.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"));
    }
    let mut file = File::open(path)?;
    let (mut hasher, mut buffer, mut bytes) = (Xxh3::new(), vec![0; READ_BYTES], 0);
    loop {
        let num_read = file.read(&mut buffer)?;
        if num_read == 0 {
            return Ok(FileRecord { bytes, xxh3: format!("{:016x}", hasher.digest()) });
        }
        hasher.update(&buffer[..num_read]);
        bytes += num_read as u64;
    }
}

fn hidden(folder: &Path, mark: &str) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!("{PARTIAL}{mark}{name}"))
}

fn names(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let unreadable = |error| CheckpointError::unreadable(folder, error);
    match std::fs::read_dir(folder) {
        Ok(entries) => {
            let name = |entry: io::Result<std::fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
            entries.map(name).collect::<io::Result<_>>().map_err(unreadable)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(unreadable(error)),
    }
}
