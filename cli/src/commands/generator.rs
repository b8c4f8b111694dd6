//! `aha generator`: the rollout service.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use aha_generator::{GeneratorOptions, GeneratorServer};
use anyhow::Result;

use super::{ConfigArgs, network_runtime};
use crate::launch::supervised;

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
    /// Address to serve Prometheus metrics at (generator.metrics_address), to those who may call; port 0 takes a free one
    #[arg(long)]
    metrics_address: Option<SocketAddr>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    supervised::follow_parent()?;
    // Weights and caches come and go, and what they leave is for others on this machine.
    aha_nn::runtime::map_large_blocks();
    let (mut config, credentials) = args.config.load_with_credentials()?;
    config.generator.metrics_address = args.metrics_address.or(config.generator.metrics_address);
    let scheme = if credentials.identity.is_some() { "https" } else { "http" };
    let grace = Duration::from_secs_f64(config.launch.grace_seconds);
    network_runtime()?.block_on(async {
        let server = GeneratorServer::bind(&GeneratorOptions::from(&config), args.listen, credentials).await?;
        tracing::info!("generator listens on {}", server.address());
        if let Some(address) = server.metrics_address() {
            tracing::info!("metrics are at {scheme}://{address}/metrics");
        }
        // Requests in flight get half of what the launcher grants this process.
        server.serve(grace / 2, stop_signal()).await
    })?;
    tracing::info!("generator stopped");
    Ok(ExitCode::SUCCESS)
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
