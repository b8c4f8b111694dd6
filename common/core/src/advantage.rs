//! Group-relative advantages.
//!
//! GRPO (Shao et al., "DeepSeekMath", arXiv 2402.03300, section 4.1.2) scales the rewards of a group to mean 0 and
//! standard deviation 1. As in TRL, the deviation is the unbiased one and 1e-4 is added to it. Dr. GRPO (Liu et al.,
//! arXiv 2503.20783) leaves the scaling out, because it up-weights groups that are nearly solved.

use serde::{Deserialize, Serialize};

const EPSILON: f32 = 1e-4;

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

/// Advantage of every rollout, in order. `rewards` holds groups of `group_size` one after the other.
///
/// # Shapes
/// - rewards: `[P * G]`, returns `[P * G]`.
///
/// A group whose rewards are all equal yields zeros: it carries no signal.
///
/// # Panics
/// If `group_size` does not divide the number of rewards.
#[must_use]
pub fn advantages(rewards: &[f32], group_size: usize, scale: ScaleRewards) -> Vec<f32> {
    assert!(group_size > 0 && rewards.len().is_multiple_of(group_size), "rewards must be whole groups");
    let batch_std = standard_deviation(rewards);
    rewards
        .chunks_exact(group_size)
        .flat_map(|group| {
            let mean = mean(group);
            let divisor = match scale {
                ScaleRewards::Group => standard_deviation(group) + EPSILON,
                ScaleRewards::Batch => batch_std + EPSILON,
                ScaleRewards::None => 1.0,
            };
            group.iter().map(move |reward| (reward - mean) / divisor)
        })
        .collect()
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
    fn check(rewards: &[f32], group_size: usize, scale: ScaleRewards, expect: &[f32]) {
        let got = advantages(rewards, group_size, scale);
        assert_eq!(got.len(), expect.len());
        for (got, expect) in got.iter().zip(expect) {
            assert!((got - expect).abs() < 1e-5, "{got} is not {expect}");
        }
    }

    // Expected values: torch, (r - r.mean()) / (r.std() + 1e-4).
    #[test]
    fn scaled_by_group() {
        check(&[1.0, 0.0, 0.0, 2.0], 4, ScaleRewards::Group, &[0.261_089, -0.783_27, -0.783_27, 1.305_45]);
    }

    #[test]
    fn scaled_by_batch_or_not_at_all() {
        let std = 0.816_496_6_f32 + 1e-4;
        check(&[1.0, 0.0, 2.0, 1.0], 2, ScaleRewards::Batch, &[0.5 / std, -0.5 / std, 0.5 / std, -0.5 / std]);
        check(&[1.0, 0.0, 2.0, 1.0], 2, ScaleRewards::None, &[0.5, -0.5, 0.5, -0.5]);
    }

    #[test]
    fn equal_rewards_carry_no_signal() {
        check(&[1.0, 1.0, 1.0], 3, ScaleRewards::Group, &[0.0; 3]);
        check(&[1.0], 1, ScaleRewards::None, &[0.0]);
    }
}
