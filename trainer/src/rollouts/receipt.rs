//! What has arrived of one group: every sample is taken once, and checked before it is.

use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};

use aha_core::ids::PolicyVersion;
use aha_core::reward::RewardSpec;
use aha_core::rollout::{Completion, FinishReason, Prompt, Reward};

use super::RolloutRequest;

/// The completions of one prompt so far, `[G]`, by sample index.
#[derive(Debug)]
pub(super) struct Receipt(Mutex<Vec<Option<Completion>>>);

/// Why a completion cannot be used.
#[derive(Debug, PartialEq)]
pub(super) enum Refusal {
    WrongVersion(PolicyVersion),
    Malformed(String),
}

/// What became of a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    New,
    /// It was there already, or was cancelled by the generator: nothing has changed.
    Ignored,
}

/// Policies that may have sampled a token, oldest and newest.
pub(super) type Versions = RangeInclusive<PolicyVersion>;

impl Receipt {
    pub(super) fn new(num_generations: usize) -> Self {
        Self(Mutex::new(vec![None; num_generations]))
    }

    /// The sample indices that have not arrived.
    pub(super) fn missing(&self) -> Vec<u32> {
        let completions = self.completions();
        (0_u32..).zip(&*completions).filter(|(_, completion)| completion.is_none()).map(|(index, _)| index).collect()
    }

    /// Takes a completion of `prompt` in.
    pub(super) fn take(
        &self,
        completion: Completion,
        prompt: &Prompt,
        request: &RolloutRequest,
        versions: &Versions,
    ) -> Result<Taken, Refusal> {
        if completion.prompt_id != prompt.id {
            return Err(Refusal::Malformed(format!("it answers {}", completion.prompt_id)));
        }
        let mut completions = self.completions();
        let Some(place) = completions.get_mut(completion.sample_index as usize) else {
            return Err(Refusal::Malformed(format!("nobody asked for sample {}", completion.sample_index)));
        };
        if place.is_some() || completion.finish_reason == FinishReason::Aborted {
            return Ok(Taken::Ignored);
        }
        check(&completion, prompt, request, versions)?;
        *place = Some(completion);
        Ok(Taken::New)
    }

    /// Adds to a completion that has arrived.
    pub(super) fn add_rewards(&self, sample_index: u32, rewards: Vec<Reward>) {
        if let Some(Some(completion)) = self.completions().get_mut(sample_index as usize) {
            completion.rewards.extend(rewards);
        }
    }

    /// What has arrived, by sample index.
    pub(super) fn completions(&self) -> MutexGuard<'_, Vec<Option<Completion>>> {
        // Nobody panics while holding it, and if so each completion is still whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(
    completion: &Completion,
    prompt: &Prompt,
    request: &RolloutRequest,
    versions: &Versions,
) -> Result<(), Refusal> {
    let sample = completion.sample_index;
    let malformed = |problem: &str| Err(Refusal::Malformed(format!("sample {sample} {problem}")));
    if let Some(span) = completion.spans.iter().find(|span| !versions.contains(&span.version)) {
        return Err(Refusal::WrongVersion(span.version));
    }
    let (num_tokens, max_tokens) = (completion.token_ids.len(), request.sampling.max_tokens);
    if num_tokens == 0 {
        return malformed("has no tokens");
    }
    if num_tokens > max_tokens as usize {
        return malformed(&format!("has {num_tokens} tokens, over the {max_tokens} that were asked for"));
    }
    if let Some(logprob) = completion.logprobs.iter().find(|logprob| !logprob.is_finite()) {
        return malformed(&format!("has a token with log-prob {logprob}"));
    }
    let names = |rewards: &[Reward]| rewards.iter().map(|reward| reward.function.clone()).collect::<Vec<_>>();
    let asked: Vec<&str> = request.generators_rewards(prompt).map(RewardSpec::name).collect();
    if names(&completion.rewards) != asked {
        let names = names(&completion.rewards);
        return malformed(&format!("has rewards {names:?} where {asked:?} were asked for"));
    }
    if let Some(reward) = completion.rewards.iter().find(|reward| !reward.score.is_finite()) {
        return malformed(&format!("scores {} in {:?}", reward.score, reward.function));
    }
    Ok(())
}
