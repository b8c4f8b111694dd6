//! From the groups of a step to what every rank trains on.

use aha_core::advantage::{Scores, advantages};
use aha_core::batch::{TrainSequence, token_weights};
use aha_core::bundle::{Bundle, SequenceTooLong, bundles};
use aha_core::config::{RunConfig, Train};
use aha_core::dataset::SplitMix64;
use aha_core::packing::pack;
use aha_core::partition::partition_by_tokens;
use aha_core::random::derive_seed;
use aha_core::reward::soft_overlong_punishment;
use aha_core::rollout::{Completion, FinishReason, Group};

use crate::torch::learner::LocalBatch;

/// Names the order of a step's completions among the purposes that the run's seed is used for.
const ORDER: u64 = 0x4f52_4445;

/// The sequences of a step, the same on all ranks.
#[derive(Debug)]
pub struct TrainingBatch {
    /// One a completion, group after group.
    pub sequences: Vec<TrainSequence>,
    /// `[P * G]`, weighted sums of the reward functions' scores, of the soft overlong punishment, and of divergences.
    pub rewards: Vec<f32>,
    /// `[P * G]`.
    pub advantages: Vec<f32>,
    /// `[P * G]`, unweighted; empty where `train.soft_punish_cache` is 0.
    pub soft_punishments: Vec<f32>,
    /// `[P * G]`, completions without a verdict: they carry no loss and have no part in the others' advantages.
    pub excluded: Vec<bool>,
    /// For every optimizer update of one pass, the indices of the sequences that carry its loss.
    pub updates: Vec<Vec<usize>>,
    /// Updates of a pass that are left out, since none of their completions has a verdict.
    pub num_left_out: u32,
}

/// Which sequences a rank trains on in one optimizer update, in which micro-batches.
#[derive(Debug)]
pub struct Plan {
    /// Indices into the batch's sequences.
    pub micro_batches: Vec<Vec<usize>>,
    /// The most micro-batches of any rank.
    pub num_micro_batches: usize,
}

impl TrainingBatch {
    /// A pure function of its arguments. `step` is counted from 0.
    #[must_use]
    pub fn new(groups: &[Group], config: &RunConfig, step: u64) -> Self {
        Self::with_divergences(groups, config, step, &[])
    }

    /// The same with `train.beta` times the divergence of each completion, `[P * G]`, taken off its reward.
    #[must_use]
    pub fn with_divergences(groups: &[Group], config: &RunConfig, step: u64, divergences: &[f32]) -> Self {
        let train = &config.train;
        let completions: Vec<&Completion> = groups.iter().flat_map(|group| &group.completions).collect();
        let excluded: Vec<bool> = completions.iter().map(|completion| !completion.is_judged()).collect();
        let masked = |completion: &Completion| {
            let is_truncated = completion.finish_reason != FinishReason::Stop;
            !completion.is_judged() || train.mask_truncated_completions && is_truncated
        };
        // Tokens that carry loss.
        let num_tokens: Vec<usize> = completions
            .iter()
            .map(|completion| if masked(completion) { 0 } else { completion.token_ids.len() })
            .collect();
        let soft_punishments = soft_punishments(&completions, config);
        let (mut by_function, mut weights) = scores(&completions, &soft_punishments, config);
        if !divergences.is_empty() {
            by_function.push(divergences.to_vec());
            weights.push(-train.beta);
        }
        let scores = Scores {
            by_function: &by_function,
            weights: &weights,
            num_tokens: &num_tokens,
            excluded: &excluded,
            group_size: config.rollout.num_generations,
        };
        let rewards = scores.rewards();
        let advantages = advantages(&scores, train.advantage_options());

        let order = order(completions.len(), config, step);
        let weights = weights_in_order(&order, &num_tokens, config);
        let prompts = groups.iter().flat_map(|group| group.completions.iter().map(|_| &group.prompt));
        let sequences = prompts
            .zip(&completions)
            .zip(advantages.iter().zip(&weights))
            .map(|((prompt, completion), (&advantage, &weight))| {
                let num_tokens = completion.token_ids.len();
                TrainSequence {
                    token_ids: [prompt.token_ids.as_slice(), &completion.token_ids].concat(),
                    num_prompt_tokens: prompt.token_ids.len(),
                    weights: vec![weight; num_tokens],
                    advantages: vec![advantage; num_tokens],
                    sampled_logprobs: if train.needs_sampled_logprobs() {
                        completion.logprobs.clone()
                    } else {
                        Vec::new()
                    },
                    ..TrainSequence::default()
                }
            })
            .collect();
        let size = order.len().div_ceil(train.steps_per_generation).max(1);
        let with_loss = |update: &[usize]| {
            let mut members: Vec<usize> = update.iter().copied().filter(|&index| num_tokens[index] > 0).collect();
            members.sort_unstable(); // completions of one prompt stand together, so that it is computed once
            members
        };
        let is_judged = |update: &&[usize]| update.iter().any(|&index| !excluded[index]);
        let (judged, left_out): (Vec<&[usize]>, Vec<&[usize]>) = order.chunks(size).partition(is_judged);
        let updates = judged.into_iter().map(with_loss).collect();
        let num_left_out = left_out.len() as u32;
        Self { sequences, rewards, advantages, soft_punishments, excluded, updates, num_left_out }
    }

    /// How each update is split between ranks and micro-batches.
    ///
    /// # Errors
    /// If a sequence alone exceeds `train.micro_batch_tokens`.
    pub fn plans(&self, train: &Train, world: (usize, usize)) -> Result<Vec<Plan>, SequenceTooLong> {
        self.updates.iter().map(|update| Plan::new(&self.sequences, update, train, world)).collect()
    }
}

/// The reward of every completion of a group that has a verdict: weighted sums of the reward functions' scores and of the
/// soft overlong punishment.
#[must_use]
pub fn rewards(group: &Group, config: &RunConfig) -> Vec<f32> {
    let completions: Vec<&Completion> = group.completions.iter().filter(|completion| completion.is_judged()).collect();
    let (by_function, weights) = scores(&completions, &soft_punishments(&completions, config), config);
    let (num_tokens, excluded) = (vec![1; completions.len()], vec![false; completions.len()]);
    let (by_function, weights, num_tokens, excluded) = (&by_function, &weights, &num_tokens, &excluded);
    Scores { by_function, weights, num_tokens, excluded, group_size: 1 }.rewards()
}

/// `[K][P * G]` scores and `[K]` weights of the reward functions, and of the soft overlong punishment where it is on.
fn scores(completions: &[&Completion], soft_punishments: &[f32], config: &RunConfig) -> (Vec<Vec<f32>>, Vec<f32>) {
    let score = |completion: &Completion, function: &str| {
        completion.rewards.iter().find(|reward| reward.function == function).map_or(0.0, |reward| reward.score)
    };
    let of_function =
        |function: &str| completions.iter().map(|completion| score(completion, function)).collect::<Vec<_>>();
    let mut by_function: Vec<_> = config.rewards.iter().map(|spec| of_function(spec.name())).collect();
    let mut weights: Vec<f32> = config.rewards.iter().map(|spec| spec.weight).collect();
    if !soft_punishments.is_empty() {
        by_function.push(soft_punishments.to_vec());
        weights.push(config.train.soft_punish_weight);
    }
    (by_function, weights)
}

fn soft_punishments(completions: &[&Completion], config: &RunConfig) -> Vec<f32> {
    let (longest, cache) = (config.rollout.max_completion_length, config.train.soft_punish_cache);
    if cache == 0 {
        return Vec::new();
    }
    completions.iter().map(|completion| soft_overlong_punishment(completion.token_ids.len(), longest, cache)).collect()
}

/// The order in which completions are dealt to the optimizer updates of a pass: shuffled where there are several, so
/// that a group does not lie in one of them alone.
fn order(num_sequences: usize, config: &RunConfig, step: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..num_sequences).collect();
    if config.train.steps_per_generation > 1 {
        let mut random = SplitMix64::new(derive_seed(config.run.seed, &[ORDER, step]));
        for last in (1..order.len()).rev() {
            order.swap(last, random.below(last as u64 + 1) as usize);
        }
    }
    order
}

/// The weight of the tokens of every sequence, `[P * G]`; 0 for those that are masked. As in TRL, the updates of a pass
/// share the normaliser of the whole pass, so that the sum of their losses is the pass' loss times their number.
fn weights_in_order(order: &[usize], num_tokens: &[usize], config: &RunConfig) -> Vec<f32> {
    let train = &config.train;
    let in_order: Vec<usize> = order.iter().map(|&index| num_tokens[index]).collect();
    let longest = config.rollout.max_completion_length as usize;
    let of_pass = token_weights(train.loss_type, &in_order, longest, config.bnpo_batch_size());
    let mut weights = vec![0.0; num_tokens.len()];
    for (&index, weight) in order.iter().zip(of_pass) {
        if num_tokens[index] > 0 {
            weights[index] = weight * train.steps_per_generation as f32;
        }
    }
    weights
}

impl Plan {
    /// Splits those `members` of the sequences between ranks and packs each rank's under the token budget; those that
    /// share a prompt stay together where they can. `world` is rank and size.
    ///
    /// # Errors
    /// If a sequence alone exceeds the budget.
    pub fn new(
        sequences: &[TrainSequence],
        members: &[usize],
        train: &Train,
        (rank, world_size): (usize, usize),
    ) -> Result<Self, SequenceTooLong> {
        let budget = train.micro_batch_tokens;
        let share = train.share_prompts.then_some(world_size);
        let bundles = bundles(sequences, members, budget, share)?;
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

    /// This rank's share.
    #[must_use]
    pub fn of<'a>(&'a self, sequences: &'a [TrainSequence]) -> LocalBatch<'a> {
        LocalBatch { sequences, micro_batches: &self.micro_batches, num_micro_batches: self.num_micro_batches }
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
        let members: Vec<usize> = (0..37).filter(|index| index % 5 != 3).collect();
        for share_prompts in [false, true] {
            let train = Train { micro_batch_tokens: 64, share_prompts, ..Train::default() };
            let plans: Vec<Plan> =
                (0..3).map(|rank| Plan::new(&sequences, &members, &train, (rank, 3)).unwrap()).collect();
            let mut seen: Vec<usize> = plans.iter().flat_map(|plan| plan.micro_batches.concat()).collect();
            seen.sort_unstable();
            assert_eq!(seen, members);
            let most = plans.iter().map(|plan| plan.micro_batches.len()).max().unwrap();
            assert!(plans.iter().all(|plan| plan.num_micro_batches == most));
        }
    }
}
