//! What a run with `lora.r` over 0 begins with: a frozen base, and adapters that are fresh, a user's, or a checkpoint's.

use std::path::Path;

use aha_core::config::{BaseQuantization, RunConfig};
use aha_nn::lora::peft::{self, AdapterFolder};
use aha_nn::lora::{AdapterSpec, Nf4Options, Nf4Weights, fresh_adapters};
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::{ModelFolderError, load_weights};
use aha_nn::unit::ModelWeights;
use aha_nn::weights::Weights;
use anyhow::{Result, anyhow, ensure};
use tch::{Device, Kind};

use crate::torch::adapted::FrozenBase;

/// Checks that `lora.adapter`, where there is one, fits model and configuration, without reading its tensors.
///
/// # Errors
/// Names what differs.
pub(crate) fn check(config: &RunConfig, model_config: &ModelConfig) -> Result<()> {
    match &config.lora.adapter {
        Some(folder) => open(folder, config, model_config).map(drop),
        None => Ok(()),
    }
}

/// The model under the adapters, equal on all ranks.
pub(crate) fn base(
    config: &RunConfig,
    model_config: &ModelConfig,
    (kind, device): (Kind, Device),
) -> Result<FrozenBase> {
    let lora = &config.lora;
    let quantization = match lora.quantization {
        BaseQuantization::None => None,
        BaseQuantization::Nf4 => Some(Nf4Options { double_quant: lora.double_quant }),
    };
    Ok(FrozenBase {
        weights: frozen_weights(&config.model.path, model_config, quantization, (kind, device))?,
        is_quantised: quantization.is_some(),
        spec: spec(config)?,
        dropout: lora.lora_dropout,
        seed: config.run.seed,
    })
}

/// A model folder's weights, which nobody will change.
pub(crate) fn frozen_weights(
    folder: &Path,
    config: &ModelConfig,
    quantization: Option<Nf4Options>,
    (kind, device): (Kind, Device),
) -> Result<Box<dyn ModelWeights>, ModelFolderError> {
    Ok(match quantization {
        Some(options) => Box::new(Nf4Weights::load(folder, config, options, (kind, device))?),
        None => Box::new(load_weights(folder, config, 1, kind, device)?),
    })
}

/// The adapters of a checkpoint's folder, those of `lora.adapter`, or fresh ones.
pub(crate) fn initial(
    config: &RunConfig,
    model_config: &ModelConfig,
    checkpoint: Option<&Path>,
    place: (usize, Device),
) -> Result<Weights> {
    match checkpoint.or(config.lora.adapter.as_deref()) {
        Some(folder) => Ok(open(folder, config, model_config)?.load(model_config, place)?),
        None => {
            let init = (config.lora.init_lora_weights, config.run.seed);
            Ok(fresh_adapters(model_config, &spec(config)?, init, place))
        }
    }
}

fn open(folder: &Path, config: &RunConfig, model_config: &ModelConfig) -> Result<AdapterFolder> {
    let opened = peft::open(folder, model_config)?;
    let difference = spec(config)?.difference(&opened.spec);
    ensure!(
        difference.is_none(),
        "the adapter in {} is another one than this configuration's: {}",
        folder.display(),
        difference.unwrap_or_default()
    );
    Ok(opened)
}

fn spec(config: &RunConfig) -> Result<AdapterSpec> {
    AdapterSpec::new(&config.lora).map_err(|problem| anyhow!("lora.target_modules: {problem}"))
}
