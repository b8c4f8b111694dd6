//! `GET /metrics` over HTTP, for those who may call.

use std::future::Future;
use std::net::SocketAddr;

use aha_core::config::Credentials;
use anyhow::Context;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;

use super::exposition;
use crate::connections::ConnectionLimits;
use crate::guard::{Guard, check_listen, secure_server};

/// A listener that does not answer yet.
#[derive(Debug)]
pub struct MetricsServer {
    incoming: TcpIncoming,
    address: SocketAddr,
    credentials: Credentials,
}

impl MetricsServer {
    /// Takes `address`, which was named by `key`. Must be called within a runtime.
    ///
    /// # Errors
    /// If the address is not to be had, or anyone on other machines could read there.
    pub fn bind(key: &str, address: SocketAddr, credentials: &Credentials) -> anyhow::Result<Self> {
        check_listen(key, address, credentials)?;
        let incoming = TcpIncoming::bind(address).with_context(|| format!("{key}: listening on {address}"))?;
        let address = incoming.local_addr().context("asking for the address that was taken")?;
        Ok(Self { incoming, address, credentials: credentials.clone() })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers with what `page` gives, or with 503 and its reason, until this is dropped.
    pub async fn serve<F>(self, page: impl Fn() -> F + Clone + Send + Sync + 'static)
    where
        F: Future<Output = Result<String, String>> + Send,
    {
        let answer = move || {
            let page = page();
            async move {
                match page.await {
                    Ok(text) => ([(CONTENT_TYPE, exposition::CONTENT_TYPE)], text).into_response(),
                    Err(problem) => (StatusCode::SERVICE_UNAVAILABLE, problem).into_response(),
                }
            }
        };
        let router = Guard::new(&self.credentials).over_http(axum::Router::new().route("/metrics", get(answer)));
        let served = match secure_server(&self.credentials) {
            Ok(server) => {
                let server = server.accept_http1(true).add_routes(Routes::from(router));
                let incoming = ConnectionLimits::default().over(self.incoming);
                server.serve_with_incoming(incoming).await.map_err(anyhow::Error::from)
            }
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            tracing::error!(%error, "metrics are no longer served");
        }
    }
}
