//! From the groups of a step to what every rank trains on.

use aha_core::advantage::advantages;
use aha_core::batch::{TrainSequence, token_weights};
use aha_core::bundle::{Bundle, SequenceTooLong, bundles};
use aha_core::config::{RunConfig, Train};
use aha_core::packing::pack;
use aha_core::partition::partition_by_tokens;
use aha_core::rollout::{Completion, Group};

/// The sequences of a step, the same on all ranks.
#[derive(Debug)]
pub struct TrainingBatch {
    /// One a completion, group after group.
    pub sequences: Vec<TrainSequence>,
    /// `[P * G]`, weighted sums of the reward functions' scores.
    pub rewards: Vec<f32>,
    /// `[P * G]`.
    pub advantages: Vec<f32>,
}

/// Which sequences a rank trains on, in which micro-batches.
#[derive(Debug)]
pub struct Plan {
    /// Indices into the batch's sequences.
    pub micro_batches: Vec<Vec<usize>>,
    /// The most micro-batches of any rank.
    pub num_micro_batches: usize,
}

impl TrainingBatch {
    #[must_use]
    pub fn new(groups: &[Group], config: &RunConfig) -> Self {
        let completions = || groups.iter().flat_map(|group| &group.completions);
        let rewards: Vec<f32> = completions().map(|completion| reward(completion, config)).collect();
        let advantages = advantages(&rewards, config.rollout.num_generations, config.train.scale_rewards);
        let lengths: Vec<usize> = completions().map(|completion| completion.token_ids.len()).collect();
        let weights = token_weights(config.train.loss_type, &lengths, config.rollout.max_completion_length as usize);
        let prompts = groups.iter().flat_map(|group| group.completions.iter().map(|_| &group.prompt));
        let sequences = prompts
            .zip(completions())
            .zip(advantages.iter().zip(&weights))
            .map(|((prompt, completion), (&advantage, &weight))| {
                let num_tokens = completion.token_ids.len();
                TrainSequence {
                    token_ids: [prompt.token_ids.as_slice(), &completion.token_ids].concat(),
                    num_prompt_tokens: prompt.token_ids.len(),
                    weights: vec![weight; num_tokens],
                    advantages: vec![advantage; num_tokens],
                    old_logprobs: Vec::new(),
                }
            })
            .collect();
        Self { sequences, rewards, advantages }
    }
}

/// The weighted sum of a completion's scores.
#[must_use]
pub fn reward(completion: &Completion, config: &RunConfig) -> f32 {
    let weight =
        |function: &str| config.rewards.iter().find(|spec| spec.function == function).map_or(0.0, |spec| spec.weight);
    completion.rewards.iter().map(|reward| weight(&reward.function) * reward.score).sum()
}

impl Plan {
    /// Splits sequences between ranks and packs each rank's under the token budget; those that share a prompt stay
    /// together where they can.
    ///
    /// # Errors
    /// If a sequence alone exceeds the budget.
    pub fn new(
        sequences: &[TrainSequence],
        train: &Train,
        rank: usize,
        world_size: usize,
    ) -> Result<Self, SequenceTooLong> {
        let budget = train.micro_batch_tokens;
        let bundles = bundles(sequences, budget, world_size, train.share_prompts)?;
        let lengths = |bundles: &[usize], all: &[Bundle]| -> Vec<usize> {
            bundles.iter().map(|&bundle| all[bundle].num_tokens).collect()
        };
        let all: Vec<usize> = (0..bundles.len()).collect();
        let mut micro_batches = Vec::new();
        let mut num_micro_batches = 0;
        for (owner, owned) in partition_by_tokens(&lengths(&all, &bundles), world_size).into_iter().enumerate() {
            let packs = pack(&lengths(&owned, &bundles), budget);
            num_micro_batches = num_micro_batches.max(packs.len());
            if owner == rank {
                let sequences =
                    |pack: Vec<usize>| pack.into_iter().flat_map(|position| &bundles[owned[position]].indices);
                micro_batches = packs.into_iter().map(|pack| sequences(pack).copied().collect()).collect();
            }
        }
        Ok(Self { micro_batches, num_micro_batches })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_of_all_ranks_cover_every_sequence_once() {
        let sequences: Vec<TrainSequence> = (0..37_u32)
            .map(|index| TrainSequence {
                token_ids: vec![index / 8; 5 + index as usize * 7 % 31],
                num_prompt_tokens: 4,
                ..TrainSequence::default()
            })
            .collect();
        for share_prompts in [false, true] {
            let train = Train { micro_batch_tokens: 64, share_prompts, ..Train::default() };
            let plans: Vec<Plan> = (0..3).map(|rank| Plan::new(&sequences, &train, rank, 3).unwrap()).collect();
            let mut seen: Vec<usize> = plans.iter().flat_map(|plan| plan.micro_batches.concat()).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..37).collect::<Vec<_>>());
            let most = plans.iter().map(|plan| plan.micro_batches.len()).max().unwrap();
            assert!(plans.iter().all(|plan| plan.num_micro_batches == most));
        }
    }
}
