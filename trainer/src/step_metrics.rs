//! The numbers of a step, under TRL's names where it has them.

use std::collections::BTreeMap;

use aha_core::advantage::{mean, standard_deviation};
use aha_core::config::RunConfig;
use aha_core::reflection::Reflection;
use aha_core::reward::Outcome;
use aha_core::rollout::{Completion, FinishReason, Group, Reward};
use aha_nn::comm::{CommError, ProcessGroup, ReduceOp};
use tch::Tensor;

use crate::loggers::{Metrics, names};
use crate::torch::learner::StepOutput;
use crate::training_batch::TrainingBatch;

/// What the completions and their rewards say. A pure function of what all ranks have.
#[must_use]
pub fn rollout_metrics(groups: &[Group], batch: &TrainingBatch, config: &RunConfig) -> Metrics {
    let mut metrics = Metrics::default();
    let completions = || groups.iter().flat_map(|group| &group.completions);
    for spec in &config.rewards {
        let rewards: Vec<&Reward> = completions()
            .flat_map(|completion| &completion.rewards)
            .filter(|reward| reward.function == spec.name())
            .collect();
        if rewards.is_empty() {
            continue; // it is of sources that this step has no prompts of
        }
        let scores: Vec<f32> = rewards.iter().filter(|reward| reward.is_verdict()).map(|reward| reward.score).collect();
        metrics.set(format!("rewards/{}/mean", spec.name()), f64::from(mean(&scores)));
        metrics.set(format!("rewards/{}/std", spec.name()), f64::from(standard_deviation(&scores)));
        for outcome in [Outcome::Wrong, Outcome::Unparsable, Outcome::Timeout, Outcome::Crash] {
            let count = rewards.iter().filter(|reward| reward.outcome == outcome.name()).count();
            metrics.set(format!("rewards/{}/{}", spec.name(), outcome.name()), count as f64);
        }
    }
    if !batch.soft_punishments.is_empty() {
        metrics.set("rewards/soft_overlong_punishment/mean", f64::from(mean(&batch.soft_punishments)));
        metrics.set("rewards/soft_overlong_punishment/std", f64::from(standard_deviation(&batch.soft_punishments)));
    }
    let judged: Vec<Option<f32>> =
        batch.rewards.iter().zip(&batch.excluded).map(|(&reward, excluded)| (!excluded).then_some(reward)).collect();
    let of_judged = |rewards: &[Option<f32>]| rewards.iter().flatten().copied().collect::<Vec<f32>>();
    let by_group = judged.chunks(config.rollout.num_generations);
    let group_stds: Vec<f32> = by_group.map(|group| standard_deviation(&of_judged(group))).collect();
    let without_signal = group_stds.iter().filter(|&&std| std == 0.0).count();
    metrics.set("reward", f64::from(mean(&of_judged(&judged))));
    for (source, rewards) in rewards_by_source(groups, &judged, config.rollout.num_generations) {
        metrics.set(format!("reward/{source}/mean"), f64::from(mean(&rewards)));
    }
    metrics.set("reward_std", f64::from(mean(&group_stds)));
    metrics.set("frac_reward_zero_std", without_signal as f64 / group_stds.len().max(1) as f64);

    let lengths: Vec<f32> = completions().map(|completion| completion.token_ids.len() as f32).collect();
    let terminated: Vec<f32> = completions()
        .filter(|completion| completion.finish_reason == FinishReason::Stop)
        .map(|completion| completion.token_ids.len() as f32)
        .collect();
    for (name, lengths) in [("length", &lengths), ("terminated_length", &terminated)] {
        metrics.set(format!("completions/mean_{name}"), f64::from(mean(lengths)));
        metrics.set(format!("completions/min_{name}"), lengths.iter().copied().reduce(f32::min).unwrap_or(0.0).into());
        metrics.set(format!("completions/max_{name}"), lengths.iter().copied().reduce(f32::max).unwrap_or(0.0).into());
    }
    let clipped = 1.0 - terminated.len() as f64 / lengths.len().max(1) as f64;
    metrics.set("completions/clipped_ratio", clipped);
    metrics.set("completions/excluded", batch.excluded.iter().filter(|excluded| **excluded).count() as f64);
    reflection_metrics(completions(), &mut metrics);
    metrics
}

/// How often completions show signs of reflection, and of correcting themselves.
fn reflection_metrics<'a>(completions: impl Iterator<Item = &'a Completion> + Clone, metrics: &mut Metrics) {
    let found: Reflection = completions.clone().map(|completion| Reflection::of(&completion.text)).sum();
    let num_tokens: usize = completions.map(|completion| completion.token_ids.len()).sum();
    let per_1000_tokens = |count: usize| 1000.0 * count as f64 / num_tokens.max(1) as f64;
    metrics.set("completions/reflections_per_1000_tokens", per_1000_tokens(found.num_reflections));
    metrics.set("completions/self_corrections_per_1000_tokens", per_1000_tokens(found.num_self_corrections));
}

/// The rewards of every named source's completions, where they have one.
fn rewards_by_source<'a>(
    groups: &'a [Group],
    rewards: &[Option<f32>],
    group_size: usize,
) -> BTreeMap<&'a str, Vec<f32>> {
    let mut by_source: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
    for (group, rewards) in groups.iter().zip(rewards.chunks(group_size)) {
        by_source.entry(&group.prompt.origin.source).or_default().extend(rewards.iter().flatten());
    }
    by_source.remove("");
    by_source
}

/// How many versions the tokens are older than the policy that trains on them in `step`, counted from 0.
#[must_use]
pub fn lag_metrics(groups: &[Group], config: &RunConfig, step: u64) -> Metrics {
    let completions = groups.iter().flat_map(|group| &group.completions);
    let mut num_tokens = vec![0.0_f64; config.rollout.max_lag as usize + 1];
    for span in completions.flat_map(|completion| &completion.spans) {
        // No token is older than that.
        let lag = step.saturating_sub(span.version.0).min(config.rollout.max_lag);
        num_tokens[lag as usize] += f64::from(span.num_tokens);
    }
    let total = num_tokens.iter().sum::<f64>().max(1.0);
    let mut metrics = Metrics::default();
    let longest = num_tokens.iter().rposition(|&num_tokens| num_tokens > 0.0).unwrap_or(0);
    metrics.set("policy/lag", longest as f64);
    if config.rollout.max_lag > 0 {
        let mean = num_tokens.iter().enumerate().map(|(lag, num_tokens)| lag as f64 * num_tokens).sum::<f64>() / total;
        metrics.set("policy/lag_mean", mean);
        for (lag, num_tokens) in num_tokens.iter().enumerate() {
            metrics.set(format!("policy/lag_ratio/{lag}"), num_tokens / total);
        }
    }
    metrics
}

/// What the optimizer step says, over all ranks, and for how long the generators had nothing to do for any of them.
///
/// # Errors
/// If the reduction fails.
pub fn step_metrics(
    (group, config): (&ProcessGroup, &RunConfig),
    (output, idle): (&StepOutput, f64),
    sampled: &[&[f32]],
    metrics: &mut Metrics,
) -> Result<(), CommError> {
    let (mut difference_sum, mut difference_max, mut num_compared) = (0.0_f64, 0.0_f64, 0_usize);
    for (trained, sampled) in output.logprobs.iter().zip(sampled).filter(|(trained, _)| !trained.is_empty()) {
        for (trained, sampled) in trained.iter().zip(*sampled) {
            let difference = f64::from((trained - sampled).abs());
            difference_sum += difference;
            num_compared += 1;
            // `max` would pass over a NaN, which is the worst difference there is.
            difference_max = if difference.is_nan() { difference } else { difference_max.max(difference) };
        }
    }
    let mut sums = Tensor::from_slice(&[
        output.num_tokens as f64,
        output.loss,
        output.entropy_sum,
        output.sums.kl,
        output.sums.clipped_low,
        output.sums.clipped_high,
        difference_sum,
        num_compared as f64,
        output.sums.masked,
        output.sums.correction,
        output.num_packed_tokens as f64,
    ])
    .to_device(group.device());
    group.all_reduce(&mut sums, ReduceOp::Sum)?;
    let extremes = [difference_max, output.sums.correction_max, -output.sums.correction_min, -idle];
    let mut max = Tensor::from_slice(&extremes).to_device(group.device());
    group.all_reduce(&mut max, ReduceOp::Max)?;

    let sum = |index: i64| sums.double_value(&[index]);
    let num_tokens = sum(0).max(1.0);
    metrics.set("loss", sum(1));
    metrics.set("num_packed_tokens", sum(10));
    metrics.set("grad_norm", output.grad_norm);
    for (name, time) in output.times.named() {
        metrics.set(name, time.as_secs_f64());
    }
    metrics.set(names::SKIPPED_UPDATES, f64::from(output.num_skipped));
    metrics.set("entropy", sum(2) / num_tokens);
    metrics.set("kl", sum(3) / num_tokens);
    metrics.set("clip_ratio/low_mean", sum(4) / num_tokens);
    metrics.set("clip_ratio/high_mean", sum(5) / num_tokens);
    metrics.set("clip_ratio/region_mean", (sum(4) + sum(5)) / num_tokens);
    metrics.set("sampling/sampling_logp_difference/mean", sum(6) / sum(7).max(1.0));
    metrics.set("sampling/sampling_logp_difference/max", max.double_value(&[0]));
    metrics.set("time/wait_for_weights", -max.double_value(&[3]));
    if config.train.masks_tokens() {
        metrics.set("policy_loss/masked_ratio", sum(8) / num_tokens);
    }
    if config.train.rollout_importance_sampling_correction {
        metrics.set("sampling/importance_sampling_ratio/mean", sum(9) / num_tokens);
        metrics.set("sampling/importance_sampling_ratio/min", -max.double_value(&[2]));
        metrics.set("sampling/importance_sampling_ratio/max", max.double_value(&[1]));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use aha_core::config::RewardSpec;
    use aha_core::ids::PromptId;
    use aha_core::rollout::{Origin, Prompt, Reward};

    use super::*;

    fn completion(text: &str, num_tokens: usize) -> Completion {
        Completion {
            prompt_id: PromptId(0),
            sample_index: 0,
            token_ids: vec![0; num_tokens],
            logprobs: Vec::new(),
            spans: Vec::new(),
            finish_reason: FinishReason::Stop,
            text: text.to_owned(),
            rewards: Vec::new(),
            raw_logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
        }
    }

    /// A group of one completion with these scores.
    fn group(id: u64, source: &str, scores: &[(&str, f32)]) -> Group {
        let reward = |&(function, score): &(&str, f32)| {
            let (function, outcome) = (function.to_owned(), "score".to_owned());
            Reward { function, score, outcome }
        };
        let scored =
            Completion { prompt_id: PromptId(id), rewards: scores.iter().map(reward).collect(), ..completion("", 1) };
        let origin = Origin { source: source.to_owned(), rewards: None };
        let (text, columns) = (String::new(), serde_json::Map::new());
        let prompt = Prompt { id: PromptId(id), text, token_ids: vec![1], columns, origin };
        Group { prompt, completions: vec![scored] }
    }

    #[test]
    fn rewards_are_means_over_what_has_them_and_over_sources() {
        let mut config = RunConfig::default();
        config.rollout.num_generations = 1;
        config.rewards = ["format", "equation", "length"].map(RewardSpec::of).to_vec();
        let groups = [
            group(0, "puzzles", &[("format", 1.0), ("equation", 1.0)]),
            group(1, "puzzles", &[("format", 0.0), ("equation", 0.0)]),
            group(2, "chat", &[("format", 1.0)]),
            group(3, "chat", &[("format", 1.0)]),
        ];
        let metrics = rollout_metrics(&groups, &TrainingBatch::new(&groups, &config, 0), &config);
        assert_eq!((metrics.get("rewards/format/mean"), metrics.get("rewards/equation/mean")), (Some(0.75), Some(0.5)));
        assert_eq!(metrics.get("rewards/length/mean"), None);
        assert_eq!((metrics.get("reward/puzzles/mean"), metrics.get("reward/chat/mean")), (Some(1.0), Some(1.0)));
        assert_eq!(metrics.get("reward"), Some(1.0));
    }

    #[test]
    fn reflections_are_counted_by_tokens_and_not_by_completion() {
        let completions = [completion("= 1. Wait, = 2. Let me check: = 2", 30), completion("= 3", 470)];
        let mut metrics = Metrics::default();
        reflection_metrics(completions.iter(), &mut metrics);
        assert_eq!(metrics.get("completions/reflections_per_1000_tokens"), Some(4.0));
        assert_eq!(metrics.get("completions/self_corrections_per_1000_tokens"), Some(2.0));
        reflection_metrics([].iter(), &mut metrics);
        assert_eq!(metrics.get("completions/reflections_per_1000_tokens"), Some(0.0));
    }
}
