//! `metrics.jsonl`: one JSON object per step.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{IoContext, LoggerError};
use super::metrics::Metrics;

/// Appends steps; a line is with the operating system before [`append`](Self::append) returns.
#[derive(Debug)]
pub(super) struct MetricsFile {
    path: PathBuf,
    file: File,
}

#[derive(Serialize)]
struct Line<'a> {
    step: u64,
    #[serde(flatten)]
    metrics: &'a Metrics,
}

#[derive(Deserialize)]
struct StepOf {
    step: u64,
}

impl MetricsFile {
    /// A new, empty file; or on resume the old one, less every line after `resume_from` and whatever a killed process
    /// left half-written.
    pub(super) fn open(path: &Path, resume_from: Option<u64>) -> Result<Self, LoggerError> {
        let old = match resume_from {
            Some(_) if path.exists() => fs::read(path).at(path, "read")?,
            _ => Vec::new(),
        };
        let kept: Vec<u8> = old
            .split_inclusive(|&byte| byte == b'\n')
            .filter(|line| step_of(line).is_some_and(|step| Some(step) <= resume_from))
            .flatten()
            .copied()
            .collect();
        if kept.is_empty() || kept.len() != old.len() {
            replace(path, &kept)?;
        }
        let file = File::options().append(true).open(path).at(path, "open")?;
        Ok(Self { path: path.to_owned(), file })
    }

    pub(super) fn append(&mut self, step: u64, metrics: &Metrics) -> Result<(), LoggerError> {
        let mut line = serde_json::to_vec(&Line { step, metrics }).map_err(Into::into).at(&self.path, "encode")?;
        line.push(b'\n');
        self.file.write_all(&line).at(&self.path, "append to")
    }

    pub(super) fn sync(&self) -> Result<(), LoggerError> {
        self.file.sync_all().at(&self.path, "sync")
    }
}

/// `None` for a line that is torn: without its end, or not JSON.
fn step_of(line: &[u8]) -> Option<u64> {
    let line = line.strip_suffix(b"\n")?;
    serde_json::from_slice(line).ok().map(|StepOf { step }| step)
}

/// Writes beside `path` and renames, so that the old lines survive a full disk.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), LoggerError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".partial");
    let temporary = PathBuf::from(temporary);
    fs::write(&temporary, bytes).at(&temporary, "write")?;
    fs::rename(&temporary, path).at(path, "replace")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_after(before: &str, resume_from: Option<u64>) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, before).unwrap();
        let mut file = MetricsFile::open(&path, resume_from).unwrap();
        file.append(9, &Metrics::from_iter([("kl", 1e-7)])).unwrap();
        file.sync().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::read_to_string(&path).unwrap()
    }

    const NINE: &str = "{\"step\":9,\"kl\":1e-7}\n";

    #[test]
    fn a_new_run_starts_empty() {
        assert_eq!(lines_after("{\"step\":1}\n", None), NINE);
    }

    #[test]
    fn resume_keeps_the_steps_of_the_checkpoint() {
        let two = "{\"step\":1,\"kl\":0.1}\n{\"step\":2,\"kl\":null}\n";
        let after = lines_after(&format!("{two}{{\"step\":3}}\n{{\"step\":4}}\n"), Some(2));
        assert_eq!(after, format!("{two}{NINE}"));
        assert_eq!(lines_after(two, Some(2)), format!("{two}{NINE}"));
    }

    #[test]
    fn resume_drops_a_torn_last_line() {
        for torn in ["{\"step\":2", "{\"step\":2}", "{", "\0\0\0\n"] {
            assert_eq!(lines_after(&format!("{{\"step\":1}}\n{torn}"), Some(5)), format!("{{\"step\":1}}\n{NINE}"));
        }
    }

    #[test]
    fn resume_without_a_file_starts_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        MetricsFile::open(&path, Some(3)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn floats_come_back_to_the_last_bit() {
        let value = f64::from_bits(0x3FB9_9999_9999_999B);
        let line = serde_json::to_string(&Line { step: 1, metrics: &Metrics::from_iter([("x", value)]) }).unwrap();
        let back: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(back["x"].as_f64().map(f64::to_bits), Some(value.to_bits()));
    }

    #[test]
    fn a_full_disk_names_the_file() {
        let path = PathBuf::from("/dev/full");
        let file = File::options().append(true).open(&path).unwrap();
        let error = MetricsFile { path, file }.append(1, &Metrics::default()).unwrap_err();
        assert!(matches!(error, LoggerError::DiskFull { .. }), "{error:?}");
        assert_eq!(error.to_string(), "no space left to append to /dev/full: free some and resume the run");
    }

    #[test]
    fn a_folder_that_is_gone_names_the_file() {
        let error = MetricsFile::open(Path::new("/no/such/metrics.jsonl"), None).unwrap_err();
        assert!(error.to_string().contains("/no/such/metrics.jsonl"), "{error}");
    }
}
