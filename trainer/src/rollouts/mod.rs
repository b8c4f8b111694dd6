//! Rollouts: prompts in, groups of scored completions out, whoever generates them.

mod ledger;
mod pool;
mod receipt;
#[cfg(test)]
mod tests;

use std::time::Duration;

use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::rollout::{Group, Prompt, Sampling};
use aha_nn::comm::CommError;

pub use ledger::Ledger;
pub use pool::GeneratorPool;

use crate::agreement::Disagreement;
use crate::clients::ConnectError;
use crate::publish::PublishError;

/// Samples completions. Calls block until every completion is there.
pub trait Rollouts {
    /// The groups of the request's prompts, in their order, each with all its samples in the order of their index.
    ///
    /// # Errors
    /// If a completion cannot be had in time, is malformed, or was not sampled by the version that is asked for.
    fn roll_out(&mut self, request: &RolloutRequest) -> Result<Vec<Group>, RolloutError>;
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
    /// Reward functions to score with, by name.
    pub rewards: Vec<String>,
    /// The policy that must have sampled every token.
    pub version: PolicyVersion,
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
        "generator {generator} owes {missing} of {expected} completions of {prompt} after {:.1} s; raise \
         rollout.deadline_seconds if it is merely slow", waited.as_secs_f64()
    )]
    Deadline { generator: String, prompt: PromptId, missing: usize, expected: usize, waited: Duration },
    #[error("generator {generator} sampled {prompt} with policy {got}, but {expected} was published to it last")]
    WrongVersion { generator: String, prompt: PromptId, expected: PolicyVersion, got: PolicyVersion },
    #[error(transparent)]
    Publish(#[from] Box<PublishError>),
    #[error("rank {rank}: {reason}")]
    Elsewhere { rank: usize, reason: String },
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error("generator {generator} sent a completion of {prompt} that cannot be used: {problem}")]
    BadCompletion { generator: String, prompt: PromptId, problem: String },
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
