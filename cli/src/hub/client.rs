//! Requests to the Hub: each with a deadline, repeated where another attempt may help, and refused in words of use.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use aha_core::hub::Source;
use aha_trainer::loggers::printable;
use anyhow::{Context, Error, Result, anyhow};
use serde::de::DeserializeOwned;
use ureq::http::{self, HeaderMap, Request, Response, StatusCode};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, AsSendBody, SendBody};

use super::Kind;
use super::settings::Settings;

/// Of an answer that is read whole.
const MAX_ANSWER: u64 = 64 << 20;
/// What is slower than this for a whole transfer is given up.
const LEAST_BYTES_PER_SECOND: u64 = 64 << 10;
const ATTEMPTS: u32 = 3;
const MAX_REDIRECTS: u32 = 5;
/// Of what a server says about an error.
const MAX_MESSAGE: usize = 300;

/// Why an attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another attempt may succeed.
    Passing(Error),
    Final(Error),
}

/// One request.
pub(super) struct Call<'a> {
    pub(super) method: &'static str,
    /// Whole, or a path on the Hub's endpoint.
    pub(super) url: String,
    pub(super) headers: Vec<(String, String)>,
    /// With its length.
    pub(super) body: Option<(&'a mut dyn Read, u64)>,
    /// Bytes of the answer, as far as they are known.
    pub(super) expected: u64,
}

impl Call<'_> {
    pub(super) fn get(url: String) -> Self {
        Self { method: "GET", url, headers: Vec::new(), body: None, expected: 0 }
    }
}

#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    settings: Settings,
}

impl Client {
    /// # Errors
    /// If the Hub is to be asked by https, and this machine trusts no authority.
    pub(super) fn new(settings: &Settings) -> Result<Self> {
        let patience = Some(settings.patience);
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("aha/", env!("CARGO_PKG_VERSION")))
            .max_redirects(0)
            .timeout_resolve(patience)
            .timeout_connect(patience)
            .timeout_send_request(patience)
            .timeout_recv_response(patience)
            .timeout_per_read(patience)
            .timeout_per_write(patience);
        if settings.endpoint.starts_with("https://") {
            config = config.https_only(true).tls_config(tls()?);
        }
        Ok(Self { agent: config.build().into(), settings: settings.clone() })
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What the Hub answers to a GET, as JSON.
    ///
    /// # Errors
    /// Names `subject`, the status, and what to do.
    pub(super) fn get_json<T: DeserializeOwned>(&self, url: &str, subject: &Source) -> Result<T> {
        self.repeating(|| {
            let response = self.send(Call::get(url.to_owned()), subject)?;
            read_json(response).map_err(Failure::Passing)
        })
    }

    /// What the Hub answers to a POST, asked once.
    ///
    /// # Errors
    /// As [`get_json`](Self::get_json).
    pub(super) fn post(
        &self,
        url: &str,
        body: &[u8],
        content_type: &str,
        subject: &Source,
    ) -> Result<Response<ureq::Body>, Failure> {
        let mut reader = body;
        let headers =
            vec![("content-type".to_owned(), content_type.to_owned()), ("accept".to_owned(), accepted(content_type))];
        let body = Some((&mut reader as &mut dyn Read, body.len() as u64));
        self.send(Call { method: "POST", url: url.to_owned(), headers, body, expected: 0 }, subject)
    }

    /// Sends a request, and gives back an answer that is a success.
    pub(super) fn send(&self, call: Call<'_>, subject: &Source) -> Result<Response<ureq::Body>, Failure> {
        let Call { method, url, headers, body, expected } = call;
        let mut url = self.whole(&url);
        let answered = match body {
            Some((reader, length)) => {
                let request = self.request(method, &url, &headers).header("content-length", length);
                self.run(request.body(SendBody::from_reader(reader)), (length, expected))
            }
            None => self.follow(&mut url, &headers, expected),
        };
        let failed = |error| anyhow!("{method} {} for {subject}: {error}", without_query(&url));
        let response = answered.map_err(|error| Failure::Passing(failed(error)))?;
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(&response, &url, subject)) }
    }

    /// GETs `url`, and what it leads on to, which `url` then is.
    fn follow(
        &self,
        url: &mut String,
        headers: &[(String, String)],
        expected: u64,
    ) -> Result<Response<ureq::Body>, ureq::Error> {
        for _ in 0..MAX_REDIRECTS {
            let response = self.run(self.request("GET", url, headers).body(()), (0, expected))?;
            match response.headers().get("location").and_then(|place| place.to_str().ok()) {
                Some(place) if response.status().is_redirection() => *url = self.whole(place),
                _ => return Ok(response),
            }
        }
        Err(ureq::Error::TooManyRedirects)
    }

    /// An address whose path alone may be given.
    fn whole(&self, url: &str) -> String {
        let endpoint = if url.starts_with('/') { self.settings.endpoint.as_str() } else { "" };
        format!("{endpoint}{url}")
    }

    /// With the token, where it goes to the Hub itself: files come from other hosts, whose addresses carry their own
    /// permission.
    fn request(&self, method: &str, url: &str, headers: &[(String, String)]) -> http::request::Builder {
        let is_own = url.strip_prefix(&self.settings.endpoint).is_some_and(|rest| rest.starts_with('/'));
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        match self.settings.token.as_ref().filter(|_| is_own) {
            Some(token) => request.header("authorization", format!("Bearer {}", token.expose())),
            None => request,
        }
    }

    /// A transfer of so many bytes there and back.
    fn run(
        &self,
        request: Result<Request<impl AsSendBody>, http::Error>,
        (sent, expected): (u64, u64),
    ) -> Result<Response<ureq::Body>, ureq::Error> {
        let patience = self.settings.patience;
        let time = |bytes: u64| Some(patience + Duration::from_secs(bytes / LEAST_BYTES_PER_SECOND));
        let request = self.agent.configure_request(request?);
        self.agent.run(request.timeout_send_body(time(sent)).timeout_recv_body(time(expected)).build())
    }

    /// Does it again where that may help.
    pub(super) fn repeating<T>(&self, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T> {
        let mut tried = 1;
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(Failure::Passing(error)) if tried < ATTEMPTS => {
                    tracing::debug!("attempt {tried} of {ATTEMPTS}: {error:#}");
                    std::thread::park_timeout(self.settings.patience * tried / 50);
                    tried += 1;
                }
                Err(Failure::Passing(error)) => {
                    return Err(error.context(format!("given up after {ATTEMPTS} attempts")));
                }
                Err(Failure::Final(error)) => return Err(error),
            }
        }
    }

    fn refusal(&self, response: &Response<ureq::Body>, url: &str, subject: &Source) -> Failure {
        let (status, headers) = (response.status(), response.headers());
        let endpoint = &self.settings.endpoint;
        let id = &subject.id;
        let says = header(headers, "x-error-message").map(|says| format!(" ({says})")).unwrap_or_default();
        let credential = match self.settings.token {
            Some(_) => "the token (HF_TOKEN, or the Hub's log-in) is not valid there: check the name and the token",
            None => "it is private or gated: check the name, set HF_TOKEN, or log in with `hf auth login`",
        };
        let advice = match (status.as_u16(), header(headers, "x-error-code").as_deref()) {
            (_, Some("GatedRepo")) => {
                format!(
                    "{id} is gated: accept its licence at {endpoint}/{id}, and set HF_TOKEN to a token of that account"
                )
            }
            (_, Some("RevisionNotFound")) => format!("{id} has no revision {:?}", subject.revision),
            (401, _) => format!("there is no repository {id}, or {credential}"),
            (403, _) => format!("the token may not do this: it needs the permission to write to {id}"),
            (404, _) => format!("there is no such thing in {id}: check the name, or set HF_TOKEN where it is private"),
            (429, _) => "too many requests: try again in some minutes".to_owned(),
            (500.., _) => "the Hub cannot answer now: try again later".to_owned(),
            _ => "the request was not understood".to_owned(),
        };
        let error = anyhow!("{id}: HTTP {} from {}: {advice}{says}", status.as_u16(), without_query(url));
        let is_passing =
            status.is_server_error() || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status);
        if is_passing { Failure::Passing(error) } else { Failure::Final(error) }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Passing(error) | Failure::Final(error) => error,
        }
    }
}

/// Part of an address: `models` or `datasets`.
pub(super) fn collection(kind: Kind) -> &'static str {
    match kind {
        Kind::Model => "models",
        Kind::Dataset => "datasets",
    }
}

/// An answer as JSON, of a bounded size.
pub(super) fn read_json<T: DeserializeOwned>(mut response: Response<ureq::Body>) -> Result<T> {
    let bytes =
        response.body_mut().with_config().limit(MAX_ANSWER).read_to_vec().context("reading the Hub's answer")?;
    serde_json::from_slice(&bytes).context("the Hub's answer is not what its interface promises")
}

/// A header as text that may be shown.
pub(super) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    let text = printable(headers.get(name)?.to_str().ok()?);
    Some(text.chars().filter(|c| *c != '\n').take(MAX_MESSAGE).collect())
}

/// A part of an address, safe in it: anything but plain characters and slashes is escaped.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => escaped.push(byte.into()),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

/// What may be shown of an address: its query may be a permission.
fn without_query(url: &str) -> &str {
    url.split('?').next().unwrap_or_default()
}

fn accepted(content_type: &str) -> String {
    if content_type.contains("lfs") { content_type.to_owned() } else { "application/json".to_owned() }
}

/// TLS by ring, as gRPC has it here, with the authorities that this machine trusts.
fn tls() -> Result<TlsConfig> {
    let found = rustls_native_certs::load_native_certs();
    let roots: Vec<_> = found.certs.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect();
    anyhow::ensure!(
        !roots.is_empty(),
        "this machine trusts no certificate authority: install ca-certificates, or name a file of them in SSL_CERT_FILE"
    );
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = RootCerts::Specific(Arc::new(roots));
    Ok(TlsConfig::builder().unversioned_rustls_crypto_provider(provider).root_certs(roots).build())
}
