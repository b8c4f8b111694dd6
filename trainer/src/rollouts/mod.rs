//! Rollouts: prompts in, groups of scored completions out, whoever generates them.

mod call;
mod filling;
mod ledger;
mod membership;
mod pool;
mod receipt;
#[cfg(test)]
mod tests;

use std::time::Duration;

use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::random::derive_seed;
use aha_core::reward::RewardSpec;
use aha_core::rollout::{Group, Prompt, Sampling};
use aha_nn::comm::CommError;
use aha_proto::v1;

pub use filling::Filling;
pub use ledger::{Late, Ledger, Received};
pub use pool::GeneratorPool;

use crate::agreement::Disagreement;
use crate::clients::ConnectError;
use crate::publish::PublishError;
use crate::rewarders::RewarderError;

/// Samples completions. Calls block until every completion is there.
pub trait Rollouts {
    /// The groups of the request's prompts, in their order, each with all its samples in the order of their index; `None`
    /// for a group that could not be completed in time.
    ///
    /// # Errors
    /// If a completion cannot be had, is malformed, or was sampled by a policy that is too old or was never published.
    fn roll_out(&mut self, request: &RolloutRequest) -> Result<Vec<Option<Group>>, RolloutError>;
}

/// What is to be sampled.
#[derive(Debug, Clone, PartialEq)]
pub struct RolloutRequest {
    pub prompts: Vec<Prompt>,
    /// Completions of a prompt, `G`.
    pub num_generations: usize,
    pub sampling: Sampling,
    /// Seed of the step. A completion depends on it, its prompt's id, its sample index and the weights alone.
    pub seed: u64,
    /// Reward functions to score with, those of them that are of a prompt's source.
    pub rewards: Vec<RewardSpec>,
    /// The oldest policy that may have sampled a token; the newest is the one that was published last.
    pub min_version: PolicyVersion,
}

impl RolloutRequest {
    /// The reward functions that score a prompt's completions.
    fn rewards_of<'a>(&'a self, prompt: &'a Prompt) -> impl Iterator<Item = &'a RewardSpec> {
        self.rewards.iter().filter(|spec| prompt.origin.asks_for(spec.name()))
    }

    /// Those of them that generators score with; the others are asked for here.
    fn generators_rewards<'a>(&'a self, prompt: &'a Prompt) -> impl Iterator<Item = &'a RewardSpec> {
        self.rewards_of(prompt).filter(|spec| !spec.is_external())
    }

    /// What a generator is asked for the samples of `prompt` that are missing.
    #[must_use]
    pub fn message(&self, prompt: &Prompt, missing: Vec<u32>, request_id: String) -> v1::GenerateRequest {
        v1::GenerateRequest {
            request_id,
            prompt_id: prompt.id.0,
            token_ids: prompt.token_ids.clone(),
            sample_indices: missing,
            sampling: Some((&self.sampling).into()),
            seed: derive_seed(self.seed, &[prompt.id.0]),
            rewards: self.generators_rewards(prompt).map(Into::into).collect(),
            columns: serde_json::Value::Object(prompt.columns.clone()).to_string(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    #[error("generator.addresses: there is no generator to ask, and generator.coordinator has none register")]
    NoGenerators,
    #[error(
        "generator.coordinator: cannot listen on {address}: {reason}; it must be an address of the machine of rank 0"
    )]
    Coordinator { address: String, reason: String },
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Rewarder(#[from] RewarderError),
    #[error("generator {generator} refused {prompt}: {reason}")]
    Refused { generator: String, prompt: PromptId, reason: String },
    #[error(
        "{prompt}: {missing} of {expected} completions are missing after {attempts} attempts in {:.1} s, the last on \
         generator {generator}: {reason}", waited.as_secs_f64()
    )]
    Failed {
        generator: String,
        prompt: PromptId,
        missing: usize,
        expected: usize,
        attempts: u32,
        waited: Duration,
        reason: String,
    },
    #[error(
        "of {} prompts, the first {}, no whole group came within rollout.deadline_seconds; warnings before this name the \
         generators that owe them", prompts.len(), prompts[0]
    )]
    Deadline { prompts: Vec<PromptId> },
    #[error(
        "generator {generator} sampled {prompt} with policy {got}, and only {oldest} to {newest} may be trained on"
    )]
    WrongVersion {
        generator: String,
        prompt: PromptId,
        oldest: PolicyVersion,
        /// The one that was published last.
        newest: PolicyVersion,
        got: PolicyVersion,
    },
    #[error(transparent)]
    Publish(#[from] Box<PublishError>),
    #[error("rank {rank}: {reason}")]
    Elsewhere { rank: usize, reason: String },
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error("generator {generator} sent a completion of {prompt} that cannot be used: {problem}")]
    BadCompletion { generator: String, prompt: PromptId, problem: String },
}

/// The groups of `prompts`, if all of them came in time.
///
/// # Errors
/// Names those that did not.
pub(crate) fn all_in_time(prompts: &[PromptId], groups: Vec<Option<Group>>) -> Result<Vec<Group>, RolloutError> {
    let late = prompts.iter().zip(&groups).filter(|(_, group)| group.is_none());
    let late: Vec<PromptId> = late.map(|(prompt, _)| *prompt).collect();
    if late.is_empty() {
        Ok(groups.into_iter().flatten().collect())
    } else {
        Err(RolloutError::Deadline { prompts: late })
    }
}

impl RolloutError {
    /// Whether other generators, or these with the policy published to them, may have what is missing.
    #[must_use]
    pub fn is_want_of_generators(&self) -> bool {
        matches!(self, Self::Failed { .. } | Self::WrongVersion { .. })
    }
}

impl From<Disagreement<Self>> for RolloutError {
    fn from(disagreement: Disagreement<Self>) -> Self {
        match disagreement {
            Disagreement::Here(error) => error,
            Disagreement::Elsewhere { rank, reason } => Self::Elsewhere { rank, reason },
            Disagreement::Comm(error) => Self::Comm(error),
        }
    }
}
