//! `aha bench decode`: tokens per second of the rollout engine.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use aha_core::config::Generator;
use aha_core::ids::TokenId;
use aha_core::random::derive_seed;
use aha_core::rollout::Sampling;
use aha_generator::LocalGenerator;
use aha_nn::model_config::ModelConfig;
use anyhow::{Result, ensure};
use serde_json::json;

use crate::commands::{local_options, network_runtime};

/// Tokens per second of the engine, prefill included: one prompt, `batch` samples of it.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha bench decode --model models/smollm2-135m --batch 32 --prompt-tokens 46 --new-tokens 128"
)]
pub(super) struct Args {
    /// Hugging Face model folder
    #[arg(long)]
    model: PathBuf,
    /// Sequences decoded at once
    #[arg(long, default_value_t = 32)]
    batch: u32,
    #[arg(long, default_value_t = 46)]
    prompt_tokens: usize,
    /// Tokens of every completion
    #[arg(long, default_value_t = 128)]
    new_tokens: u32,
    /// Threads of the engine; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    ensure!(args.batch > 0 && args.prompt_tokens > 0 && args.new_tokens > 0, "batch and tokens must be at least 1");
    let config = ModelConfig::load(&args.model)?;
    let options = Generator { max_num_seqs: args.batch as usize, threads: args.threads, ..Generator::default() };
    let options = Generator {
        max_num_batched_tokens: options.max_num_batched_tokens.max(args.batch as usize),
        // The warm-up has the same prompt, and must not compute it for the measured run.
        enable_prefix_caching: false,
        ..options
    };
    let generator = LocalGenerator::load(&local_options(&args.model, options))?;
    // The embedding of a repeated token would stay in cache; random ones do not.
    let prompt: Vec<TokenId> = (0..args.prompt_tokens as u64)
        .map(|position| (derive_seed(1, &[position]) % config.vocab_size as u64) as TokenId)
        .collect();
    let sampling = |max_tokens| Sampling { max_tokens, ignore_eos: true, ..Sampling::default() };
    let runtime = network_runtime()?;
    runtime.block_on(generator.generate(&prompt, &sampling(args.new_tokens.min(4)), 0, args.batch))?;
    let start = Instant::now();
    let completions = runtime.block_on(generator.generate(&prompt, &sampling(args.new_tokens), 1, args.batch))?;
    let seconds = start.elapsed().as_secs_f64();
    let num_tokens: usize = completions.iter().map(|completion| completion.token_ids.len()).sum();
    let (rate, step) = (num_tokens as f64 / seconds, 1e3 * seconds / f64::from(args.new_tokens));
    if args.json {
        println!("{}", json!({"tokens_per_second": rate, "ms_per_step": step}));
    } else {
        println!(
            "batch {}, prompt {}, {} new tokens: {rate:.0} tokens/s, {step:.2} ms a step",
            args.batch, args.prompt_tokens, args.new_tokens
        );
    }
    Ok(ExitCode::SUCCESS)
}
