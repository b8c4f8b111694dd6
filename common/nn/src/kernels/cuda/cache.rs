//! Compiled kernels on disk.

use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::program::HEADER;
use super::{CompileError, Compiler, Gpu, Program};

/// A folder of compiled programs, named by a hash of all that made them: sources, macros, GPU and NVRTC's version.
/// Several processes may share it.
#[derive(Debug)]
pub struct CompileCache {
    folder: PathBuf,
}

/// First in every file; the hash of the code follows.
const MAGIC: &[u8; 8] = b"ahacubin";
const HEADER_LEN: usize = 16;

impl CompileCache {
    /// The folder is made when the first program is kept.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Where kernels are kept unless a run says otherwise. None without a home folder.
    #[must_use]
    pub fn default_folder() -> Option<PathBuf> {
        Some(std::env::home_dir()?.join(".cache/aha/kernels"))
    }

    /// Code of a program, compiled unless it is here and whole.
    ///
    /// # Errors
    /// If it cannot be compiled, or not be kept.
    pub fn get(&self, compiler: &Compiler, program: &Program, gpu: Gpu) -> Result<Vec<u8>, CompileError> {
        let options = compiler.options(program, gpu);
        let key = [HEADER.1, program.source()].into_iter().chain(options.iter().map(String::as_str));
        self.get_or_make(program.name(), key, || compiler.compile(program, gpu))
    }

    fn get_or_make<'a>(
        &self,
        name: &str,
        key: impl Iterator<Item = &'a str>,
        make: impl FnOnce() -> Result<Vec<u8>, CompileError>,
    ) -> Result<Vec<u8>, CompileError> {
        // The lengths keep two keys with the same text, divided otherwise, apart.
        let key: Vec<u8> = key.flat_map(|part| [part.len().to_le_bytes().to_vec(), part.into()].concat()).collect();
        let path = self.folder.join(format!("{name}-{:032x}.cubin", xxh3_128(&key)));
        let error = |source| CompileError::Cache { path: path.clone(), source };
        if let Some(code) = read(&path).map_err(error)? {
            return Ok(code);
        }
        let code = make()?;
        fs::create_dir_all(&self.folder).and_then(|()| write(&path, &code)).map_err(error)?;
        Ok(code)
    }
}

/// None if there is no such file, or it is not what was written.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if bytes.len() < HEADER_LEN || bytes[..HEADER_LEN] != header(&bytes[HEADER_LEN..]) {
        return Ok(None);
    }
    Ok(Some(bytes.split_off(HEADER_LEN)))
}

/// Whole or not at all, whoever else is writing.
fn write(path: &Path, code: &[u8]) -> io::Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
    let mut file = fs::File::create(&temporary)?;
    let written = file.write_all(&header(code)).and_then(|()| file.write_all(code));
    let kept = written.and_then(|()| fs::rename(&temporary, path));
    if kept.is_err() {
        fs::remove_file(&temporary)?;
    }
    kept
}

fn header(code: &[u8]) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..8].copy_from_slice(MAGIC);
    header[8..].copy_from_slice(&xxh3_64(code).to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Case {
        folder: tempfile::TempDir,
        cache: CompileCache,
    }

    fn case() -> Case {
        let folder = tempfile::tempdir().unwrap();
        let cache = CompileCache::new(folder.path().join("kernels"));
        Case { folder, cache }
    }

    impl Case {
        /// What is got for `key`, and whether it was made.
        fn get(&self, key: &[&str], made: &[u8]) -> (Vec<u8>, bool) {
            let mut was_made = false;
            let make = || {
                was_made = true;
                Ok(made.to_vec())
            };
            let code = self.cache.get_or_make("name", key.iter().copied(), make).unwrap();
            (code, was_made)
        }

        fn only_file(&self) -> PathBuf {
            let mut files = fs::read_dir(self.folder.path().join("kernels")).unwrap();
            let file = files.next().unwrap().unwrap().path();
            assert!(files.next().is_none(), "no temporary file may stay");
            file
        }
    }

    #[test]
    fn code_is_made_once_for_a_key() {
        let case = case();
        assert_eq!(case.get(&["a", "bc"], b"first"), (b"first".to_vec(), true));
        assert_eq!(case.get(&["a", "bc"], b"second"), (b"first".to_vec(), false));
        assert_eq!(case.get(&["ab", "c"], b"third"), (b"third".to_vec(), true));
        assert_eq!(case.get(&["a", "bc"], b""), (b"first".to_vec(), false));
    }

    #[test]
    fn damaged_files_are_made_again() {
        let case = case();
        let original = case.get(&["key"], b"code").0;
        let path = case.only_file();
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(case.get(&["key"], b"code"), (original.clone(), true), "cut to {len}");
            let mut changed = whole.clone();
            changed[len] ^= 1;
            fs::write(case.only_file(), changed).unwrap();
            assert_eq!(case.get(&["key"], b"code"), (original.clone(), true), "byte {len} changed");
        }
        assert_eq!(case.get(&["key"], b"other"), (original, false));
    }

    #[test]
    fn a_failed_compilation_is_not_kept() {
        let case = case();
        let failure = CompileError::NoCompiler { reason: "test".to_owned() };
        assert!(case.cache.get_or_make("name", ["key"].into_iter(), || Err(failure)).is_err());
        assert!(case.get(&["key"], b"code").1);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let case = case();
        fs::write(case.folder.path().join("kernels"), "a file").unwrap();
        let error = case.cache.get_or_make("name", ["key"].into_iter(), || Ok(Vec::new())).unwrap_err();
        assert!(error.to_string().contains("kernels"), "{error}");
    }
}
