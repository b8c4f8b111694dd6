//! Connections to generators.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use aha_core::config::Credentials;
use aha_proto::caller::{self, Bearer, CallerError, SecureChannel};
use aha_proto::v1;
use aha_proto::v1::generator_client::GeneratorClient;
use tonic::{Code, Status};

/// Largest message: completions with their texts, far over what a model's context can fill.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Bytes a generator may send ahead of their being read. HTTP/2 clients close a connection whose unread small frames
/// would take more than half of this, at 256 bytes each: as many as the completions a generator may have in flight.
const CONNECTION_WINDOW: u32 = 2 * 256 * (256 << 10);

/// A connection on which nothing arrives is probed this often, and given up when the probe is not answered. Finds a
/// generator whose machine is gone, or that is stopped.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// One try to reach a generator that does not answer yet, and the pauses between tries.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Longest time limit that is told apart from none: about 30 years.
const LONGEST_SECONDS: f64 = 1e9;

/// Who this process is: set once, at its start.
static CREDENTIALS: OnceLock<Credentials> = OnceLock::new();

/// Proves every call of this process to generators by `credentials`, from here on. Without, calls carry no token and
/// are not encrypted.
///
/// # Errors
/// If some were set before, or a certificate comes without the authority that generators are checked by.
pub fn use_credentials(credentials: Credentials) -> Result<(), ConnectError> {
    if credentials.identity.is_some() && credentials.ca.is_none() {
        return Err(ConnectError::BadCredentials(
            "security.tls_ca: missing; a trainer with a certificate needs the authority that signed the generators'"
                .to_owned(),
        ));
    }
    let again = |_| ConnectError::BadCredentials("credentials were set before".to_owned());
    CREDENTIALS.set(credentials).map_err(again)
}

/// Those of this process; none unless they were set.
pub(crate) fn own_credentials() -> &'static Credentials {
    CREDENTIALS.get_or_init(Credentials::default)
}

/// The calls of the service, each with the token.
pub(crate) type Rpc = GeneratorClient<SecureChannel>;

/// One generator. Connects anew by itself where a connection was lost.
#[derive(Debug, Clone)]
pub struct Client {
    address: String,
    rpc: Rpc,
    encrypted: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("generator.addresses: {address:?} is not of the form host:port: {reason}")]
    BadAddress { address: String, reason: String },
    #[error(
        "generator {address} did not answer for {:.1} s: {reason}; check that it runs and that both have \
         TLS or none has (security.tls_cert there, security.tls_ca here), or raise generator.connect_timeout_seconds", waited.as_secs_f64()
    )]
    NoAnswer { address: String, waited: Duration, reason: String },
    #[error(
        "generator {address} takes no calls of this trainer ({reason}): give both the same token, by AHA_TOKEN or \
         security.token_file"
    )]
    Unauthenticated { address: String, reason: String },
    #[error(
        "no TLS with generator {address}: {reason}; check that it has security.tls_cert, signed by the authority in this \
         trainer's security.tls_ca, in date and with the host of its address among its names, and, where it has \
         security.tls_ca, that this trainer's security.tls_cert is signed by that and in date"
    )]
    Tls { address: String, reason: String },
    #[error("{0}")]
    BadCredentials(String),
}

impl Client {
    /// Waits until the generator at `address`, `host:port`, answers, at most for `timeout`.
    ///
    /// # Errors
    /// Names the address, how long it did not answer and what happened last.
    pub async fn connect(address: &str, timeout: Duration) -> Result<Self, ConnectError> {
        Self::connect_with(address, timeout, own_credentials()).await
    }

    /// Like [`Client::connect`], with other credentials than the process's.
    pub(crate) async fn connect_with(
        address: &str,
        timeout: Duration,
        credentials: &Credentials,
    ) -> Result<Self, ConnectError> {
        let started = Instant::now();
        let client = Self::new_with(address, credentials)?;
        let mut pause = FIRST_PAUSE;
        loop {
            let rest = timeout.saturating_sub(started.elapsed());
            let probe = tokio::time::timeout(PROBE_TIMEOUT.min(rest), client.status()).await;
            let reason = match probe {
                Ok(Ok(_)) => return Ok(client),
                Ok(Err(status)) => {
                    let reason = describe(&status);
                    if let Some(verdict) = client.verdict(&status, &reason) {
                        return Err(verdict);
                    }
                    reason
                }
                Err(_) => "no answer to a status request".to_owned(),
            };
            if started.elapsed() + pause >= timeout {
                return Err(ConnectError::NoAnswer { address: address.to_owned(), waited: started.elapsed(), reason });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What the generator is doing.
    ///
    /// # Errors
    /// Whatever the call came to.
    pub async fn status(&self) -> Result<v1::StatusResponse, Status> {
        self.rpc().status(v1::StatusRequest {}).await.map(tonic::Response::into_inner)
    }

    /// The calls of the service. Clones share the connection.
    pub(crate) fn rpc(&self) -> Rpc {
        self.rpc.clone()
    }

    /// What waiting would not change.
    fn verdict(&self, status: &Status, reason: &str) -> Option<ConnectError> {
        let (address, reason) = (self.address.clone(), reason.to_owned());
        if status.code() == Code::Unauthenticated {
            return Some(ConnectError::Unauthenticated { address, reason });
        }
        // Nothing else below a call finds its data invalid.
        let mut sources = std::iter::successors(std::error::Error::source(status), |error| error.source());
        let refused = sources.any(|error| {
            let error = error.downcast_ref::<std::io::Error>();
            error.is_some_and(|error| error.kind() == std::io::ErrorKind::InvalidData)
        });
        (self.encrypted && refused).then_some(ConnectError::Tls { address, reason })
    }

    /// The generator at `address`, `host:port`, whether it is there or not.
    ///
    /// # Errors
    /// If the address is none.
    pub(crate) fn new(address: &str) -> Result<Self, ConnectError> {
        Self::new_with(address, own_credentials())
    }

    fn new_with(address: &str, credentials: &Credentials) -> Result<Self, ConnectError> {
        let bad = |error| match error {
            CallerError::BadAddress(address, reason) => ConnectError::BadAddress { address, reason },
            CallerError::BadCredentials(reason) => ConnectError::BadCredentials(reason),
        };
        let channel = caller::endpoint(address, credentials)
            .map_err(bad)?
            .connect_timeout(PROBE_TIMEOUT)
            .tcp_nodelay(true)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_lazy();
        let rpc = GeneratorClient::with_interceptor(channel, Bearer::new(credentials).map_err(bad)?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { address: address.to_owned(), rpc, encrypted: credentials.ca.is_some() })
    }
}

/// A call with its deadline, which the generator learns as well.
pub(crate) fn with_timeout<T>(message: T, timeout: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(timeout);
    request
}

/// A failed call in one line: the kind of failure, what the generator says, and what lies below.
#[must_use]
pub fn describe(status: &Status) -> String {
    let mut text = status.code().description().to_lowercase();
    if !status.message().is_empty() {
        text.push_str(&format!(": {}", status.message()));
    }
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text.push_str(&format!(": {reason}"));
        }
        source = error.source();
    }
    text
}

/// Whether the same call may succeed on another try or another generator. Everything else is a verdict on the call.
pub(crate) fn is_passing(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::Cancelled
            | Code::Unknown
            | Code::Internal
            | Code::Aborted
            | Code::ResourceExhausted
            | Code::DeadlineExceeded
    )
}

/// A time limit from the configuration.
pub(crate) fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, LONGEST_SECONDS))
}

#[cfg(test)]
mod tests;
