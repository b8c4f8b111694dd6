//! The page of a running engine, served.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use aha_core::config::{self, Credentials};
use aha_proto::metrics::MetricsServer;

use super::{Observed, page};
use crate::engine::EngineHandle;
use crate::torch::DeviceWeights;

/// Prometheus' own patience, by default; the engine answers between two steps.
const PATIENCE: Duration = Duration::from_secs(10);

/// A listener that does not answer yet.
#[derive(Debug)]
pub(crate) struct EngineMetrics {
    server: MetricsServer,
    /// Where vLLM's names are wanted.
    vllm_model: Option<String>,
}

impl EngineMetrics {
    /// Takes the address, where one is asked for.
    ///
    /// # Errors
    /// If the address is not to be had, or anyone on other machines could read there.
    pub(crate) fn bind(
        model: &config::Model,
        generator: &config::Generator,
        credentials: &Credentials,
    ) -> anyhow::Result<Option<Self>> {
        let Some(address) = generator.metrics_address else { return Ok(None) };
        let server = MetricsServer::bind("generator.metrics_address", address, credentials)?;
        let vllm_model = generator.vllm_metric_names.then(|| model.path.display().to_string());
        Ok(Some(Self { server, vllm_model }))
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Answers until it is dropped.
    pub(crate) async fn serve(self, engine: EngineHandle<DeviceWeights>, observed: Arc<Observed>) {
        let source = Arc::new(Source { engine, observed, vllm_model: self.vllm_model });
        let page = move || {
            let source = Arc::clone(&source);
            async move { source.page().await }
        };
        self.server.serve(page).await;
    }
}

#[derive(Debug)]
struct Source {
    engine: EngineHandle<DeviceWeights>,
    observed: Arc<Observed>,
    vllm_model: Option<String>,
}

impl Source {
    async fn page(&self) -> Result<String, String> {
        match tokio::time::timeout(PATIENCE, self.engine.status()).await {
            Ok(Ok(status)) => Ok(page(&status, &self.observed, self.vllm_model.as_deref())),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("the engine did not answer within {} s", PATIENCE.as_secs())),
        }
    }
}
