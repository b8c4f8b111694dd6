//! What the `train` section must satisfy: the optimizer's numbers, and options of the loss that fit each other.

use super::validate::Problems;
use super::{RunConfig, Train};
use crate::advantage::{AdvantageEstimator, MultiObjectiveAggregation, ScaleRewards};
use crate::batch::LossType;
use crate::objective::{ImportanceSamplingLevel, KlEstimator};
use crate::optimizer::OptimizerKind;
use crate::schedule::LrSchedulerType;

impl RunConfig {
    pub(super) fn check_train(&self, problems: &mut Problems) {
        let train = &self.train;
        train.check_optimizer(problems);
        train.check_ratio(problems);
        train.check_loss_parameters(problems);
        train.check_kl(problems);
        train.check_advantages(problems);
        train.check_correction(problems);
        self.check_batch(problems);
        problems.unless(self.sft.batch_size > 0, || "sft.batch_size: must be at least 1".to_owned());
    }

    /// How a step's completions are split, and what the rewards make of them.
    fn check_batch(&self, problems: &mut Problems) {
        let (train, rollout) = (&self.train, &self.rollout);
        let num_steps = train.steps_per_generation;
        let even = num_steps > 0 && rollout.generation_batch_size.is_multiple_of(num_steps);
        problems.unless(even, || {
            format!(
                "train.steps_per_generation: {num_steps} must be at least 1 and divide rollout.generation_batch_size {}",
                rollout.generation_batch_size
            )
        });
        if train.loss_type == LossType::Bnpo && even {
            let (size, completions) = (self.bnpo_batch_size(), rollout.generation_batch_size / num_steps);
            problems.unless(size > 0 && completions.is_multiple_of(size), || {
                format!("train.bnpo_batch_size: {size} must divide the {completions} completions of an update")
            });
        }
        problems.unless(train.soft_punish_cache <= rollout.max_completion_length, || {
            format!(
                "train.soft_punish_cache: {} is over rollout.max_completion_length {}",
                train.soft_punish_cache, rollout.max_completion_length
            )
        });
        problems.unless(!train.dynamic_sampling || !self.rewards.is_empty(), || {
            "train.dynamic_sampling: no group has a signal without rewards".to_owned()
        });
    }

    /// Sequences of a local batch of `bnpo`.
    #[must_use]
    pub fn bnpo_batch_size(&self) -> usize {
        if self.train.bnpo_batch_size > 0 { self.train.bnpo_batch_size } else { self.rollout.num_generations }
    }
}

impl Train {
    fn check_optimizer(&self, problems: &mut Problems) {
        self.check_memory(problems);
        problems.unless(self.max_steps > 0, || "train.max_steps: must be at least 1".to_owned());
        problems.unless(self.num_iterations > 0, || "train.num_iterations: must be at least 1".to_owned());
        problems.unless(self.save_steps > 0, || "train.save_steps: must be at least 1".to_owned());
        for (key, value) in [
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
        ] {
            problems.at_least_0(key, value);
        }
        for (key, value) in [
            ("warmup_ratio", self.warmup_ratio),
            ("min_lr_rate", self.min_lr_rate),
            ("adam_beta1", self.adam_beta1),
            ("adam_beta2", self.adam_beta2),
        ] {
            problems.share(key, value);
        }
        let has_warmup = self.lr_scheduler_type != LrSchedulerType::Constant || self.num_warmup_steps() == 0;
        problems.unless(has_warmup, || {
            format!(
                "train.lr_scheduler_type: constant has no warm-up, got one of {} steps; take constant_with_warmup",
                self.num_warmup_steps()
            )
        });
        problems.positive("train.adam_epsilon", self.adam_epsilon);
        if let Some(rate) = self.muon_learning_rate {
            problems.at_least_0("muon_learning_rate", rate);
            problems.unless(self.optimizer == OptimizerKind::Muon, || {
                format!("train.muon_learning_rate: {rate} has no effect on optimizer {:?}", self.optimizer)
            });
            problems.unless(self.learning_rate > 0.0, || {
                "train.learning_rate: must be over 0 beside train.muon_learning_rate, since both follow one schedule"
                    .to_owned()
            });
        }
        if let Some(seconds) = self.max_wall_clock_seconds {
            problems.positive("train.max_wall_clock_seconds", seconds);
        }
        problems.positive("train.collective_timeout_seconds", self.collective_timeout_seconds);
        problems.positive("train.push_timeout_seconds", self.push_timeout_seconds);
    }

    /// What ranks share out, keep elsewhere, or compute again.
    fn check_memory(&self, problems: &mut Problems) {
        problems.unless(self.zero_stage <= 3, || {
            format!("train.zero_stage: must be 0, 1, 2 or 3, got {}", self.zero_stage)
        });
        problems.unless(!self.offload_optimizer || self.optimizer != OptimizerKind::Muon, || {
            "train.offload_optimizer: muon makes its updates from whole matrices on the device; use adamw or adamw_8bit"
                .to_owned()
        });
        problems.unless(!self.offload_params || self.zero_stage == 3, || {
            format!("train.offload_params: needs train.zero_stage 3, got {}", self.zero_stage)
        });
        let interval = self.gradient_checkpointing_interval;
        problems.unless(interval > 0, || "train.gradient_checkpointing_interval: must be at least 1".to_owned());
        problems.unless(self.gradient_checkpointing || interval == 1, || {
            format!(
                "train.gradient_checkpointing_interval: {interval} has no effect without train.gradient_checkpointing"
            )
        });
    }

    /// The ratio's level and its clipping.
    fn check_ratio(&self, problems: &mut Problems) {
        let epsilon_high = self.epsilon_high.unwrap_or(self.epsilon);
        problems.share("epsilon", f64::from(self.epsilon));
        problems.at_least_0("epsilon_high", f64::from(epsilon_high));
        let cispo = self.loss_type == LossType::Cispo;
        problems.unless(!cispo || epsilon_high >= 1.0, || {
            format!("train.epsilon_high: for loss_type cispo it bounds the ratio itself, must be at least 1, got {epsilon_high}")
        });
        if let Some(delta) = self.delta {
            problems.unless(delta.is_finite() && delta > 1.0 + epsilon_high, || {
                format!("train.delta: must be over 1 + epsilon_high = {}, got {delta}", 1.0 + epsilon_high)
            });
            let clips = !matches!(self.loss_type, LossType::Cispo | LossType::Sapo | LossType::Vespo);
            problems.unless(clips, || {
                format!("train.delta: {delta} has no effect on loss_type {:?}, which does not clip", self.loss_type)
            });
        }
        let level = self.importance_sampling_level;
        problems.unless(self.loss_type != LossType::Vespo || level == ImportanceSamplingLevel::Token, || {
            format!("train.importance_sampling_level: must be token for loss_type vespo, which weighs sequences itself, got {level:?}")
        });
        problems.unless(self.loss_type != LossType::Luspo || level != ImportanceSamplingLevel::Token, || {
            "train.importance_sampling_level: must be sequence or sequence_token for loss_type luspo, got token"
                .to_owned()
        });
    }

    fn check_loss_parameters(&self, problems: &mut Problems) {
        for (key, value) in
            [("sapo_temperature_pos", self.sapo_temperature_pos), ("sapo_temperature_neg", self.sapo_temperature_neg)]
        {
            problems.positive(&format!("train.{key}"), f64::from(value));
        }
        for (key, value) in [
            ("vespo_k_pos", self.vespo_k_pos),
            ("vespo_lambda_pos", self.vespo_lambda_pos),
            ("vespo_k_neg", self.vespo_k_neg),
            ("vespo_lambda_neg", self.vespo_lambda_neg),
            ("entropy_coef", self.entropy_coef),
            ("entropy_coef_min", self.entropy_coef_min),
            ("entropy_coef_delta", self.entropy_coef_delta),
            ("entropy_target", self.entropy_target),
            ("soft_punish_weight", self.soft_punish_weight),
        ] {
            problems.at_least_0(key, f64::from(value));
        }
        problems.share("top_entropy_quantile", f64::from(self.top_entropy_quantile));
        let (least, most) = (self.entropy_coef_min, self.entropy_coef_max);
        problems.unless(most.is_finite() && most >= least, || {
            format!("train.entropy_coef_max: {most} must be at least train.entropy_coef_min {least}")
        });
        let starts_within = !self.use_adaptive_entropy || (least..=most).contains(&self.entropy_coef);
        problems.unless(starts_within, || {
            format!(
                "train.entropy_coef: {} must be in [{least}, {most}], train.entropy_coef_min and _max, where it adapts",
                self.entropy_coef
            )
        });
        problems.unless(!self.dynamic_sampling || self.max_resample_rounds > 0, || {
            "train.max_resample_rounds: must be at least 1 for train.dynamic_sampling".to_owned()
        });
    }

    fn check_kl(&self, problems: &mut Problems) {
        problems.at_least_0("beta", f64::from(self.beta));
        let pulls = self.beta == 0.0 || self.kl_estimator != KlEstimator::K1 || self.use_bias_correction_kl;
        problems.unless(pulls, || {
            "train.kl_estimator: k1 pulls nowhere on average; set train.use_bias_correction_kl, or take k2 or k3"
                .to_owned()
        });
        problems.unless(!self.sync_ref_model || self.beta > 0.0, || {
            "train.sync_ref_model: there is no reference model to move, since train.beta is 0".to_owned()
        });
        problems.unless(!self.use_kl_in_reward || self.beta > 0.0, || {
            "train.use_kl_in_reward: the divergence has no weight, since train.beta is 0".to_owned()
        });
        let has_effect = self.kl_estimator == KlEstimator::K3 && !self.use_bias_correction_kl;
        problems.unless(!self.use_kl_in_reward || has_effect, || {
            "train.use_kl_in_reward: takes the log-ratio itself; train.kl_estimator and train.use_bias_correction_kl are \
             options of the loss, without effect on it"
                .to_owned()
        });
        problems.share("ref_model_mixup_alpha", self.ref_model_mixup_alpha);
        problems.unless(self.ref_model_sync_steps > 0, || "train.ref_model_sync_steps: must be at least 1".to_owned());
    }

    fn check_advantages(&self, problems: &mut Problems) {
        let estimator = self.advantage_estimator;
        let grpo = estimator == AdvantageEstimator::Grpo;
        problems.unless(grpo || self.multi_objective_aggregation == MultiObjectiveAggregation::SumThenNormalize, || {
            format!("train.multi_objective_aggregation: normalize_then_sum goes with advantage_estimator grpo alone, got {estimator:?}")
        });
        let sums = self.multi_objective_aggregation == MultiObjectiveAggregation::SumThenNormalize;
        problems.unless(sums || !self.use_kl_in_reward, || {
            "train.use_kl_in_reward: normalize_then_sum has no one reward to take the divergence off; use \
             multi_objective_aggregation sum_then_normalize"
                .to_owned()
        });
        problems.unless(grpo || self.scale_rewards != ScaleRewards::Batch, || {
            format!("train.scale_rewards: batch goes with advantage_estimator grpo alone, got {estimator:?}")
        });
        problems.unless(estimator == AdvantageEstimator::Rloo || !self.normalize_advantages, || {
            format!("train.normalize_advantages: goes with advantage_estimator rloo alone, got {estimator:?}")
        });
    }

    fn check_correction(&self, problems: &mut Problems) {
        let (min, max) = (self.rollout_importance_sampling_clip_min, self.rollout_importance_sampling_clip_max);
        for (key, bound) in
            [("rollout_importance_sampling_clip_min", min), ("rollout_importance_sampling_clip_max", max)]
        {
            if let Some(bound) = bound {
                problems.at_least_0(key, f64::from(bound));
            }
        }
        if let (Some(min), Some(max)) = (min, max) {
            problems.unless(min < max, || {
                format!(
                    "train.rollout_importance_sampling_clip_min: {min} must be under \
                     train.rollout_importance_sampling_clip_max {max}"
                )
            });
        }
        if self.rollout_importance_sampling_correction {
            let mode = self.rollout_importance_sampling_mode;
            problems.unless(mode.masks() || min.is_some() || max.is_some(), || {
                format!("train.rollout_importance_sampling_mode: {mode:?} needs a bound, _clip_max or _clip_min")
            });
            problems.unless(self.loss_type != LossType::Vespo || !mode.is_sequence(), || {
                format!("train.rollout_importance_sampling_mode: must be token_truncate or token_mask for loss_type vespo, got {mode:?}")
            });
        }
        if let Some(threshold) = self.off_policy_mask_threshold {
            problems.positive("train.off_policy_mask_threshold", f64::from(threshold));
        }
    }
}

impl Problems {
    fn at_least_0(&mut self, key: &str, value: f64) {
        self.unless(value.is_finite() && value >= 0.0, || format!("train.{key}: must be >= 0, got {value}"));
    }

    fn share(&mut self, key: &str, value: f64) {
        self.unless((0.0..=1.0).contains(&value), || format!("train.{key}: must be in [0, 1], got {value}"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Problems of a configuration whose `train` section is this.
    fn problems(train: Value) -> Vec<String> {
        let train: Train = serde_json::from_value(train).unwrap();
        let config = RunConfig { train, ..RunConfig::default() };
        config.problems().into_iter().filter(|problem| problem.starts_with("train.")).collect()
    }

    /// One problem, which names all of `expect`: key, value and bound.
    #[track_caller]
    fn check(train: Value, expect: &[&str]) {
        let problems = problems(train);
        assert_eq!(problems.len(), 1, "{problems:?}");
        for expect in expect {
            assert!(problems[0].contains(expect), "no {expect:?} in {}", problems[0]);
        }
    }

    #[test]
    fn the_defaults_have_no_problem() {
        assert_eq!(problems(json!({})), Vec::<String>::new());
    }

    #[test]
    fn numbers_out_of_range_are_named_with_their_bound() {
        for key in [
            "beta",
            "epsilon_high",
            "entropy_coef",
            "entropy_target",
            "soft_punish_weight",
            "vespo_k_pos",
            "vespo_lambda_neg",
        ] {
            check(json!({key: -0.5}), &[&format!("train.{key}: "), ">= 0", "-0.5"]);
        }
        for key in ["epsilon", "top_entropy_quantile", "ref_model_mixup_alpha"] {
            // The upper clip range follows epsilon where it is not set.
            check(json!({key: 1.5, "epsilon_high": 0.2}), &[&format!("train.{key}: "), "[0, 1]", "1.5"]);
        }
        for key in
            ["sapo_temperature_pos", "sapo_temperature_neg", "off_policy_mask_threshold", "max_wall_clock_seconds"]
        {
            check(json!({key: 0.0}), &[&format!("train.{key}: "), "over 0", "got 0"]);
        }
        for key in ["num_iterations", "ref_model_sync_steps"] {
            check(json!({key: 0}), &[&format!("train.{key}: "), "at least 1"]);
        }
        for key in ["rollout_importance_sampling_clip_min", "rollout_importance_sampling_clip_max"] {
            check(json!({key: -1.0}), &[&format!("train.{key}: "), ">= 0", "-1"]);
        }
    }

    #[test]
    fn options_of_memory_fit_each_other() {
        check(json!({"zero_stage": 4}), &["train.zero_stage: ", "0, 1, 2 or 3", "got 4"]);
        check(json!({"offload_optimizer": true, "optimizer": "muon"}), &["train.offload_optimizer: ", "muon"]);
        check(json!({"offload_params": true}), &["train.offload_params: ", "zero_stage 3", "got 2"]);
        assert!(problems(json!({"offload_params": true, "offload_optimizer": true, "zero_stage": 3})).is_empty());
        check(
            json!({"gradient_checkpointing": true, "gradient_checkpointing_interval": 0}),
            &["train.gradient_checkpointing_interval: ", "at least 1"],
        );
        check(
            json!({"gradient_checkpointing_interval": 2}),
            &["train.gradient_checkpointing_interval: 2", "gradient_checkpointing"],
        );
    }

    #[test]
    fn the_clip_range_and_its_bound_fit_the_loss() {
        check(json!({"delta": 1.2}), &["train.delta: ", "1 + epsilon_high = 1.2", "got 1.2"]);
        check(json!({"delta": 2.0, "loss_type": "sapo"}), &["train.delta: 2", "Sapo"]);
        check(json!({"loss_type": "cispo"}), &["train.epsilon_high: ", "at least 1", "0.2"]);
        assert!(problems(json!({"loss_type": "cispo", "epsilon_high": 5.0})).is_empty());
    }

    #[test]
    fn ratios_of_sequences_fit_the_loss() {
        check(json!({"loss_type": "luspo"}), &["train.importance_sampling_level: ", "sequence", "got token"]);
        check(
            json!({"loss_type": "vespo", "importance_sampling_level": "sequence"}),
            &["train.importance_sampling_level: ", "must be token", "Sequence"],
        );
        check(
            json!({"loss_type": "vespo", "rollout_importance_sampling_correction": true}),
            &["train.rollout_importance_sampling_mode: ", "token_truncate or token_mask", "SequenceMask"],
        );
    }

    #[test]
    fn bounds_of_the_correction_are_in_order_and_there() {
        check(
            json!({"rollout_importance_sampling_clip_min": 3.5}),
            &["train.rollout_importance_sampling_clip_min: 3.5", "clip_max 3"],
        );
        check(
            json!({"rollout_importance_sampling_correction": true, "rollout_importance_sampling_clip_max": null,
                "rollout_importance_sampling_mode": "token_truncate"}),
            &["train.rollout_importance_sampling_mode: TokenTruncate", "bound"],
        );
    }

    #[test]
    fn a_penalty_needs_a_pull_and_a_reference_to_move() {
        check(json!({"beta": 0.1, "kl_estimator": "k1"}), &["train.kl_estimator: k1", "use_bias_correction_kl"]);
        assert!(problems(json!({"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": true})).is_empty());
        check(json!({"sync_ref_model": true}), &["train.sync_ref_model: ", "train.beta is 0"]);
        check(json!({"use_kl_in_reward": true}), &["train.use_kl_in_reward: ", "train.beta is 0"]);
        assert!(problems(json!({"use_kl_in_reward": true, "beta": 0.1})).is_empty());
        for option in [json!({"kl_estimator": "k2"}), json!({"use_bias_correction_kl": true})] {
            let mut train = option;
            (train["use_kl_in_reward"], train["beta"]) = (json!(true), json!(0.1));
            check(train, &["train.use_kl_in_reward: ", "train.kl_estimator"]);
        }
        check(
            json!({"use_kl_in_reward": true, "beta": 0.1, "multi_objective_aggregation": "normalize_then_sum"}),
            &["train.use_kl_in_reward: normalize_then_sum", "sum_then_normalize"],
        );
    }

    #[test]
    fn an_adaptive_entropy_coefficient_begins_within_its_bounds() {
        let adaptive = |coef: f32| json!({"use_adaptive_entropy": true, "entropy_coef": coef, "entropy_coef_max": 0.1});
        assert!(problems(adaptive(0.1)).is_empty());
        check(adaptive(0.2), &["train.entropy_coef: 0.2", "[0, 0.1]"]);
        check(json!({"entropy_coef_min": 2.0}), &["train.entropy_coef_max: 1", "entropy_coef_min 2"]);
    }

    #[test]
    fn options_of_one_estimator_are_refused_with_another() {
        check(
            json!({"advantage_estimator": "rloo", "multi_objective_aggregation": "normalize_then_sum"}),
            &["train.multi_objective_aggregation: ", "Rloo"],
        );
        check(
            json!({"advantage_estimator": "reinforce_plus_plus", "scale_rewards": "batch"}),
            &["train.scale_rewards: ", "ReinforcePlusPlus"],
        );
        check(json!({"normalize_advantages": true}), &["train.normalize_advantages: ", "rloo", "Grpo"]);
    }

    #[test]
    fn a_batch_is_split_evenly() {
        check(json!({"steps_per_generation": 0}), &["train.steps_per_generation: 0", "64"]);
        check(json!({"steps_per_generation": 7}), &["train.steps_per_generation: 7", "64"]);
        check(
            json!({"loss_type": "bnpo", "bnpo_batch_size": 5, "steps_per_generation": 2}),
            &["train.bnpo_batch_size: 5", "32"],
        );
        check(json!({"soft_punish_cache": 513}), &["train.soft_punish_cache: 513", "512"]);
    }

    #[test]
    fn a_warm_up_needs_a_schedule_that_has_one() {
        for warmup in [json!({"warmup_steps": 7}), json!({"warmup_ratio": 0.065})] {
            let mut train = warmup.clone();
            train["lr_scheduler_type"] = json!("constant");
            check(train, &["train.lr_scheduler_type: constant", "7 steps", "constant_with_warmup"]);
            let mut train = warmup;
            train["lr_scheduler_type"] = json!("constant_with_warmup");
            assert!(problems(train).is_empty());
        }
    }

    #[test]
    fn muon_s_learning_rate_goes_with_muon_and_a_schedule() {
        check(json!({"muon_learning_rate": 0.02}), &["train.muon_learning_rate: 0.02", "Adamw"]);
        check(
            json!({"muon_learning_rate": 0.02, "optimizer": "muon", "learning_rate": 0.0}),
            &["train.learning_rate: ", "over 0"],
        );
        assert!(problems(json!({"muon_learning_rate": 0.02, "optimizer": "muon"})).is_empty());
    }

    #[test]
    fn dynamic_sampling_needs_rewards_and_a_round() {
        check(json!({"dynamic_sampling": true}), &["train.dynamic_sampling: ", "rewards"]);
        let problems = problems(json!({"dynamic_sampling": true, "max_resample_rounds": 0}));
        assert!(problems.iter().any(|problem| problem.starts_with("train.max_resample_rounds: ")), "{problems:?}");
    }
}
