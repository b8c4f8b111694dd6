//! The groups of a step: one rollout of its prompts, or as many as it takes for groups that are whole and carry a signal.
//!
//! A group that generators did not complete within `rollout.deadline_seconds` is replaced by that of another prompt. So is,
//! with `train.dynamic_sampling` (DAPO, arXiv 2503.14476, section 3.2), a group whose rewards are all equal and that
//! therefore has no advantages, in at most `train.max_resample_rounds` rounds. Every decision is a pure function of what
//! all ranks have, so all of them ask for the same.

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
use crate::rollouts::{RolloutRequest, Rollouts, all_in_time};
use crate::training_batch::rewards;

/// Rounds in which groups that come too late are replaced.
const MAX_LATE_ROUNDS: u32 = 3;

/// What a step samples with.
pub(crate) struct Sampler<'a> {
    pub(crate) rollouts: &'a mut dyn Rollouts,
    pub(crate) group: &'a ProcessGroup,
    pub(crate) config: &'a RunConfig,
    /// Counted from 0.
    pub(crate) step: u64,
}

/// The groups of a step, the same on all ranks.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Sampled {
    pub(crate) groups: Vec<Group>,
    /// Groups that were sampled and not used, for want of a signal.
    pub(crate) num_dropped: usize,
    /// Groups that were asked for and did not come in time.
    pub(crate) num_late: usize,
    /// Rounds after the first.
    pub(crate) num_rounds: u32,
    /// Time that the ranks took to tell each other.
    pub(crate) exchange: Duration,
}

/// What this rank, of rank and world size `world`, asks for in a round of a step: its share of `prompts`.
pub(crate) fn rollout_request(
    config: &RunConfig,
    world: (usize, usize),
    prompts: &[Prompt],
    (step, round): (u64, u32),
) -> RolloutRequest {
    let path = [step, u64::from(round)];
    RolloutRequest {
        prompts: share(prompts, world.0, world.1),
        num_generations: config.rollout.num_generations,
        sampling: config.rollout.sampling(),
        seed: derive_seed(config.run.seed, if round == 0 { &path[..1] } else { &path }),
        rewards: config.rewards.clone(),
        min_version: PolicyVersion(step.saturating_sub(config.rollout.max_lag)),
    }
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
        let ids: Vec<PromptId> = prompts.iter().map(|prompt| prompt.id).collect();
        let mut seen: BTreeSet<PromptId> = ids.iter().copied().collect();
        let mut sampled = Sampled::default();
        let mut groups = self.roll_out(prompts, 0, &mut sampled)?;
        for round in 1.. {
            let wanting = self.wanting(&groups, round);
            let prompts = if wanting.is_empty() { Vec::new() } else { replacements(round, wanting.len(), &seen)? };
            if prompts.is_empty() {
                break;
            }
            seen.extend(prompts.iter().map(|prompt| prompt.id));
            let fresh = self.roll_out(prompts, round, &mut sampled)?;
            sampled.num_rounds = round;
            let (useful, others): (Vec<Group>, Vec<Group>) = fresh
                .into_iter()
                .flatten()
                .partition(|group| !self.config.train.dynamic_sampling || has_signal(group, self.config));
            let (mut useful, mut others) = (useful.into_iter(), others.into_iter());
            for index in wanting {
                let is_late = groups[index].is_none();
                let group = useful.next().or_else(|| if is_late { others.next() } else { None });
                groups[index] = group.or_else(|| groups[index].take());
            }
        }
        sampled.groups = all_in_time(&ids, groups)?;
        sampled.num_dropped -= sampled.groups.len();
        Ok(sampled)
    }

    /// Counts into `sampled`: every group that comes as dropped.
    fn roll_out(&mut self, prompts: Vec<Prompt>, round: u32, sampled: &mut Sampled) -> Result<Vec<Option<Group>>> {
        let world = (self.group.rank(), self.group.size());
        let own = self.rollouts.roll_out(&rollout_request(self.config, world, &prompts, (self.step, round)))?;
        let started = Instant::now();
        let groups = exchange(self.group, prompts, own, self.config.rollout.num_generations)?;
        sampled.exchange += started.elapsed();
        let num_whole = groups.iter().flatten().count();
        sampled.num_dropped += num_whole;
        sampled.num_late += groups.len() - num_whole;
        Ok(groups)
    }

    /// Which groups are to be replaced in a round, counted from 1; those that are not there at all come first.
    fn wanting(&self, groups: &[Option<Group>], round: u32) -> Vec<usize> {
        let train = &self.config.train;
        let replaces_late = round <= MAX_LATE_ROUNDS;
        let replaces_equal = train.dynamic_sampling && round <= train.max_resample_rounds;
        let late = (0..groups.len()).filter(|&index| replaces_late && groups[index].is_none());
        let is_equal = |index: usize| groups[index].as_ref().is_some_and(|group| !has_signal(group, self.config));
        let equal = (0..groups.len()).filter(|&index| replaces_equal && is_equal(index));
        late.chain(equal).collect()
    }
}

/// Whether its rewards differ, as far as there are any.
fn has_signal(group: &Group, config: &RunConfig) -> bool {
    let rewards = rewards(group, config);
    rewards.iter().any(|reward| *reward != rewards[0])
}

#[cfg(test)]
mod tests {
    use aha_core::config::RewardSpec;
    use aha_core::reward::Outcome;
    use aha_core::rollout::{Completion, FinishReason, Origin, Reward, Span};
    use tch::Device;

    use super::*;
    use crate::rollouts::RolloutError;
    use crate::test_ranks::run_ranks;

    /// Prompts whose id 3 divides have a signal, in what is sampled for them.
    struct EveryThird {
        requests: Vec<RolloutRequest>,
        /// Prompts whose groups do not come in time.
        late: &'static [u64],
    }

    impl Rollouts for EveryThird {
        fn roll_out(&mut self, request: &RolloutRequest) -> Result<Vec<Option<Group>>, RolloutError> {
            self.requests.push(request.clone());
            let group = |prompt: &Prompt| {
                let is_late = self.late.contains(&prompt.id.0);
                (!is_late).then(|| group(prompt, prompt.id.0.is_multiple_of(3)))
            };
            Ok(request.prompts.iter().map(group).collect())
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
        Prompt {
            id: PromptId(id),
            text: String::new(),
            token_ids: vec![1],
            columns: serde_json::Map::new(),
            origin: Origin::default(),
        }
    }

    /// What one rank gets from prompts 0..4, with prompts from 5 as replacements, up to `last`.
    fn sample(group: &ProcessGroup, dynamic_sampling: bool, last: u64) -> (Sampled, Vec<RolloutRequest>) {
        let (sampled, requests) = sample_late(group, dynamic_sampling, last, &[]);
        (sampled.unwrap(), requests)
    }

    fn sample_late(
        group: &ProcessGroup,
        dynamic_sampling: bool,
        last: u64,
        late: &'static [u64],
    ) -> (Result<Sampled>, Vec<RolloutRequest>) {
        let mut config = RunConfig::default();
        config.rollout.num_generations = 2;
        config.rewards = vec![RewardSpec { weight: 0.5, ..RewardSpec::of("equation") }];
        config.train.dynamic_sampling = dynamic_sampling;
        config.train.max_resample_rounds = 2;
        let mut rollouts = EveryThird { requests: Vec::new(), late };
        let sampler = Sampler { rollouts: &mut rollouts, group, config: &config, step: 4 };
        let replacements = |_, count: usize, seen: &BTreeSet<PromptId>| {
            Ok((5..=last).map(prompt).filter(|prompt| !seen.contains(&prompt.id)).take(count).collect())
        };
        let mut sampled = sampler.sample((0..4).map(prompt).collect(), replacements);
        if let Ok(sampled) = &mut sampled {
            sampled.exchange = Duration::ZERO;
        }
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
        assert!(requests.iter().all(|request| request.min_version == PolicyVersion(4)));
    }

    #[test]
    fn what_nobody_judged_is_no_signal() {
        let config = RunConfig { rewards: vec![RewardSpec::of("equation")], ..RunConfig::default() };
        let mut group = group(&prompt(1), true);
        assert!(has_signal(&group, &config));
        // One is left, and then none.
        for index in 0..2 {
            group.completions[index].rewards = vec![Reward::new("equation", Outcome::Timeout)];
            assert!(!has_signal(&group, &config));
        }
    }

    #[test]
    fn replacing_ends_where_there_are_no_prompts_left() {
        let (sampled, requests) = sample(&ProcessGroup::solo("test", Device::Cpu), true, 5);
        assert_eq!((ids(&sampled), requests.len()), (vec![0, 1, 2, 3], 2));
    }

    #[test]
    fn groups_that_come_too_late_are_replaced() {
        let solo = ProcessGroup::solo("test", Device::Cpu);
        let (sampled, requests) = sample_late(&solo, false, 99, &[1, 3, 5]);
        let sampled = sampled.unwrap();
        // Of 5 and 6 for 1 and 3, 5 is late too; 7 comes.
        assert_eq!(ids(&sampled), [0, 6, 2, 7]);
        assert_eq!((sampled.num_late, sampled.num_dropped, requests.len()), (3, 0, 3));
        // Whether it has a signal or not, a group is better than none.
        for (last, expect, num_dropped) in [(8, [6, 1, 2, 3], 3), (5, [5, 1, 2, 3], 0)] {
            let sampled = sample_late(&solo, true, last, &[0]).0.unwrap();
            assert_eq!(ids(&sampled), expect);
            assert_eq!((sampled.num_late, sampled.num_dropped), (1, num_dropped));
        }
    }

    #[test]
    fn a_step_whose_groups_are_late_again_and_again_fails() {
        let (sampled, requests) = sample_late(&ProcessGroup::solo("test", Device::Cpu), false, 99, &[2, 5, 6, 7, 8]);
        let message = sampled.unwrap_err().to_string();
        assert!(message.starts_with("of 1 prompts, the first prompt 2, "), "{message}");
        assert_eq!(requests.len(), 1 + MAX_LATE_ROUNDS as usize);
    }

    #[test]
    fn all_ranks_get_the_same_groups() {
        let (alone, _) = sample(&ProcessGroup::solo("test", Device::Cpu), true, 99);
        for (sampled, _) in run_ranks(3, |group| sample(&group, true, 99)) {
            assert_eq!(sampled, alone);
        }
        let (alone, _) = sample_late(&ProcessGroup::solo("test", Device::Cpu), false, 99, &[1, 3, 5]);
        let alone = alone.unwrap();
        for (sampled, _) in run_ranks(3, |group| sample_late(&group, false, 99, &[1, 3, 5])) {
            assert_eq!(sampled.unwrap(), alone);
        }
    }
}
