//! The Hub's cache, as its own tools lay it out: `models--owner--name/{blobs,refs,snapshots}`.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aha_core::hub::Source;
use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::Kind;
use super::client::collection;

const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// The folder of one repository.
#[derive(Debug)]
pub(super) struct Cached {
    folder: PathBuf,
    locks: PathBuf,
}

/// Files by which a folder of weights can be loaded.
#[derive(Deserialize)]
struct Index {
    weight_map: std::collections::BTreeMap<String, String>,
}

impl Cached {
    pub(super) fn new(cache: &Path, kind: Kind, source: &Source) -> Self {
        let name = format!("{}--{}--{}", collection(kind), source.id.owner(), source.id.name());
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// The snapshot that `revision` meant when it was fetched last.
    pub(super) fn snapshot(&self, revision: &str) -> Option<PathBuf> {
        let noted = fs::read_to_string(self.folder.join("refs").join(revision)).ok();
        let commit = noted.as_deref().map_or(revision, str::trim);
        let folder = self.snapshot_of(commit);
        (is_commit(commit) && folder.is_dir()).then_some(folder)
    }

    pub(super) fn snapshot_of(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, hash: &str) -> PathBuf {
        self.folder.join("blobs").join(hash)
    }

    /// Gives a blob its name in a snapshot; `name` is a relative path of plain names.
    pub(super) fn link(&self, commit: &str, name: &str, hash: &str) -> Result<()> {
        let path = self.snapshot_of(commit).join(name);
        let up = "../".repeat(2 + name.matches('/').count());
        if path.exists() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        }
        match std::os::unix::fs::symlink(format!("{up}blobs/{hash}"), &path) {
            // Another process was first.
            Err(_) if path.exists() => Ok(()),
            linked => linked.with_context(|| format!("linking {}", path.display())),
        }
    }

    /// Notes which commit `revision` means.
    pub(super) fn note(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(&self.folder))?;
            fs::write(&path, commit)
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    /// Keeps others, the Hub's own tools among them, from fetching the same blob, for as long as the file is held.
    ///
    /// # Errors
    /// If another process holds it for longer than `patience`.
    pub(super) fn lock(&self, hash: &str, patience: Duration) -> Result<File> {
        for folder in [&self.locks, &self.folder.join("blobs")] {
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        let path = self.locks.join(format!("{hash}.lock"));
        let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        let started = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if started.elapsed() < patience => std::thread::park_timeout(LOOK_AGAIN),
                Err(TryLockError::WouldBlock) => {
                    bail!("{}: another process has held it for {} s", path.display(), patience.as_secs())
                }
                // A file system without locks: what two processes mix up does not have its hash.
                Err(TryLockError::Error(_)) => return Ok(file),
            }
        }
    }
}

/// Whether a model can be loaded from `folder` without another file.
pub(super) fn is_whole(folder: &Path) -> bool {
    let is_there = |name: &str| folder.join(name).is_file();
    let has_shards = || {
        let text = fs::read_to_string(folder.join("model.safetensors.index.json")).ok()?;
        let index: Index = serde_json::from_str(&text).ok()?;
        Some(index.weight_map.values().all(|name| is_there(name)))
    };
    let has_weights = is_there("model.safetensors") || has_shards().unwrap_or(false);
    is_there("adapter_config.json") && is_there("adapter_model.safetensors")
        || is_there("config.json") && is_there("tokenizer.json") && has_weights
}

/// Whether `text` is the hash of a commit, and so a plain name.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_hash(text)
}

/// Whether `text` is a plain name of hexadecimal digits.
pub(super) fn is_hash(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}
