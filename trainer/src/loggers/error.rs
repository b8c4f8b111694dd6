//! Why a record could not be written.

use std::io;
use std::path::{Path, PathBuf};

/// A log that cannot be written. The caller stops the run: its checkpoint is whole, and it can be resumed.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    #[error("no space left to {action} {}: free some and resume the run", path.display())]
    DiskFull { path: PathBuf, action: &'static str, source: io::Error },
    #[error("cannot {action} {}", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
}

/// Adds to an I/O error what was attempted, and where.
pub(super) trait IoContext<T> {
    fn at(self, path: &Path, action: &'static str) -> Result<T, LoggerError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, path: &Path, action: &'static str) -> Result<T, LoggerError> {
        self.map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    LoggerError::DiskFull { path, action, source }
                }
                _ => LoggerError::Io { path, action, source },
            }
        })
    }
}
