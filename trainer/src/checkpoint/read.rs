//! Finding the newest checkpoint that is whole.

use std::path::{Component, Path};

use aha_nn::comm::ProcessGroup;
use aha_nn::lora::peft;

use super::{Checkpoint, CheckpointError, STATE_FILE, State, best, folder};
use crate::agreement::agree;

/// What a model folder cannot be without.
const REQUIRED: [&str; 2] = ["config.json", "model.safetensors"];

pub(super) fn latest(checkpoints: &Path, group: &ProcessGroup) -> Result<Option<Checkpoint>, CheckpointError> {
    let found = if group.rank() == 0 { find(checkpoints) } else { Ok(None) };
    let payload = found
        .and_then(|state| serde_json::to_vec(&state).map_err(|error| CheckpointError::unreadable(checkpoints, error)));
    let states = agree(group, payload)?;
    let state: Option<State> =
        serde_json::from_slice(&states[0]).map_err(|error| CheckpointError::unreadable(checkpoints, error))?;
    Ok(state.map(|state| Checkpoint { folder: folder::of_step(checkpoints, state.step), state }))
}

fn find(checkpoints: &Path) -> Result<Option<State>, CheckpointError> {
    folder::remove_partial(checkpoints)?;
    let Some(mut state) = newest(checkpoints)? else { return Ok(None) };
    best::forget_if_gone(checkpoints, &mut state);
    best::mark(checkpoints, state.best.as_ref())?;
    Ok(Some(state))
}

pub(super) fn newest(checkpoints: &Path) -> Result<Option<State>, CheckpointError> {
    let mut problems = Vec::new();
    for step in folder::steps(checkpoints)?.into_iter().rev() {
        let folder = folder::of_step(checkpoints, step);
        match verify(&folder, step) {
            Ok(state) => return Ok(Some(state)),
            Err(error) => {
                tracing::error!("checkpoint step-{step} is damaged, going back to an earlier one: {error}");
                problems.push(error.to_string());
            }
        }
    }
    if problems.is_empty() {
        return Ok(None);
    }
    Err(CheckpointError::NoneWhole { folder: checkpoints.to_owned(), problems: problems.join("; ") })
}

/// Reads every file of a checkpoint and compares it with what was written.
pub(super) fn verify(checkpoint: &Path, step: u64) -> Result<State, CheckpointError> {
    let path = checkpoint.join(STATE_FILE);
    let text = std::fs::read_to_string(&path).map_err(|error| CheckpointError::unreadable(&path, error))?;
    let state: State = serde_json::from_str(&text).map_err(|error| CheckpointError::unreadable(&path, error))?;
    let damaged = |file: &str, problem: String| Err(CheckpointError::Damaged { path: checkpoint.join(file), problem });
    if state.step != step {
        return damaged(STATE_FILE, format!("belongs to step {}", state.step));
    }
    let is_adapter = peft::FILES.iter().any(|file| state.files.contains_key(*file));
    let required = if is_adapter { peft::FILES } else { REQUIRED };
    if let Some(file) = required.iter().find(|file| !state.files.contains_key(**file)) {
        return damaged(STATE_FILE, format!("does not list {file}"));
    }
    for (file, expected) in &state.files {
        if !Path::new(file).components().all(|part| matches!(part, Component::Normal(_))) {
            return damaged(STATE_FILE, format!("lists {file:?}, which is outside the checkpoint"));
        }
        let path = checkpoint.join(file);
        let found = folder::record(&path).map_err(|error| CheckpointError::unreadable(&path, error))?;
        if found.bytes != expected.bytes {
            return damaged(file, format!("has {} bytes, and {} were written", found.bytes, expected.bytes));
        }
        if found.xxh3 != expected.xxh3 {
            return damaged(file, format!("has hash {}, and {} was written", found.xxh3, expected.xxh3));
        }
    }
    Ok(state)
}
