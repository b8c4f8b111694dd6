//! The generators of a run, which may be lost and come back while it goes on.
//!
//! Generators are those of `generator.addresses`, and those that register with trainer rank 0 where `generator.coordinator`
//! has it listen. Rank 0 asks before every push which of them are there. If they are not those of the last push, or one was
//! started anew, all ranks make a new update group with them: groups change with the membership, never with every step.
//! A push that fails is repeated without the generator that made it fail. A rollout that no generator can complete, or
//! whose generators have lost the policy, goes on when the policy is published again; what has arrived stays.

mod coordinator;
mod roster;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use aha_core::config::{Credentials, RunConfig};
use aha_core::ids::PolicyVersion;
use aha_core::rollout::Group;
use aha_nn::comm::ProcessGroup;
use aha_nn::unit::ModelWeights;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::agreement::agree;
use crate::clients::{Client, ConnectError, Connector, seconds};
use crate::publish::{PublishError, Publisher, PushReport};
use crate::rollouts::{GeneratorPool, Ledger, RolloutError, RolloutRequest, Rollouts};
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
    pub groups: fn(&RolloutRequest, &mut [Group]),
}

/// [`Rollouts`] while this policy trains.
#[derive(Debug)]
pub struct FleetRollouts<'a> {
    fleet: &'a mut Fleet,
    trainers: &'a ProcessGroup,
    policy: &'a dyn ModelWeights,
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
        let pool = GeneratorPool::connect(config, &connector, Arc::clone(&runtime))?;
        let publisher = if pool.clients().is_empty() {
            None
        } else {
            let joined = Publisher::join(trainers, policy, config, pool.clients(), Arc::clone(&runtime));
            Some(joined.map_err(Box::new)?)
        };
        let roster = if trainers.rank() == 0 {
            let serve = |address: &String| {
                let served = coordinator::serve(address, &connector, policy.manifest().hash(), &runtime);
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
        Ok(Self { config: config.clone(), connector, runtime, pool, publisher, roster, epoch: 0, hooks: None })
    }

    pub fn set_hooks(&mut self, hooks: Hooks) {
        self.hooks = Some(hooks);
    }

    /// Generators that take part.
    #[must_use]
    pub fn num_generators(&self) -> usize {
        self.pool.clients().len()
    }

    /// Puts `policy` into all generators that are there as `version`; whoever makes a push fail is left out of the next.
    ///
    /// # Errors
    /// On all ranks alike: if no generator is there in time, or too many pushes fail.
    pub fn publish(
        &mut self,
        trainers: &ProcessGroup,
        policy: &dyn ModelWeights,
        version: PolicyVersion,
    ) -> Result<PushReport, PublishError> {
        let mut num_pushes = 0;
        loop {
            self.muster(trainers, policy.manifest().hash())?;
            let error = match self.push(trainers, policy, version) {
                Ok(report) => {
                    if let Some(roster) = &mut self.roster {
                        roster.commend(self.pool.clients());
                    }
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

    /// Lets the generators give back what `rollout.sleep_while_training` says, until the next push.
    ///
    /// # Errors
    /// If the ranks cannot reach each other. A generator that fails is looked at again before the next push.
    pub fn sleep(&mut self) -> Result<(), PublishError> {
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

    /// For rollouts of `policy`, which was published last.
    pub fn rollouts<'a>(&'a mut self, trainers: &'a ProcessGroup, policy: &'a dyn ModelWeights) -> FleetRollouts<'a> {
        FleetRollouts { fleet: self, trainers, policy }
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

fn addresses(clients: &[Client]) -> impl Iterator<Item = &str> {
    clients.iter().map(Client::address)
}

impl Rollouts for FleetRollouts<'_> {
    fn roll_out(&mut self, request: &RolloutRequest) -> Result<Vec<Group>, RolloutError> {
        let Self { fleet, trainers, policy } = self;
        let mut request = request.clone();
        if let Some(hooks) = fleet.hooks {
            (hooks.request)(&mut request);
        }
        let mut ledger = Ledger::new(&request);
        loop {
            let filled = fleet.pool.fill(&mut ledger);
            if is_complete_everywhere(trainers, filled)? {
                break;
            }
            fleet.publish(trainers, *policy, request.version).map_err(Box::new)?;
        }
        let mut groups = ledger.into_groups().expect("it was filled");
        if let Some(hooks) = fleet.hooks {
            (hooks.groups)(&request, &mut groups);
        }
        Ok(groups)
    }
}

/// Whether all ranks have what they asked for; else some of them want generators.
fn is_complete_everywhere(trainers: &ProcessGroup, filled: Result<(), RolloutError>) -> Result<bool, RolloutError> {
    let outcome = match filled {
        Ok(()) => Ok(vec![u8::from(true)]),
        Err(error) if error.is_want_of_generators() => {
            tracing::warn!("{error}; looking for generators");
            Ok(vec![u8::from(false)])
        }
        Err(error) => Err(error),
    };
    let answers = agree(trainers, outcome)?;
    Ok(answers.iter().all(|answer| *answer == [u8::from(true)]))
}
