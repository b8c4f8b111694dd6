//! `aha bench step`: seconds of a whole GRPO step through the real system, a generator process included.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use aha_core::config::{Credentials, DataSource, RewardSpec, RunConfig, SleepMode};
use aha_nn::runtime;
use aha_trainer::fleet::{Fleet, Hooks};
use aha_trainer::measure::draw_rewards;
use aha_trainer::stop::StopRequest;
use aha_trainer::world::World;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::generator_process::{GeneratorProcess, free_address};
use crate::commands::network_runtime;

const SYSTEM: &str = "You are a helpful assistant.";
const USER: &str = "Using the numbers {{ nums }}, create an equation that equals {{ target }}. Show your work in \
                    <think> </think> tags and the answer in <answer> </answer> tags.";

/// Seconds of a GRPO step: rollout, reward, exchange, forward and backward, update, weight push.
///
/// Every completion has all its tokens, and rewards are drawn at random, so that every one of them has a gradient.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha bench step --model models/smollm2-135m --prompts 4 --group 8 --new-tokens 128 --steps 3"
)]
pub(super) struct Args {
    /// Hugging Face model folder
    #[arg(long)]
    model: PathBuf,
    /// Prompts of a step
    #[arg(long, default_value_t = 4)]
    prompts: usize,
    /// Completions of a prompt
    #[arg(long, default_value_t = 8)]
    group: usize,
    /// Tokens of every completion
    #[arg(long, default_value_t = 128)]
    new_tokens: u32,
    #[arg(long, default_value_t = 3)]
    steps: u64,
    /// KL penalty; above 0 a reference model is computed as well
    #[arg(long, default_value_t = 0.001)]
    beta: f32,
    /// Prompts from the column `question` of a .jsonl file, instead of Countdown puzzles
    #[arg(long)]
    questions: Option<PathBuf>,
    /// Most tokens of a micro-batch
    #[arg(long, default_value_t = 2048)]
    micro_batch_tokens: usize,
    /// Compute every completion's prompt anew
    #[arg(long)]
    no_share_prompts: bool,
    /// Threads of the trainer and, in its turn, of the generator; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// What the generator gives back while the trainer trains: nothing, cache, or weights as well
    #[arg(long, default_value = "nothing", value_parser = sleep_mode)]
    sleep: SleepMode,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    ensure!(args.steps > 0, "steps must be at least 1");
    let folder = tempfile::tempdir().context("making a folder for the run")?;
    let address = free_address()?;
    let config = config(args, folder.path(), &address)?;
    let path = folder.path().join("step.yaml");
    std::fs::write(&path, serde_saphyr::to_string(&config)?)?;
    let generator = GeneratorProcess::start(&path, &address)?;
    let memory = PeakMemory::watch(generator.id());

    let runtime = Arc::new(network_runtime()?);
    aha_trainer::run::run(&config, &World::single(), &StopRequest::default(), |session| {
        let mut fleet =
            Fleet::connect(&config, session.group(), &*session.learner.policy(), Credentials::default(), runtime)?;
        // Completions that end at their longest whatever they say, and rewards that say nothing.
        fleet.set_hooks(Hooks { request: |request| request.sampling.ignore_eos = true, groups: draw_rewards });
        Ok(Box::new(fleet))
    })?;

    let metrics = std::fs::read_to_string(config.run_dir().join("metrics.jsonl"))?;
    let steps: Vec<Value> = metrics.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let median = |name: &str| {
        let mut values: Vec<f64> = steps.iter().filter_map(|step| step[name].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let before = if values.len().is_multiple_of(2) { middle.saturating_sub(1) } else { middle };
        Some((values.get(before)? + values.get(middle)?) / 2.0)
    };
    let peak_of = |memory: Option<runtime::Memory>| memory.map_or(0, |memory| memory.peak_rss);
    let mut result = json!({
        "seconds_per_step": median("step_time"),
        "push_seconds": median("weights/push_seconds"),
        "packed_tokens": median("num_packed_tokens"),
        "trainer_peak_rss_bytes": peak_of(runtime::memory()),
        "generator_peak_rss_bytes": peak_of(runtime::memory_of(generator.id())),
        "peak_rss_bytes": memory.stop(),
    });
    for name in ["generate", "exchange", "train", "reference", "forward", "head", "backward", "reduce", "optimizer"] {
        result[format!("{name}_seconds")] = json!(median(&format!("time/{name}")));
    }
    if args.json {
        println!("{result}");
    } else {
        println!("{result:#}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The run that is measured; nothing is evaluated or kept.
fn config(args: &Args, folder: &Path, address: &str) -> Result<RunConfig> {
    let mut config = RunConfig::default();
    config.run.name = "bench-step".to_owned();
    config.run.output_dir = folder.to_owned();
    config.model.path = std::path::absolute(&args.model)?;
    if let Some(questions) = &args.questions {
        config.data.source = DataSource::File;
        config.data.path = Some(std::path::absolute(questions)?);
        config.data.prompt.user = "{{ question }}".to_owned();
    } else {
        config.data.countdown.numbers = 3;
        config.data.countdown.size = 1000;
        config.data.prompt.user = USER.to_owned();
    }
    // As long as a micro-batch lets it be.
    let most = args.micro_batch_tokens.saturating_sub(args.new_tokens as usize);
    config.data.max_prompt_length = config.data.max_prompt_length.min(most);
    config.data.prompt.system = Some(SYSTEM.to_owned());
    config.rewards = vec![RewardSpec::of("format")];
    config.rollout.num_generations = args.group;
    config.rollout.generation_batch_size = args.group * args.prompts;
    config.rollout.max_completion_length = args.new_tokens;
    config.rollout.sleep_while_training = args.sleep;
    config.train.max_steps = args.steps;
    config.train.save_steps = args.steps;
    config.train.beta = args.beta;
    config.train.micro_batch_tokens = args.micro_batch_tokens;
    config.train.share_prompts = !args.no_share_prompts;
    config.train.threads = args.threads;
    config.generator.threads = args.threads;
    config.generator.addresses = vec![address.to_owned()];
    config.logging.num_completions_to_print = 0;
    let problems = config.problems();
    ensure!(problems.is_empty(), "{}", problems.join("; "));
    Ok(config)
}

fn sleep_mode(name: &str) -> Result<SleepMode, String> {
    serde_json::from_value(json!(name)).map_err(|_| "it is nothing, cache or weights".to_owned())
}

/// The most memory that this process and another have held at the same time, looked at every few milliseconds.
struct PeakMemory {
    most: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    watching: JoinHandle<()>,
}

impl PeakMemory {
    fn watch(other: u32) -> Self {
        let (most, over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let watch = {
            let (most, over) = (Arc::clone(&most), Arc::clone(&over));
            move || {
                while !over.load(Ordering::Relaxed) {
                    most.fetch_max(runtime::memory_together(other).unwrap_or(0), Ordering::Relaxed);
                    std::thread::park_timeout(Duration::from_millis(10));
                }
            }
        };
        Self { most, over, watching: std::thread::spawn(watch) }
    }

    /// In bytes.
    fn stop(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        drop(self.watching.join());
        self.most.load(Ordering::Relaxed)
    }
}
