//! Names of machines, which may become known after the processes that ask for them have begun, as a pod's does: whoever
//! needs one goes on asking until its deadline.

use super::deadline::{GiveUp, within};
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(500);

/// Why a host was of no use.
#[derive(Debug, thiserror::Error)]
#[error("{host} {trouble} after {:.1} s; {advice}", waited.as_secs_f64(), advice = trouble.advice())]
pub struct NameError {
    host: String,
    waited: Duration,
    trouble: Trouble,
}

#[derive(Debug)]
enum Trouble {
    Unknown(String),
    /// Of another machine, or of one that had the name before.
    Elsewhere(Vec<SocketAddr>),
    /// To be listened on.
    Unusable(io::Error),
    /// There is no route to it.
    Unreachable(io::Error),
}

/// Listens on `port` of `host`, a name or address of this machine. A name is asked for until it is known, and is this
/// machine's.
///
/// # Errors
/// At once where the address cannot be had for another reason, and else after `limit`.
pub fn listen(host: &str, port: u16, limit: Duration) -> Result<TcpListener, NameError> {
    Names::of_system().listen(host, port, limit)
}

/// Address of this machine on the route to `host`, which is how `host` can reach it. Sends nothing; waits `limit` for the
/// name to be known.
///
/// # Errors
/// Says why there is none.
pub fn address_towards(host: &str, port: u16, limit: Duration) -> Result<IpAddr, NameError> {
    Names::of_system().address_towards(host, port, limit)
}

/// Host and port of `host:port`; an IPv6 address has brackets.
#[must_use]
pub fn host_and_port(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    Some((host, port.parse().ok()?)).filter(|_| !host.is_empty())
}

type Lookup = dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// Who knows the addresses of names, and is asked until nobody wants to know any more.
#[derive(Clone)]
pub(super) struct Names {
    lookup: Arc<Lookup>,
    give_up: GiveUp,
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Names")
    }
}

impl Names {
    pub(super) fn of_system() -> Self {
        Self::new(|host, port| Ok((host, port).to_socket_addrs()?.collect()))
    }

    pub(super) fn new(lookup: impl Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static) -> Self {
        Self { lookup: Arc::new(lookup), give_up: GiveUp::never() }
    }

    pub(super) fn unless(self, give_up: GiveUp) -> Self {
        Self { give_up, ..self }
    }

    pub(super) fn give_up(&self) -> &GiveUp {
        &self.give_up
    }

    /// Waits until `host` is known.
    pub(super) fn resolve(&self, host: &str, port: u16, limit: Duration) -> Result<Vec<SocketAddr>, NameError> {
        self.until(host, limit, |rest| self.ask(host, port, rest))
    }

    pub(super) fn listen(&self, host: &str, port: u16, limit: Duration) -> Result<TcpListener, NameError> {
        self.until(host, limit, |rest| {
            let addresses = self.ask(host, port, rest)?;
            TcpListener::bind(&addresses[..]).map_err(|error| match error.kind() {
                // An address never becomes ours, but a name may: it may still be that of a process that was here before.
                ErrorKind::AddrNotAvailable if host.parse::<IpAddr>().is_err() => Trouble::Elsewhere(addresses),
                _ => Trouble::Unusable(error),
            })
        })
    }

    fn address_towards(&self, host: &str, port: u16, limit: Duration) -> Result<IpAddr, NameError> {
        self.until(host, limit, |rest| {
            let mut result = Err(ErrorKind::NotFound.into());
            for peer in self.ask(host, port.max(1), rest)? {
                result = route(peer);
                if result.is_ok() {
                    break;
                }
            }
            result.map_err(Trouble::Unreachable)
        })
    }

    /// Asks once, on a thread of its own: the system's answer may take longer than `rest`.
    fn ask(&self, host: &str, port: u16, rest: Duration) -> Result<Vec<SocketAddr>, Trouble> {
        let (names, owned) = (self.clone(), host.to_owned());
        let lookup = move || (names.lookup)(&owned, port).map_err(|error| error.to_string());
        let answer = within(host, rest.max(PAUSE), &self.give_up, lookup);
        let addresses = answer.map_err(Trouble::Unknown)?;
        if addresses.is_empty() { Err(Trouble::Unknown("it has no address".to_owned())) } else { Ok(addresses) }
    }

    /// Tries until it succeeds or time does not help any more.
    fn until<T>(
        &self,
        host: &str,
        limit: Duration,
        mut attempt: impl FnMut(Duration) -> Result<T, Trouble>,
    ) -> Result<T, NameError> {
        let started = Instant::now();
        let mut is_announced = false;
        loop {
            let rest = limit.saturating_sub(started.elapsed());
            let trouble = match attempt(rest) {
                Ok(found) => return Ok(found),
                Err(trouble) => trouble,
            };
            let waited = started.elapsed();
            if !trouble.may_pass() || waited >= limit || self.give_up.is_over() {
                return Err(NameError { host: host.to_owned(), waited, trouble });
            }
            if !is_announced {
                tracing::warn!("{host} {trouble} yet: asking again for up to {:.0} s", limit.as_secs_f64());
                is_announced = true;
            }
            // Nobody wakes this thread; whoever did would only have it ask sooner.
            thread::park_timeout(PAUSE.min(limit - waited));
        }
    }
}

impl Trouble {
    /// Whether time may help.
    fn may_pass(&self) -> bool {
        matches!(self, Self::Unknown(_) | Self::Elsewhere(_))
    }

    fn advice(&self) -> &'static str {
        match self {
            Self::Unknown(_) => {
                "check the name, and what this machine asks for names (DNS, /etc/hosts), or give an address"
            }
            Self::Elsewhere(_) => "name this machine, or correct what is known of the name",
            Self::Unusable(_) => "give a free port, and an address of this machine",
            Self::Unreachable(_) => "check this machine's network",
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(reason) => write!(f, "is not known ({reason})"),
            Self::Elsewhere(addresses) => {
                let addresses: Vec<String> = addresses.iter().map(|address| address.ip().to_string()).collect();
                write!(f, "is {}, no address of this machine,", addresses.join(" and "))
            }
            Self::Unusable(error) => write!(f, "cannot be listened on ({error})"),
            Self::Unreachable(error) => write!(f, "cannot be reached ({error})"),
        }
    }
}

/// Connecting a datagram socket sends nothing; it makes the system choose a route.
fn route(peer: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(peer)?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const PATIENT: Duration = Duration::from_secs(60);
    const HASTY: Duration = Duration::from_secs(1);
    /// How much later than its deadline an error may come on a loaded machine.
    const SLACK: Duration = Duration::from_secs(12);

    /// What a machine is told of a name, answer by answer; the last one holds. Also how often it was asked.
    pub(in crate::comm) fn answering(answers: &'static [Option<&str>]) -> (Names, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let names = Names::new(move |_, port| {
            let index = count.fetch_add(1, Ordering::SeqCst);
            let answer = answers[index.min(answers.len() - 1)];
            answer.map(|ip| vec![SocketAddr::new(ip.parse().unwrap(), port)]).ok_or(io::Error::other("no such name"))
        });
        (names, asked)
    }

    #[test]
    fn a_name_is_asked_for_until_it_is_known() {
        let (names, asked) = answering(&[None, None, Some("127.0.0.1")]);
        assert_eq!(names.resolve("late", 7, PATIENT).unwrap(), ["127.0.0.1:7".parse().unwrap()]);
        assert_eq!(asked.load(Ordering::SeqCst), 3);
        let (names, asked) = answering(&[None, Some("127.0.0.1")]);
        assert_eq!(names.address_towards("late", 0, PATIENT).unwrap(), Ipv4Addr::LOCALHOST);
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_name_that_stays_unknown_is_given_up_in_time() {
        let (unknown, asked) = answering(&[None]);
        let hanging = Names::new(|_, _| {
            thread::park_timeout(PATIENT);
            Ok(Vec::new())
        });
        for (names, reason) in [(unknown, "no such name"), (hanging, "no answer within 1.0 s")] {
            let started = Instant::now();
            let error = names.resolve("rank-0.trainers", 7, HASTY).unwrap_err().to_string();
            assert!((HASTY..HASTY + SLACK).contains(&started.elapsed()), "{:?}", started.elapsed());
            assert!(error.starts_with(&format!("rank-0.trainers is not known ({reason}) after ")), "{error}");
            assert!(error.ends_with(
                "; check the name, and what this machine asks for names (DNS, /etc/hosts), or give an address"
            ));
        }
        assert!(asked.load(Ordering::SeqCst) >= 2, "it was asked for once");
        let (names, _) = answering(&[None]);
        assert!(names.resolve("nowhere", 7, Duration::ZERO).is_err());
    }

    /// Of a network for documentation: no machine has it.
    const ELSEWHERE: &str = "192.0.2.1";

    #[test]
    fn a_name_is_listened_on_as_soon_as_it_is_this_machine_s() {
        let (names, asked) = answering(&[None, Some(ELSEWHERE), Some("127.0.0.1")]);
        let listener = names.listen("late", 0, PATIENT).unwrap();
        assert_eq!(listener.local_addr().unwrap().ip(), Ipv4Addr::LOCALHOST);
        assert_eq!(asked.load(Ordering::SeqCst), 3);

        let (names, _) = answering(&[Some(ELSEWHERE)]);
        let error = names.listen("another", 7, HASTY).unwrap_err().to_string();
        assert!(error.starts_with("another is 192.0.2.1, no address of this machine, after 1."), "{error}");
        assert!(error.ends_with("; name this machine, or correct what is known of the name"), "{error}");
    }

    #[test]
    fn what_time_does_not_mend_fails_at_once() {
        let started = Instant::now();
        let error = listen(ELSEWHERE, 0, PATIENT).unwrap_err().to_string();
        assert!(error.starts_with("192.0.2.1 cannot be listened on ("), "{error}");
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let (names, asked) = answering(&[Some("127.0.0.1")]);
        let error = names.listen("here", port, PATIENT).unwrap_err().to_string();
        assert!(error.contains("Address already in use"), "{error}");
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        assert!(started.elapsed() < SLACK);
    }

    #[test]
    fn addresses_are_taken_apart() {
        assert_eq!(host_and_port("rank-0.trainers:50050"), Some(("rank-0.trainers", 50050)));
        assert_eq!(host_and_port("[::1]:7"), Some(("::1", 7)));
        for bad in ["nowhere", ":7", "host:", "host:70000"] {
            assert_eq!(host_and_port(bad), None, "{bad}");
        }
    }
}
