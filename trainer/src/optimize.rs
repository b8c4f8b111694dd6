//! The optimizer updates on one batch of rollouts: `train.num_iterations` passes of `train.steps_per_generation` updates.

use aha_core::config::Train;
use aha_nn::optim::AdamW;
use anyhow::Result;

use crate::entropy::{self, EntropyControl};
use crate::torch::learner::{Learner, StepOutput};
use crate::training_batch::{Plan, TrainingBatch};

/// Takes the updates of one step, and lets the weight of the entropy follow them.
///
/// The first update needs no old log-probs, since its policy sampled the batch; it leaves those that later passes compare
/// with. Those of the other updates' sequences are computed before the policy moves.
///
/// Updates in which nothing was judged are left out, like those whose gradients are not finite.
///
/// Returns what all updates did: sums over them, means of loss and gradient norm, and in `logprobs` what the policy that
/// sampled says of the completions of this rank.
///
/// # Errors
/// As [`crate::torch::learner::Learner::step`]'s, or if a sequence exceeds `train.micro_batch_tokens`.
#[tracing::instrument(level = "debug", name = "train", skip_all)]
pub fn optimize(
    learner: &mut Learner,
    train: &Train,
    batch: &mut TrainingBatch,
    (options, control): (&AdamW, &mut EntropyControl),
) -> Result<StepOutput> {
    let group = learner.zero().group();
    let plans = batch.plans(train, (group.rank(), group.size()))?;
    for plan in plans.iter().skip(1) {
        let logprobs = learner.statistics(&plan.of(&batch.sequences))?.logprobs;
        keep_old_logprobs(batch, plan, logprobs);
    }
    let mut total = StepOutput::default();
    for iteration in 0..train.num_iterations {
        for (index, plan) in plans.iter().enumerate() {
            let weight = control.weight(train);
            let counted = entropy::weigh(learner, (train, weight), batch, (plan, index))?;
            let mut output = learner.step(&plan.of(&batch.sequences), options)?;
            if train.use_adaptive_entropy {
                let group = learner.zero().group();
                let mean = counted.map_or_else(|| entropy::mean_entropy(group, &output), Ok)?;
                control.follow(train, mean);
            }
            if (iteration, index) == (0, 0) {
                keep_old_logprobs(batch, plan, std::mem::take(&mut output.logprobs));
            }
            total.add_update(&output);
        }
    }
    total.num_skipped += batch.num_left_out * train.num_iterations;
    let num_updates = f64::from(train.num_iterations) * plans.len().max(1) as f64;
    total.loss /= num_updates;
    total.grad_norm /= num_updates;
    total.logprobs = batch.sequences.iter().map(|sequence| sequence.old_logprobs.clone()).collect();
    Ok(total)
}

fn keep_old_logprobs(batch: &mut TrainingBatch, plan: &Plan, mut logprobs: Vec<Vec<f32>>) {
    for &index in plan.micro_batches.iter().flatten() {
        batch.sequences[index].old_logprobs = std::mem::take(&mut logprobs[index]);
    }
}

#[cfg(test)]
mod tests;
