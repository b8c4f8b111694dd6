//! Addresses that are to be listened on, and the one where ranks meet.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};

use aha_core::config::RunConfig;
use aha_trainer::world::World;

use super::finding::Finding;

const CHECK: &str = "ports";
const MASTER: &str = "rendezvous";

/// Whether `address`, `host:port`, can be listened on; `key` is where it was named. Port 0 always can.
pub(super) fn listening(key: &str, address: &str) -> Finding {
    let sockets: Vec<SocketAddr> = match address.to_socket_addrs() {
        Ok(sockets) => sockets.collect(),
        Err(error) => {
            let fix = "name an address of this machine, or a name that resolves to one";
            return Finding::problem(CHECK, format!("{key}: {address} has no address: {error}"), fix);
        }
    };
    match TcpListener::bind(&sockets[..]) {
        Ok(_) => Finding::ok(CHECK, format!("{key}: {address} is free")),
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            let fix = format!("stop what listens there (ss -ltnp shows it), or give {key} another port");
            Finding::problem(CHECK, format!("{key}: {address} is taken"), fix)
        }
        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => {
            let fix = "none if the process that listens there runs elsewhere; else name an address of this machine";
            Finding::warning(CHECK, format!("{key}: {address} is not this machine's"), fix)
        }
        Err(error) => {
            let fix = "ports below 1024 need privileges; take another one";
            Finding::problem(CHECK, format!("{key}: {address} cannot be listened on: {error}"), fix)
        }
    }
}

/// What the recipe has this machine listen on.
pub(super) fn configured(config: &RunConfig, world: &World) -> Vec<Finding> {
    let mut named: Vec<(&str, String)> = Vec::new();
    let generator = &config.generator;
    named.extend(generator.metrics_address.map(|address| ("generator.metrics_address", address.to_string())));
    if world.is_main() {
        named.extend(config.logging.metrics_address.map(|address| ("logging.metrics_address", address.to_string())));
        named.extend(generator.coordinator.clone().map(|address| ("generator.coordinator", address)));
    }
    named.iter().map(|(key, address)| listening(key, address)).collect()
}

/// Where the ranks meet: rank 0 listens there, the others must find it.
pub(super) fn rendezvous(world: &World) -> Finding {
    let World { rank, size, master_addr: host, master_port: port, .. } = world;
    if *size == 1 {
        return Finding::ok(MASTER, "one rank has nobody to meet");
    }
    let address = format!("{host}:{port}");
    if let Err(error) = (host.as_str(), *port).to_socket_addrs() {
        let fix = "set MASTER_ADDR to the name or address of rank 0's machine, as this machine knows it";
        return Finding::problem(MASTER, format!("MASTER_ADDR {host} does not resolve: {error}"), fix);
    }
    if *rank > 0 {
        return Finding::ok(MASTER, format!("{address} resolves; rank 0 listens there"));
    }
    Finding { check: MASTER, ..listening("MASTER_ADDR:MASTER_PORT", &address) }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Severity;
    use super::*;

    #[test]
    fn a_taken_port_is_a_problem_and_a_free_one_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let taken = listening("--listen", &address);
        assert_eq!(taken.severity, Severity::Problem);
        assert_eq!(taken.finding, format!("--listen: {address} is taken"));
        drop(listener);
        assert_eq!(listening("--listen", &address).severity, Severity::Ok);
    }

    #[test]
    fn other_machines_and_names_without_an_address_are_told_apart() {
        // Of a network for documentation.
        assert_eq!(listening("generator.coordinator", "192.0.2.1:50050").severity, Severity::Warning);
        assert_eq!(listening("generator.coordinator", "no such host:1").severity, Severity::Problem);
    }

    #[test]
    fn ranks_must_find_where_they_meet() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let master_port = listener.local_addr().unwrap().port();
        let world =
            |rank, host: &str| World { rank, size: 2, master_addr: host.to_owned(), master_port, ..World::single() };
        assert_eq!(rendezvous(&World::single()).severity, Severity::Ok);
        assert_eq!(rendezvous(&world(0, "127.0.0.1")).severity, Severity::Problem, "it is taken");
        assert_eq!(rendezvous(&world(1, "127.0.0.1")).severity, Severity::Ok);
        let nowhere = rendezvous(&world(1, "no such host"));
        assert!(nowhere.severity == Severity::Problem && nowhere.finding.contains("does not resolve"), "{nowhere:?}");
    }
}
