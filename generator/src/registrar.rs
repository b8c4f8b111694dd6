//! A generator's place with the coordinator: it registers, stays registered, and leaves before it stops.

use std::convert::Infallible;
use std::time::Duration;

use aha_core::config::Credentials;
use aha_proto::caller::{self, Bearer, CallerError, SecureChannel};
use aha_proto::v1;
use aha_proto::v1::coordinator_client::CoordinatorClient;
use tokio::task::JoinHandle;
use tonic::Request;

/// Until the next try where there was none.
const RETRY: Duration = Duration::from_secs(1);
/// How often a generator registers within its lease.
const PER_LEASE: f64 = 3.0;
/// In seconds, whatever the coordinator says.
const LONGEST_LEASE: f64 = 3600.0;

/// Registers again and again until it leaves.
#[derive(Debug)]
pub struct Registrar {
    client: CoordinatorClient<SecureChannel>,
    address: String,
    registering: JoinHandle<Infallible>,
    timeout: Duration,
}

impl Registrar {
    /// Begins to register at `coordinator`, `host:port`, whether that is there yet or not. It may take `timeout` for an
    /// answer; `credentials` are this generator's. Must be called within a runtime.
    ///
    /// # Errors
    /// If `coordinator` is no address, or the credentials cannot be used.
    pub fn start(
        coordinator: &str,
        credentials: &Credentials,
        request: v1::RegisterRequest,
        timeout: Duration,
    ) -> Result<Self, CallerError> {
        let channel = caller::endpoint(coordinator, credentials)?.connect_timeout(timeout).connect_lazy();
        let client = CoordinatorClient::with_interceptor(channel, Bearer::new(credentials)?);
        let address = request.address.clone();
        let request = move || with_timeout(request.clone(), timeout);
        let registering = tokio::spawn(keep_registered(client.clone(), request, coordinator.to_owned()));
        Ok(Self { client, address, registering, timeout })
    }

    /// Takes part no more; says so where the coordinator does not answer.
    pub async fn leave(mut self) {
        self.registering.abort();
        let message = v1::LeaveRequest { address: self.address };
        if let Err(status) = self.client.leave(with_timeout(message, self.timeout)).await {
            tracing::warn!("the coordinator was not told that this generator leaves: {}", status.message());
        }
    }
}

/// Says what changes, not what stays.
async fn keep_registered(
    mut client: CoordinatorClient<SecureChannel>,
    request: impl Fn() -> Request<v1::RegisterRequest>,
    coordinator: String,
) -> Infallible {
    let mut last: Option<Result<(), String>> = None;
    loop {
        let (now, pause) = match client.register(request()).await {
            Ok(answer) => {
                let lease = answer.into_inner().lease_seconds.clamp(RETRY.as_secs_f64(), LONGEST_LEASE);
                (Ok(()), Duration::from_secs_f64(lease / PER_LEASE))
            }
            Err(status) => {
                (Err(format!("{}: {}", status.code().description().to_lowercase(), status.message())), RETRY)
            }
        };
        if last.as_ref() != Some(&now) {
            match &now {
                Ok(()) => tracing::info!("registered at {coordinator} as {}", request().get_ref().address),
                Err(reason) => tracing::warn!("not registered at {coordinator} yet: {reason}"),
            }
            last = Some(now);
        }
        tokio::time::sleep(pause).await;
    }
}

fn with_timeout<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}
