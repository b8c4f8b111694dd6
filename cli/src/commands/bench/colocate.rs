//! `aha bench colocate`: what it takes to sample and train in one process, in turns.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use aha_core::config::{Dtype, RewardSpec, RunConfig};
use aha_nn::runtime;
use aha_trainer::measure::{RandomPrompts, Steps, Turn, measure_colocated};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tch::Device;

use crate::commands::shapes::ModelShape;
use crate::commands::{DeviceName, DtypeName, network_runtime};

/// Memory of keys and values; on a CPU, of fewer sequences.
const GPU_KV_CACHE_MIB: usize = 8192;
const CPU_KV_CACHE_MIB: usize = 512;

/// Seconds and memory of GRPO steps of random weights with the engine in the trainer's process (`aha launch --colocate`):
/// sampling, going to sleep, training, and waking with new weights.
///
/// Memory is all that is taken of the GPU, or the process's on a CPU: when the engine has sampled, when it sleeps, when the
/// rank has trained, and when the engine is awake again. Every completion has all its tokens, and rewards are random.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  aha bench colocate --model-shape qwen2.5-0.5b --batch 256 --new-tokens 512
  aha bench colocate --model configs/models/countdown-tiny --device cpu --batch 16 --new-tokens 32 --json")]
pub(super) struct Args {
    /// Model folder, of which the weights are not read
    #[arg(long, required_unless_present = "model_shape")]
    model: Option<PathBuf>,
    /// A known shape instead of a folder
    #[arg(long, conflicts_with = "model")]
    model_shape: Option<ModelShape>,
    /// Where to compute; auto takes a GPU where there is one
    #[arg(long, value_enum, default_value_t = DeviceName::Auto)]
    device: DeviceName,
    /// Type of the trainer's weights: bfloat16 on a GPU unless named, float32 on a CPU
    #[arg(long, value_enum)]
    dtype: Option<DtypeName>,
    /// Completions of a step
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Completions of a prompt
    #[arg(long, default_value_t = 8)]
    group: usize,
    #[arg(long, default_value_t = 128)]
    prompt_tokens: usize,
    /// Tokens of every completion
    #[arg(long, default_value_t = 256)]
    new_tokens: u32,
    /// Most tokens of a micro-batch; a prompt with its group unless named
    #[arg(long)]
    micro_batch_tokens: Option<usize>,
    /// Compute the activations of every so many-th layer again in the backward pass; 0 keeps all
    #[arg(long, default_value_t = 0)]
    gradient_checkpointing_interval: usize,
    /// Memory of keys and values while the engine is awake; 8192 on a GPU and 512 on a CPU unless named
    #[arg(long)]
    kv_cache_mib: Option<usize>,
    /// Measured steps, whose medians count
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Steps before them
    #[arg(long, default_value_t = 1)]
    warm_up: usize,
    /// Threads on a CPU; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    ensure!(args.steps > 0, "--steps must be at least 1");
    ensure!(
        args.group > 1 && args.batch.is_multiple_of(args.group) && args.batch > 0,
        "--batch {} must be a multiple of --group {}, which must be at least 2",
        args.batch,
        args.group
    );
    let folder = tempfile::tempdir().context("making a folder for the model")?;
    let model = match (&args.model, args.model_shape) {
        (Some(model), _) => model.clone(),
        (None, Some(shape)) => {
            shape.write(folder.path())?;
            folder.path().to_owned()
        }
        (None, None) => anyhow::bail!("name a --model folder or a --model-shape"),
    };
    let config = config(args, &model, runtime::device(args.device.name(), 0)?);
    let prompts = RandomPrompts { count: args.batch / args.group, tokens: args.prompt_tokens };
    let steps = Steps { warm_up: args.warm_up, measured: args.steps };
    let turns = measure_colocated(&config, prompts, steps, Arc::new(network_runtime()?))?;
    let report = report(args, &turns)?;
    println!("{}", if args.json { report.to_string() } else { format!("{report:#}") });
    Ok(ExitCode::SUCCESS)
}

/// Of a run without data or folder.
fn config(args: &Args, model: &Path, device: Device) -> RunConfig {
    let mut config = RunConfig::default();
    config.model.path = model.to_owned();
    config.model.random_init = true;
    config.model.device = args.device.into();
    config.model.dtype = args.dtype.map_or(Dtype::Auto, Dtype::from);
    config.rewards = vec![RewardSpec::of("format")];
    config.data.max_prompt_length = args.prompt_tokens;
    config.rollout.num_generations = args.group;
    config.rollout.generation_batch_size = args.batch;
    config.rollout.max_completion_length = args.new_tokens;
    config.launch.colocate = true;
    let length = args.prompt_tokens + args.new_tokens as usize;
    let together = args.prompt_tokens + args.group * args.new_tokens as usize;
    config.train.beta = 0.0;
    config.train.micro_batch_tokens = args.micro_batch_tokens.unwrap_or(together);
    config.train.gradient_checkpointing = args.gradient_checkpointing_interval > 0;
    config.train.gradient_checkpointing_interval = args.gradient_checkpointing_interval.max(1);
    config.train.threads = args.threads;
    config.generator.threads = args.threads;
    config.generator.max_num_seqs = args.batch;
    config.generator.max_model_len = length;
    let room = if device.is_cuda() { GPU_KV_CACHE_MIB } else { CPU_KV_CACHE_MIB };
    config.generator.kv_cache_mib = args.kv_cache_mib.unwrap_or(room);
    config
}

fn report(args: &Args, turns: &[Turn]) -> Result<Value> {
    let turns: Vec<Value> = turns.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
    let median = |name: &str| {
        let mut values: Vec<f64> = turns.iter().filter_map(|turn| turn[name].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let mut report = json!({
        "batch": args.batch,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "steps": turns.len(),
    });
    for name in turns.first().and_then(Value::as_object).into_iter().flat_map(serde_json::Map::keys) {
        report[name] = json!(median(name));
    }
    let generate = median("generate_seconds").unwrap_or(f64::NAN);
    report["generated_tokens_per_second"] = json!(args.batch as f64 * f64::from(args.new_tokens) / generate);
    let gap = |high: &str, low: &str| Some(median(high)? - median(low)?);
    report["sleep_gives_back_bytes"] = json!(gap("awake_bytes", "asleep_bytes"));
    report["wake_takes_bytes"] = json!(gap("awake_again_bytes", "trained_bytes"));
    Ok(report)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn args(words: &[&str]) -> Args {
        let shape = ["colocate", "--model-shape", "smollm2-135m", "--device", "cpu", "--threads", "1"];
        Cli::try_parse_from([&shape, words].concat()).unwrap().args
    }

    /// A whole step of a real shape takes too long here.
    #[test]
    fn steps_of_a_tiny_model_are_measured() {
        let folder = tempfile::tempdir().unwrap();
        ModelShape::SmolLm2_135m.write(folder.path()).unwrap();
        let path = folder.path().join("config.json");
        let mut raw: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let tiny = json!({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 300});
        tiny.as_object().unwrap().iter().for_each(|(key, value)| raw[key] = value.clone());
        std::fs::write(&path, raw.to_string()).unwrap();
        let args = args(&["--batch", "4", "--group", "2", "--prompt-tokens", "5", "--new-tokens", "6", "--steps", "2"]);
        let mut config = config(&args, folder.path(), Device::Cpu);
        config.generator.kv_cache_mib = 16;
        let prompts = RandomPrompts { count: 2, tokens: 5 };
        let steps = Steps { warm_up: 0, measured: 2 };
        let turns = measure_colocated(&config, prompts, steps, Arc::new(network_runtime().unwrap())).unwrap();
        assert_eq!(turns.len(), 2);
        for turn in &turns {
            assert!(turn.grad_norm.is_finite() && turn.grad_norm > 0.0, "{turn:?}");
            let seconds = [turn.generate_seconds, turn.train_seconds, turn.push_seconds - turn.swap_seconds];
            assert!(seconds.iter().all(|seconds| *seconds > 0.0), "{turn:?}");
        }
        let report = report(&args, &turns).unwrap();
        assert!(report["generated_tokens_per_second"].as_f64().unwrap() > 0.0, "{report}");
        assert!(report["sleep_gives_back_bytes"].is_f64() && report["awake_bytes"].is_f64(), "{report}");
    }

    #[test]
    fn a_batch_that_is_no_multiple_of_a_group_is_refused() {
        let error = run(&args(&["--batch", "9"])).unwrap_err().to_string();
        assert_eq!(error, "--batch 9 must be a multiple of --group 8, which must be at least 2");
    }
}
