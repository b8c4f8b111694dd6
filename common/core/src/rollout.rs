//! Prompts, completions and groups: what the generator and the trainer exchange.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{PolicyVersion, PromptId, TokenId};
use crate::reward::Outcome;

/// A prompt ready for generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    pub id: PromptId,
    /// The rendered text, for people and logs only: generation starts from `token_ids`.
    pub text: String,
    pub token_ids: Vec<TokenId>,
    /// What reward functions may read: the data set's columns.
    pub columns: serde_json::Map<String, serde_json::Value>,
    pub origin: Origin,
}

/// Which of several sources a prompt is from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Origin {
    /// Empty where there is one source only.
    pub source: String,
    /// Names of the rewards that score its completions; `None` is all.
    pub rewards: Option<Vec<String>>,
}

impl Origin {
    /// Whether the reward of this name scores its completions.
    #[must_use]
    pub fn asks_for(&self, reward: &str) -> bool {
        self.rewards.as_ref().is_none_or(|names| names.iter().any(|name| name == reward))
    }
}

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Most tokens of a completion.
    pub max_tokens: u32,
    /// No end-of-sequence, stop token or stop string counts before this many tokens.
    pub min_tokens: u32,
    /// A completion ends with the token that completes one of these; the text keeps it.
    pub stop: Vec<String>,
    /// A completion ends with one of these tokens, beside the model's own end-of-sequence tokens.
    pub stop_token_ids: Vec<TokenId>,
    /// Generate to `max_tokens` whatever the model says; for measurements.
    pub ignore_eos: bool,
    /// Divides the positive logits of tokens in prompt and completion, and multiplies their other ones; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the completion.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token as often as it is in the completion.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, before the penalties.
    pub logit_bias: BTreeMap<TokenId, f32>,
    /// Nothing else is sampled, not even an end-of-sequence token; empty allows all.
    pub allowed_token_ids: Vec<TokenId>,
    /// Never sampled.
    pub bad_token_ids: Vec<TokenId>,
    /// Report [`RawLogprobs`] with this many of the most likely tokens; 0 reports none.
    pub logprobs: u32,
    /// Report the log-probs of the prompt's tokens.
    pub prompt_logprobs: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_tokens: 512,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            allowed_token_ids: Vec::new(),
            bad_token_ids: Vec::new(),
            logprobs: 0,
            prompt_logprobs: false,
        }
    }
}

impl Sampling {
    /// Every value that is out of range, by field name.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, problem: String| {
            if !ok {
                problems.push(problem);
            }
        };
        let Self { temperature, top_p, min_p, max_tokens, min_tokens, .. } = self;
        let in_range = temperature.is_finite() && *temperature >= 0.0;
        check(in_range, format!("temperature must be a finite number >= 0, got {temperature}"));
        check(*top_p > 0.0 && *top_p <= 1.0, format!("top_p must be in (0, 1], got {top_p}"));
        check((0.0..=1.0).contains(min_p), format!("min_p must be in [0, 1], got {min_p}"));
        check(*max_tokens > 0, "max_tokens must be at least 1".to_owned());
        check(min_tokens <= max_tokens, format!("min_tokens ({min_tokens}) is over max_tokens ({max_tokens})"));
        check(self.stop.len() <= MAX_STOPS, format!("at most {MAX_STOPS} stop strings, got {}", self.stop.len()));
        if let Some(len) = self.stop.iter().map(String::len).find(|len| !(1..=MAX_STOP_BYTES).contains(len)) {
            check(false, format!("a stop string must have 1 to {MAX_STOP_BYTES} bytes, got {len}"));
        }
        let penalty = self.repetition_penalty;
        let in_range = penalty.is_finite() && penalty > 0.0;
        check(in_range, format!("repetition_penalty must be a finite number > 0, got {penalty}"));
        for (name, penalty) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            check((-2.0..=2.0).contains(&penalty), format!("{name} must be in [-2, 2], got {penalty}"));
        }
        if let Some((token, bias)) = self.logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
            check(false, format!("logit_bias of token {token} must be a finite number, got {bias}"));
        }
        check(self.logprobs <= MAX_LOGPROBS, format!("logprobs must be at most {MAX_LOGPROBS}, got {}", self.logprobs));
        problems
    }

    /// Whether the model's logits are changed before a token is sampled, beside by `min_tokens`.
    #[must_use]
    pub fn edits_logits(&self) -> bool {
        let lists_are_empty = self.allowed_token_ids.is_empty() && self.bad_token_ids.is_empty();
        self.has_penalties() || !self.logit_bias.is_empty() || !lists_are_empty
    }

    /// Whether what was sampled changes what is sampled next, beside by the model.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

const MAX_STOPS: usize = 64;
/// Every new token is searched for each of them.
const MAX_STOP_BYTES: usize = 1024;
/// vLLM's limit, too.
const MAX_LOGPROBS: u32 = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-sequence token, stop token or stop string.
    Stop,
    /// `max_tokens` or the model's context ended it: the completion is truncated.
    Length,
    /// The request was cancelled.
    Aborted,
}

/// A run of tokens sampled under one policy version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    pub version: PolicyVersion,
    pub num_tokens: u32,
}

/// What one reward function made of one completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reward {
    pub function: String,
    pub score: f32,
    /// `score`, or why there is none: `wrong`, `unparsable`, `timeout`, `crash`.
    pub outcome: String,
}

impl Reward {
    #[must_use]
    pub fn new(function: &str, outcome: Outcome) -> Self {
        Self { function: function.to_owned(), score: outcome.score(), outcome: outcome.name().to_owned() }
    }

    /// Whether the score means anything: the judge came to an end, and in time.
    #[must_use]
    pub fn is_verdict(&self) -> bool {
        [Outcome::Timeout, Outcome::Crash].iter().all(|outcome| outcome.name() != self.outcome)
    }
}

/// Log-probs of the model itself where a token was sampled: before penalties, bias, temperature and restrictions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RawLogprobs {
    /// Of the sampled token.
    pub logprob: f32,
    /// Of the most likely tokens, most likely first.
    pub top: Vec<(TokenId, f32)>,
}

/// One sampled answer to a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    pub prompt_id: PromptId,
    /// Position within its group, `0..G`.
    pub sample_index: u32,
    pub token_ids: Vec<TokenId>,
    /// `[T]`, log-prob of every token under the distribution that it was sampled from.
    pub logprobs: Vec<f32>,
    /// Cover `token_ids` in order.
    pub spans: Vec<Span>,
    pub finish_reason: FinishReason,
    /// For rewards and people only.
    pub text: String,
    pub rewards: Vec<Reward>,
    /// `[T]` where [`Sampling::logprobs`] asks for them, else empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub raw_logprobs: Vec<RawLogprobs>,
    /// `[P - 1]` where [`Sampling::prompt_logprobs`] asks for them, else empty: log-probs of the prompt's tokens after
    /// the first under the weights that served when the request came.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prompt_logprobs: Vec<f32>,
}

impl Completion {
    /// Whether every reward function has come to a verdict; what has not been judged is not trained on.
    #[must_use]
    pub fn is_judged(&self) -> bool {
        self.rewards.iter().all(Reward::is_verdict)
    }
}

/// A prompt with its `G` completions, in the order of their sample index.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    pub prompt: Prompt,
    pub completions: Vec<Completion>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bad_sampling_value_is_named() {
        assert!(Sampling::default().problems().is_empty());
        let bad = Sampling {
            temperature: f32::NAN,
            top_p: 0.0,
            min_p: 2.0,
            max_tokens: 0,
            stop: vec!["x".to_owned(); 1_000_000],
            repetition_penalty: 0.0,
            presence_penalty: f32::NAN,
            frequency_penalty: 2.1,
            logit_bias: BTreeMap::from([(5, 1.0), (6, f32::INFINITY)]),
            logprobs: 21,
            ..Sampling::default()
        };
        let problems = bad.problems();
        let named = [
            "temperature",
            "top_p",
            "min_p",
            "max_tokens",
            "64 stop strings, got 1000000",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias of token 6",
            "logprobs",
        ];
        assert_eq!(problems.len(), named.len(), "{problems:?}");
        for (problem, name) in problems.iter().zip(named) {
            assert!(problem.contains(name), "no {name:?} in {problem}");
        }
        for stop in [String::new(), "x".repeat(1025)] {
            let expect = format!("a stop string must have 1 to 1024 bytes, got {}", stop.len());
            assert_eq!(Sampling { stop: vec!["</a>".to_owned(), stop], ..Sampling::default() }.problems(), [expect]);
        }
        for repetition_penalty in [-1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(Sampling { repetition_penalty, ..Sampling::default() }.problems().len(), 1);
        }
    }
}
