//! What a step consumes: sequences as per-token streams. Nothing here knows which algorithm filled them.

use serde::{Deserialize, Serialize};

use crate::ids::TokenId;

/// One sequence to train on: a prompt that gives context and a completion that carries the loss.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrainSequence {
    /// `[T]`, prompt and completion.
    pub token_ids: Vec<TokenId>,
    /// The completion is `token_ids[num_prompt_tokens..]`; at least 1.
    pub num_prompt_tokens: usize,
    /// `[T - num_prompt_tokens]`, share of each completion token in the loss of the whole step; 0 masks it.
    pub weights: Vec<f32>,
    /// `[T - num_prompt_tokens]`; empty where the objective needs none.
    pub advantages: Vec<f32>,
    /// `[T - num_prompt_tokens]`, log-probs that the ratio is taken against; empty for a policy that has not moved
    /// since it sampled, whose ratio is 1.
    pub old_logprobs: Vec<f32>,
}

impl TrainSequence {
    #[must_use]
    pub fn num_completion_tokens(&self) -> usize {
        self.token_ids.len() - self.num_prompt_tokens
    }
}

/// How the losses of tokens become one number. Names as in TRL's `GRPOConfig.loss_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// Mean over sequences of the mean over their tokens (arXiv 2402.03300).
    Grpo,
    /// Sum over tokens, divided by sequences x max_completion_length (Dr. GRPO, arXiv 2503.20783).
    DrGrpo,
    /// Mean over all tokens of the step (DAPO, arXiv 2503.14476).
    #[default]
    Dapo,
}

/// The weight of every token of a sequence, given the completion lengths of the whole step.
///
/// # Shapes
/// - num_tokens: `[B]`, completion tokens of every sequence of the step, over all ranks; returns `[B]`.
#[must_use]
pub fn token_weights(loss_type: LossType, num_tokens: &[usize], max_completion_length: usize) -> Vec<f32> {
    let num_sequences = num_tokens.len() as f64;
    let total: usize = num_tokens.iter().sum();
    num_tokens
        .iter()
        .map(|&length| match loss_type {
            LossType::Grpo => 1.0 / (num_sequences * length.max(1) as f64),
            LossType::DrGrpo => 1.0 / (num_sequences * max_completion_length as f64),
            LossType::Dapo => 1.0 / total.max(1) as f64,
        })
        .map(|weight| weight as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_follow_the_definitions() {
        assert_eq!(token_weights(LossType::Grpo, &[2, 4], 8), [0.25, 0.125]);
        assert_eq!(token_weights(LossType::DrGrpo, &[2, 4], 8), [0.0625, 0.0625]);
        assert_eq!(token_weights(LossType::Dapo, &[2, 6], 8), [0.125, 0.125]);
    }
}
