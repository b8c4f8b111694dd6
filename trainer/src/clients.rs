//! Connections to generators.

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

/// Pauses between tries to reach a generator that does not answer yet.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Longest time limit that is told apart from none: about 30 years.
const LONGEST_SECONDS: f64 = 1e9;

/// How this process reaches generators: what it proves itself by, and how long one may be silent.
#[derive(Debug, Clone)]
pub struct Connector {
    credentials: Credentials,
    /// For a connection or a status request. A connection on which nothing arrives for so long is probed, and given up
    /// after as long again: that finds a generator whose machine is gone, or that is stopped.
    probe_timeout: Duration,
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

impl Connector {
    /// Credentials without anything are calls without a token that are not encrypted; `probe_timeout` is
    /// `generator.probe_timeout_seconds`.
    ///
    /// # Errors
    /// If a certificate comes without the authority that generators are checked by.
    pub fn new(credentials: Credentials, probe_timeout: Duration) -> Result<Self, ConnectError> {
        if credentials.identity.is_some() && credentials.ca.is_none() {
            return Err(ConnectError::BadCredentials(
                "security.tls_ca: missing; a trainer with a certificate needs the authority that signed the generators'"
                    .to_owned(),
            ));
        }
        Ok(Self { credentials, probe_timeout })
    }

    /// Waits until the generator at `address`, `host:port`, answers, at most for `timeout`.
    ///
    /// # Errors
    /// Names the address, how long it did not answer and what happened last.
    pub async fn connect(&self, address: &str, timeout: Duration) -> Result<Client, ConnectError> {
        let started = Instant::now();
        let client = self.client(address)?;
        let mut pause = FIRST_PAUSE;
        loop {
            let rest = timeout.saturating_sub(started.elapsed());
            let probe = tokio::time::timeout(self.probe_timeout.min(rest), client.status()).await;
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

    /// The generator at `address`, `host:port`, whether it is there or not. Must be called within a runtime.
    ///
    /// # Errors
    /// If the address is none, or the credentials cannot be used.
    pub(crate) fn client(&self, address: &str) -> Result<Client, ConnectError> {
        let bad = |error| match error {
            CallerError::BadAddress(address, reason) => ConnectError::BadAddress { address, reason },
            CallerError::BadCredentials(reason) => ConnectError::BadCredentials(reason),
        };
        let channel = caller::endpoint(address, &self.credentials)
            .map_err(bad)?
            .connect_timeout(self.probe_timeout)
            .tcp_nodelay(true)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(self.probe_timeout)
            .keep_alive_timeout(self.probe_timeout)
            .keep_alive_while_idle(true)
            .connect_lazy();
        let rpc = GeneratorClient::with_interceptor(channel, Bearer::new(&self.credentials).map_err(bad)?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Client { address: address.to_owned(), rpc, encrypted: self.credentials.ca.is_some() })
    }

    pub(crate) fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    pub(crate) fn probe_timeout(&self) -> Duration {
        self.probe_timeout
    }
}

impl Client {
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
#[must_use]
pub fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, LONGEST_SECONDS))
}

#[cfg(test)]
mod tests;
