//! The KL divergence from the reference policy as a part of the reward (`train.use_kl_in_reward`), as TRL's `RLOOTrainer` has
//! it: of a completion, the sum over its tokens of the log-ratio between the policy that is about to train and the reference.

use aha_core::config::Train;
use anyhow::Result;

use crate::torch::learner::Learner;
use crate::training_batch::{Plan, TrainingBatch};

/// What completions of a step say of the policy's distance from the reference.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Divergences {
    /// `[P * G]`, in nats; 0 where a completion carries no loss.
    pub(crate) by_completion: Vec<f32>,
    /// Over the tokens that carry loss.
    pub(crate) mean: f64,
}

/// Measures them, each rank on a share of the completions. All ranks call this together, and get the same.
///
/// # Errors
/// If a sequence exceeds `train.micro_batch_tokens`, or the ranks cannot exchange what they found.
pub(crate) fn divergences(learner: &Learner, train: &Train, batch: &TrainingBatch) -> Result<Divergences> {
    let group = learner.zero().group();
    let mut members = batch.updates.concat();
    members.sort_unstable();
    let plan = Plan::new(&batch.sequences, &members, train, (group.rank(), group.size()))?;
    let plan = plan.of(&batch.sequences);
    let (policy, reference) = (learner.statistics(&plan)?.logprobs, learner.reference_logprobs_of(&plan)?);
    let own = policy.iter().zip(&reference).map(|(policy, reference)| {
        let tokens = policy.iter().zip(reference);
        tokens.map(|(policy, reference)| f64::from(*policy) - f64::from(*reference)).sum::<f64>() as f32
    });
    let bytes: Vec<u8> = own.flat_map(f32::to_le_bytes).collect();
    let mut by_completion = vec![0.0; batch.sequences.len()];
    for rank in group.all_gather_bytes(&bytes)? {
        // Every completion is one rank's; the others have 0 for it.
        for (sum, value) in by_completion.iter_mut().zip(rank.as_chunks::<4>().0) {
            *sum += f32::from_le_bytes(*value);
        }
    }
    let num_tokens: usize = members.iter().map(|&index| batch.sequences[index].num_completion_tokens()).sum();
    let total: f64 = by_completion.iter().map(|&kl| f64::from(kl)).sum();
    Ok(Divergences { mean: total / num_tokens.max(1) as f64, by_completion })
}
