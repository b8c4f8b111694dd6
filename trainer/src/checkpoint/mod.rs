//! Checkpoints: `checkpoints/step-N`, a Hugging Face folder, or PEFT's where adapters trained, with the optimizer's state
//! beside it.
//!
//! A checkpoint is whole or absent. It is written under a hidden name, synced, and renamed by rank 0 once every rank has
//! written its part; `trainer_state/state.json` has the hash of every file, and one that does not match is not used.

mod best;
mod folder;
mod optimizer;
mod read;
mod received;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use aha_core::config::RunConfig;
use aha_core::ids::PolicyVersion;
use aha_core::manifest::Manifest;
use aha_nn::comm::{CommError, ProcessGroup};
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::ModelFolderError;
use aha_nn::unit::{ModelWeights, Walk};
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::agreement::Disagreement;
use crate::entropy::EntropyControl;
use crate::rollouts::Received;
use crate::run_dir::RunDir;
use crate::torch::learner::Learner;
use crate::torch::zero::FullState;
pub use best::Best;
use write::Snapshot;

/// Folders and files with this in front are being written or removed; nobody reads them.
const PARTIAL: &str = ".partial-";

const STATE_DIR: &str = "trainer_state";
/// The reference policy, where it moves; a model folder without a tokenizer.
const REFERENCE_DIR: &str = "trainer_state/reference";
const STATE_FILE: &str = "trainer_state/state.json";

/// A checkpoint that is whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Loads as a model folder, or with PEFT where adapters trained.
    pub folder: PathBuf,
    pub state: State,
}

/// What `state.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done: training goes on with this one, counted from 0.
    pub step: u64,
    /// The version that these weights were published as.
    pub version: PolicyVersion,
    /// Updates of the optimizer.
    pub num_updates: u64,
    /// Ranks that wrote it. Any number can read it.
    pub world_size: usize,
    pub seed: u64,
    /// Hash of the manifest of what trains, in hexadecimal: the order in which the optimizer's state lies. Where it is not
    /// there, every bias lay behind its matrix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
    /// Where `train.use_adaptive_entropy` is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<EntropyControl>,
    /// The best evaluation up to here, where `eval.keep_best` is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// Every other file of the folder, by its path within.
    pub files: BTreeMap<String, FileRecord>,
}

/// What a file must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    pub bytes: u64,
    /// In hexadecimal.
    pub xxh3: String,
}

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot write {}: {reason}; earlier checkpoints are as they were", path.display())]
    Unwritable { path: PathBuf, reason: String },
    #[error("cannot read {}: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{}: {problem}", path.display())]
    Damaged { path: PathBuf, problem: String },
    #[error(
        "none of the checkpoints in {} is whole ({problems}); restore one, or remove the run's folder to start over",
        folder.display()
    )]
    NoneWhole { folder: PathBuf, problems: String },
    #[error(
        "{}: the optimizer's state is of parameters in another order (manifest {found}, and here it is {expected}): go on \
         with the version and the settings that wrote it, or start a new run with this folder as model.path",
        folder.display()
    )]
    OtherOrder { folder: PathBuf, found: String, expected: String },
    #[error("rank {rank}: {reason}")]
    Elsewhere { rank: usize, reason: String },
    #[error(transparent)]
    ModelFolder(#[from] ModelFolderError),
    #[error(transparent)]
    Comm(#[from] CommError),
}

/// Where a run is, beside what trains.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Steps done.
    pub step: u64,
    pub entropy: Option<EntropyControl>,
    /// The best evaluation so far, whose checkpoint is kept.
    pub best: Option<&'a Best>,
    /// Of later steps, by this rank.
    pub received: &'a [Received],
}

/// Writes `checkpoints/step-N` after `step` steps, and removes the oldest over `train.save_total_limit`, but for the best.
/// All ranks call this together.
///
/// # Errors
/// On all ranks alike, naming the path and the reason. Nothing is left of the attempt, and earlier checkpoints stay.
pub fn save(
    run_dir: &RunDir,
    config: &RunConfig,
    learner: &Learner,
    progress: Progress<'_>,
) -> Result<PathBuf, CheckpointError> {
    let zero = learner.zero();
    let snapshot = Snapshot {
        progress,
        num_updates: zero.num_updates(),
        seed: config.run.seed,
        base_model: &config.model.path,
        model_config: learner.config(),
        weights: zero.weights(),
        lora: config.lora.is_on().then_some(&config.lora),
        reference: learner.reference().filter(|_| config.train.sync_ref_model).map(|reference| reference as _),
        shards: &zero.state(),
    };
    snapshot.save(&run_dir.checkpoints(), config.train.save_total_limit, zero.group())
}

/// Writes a Hugging Face folder, with weights of type `kind` and the tokenizer of `base_model`; a folder of that name is
/// replaced. Rank 0 writes; all ranks call this together.
///
/// # Errors
/// On rank 0, names the path and the reason; the folder is then as it was. On the others, if they cannot do their part.
pub fn save_model(
    folder: &Path,
    base_model: &Path,
    config: &ModelConfig,
    (weights, kind): (&dyn ModelWeights, Kind),
    group: &ProcessGroup,
) -> Result<(), CheckpointError> {
    if group.rank() > 0 {
        return Ok(Walk::all(weights).finish(weights)?);
    }
    write::model(folder, base_model, config, (weights, kind))
}

/// The newest whole checkpoint of a run, for reading alone: nothing is removed.
///
/// # Errors
/// If there is none, or none that is whole.
pub fn newest(checkpoints: &Path) -> Result<Checkpoint, CheckpointError> {
    let none = || CheckpointError::unreadable(checkpoints, "there is no checkpoint");
    let state = read::newest(checkpoints)?.ok_or_else(none)?;
    Ok(Checkpoint { folder: folder::of_step(checkpoints, state.step), state })
}

/// The checkpoint of a run's best evaluation, for reading alone.
///
/// # Errors
/// If none is marked as such, or it is not whole.
pub fn best(checkpoints: &Path) -> Result<Checkpoint, CheckpointError> {
    let (folder, best) = best::read(checkpoints)?;
    let state = read::verify(&folder, best.step)?;
    Ok(Checkpoint { folder, state })
}

/// The newest whole checkpoint of a run, the same on all ranks; `None` where there is no checkpoint at all. Rank 0 reads
/// every file of it, removes what an interrupted attempt left behind, and marks the best checkpoint.
///
/// # Errors
/// If there are checkpoints, but none is whole: starting over silently would overwrite them.
pub fn latest(run_dir: &RunDir, group: &ProcessGroup) -> Result<Option<Checkpoint>, CheckpointError> {
    read::latest(&run_dir.checkpoints(), group)
}

impl Checkpoint {
    /// The folder of the reference policy, where the checkpoint has one.
    #[must_use]
    pub fn reference(&self) -> Option<PathBuf> {
        let written = self.state.files.contains_key(&format!("{REFERENCE_DIR}/model.safetensors"));
        written.then(|| self.folder.join(REFERENCE_DIR))
    }

    /// The optimizer's state of every unit of what trains, put together from the files of all ranks that wrote it.
    ///
    /// # Errors
    /// If it lies in the order of another manifest; names the file that cannot be read, or the unit whose state is not
    /// complete.
    pub fn optimizer(&self, manifest: &Manifest) -> Result<Vec<FullState>, CheckpointError> {
        let expected = hash_of(manifest);
        let is_in_order = match &self.state.manifest {
            Some(found) => *found == expected,
            None => !manifest.params().any(|param| param.name.ends_with("q_proj.bias")),
        };
        if !is_in_order {
            let (folder, found) =
                (self.folder.clone(), self.state.manifest.clone().unwrap_or_else(|| "none".to_owned()));
            return Err(CheckpointError::OtherOrder { folder, found, expected });
        }
        optimizer::read(&self.folder, self.state.files.keys(), manifest)
    }

    /// What all ranks had received of later steps.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn received(&self) -> Result<Vec<Received>, CheckpointError> {
        received::read(&self.folder, self.state.files.keys())
    }
}

/// As [`State::manifest`].
fn hash_of(manifest: &Manifest) -> String {
    format!("{:016x}", manifest.hash())
}

impl CheckpointError {
    fn unwritable(path: &Path, reason: impl ToString) -> Self {
        Self::Unwritable { path: path.to_owned(), reason: reason.to_string() }
    }

    fn unreadable(path: &Path, reason: impl ToString) -> Self {
        Self::Unreadable { path: path.to_owned(), reason: reason.to_string() }
    }
}

impl From<Disagreement<CheckpointError>> for CheckpointError {
    fn from(disagreement: Disagreement<CheckpointError>) -> Self {
        match disagreement {
            Disagreement::Here(error) => error,
            Disagreement::Elsewhere { rank, reason } => Self::Elsewhere { rank, reason },
            Disagreement::Comm(error) => Self::Comm(error),
        }
    }
}

#[cfg(test)]
mod tests;
