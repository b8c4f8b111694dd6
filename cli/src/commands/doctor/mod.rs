//! `aha doctor`: what a run would fail of on this machine, before one does.

mod devices;
mod finding;
mod groups;
mod limits;
mod network;
mod rewards;
mod space;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use aha_core::config::{DeviceKind, RunConfig};
use aha_nn::model_config::ModelConfig;
use aha_trainer::world::World;
use anyhow::Result;

use super::ConfigArgs;
use devices::Devices;
use finding::{Finding, Severity};

/// Check what a run needs of this machine: libtorch, GPUs, ports, limits, disk, memory and process groups.
///
/// Nothing is trained and nothing stays behind. With a recipe, what it asks for is checked as well; RANK, WORLD_SIZE,
/// LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT count as for a trainer. The exit code is 1 where a problem is
/// found.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  aha doctor\n  aha doctor configs/countdown-tiny.yaml --json")]
pub(crate) struct Args {
    /// YAML recipe, such as configs/countdown-tiny.yaml
    config: Option<PathBuf>,
    /// Override a key: --set train.learning_rate=1e-6 (repeatable)
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", requires = "config")]
    overrides: Vec<String>,
    /// Check that a generator could listen there
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let findings = findings(args);
    let worst = findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok);
    if args.json {
        println!("{}", serde_json::to_string(&findings)?);
    } else {
        findings.iter().for_each(|finding| print!("{finding}"));
        let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
        println!("{} problem(s), {} warning(s)", count(Severity::Problem), count(Severity::Warning));
    }
    Ok(if worst == Severity::Problem { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn findings(args: &Args) -> Vec<Finding> {
    let mut findings = Vec::new();
    let config = args.config.as_ref().and_then(|path| {
        let recipe = ConfigArgs { config: path.clone(), overrides: args.overrides.clone() };
        note(&mut findings, "recipe", recipe.load(), "correct what it names")
    });
    let model = config.as_ref().and_then(|config| {
        let fix = "set model.path to a Hugging Face model folder";
        note(&mut findings, "model", ModelConfig::load(&config.model.path).map_err(Into::into), fix)
    });
    let world = World::from_variables(std::env::vars()).map_err(Into::into);
    let fix = "set torchrun's variables as aha launch and torchrun do, or unset them";
    let world = note(&mut findings, "ranks", world, fix).unwrap_or_else(World::single);
    findings.extend(on_machine(&world, config.as_ref(), model.as_ref()));
    findings.extend(args.listen.map(|address| network::listening("--listen", &address.to_string())));
    if let Some(config) = &config {
        findings.extend(network::configured(config, &world));
        findings.extend(rewards::external(config));
        findings.push(space::disk(config, model.as_ref()));
    }
    findings
}

/// What is there, or a problem.
fn note<T>(findings: &mut Vec<Finding>, check: &'static str, result: Result<T>, fix: &str) -> Option<T> {
    result.map_err(|error| findings.push(Finding::problem(check, format!("{error:#}"), fix))).ok()
}

fn on_machine(world: &World, config: Option<&RunConfig>, model: Option<&ModelConfig>) -> Vec<Finding> {
    let device = config.map_or(DeviceKind::Auto, |config| config.model.device);
    let devices = Devices::here();
    let num_gpus = if device == DeviceKind::Cpu { 0 } else { devices.num_gpus };
    let mut findings = devices.findings(device);
    findings.push(devices::ranks(world, config, num_gpus));
    findings.extend(limits::threads(world, config, std::env::var("OMP_NUM_THREADS").ok().as_deref()));
    findings.push(limits::open_files());
    findings.push(limits::locked_memory(num_gpus));
    findings.push(limits::shared_memory(num_gpus));
    findings.push(network::rendezvous(world));
    findings.push(groups::gloo(&world.own_address(Duration::ZERO)));
    if num_gpus > 0 && aha_nn::comm::nccl_built() {
        findings.push(groups::nccl(world.local_rank.min(num_gpus - 1)));
    }
    if let Some((config, model)) = config.zip(model) {
        let world_size = world.size.max(config.launch.trainers);
        findings.extend(space::memory(config, model, world_size, devices.gpu_bytes));
    }
    findings
}
