//! Checkpoints as plain Hugging Face folders: adapters are merged into their base, and the trainer's state stays behind.

use std::path::{Path, PathBuf};

use aha_nn::comm::ProcessGroup;
use aha_nn::lora::{Merged, peft};
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::load_weights;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tch::{Device, Kind};

use crate::adapters::frozen_weights;
use crate::checkpoint::{self, save_model};
use crate::model_card::ModelCard;

/// What is exported, and as what.
#[derive(Debug, Clone)]
pub struct Export {
    /// A checkpoint, a model folder, or a PEFT folder.
    pub checkpoint: PathBuf,
    /// The base model of adapters, where it is not the folder that they name.
    pub base: Option<PathBuf>,
    /// fp32 or bf16; the checkpoint's own type, or the base's, where there is none.
    pub kind: Option<Kind>,
}

/// What has been written.
#[derive(Debug, Clone, Serialize)]
pub struct Exported {
    pub checkpoint: PathBuf,
    /// The model that adapters were merged into.
    pub base: Option<PathBuf>,
    pub num_parameters: usize,
    /// `float32` or `bfloat16`.
    pub dtype: &'static str,
}

/// The newest whole checkpoint of a run's folder.
///
/// # Errors
/// If there is none.
pub fn newest_checkpoint(run: &Path) -> Result<PathBuf> {
    Ok(checkpoint::newest(&run.join("checkpoints"))?.folder)
}

/// The checkpoint of a run's best evaluation.
///
/// # Errors
/// If none is marked as such, or it is not whole.
pub fn best_checkpoint(run: &Path) -> Result<PathBuf> {
    Ok(checkpoint::best(&run.join("checkpoints"))?.folder)
}

/// No other rank takes part.
fn alone() -> ProcessGroup {
    ProcessGroup::solo("export", Device::Cpu)
}

impl Export {
    /// Writes the model to `out`, which must not be there or be empty; what comes of a run gets its card.
    ///
    /// # Errors
    /// Names what is missing or does not fit; nothing is then left behind.
    pub fn write(&self, out: &Path) -> Result<Exported> {
        let is_free = !out.exists() || std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
        ensure!(is_free, "{}: is there already; name a folder that is not", out.display());
        let is_adapter = self.checkpoint.join(peft::FILES[0]).is_file();
        let exported = if is_adapter { self.merge(out) } else { self.copy(out) }?;
        ModelCard::describe(&self.checkpoint, out);
        Ok(exported)
    }

    fn copy(&self, out: &Path) -> Result<Exported> {
        ensure!(self.base.is_none(), "{} has no adapters, so there is no use for a base", self.checkpoint.display());
        let config = ModelConfig::load(&self.checkpoint)?;
        let kind = self.kind.unwrap_or_else(|| config.stored_kind());
        let weights = load_weights(&self.checkpoint, &config, 1, kind, Device::Cpu)?;
        save_model(out, &self.checkpoint, &config, (&weights, kind), &alone())?;
        Ok(self.exported(None, &config, kind))
    }

    fn merge(&self, out: &Path) -> Result<Exported> {
        let named = match &self.base {
            Some(base) => base.clone(),
            None => peft::base_model(&self.checkpoint)?,
        };
        let config = ModelConfig::load(&named)
            .with_context(|| format!("the base of {}; name it by --base if it has moved", self.checkpoint.display()))?;
        let adapter = peft::open(&self.checkpoint, &config)?;
        let kind = self.kind.unwrap_or_else(|| config.stored_kind());
        // fp32 holds what any file holds; rounding comes last.
        let place = (Kind::Float, Device::Cpu);
        let base = frozen_weights(&named, &config, adapter.quantization, place)?;
        let adapters = adapter.load(&config, (1, Device::Cpu))?;
        let merged = Merged { base: &*base, spec: &adapter.spec, adapters: &adapters };
        save_model(out, &named, &config, (&merged, kind), &alone())?;
        Ok(self.exported(Some(named), &config, kind))
    }

    fn exported(&self, base: Option<PathBuf>, config: &ModelConfig, kind: Kind) -> Exported {
        Exported {
            checkpoint: self.checkpoint.clone(),
            base,
            num_parameters: config.manifest().numel(),
            dtype: if kind == Kind::BFloat16 { "bfloat16" } else { "float32" },
        }
    }
}
