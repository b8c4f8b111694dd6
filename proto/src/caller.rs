//! What a process proves itself by when it calls: the token of every call, and TLS.

use aha_core::config::Credentials;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::interceptor::{InterceptedService, Interceptor};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status};

/// Why no call can be made.
#[derive(Debug, thiserror::Error)]
pub enum CallerError {
    #[error("{0:?} is not of the form host:port: {1}")]
    BadAddress(String, String),
    #[error("{0}")]
    BadCredentials(String),
}

/// A connection whose calls carry the token.
pub type SecureChannel = InterceptedService<Channel, Bearer>;

/// The `authorization` of a call; its debug output hides the token.
#[derive(Debug, Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl Bearer {
    /// # Errors
    /// If the token cannot be in a header.
    pub fn new(credentials: &Credentials) -> Result<Self, CallerError> {
        let Some(token) = &credentials.token else { return Ok(Self(None)) };
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.expose()).parse().map_err(|_| {
            CallerError::BadCredentials("the token has characters that cannot be in a header".to_owned())
        })?;
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }
}

/// `address`, `host:port`, by TLS where `credentials` have an authority to check it by.
///
/// # Errors
/// If the address is none, or certificates and key cannot be used.
pub fn endpoint(address: &str, credentials: &Credentials) -> Result<Endpoint, CallerError> {
    let bad = |reason: String| CallerError::BadAddress(address.to_owned(), reason);
    let scheme = if credentials.ca.is_some() { "https" } else { "http" };
    let endpoint = Endpoint::from_shared(format!("{scheme}://{address}")).map_err(|error| bad(error.to_string()))?;
    if endpoint.uri().port().is_none() {
        return Err(bad("the port is missing".to_owned()));
    }
    let Some(ca) = &credentials.ca else { return Ok(endpoint) };
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
    if let Some(identity) = &credentials.identity {
        tls = tls.identity(Identity::from_pem(&identity.certificate, identity.key.expose()));
    }
    endpoint.tls_config(tls).map_err(|error| {
        let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        CallerError::BadCredentials(format!("security.tls_cert, tls_key and tls_ca cannot be used together: {reason}"))
    })
}
