//! What is estimated from right and wrong completions, and how sure it is.

/// The 97.5 % quantile of the normal distribution: two-sided intervals of 95 %.
const Z: f64 = 1.959_963_984_540_054;

/// The mean over prompts of the share of right completions, with its interval of 95 %. `right` has how many of each
/// prompt's `num_samples` completions were right.
///
/// With one completion a prompt the interval is Wilson's (J. Am. Stat. Assoc. 22, 1927, p. 209), which is sound for few
/// prompts and near 0 and 1. With more it is mean ± 1.96 standard errors, clustered by prompt (Miller, "Adding Error Bars to
/// Evals", arXiv 2411.00640, section 2.2): with equally many completions of each prompt that is the standard error of the
/// prompts' means, sqrt(sum (s_i - mean)^2 / (P (P - 1))).
pub(super) fn accuracy(right: &[usize], num_samples: usize) -> (f64, [f64; 2]) {
    let num_prompts = right.len() as f64;
    if right.is_empty() || num_samples == 0 {
        return (0.0, [0.0, 1.0]);
    }
    let share = |&right: &usize| right as f64 / num_samples as f64;
    let mean = right.iter().map(share).sum::<f64>() / num_prompts;
    let (centre, margin) = if num_samples == 1 {
        let scale = 1.0 / (1.0 + Z * Z / num_prompts);
        let variance = mean * (1.0 - mean) / num_prompts + Z * Z / (4.0 * num_prompts * num_prompts);
        (scale * (mean + Z * Z / (2.0 * num_prompts)), scale * Z * variance.sqrt())
    } else if right.len() == 1 {
        // One prompt says nothing of how prompts differ.
        (0.5, 0.5)
    } else {
        let squares = right.iter().map(|right| (share(right) - mean).powi(2)).sum::<f64>();
        (mean, Z * (squares / (num_prompts * (num_prompts - 1.0))).sqrt())
    };
    (mean, [(centre - margin).max(0.0), (centre + margin).min(1.0)])
}

/// The chance that at least one of `k` completions is right, where `right` of `num_samples` were: the unbiased estimator
/// 1 - C(n - c, k) / C(n, k) of Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374,
/// equation 1), as a product that does not overflow.
pub(super) fn pass_at(k: usize, right: usize, num_samples: usize) -> f64 {
    let wrong = num_samples.saturating_sub(right);
    if wrong < k {
        return 1.0;
    }
    1.0 - (wrong + 1..=num_samples).map(|n| 1.0 - k as f64 / n as f64).product::<f64>()
}

/// The k of pass@k that are reported: powers of two below `num_samples`, and `num_samples`.
pub(super) fn ks(num_samples: usize) -> Vec<usize> {
    let powers = (0..usize::BITS).map(|power| 1 << power).take_while(|&k| k < num_samples);
    powers.chain([num_samples]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_close(value: f64, expect: f64) {
        assert!((value - expect).abs() < 1e-9, "{value}, not {expect}");
    }

    /// By counting all ways to choose `k` of the completions.
    fn pass_at_by_counting(k: usize, right: usize, num_samples: usize) -> f64 {
        let chosen = (0_u32..1 << num_samples).filter(|set| set.count_ones() as usize == k);
        let (mut all, mut passing) = (0.0, 0.0);
        for set in chosen {
            all += 1.0;
            passing += f64::from(u8::from(set.trailing_zeros() < right as u32));
        }
        passing / all
    }

    #[test]
    fn pass_at_k_is_the_share_of_choices_with_a_right_one() {
        for num_samples in 1..=8 {
            for right in 0..=num_samples {
                for k in 1..=num_samples {
                    check_close(pass_at(k, right, num_samples), pass_at_by_counting(k, right, num_samples));
                }
                check_close(pass_at(1, right, num_samples), right as f64 / num_samples as f64);
            }
        }
        // C(1000, 500) is no number that fits.
        assert!(pass_at(500, 1, 1000) > 0.499 && pass_at(500, 1, 1000) < 0.501);
    }

    #[test]
    fn powers_of_two_and_all() {
        assert_eq!([ks(1), ks(2), ks(4), ks(6)], [vec![1], vec![1, 2], vec![1, 2, 4], vec![1, 2, 4, 6]]);
    }

    /// Of statsmodels' `proportion_confint(count, nobs, method="wilson")`.
    #[test]
    fn one_completion_a_prompt_has_the_interval_of_wilson() {
        let right = |count: usize, all: usize| (0..all).map(|index| usize::from(index < count)).collect::<Vec<_>>();
        let (mean, [low, high]) = accuracy(&right(10, 50), 1);
        check_close(mean, 0.2);
        assert!((low - 0.112_437_5).abs() < 1e-6 && (high - 0.330_371_1).abs() < 1e-6, "{low} {high}");
        let (_, [low, high]) = accuracy(&right(0, 20), 1);
        assert!(low == 0.0 && (high - 0.161_125_2).abs() < 1e-6, "{low} {high}");
        let (_, interval) = accuracy(&[], 1);
        assert_eq!(interval, [0.0, 1.0]);
    }

    #[test]
    fn several_completions_of_a_prompt_are_one_cluster() {
        let (mean, [low, high]) = accuracy(&[0, 2, 4, 2], 4);
        check_close(mean, 0.5);
        // Means 0, 0.5, 1, 0.5: a variance of 1/6 over 4 prompts.
        check_close(high - low, 2.0 * Z * (1.0_f64 / 6.0 / 4.0).sqrt());
        // The same completions as if there were no prompts are far surer of it.
        let alone: Vec<usize> = (0..16).map(|index| index % 2).collect();
        let (_, [narrow, wide]) = accuracy(&alone, 1);
        assert!(wide - narrow < high - low);
        assert_eq!(accuracy(&[3], 4).1, [0.0, 1.0]);
    }
}
