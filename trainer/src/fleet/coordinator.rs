//! Where generators register: a service of trainer rank 0.

use std::collections::BTreeMap;
use std::net::ToSocketAddrs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aha_proto::guard::{Guard, check_listen, secure_server};
use aha_proto::v1;
use aha_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use anyhow::{Context, anyhow};
use tokio::runtime::Runtime;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::clients::Connector;

/// A generator that is not heard of for so many of `generator.probe_timeout_seconds` is forgotten. It registers three times
/// as often.
const PROBES_PER_LEASE: u32 = 3;

/// Calls that a connection may have open: a generator makes one at a time.
const MAX_STREAMS: u32 = 16;

/// Most generators that may be registered at once.
const MAX_GENERATORS: usize = 4096;

/// Those that have registered, and until when that holds.
#[derive(Debug, Clone)]
pub(super) struct Registry {
    leases: Arc<Mutex<BTreeMap<String, Instant>>>,
    lease: Duration,
}

#[derive(Debug)]
struct Service {
    registry: Registry,
    connector: Connector,
    manifest_hash: u64,
}

/// Serves on `address`, `host:port`, as long as `runtime` lives.
///
/// # Errors
/// Says why the address cannot be listened on, or may not be.
pub(super) fn serve(
    address: &str,
    connector: &Connector,
    manifest_hash: u64,
    runtime: &Runtime,
) -> anyhow::Result<Registry> {
    let registry = Registry::new(connector.probe_timeout() * PROBES_PER_LEASE);
    let socket = address.to_socket_addrs()?.next().context("it has no address")?;
    let mut credentials = connector.credentials().clone();
    // A trainer without a certificate may have the authority of the generators.
    credentials.ca = credentials.ca.filter(|_| credentials.identity.is_some());
    check_listen("generator.coordinator", socket, &credentials)?;
    let _entered = runtime.enter();
    let incoming = TcpIncoming::bind(socket).map_err(|error| anyhow!(error))?;
    let service =
        CoordinatorServer::new(Service { registry: registry.clone(), connector: connector.clone(), manifest_hash });
    let served = secure_server(&credentials)?
        .max_concurrent_streams(MAX_STREAMS)
        .add_routes(Guard::new(&credentials).over_grpc(Routes::new(service)))
        .serve_with_incoming(incoming);
    runtime.spawn(async move {
        if let Err(error) = served.await {
            tracing::error!("generators cannot register any more: {error}");
        }
    });
    tracing::info!("generators register at {address}");
    Ok(registry)
}

impl Registry {
    fn new(lease: Duration) -> Self {
        Self { leases: Arc::default(), lease }
    }

    /// The addresses of those whose lease has not run out.
    pub(super) fn members(&self) -> Vec<String> {
        let mut leases = self.lock();
        let now = Instant::now();
        leases.retain(|address, until| {
            if *until <= now {
                let lease = self.lease.as_secs_f64();
                tracing::warn!("generator {address} has not been heard of for {lease:.1} s: it is forgotten");
            }
            *until > now
        });
        leases.keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Instant>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl Coordinator for Service {
    async fn register(&self, call: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        let v1::RegisterRequest { address, manifest_hash } = call.into_inner();
        if manifest_hash != self.manifest_hash {
            let ours = self.manifest_hash;
            return Err(Status::failed_precondition(format!(
                "manifest_hash: the weights of {address} have manifest {manifest_hash:016x}, and the trainer's {ours:016x}; \
                 start it with the trainer's model.path"
            )));
        }
        self.connector.client(&address).map_err(|error| Status::invalid_argument(format!("address: {error}")))?;
        let mut leases = self.registry.lock();
        if leases.len() >= MAX_GENERATORS && !leases.contains_key(&address) {
            return Err(Status::resource_exhausted(format!("{MAX_GENERATORS} generators are registered already")));
        }
        if leases.insert(address.clone(), Instant::now() + self.registry.lease).is_none() {
            tracing::info!("generator {address} has registered: it takes part from the next weight push on");
        }
        Ok(Response::new(v1::RegisterResponse { lease_seconds: self.registry.lease.as_secs_f64() }))
    }

    async fn leave(&self, call: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        let address = call.into_inner().address;
        if self.registry.lock().remove(&address).is_some() {
            tracing::info!("generator {address} leaves");
        }
        Ok(Response::new(v1::LeaveResponse {}))
    }
}
