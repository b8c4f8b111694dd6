//! Rewards of the user's own: services and programs that this rank asks about the completions of its prompts.
//!
//! Groups are judged as they complete, while others are still sampled, in batches of bounded size. Whatever becomes of who
//! is asked, every completion has an outcome in time: those that got no verdict are left out of the step. One that fails
//! is not waited for by every batch: it is looked for at intervals, and completions meanwhile get their outcome at once.

mod alarm;
mod asker;
mod child;
mod command;
mod failure;
mod question;
mod service;
mod standing;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use aha_core::config::RunConfig;
use aha_core::reward::{ExternalReward, Outcome, RewardError, RewardSpec};
use aha_core::rollout::{Completion, Prompt, Reward};
use futures::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;

use crate::clients::seconds;
use crate::run_dir::LOGS_DIR;
use asker::Asker;
use question::{Question, Row};

/// Groups that wait to be in a batch; more wait to be here.
const MAX_QUEUED: usize = 1024;

/// Those that a run's `rewards` name.
#[derive(Debug, Default)]
pub struct Rewarders(Vec<Rewarder>);

/// One of them.
#[derive(Debug)]
struct Rewarder {
    asker: Arc<Asker>,
    queue: mpsc::Sender<Vec<Pending>>,
    deadline: Duration,
}

/// A completion that waits for its outcome.
#[derive(Debug)]
struct Pending {
    question: Question,
    deadline: Instant,
    outcome: oneshot::Sender<Outcome>,
}

#[derive(Debug, thiserror::Error)]
pub enum RewarderError {
    #[error(transparent)]
    Options(#[from] RewardError),
    #[error("reward {name}: {reason}")]
    Start { name: String, reason: String },
}

/// Where the messages of commands go.
#[derive(Debug, Clone)]
pub struct Logs {
    pub folder: PathBuf,
    pub rank: usize,
}

impl Rewarders {
    /// Starts the commands among `specs` and gets ready to call the services; what is built in is left out. Messages of
    /// commands go to this process's own standard error where there are no `logs`.
    ///
    /// # Errors
    /// Names the command that cannot be started.
    pub fn start(specs: &[RewardSpec], logs: Option<&Logs>, runtime: &Handle) -> Result<Self, RewarderError> {
        let _entered = runtime.enter();
        let start = |spec: &RewardSpec| {
            let reward = ExternalReward::new(spec)?;
            let start_error = |reason: String| RewarderError::Start { name: reward.name.clone(), reason };
            let asker = Arc::new(Asker::start(&reward, logs).map_err(start_error)?);
            let (queue, pending) = mpsc::channel(MAX_QUEUED);
            runtime.spawn(batch(Arc::clone(&asker), pending));
            Ok(Rewarder { asker, queue, deadline: seconds(reward.options.deadline_seconds) })
        };
        specs.iter().filter(|spec| spec.is_external()).map(start).collect::<Result<_, _>>().map(Self)
    }

    /// Those of a run on one rank, whose commands write into the run's logs.
    ///
    /// # Errors
    /// As [`Rewarders::start`]'s.
    pub fn of_run(config: &RunConfig, rank: usize, runtime: &Handle) -> Result<Self, RewarderError> {
        let logs = Logs { folder: config.run_dir().join(LOGS_DIR), rank };
        Self::start(&config.rewards, Some(&logs), runtime)
    }

    /// Gives completions of `prompt` the outcomes of those of `rewards` that are asked for here and that they have not got.
    pub async fn judge(&self, prompt: &Prompt, rewards: &[RewardSpec], completions: &mut [Completion]) {
        let asked = |rewarder: &&Rewarder| {
            let name = rewarder.asker.name();
            prompt.origin.asks_for(name) && rewards.iter().any(|spec| spec.name() == name)
        };
        let asked: Vec<&Rewarder> = self.0.iter().filter(asked).collect();
        if asked.is_empty() {
            return;
        }
        let row = Arc::new(Row::new(prompt));
        let outcomes = join_all(asked.iter().map(|rewarder| rewarder.outcomes(&row, completions))).await;
        for (rewarder, outcomes) in asked.iter().zip(outcomes) {
            for (completion, outcome) in completions.iter_mut().zip(outcomes) {
                completion.rewards.extend(outcome.map(|outcome| Reward::new(rewarder.asker.name(), outcome)));
            }
        }
        for completion in completions {
            // Those of generators and these together are in the order of the recipe.
            completion.rewards.sort_by_key(|reward| rewards.iter().position(|spec| spec.name() == reward.function));
        }
    }

    /// Why completions have got no verdict, of each of them that has failed: what happened last.
    pub fn failures(&self) -> impl Iterator<Item = String> {
        self.0.iter().filter_map(|rewarder| rewarder.asker.last_failure())
    }
}

impl Rewarder {
    /// Of those that have none.
    async fn outcomes(&self, row: &Arc<Row>, completions: &[Completion]) -> Vec<Option<Outcome>> {
        let deadline = Instant::now() + self.deadline;
        let (mut group, mut answers) = (Vec::new(), Vec::new());
        for completion in completions {
            let is_judged = completion.rewards.iter().any(|reward| reward.function == self.asker.name());
            let (outcome, answer) = oneshot::channel();
            if !is_judged {
                group.push(Pending { question: Question::new(row, completion), deadline, outcome });
            }
            answers.push((!is_judged).then_some(answer));
        }
        if !group.is_empty() && self.queue.send(group).await.is_err() {
            tracing::debug!("the runtime ends");
        }
        let mut outcomes = Vec::new();
        for answer in answers {
            outcomes.push(match answer {
                // What nobody answers has been dropped with the runtime.
                Some(answer) => Some(answer.await.unwrap_or(Outcome::Crash)),
                None => None,
            });
        }
        outcomes
    }
}

/// Asks about everything that is queued, in batches that fill up while as many as may be are in flight.
async fn batch(asker: Arc<Asker>, mut queue: mpsc::Receiver<Vec<Pending>>) {
    let mut waiting = VecDeque::new();
    while let Some(slot) = asker.slot().await {
        if waiting.is_empty() {
            let Some(group) = queue.recv().await else { return };
            waiting.extend(group);
        }
        while waiting.len() < asker.max_batch_size()
            && let Ok(group) = queue.try_recv()
        {
            waiting.extend(group);
        }
        let batch: Vec<Pending> = waiting.drain(..waiting.len().min(asker.max_batch_size())).collect();
        tokio::spawn(answer(Arc::clone(&asker), batch, slot));
    }
}

async fn answer(asker: Arc<Asker>, batch: Vec<Pending>, slot: OwnedSemaphorePermit) {
    // Those that came first have the least time.
    let deadline = batch.iter().map(|pending| pending.deadline).min().unwrap_or_else(Instant::now);
    let (questions, places): (Vec<_>, Vec<_>) =
        batch.into_iter().map(|pending| (pending.question, pending.outcome)).unzip();
    for (place, outcome) in places.into_iter().zip(asker.outcomes(&questions, deadline).await) {
        if place.send(outcome).is_err() {
            tracing::debug!("nobody waits for a verdict any more");
        }
    }
    drop(slot);
}
