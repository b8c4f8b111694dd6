//! `aha launch`: every role of a run on this machine.

mod dry_run;
mod role;
pub(crate) mod supervised;
mod supervisor;

use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::time::Duration;

use aha_core::config::{DeviceKind, RunConfig};
use anyhow::{Context, Result, bail};

use crate::commands::ConfigArgs;
use crate::hub;
use role::{Role, RoleKind};
use supervisor::{Patience, Supervisor};

/// Which GPUs a process sees. Trainer ranks see all of them, and take the one of their `LOCAL_RANK`.
const GPUS_VARIABLE: &str = "CUDA_VISIBLE_DEVICES";
/// Where roles listen.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// Run trainer ranks and generators on this machine: one process each, stopped together.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha launch configs/countdown-tiny.yaml --set train.max_steps=20\n\nCtrl-C or SIGTERM ends the run after its step, with a checkpoint and exit code 75; a second one at once.\nStarted again, a run goes on from its last checkpoint."
)]
pub(crate) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Trainer ranks (launch.trainers)
    #[arg(long)]
    trainers: Option<usize>,
    /// Generators (launch.generators)
    #[arg(long)]
    generators: Option<usize>,
    /// Sample in the trainers' processes, without generators (launch.colocate): for one GPU, or a rank on each
    #[arg(long, conflicts_with = "generators")]
    colocate: bool,
    /// Roles that may be started again after they failed (launch.max_restarts)
    #[arg(long)]
    max_restarts: Option<usize>,
    /// Print the resolved configuration and the processes, and start nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the dry run as one JSON object
    #[arg(long, requires = "dry_run")]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let mut config_args = args.config.clone();
    let own = [("trainers", args.trainers), ("generators", args.generators), ("max_restarts", args.max_restarts)];
    for (key, value) in own {
        config_args.overrides.extend(value.map(|value| format!("launch.{key}={value}")));
    }
    if args.colocate {
        config_args.overrides.push("launch.colocate=true".to_owned());
    }
    let mut config = config_args.load()?;
    if !args.dry_run {
        use_local_model(&mut config_args, &mut config)?;
    }
    let gpus = gpus(&config, args.dry_run);
    let roles = roles(&config_args, &config, &gpus)?;
    if args.dry_run {
        return dry_run::print(&config, &roles, args.json);
    }
    let num_trainers = roles.iter().filter(|role| role.kind == RoleKind::Trainer).count();
    let engines = if config.launch.colocate {
        "that sample by themselves".to_owned()
    } else {
        format!("and {} generator(s)", roles.len() - num_trainers)
    };
    let logs = config.run_dir().join("logs");
    println!("{}: {num_trainers} trainer rank(s) {engines}, logs in {}", config.run.name, logs.display());
    let [save, grace] = [config.launch.save_seconds, config.launch.grace_seconds].map(Duration::from_secs_f64);
    Supervisor::start(roles, logs, Patience { save, grace }, config.launch.max_restarts)?.supervise()
}

/// Has all roles read the model from the folder that it is in, or is fetched to once.
fn use_local_model(config_args: &mut ConfigArgs, config: &mut RunConfig) -> Result<()> {
    let folder = hub::local_model("model.path", &config.model.path)?;
    if folder != config.model.path {
        config_args.overrides.push(format!("model.path={}", serde_json::to_string(&folder)?));
        config.model.path = folder;
    }
    Ok(())
}

/// Every process of the launch, generators first.
fn roles(config_args: &ConfigArgs, config: &RunConfig, gpus: &[String]) -> Result<Vec<Role>> {
    let num_generators = if config.launch.colocate { 0 } else { config.launch.generators };
    let num_trainers = num_trainers(config, gpus.len(), num_generators)?;
    let mut addresses = free_addresses(num_generators + 1)?;
    let master = addresses.pop().context("a launch has a port for its ranks to meet at")?;
    let listed = format!("generator.addresses={}", serde_json::to_string(&addresses)?);

    let mut roles = Vec::new();
    for (index, address) in addresses.iter().enumerate() {
        let mut arguments = vec!["generator".to_owned()];
        arguments.extend(config_args.to_arguments());
        arguments.extend(["--listen".to_owned(), address.clone(), "--index".to_owned(), index.to_string()]);
        if let Some(first) = config.generator.metrics_address {
            arguments.extend(["--metrics-address".to_owned(), metrics_address(first, index)?.to_string()]);
        }
        let role = Role::new(RoleKind::Generator, index, arguments);
        roles.push(match generator_gpu(gpus, num_trainers + index) {
            Some(gpu) => role.with_gpu(gpu),
            None => role,
        });
    }
    for rank in 0..num_trainers {
        let mut arguments = vec!["trainer".to_owned()];
        arguments.extend(config_args.to_arguments());
        arguments.extend(["--set".to_owned(), listed.clone()]);
        let role = Role::new(RoleKind::Trainer, rank, arguments);
        roles.push(if num_trainers > 1 { role.with_world(rank, num_trainers, &master) } else { role });
    }
    Ok(roles)
}

/// Where the generator number `index` serves its metrics: at the first one's port and those after it.
fn metrics_address(first: SocketAddr, index: usize) -> Result<SocketAddr> {
    let port = match usize::from(first.port()) {
        0 => Some(0),
        port => u16::try_from(port + index).ok(),
    };
    let port = port.with_context(|| format!("generator.metrics_address: {first} has no {index} ports after it"))?;
    Ok(SocketAddr::new(first.ip(), port))
}

/// GPUs of this machine that the run may use, by the names that CUDA gives them. A dry run on a machine without one is for
/// a machine that has those that `launch` asks for.
fn gpus(config: &RunConfig, is_dry_run: bool) -> Vec<String> {
    if config.model.device == DeviceKind::Cpu {
        return Vec::new();
    }
    let num_gpus = aha_nn::runtime::num_cuda_devices();
    if is_dry_run && num_gpus == 0 && config.model.device == DeviceKind::Cuda {
        let num_generators = if config.launch.colocate { 0 } else { config.launch.generators };
        return (0..config.launch.trainers + num_generators).map(|index| index.to_string()).collect();
    }
    match std::env::var(GPUS_VARIABLE) {
        Ok(names) => names.split(',').map(|name| name.trim().to_owned()).take(num_gpus).collect(),
        Err(_) => (0..num_gpus).map(|index| index.to_string()).collect(),
    }
}

/// The GPU of process `index`, trainer ranks first. Those past the last GPU share the first ones.
fn generator_gpu(gpus: &[String], index: usize) -> Option<&str> {
    gpus.get(index % gpus.len().max(1)).map(String::as_str)
}

/// Trainer ranks to start: as configured, or one for each GPU that the generators leave.
fn num_trainers(config: &RunConfig, num_gpus: usize, num_generators: usize) -> Result<usize> {
    let asked = config.launch.trainers;
    if num_gpus > 0 && asked > num_gpus {
        bail!(
            "launch.trainers: {asked} trainer ranks, and {num_gpus} GPUs: NCCL refuses two ranks on one GPU; start {num_gpus} \
             at most, or check {GPUS_VARIABLE}"
        );
    }
    if asked > 0 || num_gpus == 0 {
        return Ok(asked.max(1));
    }
    if num_gpus <= num_generators {
        bail!(
            "launch.generators: {num_generators} generators leave no GPU of {num_gpus} for a trainer; set launch.trainers and \
             launch.generators, or sample in the trainers' processes with launch.colocate"
        );
    }
    Ok(num_gpus - num_generators)
}

/// Loopback addresses that were free a moment ago.
///
/// They lie below the range that the system takes ports of outgoing connections from, which could otherwise take one
/// before its role listens, and start at a place of this process's own, away from those of other launches.
fn free_addresses(count: usize) -> Result<Vec<String>> {
    let first = PORTS.start + (std::process::id() as u16).wrapping_mul(97) % (PORTS.end - PORTS.start);
    let ports = (first..PORTS.end).chain(PORTS.start..first);
    let free = ports.filter(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    let addresses: Vec<String> = free.take(count).map(|port| format!("127.0.0.1:{port}")).collect();
    if addresses.len() < count {
        bail!("found no {count} free ports from {} to {}", PORTS.start, PORTS.end);
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generators_get_the_gpus_after_those_of_the_trainers() {
        let gpus: Vec<String> = ["4", "5", "GPU-7f"].map(str::to_owned).to_vec();
        let of = |gpus: &[String], index| generator_gpu(gpus, index).map(str::to_owned);
        assert_eq!(of(&gpus, 2), Some("GPU-7f".to_owned()));
        assert_eq!(of(&gpus[..1], 1), Some("4".to_owned()), "one GPU for both");
        assert_eq!(of(&[], 1), None);
    }

    #[test]
    fn every_trainer_has_a_gpu_of_its_own_or_all_compute_on_the_cpu() {
        let of = |trainers, num_gpus| {
            let mut config = RunConfig::default();
            config.launch.trainers = trainers;
            num_trainers(&config, num_gpus, config.launch.generators).map_err(|error| error.to_string())
        };
        assert_eq!([of(0, 0), of(5, 0), of(2, 2), of(0, 8)], [Ok(1), Ok(5), Ok(2), Ok(7)]);
        let error = of(3, 2).unwrap_err();
        assert!(error.starts_with("launch.trainers: 3 trainer ranks, and 2 GPUs"), "{error}");
    }

    #[test]
    fn every_generator_has_a_port_of_its_own_for_metrics() {
        let of = |first: &str, index| metrics_address(first.parse().unwrap(), index);
        assert_eq!(of("127.0.0.1:9400", 0).unwrap().to_string(), "127.0.0.1:9400");
        assert_eq!(of("[::1]:9400", 2).unwrap().to_string(), "[::1]:9402");
        assert_eq!(of("127.0.0.1:0", 2).unwrap().to_string(), "127.0.0.1:0");
        let error = of("127.0.0.1:65535", 1).unwrap_err().to_string();
        assert!(error.starts_with("generator.metrics_address: 127.0.0.1:65535"), "{error}");
    }
}
