//! A network that fails: a TCP proxy on loopback that slows, swallows, stalls or resets what goes through it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// Most bytes that are held back at once, in either direction of a connection.
const PIECE: usize = 16 << 10;

/// What the network does to every connection, those that are open too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Every piece of data comes so much later than the one before it.
    Delay(Duration),
    /// So many bytes a second go through, 1 at least, in each direction of a connection.
    Throttle(u32),
    /// Everything is taken and nothing comes out: the connection is half open.
    Swallow,
    /// Nothing is taken: both sides find that the other does not read.
    Deaf,
    /// Connections end as if the other process had died, and so do new ones.
    Reset,
}

/// Takes connections on a port of its own and passes them on to a target; gone with all connections when dropped.
#[derive(Debug)]
pub struct ChaosProxy {
    address: SocketAddr,
    plan: watch::Sender<Plan>,
    forwarded: Arc<AtomicU64>,
    _runtime: Runtime,
}

/// A fault that begins when so many bytes have gone through.
#[derive(Debug, Clone, Copy)]
struct Plan {
    fault: Fault,
    from: u64,
}

/// One direction of a connection.
struct Pump {
    plan: watch::Receiver<Plan>,
    forwarded: Arc<AtomicU64>,
}

impl ChaosProxy {
    /// A proxy before `target`, `host:port`, which need not be there yet; faultless so far.
    ///
    /// # Errors
    /// If no port can be listened on.
    pub fn start(target: &str) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0)))?;
        let address = listener.local_addr()?;
        let (plan, faults) = watch::channel(Plan { fault: Fault::None, from: 0 });
        let forwarded = Arc::new(AtomicU64::new(0));
        let (target, counter) = (target.to_owned(), Arc::clone(&forwarded));
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let pump = || Pump { plan: faults.clone(), forwarded: Arc::clone(&counter) };
                tokio::spawn(connect(client, target.clone(), [pump(), pump()]));
            }
        });
        Ok(Self { address, plan, forwarded, _runtime: runtime })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Bytes that have gone through, in both directions of all connections together.
    #[must_use]
    pub fn forwarded(&self) -> u64 {
        self.forwarded.load(Ordering::Relaxed)
    }

    /// From now on.
    pub fn set(&self, fault: Fault) {
        self.set_after(0, fault);
    }

    /// When so many more bytes have gone through; until then there is no fault.
    pub fn set_after(&self, bytes: u64, fault: Fault) {
        self.plan.send_replace(Plan { fault, from: self.forwarded() + bytes });
    }
}

async fn connect(mut client: TcpStream, target: String, [mut there, mut back]: [Pump; 2]) {
    let outcome = match TcpStream::connect(&target).await {
        Ok(mut server) => {
            let (from_client, to_client) = client.split();
            let (from_server, to_server) = server.split();
            let pumps = tokio::try_join!(there.run(from_client, to_server), back.run(from_server, to_client));
            if pumps.is_err() {
                reset(&server);
            }
            pumps.map(drop)
        }
        Err(error) => Err(error),
    };
    if outcome.is_err() {
        reset(&client);
    }
}

/// The peer learns of it by a reset instead of an orderly end, once the socket is dropped.
fn reset(stream: &TcpStream) {
    // A socket whose other side has reset it already takes no options any more.
    drop(stream.set_zero_linger());
}

impl Pump {
    async fn run(&mut self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
        let mut buffer = vec![0; PIECE];
        let mut held = 0..0;
        loop {
            let fault = self.fault();
            if fault == Fault::Reset {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if held.is_empty() {
                if fault == Fault::Deaf {
                    self.changed().await?;
                    continue;
                }
                tokio::select! {
                    read = from.read(&mut buffer) => held = 0..read?,
                    changed = self.changed() => {
                        changed?;
                        continue;
                    }
                }
                if held.is_empty() {
                    return to.shutdown().await;
                }
                // The fault may be another one by now.
                continue;
            }
            let Some(piece) = self.release(held.len()).await? else { continue };
            if fault == Fault::Swallow {
                held = 0..0;
                continue;
            }
            tokio::select! {
                written = to.write(&buffer[held.start..held.start + piece]) => {
                    let written = written?;
                    held.start += written;
                    self.forwarded.fetch_add(written as u64, Ordering::Relaxed);
                }
                changed = self.changed() => changed?,
            }
        }
    }

    fn fault(&self) -> Fault {
        let plan = *self.plan.borrow();
        if self.forwarded.load(Ordering::Relaxed) < plan.from { Fault::None } else { plan.fault }
    }

    /// Waits until some of `held` bytes may go on, and says how many; none if the plan has changed meanwhile.
    async fn release(&mut self, held: usize) -> io::Result<Option<usize>> {
        let (pause, piece) = match self.fault() {
            Fault::None => {
                let plan = *self.plan.borrow_and_update();
                let left = plan.from.saturating_sub(self.forwarded.load(Ordering::Relaxed));
                // Up to where the fault begins.
                let piece = if left == 0 { held } else { held.min(usize::try_from(left).unwrap_or(held)) };
                return Ok(Some(piece));
            }
            Fault::Swallow => return Ok(Some(held)),
            Fault::Delay(pause) => (pause, held),
            Fault::Throttle(rate) => (Duration::from_secs(1) / rate.max(1), 1),
            Fault::Deaf | Fault::Reset => {
                self.changed().await?;
                return Ok(None);
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => Ok(Some(piece)),
            changed = self.changed() => changed.map(|()| None),
        }
    }

    async fn changed(&mut self) -> io::Result<()> {
        self.plan.changed().await.map_err(|_| io::ErrorKind::ConnectionReset.into())
    }
}
