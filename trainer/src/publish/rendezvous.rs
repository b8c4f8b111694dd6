//! Where trainers and generators meet: the store, and the groups that are made there.

use std::thread;
use std::time::Duration;

use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};
use aha_proto::v1;
use futures::future::{try_join, try_join_all};
use tch::Device;
use tokio::runtime::Runtime;

use super::PublishError;
use super::calls::{GRACE, check_model, invite};
use crate::agreement::agree;
use crate::clients::Client;
use crate::world::address_towards;

/// What all members must agree on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// For all to come together, and then for every collective.
    pub(super) timeout: Duration,
    pub(super) manifest_hash: u64,
    pub(super) bucket_numel: usize,
    /// Where the weights of this trainer are.
    pub(super) device: Device,
}

/// The groups of a trainer.
#[derive(Debug)]
pub(super) struct Groups {
    /// Trainers and generators.
    pub(super) update: ProcessGroup,
    pub(super) update_name: String,
    /// The trainers alone: how a push ended is everybody's business.
    pub(super) outcome: ProcessGroup,
    /// Serves the rendezvous from rank 0.
    pub(super) store: Store,
}

/// Meets the other trainers and the generators. Rank 0 of `trainers` hosts the store and calls the generators.
pub(super) fn meet(
    terms: &Terms,
    trainers: &ProcessGroup,
    clients: &[Client],
    runtime: &Runtime,
) -> Result<Groups, PublishError> {
    let host = own_host(clients)?;
    let (store, store_host) = meet_at_store(&host, terms, trainers, clients, runtime)?;
    let (rank, num_trainers, timeout) = (trainers.rank(), trainers.size(), terms.timeout);
    // A store is made for one meeting, so its port tells this group from those before.
    let update_name = format!("weights-{}", store.port());
    let size = num_trainers + clients.len();
    let spec = GroupSpec { name: update_name.clone(), rank, size, timeout, address: Address::Host(host) };
    // Outcomes are exchanged when the slowest rank has failed at its deadline.
    let patience = (timeout + GRACE) * 2;
    let outcome_spec = GroupSpec { name: "outcomes".to_owned(), size: num_trainers, timeout: patience, ..spec.clone() };
    let outcome = ProcessGroup::new(Backend::Gloo, &store, &outcome_spec)?;

    let invitation = v1::JoinUpdateGroupRequest {
        store_host,
        store_port: store.port().into(),
        group: update_name.clone(),
        rank: 0,
        size: size as u32,
        num_trainers: num_trainers as u32,
        manifest_hash: terms.manifest_hash,
        bucket_numel: terms.bucket_numel as u64,
        timeout_seconds: timeout.as_secs_f64(),
    };
    let place = Place { backend: backend(terms.device), store: &store, spec };
    let joined = if rank == 0 { place.join_and_invite(&invitation, clients, runtime) } else { place.join() };
    let (update, joined) = match joined {
        Ok(group) => (Some(group), Ok(Vec::new())),
        Err(error) => (None, Err(error.with_members(num_trainers, clients))),
    };
    agree(&outcome, joined)?;
    let update = update.expect("ranks agree only where this one has joined");
    Ok(Groups { update, update_name, outcome, store })
}

/// Rank 0 serves the store, once all generators are known to have this model, and the others connect to it. Returns its
/// host as well.
fn meet_at_store(
    host: &str,
    terms: &Terms,
    trainers: &ProcessGroup,
    clients: &[Client],
    runtime: &Runtime,
) -> Result<(Store, String), PublishError> {
    let opened = if trainers.rank() == 0 {
        let checks = clients.iter().map(|client| check_model(client, terms.manifest_hash, terms.timeout));
        let checked = runtime.block_on(try_join_all(checks));
        checked.and_then(|_| Ok(Some(Store::host(host, 0, terms.timeout)?)))
    } else {
        Ok(None)
    };
    let (own, address) = match opened {
        Ok(store) => {
            let address = store.as_ref().map(|store| format!("{host} {}", store.port()));
            (store, Ok(address.unwrap_or_default().into_bytes()))
        }
        Err(error) => (None, Err(error)),
    };
    let addresses = agree(trainers, address)?;
    let text = String::from_utf8_lossy(&addresses[0]);
    let unreadable = || PublishError::Elsewhere { rank: 0, reason: format!("unreadable store address {text:?}") };
    let (store_host, port) = text.split_once(' ').ok_or_else(unreadable)?;
    let port = port.parse().map_err(|_| unreadable())?;
    let store = own.map_or_else(|| Store::connect(store_host, port, terms.timeout), Ok)?;
    Ok((store, store_host.to_owned()))
}

/// A trainer's place in the update group.
struct Place<'a> {
    backend: Backend,
    store: &'a Store,
    spec: GroupSpec,
}

impl Place<'_> {
    fn join(&self) -> Result<ProcessGroup, PublishError> {
        Ok(ProcessGroup::new(self.backend, self.store, &self.spec)?)
    }

    /// Joins while the generators are called to. Ends with the first that refuses, without waiting for the others.
    fn join_and_invite(
        &self,
        invitation: &v1::JoinUpdateGroupRequest,
        clients: &[Client],
        runtime: &Runtime,
    ) -> Result<ProcessGroup, PublishError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let (backend, store, spec) = (self.backend, self.store.clone(), self.spec.clone());
        thread::spawn(move || {
            // Nobody listens where a generator has refused; the group that comes too late is dropped.
            drop(sender.send(ProcessGroup::new(backend, &store, &spec)));
        });
        let own = async {
            let ended = |_| PublishError::Elsewhere { rank: 0, reason: "the thread that joins has ended".to_owned() };
            Ok(receiver.await.map_err(ended)??)
        };
        let timeout = self.spec.timeout;
        let calls = (invitation.num_trainers..)
            .zip(clients)
            .map(|(rank, client)| invite(client, v1::JoinUpdateGroupRequest { rank, ..invitation.clone() }, timeout));
        let (group, _) = runtime.block_on(try_join(own, try_join_all(calls)))?;
        Ok(group)
    }
}

/// Address of this machine that generators and, where those are elsewhere, the other trainers reach.
fn own_host(clients: &[Client]) -> Result<String, PublishError> {
    let client = clients.first().ok_or(PublishError::NoGenerators)?;
    let (host, port) = client.address().rsplit_once(':').unwrap_or((client.address(), "1"));
    let address = address_towards(host.trim_matches(['[', ']']), port.parse().unwrap_or(1));
    let failed = |error| PublishError::generator(client, format!("cannot be reached from here: {error}"));
    address.map(|address| address.to_string()).map_err(failed)
}

fn backend(device: Device) -> Backend {
    match device {
        Device::Cuda(device) => Backend::Nccl { device },
        _ => Backend::Gloo,
    }
}
