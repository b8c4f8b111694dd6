//! One engine step, as the scheduler hands it to the runner: token ids and block numbers, nothing else.
//!
//! A step is one look of the host. Where every item decodes it may ask for several tokens an item ([`Ahead`]), so that
//! a GPU need not wait for the host after each.

use std::sync::Arc;

use aha_core::ids::TokenId;
use aha_core::rollout::{RawLogprobs, Sampling};

use super::block_manager::{BlockCopy, BlockId};
use super::stats::StepTimes;

/// The work of one step. Items are in no relation to each other: the result of one depends on its own tokens and on
/// the keys and values under its own block table.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepBatch {
    /// To be performed before anything else, in this order.
    pub copies: Vec<BlockCopy>,
    /// Sequences that decode come first, then chunks of prompts.
    pub items: Vec<BatchItem>,
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchItem {
    /// At least 1.
    pub tokens: Vec<TokenId>,
    /// Position of the first of `tokens`; keys and values of all positions before it are in the cache.
    pub start: usize,
    /// Blocks of the sequence: position `p` is slot `p % block_size` of `block_table[p / block_size]`. Covers `tokens`.
    pub block_table: Vec<BlockId>,
    /// Sample the token that follows the last of `tokens`. None while a prompt is not computed to its end.
    pub choose: Option<Choose>,
}

impl BatchItem {
    /// Tokens to be sampled, unless the sequence ends before.
    #[must_use]
    pub fn num_to_sample(&self) -> usize {
        self.choose.as_ref().map_or(0, |choose| choose.ahead.as_ref().map_or(1, |ahead| ahead.num_tokens))
    }
}

/// How to sample one token.
#[derive(Debug, Clone, PartialEq)]
pub struct Choose {
    /// `allowed_token_ids` is ascending, none twice.
    pub sampling: Arc<Sampling>,
    /// In [0, 1): the randomness of this token, a function of (seed, sample index, position) alone.
    pub uniform: f32,
    /// Tokens that must not be sampled: those that end a completion, while it is under `min_tokens`; else empty.
    pub suppress: Arc<[TokenId]>,
    /// Tokens that penalties concern, ascending, with the times that they are in the completion; empty without any.
    pub counts: Vec<(TokenId, u32)>,
    /// Set where tokens after this one are sampled in the same look.
    pub ahead: Option<Ahead>,
}

/// How a sequence goes on by itself: each token that is sampled is computed, and the next one sampled from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Ahead {
    /// Tokens to be sampled, the first one included: fewer only if the sequence ends by a stop token. At least 2, at most
    /// what `max_tokens` leaves. The block table covers all of them but the last.
    pub num_tokens: usize,
    pub seed: u64,
    pub sample_index: u32,
    /// Position of the first of them in the completion.
    pub num_generated: u32,
    /// Tokens that end the sequence once it has more than `min_tokens`, and are suppressed before; at most
    /// [`Ahead::MAX_STOPS`].
    pub stop_token_ids: Arc<[TokenId]>,
}

impl Ahead {
    /// So that a runner can set memory aside. Sequences with more stop tokens go on one by one.
    pub const MAX_STOPS: usize = 16;
}

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    pub token: TokenId,
    /// Under the distribution that it was sampled from.
    pub logprob: f32,
    /// Where the request asks for them.
    pub raw: Option<Box<RawLogprobs>>,
}

/// Who computes steps: the owner of the weights and of the KV cache. Lives on the engine thread.
pub trait Runner {
    /// A set of weights, ready to serve.
    type Staged: Send + 'static;

    /// Performs the copies, computes every item and samples where asked. For each item with `choose`, in their order,
    /// come one [`Sampled`], or as many as its [`Ahead`] says.
    ///
    /// # Errors
    /// Any error is final: the engine ends with it.
    fn run(&mut self, batch: &StepBatch) -> anyhow::Result<Vec<Sampled>>;

    /// Log-probs of `tokens[1..]` given those before, at temperature 1. `block_table` covers `tokens`, holds nothing and
    /// is free again afterwards.
    ///
    /// # Errors
    /// Any error is final: the engine ends with it.
    fn score(&mut self, tokens: &[TokenId], block_table: &[BlockId]) -> anyhow::Result<Vec<f32>>;

    /// Where the time of its steps went: all but scheduling.
    fn times(&self) -> StepTimes;

    /// Whether there are weights to take steps with. Where there are none at the start, there is no cache either.
    fn has_weights(&self) -> bool;

    /// Puts weights in place, between two steps, and gives a set of any content back: memory for the next push.
    ///
    /// # Errors
    /// Any error is final, as for the two that follow.
    fn swap(&mut self, staged: Self::Staged) -> anyhow::Result<Option<Self::Staged>>;

    /// Gives the memory of the weights back. No step runs before [`Runner::swap`] has put others in place.
    ///
    /// # Errors
    /// If the device fails.
    fn release_weights(&mut self) -> anyhow::Result<()>;

    /// Gives the memory of the KV cache back. No step runs before [`Runner::restore_cache`].
    ///
    /// # Errors
    /// If the device fails.
    fn release_cache(&mut self) -> anyhow::Result<()>;

    /// Takes the memory of the KV cache again; what it held is gone.
    ///
    /// # Errors
    /// If there is not enough memory.
    fn restore_cache(&mut self) -> anyhow::Result<()>;
}
