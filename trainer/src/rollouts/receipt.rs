//! What has arrived of one group: every sample is taken once, and checked before it is.

use aha_core::ids::PolicyVersion;
use aha_core::rollout::{Completion, FinishReason, Group, Prompt};

use super::RolloutRequest;

/// The completions of one prompt so far.
#[derive(Debug)]
pub(super) struct Receipt<'a> {
    request: &'a RolloutRequest,
    prompt: &'a Prompt,
    /// `[G]`, by sample index.
    completions: Vec<Option<Completion>>,
}

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

impl<'a> Receipt<'a> {
    pub(super) fn new(request: &'a RolloutRequest, prompt: &'a Prompt) -> Self {
        Self { request, prompt, completions: vec![None; request.num_generations] }
    }

    pub(super) fn prompt(&self) -> &'a Prompt {
        self.prompt
    }

    /// The sample indices that have not arrived.
    pub(super) fn missing(&self) -> Vec<u32> {
        (0_u32..)
            .zip(&self.completions)
            .filter(|(_, completion)| completion.is_none())
            .map(|(index, _)| index)
            .collect()
    }

    /// Takes a completion in.
    pub(super) fn take(&mut self, completion: Completion) -> Result<Taken, Refusal> {
        if completion.prompt_id != self.prompt.id {
            return Err(Refusal::Malformed(format!("it answers {}", completion.prompt_id)));
        }
        let Some(place) = self.completions.get_mut(completion.sample_index as usize) else {
            return Err(Refusal::Malformed(format!("nobody asked for sample {}", completion.sample_index)));
        };
        if place.is_some() || completion.finish_reason == FinishReason::Aborted {
            return Ok(Taken::Ignored);
        }
        check(&completion, self.request)?;
        *place = Some(completion);
        Ok(Taken::New)
    }

    /// The group, if it is complete.
    pub(super) fn into_group(self) -> Option<Group> {
        let completions: Option<Vec<_>> = self.completions.into_iter().collect();
        completions.map(|completions| Group { prompt: self.prompt.clone(), completions })
    }
}

fn check(completion: &Completion, request: &RolloutRequest) -> Result<(), Refusal> {
    let sample = completion.sample_index;
    let malformed = |problem: &str| Err(Refusal::Malformed(format!("sample {sample} {problem}")));
    if let Some(span) = completion.spans.iter().find(|span| span.version != request.version) {
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
    if !completion.rewards.iter().map(|reward| &reward.function).eq(&request.rewards) {
        let functions: Vec<_> = completion.rewards.iter().map(|reward| reward.function.as_str()).collect();
        return malformed(&format!("has rewards {functions:?} where {:?} were asked for", request.rewards));
    }
    if let Some(reward) = completion.rewards.iter().find(|reward| !reward.score.is_finite()) {
        return malformed(&format!("scores {} in {:?}", reward.score, reward.function));
    }
    Ok(())
}
