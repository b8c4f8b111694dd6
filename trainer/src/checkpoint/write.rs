//! Writing folders that are whole or absent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use aha_core::config::Lora;
use aha_core::ids::PolicyVersion;
use aha_nn::comm::ProcessGroup;
use aha_nn::lora::peft;
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::save_weights_as;
use aha_nn::unit::{ModelWeights, Walk};
use tch::Kind;

use super::{
    CheckpointError, FileRecord, Progress, REFERENCE_DIR, STATE_DIR, STATE_FILE, State, best, folder, hash_of,
    optimizer, received,
};
use crate::agreement::agree;
use crate::torch::zero::ShardState;
use crate::{durable, failpoint};

/// What belongs to a model beside configuration and weights; taken over from the base model where it has them.
const COMPANIONS: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// What a model's weights are written as.
const WEIGHTS: [&str; 2] = ["config.json", "model.safetensors"];

/// Files by their path within a folder.
type Files = BTreeMap<String, FileRecord>;

/// All that one rank contributes to a checkpoint.
#[derive(Debug, Clone, Copy)]
pub(super) struct Snapshot<'a> {
    pub(super) progress: Progress<'a>,
    pub(super) num_updates: u64,
    pub(super) seed: u64,
    pub(super) base_model: &'a Path,
    pub(super) model_config: &'a ModelConfig,
    /// What trains: the model, or adapters. Equal on all ranks; rank 0 writes them.
    pub(super) weights: &'a dyn ModelWeights,
    /// What the adapters are.
    pub(super) lora: Option<&'a Lora>,
    /// The same for the reference policy, where it moves.
    pub(super) reference: Option<&'a dyn ModelWeights>,
    pub(super) shards: &'a [ShardState],
}

impl Snapshot<'_> {
    /// Writes the checkpoint together with the other ranks, then keeps the best and the newest `limit`, all for 0.
    pub(super) fn save(
        &self,
        checkpoints: &Path,
        limit: usize,
        group: &ProcessGroup,
    ) -> Result<PathBuf, CheckpointError> {
        let whole = folder::of_step(checkpoints, self.progress.step);
        let partial = folder::partial(&whole);
        let written = self.write(&partial, &whole, group);
        if written.is_err() && group.rank() == 0 {
            // Every rank has stopped writing: an agreement ends each part. The first error is the one to report.
            if let Err(error) = folder::remove(&partial) {
                tracing::warn!("the unfinished checkpoint is left behind: {error}");
            }
        }
        written?;
        let pruned = if group.rank() == 0 { self.prune(checkpoints, limit) } else { Ok(()) };
        agree(group, pruned.map(|()| Vec::new()))?;
        Ok(whole)
    }

    /// Removes the oldest checkpoints over `limit`, never this one, which has just been written, nor the best, which is
    /// marked before. Those of later steps go first: the run went back to before them, because they were damaged.
    fn prune(&self, checkpoints: &Path, limit: usize) -> Result<(), CheckpointError> {
        let Progress { step, best, .. } = self.progress;
        best::mark(checkpoints, best)?;
        let (mut earlier, later): (Vec<u64>, Vec<u64>) =
            folder::steps(checkpoints)?.into_iter().filter(|&other| other != step).partition(|&other| other < step);
        let num_kept = if limit == 0 { earlier.len() } else { limit - 1 };
        earlier.truncate(earlier.len().saturating_sub(num_kept));
        earlier.retain(|&step| best.is_none_or(|best| best.step != step));
        for step in later.into_iter().chain(earlier) {
            folder::remove_whole(&folder::of_step(checkpoints, step))?;
        }
        Ok(())
    }

    fn write(&self, partial: &Path, whole: &Path, group: &ProcessGroup) -> Result<(), CheckpointError> {
        let is_main = group.rank() == 0;
        let created = if is_main { create(partial).and_then(|()| create(&partial.join(STATE_DIR))) } else { Ok(()) };
        agree(group, created.map(|()| Vec::new()))?;

        let own = self.write_own(partial, (group.rank(), group.size()));
        let records = own
            .and_then(|files| serde_json::to_vec(&files).map_err(|error| CheckpointError::unwritable(partial, error)));
        let records = agree(group, records)?;

        let finished = if is_main { self.finish(partial, whole, &records) } else { Ok(()) };
        agree(group, finished.map(|()| Vec::new()))?;
        Ok(())
    }

    /// Writes and syncs this rank's files. Where ranks share the weights, all of them gather all units, whatever fails.
    fn write_own(&self, partial: &Path, (rank, world_size): (usize, usize)) -> Result<Files, CheckpointError> {
        let mut names = Vec::new();
        if rank == 0 {
            let model = match self.lora {
                Some(lora) => write_adapter_files(partial, self.base_model, lora, self.weights),
                None => {
                    let weights = (self.weights, self.weights.kind());
                    write_model_files(partial, self.base_model, self.model_config, weights)
                }
            };
            let reference = self.reference.map(|reference| write_reference(partial, self.model_config, reference));
            names.extend(model?);
            names.extend(reference.transpose()?.into_iter().flatten());
        } else {
            for weights in std::iter::once(self.weights).chain(self.reference) {
                Walk::all(weights).finish(weights)?;
            }
        }
        names.extend(optimizer::write(partial, (rank, world_size), self.weights.manifest(), self.shards)?);
        names.extend(received::write(partial, (rank, world_size), self.progress.received)?);
        let mut files = Files::new();
        for name in names {
            let path = partial.join(&name);
            let record = durable::sync(&path).and_then(|()| folder::record(&path));
            files.insert(name, record.map_err(|error| CheckpointError::unwritable(&path, error))?);
        }
        Ok(files)
    }

    /// Writes `state.json` and gives the folder its name.
    fn finish(&self, partial: &Path, whole: &Path, records: &[Vec<u8>]) -> Result<(), CheckpointError> {
        let mut files = Files::new();
        for record in records {
            let record: Files =
                serde_json::from_slice(record).map_err(|error| CheckpointError::unwritable(partial, error))?;
            files.extend(record);
        }
        let state = State {
            step: self.progress.step,
            version: PolicyVersion(self.progress.step),
            num_updates: self.num_updates,
            world_size: records.len(),
            seed: self.seed,
            manifest: Some(hash_of(self.weights.manifest())),
            entropy: self.progress.entropy,
            best: self.progress.best.cloned(),
            files,
        };
        let path = partial.join(STATE_FILE);
        let text = serde_json::to_string_pretty(&state).map_err(|error| CheckpointError::unwritable(&path, error))?;
        // Syncs the entries of its folder as well.
        durable::replace_file(&path, text.as_bytes()).map_err(|error| CheckpointError::unwritable(&path, error))?;
        put_in_place(partial, whole)
    }
}

/// Writes a model folder in one piece.
pub(super) fn model(
    whole: &Path,
    base_model: &Path,
    config: &ModelConfig,
    weights: (&dyn ModelWeights, Kind),
) -> Result<(), CheckpointError> {
    let partial = folder::partial(whole);
    let written = create(&partial).and_then(|()| {
        for name in write_model_files(&partial, base_model, config, weights)? {
            let path = partial.join(&name);
            durable::sync(&path).map_err(|error| CheckpointError::unwritable(&path, error))?;
        }
        put_in_place(&partial, whole)
    });
    if written.is_err() {
        // The first error is the one to report.
        if let Err(error) = folder::remove(&partial) {
            tracing::warn!("the unfinished model is left behind: {error}");
        }
    }
    written
}

/// Returns the names of the files.
fn write_model_files(
    partial: &Path,
    base_model: &Path,
    config: &ModelConfig,
    weights: (&dyn ModelWeights, Kind),
) -> Result<Vec<String>, CheckpointError> {
    write_weights(partial, config, weights)?;
    let mut names = WEIGHTS.map(str::to_owned).to_vec();
    names.extend(copy_companions(partial, base_model)?);
    Ok(names)
}

/// Writes a folder that PEFT loads. Returns the names of the files.
fn write_adapter_files(
    partial: &Path,
    base_model: &Path,
    lora: &Lora,
    adapters: &dyn ModelWeights,
) -> Result<Vec<String>, CheckpointError> {
    // Whoever loads it does not stand where this run does.
    let base = std::path::absolute(base_model).map_err(|error| CheckpointError::unwritable(partial, error))?;
    failpoint::reached();
    peft::save(partial, &base, lora, adapters)?;
    failpoint::reached();
    let mut names = peft::FILES.map(str::to_owned).to_vec();
    names.extend(copy_companions(partial, base_model)?);
    Ok(names)
}

/// Returns the names of the files.
fn copy_companions(partial: &Path, base_model: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut names = Vec::new();
    for name in COMPANIONS {
        let (from, to) = (base_model.join(name), partial.join(name));
        if from.is_file() {
            failpoint::reached();
            std::fs::copy(&from, &to)
                .map_err(|error| CheckpointError::unwritable(&to, format!("copying {}: {error}", from.display())))?;
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Returns the names of the files.
fn write_reference(
    partial: &Path,
    config: &ModelConfig,
    weights: &dyn ModelWeights,
) -> Result<Vec<String>, CheckpointError> {
    let folder = partial.join(REFERENCE_DIR);
    if let Err(error) = create(&folder) {
        Walk::all(weights).finish(weights)?;
        return Err(error);
    }
    write_weights(&folder, config, (weights, weights.kind()))?;
    durable::sync(&folder).map_err(|error| CheckpointError::unwritable(&folder, error))?;
    Ok(WEIGHTS.map(|name| format!("{REFERENCE_DIR}/{name}")).to_vec())
}

/// Writes the files [`WEIGHTS`].
fn write_weights(
    folder: &Path,
    config: &ModelConfig,
    (weights, kind): (&dyn ModelWeights, Kind),
) -> Result<(), CheckpointError> {
    failpoint::reached();
    save_weights_as(kind, folder, config, weights)?;
    failpoint::reached();
    let [config, weights] = WEIGHTS.map(|name| folder.join(name));
    // The weights come out readable by their owner alone; whoever may read the rest may read them.
    std::fs::metadata(config)
        .and_then(|config| std::fs::set_permissions(&weights, config.permissions()))
        .map_err(|error| CheckpointError::unwritable(&weights, error))
}

/// An empty folder.
fn create(path: &Path) -> Result<(), CheckpointError> {
    folder::remove(path)?;
    failpoint::reached();
    std::fs::create_dir_all(path).map_err(|error| CheckpointError::unwritable(path, error))
}

/// Syncs a folder's entries and renames it. One of that name, of a run that went back to before it, makes way.
fn put_in_place(partial: &Path, whole: &Path) -> Result<(), CheckpointError> {
    durable::sync(partial).map_err(|error| CheckpointError::unwritable(partial, error))?;
    folder::remove_whole(whole)?;
    durable::rename_dir(partial, whole).map_err(|error| CheckpointError::unwritable(whole, error))
}
