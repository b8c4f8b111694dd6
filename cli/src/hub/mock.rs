//! A Hub on loopback that answers as a test says, and notes what it was asked.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aha_core::config::Secret;
use serde_json::Value;

use super::client::Client;
use super::settings::Settings;

/// What every client of a mock has, and nobody may see but the Hub itself.
pub(super) const TOKEN: &str = "hf_a_token_of_the_test";

#[derive(Debug, Clone)]
pub(super) struct Asked {
    /// Method and address.
    pub(super) line: String,
    /// By their names in lower case.
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: Vec<u8>,
}

#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    /// Bytes less than announced.
    pub(super) torn: usize,
}

impl Answer {
    pub(super) fn of(status: u16, body: impl Into<Vec<u8>>) -> Option<Self> {
        Some(Self { status, body: body.into(), ..Self::default() })
    }

    pub(super) fn json(body: &Value) -> Option<Self> {
        Self::of(200, body.to_string())
    }

    pub(super) fn with(status: u16, name: &'static str, value: impl ToString) -> Option<Self> {
        Some(Self { status, headers: vec![(name, value.to_string())], ..Self::default() })
    }
}

#[derive(Debug, Clone)]
pub(super) struct MockHub {
    pub(super) endpoint: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl MockHub {
    /// Answers each request as `answer` says, and never where it says nothing.
    pub(super) fn start(answer: impl Fn(&Asked) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = Self { endpoint: format!("http://{}", listener.local_addr().unwrap()), asked: Arc::default() };
        let (asked, answer) = (Arc::clone(&hub.asked), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (asked, answer) = (Arc::clone(&asked), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream, &asked, &*answer));
            }
        });
        hub
    }

    pub(super) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// The requests that begin so.
    pub(super) fn asked_for(&self, line: &str) -> Vec<Asked> {
        self.asked().into_iter().filter(|asked| asked.line.starts_with(line)).collect()
    }

    /// A client with a token, that keeps files below `home`.
    pub(super) fn client(&self, home: &std::path::Path) -> Client {
        self.client_with(home, |_| {})
    }

    pub(super) fn client_with(&self, home: &std::path::Path, change: impl FnOnce(&mut Settings)) -> Client {
        let mut settings = Settings {
            endpoint: self.endpoint.clone(),
            cache: home.join("hub"),
            token: Some(Secret::new(TOKEN.to_owned())),
            is_offline: false,
            patience: Duration::from_secs(5),
        };
        change(&mut settings);
        Client::new(&settings).unwrap()
    }
}

/// One request, and its answer.
fn serve(stream: TcpStream, asked: &Mutex<Vec<Asked>>, answer: &dyn Fn(&Asked) -> Option<Answer>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let mut headers = BTreeMap::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        let Some((name, value)) = header.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    let request = Asked { line: line.trim_end().trim_end_matches(" HTTP/1.1").to_owned(), headers, body };
    asked.lock().unwrap().push(request.clone());
    let Some(answer) = answer(&request) else {
        // Until the client has had enough.
        let mut rest = Vec::new();
        drop(reader.read_to_end(&mut rest));
        return;
    };
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", answer.status);
    head += &format!("content-length: {}\r\n", answer.body.len() + answer.torn);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let mut stream = reader.into_inner();
    // A client that has gone away is what some tests are about.
    drop(stream.write_all(format!("{head}\r\n").as_bytes()).and_then(|()| stream.write_all(&answer.body)));
}
