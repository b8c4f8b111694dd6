//! The generators of a run, which may be lost and come back while it goes on.
//!
//! Generators are those of `generator.addresses`, and those that register with trainer rank 0 where `generator.coordinator`
//! has it listen. Rank 0 asks before every push which of them are there. If they are not those of the last push, or one was
//! started anew, all ranks make a new update group with them: groups change with the membership, never with every step.
//! A push that fails is repeated without the generator that made it fail. A rollout that no generator can complete, or
//! whose generators have lost the policy, goes on when the policy is published again; what has arrived stays.
//!
//! Rollouts of later steps may have begun while the trainers train (`rollout.max_lag`): they go on through pushes and
//! changes of the membership.

mod ahead;
mod coordinator;
mod roster;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aha_core::config::{Credentials, RunConfig};
use aha_core::ids::PolicyVersion;
use aha_core::rollout::{Completion, Group};
use aha_nn::comm::ProcessGroup;
use aha_nn::unit::ModelWeights;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::agreement::agree;
use crate::clients::{Client, ConnectError, Connector, seconds};
use crate::generators::{Generators, is_filled_everywhere};
use crate::publish::{PublishError, Publisher, PushReport};
use crate::rewarders::Rewarders;
use crate::rollouts::{GeneratorPool, Received, RolloutError, RolloutRequest};
use ahead::{Ahead, Begun};
use roster::Roster;

/// Pushes that may fail one after the other.
const MAX_PUSHES: usize = 5;

/// A rank's way to the generators. All ranks call its methods together.
#[derive(Debug)]
pub struct Fleet {
    config: RunConfig,
    connector: Connector,
    runtime: Arc<Runtime>,
    pool: GeneratorPool,
    /// None after a failed push.
    publisher: Option<Publisher>,
    /// Rank 0's.
    roster: Option<Roster>,
    /// Changes of the membership so far.
    epoch: u64,
    /// Rollouts that have begun, in the order of their steps.
    ahead: VecDeque<Ahead>,
    hooks: Option<Hooks>,
}

/// Who takes part, and how often that has changed.
#[derive(Debug, Serialize, Deserialize)]
struct Count {
    epoch: u64,
    members: Vec<String>,
}

/// Changes what is asked for and what comes back: for measuring.
#[derive(Debug, Clone, Copy)]
pub struct Hooks {
    pub request: fn(&mut RolloutRequest),
    pub groups: fn(&RolloutRequest, &mut [Option<Group>]),
}

impl Fleet {
    /// Waits for all of `generator.addresses`, and makes the update group with them. Those that register are waited for by
    /// the first push. Calls in either direction are made and taken by `credentials`.
    ///
    /// # Errors
    /// Names the generator that does not answer in time, or has another model.
    pub fn connect(
        config: &RunConfig,
        trainers: &ProcessGroup,
        policy: &dyn ModelWeights,
        credentials: Credentials,
        runtime: Arc<Runtime>,
    ) -> Result<Self, RolloutError> {
        let connector = Connector::new(credentials, seconds(config.generator.probe_timeout_seconds))?;
        let rewarders = Rewarders::of_run(config, trainers.rank(), runtime.handle())?;
        let pool = GeneratorPool::connect(config, &connector, rewarders, Arc::clone(&runtime))?;
        let publisher = if pool.clients().is_empty() {
            None
        } else {
            let joined = Publisher::join(trainers, policy, config, pool.clients(), Arc::clone(&runtime));
            Some(joined.map_err(Box::new)?)
        };
        let roster = if trainers.rank() == 0 {
            let serve = |address: &String| {
                let run = coordinator::Run {
                    name: config.run.name.clone(),
                    max_steps: config.train.max_steps,
                    manifest_hash: policy.manifest().hash(),
                };
                // The other ranks wait in a collective meanwhile.
                let limit = seconds(config.train.collective_timeout_seconds);
                let served = coordinator::serve((address, limit), &connector, run, &runtime);
                let failed =
                    |error| RolloutError::Coordinator { address: address.clone(), reason: format!("{error:#}") };
                served.map_err(failed)
            };
            let registry = config.generator.coordinator.as_ref().map(serve).transpose()?;
            let patience = seconds(config.generator.connect_timeout_seconds);
            Some(Roster::new(pool.clients(), registry, &connector, patience))
        } else {
            None
        };
        Ok(Self {
            config: config.clone(),
            connector,
            runtime,
            pool,
            publisher,
            roster,
            epoch: 0,
            ahead: VecDeque::new(),
            hooks: None,
        })
    }

    pub fn set_hooks(&mut self, hooks: Hooks) {
        self.hooks = Some(hooks);
    }

    /// Asks the generators, behind what they were asked for before.
    fn begun(&self, request: &RolloutRequest, received: &[Completion]) -> Begun {
        let mut asked = request.clone();
        if let Some(hooks) = self.hooks {
            (hooks.request)(&mut asked);
        }
        let turns = 1 + self.ahead.len() as u32;
        Begun::new(&self.pool, asked, seconds(self.config.rollout.deadline_seconds).saturating_mul(turns), received)
    }

    /// The rollout that was begun for `request`, or else one that begins now.
    fn take_begun(&mut self, request: &RolloutRequest) -> Begun {
        let known = self.ahead.iter().position(|ahead| ahead.request == *request);
        let known = known.and_then(|index| self.ahead.remove(index));
        known.map_or_else(|| self.begun(request, &[]), |ahead| ahead.begun)
    }

    fn push(
        &mut self,
        trainers: &ProcessGroup,
        policy: &dyn ModelWeights,
        version: PolicyVersion,
    ) -> Result<PushReport, PublishError> {
        let publisher = match &mut self.publisher {
            Some(publisher) => publisher,
            none => {
                let (clients, runtime) = (self.pool.clients(), Arc::clone(&self.runtime));
                none.insert(Publisher::join(trainers, policy, &self.config, clients, runtime)?)
            }
        };
        publisher.publish(policy, version)
    }

    /// Agrees with the other ranks on who is there. Waits until somebody is.
    fn muster(&mut self, trainers: &ProcessGroup, manifest_hash: u64) -> Result<(), PublishError> {
        let started = Instant::now();
        loop {
            // The other ranks wait in a collective, whose deadline knows nothing of generators.
            let answers = agree(trainers, self.count(manifest_hash, started.elapsed()))?;
            let Some(Count { epoch, members }) = serde_json::from_slice(&answers[0]).map_err(|error| {
                PublishError::Elsewhere { rank: 0, reason: format!("unreadable membership: {error}") }
            })?
            else {
                continue;
            };
            if epoch != self.epoch {
                self.change_members(&members)?;
                (self.epoch, self.publisher) = (epoch, None);
            }
            return Ok(());
        }
    }

    /// What rank 0 has to say of the membership: null where nobody is there yet.
    fn count(&mut self, manifest_hash: u64, waited: Duration) -> Result<Vec<u8>, PublishError> {
        let Some(roster) = &mut self.roster else { return Ok(Vec::new()) };
        let present = self.runtime.block_on(roster.present(manifest_hash));
        let group = self.publisher.as_ref().map(Publisher::group_name);
        let is_same = present.iter().map(|(client, _)| client.address()).eq(addresses(self.pool.clients()))
            && present.iter().all(|(_, status)| Some(status.update_group.as_str()) == group);
        let members: Vec<String> = present.iter().map(|(client, _)| client.address().to_owned()).collect();
        let count = if members.is_empty() {
            roster.check_patience(waited)?;
            None
        } else {
            Some(Count { epoch: self.epoch + u64::from(!is_same), members })
        };
        Ok(serde_json::to_vec(&count).expect("a number and strings are JSON"))
    }

    fn change_members(&mut self, members: &[String]) -> Result<(), PublishError> {
        let before = self.pool.clients();
        // Connections live there.
        let _entered = self.runtime.enter();
        let client = |address: &String| {
            let known = before.iter().find(|client| client.address() == address);
            let bad = |error: ConnectError| PublishError::Elsewhere { rank: 0, reason: error.to_string() };
            known.cloned().map_or_else(|| self.connector.client(address).map_err(bad), Ok)
        };
        let now: Vec<Client> = members.iter().map(client).collect::<Result<_, _>>()?;
        if self.roster.is_some() {
            let others = |these: &[Client], those: &[Client]| {
                let is_new = |address: &&str| !addresses(those).any(|known| known == *address);
                addresses(these).filter(is_new).map(str::to_owned).collect::<Vec<_>>().join(", ")
            };
            let (joined, left) = (others(&now, before), others(before, &now));
            tracing::info!(generators = now.len(), joined, left, "the generators that take part");
        }
        self.pool.set_clients(now);
        Ok(())
    }
}

impl Generators for Fleet {
    /// Whoever makes a push fail is left out of the next.
    #[tracing::instrument(level = "debug", name = "push", skip_all, fields(version = version.0))]
    fn publish(
        &mut self,
        trainers: &ProcessGroup,
        policy: &dyn ModelWeights,
        version: PolicyVersion,
    ) -> Result<PushReport, PublishError> {
        let mut num_pushes = 0;
        // Generators serve it before all of them have said so.
        self.pool.set_newest(version);
        loop {
            self.muster(trainers, policy.manifest().hash())?;
            let error = match self.push(trainers, policy, version) {
                Ok(report) => {
                    if let Some(roster) = &mut self.roster {
                        roster.commend(self.pool.clients(), version);
                    }
                    self.pool.absolve();
                    self.ahead.iter_mut().for_each(|ahead| ahead.begun.revive(&self.pool));
                    return Ok(report);
                }
                Err(error) => error,
            };
            num_pushes += 1;
            if matches!(error, PublishError::Comm(_)) || num_pushes == MAX_PUSHES {
                return Err(error);
            }
            self.publisher = None;
            if let Some(roster) = &mut self.roster {
                tracing::warn!("{error}; trying again");
                self.runtime.block_on(roster.blame(error.failed()));
            }
        }
    }

    /// A generator that fails is looked at again before the next push.
    fn sleep(&mut self) -> Result<(), PublishError> {
        match self.publisher.as_ref().map_or(Ok(()), Publisher::sleep) {
            Err(error @ PublishError::Comm(_)) => Err(error),
            Err(error) => {
                if self.roster.is_some() {
                    tracing::warn!("{error}");
                }
                self.publisher = None;
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn num_generators(&self) -> usize {
        self.pool.clients().len()
    }

    fn begin(&mut self, step: u64, request: &RolloutRequest, received: &[Completion]) {
        let begun = self.begun(request, received);
        self.ahead.push_back(Ahead { step, request: request.clone(), begun });
    }

    fn num_ahead(&self) -> usize {
        self.ahead.len()
    }

    fn received(&self) -> Vec<Received> {
        let received = |ahead: &Ahead| Received { step: ahead.step, completions: ahead.begun.ledger.received() };
        self.ahead.iter().map(received).collect()
    }

    fn rewarders(&self) -> &Rewarders {
        self.pool.rewarders()
    }

    fn take_idle(&mut self) -> Duration {
        self.pool.take_idle()
    }

    fn roll_out(
        &mut self,
        trainers: &ProcessGroup,
        (policy, version): (&dyn ModelWeights, PolicyVersion),
        request: &RolloutRequest,
    ) -> Result<Vec<Option<Group>>, RolloutError> {
        let mut begun = self.take_begun(request);
        while !is_filled_everywhere(trainers, begun.wait(&self.pool))? {
            self.publish(trainers, policy, version).map_err(Box::new)?;
            begun.begin_again(&self.pool);
        }
        let mut groups = begun.ledger.take_groups();
        if let Some(hooks) = self.hooks {
            (hooks.groups)(request, &mut groups);
        }
        Ok(groups)
    }
}

fn addresses(clients: &[Client]) -> impl Iterator<Item = &str> {
    clients.iter().map(Client::address)
}
