//! `aha bench decode`: tokens per second of the rollout engine.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use aha_core::config::Generator;
use aha_core::ids::TokenId;
use aha_core::random::derive_seed;
use aha_core::rollout::Sampling;
use aha_generator::{LocalGenerator, StepTimes};
use aha_nn::bandwidth::copy_bandwidth;
use aha_nn::model_config::ModelConfig;
use aha_nn::runtime;
use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::roofline::{Storage, Traffic};
use crate::commands::shapes::ModelShape;
use crate::commands::{LoadFormat, Placement, Quantize, network_runtime};

/// Tokens per second of the engine, prefill included, and the share of what the memory allows.
///
/// That share counts what decoding must move (the weights once a step, the keys and values of every context, the
/// logits once) over the memory's bandwidth, of the whole time. On a CPU a copy is slower than reading alone, and the share
/// can pass 100 %.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  aha bench decode --model models/smollm2-135m --batch 1,8,32 --prompt-tokens 46 --new-tokens 128
  aha bench decode --model-shape qwen2.5-0.5b --load-format dummy --quantization int8
  aha bench decode --model-shape qwen2.5-0.5b --load-format dummy --device cuda --batch 256 --new-tokens 512")]
pub(super) struct Args {
    /// Hugging Face model folder
    #[arg(long, required_unless_present = "model_shape")]
    model: Option<PathBuf>,
    /// A known shape instead of a folder; needs --load-format dummy
    #[arg(long, conflicts_with = "model")]
    model_shape: Option<ModelShape>,
    #[command(flatten)]
    placement: Placement,
    /// How the layers' matrices are stored
    #[arg(long, value_enum, default_value_t = Quantize::None)]
    quantization: Quantize,
    /// Sequences decoded at once; several are measured one after the other
    #[arg(long, value_delimiter = ',', default_value = "32")]
    batch: Vec<usize>,
    /// Samples of each prompt, which share its keys and values; must divide the batch
    #[arg(long, default_value_t = 1)]
    group: usize,
    #[arg(long, default_value_t = 46)]
    prompt_tokens: usize,
    /// JSON array of prompts, each an array of token ids, instead of random ones
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_tokens")]
    prompts: Option<PathBuf>,
    /// Tokens of every completion
    #[arg(long, default_value_t = 128)]
    new_tokens: u32,
    /// Threads of the engine; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Bandwidth of the memory in GB/s, such as 3350 of an H100 SXM's data sheet, instead of that of a measured copy
    #[arg(long)]
    bandwidth_gbs: Option<f64>,
    /// Print one JSON object a batch size
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    ensure!(
        args.prompt_tokens > 0 && args.new_tokens > 0 && args.group > 0,
        "--prompt-tokens, --new-tokens and --group must be at least 1"
    );
    for &batch in &args.batch {
        ensure!(batch > 0 && batch % args.group == 0, "--batch {batch} must be a multiple of --group {}", args.group);
    }
    ensure!(args.bandwidth_gbs.is_none_or(|gbs| gbs.is_finite() && gbs > 0.0), "--bandwidth-gbs must be over 0");
    let folder = ModelFolder::of(args)?;
    let model = BenchModel { config: ModelConfig::load(folder.path())?, folder };
    let prompts = Prompts::of(args, model.config.vocab_size)?;
    let roofline = Roofline::of(args, &model.config)?;
    let runtime = network_runtime()?;
    for &batch in &args.batch {
        // An engine of its own, so that no batch finds the keys and values of the one before.
        let generator = start(args, &model, batch, prompts.longest())?;
        let measured = runtime.block_on(measure(args, &generator, &prompts, batch))?;
        let share = roofline.share(&measured, prompts.mean());
        println!(
            "{}",
            if args.json { measured.json(&roofline, share).to_string() } else { measured.line(&roofline, share) }
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn start(args: &Args, model: &BenchModel, batch: usize, prompt_tokens: usize) -> Result<LocalGenerator> {
    let defaults = Generator::default();
    let max_model_len = prompt_tokens + args.new_tokens as usize;
    // Room for every sequence's last block, and for those that are copied where samples part.
    let num_tokens = batch * (max_model_len + 2 * defaults.block_size);
    let kv_cache = num_tokens as f64 * Traffic::of(&model.config, storage(args)?).kv_per_token;
    let options = Generator {
        max_num_seqs: batch,
        max_num_batched_tokens: defaults.max_num_batched_tokens.max(batch),
        max_model_len,
        kv_cache_mib: defaults.kv_cache_mib.max((kv_cache / f64::from(1 << 20)).ceil() as usize),
        threads: args.threads,
        quantization: args.quantization.into(),
        // The warm-up may have the same prompts, and must not compute them for the measured run.
        enable_prefix_caching: false,
        ..defaults
    };
    LocalGenerator::load(&args.placement.options(model.folder.path(), options)?)
}

fn storage(args: &Args) -> Result<Storage> {
    let element = args.placement.kind()?.elt_size_in_bytes();
    let layer_matrix = match args.quantization {
        Quantize::None => element,
        Quantize::Int8 => 1,
    };
    Ok(Storage { element, layer_matrix })
}

async fn measure(args: &Args, generator: &LocalGenerator, prompts: &Prompts, batch: usize) -> Result<Measured> {
    let generate = async |seed: u64, max_tokens: u32| -> Result<usize> {
        let sampling = Sampling { max_tokens, ignore_eos: true, ..Sampling::default() };
        let requests = (0..batch / args.group).map(|index| {
            let (prompt, sampling) = (prompts.prompt(seed, index), &sampling);
            async move { generator.generate(&prompt, sampling, seed, args.group as u32).await }
        });
        let groups = try_join_all(requests).await?;
        Ok(groups.iter().flatten().map(|completion| completion.token_ids.len()).sum())
    };
    generate(0, args.new_tokens.min(4)).await?;
    let before = generator.status().await?;
    let start = Instant::now();
    let num_tokens = generate(1, args.new_tokens).await?;
    let elapsed = start.elapsed();
    let after = generator.status().await?;
    let steps = after.counters.steps - before.counters.steps;
    Ok(Measured { batch, num_tokens, steps, elapsed, times: after.times - before.times })
}

struct BenchModel {
    config: ModelConfig,
    folder: ModelFolder,
}

/// What the memory allows.
struct Roofline {
    traffic: Traffic,
    /// Bytes per second.
    bandwidth: f64,
    /// Where that number comes from.
    source: &'static str,
    new_tokens: u32,
}

impl Roofline {
    fn of(args: &Args, config: &ModelConfig) -> Result<Self> {
        let (bandwidth, source) = match args.bandwidth_gbs {
            Some(gbs) => (1e9 * gbs, "given bandwidth"),
            None => {
                let cores = std::thread::available_parallelism().context("counting this machine's cores")?;
                runtime::set_num_threads(NonZeroUsize::new(args.threads).unwrap_or(cores));
                (copy_bandwidth(args.placement.device()?), "measured copy bandwidth")
            }
        };
        Ok(Self { traffic: Traffic::of(config, storage(args)?), bandwidth, source, new_tokens: args.new_tokens })
    }

    /// The least time for every decode step, over the time that was taken.
    fn share(&self, measured: &Measured, prompt_tokens: f64) -> f64 {
        let context = prompt_tokens + f64::from(self.new_tokens) / 2.0;
        let least = f64::from(self.new_tokens) * self.traffic.of_step(measured.batch, context) / self.bandwidth;
        least / measured.elapsed.as_secs_f64()
    }
}

/// One batch size.
struct Measured {
    batch: usize,
    num_tokens: usize,
    steps: u64,
    elapsed: Duration,
    times: StepTimes,
}

impl Measured {
    fn tokens_per_second(&self) -> f64 {
        self.num_tokens as f64 / self.elapsed.as_secs_f64()
    }

    fn ms_per_step(&self) -> f64 {
        1e3 * self.elapsed.as_secs_f64() / self.steps as f64
    }

    /// Parts of a step and their milliseconds; what is in none of them is small operations.
    fn parts(&self) -> [(&'static str, f64); 5] {
        let StepTimes { gemm, attention, sampling, scheduling } = self.times;
        let other = self.elapsed.saturating_sub(gemm + attention + sampling + scheduling);
        let parts = [
            ("gemm", gemm),
            ("attention", attention),
            ("sampling", sampling),
            ("scheduling", scheduling),
            ("other", other),
        ];
        parts.map(|(name, time)| (name, 1e3 * time.as_secs_f64() / self.steps as f64))
    }

    fn json(&self, roofline: &Roofline, share: f64) -> Value {
        let parts: serde_json::Map<String, Value> =
            self.parts().into_iter().map(|(name, ms)| (name.to_owned(), json!(ms))).collect();
        json!({
            "batch": self.batch,
            "tokens_per_second": self.tokens_per_second(),
            "ms_per_step": self.ms_per_step(),
            "ms_of_a_step": parts,
            "percent_of_roofline": 100.0 * share,
            "bandwidth_gbs": roofline.bandwidth / 1e9,
            "bandwidth_source": roofline.source,
        })
    }

    fn line(&self, roofline: &Roofline, share: f64) -> String {
        let parts = self.parts().map(|(name, ms)| format!("{name} {ms:.2}"));
        format!(
            "batch {:>4}: {:>8.1} tokens/s, {:>8.2} ms a step ({}), {:.1} % of the roofline at {:.0} GB/s, {}",
            self.batch,
            self.tokens_per_second(),
            self.ms_per_step(),
            parts.join(", "),
            100.0 * share,
            roofline.bandwidth / 1e9,
            roofline.source
        )
    }
}

/// What is asked.
enum Prompts {
    /// Random tokens: the embedding of a repeated one would stay in the processor's cache.
    Random {
        num_tokens: usize,
        vocab_size: usize,
    },
    Given(Vec<Vec<TokenId>>),
}

impl Prompts {
    fn of(args: &Args, vocab_size: usize) -> Result<Self> {
        let Some(path) = &args.prompts else {
            return Ok(Self::Random { num_tokens: args.prompt_tokens, vocab_size });
        };
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let prompts: Vec<Vec<TokenId>> = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a JSON array of arrays of token ids", path.display()))?;
        ensure!(!prompts.is_empty(), "{} has no prompts", path.display());
        Ok(Self::Given(prompts))
    }

    fn mean(&self) -> f64 {
        match self {
            Self::Random { num_tokens, .. } => *num_tokens as f64,
            Self::Given(prompts) => prompts.iter().map(Vec::len).sum::<usize>() as f64 / prompts.len() as f64,
        }
    }

    fn longest(&self) -> usize {
        match self {
            Self::Random { num_tokens, .. } => *num_tokens,
            Self::Given(prompts) => prompts.iter().map(Vec::len).max().unwrap_or(0),
        }
    }

    fn prompt(&self, seed: u64, index: usize) -> Vec<TokenId> {
        match self {
            Self::Random { num_tokens, vocab_size } => (0..*num_tokens as u64)
                .map(|position| (derive_seed(seed, &[index as u64, position]) % *vocab_size as u64) as TokenId)
                .collect(),
            Self::Given(prompts) => prompts[index % prompts.len()].clone(),
        }
    }
}

/// The user's folder, or one made of a known shape.
enum ModelFolder {
    Given(PathBuf),
    Made(TempDir),
}

impl ModelFolder {
    fn of(args: &Args) -> Result<Self> {
        match (&args.model, args.model_shape) {
            (Some(path), _) => Ok(Self::Given(path.clone())),
            (None, Some(shape)) => {
                ensure!(
                    args.placement.load_format == LoadFormat::Dummy,
                    "--model-shape has no weights: add --load-format dummy"
                );
                let folder = tempfile::tempdir().context("making a folder for the model's shape")?;
                shape.write(folder.path())?;
                Ok(Self::Made(folder))
            }
            (None, None) => anyhow::bail!("name a --model folder or a --model-shape"),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Made(folder) => folder.path(),
        }
    }
}
