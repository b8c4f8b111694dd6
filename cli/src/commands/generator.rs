//! `aha generator`: the rollout service.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use aha_generator::{GeneratorOptions, GeneratorServer, Registrar};
use aha_nn::comm::{address_towards, host_and_port};
use aha_proto::v1::RegisterRequest;
use aha_trainer::clients::seconds;
use anyhow::{Context, Result};

use super::{ConfigArgs, network_runtime};
use crate::launch::supervised;
use crate::{hub, logs};

/// Serve rollouts by gRPC until SIGTERM or Ctrl-C.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha generator configs/countdown-tiny.yaml --listen 127.0.0.1:50051\n  AHA_TOKEN=$(cat token) aha generator configs/countdown-tiny.yaml --listen 0.0.0.0:50051"
)]
pub(crate) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Address to listen on; port 0 takes a free one. Beyond loopback it needs a token (AHA_TOKEN or
    /// security.token_file) or clients' certificates (security.tls_ca), or security.insecure: true
    #[arg(long, default_value = "127.0.0.1:50051")]
    listen: SocketAddr,
    /// Where to register, host:port of trainer rank 0 (generator.coordinator)
    #[arg(long)]
    coordinator: Option<String>,
    /// Address to register, host:port as the trainers reach it; otherwise the one listened on
    #[arg(long)]
    advertise: Option<String>,
    /// Address to serve Prometheus metrics at (generator.metrics_address), to those who may call; port 0 takes a free one
    #[arg(long)]
    metrics_address: Option<SocketAddr>,
    /// Number of this generator among those of the run, in the name of its JSON log (logging.json_logs); otherwise the
    /// machine's name and the port
    #[arg(long, value_name = "N")]
    index: Option<usize>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    supervised::follow_parent()?;
    // Weights and caches come and go, and what they leave is for others on this machine.
    aha_nn::runtime::map_large_blocks();
    let (mut config, credentials) = args.config.load_with_credentials()?;
    config.generator.metrics_address = args.metrics_address.or(config.generator.metrics_address);
    config.generator.coordinator = args.coordinator.clone().or(config.generator.coordinator);
    config.model.path = hub::local_model("model.path", &config.model.path)?;
    logs::also_to_file(&config, "generator", &rank(args))?;
    let scheme = if credentials.identity.is_some() { "https" } else { "http" };
    let grace = Duration::from_secs_f64(config.launch.grace_seconds);
    network_runtime()?.block_on(async {
        let server = GeneratorServer::bind(&GeneratorOptions::from(&config), args.listen, credentials.clone()).await?;
        tracing::info!("generator listens on {}", server.address());
        if let Some(address) = server.metrics_address() {
            tracing::info!("metrics are at {scheme}://{address}/metrics");
        }
        let registrar = match &config.generator.coordinator {
            Some(coordinator) => {
                let timeout = seconds(config.generator.probe_timeout_seconds);
                let patience = seconds(config.generator.connect_timeout_seconds);
                let request = registration((args, coordinator), &server, patience)?;
                Some(Registrar::start(coordinator, &credentials, request, timeout).context("generator.coordinator")?)
            }
            None => None,
        };
        let stopped = async {
            stop_signal().await;
            if let Some(registrar) = registrar {
                registrar.leave().await;
            }
        };
        // Requests in flight get half of what the launcher grants this process.
        server.serve(grace / 2, stopped).await
    })?;
    tracing::info!("generator stopped");
    Ok(ExitCode::SUCCESS)
}

/// What tells this generator from the others of the run.
fn rank(args: &Args) -> String {
    let node = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    args.index.map_or_else(|| format!("{}-{}", node(), args.listen.port()), |index| index.to_string())
}

/// Under the address that is advertised, or else listened on, or else towards the coordinator where that is all; `patience`
/// is for the coordinator's name to be known then.
fn registration(
    (args, coordinator): (&Args, &str),
    server: &GeneratorServer,
    patience: Duration,
) -> Result<RegisterRequest> {
    let own = server.address();
    let address = match &args.advertise {
        Some(address) => address.clone(),
        None if own.ip().is_unspecified() => {
            let (host, port) = host_and_port(coordinator)
                .with_context(|| format!("generator.coordinator: {coordinator:?} is not host:port"))?;
            let towards = address_towards(host, port, patience);
            let ip = towards.with_context(|| {
                format!("finding the address of this machine towards {coordinator}; --advertise names it")
            })?;
            SocketAddr::new(ip, own.port()).to_string()
        }
        None => own.to_string(),
    };
    Ok(RegisterRequest { address, manifest_hash: server.manifest_hash() })
}

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
        }
        Err(error) => tracing::error!("cannot listen for SIGTERM: {error}"),
    }
}
