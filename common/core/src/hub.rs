//! Repositories of the Hugging Face Hub, by their names alone.

use std::fmt;
use std::path::{Component, Path};

/// Characters of an owner or a name.
const MAX_NAME: usize = 96;
const MAX_REVISION: usize = 255;
/// Folder of the Hub's cache that holds a model's or a data set's files.
const CACHE_PREFIXES: [&str; 2] = ["models--", "datasets--"];

/// `owner/name`, as in `Qwen/Qwen2.5-0.5B-Instruct`. It is safe in an address and, with `--` for `/`, as a folder's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryId(String);

/// A repository at a branch, tag or commit: `owner/name[@revision]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub id: RepositoryId,
    pub revision: String,
}

impl RepositoryId {
    /// `None` where `text` can be no repository.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (owner, name) = text.split_once('/')?;
        (is_name(owner) && is_name(name)).then(|| Self(text.to_owned()))
    }

    /// The repository that `path` is a cached copy of, or a part of one: `.../models--owner--name/snapshots/COMMIT`.
    #[must_use]
    pub fn of_cached(path: &Path) -> Option<Self> {
        let mut names = path.components().filter_map(|component| match component {
            Component::Normal(name) => name.to_str(),
            _ => None,
        });
        let id = names.find_map(|name| CACHE_PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)))?;
        let is_snapshot = names.next() == Some("snapshots");
        Self::parse(&id.replacen("--", "/", 1)).filter(|_| is_snapshot)
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    #[must_use]
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, name)| name)
    }

    #[must_use]
    pub fn owner(&self) -> &str {
        self.0.split_once('/').map_or("", |(owner, _)| owner)
    }
}

impl fmt::Display for RepositoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Source {
    /// Where none is named.
    pub const MAIN: &'static str = "main";

    /// `None` where `text` can be no repository, or its revision none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, Self::MAIN));
        is_revision(revision).then_some(())?;
        Some(Self { id: RepositoryId::parse(id)?, revision: revision.to_owned() })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.revision)
    }
}

/// Whether `text` can name a branch, tag or commit: a relative path of plain names.
#[must_use]
pub fn is_revision(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
    let is_part = |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(is_plain);
    text.len() <= MAX_REVISION && text.split('/').all(is_part)
}

fn is_name(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_edge = |c: char| "-.".contains(c);
    (1..=MAX_NAME).contains(&text.len())
        && text.chars().all(is_plain)
        && !text.starts_with(is_edge)
        && !text.ends_with(is_edge)
        && !text.contains("--")
        && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_and_a_name_are_a_repository_and_paths_are_none() {
        for (text, expect) in [
            ("Qwen/Qwen2.5-0.5B-Instruct", ("Qwen/Qwen2.5-0.5B-Instruct", "main")),
            ("a/b_c@v1.0", ("a/b_c", "v1.0")),
            ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ] {
            let source = Source::parse(text).unwrap();
            assert_eq!((source.id.as_str(), source.revision.as_str()), expect);
        }
        for text in [
            "", "model", "/a/b", "a/b/c", "../a", "a/..", "./a", "a/b@", "a/b@../x", "a/b@x//y", "a--b/c", "a b/c",
            "a/é",
        ] {
            assert_eq!(Source::parse(text), None, "{text}");
        }
        assert_eq!(Source::parse(&format!("a/{}", "b".repeat(97))), None);
    }

    #[test]
    fn a_cached_copy_tells_its_repository() {
        let of = |path: &str| RepositoryId::of_cached(Path::new(path)).map(|id| id.to_string());
        assert_eq!(of("/c/hub/models--Qwen--Qwen2.5-0.5B/snapshots/ab12"), Some("Qwen/Qwen2.5-0.5B".to_owned()));
        assert_eq!(of("/c/datasets--o--d-x/snapshots/ab12/data/x.parquet"), Some("o/d-x".to_owned()));
        for path in ["/c/models--a--b/blobs/x", "/c/models--a/snapshots/x", "models/a/b", "/c/a--b/snapshots/x"] {
            assert_eq!(of(path), None, "{path}");
        }
    }
}
