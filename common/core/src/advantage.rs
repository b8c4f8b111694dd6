//! Advantages from rewards, by one of several baselines.
//!
//! With `r` the reward of a completion, its group the G completions of its prompt, and the batch all completions of the
//! step; deviations are unbiased, and 1e-4 is added to them, as in TRL:
//!
//! - `grpo`: `(r - mean(group)) / divisor` (Shao et al., "DeepSeekMath", arXiv 2402.03300, section 4.1.2). Dr. GRPO
//!   (Liu et al., arXiv 2503.20783) leaves the divisor out, because it up-weights groups that are nearly solved.
//! - `rloo`: `r - mean(the others of the group)` (Ahmadian et al., arXiv 2402.14740), on request normalised over the
//!   batch afterwards. As TRL's `RLOOTrainer`, whose KL term comes with the reward.
//! - `reinforce_plus_plus`: `(r - mean) / std` over the tokens of the batch (Hu et al., arXiv 2501.03262), and
//!   `reinforce_plus_plus_baseline`: the same of `r - mean(group)`. Every token of a completion counts once in mean and
//!   deviation, and 1e-8 is added to the variance, as in verl's `masked_whiten`.
//!
//! Completions without a verdict are left out of all of this, as if they had never been sampled; their advantage is 0.
//!
//! Several reward functions are added up first, or normalised one by one and then added up (GDPO, arXiv 2601.05242).

use serde::{Deserialize, Serialize};

const EPSILON: f32 = 1e-4;
const WHITENING_EPSILON: f64 = 1e-8;

/// What a reward is compared with. Names as verl's `adv_estimator`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdvantageEstimator {
    #[default]
    Grpo,
    Rloo,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
}

/// What the centred rewards of a group are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// The standard deviation of the group.
    #[default]
    Group,
    /// The standard deviation of all rewards of the step.
    Batch,
    /// Nothing.
    None,
}

/// How the scores of several reward functions become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MultiObjectiveAggregation {
    /// Their weighted sum is the reward, and advantages are taken of that.
    #[default]
    SumThenNormalize,
    /// The scores of each are centred and scaled within their group; the weighted sum of those is normalised over the
    /// batch (GDPO).
    NormalizeThenSum,
}

/// How rewards become advantages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AdvantageOptions {
    pub estimator: AdvantageEstimator,
    /// For `grpo` with summed rewards alone.
    pub scale_rewards: ScaleRewards,
    pub aggregation: MultiObjectiveAggregation,
    /// For `rloo` alone: normalise over the batch.
    pub normalize_advantages: bool,
}

/// The scores of a step, groups one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Scores<'a> {
    /// `[K]` reward functions of `[P * G]` completions.
    pub by_function: &'a [Vec<f32>],
    /// `[K]`.
    pub weights: &'a [f32],
    /// `[P * G]`, tokens that carry loss.
    pub num_tokens: &'a [usize],
    /// `[P * G]`, completions without a verdict.
    pub excluded: &'a [bool],
    /// G.
    pub group_size: usize,
}

impl Scores<'_> {
    /// Weighted sums over the reward functions, `[P * G]`.
    #[must_use]
    pub fn rewards(&self) -> Vec<f32> {
        self.weighted_sum(self.by_function.iter().map(|scores| scores.iter().copied()))
    }

    fn weighted_sum(&self, by_function: impl Iterator<Item = impl Iterator<Item = f32>>) -> Vec<f32> {
        let mut sums = vec![0.0; self.num_tokens.len()];
        for (scores, weight) in by_function.zip(self.weights) {
            for (sum, score) in sums.iter_mut().zip(scores) {
                *sum += weight * score;
            }
        }
        sums
    }

    /// `of` the values of each group in turn, without those that are excluded, whose place is 0.
    fn by_group(&self, values: &[f32], of: impl Fn(&[f32]) -> Vec<f32>) -> Vec<f32> {
        let groups = values.chunks_exact(self.group_size).zip(self.excluded.chunks_exact(self.group_size));
        groups.flat_map(|(values, excluded)| scattered(&of(&kept(values, excluded)), excluded)).collect()
    }

    /// `of` all values that are not excluded; 0 in place of the others.
    fn over_kept(&self, values: &[f32], of: impl Fn(&[f32]) -> Vec<f32>) -> Vec<f32> {
        scattered(&of(&kept(values, self.excluded)), self.excluded)
    }

    fn whitened_by_tokens(&self, values: &[f32]) -> Vec<f32> {
        let num_tokens = kept(self.num_tokens, self.excluded);
        self.over_kept(values, |values| whitened_by_tokens(values, &num_tokens))
    }
}

fn kept<T: Copy>(values: &[T], excluded: &[bool]) -> Vec<T> {
    values.iter().zip(excluded).filter(|(_, is_excluded)| !**is_excluded).map(|(value, _)| *value).collect()
}

/// The reverse of [`kept`], with 0 in the gaps.
fn scattered(values: &[f32], excluded: &[bool]) -> Vec<f32> {
    let mut values = values.iter();
    let mut value = |&is_excluded: &bool| if is_excluded { None } else { values.next() };
    excluded.iter().map(|is_excluded| value(is_excluded).copied().unwrap_or(0.0)).collect()
}

/// Advantage of every completion, in order, `[P * G]`.
///
/// Completions of a group whose rewards are all equal get zeros from `grpo` and `rloo` without normalisation: the group
/// carries no signal.
///
/// # Panics
/// If the groups are not whole.
#[must_use]
pub fn advantages(scores: &Scores<'_>, options: AdvantageOptions) -> Vec<f32> {
    let size = scores.group_size;
    assert!(size > 0 && scores.num_tokens.len().is_multiple_of(size), "rewards must be whole groups");
    if options.aggregation == MultiObjectiveAggregation::NormalizeThenSum {
        let normalized = scores
            .by_function
            .iter()
            .map(|values| scores.by_group(values, centred(values, scores, ScaleRewards::Group)).into_iter());
        return scores.over_kept(&scores.weighted_sum(normalized), normalized_over_batch);
    }
    let rewards = scores.rewards();
    match options.estimator {
        AdvantageEstimator::Grpo => scores.by_group(&rewards, centred(&rewards, scores, options.scale_rewards)),
        AdvantageEstimator::Rloo => {
            let advantages = scores.by_group(&rewards, leave_one_out);
            if options.normalize_advantages { scores.over_kept(&advantages, normalized_over_batch) } else { advantages }
        }
        AdvantageEstimator::ReinforcePlusPlus => scores.whitened_by_tokens(&rewards),
        AdvantageEstimator::ReinforcePlusPlusBaseline => {
            scores.whitened_by_tokens(&scores.by_group(&rewards, centred(&rewards, scores, ScaleRewards::None)))
        }
    }
}

/// What makes advantages of the rewards of a group.
fn centred(rewards: &[f32], scores: &Scores<'_>, scale: ScaleRewards) -> impl Fn(&[f32]) -> Vec<f32> {
    let batch_std = standard_deviation(&kept(rewards, scores.excluded));
    move |group| {
        let mean = mean(group);
        let divisor = match scale {
            ScaleRewards::Group => standard_deviation(group) + EPSILON,
            ScaleRewards::Batch => batch_std + EPSILON,
            ScaleRewards::None => 1.0,
        };
        group.iter().map(|reward| (reward - mean) / divisor).collect()
    }
}

/// A completion that is alone has nobody to compare with: 0.
fn leave_one_out(group: &[f32]) -> Vec<f32> {
    if group.len() == 1 {
        return vec![0.0];
    }
    let (total, num_others) = (sum(group), group.len().saturating_sub(1) as f64);
    let advantage = |&reward: &f32| {
        let others = (total - f64::from(reward)) / num_others;
        (f64::from(reward) - others) as f32
    };
    group.iter().map(advantage).collect()
}

fn normalized_over_batch(values: &[f32]) -> Vec<f32> {
    let (mean, divisor) = (mean(values), standard_deviation(values) + EPSILON);
    values.iter().map(|value| (value - mean) / divisor).collect()
}

fn whitened_by_tokens(values: &[f32], num_tokens: &[usize]) -> Vec<f32> {
    let total: usize = num_tokens.iter().sum();
    let over_tokens = |of: &dyn Fn(f64) -> f64| -> f64 {
        values.iter().zip(num_tokens).map(|(&value, &count)| of(f64::from(value)) * count as f64).sum()
    };
    let mean = over_tokens(&|value| value) / total.max(1) as f64;
    let variance = over_tokens(&|value| (value - mean).powi(2)) / total.saturating_sub(1).max(1) as f64;
    let divisor = (variance + WHITENING_EPSILON).sqrt();
    values.iter().map(|&value| ((f64::from(value) - mean) / divisor) as f32).collect()
}

/// Arithmetic mean; 0 for nothing.
#[must_use]
pub fn mean(values: &[f32]) -> f32 {
    if values.is_empty() { 0.0 } else { (sum(values) / values.len() as f64) as f32 }
}

/// Unbiased standard deviation; 0 for fewer than two values.
#[must_use]
pub fn standard_deviation(values: &[f32]) -> f32 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = sum(values) / values.len() as f64;
    let squares: f64 = values.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt() as f32
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(rewards: &[f32], group_size: usize, options: AdvantageOptions, expect: &[f32]) {
        let by_function = [rewards.to_vec()];
        let num_tokens: Vec<usize> = (1..=rewards.len()).collect();
        let excluded = &vec![false; rewards.len()];
        let scores =
            Scores { by_function: &by_function, weights: &[1.0], num_tokens: &num_tokens, excluded, group_size };
        let got = advantages(&scores, options);
        assert_eq!(got.len(), expect.len());
        for (got, expect) in got.iter().zip(expect) {
            assert!((got - expect).abs() < 1e-5, "{got} is not {expect}");
        }
    }

    fn scaled(scale_rewards: ScaleRewards) -> AdvantageOptions {
        AdvantageOptions { scale_rewards, ..AdvantageOptions::default() }
    }

    fn by(estimator: AdvantageEstimator) -> AdvantageOptions {
        AdvantageOptions { estimator, ..AdvantageOptions::default() }
    }

    // Expected values: torch, (r - r.mean()) / (r.std() + 1e-4).
    #[test]
    fn scaled_by_group() {
        check(&[1.0, 0.0, 0.0, 2.0], 4, scaled(ScaleRewards::Group), &[0.261_089, -0.783_27, -0.783_27, 1.305_45]);
    }

    #[test]
    fn scaled_by_batch_or_not_at_all() {
        let std = 0.816_496_6_f32 + 1e-4;
        let rewards = [1.0, 0.0, 2.0, 1.0];
        check(&rewards, 2, scaled(ScaleRewards::Batch), &[0.5 / std, -0.5 / std, 0.5 / std, -0.5 / std]);
        check(&rewards, 2, scaled(ScaleRewards::None), &[0.5, -0.5, 0.5, -0.5]);
    }

    #[test]
    fn equal_rewards_carry_no_signal() {
        check(&[1.0, 1.0, 1.0], 3, scaled(ScaleRewards::Group), &[0.0; 3]);
        check(&[1.0], 1, scaled(ScaleRewards::None), &[0.0]);
        check(&[1.0, 1.0, 1.0], 3, by(AdvantageEstimator::Rloo), &[0.0; 3]);
        check(&[1.0, 1.0, 1.0], 3, by(AdvantageEstimator::ReinforcePlusPlus), &[0.0; 3]);
    }

    fn every_option() -> Vec<AdvantageOptions> {
        let mut all = [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None].map(scaled).to_vec();
        let estimators = [
            AdvantageEstimator::Rloo,
            AdvantageEstimator::ReinforcePlusPlus,
            AdvantageEstimator::ReinforcePlusPlusBaseline,
        ];
        all.extend(estimators.map(by));
        all.push(AdvantageOptions { normalize_advantages: true, ..by(AdvantageEstimator::Rloo) });
        let aggregation = MultiObjectiveAggregation::NormalizeThenSum;
        all.push(AdvantageOptions { aggregation, ..AdvantageOptions::default() });
        all
    }

    /// By two functions, with groups of `group_size`.
    fn of(
        by_function: &[Vec<f32>],
        num_tokens: &[usize],
        excluded: &[bool],
        group_size: usize,
        options: AdvantageOptions,
    ) -> Vec<f32> {
        advantages(&Scores { by_function, weights: &[1.0, 0.5], num_tokens, excluded, group_size }, options)
    }

    #[test]
    fn an_excluded_completion_is_as_if_it_had_never_been_sampled() {
        let scores = [vec![1.0, 0.0, 9.0, 0.25, 2.0, -7.0, 1.0, 0.5], vec![0.0, 1.0, 5.0, 1.0, 0.5, 3.0, 0.0, 1.0]];
        let num_tokens = [3, 1, 8, 4, 2, 9, 5, 7];
        // One of each group of four.
        let excluded = [false, false, true, false, false, true, false, false];
        let left: Vec<Vec<f32>> = scores.iter().map(|scores| kept(scores, &excluded)).collect();
        for options in every_option() {
            let with = of(&scores, &num_tokens, &excluded, 4, options);
            let without = of(&left, &kept(&num_tokens, &excluded), &[false; 6], 3, options);
            assert_eq!(kept(&with, &excluded), without, "{options:?}");
            assert_eq!([with[2], with[5]], [0.0; 2], "{options:?}");
            assert!(without.iter().any(|advantage| *advantage != 0.0), "{options:?}");
        }
    }

    #[test]
    fn where_nobody_is_left_to_compare_with_there_are_no_advantages() {
        for options in every_option() {
            let nobody = of(&[vec![1.0, 3.0, f32::NAN, 2.0]], &[1, 2, 3, 4], &[true; 4], 2, options);
            assert_eq!(nobody, [0.0; 4], "{options:?}");
            let alone = of(&[vec![5.0, 3.0]], &[2, 2], &[false, true], 2, options);
            assert_eq!(alone, [0.0; 2], "{options:?}");
        }
    }

    #[test]
    fn leaving_one_out_compares_with_the_others() {
        check(&[1.0, 0.0, 0.0, 2.0], 4, by(AdvantageEstimator::Rloo), &[1.0 / 3.0, -1.0, -1.0, 5.0 / 3.0]);
    }

    #[test]
    fn tokens_are_whitened_to_mean_0_and_variance_1() {
        // Completions of 1, 2, 3 and 4 tokens.
        let rewards = [3.0_f32, 1.0, 2.0, 0.0];
        let tokens: Vec<f32> = (0..4).flat_map(|index| vec![rewards[index]; index + 1]).collect();
        let (mean, std) = (mean(&tokens), standard_deviation(&tokens));
        let expect: Vec<f32> = rewards.iter().map(|reward| (reward - mean) / std).collect();
        check(&rewards, 4, by(AdvantageEstimator::ReinforcePlusPlus), &expect);
    }
}
