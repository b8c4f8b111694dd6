//! What the rest of the program asks of the Hub.

use std::path::PathBuf;

use aha_core::config::RunConfig;
use aha_core::hub::Source;
use aha_trainer::checkpoint_sink::CheckpointSink;
use aha_trainer::model_card::ModelCard;
use anyhow::{Context, Result, ensure};

use super::client::Client;
use super::download::{fetch, progress_bar};
use super::settings::Settings;
use super::sink::HubSink;
use super::upload::{Upload, of_folder};
use super::{Download, Push};

/// The local folder of a repository.
pub(crate) fn download(what: &Download) -> Result<PathBuf> {
    fetch(&Client::new(&Settings::from_environment()?)?, what)
}

/// Returns the address of the commit.
pub(crate) fn push(what: &Push) -> Result<String> {
    push_by(&Client::new(&Settings::from_environment()?)?, what)
}

/// Pushes checkpoints and the model of a run, where its configuration asks for it.
///
/// # Errors
/// Before anything has been trained: without a token, or with the network forbidden.
pub(crate) fn checkpoint_sink(config: &RunConfig) -> Result<Option<Box<dyn CheckpointSink>>> {
    let Some(id) = config.hub.repository().filter(|_| config.hub.push) else { return Ok(None) };
    let settings = Settings::from_environment()?;
    ensure!(!settings.is_offline, "hub.push: HF_HUB_OFFLINE forbids it; set hub.push: false");
    ensure!(
        settings.token.is_some(),
        "hub.push: needs a token that may write to {id}: set HF_TOKEN, or log in with `hf auth login`"
    );
    Ok(Some(Box::new(HubSink::new(Client::new(&settings)?, id, config))))
}

pub(super) fn push_by(client: &Client, what: &Push) -> Result<String> {
    let mut uploads = of_folder(&what.folder, what.with_trainer_state)?;
    add_card(&mut uploads, &what.folder);
    let target = Source { id: what.id.clone(), revision: what.revision.clone() };
    let bar = progress_bar(uploads.iter().map(|upload| upload.size).sum());
    bar.set_message(target.to_string());
    let pushed = super::push::push(client, &target, &uploads, (what.is_private, &what.message), &bar);
    bar.finish_and_clear();
    pushed.with_context(|| format!("pushing {}", what.folder.display()))
}

/// Adds the card of a run's checkpoint, which has none of its own.
pub(super) fn add_card(uploads: &mut Vec<Upload>, folder: &std::path::Path) {
    if uploads.iter().any(|upload| upload.path == "README.md") {
        return;
    }
    let is_adapter = uploads.iter().any(|upload| upload.path == "adapter_config.json");
    match ModelCard::of(folder).and_then(|card| card.map_or(Ok(Vec::new()), |card| card.files(is_adapter))) {
        Ok(files) => uploads.extend(files.into_iter().map(|(name, text)| Upload::text(name, text))),
        Err(error) => tracing::warn!("{} is pushed without a model card: {error:#}", folder.display()),
    }
}
