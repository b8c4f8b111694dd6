//! One engine step, as the scheduler hands it to the runner: token ids and block numbers, nothing else.

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

    /// Performs the copies, computes every item and samples where asked: one [`Sampled`] for each item with `choose`,
    /// in their order.
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

    /// Puts weights in place, between two steps, and gives back those that served: memory for the next push.
    fn swap(&mut self, staged: Self::Staged) -> Self::Staged;

    /// Gives the memory of the KV cache back. No step runs before [`Runner::restore_cache`].
    fn release_cache(&mut self);

    /// Takes the memory of the KV cache again; what it held is gone.
    ///
    /// # Errors
    /// If there is not enough memory; the engine ends with it.
    fn restore_cache(&mut self) -> anyhow::Result<()>;
}
