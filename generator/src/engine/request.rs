//! What the engine is asked for, and what it tells of it while it works.

use std::fmt;
use std::time::Instant;

use aha_core::ids::{PolicyVersion, PromptId, TokenId};
use aha_core::rollout::{FinishReason, RawLogprobs, Sampling};
use tokio::sync::mpsc;

/// Names a request inside the engine. The caller chooses it, unique among the requests in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey(pub u64);

impl fmt::Display for RequestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {}", self.0)
    }
}

/// Samples of one prompt. Dropping the receiver of `events` aborts it.
#[derive(Debug)]
pub struct Request {
    pub key: RequestKey,
    /// For log lines.
    pub prompt_id: PromptId,
    /// At least 1 token.
    pub prompt: Vec<TokenId>,
    /// Which samples of the group are wanted: at least 1, none twice. A completion depends on
    /// (weights, prompt, seed, sample index) alone.
    pub sample_indices: Vec<u32>,
    pub sampling: Sampling,
    pub seed: u64,
    /// What is unfinished by then is aborted.
    pub deadline: Instant,
    /// Made with a capacity of [`Request::events_capacity`], so that the engine never waits for a slow client.
    pub events: mpsc::Sender<TokenEvent>,
}

impl Request {
    /// Events that a request can have at most.
    #[must_use]
    pub fn events_capacity(num_samples: usize, max_tokens: u32) -> usize {
        num_samples * (max_tokens as usize + 2)
    }
}

/// Progress of one sample. The channel closes after the last sample's last event; if it closes earlier, the engine
/// has failed.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// A token was sampled; the last one of a sample says why it ended.
    Token {
        sample_index: u32,
        token: TokenId,
        /// Under the distribution that the token was sampled from.
        logprob: f32,
        /// Where the request asks for them.
        raw: Option<Box<RawLogprobs>>,
        /// Of the weights that sampled it.
        version: PolicyVersion,
        finish: Option<FinishReason>,
    },
    /// The sample ended without another token: by an abort or by its deadline.
    Aborted { sample_index: u32 },
}

impl TokenEvent {
    #[must_use]
    pub fn sample_index(&self) -> u32 {
        match *self {
            Self::Token { sample_index, .. } | Self::Aborted { sample_index } => sample_index,
        }
    }

    /// Why the sample ended with this event, if it did.
    #[must_use]
    pub fn finish(&self) -> Option<FinishReason> {
        match *self {
            Self::Token { finish, .. } => finish,
            Self::Aborted { .. } => Some(FinishReason::Aborted),
        }
    }
}

/// Why a request is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "{prompt_tokens} prompt tokens and max_tokens {max_tokens} are over the longest sequence of {max_model_len} tokens"
    )]
    OverModelLen { prompt_tokens: usize, max_tokens: usize, max_model_len: usize },
    #[error(
        "{num_tokens} tokens need {needed} blocks of the KV cache, which has {total}: raise generator.kv_cache_mib or \
         shorten the sequence"
    )]
    OverCache { num_tokens: usize, needed: usize, total: usize },
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    #[error("max_tokens is 0")]
    NoTokensWanted,
    #[error("no sample is asked for")]
    NoSamples,
    #[error("sample {0} is asked for twice")]
    DuplicateSample(u32),
    #[error("{0} is in flight already")]
    DuplicateKey(RequestKey),
    #[error("the event channel holds {capacity} events, and the request may have {needed}")]
    SmallChannel { capacity: usize, needed: usize },
}
