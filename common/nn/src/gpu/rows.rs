//! What a step of the GPU computes, as plain data, and how much of it there may be.

use crate::kernels::cpu::SamplingParams;

/// Most stop tokens of a row.
pub const MAX_STOPS: usize = 16;

/// What memory is set aside for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuSizes {
    /// Tokens of a cache block, a multiple of 16.
    pub block_size: usize,
    pub num_blocks: usize,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Most sequences of a step.
    pub max_num_seqs: usize,
    /// Most rows of a step with prompts.
    pub max_num_batched_tokens: usize,
    /// Most tokens that a row samples in one look.
    pub steps_per_look: usize,
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// At least 1.
    pub tokens: &'a [u32],
    /// Position of the first.
    pub start: usize,
    /// Covers the tokens.
    pub block_table: &'a [u32],
    pub choice: Choice<'a>,
}

/// What becomes of the logits of a chunk's last token.
#[derive(Debug, Clone, Copy)]
pub enum Choice<'a> {
    Nothing,
    /// A token is sampled, none of `suppress` (at most [`MAX_STOPS`]).
    Sample {
        params: SamplingParams,
        uniform: f32,
        suppress: &'a [u32],
    },
    /// The caller gets them.
    Logits,
}

/// A sequence that samples tokens one after the other.
#[derive(Debug, Clone, Copy)]
pub struct DecodeRow<'a> {
    pub token: u32,
    /// Of `token`.
    pub position: usize,
    /// Covers all tokens that are computed: `token`, and all that are sampled but the last.
    pub block_table: &'a [u32],
    pub params: SamplingParams,
    /// Of the first token that is sampled; those that follow are drawn from (seed, sample index, index).
    pub uniform: f32,
    /// Tokens to sample, unless a stop token comes before. At least 1.
    pub num_tokens: usize,
    pub seed: u64,
    pub sample_index: u32,
    /// Tokens sampled before.
    pub num_generated: u32,
    /// Stop tokens are suppressed before so many were sampled, and end the row after.
    pub min_tokens: u32,
    /// At most [`MAX_STOPS`].
    pub stops: &'a [u32],
}

/// How many rows the graph for `num_rows` has.
pub(super) fn bucket(num_rows: usize) -> usize {
    match num_rows {
        0..=8 => num_rows.next_power_of_two(),
        9..=64 => num_rows.next_multiple_of(8),
        65..=256 => num_rows.next_multiple_of(16),
        _ => num_rows.next_multiple_of(32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_their_rows_and_are_few() {
        let mut buckets: Vec<usize> = (1..=512).map(bucket).collect();
        assert!(buckets.iter().zip(1..).all(|(bucket, num_rows)| *bucket >= num_rows && *bucket < num_rows * 2));
        buckets.dedup();
        assert!(buckets.is_sorted() && buckets.len() == 4 + 7 + 12 + 8, "{buckets:?}");
        assert!(buckets.iter().all(|&num_rows| bucket(num_rows) == num_rows));
    }
}
