//! `aha bench push`: how fast weights reach the generators, beside what Gloo can do, and for how long decoding stands still.

mod broadcasts;
mod load;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use aha_core::config::{Credentials, DeviceKind, Dtype, KvPolicy, RewardSpec, RunConfig};
use aha_core::ids::PolicyVersion;
use aha_nn::comm::ProcessGroup;
use aha_nn::model_config::ModelConfig;
use aha_nn::runtime;
use aha_nn::weights::Weights;
use aha_trainer::fleet::Fleet;
use aha_trainer::generators::Generators;
use aha_trainer::publish::PushReport;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::generator_process::{GeneratorProcess, free_address};
use crate::commands::network_runtime;
use crate::commands::shapes::ModelShape;
use crate::launch::supervised;
use broadcasts::{BroadcastGroup, Broadcasts};
use load::Load;

/// Engine steps that tell how long one takes.
const CALM_STEPS: usize = 40;

/// Bandwidth of bf16 weight pushes to generators on this machine's CPU, and how long they hold up decoding.
///
/// Pushes come in turns with plain broadcasts of as many bytes, by Gloo among as many processes in buckets of 256 MiB; a push
/// includes its calls and the hashes of all weights on both sides. After that the generators decode while they are pushed to.
/// Their pauses, for which an engine stands still, are what they measure themselves; gaps are the times between engine steps,
/// looked at every 2 ms, and those after a push have the running sequences computed again unless --kv is keep.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  OMP_NUM_THREADS=1 aha bench push --generators 2 --rounds 5")]
pub(super) struct Args {
    #[arg(long, default_value = "smollm2-135m")]
    model_shape: ModelShape,
    #[arg(long, default_value_t = 2)]
    generators: usize,
    /// Pushes and broadcasts of each kind, whose medians count
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Sequences that each generator decodes at once
    #[arg(long, default_value_t = 8)]
    batch: u32,
    /// Threads of each engine
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// What becomes of the keys and values of running sequences (generator.kv): recompute, or keep
    #[arg(long, default_value = "recompute", value_parser = kv_policy)]
    kv: KvPolicy,
    /// What this command starts by itself, to broadcast to
    #[arg(long, hide = true, value_name = "JSON")]
    peer: Option<String>,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(peer) = &args.peer {
        supervised::follow_parent()?;
        return serde_json::from_str::<Broadcasts>(peer)?.follow().map(|()| ExitCode::SUCCESS);
    }
    ensure!(args.generators > 0 && args.rounds > 0 && args.batch > 0, "--generators, --rounds and --batch: at least 1");
    let folder = tempfile::tempdir().context("making a folder for the run")?;
    args.model_shape.write(folder.path())?;
    let addresses = (0..args.generators).map(|_| free_address()).collect::<Result<Vec<_>>>()?;
    let config = config(args, folder.path(), &addresses);
    let path = folder.path().join("push.yaml");
    std::fs::write(&path, serde_saphyr::to_string(&config)?)?;
    let start = |address: &String| GeneratorProcess::start(&path, address);
    let _generators = addresses.iter().map(start).collect::<Result<Vec<_>>>()?;

    runtime::set_num_threads(std::num::NonZeroUsize::MIN);
    let runtime = Arc::new(network_runtime()?);
    let mut trainer = Trainer::start(&config, Arc::clone(&runtime))?;
    let bytes = trainer.push()?.report.bytes;
    let group = BroadcastGroup::start(args.generators + 1, bytes, args.rounds)?;
    let (mut broadcasts, mut idle) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        broadcasts.push(over_loopback(|| group.round())?);
        idle.push(trainer.push()?);
    }
    drop(group);
    let load = Load::start(&addresses, args.batch, &runtime);
    load.gaps(CALM_STEPS)?;
    let calm = load.gaps(CALM_STEPS)?;
    let mut busy = Vec::new();
    for _ in 0..args.rounds {
        load.gaps(1)?;
        let push = trainer.push()?;
        busy.push((push, load.gaps(1)?));
    }
    println!("{:#}", report(args, &broadcasts, &idle, (&calm, &busy)));
    Ok(ExitCode::SUCCESS)
}

/// Of the trainer that is measured and of the generators.
fn config(args: &Args, folder: &Path, addresses: &[String]) -> RunConfig {
    let mut config = RunConfig::default();
    config.run.name = "bench-push".to_owned();
    config.run.output_dir = folder.to_owned();
    config.model.path = folder.to_owned();
    config.model.random_init = true;
    config.model.device = DeviceKind::Cpu;
    config.model.dtype = Dtype::Bfloat16;
    // Nothing is asked; a configuration needs a question all the same.
    config.data.prompt.user = "{{ nums }} {{ target }}".to_owned();
    config.rewards = vec![RewardSpec::of("format")];
    config.generator.addresses = addresses.to_vec();
    config.generator.threads = args.threads;
    config.generator.max_model_len = 1024;
    config.generator.kv = args.kv;
    config.generator.connect_timeout_seconds = 120.0;
    config.generator.probe_timeout_seconds = 60.0;
    config
}

fn kv_policy(name: &str) -> Result<KvPolicy, String> {
    serde_json::from_value(json!(name)).map_err(|_| "it is keep or recompute".to_owned())
}

/// A single rank with random weights.
struct Trainer {
    fleet: Fleet,
    group: ProcessGroup,
    policy: Weights,
    version: u64,
    num_generators: usize,
}

/// One push.
struct Push {
    report: PushReport,
    /// Bytes that went over loopback meanwhile.
    wire_bytes: u64,
}

impl Trainer {
    fn start(config: &RunConfig, runtime: Arc<tokio::runtime::Runtime>) -> Result<Self> {
        let model = ModelConfig::load(&config.model.path)?;
        let policy = Weights::random(&model, 1, 1, Kind::BFloat16, Device::Cpu);
        let group = ProcessGroup::solo("trainers", Device::Cpu);
        let fleet = Fleet::connect(config, &group, &policy, Credentials::default(), runtime)?;
        Ok(Self { fleet, group, policy, version: 0, num_generators: config.generator.addresses.len() })
    }

    fn push(&mut self) -> Result<Push> {
        self.version += 1;
        let version = PolicyVersion(self.version);
        let (report, wire_bytes) = over_loopback(|| Ok(self.fleet.publish(&self.group, &self.policy, version)?))?;
        ensure!(self.fleet.num_generators() == self.num_generators, "a generator was lost meanwhile");
        Ok(Push { report, wire_bytes })
    }
}

/// What `act` gives, and the bytes that went over loopback meanwhile.
fn over_loopback<T>(act: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    let before = loopback_bytes()?;
    let result = act()?;
    Ok((result, loopback_bytes()? - before))
}

fn loopback_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/net/dev").context("reading /proc/net/dev")?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("lo:"));
    let received = line.and_then(|line| line.split_whitespace().next()).and_then(|bytes| bytes.parse().ok());
    received.context("/proc/net/dev has no bytes of lo")
}

type Measured = (Duration, u64);

fn report(
    args: &Args,
    broadcasts: &[Measured],
    idle: &[Push],
    (calm, busy): (&[Duration], &[(Push, Vec<Duration>)]),
) -> Value {
    let bytes = idle[0].report.bytes;
    let gloo = median(broadcasts.iter().map(|(time, _)| time.as_secs_f64()));
    let push = median(idle.iter().map(|push| push.report.seconds));
    let rate = |seconds: f64| bytes as f64 / seconds / 1e6;
    let longest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let step = median(calm.iter().map(Duration::as_secs_f64));
    let pause = longest(&mut busy.iter().map(|(push, _)| push.report.swap_seconds));
    let all = |times: Vec<f64>| times.into_iter().map(|time| (1e4 * time).round() / 1e4).collect::<Vec<_>>();
    json!({
        "bytes": bytes,
        "processes": args.generators + 1,
        "gloo": {
            "mb_per_second": rate(gloo),
            "seconds": all(broadcasts.iter().map(|(time, _)| time.as_secs_f64()).collect()),
            "wire_bytes": median(broadcasts.iter().map(|(_, bytes)| *bytes as f64)),
        },
        "push": {
            "mb_per_second": rate(push),
            "over_gloo": gloo / push,
            "seconds": all(idle.iter().map(|push| push.report.seconds).collect()),
            "receive_seconds": median(idle.iter().map(|push| push.report.receive_seconds)),
            "wire_bytes": median(idle.iter().map(|push| push.wire_bytes as f64)),
        },
        "while_decoding": {
            "step_seconds": step,
            "longest_step_seconds": longest(&mut calm.iter().map(Duration::as_secs_f64)),
            "push_seconds": all(busy.iter().map(|(push, _)| push.report.seconds).collect()),
            "longest_pause_seconds": pause,
            "pause_over_step": pause / step,
            "longest_gap_seconds": longest(&mut busy.iter().flat_map(|(_, gaps)| gaps.last()).map(Duration::as_secs_f64)),
        },
    })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
