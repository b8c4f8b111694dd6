//! Wire types to and from domain types. What comes in is checked here, once.

use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::reward::RewardSpec;
use aha_core::rollout;

use crate::v1;

/// A message that is well-formed protobuf but makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct BadMessage {
    pub field: &'static str,
    pub problem: String,
}

impl From<&rollout::Sampling> for v1::Sampling {
    fn from(sampling: &rollout::Sampling) -> Self {
        Self {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            max_tokens: sampling.max_tokens,
            min_tokens: sampling.min_tokens,
            stop: sampling.stop.clone(),
            stop_token_ids: sampling.stop_token_ids.clone(),
            ignore_eos: sampling.ignore_eos,
            repetition_penalty: Some(sampling.repetition_penalty),
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.iter().map(|(&token, &bias)| (token, bias)).collect(),
            allowed_token_ids: sampling.allowed_token_ids.clone(),
            bad_token_ids: sampling.bad_token_ids.clone(),
            logprobs: sampling.logprobs,
            prompt_logprobs: sampling.prompt_logprobs,
        }
    }
}

impl TryFrom<v1::Sampling> for rollout::Sampling {
    type Error = BadMessage;

    fn try_from(wire: v1::Sampling) -> Result<Self, BadMessage> {
        let sampling = Self {
            temperature: wire.temperature,
            top_k: wire.top_k,
            top_p: wire.top_p,
            min_p: wire.min_p,
            max_tokens: wire.max_tokens,
            min_tokens: wire.min_tokens,
            stop: wire.stop,
            stop_token_ids: wire.stop_token_ids,
            ignore_eos: wire.ignore_eos,
            repetition_penalty: wire.repetition_penalty.unwrap_or(1.0),
            presence_penalty: wire.presence_penalty,
            frequency_penalty: wire.frequency_penalty,
            logit_bias: wire.logit_bias.into_iter().collect(),
            allowed_token_ids: wire.allowed_token_ids,
            bad_token_ids: wire.bad_token_ids,
            logprobs: wire.logprobs,
            prompt_logprobs: wire.prompt_logprobs,
        };
        let problems = sampling.problems();
        if problems.is_empty() {
            Ok(sampling)
        } else {
            Err(BadMessage { field: "sampling", problem: problems.join("; ") })
        }
    }
}

impl From<&RewardSpec> for v1::RewardFunction {
    fn from(spec: &RewardSpec) -> Self {
        let options = if spec.options.is_empty() { String::new() } else { serde_json::json!(spec.options).to_string() };
        Self { name: spec.name().to_owned(), function: spec.function.clone(), options }
    }
}

impl TryFrom<v1::RewardFunction> for RewardSpec {
    type Error = BadMessage;

    fn try_from(wire: v1::RewardFunction) -> Result<Self, BadMessage> {
        let options = match wire.options.as_str() {
            "" => serde_json::Map::new(),
            options => serde_json::from_str(options).map_err(|error| BadMessage {
                field: "rewards",
                problem: format!("options must be a JSON object: {error}"),
            })?,
        };
        Ok(Self { name: Some(wire.name), function: wire.function, options, ..Self::default() })
    }
}

impl From<rollout::Completion> for v1::Completion {
    fn from(completion: rollout::Completion) -> Self {
        Self {
            prompt_id: completion.prompt_id.0,
            sample_index: completion.sample_index,
            token_ids: completion.token_ids,
            logprobs: completion.logprobs,
            spans: completion
                .spans
                .iter()
                .map(|span| v1::Span { version: span.version.0, num_tokens: span.num_tokens })
                .collect(),
            finish_reason: v1::FinishReason::from(completion.finish_reason).into(),
            text: completion.text,
            rewards: completion
                .rewards
                .into_iter()
                .map(|reward| v1::Reward { function: reward.function, score: reward.score, outcome: reward.outcome })
                .collect(),
            raw_logprobs: completion.raw_logprobs.into_iter().map(v1::RawLogprobs::from).collect(),
            prompt_logprobs: completion.prompt_logprobs,
        }
    }
}

impl TryFrom<v1::Completion> for rollout::Completion {
    type Error = BadMessage;

    fn try_from(wire: v1::Completion) -> Result<Self, BadMessage> {
        let finish_reason = wire.finish_reason().try_into()?;
        if wire.token_ids.len() != wire.logprobs.len() {
            let problem = format!("{} for {} tokens", wire.logprobs.len(), wire.token_ids.len());
            return Err(BadMessage { field: "logprobs", problem });
        }
        let covered: u64 = wire.spans.iter().map(|span| u64::from(span.num_tokens)).sum();
        if covered != wire.token_ids.len() as u64 {
            let problem = format!("cover {covered} of {} tokens", wire.token_ids.len());
            return Err(BadMessage { field: "spans", problem });
        }
        if ![0, wire.token_ids.len()].contains(&wire.raw_logprobs.len()) {
            let problem = format!("{} for {} tokens", wire.raw_logprobs.len(), wire.token_ids.len());
            return Err(BadMessage { field: "raw_logprobs", problem });
        }
        Ok(Self {
            prompt_id: PromptId(wire.prompt_id),
            sample_index: wire.sample_index,
            token_ids: wire.token_ids,
            logprobs: wire.logprobs,
            spans: wire
                .spans
                .iter()
                .map(|span| rollout::Span { version: PolicyVersion(span.version), num_tokens: span.num_tokens })
                .collect(),
            finish_reason,
            text: wire.text,
            rewards: wire
                .rewards
                .into_iter()
                .map(|wire| rollout::Reward { function: wire.function, score: wire.score, outcome: wire.outcome })
                .collect(),
            raw_logprobs: wire
                .raw_logprobs
                .into_iter()
                .map(rollout::RawLogprobs::try_from)
                .collect::<Result<_, _>>()?,
            prompt_logprobs: wire.prompt_logprobs,
        })
    }
}

impl From<rollout::RawLogprobs> for v1::RawLogprobs {
    fn from(raw: rollout::RawLogprobs) -> Self {
        let (top_token_ids, top_logprobs) = raw.top.into_iter().unzip();
        Self { logprob: raw.logprob, top_token_ids, top_logprobs }
    }
}

impl TryFrom<v1::RawLogprobs> for rollout::RawLogprobs {
    type Error = BadMessage;

    fn try_from(wire: v1::RawLogprobs) -> Result<Self, BadMessage> {
        if wire.top_token_ids.len() != wire.top_logprobs.len() {
            let problem = format!("{} for {} tokens", wire.top_logprobs.len(), wire.top_token_ids.len());
            return Err(BadMessage { field: "raw_logprobs.top_logprobs", problem });
        }
        Ok(Self { logprob: wire.logprob, top: wire.top_token_ids.into_iter().zip(wire.top_logprobs).collect() })
    }
}

impl From<rollout::FinishReason> for v1::FinishReason {
    fn from(reason: rollout::FinishReason) -> Self {
        match reason {
            rollout::FinishReason::Stop => Self::Stop,
            rollout::FinishReason::Length => Self::Length,
            rollout::FinishReason::Aborted => Self::Aborted,
        }
    }
}

impl TryFrom<v1::FinishReason> for rollout::FinishReason {
    type Error = BadMessage;

    fn try_from(wire: v1::FinishReason) -> Result<Self, BadMessage> {
        match wire {
            v1::FinishReason::Stop => Ok(Self::Stop),
            v1::FinishReason::Length => Ok(Self::Length),
            v1::FinishReason::Aborted => Ok(Self::Aborted),
            v1::FinishReason::Unspecified => Err(BadMessage { field: "finish_reason", problem: "missing".to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completion() -> rollout::Completion {
        rollout::Completion {
            prompt_id: PromptId(7),
            sample_index: 3,
            token_ids: vec![5, 6, 2],
            logprobs: vec![-0.5, -1.25, 0.0],
            spans: vec![
                rollout::Span { version: PolicyVersion(4), num_tokens: 2 },
                rollout::Span { version: PolicyVersion(5), num_tokens: 1 },
            ],
            finish_reason: rollout::FinishReason::Stop,
            text: "a b".to_owned(),
            rewards: vec![rollout::Reward { function: "format".to_owned(), score: 1.0, outcome: "score".to_owned() }],
            raw_logprobs: vec![rollout::RawLogprobs { logprob: -0.25, top: vec![(9, -0.125), (5, -0.25)] }; 3],
            prompt_logprobs: vec![-2.0, -0.5],
        }
    }

    #[test]
    fn completions_and_sampling_survive_the_wire() {
        let wire = v1::Completion::from(completion());
        assert_eq!(rollout::Completion::try_from(wire).unwrap(), completion());
        let sampling = rollout::Sampling {
            stop: vec!["</answer>".to_owned()],
            top_k: 5,
            repetition_penalty: 1.5,
            presence_penalty: -0.5,
            frequency_penalty: 0.25,
            logit_bias: [(3, -100.0), (1, 2.0)].into(),
            allowed_token_ids: vec![1, 3, 4],
            bad_token_ids: vec![4],
            logprobs: 20,
            prompt_logprobs: true,
            ..Default::default()
        };
        assert_eq!(rollout::Sampling::try_from(v1::Sampling::from(&sampling)).unwrap(), sampling);
        let older = v1::Sampling { repetition_penalty: None, ..v1::Sampling::from(&rollout::Sampling::default()) };
        assert_eq!(rollout::Sampling::try_from(older).unwrap(), rollout::Sampling::default());
    }

    #[test]
    fn nonsense_is_refused_by_field() {
        let mut wire = v1::Completion::from(completion());
        wire.spans[0].num_tokens = 9;
        assert_eq!(rollout::Completion::try_from(wire).unwrap_err().field, "spans");
        let mut wire = v1::Completion::from(completion());
        wire.logprobs.pop();
        assert_eq!(rollout::Completion::try_from(wire).unwrap_err().field, "logprobs");
        let mut wire = v1::Completion::from(completion());
        wire.raw_logprobs.pop();
        assert_eq!(rollout::Completion::try_from(wire).unwrap_err().field, "raw_logprobs");
        let mut wire = v1::Completion::from(completion());
        wire.raw_logprobs[1].top_token_ids.pop();
        assert_eq!(rollout::Completion::try_from(wire).unwrap_err().field, "raw_logprobs.top_logprobs");
        assert_eq!(rollout::Sampling::try_from(v1::Sampling::default()).unwrap_err().field, "sampling");
    }
}
