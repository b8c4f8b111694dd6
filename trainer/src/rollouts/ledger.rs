//! What a rollout has received so far. It outlives the calls that fill it, and the generators that answer them.

use std::fmt;
use std::time::Duration;

use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::rollout::{Completion, Group, Prompt, Reward};
use tokio::time::Instant;

use super::RolloutRequest;
use super::receipt::{Receipt, Taken};

/// Every sample of a request, each taken once, whoever sends it.
#[derive(Debug)]
pub struct Ledger {
    pub(super) request: RolloutRequest,
    /// One a prompt, in the request's order.
    pub(super) receipts: Vec<Receipt>,
    pub(super) started: Instant,
    /// When groups that are not complete are given up.
    pub(super) deadline: Instant,
}

/// What has been received of the rollout of a step: a part of checkpoints.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    pub step: u64,
    pub completions: Vec<Completion>,
}

/// A group that was not complete at the deadline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Late {
    /// The one that was asked last.
    pub generator: String,
    pub prompt: PromptId,
    pub missing: usize,
    pub expected: usize,
    pub waited: Duration,
}

impl Ledger {
    /// To be filled within `deadline` from now.
    #[must_use]
    pub fn new(request: RolloutRequest, deadline: Duration) -> Self {
        let receipts = request.prompts.iter().map(|_| Receipt::new(request.num_generations)).collect();
        let started = Instant::now();
        Self { request, receipts, started, deadline: started + deadline }
    }

    /// Completions that have arrived.
    #[must_use]
    pub fn num_received(&self) -> usize {
        let expected = self.receipts.len() * self.request.num_generations;
        expected - self.receipts.iter().map(|receipt| receipt.missing().len()).sum::<usize>()
    }

    /// Copies of the completions that have arrived.
    #[must_use]
    pub fn received(&self) -> Vec<Completion> {
        let of_group = |receipt: &Receipt| receipt.completions().iter().flatten().cloned().collect::<Vec<_>>();
        self.receipts.iter().flat_map(of_group).collect()
    }

    /// Takes those of `completions` in, once received for the same request, that may still be used when `newest` is the
    /// newest policy.
    pub fn restore(&self, completions: &[Completion], newest: PolicyVersion) {
        let versions = self.request.min_version..=newest;
        let external = |name: &str| self.request.rewards.iter().any(|spec| spec.is_external() && spec.name() == name);
        for mut completion in completions.iter().cloned() {
            let verdicts: Vec<Reward> =
                completion.rewards.extract_if(.., |reward| external(&reward.function)).collect();
            let mut places = self.places().filter(|(prompt, _)| prompt.id == completion.prompt_id);
            // A prompt may be there twice.
            let place = places.find(|(prompt, receipt)| {
                let taken = receipt.take(completion.clone(), prompt, &self.request, &versions);
                !matches!(taken, Ok(Taken::Ignored))
            });
            if let Some((_, receipt)) = place {
                receipt.add_rewards(completion.sample_index, verdicts);
            }
        }
    }

    /// The groups, in the request's order; `None` for those that are not complete. What had arrived of these is dropped.
    #[must_use]
    pub fn take_groups(&self) -> Vec<Option<Group>> {
        let group = |(prompt, receipt): (&Prompt, &Receipt)| {
            let completions: Option<Vec<_>> = receipt.completions().iter_mut().map(Option::take).collect();
            completions.map(|completions| Group { prompt: prompt.clone(), completions })
        };
        self.places().map(group).collect()
    }

    pub(super) fn places(&self) -> impl Iterator<Item = (&Prompt, &Receipt)> {
        self.request.prompts.iter().zip(&self.receipts)
    }
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { generator, prompt, missing, expected, waited } = self;
        let waited = waited.as_secs_f64();
        write!(
            f,
            "generator {generator} owes {missing} of {expected} completions of {prompt} after {waited:.1} s; raise \
             rollout.deadline_seconds if it is merely slow"
        )
    }
}
