//! The files of a push.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use aha_core::hub::RepositoryId;
use anyhow::{Context, Result, ensure};
use ring::digest;
use serde_json::{Value, json};

use super::download::hex;

/// Folders within folders.
const MAX_DEPTH: usize = 4;
const MAX_FILES: usize = 10_000;
const TRAINER_STATE: &str = "trainer_state";
const ADAPTER_CONFIG: &str = "adapter_config.json";
/// What the Hub looks at to tell text from data.
const SAMPLE: u64 = 512;

/// A file as it was when it was opened, whatever happens to its name.
#[derive(Debug)]
pub(super) struct Upload {
    /// In the repository.
    pub(super) path: String,
    pub(super) size: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    File(File),
    Text(Vec<u8>),
}

impl Upload {
    pub(super) fn text(path: &str, text: String) -> Self {
        let bytes = text.into_bytes();
        Self { path: path.to_owned(), size: bytes.len() as u64, content: Content::Text(bytes) }
    }

    /// The bytes from `start` on, `length` at most.
    pub(super) fn read(&self, start: u64, length: u64) -> Result<Box<dyn Read + '_>> {
        Ok(match &self.content {
            Content::File(file) => {
                let mut file = file;
                file.seek(SeekFrom::Start(start)).with_context(|| format!("reading {}", self.path))?;
                Box::new(file.take(length))
            }
            Content::Text(bytes) => Box::new(bytes[start as usize..].take(length)),
        })
    }

    /// All bytes, of a file that fits into memory.
    pub(super) fn bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read(0, self.size)?.read_to_end(&mut bytes).with_context(|| format!("reading {}", self.path))?;
        ensure!(bytes.len() as u64 == self.size, "{} has changed while it was read", self.path);
        Ok(bytes)
    }

    pub(super) fn sample(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read(0, SAMPLE)?.read_to_end(&mut bytes).with_context(|| format!("reading {}", self.path))?;
        Ok(bytes)
    }

    /// In hexadecimal.
    pub(super) fn sha256(&self) -> Result<String> {
        let mut context = digest::Context::new(&digest::SHA256);
        let mut reader = self.read(0, self.size)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match reader.read(&mut buffer).with_context(|| format!("reading {}", self.path))? {
                0 => return Ok(hex(context.finish().as_ref())),
                count => context.update(&buffer[..count]),
            }
        }
    }
}

/// Opens every file of a model folder: none that is hidden, and the trainer's state only where it is asked for.
///
/// # Errors
/// Names what cannot be read.
pub(super) fn of_folder(folder: &Path, with_trainer_state: bool) -> Result<Vec<Upload>> {
    let mut uploads = Vec::new();
    open_all(folder, "", with_trainer_state, &mut uploads)?;
    ensure!(!uploads.is_empty(), "{}: has no files to push", folder.display());
    uploads.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(uploads)
}

fn open_all(folder: &Path, prefix: &str, with_trainer_state: bool, uploads: &mut Vec<Upload>) -> Result<()> {
    let reading = || format!("reading {}", folder.display());
    ensure!(prefix.matches('/').count() <= MAX_DEPTH, "{}: is too deep within the folder", folder.display());
    for entry in fs::read_dir(folder).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        let name = entry.file_name();
        let name = name.to_str().with_context(|| format!("{}: its name is not UTF-8", entry.path().display()))?;
        let path = format!("{prefix}{name}");
        if name.starts_with('.') || path == TRAINER_STATE && !with_trainer_state {
            continue;
        }
        // Through links: a folder of the Hub's cache is made of them.
        let metadata = fs::metadata(entry.path()).with_context(|| format!("reading {}", entry.path().display()))?;
        if metadata.is_dir() {
            open_all(&entry.path(), &format!("{path}/"), with_trainer_state, uploads)?;
        } else if metadata.is_file() {
            uploads.push(open(&entry.path(), path)?);
        }
        ensure!(uploads.len() <= MAX_FILES, "{}: has over {MAX_FILES} files", folder.display());
    }
    Ok(())
}

fn open(file: &Path, path: String) -> Result<Upload> {
    let reading = || format!("reading {}", file.display());
    if path == ADAPTER_CONFIG {
        return Ok(Upload::text(&path, with_public_base(&fs::read_to_string(file).with_context(reading)?)));
    }
    let content = File::open(file).with_context(reading)?;
    let size = content.metadata().with_context(reading)?.len();
    Ok(Upload { path, size, content: Content::File(content) })
}

/// Adapters name their base by a folder here; elsewhere it has the name that it has on the Hub.
fn with_public_base(text: &str) -> String {
    let Ok(mut config) = serde_json::from_str::<Value>(text) else { return text.to_owned() };
    let base = config["base_model_name_or_path"].as_str().and_then(|base| RepositoryId::of_cached(Path::new(base)));
    match base {
        Some(id) => {
            config["base_model_name_or_path"] = json!(id.as_str());
            format!("{config:#}\n")
        }
        None => text.to_owned(),
    }
}
