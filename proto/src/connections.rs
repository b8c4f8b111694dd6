//! Connections that are taken: so many at once, and only from clients that speak.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tonic::transport::server::{Connected, TcpConnectInfo};

/// Half of the files that a process may have open by default.
const MAX_CONNECTIONS: usize = 512;
/// A client that has not said hello by then is let go.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a hello: what HTTP/2 begins with. A TLS handshake and an HTTP/1 request have more.
const HELLO_BYTES: usize = 24;
/// After a connection that could not be taken, as where the process has no file left.
const PAUSE: Duration = Duration::from_millis(100);

/// What bounds the connections of a listener.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    pub max_connections: usize,
    pub hello_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self { max_connections: MAX_CONNECTIONS, hello_timeout: HELLO_TIMEOUT }
    }
}

impl ConnectionLimits {
    /// The connections of `incoming`. Those over the bound wait for others to end. One that cannot be taken is logged, and
    /// does not end the listener.
    pub fn over<S>(self, incoming: S) -> impl Stream<Item = io::Result<Connection>> + Send
    where
        S: Stream<Item = io::Result<TcpStream>> + Send + Unpin,
    {
        let places = Arc::new(Semaphore::new(self.max_connections));
        stream::unfold((incoming, places), move |(mut incoming, places)| async move {
            let place = Arc::clone(&places).acquire_owned().await.ok()?;
            loop {
                match incoming.next().await? {
                    Ok(stream) => {
                        let hello = Hello { missing: HELLO_BYTES, deadline: Box::pin(sleep(self.hello_timeout)) };
                        let connection = Connection { stream, hello: Some(hello), _place: place };
                        return Some((Ok(connection), (incoming, places)));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be taken");
                        sleep(PAUSE).await;
                    }
                }
            }
        })
    }
}

/// A connection that holds a place among those that may be open.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    /// Until it has come.
    hello: Option<Hello>,
    _place: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Hello {
    missing: usize,
    deadline: Pin<Box<Sleep>>,
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let Some(hello) = &mut self.hello else { return read };
        hello.missing = hello.missing.saturating_sub(buffer.filled().len() - before);
        if hello.missing == 0 {
            self.hello = None;
        } else if hello.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Both ends of `count` connections.
    async fn pairs(count: usize) -> (Vec<TcpStream>, VecDeque<io::Result<TcpStream>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut clients, mut servers) = (Vec::new(), VecDeque::new());
        for _ in 0..count {
            clients.push(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
            servers.push_back(Ok(listener.accept().await.unwrap().0));
        }
        (clients, servers)
    }

    #[tokio::test]
    async fn s5_connections_over_the_bound_wait_for_others_to_end() {
        let (_clients, servers) = pairs(3).await;
        let limits = ConnectionLimits { max_connections: 2, hello_timeout: PATIENCE };
        let mut taken = Box::pin(limits.over(stream::iter(servers)));
        let first = taken.next().await.unwrap().unwrap();
        let _second = taken.next().await.unwrap().unwrap();
        assert!(tokio::time::timeout(SHORT, taken.next()).await.is_err(), "a third beside two");
        drop(first);
        tokio::time::timeout(PATIENCE, taken.next()).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn s5_a_connection_without_a_hello_ends_and_one_with_it_stays() {
        let (mut clients, servers) = pairs(3).await;
        let limits = ConnectionLimits { max_connections: 3, hello_timeout: SHORT };
        let mut taken: Vec<_> = limits.over(stream::iter(servers)).take(3).map(Result::unwrap).collect().await;
        clients[1].write_all(&[0; HELLO_BYTES - 1]).await.unwrap();
        clients[2].write_all(&[0; HELLO_BYTES]).await.unwrap();
        let mut buffer = [0; HELLO_BYTES];
        assert_eq!(taken[0].read(&mut buffer).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(taken[1].read_exact(&mut buffer).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        taken[2].read_exact(&mut buffer).await.unwrap();
        assert!(tokio::time::timeout(4 * SHORT, taken[2].read(&mut buffer)).await.is_err(), "silence is allowed now");
    }

    #[tokio::test]
    async fn s5_a_connection_that_cannot_be_taken_does_not_end_the_listener() {
        let (_clients, mut servers) = pairs(1).await;
        // As when no file is left.
        servers.push_front(Err(io::Error::from_raw_os_error(24)));
        let mut taken = Box::pin(ConnectionLimits::default().over(stream::iter(servers)));
        tokio::time::timeout(PATIENCE, taken.next()).await.unwrap().unwrap().unwrap();
    }
}
