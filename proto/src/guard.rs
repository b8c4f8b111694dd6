//! Who is let in: where a service may listen, TLS, and the token of every call.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use aha_core::config::{Credentials, Secret};
use anyhow::{Context, ensure};
use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

const SCHEME: &str = "Bearer ";
/// What needs no token: probes of load balancers and supervisors have none.
const HEALTH: &str = "/grpc.health.v1.Health/";
/// A client that does not finish its TLS handshake by then is let go.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Refuses an address beyond loopback at which anyone could call. `key` is where the address was named.
///
/// # Errors
/// Says what to set.
pub fn check_listen(key: &str, address: SocketAddr, credentials: &Credentials) -> anyhow::Result<()> {
    if address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    let encrypted = credentials.identity.is_some();
    let authenticated = credentials.token.is_some() || (encrypted && credentials.ca.is_some());
    ensure!(
        authenticated || credentials.insecure,
        "{key}: {address} can be reached from other machines, and nothing says who may call: set a token (AHA_TOKEN or \
         security.token_file, on trainers too), or security.tls_cert, tls_key and tls_ca to take clients with a \
         certificate only; on a network that nobody else is in, security.insecure: true does without"
    );
    if !authenticated {
        tracing::warn!("security.insecure: whoever reaches {address} may call");
    }
    if !encrypted {
        tracing::warn!("{address} is not encrypted, the token included: security.tls_cert and tls_key would");
    }
    Ok(())
}

/// What a trainer serves by. One without a certificate may have the authority of those that it calls, who prove nothing to
/// it.
#[must_use]
pub fn serving(credentials: &Credentials) -> Credentials {
    let mut credentials = credentials.clone();
    credentials.ca = credentials.ca.filter(|_| credentials.identity.is_some());
    credentials
}

/// A server with the certificate of `credentials`, where there is one, which lets everyone in whom they admit.
///
/// # Errors
/// If certificates and key cannot be used.
pub fn secure_server(credentials: &Credentials) -> anyhow::Result<Server> {
    let server = Server::builder();
    let Some(identity) = &credentials.identity else {
        ensure!(
            credentials.ca.is_none(),
            "security.tls_ca: a service that asks for clients' certificates needs one of its own: set security.tls_cert \
             and security.tls_key"
        );
        return Ok(server);
    };
    let mut tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(&identity.certificate, identity.key.expose()))
        .timeout(HANDSHAKE_TIMEOUT);
    if let Some(ca) = &credentials.ca {
        tls = tls.client_ca_root(Certificate::from_pem(ca));
    }
    server.tls_config(tls).context("security.tls_cert, tls_key and tls_ca cannot be used together")
}

/// Asks every call for the token, whatever is called: what is not known cannot be probed for either.
#[derive(Debug, Clone)]
pub struct Guard(Option<Arc<Secret>>);

impl Guard {
    #[must_use]
    pub fn new(credentials: &Credentials) -> Self {
        Self(credentials.token.clone().map(Arc::new))
    }

    /// Guards all services but health.
    #[must_use]
    pub fn over_grpc(self, routes: Routes) -> Routes {
        Routes::from(routes.into_axum_router().layer(from_fn_with_state(self, check_call)))
    }

    /// Guards every path.
    pub fn over_http(self, router: Router) -> Router {
        router.layer(from_fn_with_state(self, check_request))
    }

    /// Whether the token is there and right. Tokens of the same length take the same time, right or wrong.
    fn admits(&self, headers: &HeaderMap) -> bool {
        let Some(expected) = &self.0 else { return true };
        let Some(value) = headers.get(AUTHORIZATION) else { return false };
        let Some((scheme, token)) = value.as_bytes().split_at_checked(SCHEME.len()) else { return false };
        scheme.eq_ignore_ascii_case(SCHEME.as_bytes()) && bool::from(token.ct_eq(expected.expose().as_bytes()))
    }
}

async fn check_call(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    if request.uri().path().starts_with(HEALTH) || guard.admits(request.headers()) {
        return next.run(request).await;
    }
    Status::unauthenticated("this service asks for a token").into_http()
}

async fn check_request(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    if guard.admits(request.headers()) {
        return next.run(request).await;
    }
    (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, SCHEME.trim_end())]).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Credentials {
        Credentials { token: Some(Secret::new("a-token-of-a-test".to_owned())), ..Credentials::default() }
    }

    fn listen(address: &str, credentials: &Credentials) -> Result<(), String> {
        check_listen("--listen", address.parse().unwrap(), credentials).map_err(|error| error.to_string())
    }

    #[test]
    fn s9_other_machines_are_let_in_only_where_someone_says_who_may_call() {
        let identity = aha_core::config::Identity { certificate: String::new(), key: Secret::new(String::new()) };
        let open = Credentials::default();
        let tls = Credentials { identity: Some(identity), ..Credentials::default() };
        let mutual = Credentials { ca: Some(String::new()), ..tls.clone() };
        let insecure = Credentials { insecure: true, ..Credentials::default() };
        for address in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[::ffff:10.0.0.1]:1"] {
            for refused in [&open, &tls] {
                let error = listen(address, refused).unwrap_err();
                for expect in [&format!("--listen: {address}")[..], "AHA_TOKEN", "tls_ca", "insecure: true"] {
                    assert!(error.contains(expect), "no {expect:?} in: {error}");
                }
            }
            for allowed in [&token(), &mutual, &insecure] {
                listen(address, allowed).unwrap();
            }
        }
        for address in ["127.0.0.1:1", "127.3.2.1:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            listen(address, &open).unwrap();
        }
    }

    #[test]
    fn a_token_is_taken_as_it_is_and_in_its_scheme_alone() {
        let admits = |credentials: &Credentials, value: &str| {
            let value = value.parse().unwrap();
            Guard::new(credentials).admits(&HeaderMap::from_iter([(AUTHORIZATION, value)]))
        };
        assert!(admits(&token(), "Bearer a-token-of-a-test") && admits(&token(), "bearer a-token-of-a-test"));
        for wrong in [
            "",
            "Bearer",
            "Bearer ",
            "a-token-of-a-test",
            "Basic  a-token-of-a-test",
            "Bearer  a-token-of-a-test",
            "Bearer A-token-of-a-test",
            "Bearer a-token-of-a-tes",
            "Bearer a-token-of-a-testt",
        ] {
            assert!(!admits(&token(), wrong), "{wrong:?}");
            assert!(admits(&Credentials::default(), wrong));
        }
        assert!(!Guard::new(&token()).admits(&HeaderMap::new()));
    }
}
