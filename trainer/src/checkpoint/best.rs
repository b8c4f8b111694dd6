//! `best.json`: which checkpoint had the best evaluation so far.
//!
//! Every checkpoint's `state.json` knows the best one up to itself, so a run that goes on knows it too. The file says the
//! same to others, and is brought up to date when a run starts.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{CheckpointError, STATE_FILE, State, folder};
use crate::{durable, failpoint};

const FILE: &str = "best.json";

/// The best evaluation so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps done.
    pub step: u64,
    /// As `eval.metric` names it.
    pub metric: String,
    /// Greater is better.
    pub value: f64,
}

/// Names the best checkpoint, or none, to whoever looks.
pub(super) fn mark(checkpoints: &Path, best: Option<&Best>) -> Result<(), CheckpointError> {
    let path = checkpoints.join(FILE);
    failpoint::reached();
    let written = match best {
        Some(best) => {
            serde_json::to_vec(best).map_err(io::Error::from).and_then(|text| durable::replace_file(&path, &text))
        }
        None => match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
    };
    written.map_err(|error| CheckpointError::unwritable(&path, error))
}

/// Forgets the best checkpoint that a state knows of where it is gone: it has been superseded by one that was damaged.
pub(super) fn forget_if_gone(checkpoints: &Path, state: &mut State) {
    let step = state.step;
    let is_there =
        |best: &mut Best| best.step == step || folder::of_step(checkpoints, best.step).join(STATE_FILE).is_file();
    if let Some(best) = state.best.take_if(|best| !is_there(best)) {
        tracing::warn!("the best checkpoint, step-{}, is gone: the best is looked for anew", best.step);
    }
}

/// What `best.json` names.
pub(super) fn read(checkpoints: &Path) -> Result<(PathBuf, Best), CheckpointError> {
    let path = checkpoints.join(FILE);
    let text = std::fs::read(&path).map_err(|error| {
        CheckpointError::unreadable(
            &path,
            format!("{error}; a run keeps its best checkpoint with eval.keep_best: true"),
        )
    })?;
    let best: Best = serde_json::from_slice(&text).map_err(|error| CheckpointError::unreadable(&path, error))?;
    Ok((folder::of_step(checkpoints, best.step), best))
}
