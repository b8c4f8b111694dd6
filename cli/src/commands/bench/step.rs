//! `aha bench step`: seconds of a whole GRPO step through the real system, a generator process included.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;

use aha_core::config::{RewardSpec, RunConfig};
use aha_trainer::publish::Publisher;
use aha_trainer::rollouts::GeneratorPool;
use aha_trainer::world::World;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::commands::network_runtime;
use crate::launch::supervised;

const SYSTEM: &str = "You are a helpful assistant.";
const USER: &str = "Using the numbers {{ nums }}, create an equation that equals {{ target }}. Show your work in \
                    <think> </think> tags and the answer in <answer> </answer> tags.";

/// Seconds of a GRPO step: rollout, reward, exchange, forward and backward, update, weight push.
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
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    ensure!(args.steps > 0, "steps must be at least 1");
    let folder = tempfile::tempdir().context("making a folder for the run")?;
    let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr())?.to_string();
    let config = config(args, folder.path(), &address)?;
    let path = folder.path().join("step.yaml");
    std::fs::write(&path, serde_saphyr::to_string(&config)?)?;
    let generator = GeneratorProcess::start(&path, &address)?;

    let runtime = Arc::new(network_runtime()?);
    aha_trainer::run::run(&config, &World::single(), |session| {
        let pool = GeneratorPool::connect(&config, Arc::clone(&runtime))?;
        let weights = session.learner.policy();
        let publisher = Publisher::join(session.group(), &*weights, &config, &pool.clients(), runtime)?;
        Ok((pool, publisher))
    })?;

    let metrics = std::fs::read_to_string(config.run_dir().join("metrics.jsonl"))?;
    let steps: Vec<Value> = metrics.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let median = |name: &str| {
        let mut values: Vec<f64> = steps.iter().filter_map(|step| step[name].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let own = aha_nn::runtime::memory().map_or(0, |memory| memory.peak_rss);
    let result = json!({
        "seconds_per_step": median("step_time"),
        "generate_seconds": median("time/generate"),
        "train_seconds": median("time/train"),
        "push_seconds": median("weights/push_seconds"),
        "peak_rss_bytes": own + generator.peak_rss(),
    });
    if args.json {
        println!("{result}");
    } else {
        println!("{result:#}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The run that is measured: every completion has all its tokens, and nothing is evaluated or kept.
fn config(args: &Args, folder: &Path, address: &str) -> Result<RunConfig> {
    let mut config = RunConfig::default();
    config.run.name = "bench-step".to_owned();
    config.run.output_dir = folder.to_owned();
    config.model.path = std::path::absolute(&args.model)?;
    config.data.countdown.numbers = 3;
    config.data.countdown.size = 1000;
    config.data.prompt.system = Some(SYSTEM.to_owned());
    config.data.prompt.user = USER.to_owned();
    config.rewards =
        ["format", "equation"].map(|function| RewardSpec { function: function.to_owned(), weight: 1.0 }).to_vec();
    config.rollout.num_generations = args.group;
    config.rollout.generation_batch_size = args.group * args.prompts;
    config.rollout.max_completion_length = args.new_tokens;
    config.rollout.min_completion_length = args.new_tokens;
    config.train.max_steps = args.steps;
    config.train.save_steps = args.steps;
    config.train.beta = args.beta;
    config.generator.addresses = vec![address.to_owned()];
    config.logging.num_completions_to_print = 0;
    let problems = config.problems();
    ensure!(problems.is_empty(), "{}", problems.join("; "));
    Ok(config)
}

/// A generator of our own, killed when it is dropped.
struct GeneratorProcess(Child);

impl GeneratorProcess {
    fn start(config: &Path, address: &str) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("finding the aha binary")?);
        command.arg("generator").arg(config).args(["--listen", address]).stdin(Stdio::null()).stdout(Stdio::null());
        command.env(supervised::VARIABLE, std::process::id().to_string()).env("OMP_WAIT_POLICY", "PASSIVE");
        Ok(Self(command.spawn().context("starting the generator")?))
    }

    fn peak_rss(&self) -> u64 {
        aha_nn::runtime::memory_of(self.0.id()).map_or(0, |memory| memory.peak_rss)
    }
}

impl Drop for GeneratorProcess {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            tracing::warn!("cannot stop the generator: {error}");
        }
    }
}
