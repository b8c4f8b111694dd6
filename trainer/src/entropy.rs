//! What the entropy of tokens has to do with the loss: those of high entropy alone carry the policy loss ("Beyond the 80/20
//! rule", arXiv 2506.01939), and their mean is taken off it.
//!
//! As in TRL, but over all tokens of an update where TRL looks at one micro-batch at a time.

use aha_core::batch::TrainSequence;
use aha_core::config::Train;
use aha_nn::comm::CommError;

use crate::torch::learner::Learner;
use crate::training_batch::{Plan, TrainingBatch};

/// Entropies this close are equal, in nats. The completions of a prompt share the context of their first token, whose
/// entropies differ by rounding alone: without this, how sequences are packed would decide which of them count.
const TIE: f32 = 1e-5;

/// Fills `policy_mask` and `entropy_weights` of this rank's sequences of one update, a plan and its index. With neither
/// `train.top_entropy_quantile` under 1 nor `train.entropy_coef` over 0 it does nothing.
///
/// # Errors
/// If the ranks cannot exchange their entropies.
pub(crate) fn weigh(
    learner: &Learner,
    train: &Train,
    batch: &mut TrainingBatch,
    (plan, index): (&Plan, usize),
) -> Result<(), CommError> {
    let own: Vec<usize> = plan.micro_batches.concat();
    let mut num_counted: usize =
        batch.updates[index].iter().map(|&index| batch.sequences[index].num_completion_tokens()).sum();
    if train.top_entropy_quantile < 1.0 {
        let entropies = learner.statistics(&plan.of(&batch.sequences))?.entropies;
        let flat: Vec<u8> =
            own.iter().flat_map(|&index| &entropies[index]).flat_map(|value| value.to_le_bytes()).collect();
        let everyone = learner.zero().group().all_gather_bytes(&flat)?.concat();
        let (values, _) = everyone.as_chunks::<4>();
        let all: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        num_counted = fill_masks(train, &mut batch.sequences, &entropies, &all);
    }
    fill_weights(train, &own, num_counted, &mut batch.sequences);
    Ok(())
}

/// Masks the tokens of low entropy of every sequence whose entropies are given; returns how many of `all` are left.
pub(crate) fn fill_masks(train: &Train, sequences: &mut [TrainSequence], entropies: &[Vec<f32>], all: &[f32]) -> usize {
    let threshold = quantile(all, 1.0 - train.top_entropy_quantile) - TIE;
    for (sequence, entropies) in sequences.iter_mut().zip(entropies) {
        sequence.policy_mask = mask(entropies, threshold);
    }
    all.iter().filter(|&&entropy| entropy >= threshold).count()
}

/// Gives the tokens that the policy loss of these sequences counts equal weights, whose sum over `num_counted` is
/// `train.entropy_coef`.
pub(crate) fn fill_weights(train: &Train, indices: &[usize], num_counted: usize, sequences: &mut [TrainSequence]) {
    if train.entropy_coef == 0.0 {
        return;
    }
    let weight = train.entropy_coef / num_counted.max(1) as f32;
    for &index in indices {
        let sequence = &mut sequences[index];
        sequence.entropy_weights = if sequence.policy_mask.is_empty() {
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
