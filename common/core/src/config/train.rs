//! The `train` section: the optimizer's side of a step, and what it minimises.

use serde::{Deserialize, Serialize};

use super::PushBackend;
use crate::advantage::{AdvantageEstimator, AdvantageOptions, MultiObjectiveAggregation, ScaleRewards};
use crate::batch::LossType;
use crate::objective::{ImportanceSamplingLevel, KlEstimator, RolloutImportanceSamplingMode};
use crate::optimizer::{MuonAdjustLr, MuonOptions, OptimizerKind, OptimizerOptions};
use crate::schedule::LrSchedulerType;

/// The optimizer's side of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Train {
    /// Rounds of sampling and training. One is as many optimizer updates as `num_iterations` x `steps_per_generation`.
    pub max_steps: u64,
    pub learning_rate: f64,
    pub lr_scheduler_type: LrSchedulerType,
    /// Share of the peak rate where `cosine_with_min_lr` ends.
    pub min_lr_rate: f64,
    pub warmup_ratio: f64,
    /// Wins over `warmup_ratio` where it is not 0.
    pub warmup_steps: u64,
    pub optimizer: OptimizerKind,
    /// Taken off matrices, not off norms and biases.
    pub weight_decay: f64,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    /// What `muon`'s learning rate is multiplied by for the shape of a matrix.
    pub muon_adjust_lr: MuonAdjustLr,
    /// Peak learning rate of the matrices of layers under `muon`; null is `learning_rate`. Both follow one schedule.
    pub muon_learning_rate: Option<f64>,
    /// Gradients are scaled to this global norm where they exceed it; 0 leaves them.
    pub max_grad_norm: f64,

    /// What a token's loss is, and how the losses of tokens become one number.
    pub loss_type: LossType,
    /// Sequences of a local batch of `bnpo`, TRL's `per_device_train_batch_size`; 0 takes `rollout.num_generations`.
    pub bnpo_batch_size: usize,
    /// Of what the ratio between the policy and the one that sampled is taken.
    pub importance_sampling_level: ImportanceSamplingLevel,
    /// The ratio is clipped to `[1 - epsilon, 1 + epsilon_high]`.
    pub epsilon: f32,
    /// Upper clip range where it differs from `epsilon` (DAPO's clip-higher: 0.28). For `cispo` the bound itself (5.0).
    pub epsilon_high: Option<f32>,
    /// Bound of the ratio where a negative advantage would otherwise leave it free (INTELLECT-2, arXiv 2505.07291); over
    /// `1 + epsilon_high`.
    pub delta: Option<f32>,
    /// Steepness of `sapo`'s sigmoid for advantages over 0, and for the others.
    pub sapo_temperature_pos: f32,
    pub sapo_temperature_neg: f32,
    /// Shape of `vespo`'s gamma weight, `e^lambda w^k e^(-lambda w)`, for advantages of at least 0, and for the others.
    pub vespo_k_pos: f32,
    pub vespo_lambda_pos: f32,
    pub vespo_k_neg: f32,
    pub vespo_lambda_neg: f32,

    /// Weight of the KL divergence from the reference policy; 0 loads no reference model.
    pub beta: f32,
    pub kl_estimator: KlEstimator,
    /// Take `beta` times the KL divergence of a completion, a sum of log-ratios over its tokens, off its reward, as TRL's
    /// `RLOOTrainer` and verl's option of that name; the loss then has no KL term.
    pub use_kl_in_reward: bool,
    /// Multiply the KL term by the ratio, with its gradient (DeepSeek-V3.2, arXiv 2512.02556). TRL 1.16's default is
    /// true; false is what TRL did up to 1.9, and what the recipes here were made with.
    pub use_bias_correction_kl: bool,
    /// Move the reference policy towards the policy every `ref_model_sync_steps` steps (TR-DPO, arXiv 2404.09656):
    /// `reference = alpha * policy + (1 - alpha) * reference`.
    pub sync_ref_model: bool,
    /// Alpha.
    pub ref_model_mixup_alpha: f64,
    pub ref_model_sync_steps: u64,

    /// What a reward is compared with.
    pub advantage_estimator: AdvantageEstimator,
    pub scale_rewards: ScaleRewards,
    /// Normalise the advantages of `rloo` over the step, as TRL's `RLOOConfig`.
    pub normalize_advantages: bool,
    pub multi_objective_aggregation: MultiObjectiveAggregation,
    /// DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): the reward falls along a line to
    /// `-soft_punish_weight` over the last so many of `rollout.max_completion_length` tokens. 0 is off.
    pub soft_punish_cache: u32,
    pub soft_punish_weight: f32,
    /// Completions that were cut off carry no loss.
    pub mask_truncated_completions: bool,
    /// Replace groups whose rewards are all equal by groups of other prompts (DAPO's dynamic sampling).
    pub dynamic_sampling: bool,
    /// Rounds of replacement in a step; what is then still without signal is trained on as it is.
    pub max_resample_rounds: u32,

    /// Correct for the difference between the generator's log-probs and the trainer's: the policy loss is multiplied by
    /// their ratio. TRL's `vllm_importance_sampling_correction`, whose default is true.
    pub rollout_importance_sampling_correction: bool,
    pub rollout_importance_sampling_mode: RolloutImportanceSamplingMode,
    /// Bounds of the ratio; null is none.
    pub rollout_importance_sampling_clip_max: Option<f32>,
    pub rollout_importance_sampling_clip_min: Option<f32>,
    /// Leave out completions of negative advantage whose mean difference of log-probs, generator's minus trainer's, is
    /// over this (DeepSeek-V3.2, arXiv 2512.02556, equation 9).
    pub off_policy_mask_threshold: Option<f32>,

    /// Share of tokens, those of the highest entropy, that the policy loss counts (arXiv 2506.01939, which takes 0.2).
    /// Under 1, one more forward pass over the tokens of a step finds the bound.
    pub top_entropy_quantile: f32,
    /// Weight of the mean entropy, which is taken off the loss; where it adapts, the one that it begins with.
    pub entropy_coef: f32,
    /// Adapt the weight to the entropy (Skywork-OR1, arXiv 2505.22312): after each update it rises by `entropy_coef_delta`
    /// where the mean entropy was at most `entropy_target`, in nats, and falls by as much where it was over; it counts in
    /// an update only after one of at most the target.
    pub use_adaptive_entropy: bool,
    pub entropy_coef_min: f32,
    pub entropy_coef_max: f32,
    pub entropy_coef_delta: f32,
    pub entropy_target: f32,

    /// Passes over each batch of rollouts.
    pub num_iterations: u32,
    /// Optimizer updates that one pass is split into, each on as many completions. TRL counts micro-batches instead, so
    /// this is its `steps_per_generation / gradient_accumulation_steps`.
    pub steps_per_generation: usize,

    /// 0 replicates everything, 1 shards optimizer state, 2 gradients as well, 3 weights as well, which are then gathered
    /// layer by layer as they are used.
    pub zero_stage: u8,
    /// Keep the optimizer's state in the CPU's memory and update the weights there.
    pub offload_optimizer: bool,
    /// Keep the shards of the weights in the CPU's memory; for `zero_stage: 3`.
    pub offload_params: bool,
    /// Steps in a row whose gradients may be NaN or infinite; their updates are left out. One more ends the run.
    pub max_skipped_steps: u64,
    /// Most tokens of a micro-batch; gradients accumulate over as many as the step needs.
    pub micro_batch_tokens: usize,
    /// Compute a prompt once for the completions of a micro-batch that follow it, not once for each.
    pub share_prompts: bool,
    /// Keep only the inputs of layers and compute their activations again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Do so for every so many-th layer only: 1 is all of them, 2 every other one.
    pub gradient_checkpointing_interval: usize,
    pub save_steps: u64,
    /// Checkpoints kept; 0 keeps all.
    pub save_total_limit: usize,
    /// Wall time of a process: before a step that might not end in time, a checkpoint is written and the run stops, to
    /// go on when it is started again. Null is no limit.
    pub max_wall_clock_seconds: Option<f64>,
    /// A collective that takes longer fails, naming its group and rank.
    pub collective_timeout_seconds: f64,
    /// Have the ranks compare what they are about to do before every collective, and name those that differ. For finding
    /// faults: no collective overlaps with computation then.
    pub check_collectives: bool,
    /// A weight push that takes longer fails, naming whom it waited for.
    pub push_timeout_seconds: f64,
    pub push_backend: PushBackend,
    /// Intra-op threads of a rank; 0 shares this machine's cores among its ranks, of which there are LOCAL_WORLD_SIZE, or all
    /// of the run where that is not set.
    pub threads: usize,
}

impl Default for Train {
    #[expect(clippy::too_many_lines, reason = "a line a key")]
    fn default() -> Self {
        Self {
            max_steps: 100,
            learning_rate: 1e-6,
            lr_scheduler_type: LrSchedulerType::Linear,
            min_lr_rate: 0.1,
            warmup_ratio: 0.0,
            warmup_steps: 0,
            optimizer: OptimizerKind::Adamw,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            muon_adjust_lr: MuonAdjustLr::MatchRmsAdamw,
            muon_learning_rate: None,
            max_grad_norm: 1.0,
            loss_type: LossType::Dapo,
            bnpo_batch_size: 0,
            importance_sampling_level: ImportanceSamplingLevel::Token,
            epsilon: 0.2,
            epsilon_high: None,
            delta: None,
            sapo_temperature_pos: 1.0,
            sapo_temperature_neg: 1.05,
            vespo_k_pos: 2.0,
            vespo_lambda_pos: 3.0,
            vespo_k_neg: 3.0,
            vespo_lambda_neg: 2.0,
            beta: 0.0,
            kl_estimator: KlEstimator::K3,
            use_kl_in_reward: false,
            use_bias_correction_kl: false,
            sync_ref_model: false,
            ref_model_mixup_alpha: 0.6,
            ref_model_sync_steps: 512,
            advantage_estimator: AdvantageEstimator::Grpo,
            scale_rewards: ScaleRewards::Group,
            normalize_advantages: false,
            multi_objective_aggregation: MultiObjectiveAggregation::SumThenNormalize,
            soft_punish_cache: 0,
            soft_punish_weight: 1.0,
            mask_truncated_completions: false,
            dynamic_sampling: false,
            max_resample_rounds: 3,
            rollout_importance_sampling_correction: false,
            rollout_importance_sampling_mode: RolloutImportanceSamplingMode::SequenceMask,
            rollout_importance_sampling_clip_max: Some(3.0),
            rollout_importance_sampling_clip_min: None,
            off_policy_mask_threshold: None,
            top_entropy_quantile: 1.0,
            entropy_coef: 0.0,
            use_adaptive_entropy: false,
            entropy_coef_min: 0.0,
            entropy_coef_max: 1.0,
            entropy_coef_delta: 0.005,
            entropy_target: 0.2,
            num_iterations: 1,
            steps_per_generation: 1,
            zero_stage: 2,
            offload_optimizer: false,
            offload_params: false,
            max_skipped_steps: 10,
            micro_batch_tokens: 8192,
            share_prompts: true,
            gradient_checkpointing: false,
            gradient_checkpointing_interval: 1,
            save_steps: 50,
            save_total_limit: 2,
            max_wall_clock_seconds: None,
            collective_timeout_seconds: 600.0,
            check_collectives: false,
            push_timeout_seconds: 300.0,
            push_backend: PushBackend::Auto,
            threads: 0,
        }
    }
}

impl Train {
    /// Steps over which the learning rate rises, as transformers counts them.
    #[must_use]
    pub fn num_warmup_steps(&self) -> u64 {
        if self.warmup_steps > 0 {
            self.warmup_steps
        } else {
            (self.max_steps as f64 * self.warmup_ratio).ceil() as u64
        }
    }

    #[must_use]
    pub fn optimizer_options(&self) -> OptimizerOptions {
        let lr_ratio = self.muon_learning_rate.map_or(1.0, |rate| rate / self.learning_rate);
        OptimizerOptions { kind: self.optimizer, muon: MuonOptions { adjust_lr: self.muon_adjust_lr, lr_ratio } }
    }

    #[must_use]
    pub fn advantage_options(&self) -> AdvantageOptions {
        AdvantageOptions {
            estimator: self.advantage_estimator,
            scale_rewards: self.scale_rewards,
            aggregation: self.multi_objective_aggregation,
            normalize_advantages: self.normalize_advantages,
        }
    }

    /// Whether the policy loss may leave out single tokens or sequences for what the policy or the generator says of them.
    #[must_use]
    pub fn masks_tokens(&self) -> bool {
        let corrected = self.rollout_importance_sampling_correction && self.rollout_importance_sampling_mode.masks();
        corrected || self.off_policy_mask_threshold.is_some() || self.top_entropy_quantile < 1.0
    }

    /// Weight of the KL term in the loss.
    #[must_use]
    pub fn loss_beta(&self) -> f32 {
        if self.use_kl_in_reward { 0.0 } else { self.beta }
    }

    /// Whether the mean entropy may take part in the loss.
    #[must_use]
    pub fn has_entropy_bonus(&self) -> bool {
        self.entropy_coef > 0.0 || self.use_adaptive_entropy
    }

    /// Whether the loss looks at the log-probs that completions were sampled with.
    #[must_use]
    pub fn needs_sampled_logprobs(&self) -> bool {
        self.rollout_importance_sampling_correction || self.off_policy_mask_threshold.is_some()
    }
}
