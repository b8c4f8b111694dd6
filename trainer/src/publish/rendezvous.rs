//! Where trainers and generators meet: the store, and the groups that are made there.

use std::thread;
use std::time::Duration;

use aha_core::config::PushBackend;
use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store, address_towards, host_and_port};
use aha_nn::kernels::cuda::gpu_uuid;
use aha_proto::v1;
use futures::future::{try_join, try_join_all};
use tch::{Device, Kind};
use tokio::runtime::Runtime;

use super::PublishError;
use super::backend::choose;
use super::calls::{GRACE, Receiver, check_model, invite};
use crate::agreement::agree;
use crate::clients::Client;

/// What all members must agree on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// For all to come together, and then for every collective.
    pub(super) timeout: Duration,
    pub(super) manifest_hash: u64,
    pub(super) bucket_numel: usize,
    /// Where the weights of this trainer are.
    pub(super) device: Device,
    pub(super) backend: PushBackend,
}

/// The groups of a trainer.
#[derive(Debug)]
pub(super) struct Groups {
    /// Trainers and generators.
    pub(super) update: ProcessGroup,
    pub(super) update_name: String,
    /// Type in which the generators take weights.
    pub(super) kind: Kind,
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
    let host = own_host(clients, terms.timeout)?;
    let Meeting { store, store_host, backend, dtype } = meet_at_store(&host, terms, trainers, clients, runtime)?;
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
        backend: backend.into(),
        dtype: dtype.into(),
    };
    let backend = match (backend, terms.device) {
        (v1::PushBackend::Nccl, Device::Cuda(device)) => Backend::Nccl { device },
        _ => Backend::Gloo,
    };
    let place = Place { backend, store: &store, spec };
    let joined = if rank == 0 { place.join_and_invite(&invitation, clients, runtime) } else { place.join() };
    let (update, joined) = match joined {
        Ok(group) => (Some(group), Ok(Vec::new())),
        Err(error) => (None, Err(error.with_members(num_trainers, clients))),
    };
    agree(&outcome, joined)?;
    let update = update.expect("ranks agree only where this one has joined");
    let kind = if dtype == v1::WeightType::Bfloat16 { Kind::BFloat16 } else { Kind::Float };
    Ok(Groups { update, update_name, kind, outcome, store })
}

/// Where all come together, and by what.
struct Meeting {
    store: Store,
    store_host: String,
    backend: v1::PushBackend,
    dtype: v1::WeightType,
}

/// Rank 0 serves the store, once it is known that all generators have this model and how they take weights, and the
/// others connect to it.
fn meet_at_store(
    host: &str,
    terms: &Terms,
    trainers: &ProcessGroup,
    clients: &[Client],
    runtime: &Runtime,
) -> Result<Meeting, PublishError> {
    let trainers_gpus = agree(trainers, Ok::<_, PublishError>(gpu(terms.device).into_bytes()))?;
    let opened = if trainers.rank() == 0 {
        let mut gpus: Vec<String> = trainers_gpus.iter().map(|gpu| String::from_utf8_lossy(gpu).into()).collect();
        let checks = clients.iter().map(|client| check_model(client, terms.manifest_hash, terms.timeout));
        runtime.block_on(try_join_all(checks)).and_then(|receivers| {
            let dtype = common_dtype(&receivers, clients)?;
            gpus.extend(receivers.into_iter().map(|receiver| receiver.gpu));
            let backend = choose(terms.backend, &gpus).map_err(PublishError::Backend)?;
            Ok(Some((Store::host(host, 0, terms.timeout)?, backend, dtype)))
        })
    } else {
        Ok(None)
    };
    let (own, address) = match opened {
        Ok(Some((store, backend, dtype))) => {
            let address = format!("{host} {} {} {}", store.port(), backend.as_str_name(), dtype.as_str_name());
            (Some(store), Ok(address.into_bytes()))
        }
        Ok(None) => (None, Ok(Vec::new())),
        Err(error) => (None, Err(error)),
    };
    let addresses = agree(trainers, address)?;
    let text = String::from_utf8_lossy(&addresses[0]);
    let unreadable = || PublishError::Elsewhere { rank: 0, reason: format!("unreadable store address {text:?}") };
    let [store_host, port, backend, dtype] =
        text.split(' ').collect::<Vec<_>>().try_into().map_err(|_| unreadable())?;
    let backend = v1::PushBackend::from_str_name(backend).ok_or_else(unreadable)?;
    let dtype = v1::WeightType::from_str_name(dtype).ok_or_else(unreadable)?;
    let port = port.parse().map_err(|_| unreadable())?;
    let store = own.map_or_else(|| Store::connect(store_host, port, terms.timeout), Ok)?;
    Ok(Meeting { store, store_host: store_host.to_owned(), backend, dtype })
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

/// Address of this machine that generators and, where those are elsewhere, the other trainers reach. `limit` is for the
/// name of the first generator to be known.
fn own_host(clients: &[Client], limit: Duration) -> Result<String, PublishError> {
    let client = clients.first().ok_or(PublishError::NoGenerators)?;
    let (host, port) = host_and_port(client.address()).unwrap_or((client.address(), 1));
    let address = address_towards(host, port, limit);
    let failed = |error| PublishError::generator(client, format!("cannot be reached from here: {error}"));
    address.map(|address| address.to_string()).map_err(failed)
}

/// UUID of the GPU; empty where there is none, or it cannot be had: then Gloo carries the weights.
fn gpu(device: Device) -> String {
    match device {
        Device::Cuda(index) => gpu_uuid(index).unwrap_or_default(),
        _ => String::new(),
    }
}

/// The type that all generators take weights in: one broadcast serves them all.
fn common_dtype(receivers: &[Receiver], clients: &[Client]) -> Result<v1::WeightType, PublishError> {
    let first = receivers.first().ok_or(PublishError::NoGenerators)?.dtype;
    for (receiver, client) in receivers.iter().zip(clients) {
        let problem = match receiver.dtype {
            v1::WeightType::Unspecified => "does not say in which type it takes weights".to_owned(),
            dtype if dtype != first => {
                let (here, there, other) = (dtype.as_str_name(), first.as_str_name(), clients[0].address());
                format!(
                    "takes weights as {here}, and {other} as {there}; start both with the same model.dtype and device"
                )
            }
            _ => continue,
        };
        return Err(PublishError::generator(client, problem));
    }
    Ok(first)
}
