//! `aha bench decode`: tokens per second of the rollout engine.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use aha_core::config::Generator;
use aha_core::ids::TokenId;
use aha_core::random::derive_seed;
use aha_core::rollout::Sampling;
use aha_generator::{LocalGenerator, StepTimes};
use aha_nn::model_config::ModelConfig;
use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::shapes::ModelShape;
use crate::commands::{Quantize, local_options, network_runtime};

/// Tokens per second of the engine, prefill included.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  aha bench decode --model models/smollm2-135m --batch 1,8,32 --prompt-tokens 46 --new-tokens 128
  aha bench decode --model-shape qwen2.5-0.5b --load-format dummy --quantization int8")]
pub(super) struct Args {
    /// Hugging Face model folder
    #[arg(long, required_unless_present = "model_shape")]
    model: Option<PathBuf>,
    /// A known shape instead of a folder; needs --load-format dummy
    #[arg(long, conflicts_with = "model")]
    model_shape: Option<ModelShape>,
    /// Where weights come from
    #[arg(long, value_enum, default_value_t = LoadFormat::Safetensors)]
    load_format: LoadFormat,
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
    /// Print one JSON object a batch size
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LoadFormat {
    /// The folder's files
    Safetensors,
    /// Random numbers: only the folder's config.json and tokenizer are read
    Dummy,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    ensure!(
        args.prompt_tokens > 0 && args.new_tokens > 0 && args.group > 0,
        "--prompt-tokens, --new-tokens and --group must be at least 1"
    );
    for &batch in &args.batch {
        ensure!(batch > 0 && batch % args.group == 0, "--batch {batch} must be a multiple of --group {}", args.group);
    }
    let folder = ModelFolder::of(args)?;
    let config = ModelConfig::load(folder.path())?;
    let prompts = Prompts::of(args, config.vocab_size)?;
    let runtime = network_runtime()?;
    for &batch in &args.batch {
        // An engine of its own, so that no batch finds the keys and values of the one before.
        let generator = start(args, folder.path(), batch, prompts.longest())?;
        let measured = runtime.block_on(measure(args, &generator, &prompts, batch))?;
        println!("{}", if args.json { measured.json().to_string() } else { measured.line() });
    }
    Ok(ExitCode::SUCCESS)
}

fn start(args: &Args, folder: &Path, batch: usize, prompt_tokens: usize) -> Result<LocalGenerator> {
    let defaults = Generator::default();
    let options = Generator {
        max_num_seqs: batch,
        max_num_batched_tokens: defaults.max_num_batched_tokens.max(batch),
        max_model_len: prompt_tokens + args.new_tokens as usize,
        threads: args.threads,
        quantization: args.quantization.into(),
        // The warm-up may have the same prompts, and must not compute them for the measured run.
        enable_prefix_caching: false,
        ..defaults
    };
    let mut options = local_options(folder, options);
    options.model.random_init = args.load_format == LoadFormat::Dummy;
    LocalGenerator::load(&options)
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

    fn json(&self) -> Value {
        let parts: serde_json::Map<String, Value> =
            self.parts().into_iter().map(|(name, ms)| (name.to_owned(), json!(ms))).collect();
        json!({
            "batch": self.batch,
            "tokens_per_second": self.tokens_per_second(),
            "ms_per_step": self.ms_per_step(),
            "ms_of_a_step": parts,
        })
    }

    fn line(&self) -> String {
        let parts = self.parts().map(|(name, ms)| format!("{name} {ms:.2}"));
        format!(
            "batch {:>4}: {:>8.1} tokens/s, {:>8.2} ms a step ({})",
            self.batch,
            self.tokens_per_second(),
            self.ms_per_step(),
            parts.join(", ")
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
                ensure!(args.load_format == LoadFormat::Dummy, "--model-shape has no weights: add --load-format dummy");
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
