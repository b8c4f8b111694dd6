//! Who is let in, and who is not.

use aha_core::config::{Identity, Secret};
use prost::Message;
use prost_types::FileDescriptorSet;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, ClientTlsConfig};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::hostile::Raw;
use super::*;

const TOKEN: &str = "a-token-of-this-test";
/// Calls that do as they are told may take a moment; those that wait for other members of a group take forever.
const CALL: Duration = Duration::from_secs(2);

struct Secured {
    address: SocketAddr,
    metrics_address: SocketAddr,
    _stop: oneshot::Sender<()>,
    _folder: TempDir,
}

impl Secured {
    async fn start(credentials: Credentials) -> Self {
        let folder = tiny_folder(Tiny::Qwen2, 1);
        let mut options = tiny_options(folder.path());
        options.generator.metrics_address = Some("127.0.0.1:0".parse().unwrap());
        let server = GeneratorServer::bind(&options, "127.0.0.1:0".parse().unwrap(), credentials).await.unwrap();
        let (address, metrics_address) = (server.address(), server.metrics_address().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(server.serve(Duration::ZERO, async { drop(stopped.await) }));
        Self { address, metrics_address, _stop: stop, _folder: folder }
    }

    async fn plain(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    async fn encrypted(&self, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
        Channel::from_shared(format!("https://{}", self.address)).unwrap().tls_config(tls)?.connect().await
    }
}

fn token() -> Credentials {
    Credentials { token: Some(Secret::new(TOKEN.to_owned())), ..Credentials::default() }
}

/// An empty message to any method; `authorization` as it is given.
async fn call(channel: &Channel, path: &str, authorization: Option<&str>) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let mut call = Request::new(Vec::new());
    call.set_timeout(CALL);
    if let Some(value) = authorization {
        call.metadata_mut().insert("authorization", value.parse::<MetadataValue<_>>().unwrap());
    }
    let mut stream = grpc.server_streaming(call, path.parse::<PathAndQuery>().unwrap(), Raw).await?.into_inner();
    while stream.message().await?.is_some() {}
    Ok(())
}

/// Paths of all methods in a set of descriptors.
fn methods(descriptors: &[u8]) -> Vec<String> {
    let files = FileDescriptorSet::decode(descriptors).unwrap().file;
    let services = files.iter().flat_map(|file| file.service.iter().map(move |service| (file.package(), service)));
    services
        .flat_map(|(package, service)| {
            service.method.iter().map(move |method| format!("/{package}.{}/{}", service.name(), method.name()))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn s1_every_method_but_health_asks_for_the_token() {
    let server = Secured::start(token()).await;
    let channel = server.plain().await;
    let own = methods(v1::FILE_DESCRIPTOR_SET);
    assert!(own.len() >= 10 && own.contains(&"/aha.v1.Generator/Generate".to_owned()), "{own:?}");
    let reflection = methods(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET);
    let unknown = ["/aha.v1.Generator/None".to_owned(), "/none.Service/Method".to_owned()];
    let wrong = ["Bearer a-token-of-this-tesT", "Bearer a-token-of-this-tes", "Basic YTpi", TOKEN, ""];
    for path in own.iter().chain(&reflection).chain(&unknown) {
        let refused: Vec<Option<&str>> = [None].into_iter().chain(wrong.map(Some)).collect();
        for authorization in refused {
            let status = call(&channel, path, authorization).await.unwrap_err();
            // The same whatever was wrong.
            assert_eq!(status.code(), Code::Unauthenticated, "{path} {authorization:?}: {status}");
            assert_eq!(status.message(), "this service asks for a token");
        }
        // The right token gets past the door, wherever the empty message leads then.
        let code = call(&channel, path, Some(&format!("Bearer {TOKEN}"))).await.err().map(|status| status.code());
        assert_ne!(code, Some(Code::Unauthenticated), "{path}");
        assert!(!path.ends_with("/Status") || code.is_none(), "{path}: {code:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn s1_health_answers_without_a_token() {
    let server = Secured::start(token()).await;
    let mut health = HealthClient::new(server.plain().await);
    let check = HealthCheckRequest { service: "aha.v1.Generator".to_owned() };
    assert_eq!(health.check(check).await.unwrap().into_inner().status(), ServingStatus::Serving);
    for path in methods(tonic_health::pb::FILE_DESCRIPTOR_SET).iter().filter(|path| path.ends_with("/Check")) {
        call(&server.plain().await, path, None).await.unwrap();
    }
    // Not everything that begins alike is health.
    let status = call(&server.plain().await, "/grpc.health.v1.HealthX/Check", None).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn s1_metrics_ask_for_the_token_on_every_path() {
    let server = Secured::start(token()).await;
    let ask = async |path: &str, header: &str| {
        let mut stream = TcpStream::connect(server.metrics_address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n{header}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer.to_lowercase()
    };
    for path in ["/metrics", "/", "/other"] {
        for header in ["", "authorization: Bearer another-token-than-it\r\n"] {
            let answer = ask(path, header).await;
            assert!(answer.starts_with("http/1.1 401 ") && answer.contains("www-authenticate: bearer\r\n"), "{answer}");
        }
    }
    let answer = ask("/metrics", &format!("authorization: Bearer {TOKEN}\r\n")).await;
    assert!(answer.starts_with("http/1.1 200 ") && answer.contains("aha_generator_steps_total"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn s9_beyond_loopback_nothing_listens_without_credentials() {
    let folder = tiny_folder(Tiny::Qwen2, 1);
    let options = tiny_options(folder.path());
    let refused = GeneratorServer::bind(&options, "0.0.0.0:0".parse().unwrap(), Credentials::default()).await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("--listen: 0.0.0.0:0 can be reached") && error.contains("AHA_TOKEN"), "{error}");
    let mut exposed = options.clone();
    exposed.generator.metrics_address = Some("0.0.0.0:0".parse().unwrap());
    let refused = GeneratorServer::bind(&exposed, "127.0.0.1:0".parse().unwrap(), Credentials::default()).await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("generator.metrics_address: 0.0.0.0:0 can be reached"), "{error}");
    for credentials in [token(), Credentials { insecure: true, ..Credentials::default() }] {
        GeneratorServer::bind(&exposed, "0.0.0.0:0".parse().unwrap(), credentials).await.unwrap();
    }
}

/// A certificate authority, gone with its test.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// For the hosts of these tests, until the end of the year `until`.
    fn sign(&self, until: i32) -> Identity {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(until, 12, 31);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap().pem();
        Identity { certificate, key: Secret::new(key.serialize_pem()) }
    }
}

fn client_tls(ca: &Authority, identity: Option<&Identity>) -> ClientTlsConfig {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca.pem()));
    match identity {
        Some(Identity { certificate, key }) => {
            tls.identity(tonic::transport::Identity::from_pem(certificate, key.expose()))
        }
        None => tls,
    }
}

/// Whether a call gets through, health included.
async fn check_tls(server: &Secured, tls: ClientTlsConfig, is_served: bool, what: &str) {
    let asked = async {
        let channel = server.encrypted(tls).await.map_err(|error| format!("{error:?}"))?;
        let status = GeneratorClient::new(channel.clone()).status(v1::StatusRequest {}).await;
        status.map_err(|status| format!("{status:?}"))?;
        let check = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
        check.map_err(|status| format!("{status:?}"))
    };
    let answer = tokio::time::timeout(PATIENCE, asked).await.expect("an answer comes in time");
    assert_eq!(answer.is_ok(), is_served, "{what}: {answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn s2_mutual_tls_takes_clients_of_its_authority_alone() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let identity = Some(ours.sign(4000));
    let server = Secured::start(Credentials { identity, ca: Some(ours.pem()), ..Credentials::default() }).await;
    check_tls(&server, client_tls(&ours, Some(&ours.sign(4000))), true, "a client of the authority").await;
    check_tls(&server, client_tls(&ours, None), false, "no certificate").await;
    check_tls(&server, client_tls(&ours, Some(&theirs.sign(4000))), false, "another authority").await;
    check_tls(&server, client_tls(&ours, Some(&ours.sign(2020))), false, "an expired certificate").await;
    check_tls(&server, client_tls(&theirs, Some(&ours.sign(4000))), false, "a server of another authority").await;

    // Not encrypted: neither calls nor metrics.
    let mut plain =
        GeneratorClient::new(Channel::from_shared(format!("http://{}", server.address)).unwrap().connect_lazy());
    let answer = tokio::time::timeout(PATIENCE, plain.status(v1::StatusRequest {})).await.unwrap();
    assert!(answer.is_err(), "{answer:?}");
    let mut stream = TcpStream::connect(server.metrics_address).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: here\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // It may also end in a reset.
    drop(tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap());
    assert!(!answer.starts_with(b"HTTP"), "{:?}", String::from_utf8_lossy(&answer));
}

#[tokio::test(flavor = "multi_thread")]
async fn s2_a_server_s_expired_certificate_is_refused_and_a_token_counts_beside_tls() {
    let ours = Authority::new("ours");
    let expired = Credentials { identity: Some(ours.sign(2020)), ..Credentials::default() };
    check_tls(&Secured::start(expired).await, client_tls(&ours, None), false, "an expired server").await;

    let server = Secured::start(Credentials { identity: Some(ours.sign(4000)), ..token() }).await;
    let channel = server.encrypted(client_tls(&ours, None)).await.unwrap();
    let status = call(&channel, "/aha.v1.Generator/Status", None).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    call(&channel, "/aha.v1.Generator/Status", Some(&format!("Bearer {TOKEN}"))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_cannot_be_used_are_refused_before_a_model_is_loaded() {
    let (one, other) = (Authority::new("one").sign(4000), Authority::new("other").sign(4000));
    let mixed = Identity { certificate: one.certificate, key: other.key };
    let bind = async |credentials| {
        let options = tiny_options(std::path::Path::new("no/model/is/here"));
        GeneratorServer::bind(&options, "127.0.0.1:0".parse().unwrap(), credentials).await.unwrap_err()
    };
    let error = bind(Credentials { identity: Some(mixed), ..Credentials::default() }).await;
    assert!(format!("{error:#}").starts_with("security.tls_cert, tls_key and tls_ca cannot be used"), "{error:#}");
    let error = bind(Credentials { ca: Some(Authority::new("ours").pem()), ..Credentials::default() }).await;
    assert!(
        error.to_string().contains("security.tls_ca: ") && error.to_string().contains("security.tls_cert"),
        "{error}"
    );
}

/// Silent connections end, and `call` gets through beside them and after.
async fn check_silence(server: &Secured, address: SocketAddr, hello: &[u8], call: impl AsyncFn()) {
    let mut silent = Vec::new();
    for _ in 0..32 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(hello).await.unwrap();
        silent.push(stream);
    }
    call().await;
    for stream in &mut silent {
        let mut answer = Vec::new();
        let end = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        assert!(end.is_ok(), "{address} of {} holds on to a silent client", server.address);
    }
    call().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s5_connections_that_never_begin_hold_nobody_up_and_are_closed() {
    let ours = Authority::new("ours");
    let encrypted = Secured::start(Credentials { identity: Some(ours.sign(4000)), ..Credentials::default() }).await;
    let plain = Secured::start(Credentials::default()).await;
    let call_encrypted = async || check_tls(&encrypted, client_tls(&ours, None), true, "beside silent clients").await;
    let call_plain = async || call(&plain.plain().await, "/aha.v1.Generator/Status", None).await.unwrap();
    // The first bytes of a TLS handshake of 512 bytes.
    let half_open: Vec<u8> = [&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &[7; 32]].concat();
    tokio::join!(
        check_silence(&encrypted, encrypted.address, &[], &call_encrypted),
        check_silence(&encrypted, encrypted.address, &half_open, &call_encrypted),
        check_silence(&encrypted, encrypted.metrics_address, &half_open, &call_encrypted),
        check_silence(&plain, plain.address, &[], &call_plain),
        check_silence(&plain, plain.metrics_address, b"GET /", &call_plain),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn s5_headers_over_their_bound_are_refused_and_others_are_served() {
    let server = Secured::start(token()).await;
    let channel = server.plain().await;
    let long = format!("Bearer {}", "x".repeat(64 << 10));
    let status = call(&channel, "/aha.v1.Generator/Status", Some(&long)).await.unwrap_err();
    assert_ne!(status.code(), Code::Unauthenticated, "it was looked at: {status}");
    call(&server.plain().await, "/aha.v1.Generator/Status", Some(&format!("Bearer {TOKEN}"))).await.unwrap();
}
