//! gRPC over HTTP/2 by hand: what tonic's client would refuse to send is sent, and what it would end is waited for.

use std::time::Duration;

use bytes::{Buf, Bytes};
use h2::client::SendRequest;
use http::{HeaderMap, Request};

/// What came of a call.
#[derive(Debug)]
pub struct Answer {
    /// As `grpc-status`; a call that ends without one has none.
    pub code: Option<u32>,
    pub message: String,
    /// Of the stream.
    pub messages: Vec<Bytes>,
}

/// A message as it lies in HTTP's body.
pub fn frame(message: &[u8]) -> Vec<u8> {
    let len = u32::try_from(message.len()).expect("inputs are short");
    [&[0], &len.to_be_bytes()[..], message].concat()
}

/// Sends `body` and reads until the stream ends.
pub async fn call(
    connection: SendRequest<Bytes>,
    path: &str,
    deadline: Option<Duration>,
    body: Vec<u8>,
) -> Result<Answer, h2::Error> {
    let mut request = Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    if let Some(deadline) = deadline {
        request = request.header("grpc-timeout", format!("{}m", deadline.as_millis()));
    }
    let request = request.body(()).expect("a request that makes sense to HTTP");
    let (response, mut stream) = connection.ready().await?.send_request(request, false)?;
    stream.send_data(body.into(), true)?;
    let (head, mut body) = response.await?.into_parts();
    let mut bytes = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        bytes.extend_from_slice(&chunk);
    }
    let trailers = body.trailers().await?.unwrap_or_default();
    let of = |name: &str| text(&trailers, name).or_else(|| text(&head.headers, name));
    Ok(Answer {
        code: of("grpc-status").and_then(|code| code.parse().ok()),
        message: of("grpc-message").unwrap_or_default(),
        messages: messages(bytes.into()),
    })
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

fn messages(mut bytes: Bytes) -> Vec<Bytes> {
    let mut messages = Vec::new();
    while bytes.len() >= 5 {
        bytes.advance(1);
        let len = bytes.get_u32() as usize;
        messages.push(bytes.split_to(len));
    }
    messages
}
