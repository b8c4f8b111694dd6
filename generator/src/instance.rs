//! A model folder brought to life: weights, tokenizer and a running engine.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use aha_core::config::{self, DeviceKind, Dtype, Quantization, RunConfig};
use aha_core::ids::PolicyVersion;
use aha_core::tokenizer::Tokenizer;
use aha_nn::gpu::{CudaQueue, GpuModel, GpuSizes, GpuWeights};
use aha_nn::kernels::cpu::Pool;
use aha_nn::kernels::cuda::{CompileCache, KernelShapes, LogitKind};
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::load_weights;
use aha_nn::runtime;
use aha_nn::weights::Weights;
use anyhow::{Context, ensure};
use tch::{Device, Kind};

use crate::engine::{self, EngineConfig, EngineHandle};
use crate::outputs::Outputs;
use crate::request::Limits;
use crate::scorer::Scorer;
use crate::torch::{CacheSize, CpuRunner, DeviceRunner, DeviceWeights, GpuRunner, ServingWeights, WeightFormat};

/// Blocks hold a multiple of this many tokens: what the kernels read at once.
const BLOCK_SIZE_STEP: usize = 16;

/// What a generator is made from.
#[derive(Debug, Clone)]
pub struct GeneratorOptions {
    pub model: config::Model,
    /// Of random weights, where the model asks for them.
    pub seed: u64,
    pub generator: config::Generator,
    /// Index among the GPUs that this process sees.
    pub gpu: usize,
    /// Start asleep, for the weights of somebody in this process, instead of with those of the model's folder.
    pub awaits_weights: bool,
}

impl From<&RunConfig> for GeneratorOptions {
    fn from(config: &RunConfig) -> Self {
        let (model, generator) = (config.model.clone(), config.generator.clone());
        Self { model, seed: config.run.seed, generator, gpu: 0, awaits_weights: false }
    }
}

/// An engine that runs, and what is needed to talk to it.
#[derive(Debug)]
pub(crate) struct Instance {
    pub engine: EngineHandle<DeviceWeights>,
    pub scorer: Scorer,
    pub outputs: Outputs,
    pub tokenizer: Arc<Tokenizer>,
    pub limits: Limits,
    pub config: ModelConfig,
    pub manifest_hash: u64,
    pub format: WeightFormat,
    /// Folder of the model, as it was named.
    pub model: PathBuf,
}

impl Instance {
    /// Reads the model and starts the engine's thread.
    ///
    /// # Errors
    /// Names the file that cannot be used, or the setting that cannot be met.
    pub(crate) fn start(options: &GeneratorOptions) -> anyhow::Result<Self> {
        let GeneratorOptions { model, seed, generator, gpu, awaits_weights } = options;
        let format = weight_format(model, generator, *gpu)?;
        let tokenizer = Arc::new(Tokenizer::load(&model.path)?);
        let config = ModelConfig::load(&model.path)?;
        let pool = Pool::new(num_threads(generator.threads)?)?;
        let weights = match (awaits_weights, model.random_init) {
            (true, _) => None,
            (false, true) => Some(Weights::random(&config, *seed, 1, format.pushed, Device::Cpu)),
            (false, false) => Some(load_weights(&model.path, &config, 1, format.pushed, Device::Cpu)?),
        };
        let (cache, max_model_len) = sizes(&config, generator, format.device)?;
        let engine_config = EngineConfig {
            block_size: cache.block_size,
            num_blocks: cache.num_blocks,
            max_num_seqs: generator.max_num_seqs,
            max_num_batched_tokens: generator.max_num_batched_tokens,
            max_model_len,
            steps_per_look: if format.device.is_cuda() { generator.steps_per_look } else { 1 },
            kv: generator.kv,
            enable_prefix_caching: generator.enable_prefix_caching,
            eos_token_ids: tokenizer.eos_token_ids().to_vec(),
            version: PolicyVersion(0),
        };
        let build = RunnerBuild {
            sizes: engine_config.clone(),
            config: config.clone(),
            weights,
            pool,
            format,
            kernel_cache: generator.kernel_cache.clone(),
        };
        // The thread ends with the last handle.
        let (engine, _) = engine::spawn(engine_config, move || build.runner())?;
        let scorer = Scorer::new(engine.clone());
        Ok(Self {
            outputs: Outputs::new(scorer.clone(), Arc::clone(&tokenizer), max_model_len),
            scorer,
            engine,
            limits: Limits {
                vocab_size: config.vocab_size,
                max_model_len,
                eos_token_ids: tokenizer.eos_token_ids().into(),
            },
            tokenizer,
            manifest_hash: config.manifest().hash(),
            config,
            format,
            model: model.path.clone(),
        })
    }
}

/// What the engine's thread makes its runner from: a GPU belongs to the thread that uses it.
struct RunnerBuild {
    sizes: EngineConfig,
    config: ModelConfig,
    weights: Option<Weights>,
    pool: Pool,
    format: WeightFormat,
    kernel_cache: Option<PathBuf>,
}

impl RunnerBuild {
    fn runner(self) -> anyhow::Result<DeviceRunner> {
        if let Device::Cuda(device) = self.format.device {
            return Ok(DeviceRunner::Gpu(Box::new(GpuRunner::new(self.gpu_model(device)?, self.pool))));
        }
        let Self { sizes, config, weights, pool, format, .. } = self;
        let cache = CacheSize { block_size: sizes.block_size, num_blocks: sizes.num_blocks };
        let weights = weights.map(|weights| ServingWeights::new(&config, &weights, format.quantization, &pool));
        Ok(DeviceRunner::Cpu(Box::new(CpuRunner::new(&config, weights, cache, sizes.max_model_len, pool))))
    }

    fn gpu_model(&self, device: usize) -> anyhow::Result<GpuModel<CudaQueue>> {
        let Self { sizes, config, weights, kernel_cache, .. } = self;
        let EngineConfig { block_size, num_blocks, max_model_len, max_num_seqs, .. } = *sizes;
        let folder = kernel_cache
            .clone()
            .or_else(CompileCache::default_folder)
            .context("no home folder to keep compiled GPU kernels in: name one as generator.kernel_cache")?;
        let shapes = KernelShapes::of(config, block_size, LogitKind::Fp32)
            .context("this model cannot be served on a GPU; model.device: cpu can")?;
        let start = Instant::now();
        let queue = CudaQueue::new(device, &shapes.programs(), &CompileCache::new(folder.clone()))
            .with_context(|| format!("preparing GPU {device} and its kernels"))?;
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!(seconds, folder = %folder.display(), "GPU kernels are compiled and loaded");
        let sizes = GpuSizes {
            block_size,
            num_blocks,
            max_model_len,
            max_num_seqs,
            max_num_batched_tokens: sizes.max_num_batched_tokens,
            steps_per_look: sizes.steps_per_look,
        };
        let weights = weights.as_ref().map(|weights| GpuWeights::new(config, weights, Device::Cuda(device)));
        let weights = weights.transpose().context("copying weights to the GPU")?;
        GpuModel::new(queue, config, weights, sizes).context("setting GPU memory aside: generator.kv_cache_mib")
    }
}

/// Where the model runs, and in which type it is pushed.
fn weight_format(model: &config::Model, generator: &config::Generator, gpu: usize) -> anyhow::Result<WeightFormat> {
    let name = match model.device {
        DeviceKind::Auto => "auto",
        DeviceKind::Cpu => "cpu",
        DeviceKind::Cuda => "cuda",
    };
    let device = runtime::device(name, gpu).context("model.device")?;
    let format = |pushed| WeightFormat { pushed, device, quantization: generator.quantization };
    if device == Device::Cpu {
        return Ok(format(if model.dtype == Dtype::Bfloat16 { Kind::BFloat16 } else { Kind::Float }));
    }
    check_gpu_format(model.dtype, generator.quantization)?;
    Ok(format(Kind::BFloat16))
}

fn check_gpu_format(dtype: Dtype, quantization: Quantization) -> anyhow::Result<()> {
    ensure!(
        dtype != Dtype::Float32,
        "model.dtype is float32, and a generator on a GPU serves bfloat16: use auto or bfloat16, or model.device: cpu"
    );
    ensure!(
        quantization == Quantization::None,
        "generator.quantization is int8, which is for the CPU: use none, or model.device: cpu"
    );
    Ok(())
}

pub(crate) fn num_threads(asked: usize) -> anyhow::Result<usize> {
    match asked {
        0 => Ok(std::thread::available_parallelism().context("counting this machine's cores")?.get()),
        _ => Ok(asked),
    }
}

/// The cache, and the longest sequence: as asked for, or else what both the model and the cache can take.
fn sizes(config: &ModelConfig, generator: &config::Generator, device: Device) -> anyhow::Result<(CacheSize, usize)> {
    let config::Generator { block_size, kv_cache_mib, max_model_len, .. } = *generator;
    ensure!(
        block_size > 0 && block_size % BLOCK_SIZE_STEP == 0,
        "generator.block_size is {block_size}, and must be a multiple of {BLOCK_SIZE_STEP}"
    );
    // Keys and values are fp32 on the CPU, and take half of that on a GPU.
    let bytes = (kv_cache_mib << 20) * if device.is_cuda() { 2 } else { 1 };
    let cache = CacheSize::fitting(config, block_size, bytes);
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
        let error = sizes(&tiny_config(Tiny::Qwen2), &generator, Device::Cpu).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }

    #[test]
    fn the_longest_sequence_is_what_model_and_cache_can_take() {
        let config = tiny_config(Tiny::Qwen2);
        let of = |generator| sizes(&config, &generator, Device::Cpu).unwrap();
        let (cache, longest) = of(config::Generator { kv_cache_mib: 1, ..Default::default() });
        assert!(longest == cache.num_blocks * 16 && longest < config.max_position_embeddings, "{cache:?}");
        let (cache, longest) = of(config::Generator { kv_cache_mib: 8, ..Default::default() });
        assert!(longest == config.max_position_embeddings && longest < cache.num_blocks * 16, "{cache:?}");
        assert_eq!(of(config::Generator { max_model_len: 40, ..Default::default() }).1, 40);
    }

    #[test]
    fn a_gpu_holds_twice_as_many_blocks() {
        let config = tiny_config(Tiny::Qwen2);
        let generator = config::Generator { kv_cache_mib: 3, ..Default::default() };
        let of = |device| sizes(&config, &generator, device).unwrap().0.num_blocks;
        assert_eq!(of(Device::Cuda(0)), 2 * of(Device::Cpu));
    }

    #[test]
    fn what_a_gpu_cannot_serve_is_refused() {
        check_gpu_format(Dtype::Auto, Quantization::None).unwrap();
        check_gpu_format(Dtype::Bfloat16, Quantization::None).unwrap();
        let error = check_gpu_format(Dtype::Float32, Quantization::None).unwrap_err().to_string();
        assert!(error.starts_with("model.dtype is float32"), "{error}");
        let error = check_gpu_format(Dtype::Auto, Quantization::Int8).unwrap_err().to_string();
        assert!(error.starts_with("generator.quantization is int8"), "{error}");
    }

    #[test]
    fn a_gpu_that_is_not_there_is_named() {
        let model = config::Model { device: DeviceKind::Cuda, ..Default::default() };
        if runtime::num_cuda_devices() == 0 {
            let error = format!("{:#}", weight_format(&model, &config::Generator::default(), 0).unwrap_err());
            assert_eq!(error, "model.device: device cuda:0 is not there: libtorch sees 0 CUDA devices");
        }
    }

    #[test]
    fn sizes_that_cannot_be_met_are_named() {
        check_refused(config::Generator { block_size: 24, ..Default::default() }, "generator.block_size is 24");
        check_refused(config::Generator { kv_cache_mib: 0, ..Default::default() }, "generator.kv_cache_mib is 0");
        check_refused(config::Generator { max_model_len: 1 << 20, ..Default::default() }, "the model was made for");
    }
}
