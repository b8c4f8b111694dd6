//! The generator as a process: listens, reports its health, and stops in order.

use std::future::Future;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use aha_core::config::Credentials;
use aha_proto::connections::ConnectionLimits;
use aha_proto::guard::{Guard, check_listen, secure_server};
use aha_proto::v1;
use aha_proto::v1::generator_server::GeneratorServer as GeneratorService;
use anyhow::{Context, anyhow, bail};
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;

use crate::engine::{EngineHandle, EngineHealth};

use crate::instance::{GeneratorOptions, Instance};
use crate::metrics::{EngineMetrics, Observed};
use crate::service::Service;
use crate::torch::{DeviceWeights, WeightReceiver};

/// Largest message that is taken: a prompt of a million tokens, and its columns.
const MAX_REQUEST_BYTES: usize = 16 << 20;
/// Largest message that is sent: a completion of a million tokens, and its text.
const MAX_RESPONSE_BYTES: usize = 64 << 20;
/// Calls that a connection may have open; what a client starts beyond that waits on its side. Leaves room for other calls
/// beside as many requests as are taken.
const MAX_STREAMS: u32 = 8192;
/// Bytes a connection may send ahead of their being read. HTTP/2 servers close a connection whose unread small frames
/// would take more than half of this, at 256 bytes each; a request is one such frame.
const CONNECTION_WINDOW: u32 = 2 * 256 * 2 * MAX_STREAMS;
/// Headers of a call: room for a token and for what tracing adds.
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Calls that a client has reset and nobody has looked at yet; more close its connection (rapid reset).
const MAX_PENDING_RESETS: usize = 20;
/// A connection on which nothing arrives is probed this often, and closed when the probe is not answered: a client whose
/// machine is gone is noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// What streams may take to end once the engine has aborted their requests.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A generator that listens but does not answer yet.
#[derive(Debug)]
pub struct GeneratorServer {
    incoming: TcpIncoming,
    address: SocketAddr,
    engine: EngineHandle<DeviceWeights>,
    observed: Arc<Observed>,
    service: Service,
    metrics: Option<EngineMetrics>,
    credentials: Credentials,
}

impl GeneratorServer {
    /// Loads the model, starts the engine and takes the address; port 0 takes a free one. Whoever calls needs what
    /// `credentials` ask for.
    ///
    /// # Errors
    /// If the model cannot be served as asked, the address is not to be had, or anyone on other machines could call.
    pub async fn bind(
        options: &GeneratorOptions,
        listen: SocketAddr,
        credentials: Credentials,
    ) -> anyhow::Result<Self> {
        check_listen("--listen", listen, &credentials)?;
        // Before a model is loaded for nothing.
        secure_server(&credentials)?;
        // The kernels have threads of their own, which libtorch's would take turns with.
        aha_nn::runtime::set_num_threads(NonZeroUsize::MIN);
        let incoming =
            TcpIncoming::bind(listen).with_context(|| format!("listening on {listen}"))?.with_nodelay(Some(true));
        let metrics = EngineMetrics::bind(&options.model, &options.generator, &credentials)?;
        let options = options.clone();
        let instance = tokio::task::spawn_blocking(move || Instance::start(&options)).await??;
        Ok(Self { metrics, credentials, ..Self::over(instance, incoming)? })
    }

    /// Puts the service on top of an engine.
    pub(crate) fn over(instance: Instance, incoming: TcpIncoming) -> anyhow::Result<Self> {
        let address = incoming.local_addr().context("asking for the address that was taken")?;
        let (engine, observed) = (instance.engine.clone(), instance.outputs.observed());
        let receiver = WeightReceiver::start(&instance.config, instance.format, engine.clone(), Handle::current())?;
        let service = Service::new(instance, receiver);
        let credentials = Credentials::default();
        Ok(Self { incoming, address, engine, observed, service, metrics: None, credentials })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Hash of the weight manifest that pushes must match.
    #[must_use]
    pub fn manifest_hash(&self) -> u64 {
        self.service.manifest_hash()
    }

    /// Where it serves metrics, if it does.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().map(|metrics| metrics.address())
    }

    /// Answers until `shutdown` resolves; requests then have `grace` to finish before they are aborted.
    ///
    /// # Errors
    /// If the engine fails, or the listener does.
    pub async fn serve(self, grace: Duration, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<GeneratorService<Service>>().await;
        let service = GeneratorService::new(self.service)
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_RESPONSE_BYTES);
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let routes = Routes::new(service).add_service(health_service).add_service(reflection);
        let router = secure_server(&self.credentials)?
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
            .max_concurrent_streams(MAX_STREAMS)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .add_routes(Guard::new(&self.credentials).over_grpc(routes));
        // Ends with this function.
        let mut beside = JoinSet::new();
        if let Some(metrics) = self.metrics {
            beside.spawn(metrics.serve(self.engine.clone(), self.observed));
        }
        let (stop, stopped) = oneshot::channel::<()>();
        let incoming = ConnectionLimits::default().over(self.incoming);
        let mut serving = tokio::spawn(router.serve_with_incoming_shutdown(incoming, async {
            // Either a word or the end of whoever could have said it.
            drop(stopped.await);
        }));
        let failure = tokio::select! {
            () = shutdown => None,
            reason = engine_end(self.engine.health()) => Some(reason),
            ended = &mut serving => bail!("the listener ended by itself: {ended:?}"),
        };
        for name in ["", <GeneratorService<Service> as tonic::server::NamedService>::NAME] {
            health.set_service_status(name, ServingStatus::NotServing).await;
        }
        drop(stop);
        finish(serving, self.engine, grace).await?;
        failure.map_or(Ok(()), |reason| Err(anyhow!("the engine has ended: {reason}")))
    }
}

/// Lets open calls finish within `grace`, then aborts them.
async fn finish(
    mut serving: JoinHandle<Result<(), tonic::transport::Error>>,
    engine: EngineHandle<DeviceWeights>,
    grace: Duration,
) -> anyhow::Result<()> {
    let mut ended = tokio::time::timeout(grace, &mut serving).await;
    if ended.is_err() {
        tracing::warn!(grace_s = grace.as_secs_f64(), "requests did not finish within the grace and are aborted");
        // An engine that is gone already has nothing left to abort.
        drop(engine.stop().await);
        ended = tokio::time::timeout(LAST_WORDS, &mut serving).await;
    }
    match ended {
        Ok(served) => served?.context("serving"),
        Err(_) => {
            serving.abort();
            Ok(())
        }
    }
}

/// Waits for the end of the engine's thread, and says why it ended.
async fn engine_end(mut health: watch::Receiver<EngineHealth>) -> String {
    let ended = health.wait_for(|health| *health != EngineHealth::Serving).await;
    match ended.as_deref() {
        Ok(EngineHealth::Failed(reason)) => reason.clone(),
        Ok(EngineHealth::Stopped | EngineHealth::Serving) | Err(_) => "it was stopped".to_owned(),
    }
}
