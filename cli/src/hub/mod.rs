//! The Hugging Face Hub, where this binary was built with the feature `hub`: models that are named by their repository,
//! and pushes.

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod lfs;
#[cfg(test)]
#[cfg(feature = "hub")]
mod mock;
#[cfg(not(feature = "hub"))]
mod nothing;
#[cfg(feature = "hub")]
mod push;
#[cfg(feature = "hub")]
mod settings;
#[cfg(feature = "hub")]
mod sink;
#[cfg(test)]
#[cfg(feature = "hub")]
mod tests;
#[cfg(feature = "hub")]
mod there;
#[cfg(feature = "hub")]
mod upload;

use std::path::{Path, PathBuf};

use aha_core::hub::{RepositoryId, Source};
use anyhow::{Context, Result};

#[cfg(not(feature = "hub"))]
pub(crate) use nothing::{checkpoint_sink, download, push};
#[cfg(feature = "hub")]
pub(crate) use there::{checkpoint_sink, download, push};

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Model,
    Dataset,
}

/// What is fetched, and where to.
#[derive(Debug)]
pub(crate) struct Download {
    pub(crate) source: Source,
    pub(crate) kind: Kind,
    /// A plain folder instead of the cache.
    pub(crate) local_dir: Option<PathBuf>,
    /// Ask the Hub for what it has now, even where a model is in the cache.
    #[cfg_attr(not(feature = "hub"), expect(dead_code, reason = "without the Hub nothing is fresh"))]
    pub(crate) is_fresh: bool,
}

/// What is pushed, and where to.
#[derive(Debug)]
pub(crate) struct Push {
    pub(crate) folder: PathBuf,
    pub(crate) id: RepositoryId,
    /// A branch, which is created where there is none.
    pub(crate) revision: String,
    /// Whether a repository that is created is private.
    pub(crate) is_private: bool,
    pub(crate) message: String,
    pub(crate) with_trainer_state: bool,
}

/// `path` where it is there; else the local copy of the repository of the Hub that it names, fetched if need be. `key` is
/// what the user set it by.
///
/// # Errors
/// If there is neither, or the Hub does not give it.
pub(crate) fn local_model(key: &str, path: &Path) -> Result<PathBuf> {
    match path.to_str().and_then(Source::parse).filter(|_| !path.exists()) {
        None => Ok(path.to_owned()),
        Some(source) => download(&Download { source, kind: Kind::Model, local_dir: None, is_fresh: false })
            .with_context(|| {
                format!("{key}: no folder {} is here, so it names a repository of the Hub", path.display())
            }),
    }
}
