use std::net::SocketAddr;

use aha_core::config::{Identity, Secret};
use aha_proto::v1::generator_server::GeneratorServer;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Server, ServerTlsConfig};

use super::*;
use crate::test_generator::TestGenerator;

/// A generator whose trainers are to wait longer than any test runs.
const LONG: Duration = Duration::from_secs(600);
const TOKEN: &str = "a-token-of-this-test";

fn connector(credentials: &Credentials) -> Connector {
    Connector::new(credentials.clone(), Duration::from_secs(5)).unwrap()
}

#[track_caller]
fn check_text(error: &ConnectError, expect: &[&str]) {
    let error = error.to_string();
    for expect in expect {
        assert!(error.contains(expect), "no {expect:?} in: {error}");
    }
}

#[track_caller]
fn check_refused(address: &str, timeout_ms: u64, expect: &[&str]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let timeout = Duration::from_millis(timeout_ms);
    check_text(&runtime.block_on(connector(&Credentials::default()).connect(address, timeout)).unwrap_err(), expect);
}

#[test]
fn addresses_that_are_none_are_refused_at_once() {
    check_refused("local host:1", 60_000, &["\"local host:1\" is not of the form host:port"]);
    check_refused("localhost", 60_000, &["\"localhost\"", "the port is missing"]);
}

#[test]
fn a_generator_that_is_not_there_is_named_after_the_deadline() {
    let free_port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{free_port}");
    check_refused(&address, 300, &[&address, "did not answer for 0.", "Connection refused"]);
}

#[test]
fn a_port_that_accepts_and_stays_silent_is_named_after_the_deadline() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    check_refused(&address, 300, &[&address, "did not answer for 0.3 s", "no answer to a status request"]);
}

/// Answers to Status, for those with the right token.
async fn serve(tls: Option<ServerTlsConfig>) -> String {
    let answers = tokio::task::spawn_blocking(|| TestGenerator::start([]).service()).await.unwrap();
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let check = |request: tonic::Request<()>| match request.metadata().get("authorization") {
        Some(value) if value == &format!("Bearer {TOKEN}") => Ok(request),
        _ => Err(Status::unauthenticated("this service asks for a token")),
    };
    let service = GeneratorServer::with_interceptor(answers, check);
    let mut server = Server::builder();
    if let Some(tls) = tls {
        server = server.tls_config(tls).unwrap();
    }
    let router = server.add_service(service);
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

fn token(text: &str) -> Credentials {
    Credentials { token: Some(Secret::new(text.to_owned())), ..Credentials::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn s1_the_token_goes_with_every_call_and_a_wrong_one_is_no_reason_to_wait() {
    let address = serve(None).await;
    let client = connector(&token(TOKEN)).connect(&address, LONG).await.unwrap();
    client.status().await.unwrap();
    client.rpc().wake(v1::WakeRequest {}).await.unwrap();
    for credentials in [Credentials::default(), token("another-token-than-it")] {
        let error = connector(&credentials).connect(&address, LONG).await.unwrap_err();
        check_text(&error, &[&address, "takes no calls of this trainer", "AHA_TOKEN", "security.token_file"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn s8_the_token_is_in_no_debug_output_and_no_error() {
    let address = serve(None).await;
    let client = connector(&token(TOKEN)).connect(&address, LONG).await.unwrap();
    let refused = connector(&token("another-token-than-it")).connect(&address, LONG).await.unwrap_err();
    let unsendable = connector(&token("a token\nof two lines")).connect(&address, LONG).await.unwrap_err();
    check_text(&unsendable, &["cannot be in a header"]);
    let shown = format!("{client:?} {client:#?} {refused:?} {refused} {unsendable:?} {unsendable}");
    for secret in [TOKEN, "another-token", "two lines"] {
        assert!(!shown.contains(secret), "{secret:?} is in: {shown}");
    }
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// For `host`, until the end of the year `until`.
    fn sign(&self, host: &str, until: i32) -> Identity {
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(until, 12, 31);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap().pem();
        Identity { certificate, key: Secret::new(key.serialize_pem()) }
    }

    /// A server's side: `identity`, and clients of this authority where asked for.
    fn server(&self, identity: &Identity, is_mutual: bool) -> ServerTlsConfig {
        let pem = tonic::transport::Identity::from_pem(&identity.certificate, identity.key.expose());
        let tls = ServerTlsConfig::new().identity(pem);
        if is_mutual { tls.client_ca_root(tonic::transport::Certificate::from_pem(self.0.pem())) } else { tls }
    }

    /// A trainer's side.
    fn credentials(&self, identity: Option<Identity>) -> Credentials {
        Credentials { identity, ca: Some(self.0.pem()), ..token(TOKEN) }
    }
}

const HOST: &str = "127.0.0.1";

#[tokio::test(flavor = "multi_thread")]
async fn s2_a_trainer_calls_by_mutual_tls() {
    let ours = Authority::new("ours");
    let address = serve(Some(ours.server(&ours.sign(HOST, 4000), true))).await;
    let credentials = ours.credentials(Some(ours.sign(HOST, 4000)));
    connector(&credentials).connect(&address, LONG).await.unwrap().status().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn s2_certificates_that_are_refused_end_the_wait_and_say_what_to_check() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let good = ours.sign(HOST, 4000);
    let cases = [
        ("unknown authority", ours.server(&good, false), theirs.credentials(None), "UnknownIssuer"),
        ("expired", ours.server(&ours.sign(HOST, 2020), false), ours.credentials(None), "expired"),
        (
            "another host",
            ours.server(&ours.sign("other.host", 4000), false),
            ours.credentials(None),
            "not valid for name",
        ),
        ("no client certificate", ours.server(&good, true), ours.credentials(None), "CertificateRequired"),
        (
            "an expired client certificate",
            ours.server(&good, true),
            ours.credentials(Some(ours.sign(HOST, 2020))),
            "CertificateExpired",
        ),
        (
            "a client certificate of another authority",
            ours.server(&good, true),
            ours.credentials(Some(theirs.sign(HOST, 4000))),
            "UnknownCA",
        ),
        ("a server without TLS", ServerTlsConfig::new(), ours.credentials(None), "corrupt"),
    ];
    for (what, tls, credentials, reason) in cases {
        let address = serve((what != "a server without TLS").then_some(tls)).await;
        let connector = connector(&credentials);
        let connecting = connector.connect(&address, LONG);
        let error = tokio::time::timeout(Duration::from_secs(60), connecting).await.expect(what).unwrap_err();
        assert!(matches!(error, ConnectError::Tls { .. }), "{what}: {error}");
        check_text(&error, &[&address, "security.tls_ca", "security.tls_cert", "in date", reason]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_without_tls_learns_that_the_generator_may_have_it() {
    let ours = Authority::new("ours");
    let address = serve(Some(ours.server(&ours.sign(HOST, 4000), false))).await;
    let error = connector(&token(TOKEN)).connect(&address, Duration::from_millis(500)).await.unwrap_err();
    check_text(&error, &[&address, "both have TLS or none has (security.tls_cert there, security.tls_ca here)"]);
}

#[test]
fn credentials_that_cannot_be_used_are_refused() {
    let ours = Authority::new("ours");
    let alone = Credentials { ca: None, ..ours.credentials(Some(ours.sign(HOST, 4000))) };
    check_text(&Connector::new(alone, LONG).unwrap_err(), &["security.tls_ca: missing"]);
    let (one, other) = (ours.sign(HOST, 4000), ours.sign(HOST, 4000));
    let mixed = Identity { certificate: one.certificate, key: other.key };
    let error = connector(&ours.credentials(Some(mixed))).client("127.0.0.1:1").unwrap_err();
    check_text(&error, &["security.tls_cert, tls_key and tls_ca cannot be used together: "]);
}
