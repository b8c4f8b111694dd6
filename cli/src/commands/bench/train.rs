//! `aha bench train`: tokens per second of the training step.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use aha_core::config::{Dtype, RunConfig};
use aha_nn::model_config::ModelConfig;
use aha_nn::runtime;
use aha_trainer::measure::{Measurement, Steps, Workload, measure};
use aha_trainer::world::World;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tch::Device;

use crate::commands::shapes::ModelShape;
use crate::commands::{DeviceName, DtypeName};

/// Micro-batches that keep a GPU busy, and that fit a CPU's caches.
const GPU_MICRO_BATCH_TOKENS: usize = 16_384;
const CPU_MICRO_BATCH_TOKENS: usize = 2048;

/// Tokens per second of training steps on random weights and tokens, and the share of the device's operations that they use.
///
/// Tokens are those that pass through the layers: the prompt of a group counts once in a micro-batch. Operations are 6 a
/// token and parameter, of the head only for completions; those of attention are shown beside them, and what recomputation
/// adds is in neither. The parts are of one more step, in which the host waits for the device after each. With torchrun's
/// variables set, all ranks take the steps together.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  aha bench train --model-shape qwen2.5-0.5b --peak-tflops 989
  aha bench train --model-shape qwen2.5-3b --gradient-checkpointing-interval 1 --completion-tokens 128-1024 --json
  aha bench train --model models/smollm2-135m --device cpu --micro-batch-tokens 1024 --micro-batches 1")]
pub(super) struct Args {
    /// Model folder, of which config.json is read
    #[arg(long, required_unless_present = "model_shape")]
    model: Option<PathBuf>,
    /// A known shape instead of a folder
    #[arg(long, conflicts_with = "model")]
    model_shape: Option<ModelShape>,
    /// Where to compute; auto takes a GPU where there is one
    #[arg(long, value_enum, default_value_t = DeviceName::Auto)]
    device: DeviceName,
    /// Type of weights and activations: bfloat16 on a GPU unless named, float32 on a CPU
    #[arg(long, value_enum)]
    dtype: Option<DtypeName>,
    #[arg(long, default_value_t = 256)]
    prompt_tokens: usize,
    /// Tokens of a completion, as N or MIN-MAX, from which lengths are drawn evenly
    #[arg(long, default_value = "128-1024", value_parser = lengths)]
    completion_tokens: RangeInclusive<usize>,
    /// Completions of a prompt
    #[arg(long, default_value_t = 8)]
    group: usize,
    /// Most tokens of a micro-batch; 16384 on a GPU and 2048 on a CPU unless named
    #[arg(long)]
    micro_batch_tokens: Option<usize>,
    /// Micro-batches of a step
    #[arg(long, default_value_t = 2)]
    micro_batches: usize,
    /// Compute the activations of every so many-th layer again in the backward pass; 0 keeps all
    #[arg(long, default_value_t = 0)]
    gradient_checkpointing_interval: usize,
    /// What ranks share out: 1 the optimizer's state, 2 gradients as well, 3 weights as well
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=3))]
    zero_stage: u8,
    /// Keep the optimizer's state in the CPU's memory, and update there
    #[arg(long)]
    offload_optimizer: bool,
    /// Measured steps, whose median counts
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Steps before them
    #[arg(long, default_value_t = 1)]
    warm_up: usize,
    /// Threads on a CPU; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// What the device can do in this type, in 10^12 operations per second, such as 989 of an H100 SXM's data sheet
    #[arg(long)]
    peak_tflops: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    ensure!(args.peak_tflops.is_none_or(|peak| peak.is_finite() && peak > 0.0), "--peak-tflops must be over 0");
    let world = World::from_variables(std::env::vars())?;
    let model = match (&args.model, args.model_shape) {
        (Some(folder), _) => ModelConfig::load(folder)?,
        (None, Some(shape)) => shape.model_config()?,
        (None, None) => anyhow::bail!("name a --model folder or a --model-shape"),
    };
    let config = config(args, runtime::device(args.device.name(), world.local_rank)?);
    let workload = Workload {
        prompt_tokens: args.prompt_tokens,
        completion_tokens: args.completion_tokens.clone(),
        group: args.group,
        micro_batches: args.micro_batches,
    };
    let steps = Steps { warm_up: args.warm_up, measured: args.steps };
    let measured = measure(&config, &world, &model, &workload, steps)?;
    if world.rank == 0 {
        let report = Report::new(&measured, &model, world.size);
        println!("{}", if args.json { report.json(args).to_string() } else { report.text(args) });
    }
    Ok(ExitCode::SUCCESS)
}

/// Of a run without data, generator or folder; no reference policy.
fn config(args: &Args, device: Device) -> RunConfig {
    let mut config = RunConfig::default();
    config.model.random_init = true;
    config.model.device = args.device.into();
    config.model.dtype = args.dtype.map_or(Dtype::Auto, Dtype::from);
    config.data.max_prompt_length = args.prompt_tokens;
    config.rollout.max_completion_length = u32::try_from(*args.completion_tokens.end()).unwrap_or(u32::MAX);
    let default = if device.is_cuda() { GPU_MICRO_BATCH_TOKENS } else { CPU_MICRO_BATCH_TOKENS };
    let train = &mut config.train;
    train.beta = 0.0;
    train.micro_batch_tokens = args.micro_batch_tokens.unwrap_or(default);
    train.gradient_checkpointing = args.gradient_checkpointing_interval > 0;
    train.gradient_checkpointing_interval = args.gradient_checkpointing_interval.max(1);
    train.zero_stage = args.zero_stage;
    train.offload_optimizer = args.offload_optimizer;
    train.threads = args.threads;
    config
}

/// `N` or `MIN-MAX`.
fn lengths(text: &str) -> Result<RangeInclusive<usize>> {
    let (shortest, longest) = text.split_once('-').unwrap_or((text, text));
    let number = |text: &str| text.parse::<usize>().with_context(|| format!("{text:?} is not a number of tokens"));
    let (shortest, longest) = (number(shortest)?, number(longest)?);
    ensure!(0 < shortest && shortest <= longest, "use N or MIN-MAX with 1 <= MIN <= MAX");
    Ok(shortest..=longest)
}

struct Report<'a> {
    measured: &'a Measurement,
    /// The median step.
    seconds: f64,
    /// 10^12 operations per second of one rank: of matrices, and of attention as well.
    tflops: [f64; 2],
}

impl<'a> Report<'a> {
    fn new(measured: &'a Measurement, model: &ModelConfig, world_size: usize) -> Self {
        let seconds = median(&measured.times);
        let flops = measured.computed.flops(model);
        let tflops = [flops.matrices, flops.matrices + flops.attention];
        Self { measured, seconds, tflops: tflops.map(|flops| flops / seconds / world_size as f64 / 1e12) }
    }

    fn json(&self, args: &Args) -> Value {
        let Measurement { times, computed, grad_norm, parts, peak_bytes } = self.measured;
        let parts: serde_json::Map<String, Value> =
            parts.iter().map(|(name, time)| (plain(name).to_owned(), json!(1e3 * time.as_secs_f64()))).collect();
        let percent = |tflops: f64| args.peak_tflops.map(|peak| 100.0 * tflops / peak);
        json!({
            "tokens_per_second": computed.tokens as f64 / self.seconds,
            "completion_tokens_per_second": computed.targets as f64 / self.seconds,
            "seconds_per_step": self.seconds,
            "seconds_of_steps": times.iter().map(Duration::as_secs_f64).collect::<Vec<_>>(),
            "tokens_per_step": computed.tokens,
            "completion_tokens_per_step": computed.targets,
            "tflops": self.tflops[0],
            "tflops_with_attention": self.tflops[1],
            "peak_tflops": args.peak_tflops,
            "mfu_percent": percent(self.tflops[0]),
            "mfu_with_attention_percent": percent(self.tflops[1]),
            "ms_of_parts": parts,
            "peak_bytes": peak_bytes,
            "grad_norm": grad_norm,
        })
    }

    fn text(&self, args: &Args) -> String {
        let Measurement { computed, parts, peak_bytes, .. } = self.measured;
        let whole: f64 = parts.iter().map(|(_, time)| time.as_secs_f64()).sum();
        let shares: Vec<String> = parts
            .iter()
            .map(|(name, time)| format!("{} {:.1} %", plain(name), 100.0 * time.as_secs_f64() / whole))
            .collect();
        let mfu = args.peak_tflops.map_or_else(String::new, |peak| {
            let [matrices, all] = self.tflops.map(|tflops| 100.0 * tflops / peak);
            format!(": {matrices:.1} % of {peak}, {all:.1} % with attention")
        });
        let memory = peak_bytes
            .map_or_else(|| "unknown".to_owned(), |bytes| format!("{:.2} GiB", bytes as f64 / 2_f64.powi(30)));
        format!(
            "{:.0} tokens/s ({:.0} of completions), {:.3} s a step of {} tokens\n{:.2} TFLOP/s a rank{mfu}\n{}\npeak memory \
             {memory}",
            computed.tokens as f64 / self.seconds,
            computed.targets as f64 / self.seconds,
            self.seconds,
            computed.tokens,
            self.tflops[0],
            shares.join(", "),
        )
    }
}

/// The name of a part without the metric's prefix.
fn plain(name: &str) -> &str {
    name.strip_prefix("time/").unwrap_or(name)
}

fn median(times: &[Duration]) -> f64 {
    let mut seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    seconds.sort_by(f64::total_cmp);
    let middle = seconds.len() / 2;
    if seconds.len().is_multiple_of(2) { f64::midpoint(seconds[middle - 1], seconds[middle]) } else { seconds[middle] }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn args(words: &[&str]) -> Args {
        Cli::try_parse_from([&["train", "--model-shape", "smollm2-135m"], words].concat()).unwrap().args
    }

    #[test]
    fn options_reach_the_learner() {
        let words = ["--device", "cpu", "--dtype", "bfloat16", "--completion-tokens", "7-90", "--prompt-tokens", "33"];
        let more =
            ["--gradient-checkpointing-interval", "2", "--zero-stage", "3", "--offload-optimizer", "--threads", "5"];
        let config = config(&args(&[&words[..], &more].concat()), Device::Cpu);
        assert_eq!((config.model.dtype, config.train.zero_stage, config.train.threads), (Dtype::Bfloat16, 3, 5));
        assert_eq!((config.data.max_prompt_length, config.rollout.max_completion_length), (33, 90));
        assert!(config.train.gradient_checkpointing && config.train.offload_optimizer);
        assert_eq!((config.train.gradient_checkpointing_interval, config.train.micro_batch_tokens), (2, 2048));
        let plain = super::config(&args(&[]), Device::Cuda(0));
        assert!(!plain.train.gradient_checkpointing && !plain.train.offload_optimizer);
        assert_eq!((plain.train.micro_batch_tokens, plain.model.dtype), (16_384, Dtype::Auto));
    }

    #[test]
    fn lengths_are_a_number_or_a_range() {
        assert_eq!(lengths("12").unwrap(), 12..=12);
        assert_eq!(lengths("3-40").unwrap(), 3..=40);
        assert!(["0", "9-3", "a-3", "", "3-"].iter().all(|text| lengths(text).is_err()));
    }

    #[test]
    fn a_report_has_the_median_and_its_shares() {
        let model = ModelShape::SmolLm2_135m.model_config().unwrap();
        let measured = Measurement {
            times: [5.0, 1.0, 2.0].map(Duration::from_secs_f64).into(),
            computed: aha_trainer::flops::Computed { tokens: 1000, targets: 600, pairs: 0 },
            grad_norm: 1.5,
            parts: vec![("time/forward", Duration::from_secs(1)), ("time/head", Duration::from_secs(3))],
            peak_bytes: Some(3 << 30),
        };
        let args = args(&["--peak-tflops", "10"]);
        let report = Report::new(&measured, &model, 2);
        let json = report.json(&args);
        assert_eq!(
            (json["tokens_per_second"].as_f64(), json["completion_tokens_per_second"].as_f64()),
            (Some(500.0), Some(300.0))
        );
        // 106.2 M parameters in layers for 1000 tokens, 28.3 M in the head for 600, in 2 s, on 2 ranks.
        let tflops = 6.0 * (106_168_320.0 * 1000.0 + 28_311_552.0 * 600.0) / 2.0 / 2.0 / 1e12;
        assert!((json["tflops"].as_f64().unwrap() - tflops).abs() < 1e-9, "{json}");
        assert!((json["mfu_percent"].as_f64().unwrap() - 10.0 * tflops).abs() < 1e-8);
        assert_eq!(json["ms_of_parts"]["head"].as_f64(), Some(3000.0));
        let text = report.text(&args);
        assert!(
            ["500 tokens/s (300", "head 75.0 %", "3.00 GiB", "% of 10"].iter().all(|part| text.contains(part)),
            "{text}"
        );
        assert!(!report.text(&super::tests::args(&[])).contains("% of"));
    }
}
