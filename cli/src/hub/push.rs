//! Pushing a folder: the repository, its large files, and one commit of all.

use aha_core::hub::Source;
use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use indicatif::ProgressBar;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{Call, Client, Failure, escaped, read_json};
use super::lfs;
use super::upload::Upload;

/// Files that the Hub is asked about at once.
const FILES_OF_A_QUESTION: usize = 256;
/// Larger files that the Hub would have in the commit itself are refused: it takes them from memory.
const MAX_REGULAR: u64 = 64 << 20;

#[derive(Debug, Deserialize)]
struct Modes {
    files: Vec<Mode>,
}

/// How the Hub wants a file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mode {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
}

/// What a commit answers.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Committed {
    commit_url: String,
}

/// Commits `uploads` to the branch of `target`; both are created where they are missing. Returns the commit's address.
///
/// # Errors
/// Names the repository, the step that failed, what the Hub answered, and what to do.
pub(super) fn push(
    client: &Client,
    target: &Source,
    uploads: &[Upload],
    (is_private, message): (bool, &str),
    bar: &ProgressBar,
) -> Result<String> {
    let settings = client.settings();
    ensure!(!settings.is_offline, "{}: HF_HUB_OFFLINE forbids to push", target.id);
    ensure!(
        settings.token.is_some(),
        "{}: a push needs a token that may write: set HF_TOKEN, or log in with `hf auth login`",
        target.id
    );
    create(client, target, is_private)?;
    let mut large = Vec::new();
    let mut lines = vec![json!({"key": "header", "value": {"summary": message, "description": ""}})];
    for some in uploads.chunks(FILES_OF_A_QUESTION) {
        for (upload, mode) in some.iter().zip(modes(client, target, some)?) {
            match mode.upload_mode.as_str() {
                _ if mode.should_ignore => {}
                "lfs" => large.push((upload, upload.sha256()?)),
                "regular" => lines.push(regular(upload)?),
                other => bail!("{}: the Hub wants {} as {other:?}, which is unknown here", target.id, upload.path),
            }
        }
    }
    if !large.is_empty() {
        lfs::send_all(client, target, &large, bar).with_context(|| format!("{}: large files", target.id))?;
    }
    lines.extend(large.iter().map(|(upload, hash)| {
        let value = json!({"path": upload.path, "algo": "sha256", "oid": hash, "size": upload.size});
        json!({"key": "lfsFile", "value": value})
    }));
    commit(client, target, &lines)
}

/// Makes the repository and the branch, where they are not there.
fn create(client: &Client, target: &Source, is_private: bool) -> Result<()> {
    let id = &target.id;
    let question = json!({"type": "model", "name": id.name(), "organization": id.owner(), "private": is_private});
    let created = make(client, "/api/repos/create", &question, target);
    if let Err(error) = created {
        // A token may be allowed to write into a repository and not to create one.
        let url = format!("/api/models/{id}");
        let is_there = client.repeating(|| client.send(Call::get(url.clone()), target)).is_ok();
        ensure!(is_there, error.context(format!("creating {id}")));
    }
    if target.revision != Source::MAIN {
        let url = format!("/api/models/{id}/branch/{}", escaped(&target.revision));
        make(client, &url, &json!({}), target).with_context(|| format!("creating the branch {}", target.revision))?;
    }
    Ok(())
}

/// Asks for something to be made; that it is there already is as good.
fn make(client: &Client, url: &str, question: &Value, target: &Source) -> Result<()> {
    let made = client.repeating(|| client.post(url, question.to_string().as_bytes(), "application/json", target));
    match made {
        Err(error) if !error.to_string().contains("HTTP 409") => Err(error),
        _ => Ok(()),
    }
}

/// How the Hub wants each file, in their order.
fn modes(client: &Client, target: &Source, uploads: &[Upload]) -> Result<Vec<Mode>> {
    let file = |upload: &Upload| -> Result<Value> {
        Ok(json!({"path": upload.path, "size": upload.size, "sample": STANDARD.encode(upload.sample()?)}))
    };
    let question = json!({"files": uploads.iter().map(file).collect::<Result<Vec<_>>>()?}).to_string();
    let url = format!("/api/models/{}/preupload/{}", target.id, escaped(&target.revision));
    let ask = || client.post(&url, question.as_bytes(), "application/json", target);
    let mut modes: Modes = read_json(client.repeating(ask)?)?;
    let of = |upload: &Upload| {
        let index = modes.files.iter().position(|mode| mode.path == upload.path);
        index
            .map(|index| modes.files.swap_remove(index))
            .with_context(|| format!("the Hub says nothing of {}", upload.path))
    };
    uploads.iter().map(of).collect()
}

/// A line of the commit with a file in it.
fn regular(upload: &Upload) -> Result<Value> {
    ensure!(
        upload.size <= MAX_REGULAR,
        "{}: the Hub wants its {} bytes in the commit itself: list it in the repository's .gitattributes as a large file",
        upload.path,
        upload.size
    );
    let content = STANDARD.encode(upload.bytes()?);
    Ok(json!({"key": "file", "value": {"path": upload.path, "encoding": "base64", "content": content}}))
}

fn commit(client: &Client, target: &Source, lines: &[Value]) -> Result<String> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let url = format!("/api/models/{}/commit/{}", target.id, escaped(&target.revision));
    // Once: a second attempt of one that came through would be a commit of its own.
    let response = client.post(&url, text.as_bytes(), "application/x-ndjson", target);
    let response = response.map_err(Failure::into).map_err(|error: anyhow::Error| error.context("committing"))?;
    let committed: Committed = read_json(response)?;
    Ok(aha_trainer::loggers::printable(&committed.commit_url))
}
