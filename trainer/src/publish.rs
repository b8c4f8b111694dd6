//! The weight push: every trained version goes to all generators at once, by broadcasts in one process group.
//!
//! Ranks `0..W` of the update group are the trainers, `W..W+K` the generators. Each trainer broadcasts the units that it
//! owns, in buckets, in the order of [`Manifest::buckets`], which all members compute alike. Trainer rank 0 makes the
//! calls: it tells the generators to receive, with the hash of every unit, and hears from each which version it serves.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use aha_core::config::RunConfig;
use aha_core::ids::PolicyVersion;
use aha_core::manifest::{Bucket, Manifest};
use aha_nn::comm::{Address, Backend, CommError, GroupSpec, ProcessGroup, Store};
use aha_nn::tensor_data;
use aha_nn::weights::Weights;
use aha_proto::v1;
use futures::future::{try_join, try_join_all};
use futures::stream::{FuturesUnordered, StreamExt};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};
use tokio::runtime::Runtime;
use xxhash_rust::xxh3::xxh3_64;

use crate::agreement::{Disagreement, agree};
use crate::clients::{Client, describe, seconds, with_timeout};
use crate::world::address_towards;

/// Largest bucket. Bounds the staging memory of a broadcast.
const MAX_BUCKET_BYTES: usize = 256 << 20;

/// What the limit of a call has over the group's, and a generator's over ours: the one that knows more is to speak first.
const GRACE: Duration = Duration::from_secs(1);

/// A trainer's place in the update group.
#[derive(Debug)]
pub struct Publisher {
    update_group: Arc<ProcessGroup>,
    /// The trainers alone: how a push ended is everybody's business.
    outcome_group: ProcessGroup,
    /// Serves the rendezvous of both groups from rank 0.
    _store: Store,
    name: String,
    clients: Vec<Client>,
    runtime: Arc<Runtime>,
    timeout: Duration,
    buckets: Vec<Bucket>,
    /// Takes what other trainers broadcast, which this one has already.
    scratch: Tensor,
}

/// How a push went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PushReport {
    /// From the start until every generator serves the new version.
    pub seconds: f64,
    /// Size of the weights.
    pub bytes: u64,
    /// Time that the slowest generator took to receive and check them, in seconds.
    pub receive_seconds: f64,
    /// Longest time for which a generator's decoding stood still, in seconds.
    pub swap_seconds: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error("there is no generator to publish to")]
    NoGenerators,
    #[error("generator {generator} {problem}")]
    Generator { generator: String, problem: String },
    #[error(
        "the trainers and generators did not come together for weight pushes: {source}; ranks from {num_trainers} on are \
         the generators {generators:?}"
    )]
    Join { source: CommError, num_trainers: usize, generators: Vec<String> },
    #[error("the push of {version} failed after {:.1} s: {}", waited.as_secs_f64(), reasons.join("; "))]
    Push { version: PolicyVersion, waited: Duration, reasons: Vec<String> },
    #[error("rank {rank}: {reason}")]
    Elsewhere { rank: usize, reason: String },
    #[error(transparent)]
    Comm(#[from] CommError),
}

/// Bounds of a push.
#[derive(Debug, Clone, Copy)]
struct Limits {
    timeout: Duration,
    bucket_bytes: usize,
}

/// What the calls of rank 0 found out, for the other ranks.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Answers {
    receive_seconds: f64,
    swap_seconds: f64,
}

impl Publisher {
    /// Makes the update group with the other trainers and the generators. Every rank of `trainers` calls this, with
    /// weights of the same shapes and the generators in the same order.
    ///
    /// # Errors
    /// Within `train.push_timeout_seconds`, names the generator that has another model or the members that did not come.
    pub fn join(
        trainers: &ProcessGroup,
        weights: &Weights,
        config: &RunConfig,
        clients: &[Client],
        runtime: Arc<Runtime>,
    ) -> Result<Self, PublishError> {
        let limits = Limits { timeout: seconds(config.train.push_timeout_seconds), bucket_bytes: MAX_BUCKET_BYTES };
        Self::join_within(limits, trainers, weights, clients, runtime)
    }

    fn join_within(
        limits: Limits,
        trainers: &ProcessGroup,
        weights: &Weights,
        clients: &[Client],
        runtime: Arc<Runtime>,
    ) -> Result<Self, PublishError> {
        let host = own_host(clients)?;
        let (rank, num_trainers) = (trainers.rank(), trainers.size());
        let opened = if rank == 0 { open_store(&host, weights, clients, &runtime, limits).map(Some) } else { Ok(None) };
        let (own_store, address) = match opened {
            Ok(store) => (store.clone(), Ok(store.map_or_else(Vec::new, |store| store_address(&host, &store)))),
            Err(error) => (None, Err(error)),
        };
        let addresses = agree(trainers, address)?;
        let (store_host, store_port) = parse_store_address(&addresses[0])?;
        let store = match own_store {
            Some(store) => store,
            None => Store::connect(&store_host, store_port, limits.timeout)?,
        };
        let name = format!("weights-{store_port}");
        let size = num_trainers + clients.len();
        let address = Address::Host(host);
        let timeout = limits.timeout;
        let spec = GroupSpec { name: name.clone(), rank, size, timeout, address };
        // Outcomes are exchanged when the slowest rank has failed at its deadline.
        let outcome_spec =
            GroupSpec { name: "outcomes".to_owned(), size: num_trainers, timeout: (timeout + GRACE) * 2, ..spec.clone() };
        let outcome_group = ProcessGroup::new(Backend::Gloo, &store, &outcome_spec)?;

        let bucket_numel = limits.bucket_bytes / weights.kind().elt_size_in_bytes();
        let invitation = v1::JoinUpdateGroupRequest {
            store_host,
            store_port: store_port.into(),
            group: name.clone(),
            rank: 0,
            size: size as u32,
            num_trainers: num_trainers as u32,
            manifest_hash: weights.manifest.hash(),
            bucket_numel: bucket_numel as u64,
            timeout_seconds: timeout.as_secs_f64(),
        };
        let meeting = Meeting { backend: backend(weights.device()), store: &store, spec };
        let joined = if rank == 0 { meeting.host(&invitation, clients, &runtime) } else { meeting.join() };
        let joined = joined.map_err(|error| error.with_members(num_trainers, clients));
        let (update_group, joined) = match joined {
            Ok(group) => (Some(group), Ok(Vec::new())),
            Err(error) => (None, Err(error)),
        };
        agree(&outcome_group, joined)?;
        let update_group = update_group.expect("an agreement holds only where this rank has joined");

        let buckets = weights.manifest.buckets(num_trainers, bucket_numel);
        let longest = buckets.iter().map(|bucket| bucket.numel).max().unwrap_or(0);
        let scratch = if num_trainers == 1 { 0 } else { longest as i64 };
        Ok(Self {
            update_group: Arc::new(update_group),
            outcome_group,
            _store: store,
            name,
            clients: clients.to_vec(),
            runtime,
            timeout,
            buckets,
            scratch: Tensor::zeros([scratch], (weights.kind(), weights.device())),
        })
    }

    /// Puts `weights` into all generators as `version`, and returns when every one of them serves it. All trainer ranks
    /// call this with equal weights.
    ///
    /// # Errors
    /// On all ranks alike, within about `train.push_timeout_seconds`, naming the generators that failed. The group is of
    /// no use after that.
    pub fn publish(&mut self, weights: &Weights, version: PolicyVersion) -> Result<PushReport, PublishError> {
        let started = Instant::now();
        let outcome = if self.update_group.rank() == 0 {
            self.lead(weights, version)
        } else {
            self.broadcast(weights).map(|()| Vec::new()).map_err(|error| vec![error.to_string()])
        };
        let outcome = outcome.map_err(|reasons| PublishError::Push { version, waited: started.elapsed(), reasons });
        let answers = agree(&self.outcome_group, outcome)?;
        let answers: Answers = serde_json::from_slice(&answers[0])
            .map_err(|error| PublishError::Elsewhere { rank: 0, reason: format!("unreadable report: {error}") })?;
        Ok(PushReport {
            seconds: started.elapsed().as_secs_f64(),
            bytes: (weights.manifest.numel() * weights.kind().elt_size_in_bytes()) as u64,
            receive_seconds: answers.receive_seconds,
            swap_seconds: answers.swap_seconds,
        })
    }

    /// Rank 0's part: calls the generators while it broadcasts. A generator that fails ends the broadcasts of all.
    fn lead(&self, weights: &Weights, version: PolicyVersion) -> Result<Vec<u8>, Vec<String>> {
        let message = v1::UpdateWeightsRequest {
            group: self.name.clone(),
            version: version.0,
            unit_hashes: unit_hashes(weights),
        };
        let (clients, group, timeout) = (self.clients.clone(), Arc::clone(&self.update_group), self.timeout);
        let calls = self.runtime.spawn(async move { update_all(&clients, &message, timeout, &group).await });
        let sent = self.broadcast(weights);
        if let Err(error) = &sent {
            self.update_group.abort(&error.to_string());
        }
        let answers = self.runtime.block_on(calls).map_err(|error| vec![error.to_string()])?;
        match (answers, sent) {
            (Ok(answers), Ok(())) => {
                let slowest =
                    |seconds: fn(&v1::UpdateWeightsResponse) -> f64| answers.iter().map(seconds).fold(0.0, f64::max);
                let answers = Answers {
                    receive_seconds: slowest(|answer| answer.receive_seconds),
                    swap_seconds: slowest(|answer| answer.swap_seconds),
                };
                serde_json::to_vec(&answers).map_err(|error| vec![error.to_string()])
            }
            (Ok(_), Err(error)) => Err(vec![error.to_string()]),
            (Err(failures), Ok(())) => Err(failures),
            (Err(failures), Err(error)) => Err([failures, vec![error.to_string()]].concat()),
        }
    }

    /// Every member issues these collectives in this order: it follows from manifest, bucket size and number of trainers,
    /// which are equal on all of them.
    fn broadcast(&self, weights: &Weights) -> Result<(), CommError> {
        for bucket in &self.buckets {
            let numel = bucket.numel as i64;
            let mut part = if bucket.owner == self.update_group.rank() {
                weights.flat(bucket.unit_idx).narrow(0, bucket.offset as i64, numel)
            } else {
                self.scratch.narrow(0, 0, numel)
            };
            self.update_group.broadcast(&mut part, bucket.owner)?;
        }
        Ok(())
    }
}

impl PublishError {
    fn with_members(self, num_trainers: usize, clients: &[Client]) -> Self {
        match self {
            Self::Comm(source) => {
                let generators = clients.iter().map(|client| client.address().to_owned()).collect();
                Self::Join { source, num_trainers, generators }
            }
            other => other,
        }
    }
}

impl From<Disagreement<PublishError>> for PublishError {
    fn from(disagreement: Disagreement<PublishError>) -> Self {
        match disagreement {
            Disagreement::Here(error) => error,
            Disagreement::Elsewhere { rank, reason } => Self::Elsewhere { rank, reason },
            Disagreement::Comm(error) => Self::Comm(error),
        }
    }
}

/// How one trainer enters the update group.
struct Meeting<'a> {
    backend: Backend,
    store: &'a Store,
    spec: GroupSpec,
}

impl Meeting<'_> {
    fn join(&self) -> Result<ProcessGroup, PublishError> {
        Ok(ProcessGroup::new(self.backend, self.store, &self.spec)?)
    }

    /// Joins, and calls the generators to. Ends with the first generator that refuses, without waiting for the others.
    fn host(
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
            let joined = receiver.await;
            let lost = |_| generator_error("of rank 0".to_owned(), "ended while it joined".to_owned());
            Ok(joined.map_err(lost)??)
        };
        let timeout = self.spec.timeout;
        let calls = (0..).zip(clients).map(|(index, client)| {
            let rank = invitation.num_trainers + index;
            invite(client, v1::JoinUpdateGroupRequest { rank, ..invitation.clone() }, timeout)
        });
        let (group, _) = runtime.block_on(try_join(own, try_join_all(calls)))?;
        Ok(group)
    }
}

async fn invite(client: &Client, message: v1::JoinUpdateGroupRequest, timeout: Duration) -> Result<(), PublishError> {
    // A little longer than the group's own limit, whose message names every rank that is missing.
    let limit = timeout + GRACE;
    let call = async { client.rpc().join_update_group(with_timeout(message, limit + GRACE)).await };
    within(client, limit, call).await.map(drop)
}

/// Tells all generators to receive. The first that fails closes the group, so that nobody goes on waiting for it; then
/// the others fail as well, and only one that hangs stays silent.
async fn update_all(
    clients: &[Client],
    message: &v1::UpdateWeightsRequest,
    timeout: Duration,
    group: &ProcessGroup,
) -> Result<Vec<v1::UpdateWeightsResponse>, Vec<String>> {
    let calls = clients.iter().map(|client| update(client, message.clone(), timeout));
    let mut calls: FuturesUnordered<_> = calls.collect();
    let (mut answers, mut failures) = (Vec::new(), Vec::new());
    while let Some(answer) = calls.next().await {
        match answer {
            Ok(answer) => answers.push(answer),
            Err(error) => {
                group.abort(&error.to_string());
                failures.push(error.to_string());
            }
        }
    }
    if failures.is_empty() { Ok(answers) } else { Err(failures) }
}

async fn update(
    client: &Client,
    message: v1::UpdateWeightsRequest,
    timeout: Duration,
) -> Result<v1::UpdateWeightsResponse, PublishError> {
    let version = PolicyVersion(message.version);
    // A little longer than the group's own limit, after which a generator that is alive says what it missed.
    let limit = timeout + GRACE;
    let call = async { client.rpc().update_weights(with_timeout(message, limit + GRACE)).await };
    let answer = within(client, limit, call).await?;
    if answer.version != version.0 {
        let got = PolicyVersion(answer.version);
        let problem = format!("serves {got} after the push of {version}");
        return Err(generator_error(client.address().to_owned(), problem));
    }
    Ok(answer)
}

async fn within<T>(
    client: &Client,
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, PublishError> {
    let problem = match tokio::time::timeout(limit, call).await {
        Ok(Ok(response)) => return Ok(response.into_inner()),
        Ok(Err(status)) => format!("failed: {}", describe(&status)),
        Err(_) => format!("has not answered for {:.1} s", limit.as_secs_f64()),
    };
    Err(generator_error(client.address().to_owned(), problem))
}

fn generator_error(generator: String, problem: String) -> PublishError {
    PublishError::Generator { generator, problem }
}

/// Serves the store, once all generators are known to have this model.
fn open_store(
    host: &str,
    weights: &Weights,
    clients: &[Client],
    runtime: &Runtime,
    limits: Limits,
) -> Result<Store, PublishError> {
    let expected = weights.manifest.hash();
    let checks = clients.iter().map(|client| async move {
        let call = async { client.rpc().status(with_timeout(v1::StatusRequest {}, limits.timeout + GRACE)).await };
        let status = within(client, limits.timeout, call).await?;
        if status.manifest_hash != expected {
            let problem = format!(
                "has another model: its weights have manifest {:016x}, and the trainer's {expected:016x}; start it with \
                 the trainer's model.path",
                status.manifest_hash
            );
            return Err(generator_error(client.address().to_owned(), problem));
        }
        Ok(())
    });
    runtime.block_on(try_join_all(checks))?;
    Ok(Store::host(host, 0, limits.timeout)?)
}

/// Address of this machine that generators and, where those are elsewhere, the other trainers reach.
fn own_host(clients: &[Client]) -> Result<String, PublishError> {
    let client = clients.first().ok_or(PublishError::NoGenerators)?;
    let (host, port) = client.address().rsplit_once(':').unwrap_or((client.address(), "1"));
    let host = host.trim_matches(['[', ']']);
    let address = address_towards(host, port.parse().unwrap_or(1));
    let failed = |error| generator_error(client.address().to_owned(), format!("cannot be reached from here: {error}"));
    address.map(|address| address.to_string()).map_err(failed)
}

fn store_address(host: &str, store: &Store) -> Vec<u8> {
    format!("{host} {}", store.port()).into_bytes()
}

fn parse_store_address(bytes: &[u8]) -> Result<(String, u16), PublishError> {
    let text = String::from_utf8_lossy(bytes);
    let parsed = text.split_once(' ').and_then(|(host, port)| Some((host.to_owned(), port.parse().ok()?)));
    let unreadable = || PublishError::Elsewhere { rank: 0, reason: format!("unreadable store address {text:?}") };
    parsed.ok_or_else(unreadable)
}

fn backend(device: Device) -> Backend {
    match device {
        Device::Cuda(device) => Backend::Nccl { device },
        _ => Backend::Gloo,
    }
}

/// xxh3 of every unit's bytes, without padding.
fn unit_hashes(weights: &Weights) -> Vec<u64> {
    let Manifest { units } = &weights.manifest;
    let hash = |(unit_idx, numel)| {
        let flat: Tensor = weights.flat(unit_idx).narrow(0, 0, numel).to_device(Device::Cpu).contiguous();
        xxh3_64(tensor_data::bytes(&flat))
    };
    units.iter().map(|unit| unit.numel() as i64).enumerate().map(hash).collect()
}

#[cfg(test)]
mod tests;
