//! What a generator finds where it is told to join an update group.

use std::io::Write;
use std::net::TcpListener;
use std::sync::LazyLock;
use std::time::Duration;

use aha_nn::comm::Store;
use aha_proto::v1;

const HERE: &str = "127.0.0.1";

struct Peers {
    /// Takes connections and says nothing.
    _silent: TcpListener,
    silent_port: u16,
    /// Says what nobody asked for.
    loud_port: u16,
    /// A store that nobody else comes to.
    store: Store,
}

static PEERS: LazyLock<Peers> = LazyLock::new(|| {
    let listen = || TcpListener::bind((HERE, 0)).expect("a free port");
    let (silent, loud) = (listen(), listen());
    let port = |listener: &TcpListener| listener.local_addr().expect("it listens").port();
    let (silent_port, loud_port) = (port(&silent), port(&loud));
    std::thread::spawn(move || {
        for stream in loud.incoming() {
            // Whoever has gone hears nothing.
            drop(stream.and_then(|mut stream| stream.write_all(&[0xff; 4096])));
        }
    });
    let store = Store::host(HERE, 0, Duration::from_secs(60)).expect("a free port");
    Peers { _silent: silent, silent_port, loud_port, store }
});

/// The same request, towards something in this process.
pub fn redirect(mut join: v1::JoinUpdateGroupRequest, peer: usize) -> v1::JoinUpdateGroupRequest {
    let peers = &*PEERS;
    let port = match peer {
        0 => Some(peers.silent_port),
        1 => Some(peers.loud_port),
        2 | 3 => Some(peers.store.port()),
        // Nobody listens there.
        4 => Some(1),
        // As the input says, if it is none.
        _ => None,
    };
    let is_name = |host: &str| !host.is_empty() && host.len() < 256 && !host.contains('\0');
    if peer != 5 || is_name(&join.store_host) {
        join.store_host = HERE.to_owned();
    }
    match port {
        Some(port) => join.store_port = port.into(),
        None if join.store_port <= u32::from(u16::MAX) => join.store_port = peers.silent_port.into(),
        None => {}
    }
    join
}
