//! Completions of steps to come, in files: each rank writes what it has received, and any number of ranks reads all of it.

use std::path::Path;

use aha_core::rollout::Completion;
use aha_proto::{BadMessage, v1};
use prost::Message;

use super::{CheckpointError, STATE_DIR};
use crate::failpoint;
use crate::rollouts::Received;

const PREFIX: &str = "rollouts-";

/// Writes what one rank has received below `folder`. Returns the file's path within it, or none where there is nothing.
pub(super) fn write(
    folder: &Path,
    (rank, world_size): (usize, usize),
    received: &[Received],
) -> Result<Option<String>, CheckpointError> {
    if received.iter().all(|received| received.completions.is_empty()) {
        return Ok(None);
    }
    let file = format!("{STATE_DIR}/{PREFIX}{rank:05}-of-{world_size:05}.binpb");
    let path = folder.join(&file);
    let of_step = |received: &Received| v1::StepRollout {
        step: received.step,
        completions: received.completions.iter().cloned().map(v1::Completion::from).collect(),
    };
    let message = v1::ReceivedRollouts { steps: received.iter().map(of_step).collect() };
    failpoint::reached();
    std::fs::write(&path, message.encode_to_vec()).map_err(|error| CheckpointError::unwritable(&path, error))?;
    Ok(Some(file))
}

/// Reads what ranks wrote into those of `files`, paths within `folder`.
pub(super) fn read<'a>(
    folder: &Path,
    files: impl Iterator<Item = &'a String>,
) -> Result<Vec<Received>, CheckpointError> {
    let prefix = format!("{STATE_DIR}/{PREFIX}");
    let mut received = Vec::new();
    for path in files.filter(|file| file.starts_with(&prefix)).map(|file| folder.join(file)) {
        let bytes = std::fs::read(&path).map_err(|error| CheckpointError::unreadable(&path, error))?;
        let message =
            v1::ReceivedRollouts::decode(&*bytes).map_err(|error| CheckpointError::unreadable(&path, error))?;
        for v1::StepRollout { step, completions } in message.steps {
            let completions = completions.into_iter().map(Completion::try_from).collect::<Result<_, _>>();
            let completions = completions.map_err(|error: BadMessage| CheckpointError::unreadable(&path, error))?;
            received.push(Received { step, completions });
        }
    }
    Ok(received)
}
