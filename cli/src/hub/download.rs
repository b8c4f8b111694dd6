//! Fetching a repository: into the Hub's cache, or into a plain folder.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aha_core::hub::Source;
use anyhow::{Context, Result, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use ring::digest;
use serde::Deserialize;

use super::cache::{Cached, is_commit, is_hash, is_whole};
use super::client::{Call, Client, Failure, collection, escaped};
use super::{Download, Kind};

/// What a model needs beside `*.safetensors`.
const MODEL_FILES: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "adapter_config.json",
    "model.safetensors.index.json",
];
/// How long to wait for another process that fetches the same file.
const PATIENCE_WITH_OTHERS: Duration = Duration::from_secs(4 * 3600);
const BUFFER: usize = 1 << 20;

/// What the Hub says of a revision.
#[derive(Debug, Deserialize)]
struct Revision {
    sha: String,
    siblings: Vec<RemoteFile>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RemoteFile {
    #[serde(rename = "rfilename")]
    name: String,
    size: Option<u64>,
    /// Of git.
    blob_id: Option<String>,
    /// Of a large file.
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    sha256: String,
}

/// A file that is fetched, with what it must be.
#[derive(Debug)]
struct Wanted {
    /// A relative path of plain names.
    name: String,
    size: u64,
    /// In hexadecimal: SHA-256 of a large file, git's of another.
    hash: String,
    is_large: bool,
}

/// The local folder of a repository.
///
/// # Errors
/// Names the repository, what the Hub answered, and what to do.
pub(super) fn fetch(client: &Client, download: &Download) -> Result<PathBuf> {
    let Download { source, kind, local_dir, is_fresh } = download;
    let settings = client.settings();
    let cached = Cached::new(&settings.cache, *kind, source);
    let known = cached.snapshot(&source.revision).filter(|folder| *kind == Kind::Dataset || is_whole(folder));
    if settings.is_offline {
        return known.filter(|_| local_dir.is_none()).with_context(|| {
            format!(
                "{source} is not as a whole in {}, and HF_HUB_OFFLINE forbids to fetch it",
                settings.cache.display()
            )
        });
    }
    if let Some(folder) = known.filter(|_| !is_fresh) {
        tracing::info!("{source} is in {}", folder.display());
        return Ok(folder);
    }
    let (plural, id) = (collection(*kind), &source.id);
    let revision: Revision =
        client.get_json(&format!("/api/{plural}/{id}/revision/{}?blobs=true", escaped(&source.revision)), source)?;
    ensure!(is_commit(&revision.sha), "{source}: the Hub names no commit, but {:?}", revision.sha);
    let wanted = wanted(*kind, revision.siblings, source)?;
    let bytes: u64 = wanted.iter().map(|file| file.size).sum();
    tracing::info!("fetching {source}: {} files of {} MB", wanted.len(), bytes.div_ceil(1_000_000));
    let bar = progress_bar(bytes);
    for file in &wanted {
        bar.set_message(file.name.clone());
        let prefix = if *kind == Kind::Dataset { "/datasets" } else { "" };
        let url = format!("{prefix}/{id}/resolve/{}/{}", revision.sha, escaped(&file.name));
        if let Some(folder) = local_dir {
            fetch_file(client, (&url, source), file, (&folder.join(&file.name), &bar))?;
        } else {
            let held = cached.lock(&file.hash, PATIENCE_WITH_OTHERS)?;
            fetch_file(client, (&url, source), file, (&cached.blob(&file.hash), &bar))?;
            drop(held);
            cached.link(&revision.sha, &file.name, &file.hash)?;
        }
    }
    bar.finish_and_clear();
    if let Some(folder) = local_dir {
        return Ok(folder.clone());
    }
    // Last, so that a revision that is noted is whole.
    cached.note(&source.revision, &revision.sha)?;
    Ok(cached.snapshot_of(&revision.sha))
}

/// The files of a repository that are of use here.
fn wanted(kind: Kind, siblings: Vec<RemoteFile>, source: &Source) -> Result<Vec<Wanted>> {
    let is_plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    let odd = siblings.iter().find(|file| !file.name.split('/').all(is_plain));
    ensure!(odd.is_none(), "{source}: the Hub lists a file with the name {:?}", odd.map(|file| &file.name));
    let of_use = |file: &RemoteFile| match kind {
        Kind::Model => is_model_file(&file.name),
        Kind::Dataset => !file.name.starts_with('.'),
    };
    let mut wanted: Vec<Wanted> =
        siblings.into_iter().filter(of_use).map(|file| checked(file, source)).collect::<Result<_>>()?;
    let has_weights = wanted.iter().any(|file| file.name.ends_with(".safetensors"));
    ensure!(
        kind == Kind::Dataset || has_weights,
        "{source} has no *.safetensors: other formats of weights may run code when they are read, and are not fetched"
    );
    // Weights last: where they are, all else is.
    wanted.sort_by_key(|file| (file.is_large, file.size));
    Ok(wanted)
}

fn is_model_file(name: &str) -> bool {
    // The original weights, a second time.
    let is_copy = name.starts_with("consolidated");
    let is_weights = name.ends_with(".safetensors") && !name.contains('/') && !is_copy;
    is_weights || MODEL_FILES.contains(&name) || name.starts_with("chat_template") && !name.contains('/')
}

/// A file with all that is to be checked; its hash may be used as a path.
fn checked(file: RemoteFile, source: &Source) -> Result<Wanted> {
    let is_large = file.lfs.is_some();
    let hash = file.lfs.map(|lfs| lfs.sha256).or(file.blob_id).unwrap_or_default();
    let length = if is_large { 64 } else { 40 };
    ensure!(is_hash(&hash) && hash.len() == length, "{source}: the Hub gives no hash of {}", file.name);
    let size = file.size.with_context(|| format!("{source}: the Hub does not say how large {} is", file.name))?;
    Ok(Wanted { name: file.name, size, hash, is_large })
}

/// Fetches a file to `path`, unless it is there; goes on where an earlier attempt ended.
fn fetch_file(
    client: &Client,
    (url, source): (&str, &Source),
    file: &Wanted,
    (path, bar): (&Path, &ProgressBar),
) -> Result<()> {
    let done = bar.position() + file.size;
    let is_there = fs::metadata(path).is_ok_and(|metadata| metadata.len() == file.size);
    // A blob has its hash for a name; a plain file may be anyone's.
    if !is_there || !path.ends_with(&file.hash) && hash_of(path, file)? != file.hash {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".incomplete");
        let partial = PathBuf::from(partial);
        let context = || format!("fetching {} of {source}", file.name);
        client.repeating(|| fetch_rest(client, (url, source), file, (&partial, bar))).with_context(context)?;
        let hash = hash_of(&partial, file)?;
        if hash != file.hash {
            fs::remove_file(&partial).with_context(|| format!("removing {}", partial.display()))?;
            bail!("{source}: {} came with the hash {hash}, and the Hub lists {}; try again", file.name, file.hash);
        }
        fs::rename(&partial, path).with_context(|| format!("writing {}", path.display()))?;
    }
    bar.set_position(done);
    Ok(())
}

/// Appends to `partial` what it lacks.
fn fetch_rest(
    client: &Client,
    (url, source): (&str, &Source),
    file: &Wanted,
    (partial, bar): (&Path, &ProgressBar),
) -> Result<(), Failure> {
    let unwritable = |error: std::io::Error| Failure::Final(anyhow!("cannot write {}: {error}", partial.display()));
    let mut target = OpenOptions::new().append(true).create(true).open(partial).map_err(unwritable)?;
    let mut have = target.metadata().map_err(unwritable)?.len();
    if have > file.size {
        target.set_len(0).map_err(unwritable)?;
        have = 0;
    }
    if have == file.size {
        return Ok(());
    }
    let mut call = Call { expected: file.size - have, ..Call::get(url.to_owned()) };
    if have > 0 {
        call.headers.push(("range".to_owned(), format!("bytes={have}-")));
    }
    let response = client.send(call, source)?;
    if have > 0 && response.status().as_u16() != 206 {
        // The server begins again.
        target.set_len(0).map_err(unwritable)?;
        have = 0;
    }
    // One byte more would tell that it is too long.
    let mut body = response.into_body().into_reader().take(file.size - have + 1);
    let mut buffer = vec![0; BUFFER];
    while have <= file.size {
        let count = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => return Err(Failure::Passing(anyhow!("after {have} of {} bytes: {error}", file.size))),
        };
        target.write_all(&buffer[..count]).map_err(unwritable)?;
        have += count as u64;
        bar.inc(count as u64);
    }
    if have == file.size {
        return Ok(());
    }
    Err(Failure::Passing(anyhow!("{have} bytes came of {}", file.size)))
}

/// In hexadecimal, of the kind that `file` is listed with.
fn hash_of(path: &Path, file: &Wanted) -> Result<String> {
    let mut context = if file.is_large {
        digest::Context::new(&digest::SHA256)
    } else {
        let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
        context.update(format!("blob {}\0", file.size).as_bytes());
        context
    };
    let mut reader = File::open(path).with_context(|| format!("reading {}", path.display()))?;
    let mut buffer = vec![0; BUFFER];
    loop {
        match reader.read(&mut buffer).with_context(|| format!("reading {}", path.display()))? {
            0 => return Ok(hex(context.finish().as_ref())),
            count => context.update(&buffer[..count]),
        }
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Shown where standard error is a terminal.
pub(super) fn progress_bar(bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}");
    let bar = ProgressBar::new(bytes);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
