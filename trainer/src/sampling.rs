//! The groups of a step: one rollout of its prompts, or as many as it takes for groups that carry a signal.
//!
//! A group whose rewards are all equal has no advantages. With `train.dynamic_sampling` (DAPO, arXiv 2503.14476, section
//! 3.2) such groups are replaced by groups of other prompts, in at most `train.max_resample_rounds` rounds. Every
//! decision is a pure function of what all ranks have, so all of them ask for the same.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use aha_core::config::RunConfig;
use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::random::derive_seed;
use aha_core::rollout::{Group, Prompt};
use aha_nn::comm::ProcessGroup;
use anyhow::Result;

use crate::exchange::{exchange, share};
use crate::prompts::PromptsError;
use crate::rollouts::{RolloutRequest, Rollouts};
use crate::training_batch::rewards;

/// What a step samples with.
pub(crate) struct Sampler<'a> {
    pub(crate) rollouts: &'a mut dyn Rollouts,
    pub(crate) group: &'a ProcessGroup,
    pub(crate) config: &'a RunConfig,
    /// Counted from 0.
    pub(crate) step: u64,
}

/// The groups of a step, the same on all ranks.
#[derive(Debug, PartialEq)]
pub(crate) struct Sampled {
    pub(crate) groups: Vec<Group>,
    /// Groups that were sampled and not used, for want of a signal.
    pub(crate) num_dropped: usize,
    /// Rounds after the first.
    pub(crate) num_rounds: u32,
    /// Time that the ranks took to tell each other.
    pub(crate) exchange: Duration,
}

impl Sampler<'_> {
    /// The groups of `prompts`. `replacements` gives so many prompts for a round, none of those that the step has seen,
    /// or fewer where there are no more.
    ///
    /// # Errors
    /// If a completion or a prompt cannot be had.
    #[tracing::instrument(level = "debug", name = "generate", skip_all)]
    pub(crate) fn sample(
        mut self,
        prompts: Vec<Prompt>,
        replacements: impl Fn(u32, usize, &BTreeSet<PromptId>) -> Result<Vec<Prompt>, PromptsError>,
    ) -> Result<Sampled> {
        let mut seen: BTreeSet<PromptId> = prompts.iter().map(|prompt| prompt.id).collect();
        let (groups, exchange) = self.roll_out(prompts, 0)?;
        let mut sampled = Sampled { groups, num_dropped: 0, num_rounds: 0, exchange };
        if !self.config.train.dynamic_sampling {
            return Ok(sampled);
        }
        for round in 1..=self.config.train.max_resample_rounds {
            let without: Vec<usize> =
                (0..sampled.groups.len()).filter(|&index| !self.has_signal(&sampled.groups[index])).collect();
            let prompts = if without.is_empty() { Vec::new() } else { replacements(round, without.len(), &seen)? };
            if prompts.is_empty() {
                break;
            }
            seen.extend(prompts.iter().map(|prompt| prompt.id));
            let (fresh, exchange) = self.roll_out(prompts, round)?;
            sampled.num_rounds = round;
            sampled.num_dropped += fresh.len();
            sampled.exchange += exchange;
            let useful = fresh.into_iter().filter(|group| self.has_signal(group));
            for (index, group) in without.into_iter().zip(useful) {
                sampled.groups[index] = group;
            }
        }
        Ok(sampled)
    }

    fn roll_out(&mut self, prompts: Vec<Prompt>, round: u32) -> Result<(Vec<Group>, Duration)> {
        let config = self.config;
        let path = [self.step, u64::from(round)];
        let own = self.rollouts.roll_out(&RolloutRequest {
            prompts: share(&prompts, self.group.rank(), self.group.size()),
            num_generations: config.rollout.num_generations,
            sampling: config.rollout.sampling(),
            seed: derive_seed(config.run.seed, if round == 0 { &path[..1] } else { &path }),
            rewards: config.rewards.iter().map(|spec| spec.function.clone()).collect(),
            version: PolicyVersion(self.step),
        })?;
        let started = Instant::now();
        let groups = exchange(self.group, prompts, own, config.rollout.num_generations)?;
        Ok((groups, started.elapsed()))
    }

    fn has_signal(&self, group: &Group) -> bool {
        let rewards = rewards(std::slice::from_ref(group), self.config);
        rewards.iter().any(|reward| *reward != rewards[0])
    }
}

#[cfg(test)]
mod tests {
    use aha_core::config::RewardSpec;
    use aha_core::rollout::{Completion, FinishReason, Reward, Span};
    use tch::Device;

    use super::*;
    use crate::rollouts::RolloutError;
    use crate::test_ranks::run_ranks;

    /// Prompts whose id 3 divides have a signal, in what is sampled for them.
    struct EveryThird {
        requests: Vec<RolloutRequest>,
    }

    impl Rollouts for EveryThird {
        fn roll_out(&mut self, request: &RolloutRequest) -> Result<Vec<Group>, RolloutError> {
            self.requests.push(request.clone());
            Ok(request.prompts.iter().map(|prompt| group(prompt, prompt.id.0.is_multiple_of(3))).collect())
        }
    }

    fn group(prompt: &Prompt, has_signal: bool) -> Group {
        let completion = |sample_index: u32| Completion {
            prompt_id: prompt.id,
            sample_index,
            token_ids: vec![1],
            logprobs: vec![-0.5],
            spans: vec![Span { version: PolicyVersion(4), num_tokens: 1 }],
            finish_reason: FinishReason::Stop,
            text: String::new(),
            rewards: vec![Reward {
                function: "equation".to_owned(),
                score: f32::from(u8::from(has_signal && sample_index == 0)),
                outcome: "score".to_owned(),
            }],
            raw_logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
        };
        Group { prompt: prompt.clone(), completions: vec![completion(0), completion(1)] }
    }

    fn prompt(id: u64) -> Prompt {
        Prompt { id: PromptId(id), text: String::new(), token_ids: vec![1], columns: serde_json::Map::new() }
    }

    /// What one rank gets from prompts 0..4, with prompts from 5 as replacements, up to `last`.
    fn sample(group: &ProcessGroup, dynamic_sampling: bool, last: u64) -> (Sampled, Vec<RolloutRequest>) {
        let mut config = RunConfig::default();
        config.rollout.num_generations = 2;
        config.rewards = vec![RewardSpec { function: "equation".to_owned(), weight: 0.5 }];
        config.train.dynamic_sampling = dynamic_sampling;
        config.train.max_resample_rounds = 2;
        let mut rollouts = EveryThird { requests: Vec::new() };
        let sampler = Sampler { rollouts: &mut rollouts, group, config: &config, step: 4 };
        let replacements = |_, count: usize, seen: &BTreeSet<PromptId>| {
            Ok((5..=last).map(prompt).filter(|prompt| !seen.contains(&prompt.id)).take(count).collect())
        };
        let mut sampled = sampler.sample((0..4).map(prompt).collect(), replacements).unwrap();
        sampled.exchange = Duration::ZERO;
        (sampled, rollouts.requests)
    }

    fn ids(sampled: &Sampled) -> Vec<u64> {
        sampled.groups.iter().map(|group| group.prompt.id.0).collect()
    }

    #[test]
    fn without_dynamic_sampling_a_step_is_one_rollout() {
        let (sampled, requests) = sample(&ProcessGroup::solo("test", Device::Cpu), false, 99);
        assert_eq!((ids(&sampled), sampled.num_dropped, requests.len()), (vec![0, 1, 2, 3], 0, 1));
    }

    #[test]
    fn groups_without_signal_are_replaced_until_the_rounds_are_over() {
        let (sampled, requests) = sample(&ProcessGroup::solo("test", Device::Cpu), true, 99);
        // 1 and 2 have none; of 5 and 6, 6 has; of 7, none.
        assert_eq!(ids(&sampled), [0, 6, 2, 3]);
        assert_eq!((sampled.num_rounds, sampled.num_dropped), (2, 3));
        let seeds: BTreeSet<u64> = requests.iter().map(|request| request.seed).collect();
        assert_eq!(seeds.len(), 3, "every round has a seed of its own");
        assert!(requests.iter().all(|request| request.version == PolicyVersion(4)));
    }

    #[test]
    fn replacing_ends_where_there_are_no_prompts_left() {
        let (sampled, requests) = sample(&ProcessGroup::solo("test", Device::Cpu), true, 5);
        assert_eq!((ids(&sampled), requests.len()), (vec![0, 1, 2, 3], 2));
    }

    #[test]
    fn all_ranks_get_the_same_groups() {
        let (alone, _) = sample(&ProcessGroup::solo("test", Device::Cpu), true, 99);
        for (sampled, _) in run_ranks(3, |group| sample(&group, true, 99)) {
            assert_eq!(sampled, alone);
        }
    }
}
