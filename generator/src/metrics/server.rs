//! `GET /metrics` over HTTP, for those who may call the generator too.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use aha_core::config::{self, Credentials};
use aha_proto::guard::{Guard, check_listen, secure_server};
use anyhow::Context;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;

use super::{Observed, exposition, page};
use crate::connections::ConnectionLimits;
use crate::engine::EngineHandle;

use crate::torch::DeviceWeights;

/// Prometheus' own patience, by default; the engine answers between two steps.
const PATIENCE: Duration = Duration::from_secs(10);

/// A listener that does not answer yet.
#[derive(Debug)]
pub(crate) struct MetricsServer {
    incoming: TcpIncoming,
    pub(crate) address: SocketAddr,
    /// Where vLLM's names are wanted.
    vllm_model: Option<String>,
    credentials: Credentials,
}

impl MetricsServer {
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
        check_listen("generator.metrics_address", address, credentials)?;
        let incoming =
            TcpIncoming::bind(address).with_context(|| format!("generator.metrics_address: listening on {address}"))?;
        let address = incoming.local_addr().context("asking for the address that was taken")?;
        let vllm_model = generator.vllm_metric_names.then(|| model.path.display().to_string());
        Ok(Some(Self { incoming, address, vllm_model, credentials: credentials.clone() }))
    }

    /// Answers until it is dropped.
    pub(crate) async fn serve(self, engine: EngineHandle<DeviceWeights>, observed: Arc<Observed>) {
        let source = Arc::new(Source { engine, observed, vllm_model: self.vllm_model });
        let answer = move || {
            let source = Arc::clone(&source);
            async move { source.answer().await }
        };
        let router = Guard::new(&self.credentials).over_http(axum::Router::new().route("/metrics", get(answer)));
        let served = match secure_server(&self.credentials) {
            Ok(server) => {
                let server = server.accept_http1(true).add_routes(Routes::from(router));
                server
                    .serve_with_incoming(ConnectionLimits::default().over(self.incoming))
                    .await
                    .map_err(anyhow::Error::from)
            }
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            tracing::error!(%error, "metrics are no longer served");
        }
    }
}

#[derive(Debug)]
struct Source {
    engine: EngineHandle<DeviceWeights>,
    observed: Arc<Observed>,
    vllm_model: Option<String>,
}

impl Source {
    async fn answer(&self) -> Response {
        let problem = match tokio::time::timeout(PATIENCE, self.engine.status()).await {
            Ok(Ok(status)) => {
                let text = page(&status, &self.observed, self.vllm_model.as_deref());
                return ([(CONTENT_TYPE, exposition::CONTENT_TYPE)], text).into_response();
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("the engine did not answer within {} s", PATIENCE.as_secs()),
        };
        (StatusCode::SERVICE_UNAVAILABLE, problem).into_response()
    }
}
