//! The weight push: every trained version goes to all generators at once, by broadcasts in one process group.
//!
//! Ranks `0..W` of the update group are the trainers, `W..W+K` the generators. Each trainer broadcasts the units that it
//! owns, in buckets, in the order of [`aha_core::manifest::Manifest::buckets`], which all members compute alike. Trainer rank 0 makes the
//! calls: it tells the generators to receive, with the hash of every unit, and hears from each which version it serves.

mod backend;
mod calls;
mod rendezvous;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use aha_core::config::{PushBackend, RunConfig, SleepMode};
use aha_core::ids::PolicyVersion;
use aha_core::manifest::{Bucket, UnitSpec};
use aha_nn::comm::{CommError, ProcessGroup, Store};
use aha_nn::tensor_data;
use aha_nn::unit::{ModelWeights, Unit, Walk};
use aha_proto::v1;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use tokio::task::JoinError;
use xxhash_rust::xxh3::xxh3_64;

use crate::agreement::{Disagreement, agree};
use crate::clients::{Client, seconds};
use calls::{sleep_all, update_all, wake_all};
use rendezvous::Terms;

/// Largest bucket. Bounds the staging memory of a broadcast.
const MAX_BUCKET_BYTES: usize = 256 << 20;

/// Key in the store of a failed push. There is no second one: the group is of no use after that.
const FAILED: &str = "push/failed";
/// How often it is looked for while a push runs.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A trainer's place in the update group.
#[derive(Debug)]
pub struct Publisher {
    update_group: Arc<ProcessGroup>,
    update_name: String,
    /// The trainers alone: how a push ended is everybody's business.
    outcome_group: ProcessGroup,
    /// Served by rank 0, which leaves a note here when a push has failed.
    store: Store,
    clients: Vec<Client>,
    runtime: Arc<Runtime>,
    timeout: Duration,
    buckets: Vec<Bucket>,
    /// Of the type that is pushed, where the group's tensors are: what other trainers broadcast, which this one has already, and what this one does
    /// from another device.
    scratch: Tensor,
    /// Weights are of another type than the generators take, or on another device than the group's tensors.
    is_staged: bool,
    sleep_mode: SleepMode,
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
    #[error(
        "no generator has answered for {:.1} s (known: {}); start one, or raise generator.connect_timeout_seconds",
        waited.as_secs_f64(), if generators.is_empty() { "none".to_owned() } else { generators.join(", ") }
    )]
    Gone { waited: Duration, generators: Vec<String> },
    #[error("{0}")]
    Backend(String),
    #[error("generator {generator} {problem}")]
    Generator { generator: String, problem: String },
    #[error(
        "the trainers and generators did not come together for weight pushes: {reason}; ranks from {num_trainers} on are \
         the generators {generators:?}"
    )]
    Join { reason: String, num_trainers: usize, generators: Vec<String> },
    #[error("the push of {version} failed after {:.1} s: {}", waited.as_secs_f64(), reasons.join("; "))]
    Push {
        version: PolicyVersion,
        waited: Duration,
        reasons: Vec<String>,
        /// Generators that failed, the first one first.
        failed: Vec<String>,
    },
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
    backend: PushBackend,
    sleep_mode: SleepMode,
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
        weights: &dyn ModelWeights,
        config: &RunConfig,
        clients: &[Client],
        runtime: Arc<Runtime>,
    ) -> Result<Self, PublishError> {
        let limits = Limits {
            timeout: seconds(config.train.push_timeout_seconds),
            bucket_bytes: MAX_BUCKET_BYTES,
            backend: config.train.push_backend,
            sleep_mode: config.rollout.sleep_while_training,
        };
        Self::join_within(limits, trainers, weights, clients, runtime)
    }

    fn join_within(
        limits: Limits,
        trainers: &ProcessGroup,
        weights: &dyn ModelWeights,
        clients: &[Client],
        runtime: Arc<Runtime>,
    ) -> Result<Self, PublishError> {
        let bucket_numel = limits.bucket_bytes / weights.kind().elt_size_in_bytes();
        let terms = Terms {
            timeout: limits.timeout,
            manifest_hash: weights.manifest().hash(),
            bucket_numel,
            device: weights.device(),
            backend: limits.backend,
        };
        let groups = rendezvous::meet(&terms, trainers, clients, &runtime)?;
        let buckets = weights.manifest().buckets(trainers.size(), bucket_numel);
        let longest = buckets.iter().map(|bucket| bucket.numel).max().unwrap_or(0);
        let is_staged = (weights.kind(), weights.device()) != (groups.kind, groups.update.device());
        let scratch_numel = if trainers.size() == 1 && !is_staged { 0 } else { longest };
        let scratch = Tensor::zeros([scratch_numel as i64], (groups.kind, groups.update.device()));
        Ok(Self {
            update_group: Arc::new(groups.update),
            update_name: groups.update_name,
            outcome_group: groups.outcome,
            store: groups.store,
            clients: clients.to_vec(),
            runtime,
            timeout: limits.timeout,
            buckets,
            scratch,
            is_staged,
            sleep_mode: limits.sleep_mode,
        })
    }

    /// What the generators call the group.
    #[must_use]
    pub fn group_name(&self) -> &str {
        &self.update_name
    }

    /// Lets the generators give back what `rollout.sleep_while_training` says, until the next push. All trainer ranks call
    /// this, when none waits for completions any more.
    ///
    /// # Errors
    /// On all ranks alike, naming the generator that failed.
    pub fn sleep(&self) -> Result<(), PublishError> {
        if self.sleep_mode == SleepMode::Nothing {
            return Ok(());
        }
        let drop_weights = self.sleep_mode == SleepMode::Weights;
        let is_leader = self.update_group.rank() == 0;
        let slept = if is_leader {
            self.runtime.block_on(sleep_all(&self.clients, drop_weights, self.timeout))
        } else {
            Ok(())
        };
        agree(&self.outcome_group, slept.map(|()| Vec::new()))?;
        Ok(())
    }

    /// Puts `weights` into all generators as `version`, and returns when every one of them serves it. All trainer ranks
    /// call this with equal weights. Where they share them, units are gathered twice: for their hashes, which the
    /// generators get beforehand, and to be sent.
    ///
    /// # Errors
    /// On all ranks alike, within about `train.push_timeout_seconds`, naming the generators that failed. The group is of
    /// no use after that.
    pub fn publish(&mut self, weights: &dyn ModelWeights, version: PolicyVersion) -> Result<PushReport, PublishError> {
        let started = Instant::now();
        let outcome = if self.update_group.rank() == 0 {
            self.lead(weights, version)
        } else {
            self.follow(weights).map(|()| Vec::new()).map_err(|error| vec![error.into()])
        };
        let outcome = outcome.map_err(|failures| PublishError::push(version, started.elapsed(), &failures));
        let answers = agree(&self.outcome_group, outcome)?;
        let answers: Answers = serde_json::from_slice(&answers[0])
            .map_err(|error| PublishError::Elsewhere { rank: 0, reason: format!("unreadable report: {error}") })?;
        Ok(PushReport {
            seconds: started.elapsed().as_secs_f64(),
            bytes: (weights.manifest().numel() * self.scratch.kind().elt_size_in_bytes()) as u64,
            receive_seconds: answers.receive_seconds,
            swap_seconds: answers.swap_seconds,
        })
    }

    /// Rank 0's part: calls the generators while it broadcasts. A generator that fails ends the broadcasts of all.
    fn lead(&self, weights: &dyn ModelWeights, version: PolicyVersion) -> Result<Vec<u8>, Vec<PublishError>> {
        let message = v1::UpdateWeightsRequest {
            group: self.update_name.clone(),
            version: version.0,
            unit_hashes: unit_hashes(weights, self.scratch.kind()).map_err(|error| vec![error.into()])?,
        };
        let (clients, timeout) = (self.clients.clone(), self.timeout);
        let (group, store) = (Arc::clone(&self.update_group), self.store.clone());
        let give_up = move |reason: &str| {
            group.abort(reason);
            if let Err(error) = store.add(FAILED, 1) {
                tracing::warn!("the other trainers notice the failed push at their deadline only: {error}");
            }
        };
        let calls = self.runtime.spawn(async move { update_all(&clients, &message, timeout, give_up).await });
        let sent = self.broadcast(weights);
        if let Err(error) = &sent {
            self.update_group.abort(&error.to_string());
        }
        let ended = |error: JoinError| vec![PublishError::Elsewhere { rank: 0, reason: error.to_string() }];
        let mut answers = self.runtime.block_on(calls).map_err(ended)?;
        if answers.is_ok() && self.sleep_mode != SleepMode::Nothing {
            let woken = self.runtime.block_on(wake_all(&self.clients, self.timeout));
            answers = woken.map_err(|error| vec![error]).and(answers);
        }
        match (answers, sent) {
            (Ok(answers), Ok(())) => {
                let slowest =
                    |seconds: fn(&v1::UpdateWeightsResponse) -> f64| answers.iter().map(seconds).fold(0.0, f64::max);
                let answers = Answers {
                    receive_seconds: slowest(|answer| answer.receive_seconds),
                    swap_seconds: slowest(|answer| answer.swap_seconds),
                };
                Ok(serde_json::to_vec(&answers).expect("two numbers are JSON"))
            }
            (Ok(_), Err(error)) => Err(vec![error.into()]),
            (Err(failures), Ok(())) => Err(failures),
            (Err(failures), Err(error)) => Err(failures.into_iter().chain([error.into()]).collect()),
        }
    }

    /// The part of the other trainers. An aborted connection to rank 0 does not end what one of them waits for from a
    /// generator, so they look for rank 0's note meanwhile.
    fn follow(&self, weights: &dyn ModelWeights) -> Result<(), CommError> {
        // Rank 0 has them for their hashes.
        Walk::all(weights).finish(weights)?;
        let (over, is_over) = sync_channel::<()>(0);
        let (group, store) = (&*self.update_group, &self.store);
        thread::scope(|scope| {
            scope.spawn(move || abort_when_failed(group, store, &is_over));
            let sent = self.broadcast(weights);
            drop(over);
            sent
        })
    }

    /// Every member issues these collectives in this order: it follows from manifest, bucket size and number of trainers,
    /// which are equal on all of them. Where trainers share the weights, one that cannot send any more goes on gathering,
    /// so that the others do not wait for it.
    fn broadcast(&self, weights: &dyn ModelWeights) -> Result<(), CommError> {
        let mut walk = Walk::all(weights);
        let mut sent = Ok(());
        for buckets in self.buckets.chunk_by(|a, b| a.unit_idx == b.unit_idx) {
            let unit = walk.next(weights)?;
            sent = sent.and_then(|()| buckets.iter().try_for_each(|bucket| self.broadcast_bucket(&unit, bucket)));
        }
        sent
    }

    fn broadcast_bucket(&self, unit: &Unit, bucket: &Bucket) -> Result<(), CommError> {
        let numel = bucket.numel as i64;
        let is_own = bucket.owner == self.update_group.rank();
        let own = is_own.then(|| unit.flat().narrow(0, bucket.offset as i64, numel));
        let mut part = match own {
            Some(own) if !self.is_staged => own,
            own => {
                let mut scratch = self.scratch.narrow(0, 0, numel);
                own.iter().for_each(|own| scratch.copy_(own));
                scratch
            }
        };
        self.update_group.broadcast(&mut part, bucket.owner)
    }
}

/// Looks for rank 0's note until the push is over.
fn abort_when_failed(group: &ProcessGroup, store: &Store, is_over: &Receiver<()>) {
    while is_over.recv_timeout(LOOK_AGAIN) == Err(RecvTimeoutError::Timeout) {
        let reason = match store.add(FAILED, 0) {
            Ok(0) => continue,
            Ok(_) => "rank 0 has ended the push".to_owned(),
            Err(error) => error.to_string(),
        };
        return group.abort(&reason);
    }
}

impl PublishError {
    fn push(version: PolicyVersion, waited: Duration, failures: &[Self]) -> Self {
        let reasons = failures.iter().map(Self::to_string).collect();
        let failed = failures.iter().flat_map(Self::failed).cloned().collect();
        Self::Push { version, waited, reasons, failed }
    }

    /// The generators that failed, the first one first.
    pub(crate) fn failed(&self) -> &[String] {
        match self {
            Self::Push { failed, .. } => failed,
            Self::Generator { generator, .. } => std::slice::from_ref(generator),
            _ => &[],
        }
    }

    fn generator(client: &Client, problem: String) -> Self {
        Self::Generator { generator: client.address().to_owned(), problem }
    }

    /// Tells who the ranks are that the group speaks of.
    fn with_members(self, num_trainers: usize, clients: &[Client]) -> Self {
        match self {
            Self::Comm(error) => {
                let generators = clients.iter().map(|client| client.address().to_owned()).collect();
                Self::Join { reason: error.to_string(), num_trainers, generators }
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

/// xxh3 of every unit's bytes as type `kind`, without padding.
fn unit_hashes(weights: &dyn ModelWeights, kind: Kind) -> Result<Vec<u64>, CommError> {
    let mut walk = Walk::all(weights);
    let hash = |unit: &UnitSpec| {
        let numel = unit.numel() as i64;
        let unit = walk.next(weights)?;
        let flat = unit.flat().narrow(0, 0, numel).to_kind(kind).to_device(Device::Cpu);
        Ok(xxh3_64(tensor_data::bytes(&flat)))
    };
    weights.manifest().units.iter().map(hash).collect()
}
