//! What the entropy of tokens has to do with the loss: those of high entropy alone carry the policy loss ("Beyond the 80/20
//! rule", arXiv 2506.01939), and their mean is taken off it.
//!
//! As in TRL, but over all tokens of an update where TRL looks at one micro-batch at a time.

use aha_core::batch::TrainSequence;
use aha_core::config::Train;
use aha_nn::comm::{CommError, ProcessGroup, ReduceOp};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::torch::learner::{Learner, StepOutput};
use crate::training_batch::{Plan, TrainingBatch};

/// Entropies this close are equal, in nats. The completions of a prompt share the context of their first token, whose
/// entropies differ by rounding alone: without this, how sequences are packed would decide which of them count.
const TIE: f32 = 1e-5;

/// The weight of the mean entropy, and how it follows the entropy (`train.use_adaptive_entropy`): what a run remembers of it
/// from update to update.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EntropyControl {
    pub entropy_coef: f32,
    /// Mean over the tokens that counted in the last update, in nats; none before the first.
    pub last_entropy: Option<f64>,
}

impl EntropyControl {
    /// Before the first update.
    #[must_use]
    pub fn new(train: &Train) -> Self {
        Self { entropy_coef: train.entropy_coef, last_entropy: None }
    }

    /// The weight in the next update.
    #[must_use]
    pub fn weight(&self, train: &Train) -> f32 {
        let is_low = |entropy: f64| entropy <= f64::from(train.entropy_target);
        if train.use_adaptive_entropy && !self.last_entropy.is_some_and(is_low) { 0.0 } else { self.entropy_coef }
    }

    /// Takes note of the mean entropy in an update. One that is not finite, in an update that is left out, changes nothing.
    pub fn follow(&mut self, train: &Train, entropy: f64) {
        if !train.use_adaptive_entropy || !entropy.is_finite() {
            return;
        }
        let is_low = entropy <= f64::from(train.entropy_target);
        let moved = self.entropy_coef + if is_low { train.entropy_coef_delta } else { -train.entropy_coef_delta };
        self.entropy_coef = moved.clamp(train.entropy_coef_min, train.entropy_coef_max);
        self.last_entropy = Some(entropy);
    }
}

/// Mean over all ranks' tokens of what their steps of one update say. All ranks call this together.
///
/// # Errors
/// If the reduction fails.
pub(crate) fn mean_entropy(group: &ProcessGroup, output: &StepOutput) -> Result<f64, CommError> {
    let mut sums = Tensor::from_slice(&[output.entropy_sum, output.num_tokens as f64]).to_device(group.device());
    group.all_reduce(&mut sums, ReduceOp::Sum)?;
    Ok(sums.double_value(&[0]) / sums.double_value(&[1]).max(1.0))
}

/// Fills `policy_mask` and `entropy_weights` of this rank's sequences of one update, a plan and its index, with `weight` for
/// the mean entropy. With neither `train.top_entropy_quantile` under 1 nor an entropy bonus it does nothing.
///
/// Returns the mean entropy of the tokens that count where not all do.
///
/// # Errors
/// If the ranks cannot exchange their entropies.
pub(crate) fn weigh(
    learner: &Learner,
    (train, weight): (&Train, f32),
    batch: &mut TrainingBatch,
    (plan, index): (&Plan, usize),
) -> Result<Option<f64>, CommError> {
    let own: Vec<usize> = plan.micro_batches.concat();
    let mut num_counted: usize =
        batch.updates[index].iter().map(|&index| batch.sequences[index].num_completion_tokens()).sum();
    let mut mean = None;
    if train.top_entropy_quantile < 1.0 {
        let entropies = learner.statistics(&plan.of(&batch.sequences))?.entropies;
        let flat: Vec<u8> =
            own.iter().flat_map(|&index| &entropies[index]).flat_map(|value| value.to_le_bytes()).collect();
        let everyone = learner.zero().group().all_gather_bytes(&flat)?.concat();
        let (values, _) = everyone.as_chunks::<4>();
        let all: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let counted = fill_masks(train, &mut batch.sequences, &entropies, &all);
        num_counted = counted.num;
        mean = Some(counted.mean());
    }
    if train.has_entropy_bonus() {
        fill_weights(weight, &own, num_counted, &mut batch.sequences);
    }
    Ok(mean)
}

/// Tokens of high entropy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Counted {
    pub(crate) num: usize,
    pub(crate) entropy_sum: f64,
}

impl Counted {
    pub(crate) fn mean(self) -> f64 {
        self.entropy_sum / self.num.max(1) as f64
    }
}

/// Masks the tokens of low entropy of every sequence whose entropies are given; returns what is left of `all`.
pub(crate) fn fill_masks(
    train: &Train,
    sequences: &mut [TrainSequence],
    entropies: &[Vec<f32>],
    all: &[f32],
) -> Counted {
    let threshold = quantile(all, 1.0 - train.top_entropy_quantile) - TIE;
    for (sequence, entropies) in sequences.iter_mut().zip(entropies) {
        sequence.policy_mask = mask(entropies, threshold);
    }
    let counted = all.iter().filter(|&&entropy| entropy >= threshold);
    Counted { num: counted.clone().count(), entropy_sum: counted.map(|&entropy| f64::from(entropy)).sum() }
}

/// Gives the tokens that the policy loss of these sequences counts equal weights, whose sum over `num_counted` is `weight`;
/// none where that is 0.
pub(crate) fn fill_weights(weight: f32, indices: &[usize], num_counted: usize, sequences: &mut [TrainSequence]) {
    let weight = weight / num_counted.max(1) as f32;
    for &index in indices {
        let sequence = &mut sequences[index];
        sequence.entropy_weights = if weight == 0.0 {
            Vec::new()
        } else if sequence.policy_mask.is_empty() {
            vec![weight; sequence.num_completion_tokens()]
        } else {
            sequence.policy_mask.iter().map(|mask| mask * weight).collect()
        };
    }
}

/// 1 where the entropy is at least `threshold`.
fn mask(entropies: &[f32], threshold: f32) -> Vec<f32> {
    entropies.iter().map(|&entropy| f32::from(u8::from(entropy >= threshold))).collect()
}

/// The value below which a share `q` of the values lies, between two of them along a line: `torch.quantile`. 0 for none.
fn quantile(values: &[f32], q: f32) -> f32 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f32::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let rank = q * last as f32;
    let (low, high) = (sorted[(rank.floor() as usize).min(last)], sorted[(rank.ceil() as usize).min(last)]);
    low + (rank - rank.floor()) * (high - low)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected values: torch.quantile.
    #[test]
    fn quantiles_are_torch_s() {
        let values = [3.0, 1.0, 2.0, 5.0];
        for (q, expect) in [(0.0, 1.0), (0.5, 2.5), (0.8, 3.8), (1.0, 5.0)] {
            assert!((quantile(&values, q) - expect).abs() < 1e-6, "{q}");
        }
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn a_mask_keeps_the_highest_and_a_tie_with_the_bound() {
        let entropies = [0.5, 2.0, 0.1, 2.0, 1.0];
        assert_eq!(mask(&entropies, quantile(&entropies, 0.75)), [0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_eq!(mask(&entropies, quantile(&entropies, 1.0)), [0.0, 1.0, 0.0, 1.0, 0.0]);
    }
}
