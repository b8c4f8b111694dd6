//! Large files: the batch interface of Git LFS, with the Hub's extension for parts.

use std::collections::BTreeMap;

use aha_core::hub::Source;
use anyhow::{Context, Result, anyhow, bail, ensure};
use indicatif::ProgressBar;
use serde::Deserialize;
use serde_json::json;

use super::client::{Call, Client, Failure, header, read_json};
use super::upload::Upload;

const MEDIA_TYPE: &str = "application/vnd.git-lfs+json";
/// Of a file, as S3 has it.
const MAX_PARTS: u64 = 10_000;

#[derive(Debug, Deserialize)]
struct Batch {
    objects: Vec<Object>,
}

#[derive(Debug, Deserialize)]
struct Object {
    oid: String,
    /// None where the Hub has the file already.
    actions: Option<Actions>,
    error: Option<Refusal>,
}

#[derive(Debug, Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Debug, Deserialize)]
struct Action {
    href: String,
    /// Headers; of an upload in parts, its `chunk_size`, and the address of every part by its number.
    #[serde(default)]
    header: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    code: i64,
    message: String,
}

/// Brings every file, given with its SHA-256, to where the Hub keeps large ones.
///
/// # Errors
/// Names the file that could not be sent.
pub(super) fn send_all(client: &Client, target: &Source, files: &[(&Upload, String)], bar: &ProgressBar) -> Result<()> {
    let objects: Vec<_> = files.iter().map(|(file, hash)| json!({"oid": hash, "size": file.size})).collect();
    let question = json!({
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "hash_algo": "sha256",
        "ref": {"name": target.revision},
        "objects": objects,
    });
    let url = format!("/{}.git/info/lfs/objects/batch", target.id);
    let ask = || client.post(&url, question.to_string().as_bytes(), MEDIA_TYPE, target);
    let batch: Batch = read_json(client.repeating(ask)?)?;
    for (file, hash) in files {
        let object = batch.objects.iter().find(|object| object.oid == *hash);
        let object = object.with_context(|| format!("the Hub says nothing of {}", file.path))?;
        if let Some(Refusal { code, message }) = &object.error {
            bail!("{}: the Hub refuses it: {code} {}", file.path, aha_trainer::loggers::printable(message));
        }
        let sent = match &object.actions {
            Some(actions) => send(client, target, (file, hash), actions),
            None => Ok(()),
        };
        sent.with_context(|| format!("sending {}", file.path))?;
        bar.inc(file.size);
    }
    Ok(())
}

fn send(client: &Client, target: &Source, (file, hash): (&Upload, &str), actions: &Actions) -> Result<()> {
    let Some(upload) = &actions.upload else { return Ok(()) };
    match upload.header.get("chunk_size") {
        Some(size) => {
            let size = size.parse().ok().filter(|size| *size > 0);
            let size = size.with_context(|| format!("parts of {:?} bytes are none", upload.header["chunk_size"]))?;
            send_parts(client, target, (file, hash), (upload, size))?;
        }
        None => {
            let headers: Vec<_> = upload.header.clone().into_iter().collect();
            put(client, target, (file, 0, file.size), (&upload.href, &headers))?;
        }
    }
    if let Some(verify) = &actions.verify {
        let claim = json!({"oid": hash, "size": file.size}).to_string();
        client.repeating(|| client.post(&verify.href, claim.as_bytes(), MEDIA_TYPE, target))?;
    }
    Ok(())
}

/// In parts of `size` bytes, each to an address of its own.
fn send_parts(
    client: &Client,
    target: &Source,
    (file, hash): (&Upload, &str),
    (upload, size): (&Action, u64),
) -> Result<()> {
    let num_parts = file.size.div_ceil(size);
    ensure!(num_parts <= MAX_PARTS, "{num_parts} parts are more than {MAX_PARTS}");
    let numbered = |(number, url)| Some((str::parse::<u64>(number).ok()?, url));
    let addresses: BTreeMap<u64, &String> =
        upload.header.iter().filter_map(|(key, url)| numbered((key, url))).collect();
    let mut parts = Vec::new();
    for number in 1..=num_parts {
        let address = addresses.get(&number).with_context(|| format!("no address for part {number} of {num_parts}"))?;
        let start = (number - 1) * size;
        let etag = put(client, target, (file, start, size.min(file.size - start)), (address, &[]))?;
        let etag = etag.with_context(|| format!("no ETag for part {number} of {num_parts}"))?;
        parts.push(json!({"partNumber": number, "etag": etag}));
    }
    let whole = json!({"oid": hash, "parts": parts}).to_string();
    client.repeating(|| client.post(&upload.href, whole.as_bytes(), MEDIA_TYPE, target))?;
    Ok(())
}

/// Sends some bytes of a file; returns the ETag that they got.
fn put(
    client: &Client,
    target: &Source,
    (file, start, length): (&Upload, u64, u64),
    (url, headers): (&str, &[(String, String)]),
) -> Result<Option<String>> {
    client.repeating(|| {
        let mut reader = file.read(start, length).map_err(|error| Failure::Final(anyhow!(error)))?;
        let body = Some((&mut *reader as _, length));
        let call = Call { method: "PUT", url: url.to_owned(), headers: headers.to_vec(), body, expected: 0 };
        let response = client.send(call, target)?;
        Ok(header(response.headers(), "etag"))
    })
}
