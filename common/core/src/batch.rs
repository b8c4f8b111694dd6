//! What a step consumes: sequences as per-token streams. Nothing here knows which algorithm filled them.

use serde::{Deserialize, Serialize};

use crate::ids::TokenId;

/// One sequence to train on: a prompt that gives context and a completion that carries the loss.
///
/// The streams have one value a completion token, `[T - num_prompt_tokens]`, or are empty where they are not needed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrainSequence {
    /// `[T]`, prompt and completion.
    pub token_ids: Vec<TokenId>,
    /// The completion is `token_ids[num_prompt_tokens..]`; at least 1.
    pub num_prompt_tokens: usize,
    /// Share of each token in the loss of the whole step; 0 masks it. Never empty.
    pub weights: Vec<f32>,
    pub advantages: Vec<f32>,
    /// Log-probs that the ratio is taken against; empty for a policy that has not moved since it sampled, whose ratio
    /// is 1.
    pub old_logprobs: Vec<f32>,
    /// Log-probs that the generator sampled the tokens with; for objectives that correct for its differences.
    pub sampled_logprobs: Vec<f32>,
    /// 1 for tokens that the policy loss counts, 0 for those that it leaves out; empty where it counts all.
    pub policy_mask: Vec<f32>,
    /// What each token's entropy takes off the loss.
    pub entropy_weights: Vec<f32>,
}

impl TrainSequence {
    #[must_use]
    pub fn num_completion_tokens(&self) -> usize {
        self.token_ids.len() - self.num_prompt_tokens
    }
}

/// What a token's loss is, and how the losses of tokens become one number. Names as in TRL's `GRPOConfig.loss_type`,
/// whose default this is, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// Clipped ratio; mean over sequences of the mean over their tokens (arXiv 2402.03300).
    Grpo,
    /// Clipped ratio; sum over tokens, divided by sequences x max_completion_length (Dr. GRPO, arXiv 2503.20783).
    DrGrpo,
    /// Clipped ratio; mean over all tokens of the step (DAPO, arXiv 2503.14476).
    #[default]
    Dapo,
    /// Clipped ratio; mean over local batches of `bnpo_batch_size` sequences of the mean over their tokens (BNPO, arXiv
    /// 2506.02864).
    Bnpo,
    /// Clipped ratio; mean over sequences of the sum over their tokens, for ratios of sequences (LUSPO, arXiv
    /// 2602.05261).
    Luspo,
    /// The ratio, clipped above at `epsilon_high` and without gradient, times the log-prob; mean over all tokens of the
    /// step (CISPO, arXiv 2506.13585).
    Cispo,
    /// A sigmoid of the ratio in place of the clip; mean over sequences of the mean over their tokens (SAPO, arXiv
    /// 2511.20347).
    Sapo,
    /// A gamma weight of the sequence's ratio, without gradient, times the log-prob; mean over all tokens of the step
    /// (VESPO, arXiv 2602.10693).
    Vespo,
}

/// The weight of the tokens of every sequence of a batch.
///
/// With them, losses of tokens add up to the loss of the whole batch, whichever rank and micro-batch they are in. For
/// `bnpo` a local batch is `bnpo_batch_size` sequences in their order, and not what happens to lie in one micro-batch.
///
/// # Shapes
/// - num_tokens: `[B]`, completion tokens of every sequence of the batch, over all ranks, 0 for one that is masked;
///   returns `[B]`.
#[must_use]
pub fn token_weights(
    loss_type: LossType,
    num_tokens: &[usize],
    max_completion_length: usize,
    bnpo_batch_size: usize,
) -> Vec<f32> {
    let num_sequences = num_tokens.len() as f64;
    let total: usize = num_tokens.iter().sum();
    let local_batches: Vec<usize> =
        num_tokens.chunks(bnpo_batch_size.max(1)).map(|lengths| lengths.iter().sum()).collect();
    num_tokens
        .iter()
        .enumerate()
        .map(|(index, &length)| match loss_type {
            LossType::Grpo | LossType::Sapo => 1.0 / (num_sequences * length.max(1) as f64),
            LossType::DrGrpo => 1.0 / (num_sequences * max_completion_length as f64),
            LossType::Dapo | LossType::Cispo | LossType::Vespo => 1.0 / total.max(1) as f64,
            LossType::Luspo => 1.0 / num_sequences,
            LossType::Bnpo => {
                let local = local_batches[index / bnpo_batch_size.max(1)];
                1.0 / (local_batches.len() as f64 * local.max(1) as f64)
            }
        })
        .map(|weight| weight as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(loss_type: LossType, num_tokens: &[usize], expect: &[f32]) {
        assert_eq!(token_weights(loss_type, num_tokens, 8, 2), expect);
    }

    #[test]
    fn weights_follow_the_definitions() {
        for loss_type in [LossType::Grpo, LossType::Sapo] {
            check(loss_type, &[2, 4], &[0.25, 0.125]);
        }
        for loss_type in [LossType::Dapo, LossType::Cispo, LossType::Vespo] {
            check(loss_type, &[2, 6], &[0.125, 0.125]);
        }
        check(LossType::DrGrpo, &[2, 4], &[0.0625, 0.0625]);
        check(LossType::Luspo, &[2, 4], &[0.5, 0.5]);
        check(LossType::Bnpo, &[2, 6, 4], &[0.0625, 0.0625, 0.125]);
    }

    #[test]
    fn masked_sequences_count_as_sequences_but_not_as_tokens() {
        check(LossType::Grpo, &[0, 4], &[0.5, 0.125]);
        check(LossType::Dapo, &[0, 4], &[0.25, 0.25]);
        check(LossType::Bnpo, &[0, 4], &[0.25, 0.25]);
        check(LossType::Dapo, &[0, 0], &[1.0, 1.0]);
    }
}
