//! A model folder brought to life: weights, tokenizer and a running engine.

use std::sync::Arc;

use aha_core::config::{self, DeviceKind, Dtype, Quantization, RunConfig};
use aha_core::ids::PolicyVersion;
use aha_core::tokenizer::Tokenizer;
use aha_nn::kernels::cpu::Pool;
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::load_weights;
use aha_nn::weights::Weights;
use anyhow::{Context, ensure};
use tch::{Device, Kind};

use crate::engine::{self, EngineConfig, EngineHandle};
use crate::outputs::Outputs;
use crate::request::Limits;
use crate::torch::{CacheSize, CpuRunner, ServingWeights};

/// Blocks hold a multiple of this many tokens: what the kernels read at once.
const BLOCK_SIZE_STEP: usize = 16;

/// What a generator is made from.
#[derive(Debug, Clone)]
pub struct GeneratorOptions {
    pub model: config::Model,
    /// Of random weights, where the model asks for them.
    pub seed: u64,
    pub generator: config::Generator,
}

impl From<&RunConfig> for GeneratorOptions {
    fn from(config: &RunConfig) -> Self {
        Self { model: config.model.clone(), seed: config.run.seed, generator: config.generator.clone() }
    }
}

/// An engine that runs, and what is needed to talk to it.
#[derive(Debug)]
pub(crate) struct Instance {
    pub engine: EngineHandle<ServingWeights>,
    pub outputs: Outputs,
    pub tokenizer: Arc<Tokenizer>,
    pub limits: Limits,
    pub config: ModelConfig,
    pub manifest_hash: u64,
    /// Type of the weights that trainers of this model push.
    pub push_kind: Kind,
    /// Where the weights that serve are.
    pub device: Device,
    pub quantization: Quantization,
}

impl Instance {
    /// Reads the model and starts the engine's thread.
    ///
    /// # Errors
    /// Names the file that cannot be used, or the setting that cannot be met.
    pub(crate) fn start(options: &GeneratorOptions) -> anyhow::Result<Self> {
        let GeneratorOptions { model, seed, generator } = options;
        ensure!(
            model.device != DeviceKind::Cuda,
            "model.device is cuda, and generators run on the CPU: use cpu or auto"
        );
        let tokenizer = Arc::new(Tokenizer::load(&model.path)?);
        let config = ModelConfig::load(&model.path)?;
        let pool = Pool::new(num_threads(generator.threads)?)?;
        let weights = if model.random_init {
            Weights::random(&config, *seed, 1, Kind::Float, Device::Cpu)
        } else {
            load_weights(&model.path, &config, 1, Kind::Float, Device::Cpu)?
        };
        let weights = ServingWeights::new(&config, &weights, generator.quantization, &pool);
        let (cache, max_model_len) = sizes(&config, generator)?;
        let engine_config = EngineConfig {
            block_size: cache.block_size,
            num_blocks: cache.num_blocks,
            max_num_seqs: generator.max_num_seqs,
            max_num_batched_tokens: generator.max_num_batched_tokens,
            max_model_len,
            kv: generator.kv,
            enable_prefix_caching: generator.enable_prefix_caching,
            eos_token_ids: tokenizer.eos_token_ids().to_vec(),
            version: PolicyVersion(0),
        };
        let model_config = config.clone();
        // The thread ends with the last handle.
        let (engine, _) = engine::spawn(engine_config, move || {
            Ok(CpuRunner::new(&model_config, weights, cache, max_model_len, pool))
        })?;
        Ok(Self {
            outputs: Outputs::new(engine.clone(), Arc::clone(&tokenizer)),
            engine,
            limits: Limits {
                vocab_size: config.vocab_size,
                max_model_len,
                eos_token_ids: tokenizer.eos_token_ids().into(),
            },
            tokenizer,
            manifest_hash: config.manifest().hash(),
            config,
            quantization: generator.quantization,
            device: Device::Cpu,
            push_kind: if model.dtype == Dtype::Bfloat16 { Kind::BFloat16 } else { Kind::Float },
        })
    }
}

fn num_threads(asked: usize) -> anyhow::Result<usize> {
    match asked {
        0 => Ok(std::thread::available_parallelism().context("counting this machine's cores")?.get()),
        _ => Ok(asked),
    }
}

/// The cache, and the longest sequence: as asked for, or else what both the model and the cache can take.
fn sizes(config: &ModelConfig, generator: &config::Generator) -> anyhow::Result<(CacheSize, usize)> {
    let config::Generator { block_size, kv_cache_mib, max_model_len, .. } = *generator;
    ensure!(
        block_size > 0 && block_size % BLOCK_SIZE_STEP == 0,
        "generator.block_size is {block_size}, and must be a multiple of {BLOCK_SIZE_STEP}"
    );
    let cache = CacheSize::fitting(config, block_size, kv_cache_mib << 20);
    let capacity = cache.num_blocks * block_size;
    ensure!(
        capacity > 0,
        "generator.kv_cache_mib is {kv_cache_mib}, which holds not even one block of {block_size} tokens"
    );
    if max_model_len == 0 {
        return Ok((cache, config.max_position_embeddings.min(capacity)));
    }
    ensure!(
        max_model_len <= config.max_position_embeddings,
        "generator.max_model_len is {max_model_len}, and the model was made for {}",
        config.max_position_embeddings
    );
    ensure!(
        max_model_len <= capacity,
        "generator.max_model_len is {max_model_len}, and generator.kv_cache_mib {kv_cache_mib} holds {capacity} tokens"
    );
    Ok((cache, max_model_len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Tiny, tiny_config};

    #[track_caller]
    fn check_refused(generator: config::Generator, expect: &str) {
        let error = sizes(&tiny_config(Tiny::Qwen2), &generator).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }

    #[test]
    fn the_longest_sequence_is_what_model_and_cache_can_take() {
        let config = tiny_config(Tiny::Qwen2);
        let of = |generator| sizes(&config, &generator).unwrap();
        let (cache, longest) = of(config::Generator { kv_cache_mib: 1, ..Default::default() });
        assert!(longest == cache.num_blocks * 16 && longest < config.max_position_embeddings, "{cache:?}");
        let (cache, longest) = of(config::Generator { kv_cache_mib: 8, ..Default::default() });
        assert!(longest == config.max_position_embeddings && longest < cache.num_blocks * 16, "{cache:?}");
        assert_eq!(of(config::Generator { max_model_len: 40, ..Default::default() }).1, 40);
    }

    #[test]
    fn sizes_that_cannot_be_met_are_named() {
        check_refused(config::Generator { block_size: 24, ..Default::default() }, "generator.block_size is 24");
        check_refused(config::Generator { kv_cache_mib: 0, ..Default::default() }, "generator.kv_cache_mib is 0");
        check_refused(config::Generator { max_model_len: 1 << 20, ..Default::default() }, "the model was made for");
    }
}
