//! What the engine says of itself.

use std::ops::Sub;
use std::time::Duration;

use aha_core::ids::PolicyVersion;

/// A moment of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineStatus {
    /// Of the serving weights.
    pub version: PolicyVersion,
    pub activity: Activity,
    /// Sequences that hold blocks of the KV cache.
    pub num_running: usize,
    /// Sequences that wait for blocks or for a place in the batch.
    pub num_waiting: usize,
    /// Blocks that sequences hold.
    pub used_blocks: usize,
    /// Blocks that no sequence holds, and whose keys and values are kept until the blocks are needed.
    pub cached_blocks: usize,
    pub total_blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Longest sequence that is taken, in tokens.
    pub max_model_len: usize,
    pub counters: Counters,
    pub times: StepTimes,
}

/// Whether the engine takes steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// It does, as long as there is work.
    Serving,
    Paused,
    /// Paused, with the KV cache released.
    Asleep,
}

/// Since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    pub steps: u64,
    /// Sequences that lost their blocks and were computed again: for want of blocks, by a swap or by sleep.
    pub preemptions: u64,
    /// Tokens prefilled; what is computed again after a preemption counts again.
    pub prompt_tokens: u64,
    /// Tokens that sequences had when they were given blocks, those that come back after a preemption included.
    pub prefix_cache_queries: u64,
    /// Of those, tokens whose keys and values were there already. Both stay 0 without prefix caching.
    pub prefix_cache_hits: u64,
    /// Tokens sampled.
    pub generation_tokens: u64,
    /// Of those, dropped because a stop string had been completed before them.
    pub dropped_tokens: u64,
}

/// Where the time of the steps went since the start. What is missing to the whole are small operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepTimes {
    /// Matrix products.
    pub gemm: Duration,
    /// Attention, with writing keys and values.
    pub attention: Duration,
    /// From logits to tokens.
    pub sampling: Duration,
    /// Choosing what a step computes, and taking note of what came out.
    pub scheduling: Duration,
}

impl Sub for StepTimes {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            gemm: self.gemm - earlier.gemm,
            attention: self.attention - earlier.attention,
            sampling: self.sampling - earlier.sampling,
            scheduling: self.scheduling - earlier.scheduling,
        }
    }
}
