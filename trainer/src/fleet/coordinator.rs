//! Where generators register: a service of trainer rank 0.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aha_core::ids::PolicyVersion;
use aha_nn::comm::{host_and_port, listen};
use aha_proto::connections::ConnectionLimits;
use aha_proto::guard::{Guard, check_listen, secure_server, serving};
use aha_proto::v1;
use aha_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use anyhow::Context;
use tokio::net::TcpListener;
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

/// Longest address, in bytes: a host's name and a port. It is kept, and quoted in answers.
const MAX_ADDRESS: usize = 300;

/// Those that have registered, and what was pushed last.
#[derive(Debug, Clone)]
pub(super) struct Registry {
    state: Arc<Mutex<State>>,
    lease: Duration,
}

#[derive(Debug, Default)]
struct State {
    /// Until when each registration holds, by address.
    leases: BTreeMap<String, Instant>,
    pushed: Pushed,
}

/// A version of the policy, and who took it.
#[derive(Debug, Clone, Default)]
struct Pushed {
    version: u64,
    members: Vec<String>,
}

/// The run that generators register for.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) name: String,
    pub(super) max_steps: u64,
    pub(super) manifest_hash: u64,
}

#[derive(Debug)]
struct Service {
    registry: Registry,
    run: Run,
    started: Instant,
    connector: Connector,
}

/// Serves at `address`, `host:port`, as long as `runtime` lives; its name may take `limit` to become known.
///
/// # Errors
/// Says why the address cannot be listened on, or may not be.
pub(super) fn serve(
    (address, limit): (&str, Duration),
    connector: &Connector,
    run: Run,
    runtime: &Runtime,
) -> anyhow::Result<Registry> {
    let registry = Registry::new(connector.probe_timeout() * PROBES_PER_LEASE);
    let (host, port) = host_and_port(address).context("it is not host:port")?;
    let listener = listen(host, port, limit)?;
    let credentials = serving(connector.credentials());
    // Nobody is answered before.
    check_listen("generator.coordinator", listener.local_addr()?, &credentials)?;
    listener.set_nonblocking(true)?;
    let _entered = runtime.enter();
    let incoming = TcpIncoming::from(TcpListener::from_std(listener)?);
    let (started, connector) = (Instant::now(), connector.clone());
    let service = CoordinatorServer::new(Service { registry: registry.clone(), run, started, connector });
    let served = secure_server(&credentials)?
        .max_concurrent_streams(MAX_STREAMS)
        .add_routes(Guard::new(&credentials).over_grpc(Routes::new(service)))
        .serve_with_incoming(ConnectionLimits::default().over(incoming));
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
        Self { state: Arc::default(), lease }
    }

    /// The addresses of those whose lease has not run out.
    pub(super) fn members(&self) -> Vec<String> {
        let leases = &mut self.lock().leases;
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

    /// `members` have taken `version`.
    pub(super) fn note_push(&self, version: PolicyVersion, members: Vec<String>) {
        self.lock().pushed = Pushed { version: version.0, members };
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl Coordinator for Service {
    async fn register(&self, call: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        let v1::RegisterRequest { address, manifest_hash } = call.into_inner();
        if address.len() > MAX_ADDRESS {
            let problem = format!("address: must be at most {MAX_ADDRESS} bytes, got {}", address.len());
            return Err(Status::invalid_argument(problem));
        }
        if manifest_hash != self.run.manifest_hash {
            let ours = self.run.manifest_hash;
            return Err(Status::failed_precondition(format!(
                "manifest_hash: the weights of {address} have manifest {manifest_hash:016x}, and the trainer's {ours:016x}; \
                 start it with the trainer's model.path"
            )));
        }
        self.connector.client(&address).map_err(|error| Status::invalid_argument(format!("address: {error}")))?;
        let leases = &mut self.registry.lock().leases;
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
        if self.registry.lock().leases.remove(&address).is_some() {
            tracing::info!("generator {address} leaves");
        }
        Ok(Response::new(v1::LeaveResponse {}))
    }

    async fn run_status(&self, _: Request<v1::RunStatusRequest>) -> Result<Response<v1::RunStatusResponse>, Status> {
        // Forgets those whose lease has run out.
        self.registry.members();
        let state = self.registry.lock();
        let (now, pushed) = (Instant::now(), &state.pushed);
        let heard =
            |until: &Instant| self.registry.lease.saturating_sub(until.saturating_duration_since(now)).as_secs_f64();
        let registered = state.leases.iter().map(|(address, until)| v1::Member {
            address: address.clone(),
            heard_seconds: Some(heard(until)),
            takes_part: pushed.members.contains(address),
        });
        let others = pushed.members.iter().filter(|address| !state.leases.contains_key(*address));
        let named =
            others.map(|address| v1::Member { address: address.clone(), heard_seconds: None, takes_part: true });
        Ok(Response::new(v1::RunStatusResponse {
            run: self.run.name.clone(),
            version: pushed.version,
            max_steps: self.run.max_steps,
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            members: registered.chain(named).collect(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use aha_core::config::Credentials;

    use super::*;

    #[tokio::test]
    async fn addresses_that_are_none_or_too_long_are_refused_in_few_words() {
        let connector = Connector::new(Credentials::default(), Duration::from_secs(1)).unwrap();
        let run = Run { name: "run".to_owned(), max_steps: 1, manifest_hash: 7 };
        let registry = Registry::new(Duration::from_secs(3));
        let service = Service { registry: registry.clone(), run, started: Instant::now(), connector };
        let book = "x".repeat(1 << 20);
        for (address, manifest_hash, expect) in [
            ("no address", 7, "address: "),
            (&book, 7, "address: must be at most 300 bytes, got 1048576"),
            (&book, 8, "address: must be at most 300 bytes, got 1048576"),
            ("host:1", 8, "manifest_hash: the weights of host:1"),
        ] {
            let address = address.to_owned();
            let refused = service.register(Request::new(v1::RegisterRequest { address, manifest_hash })).await;
            let status = refused.unwrap_err();
            assert!(status.message().starts_with(expect) && status.message().len() < 1000, "{status}");
        }
        assert_eq!(registry.members(), Vec::<String>::new());
        let address = "host:1".to_owned();
        service.register(Request::new(v1::RegisterRequest { address, manifest_hash: 7 })).await.unwrap();
        assert_eq!(registry.members(), ["host:1"]);
    }
}
