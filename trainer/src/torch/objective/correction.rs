//! Corrections for completions that another policy sampled than the one that the ratio is taken against: the
//! generator's arithmetic is not the trainer's.

use aha_core::config::Train;
use aha_core::objective::RolloutImportanceSamplingMode;
use tch::{Kind, Tensor};

use super::Streams;

/// Importance sampling between trainer and generator: the policy loss is multiplied by the ratio of what both say of the
/// same policy (arXiv 2508.08221; TRL's `vllm_importance_sampling_correction`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RolloutCorrection {
    pub mode: RolloutImportanceSamplingMode,
    pub bounds: Bounds,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    pub min: Option<f64>,
    pub max: Option<f64>,
}

impl RolloutCorrection {
    pub(super) fn new(train: &Train) -> Option<Self> {
        train.rollout_importance_sampling_correction.then(|| Self {
            mode: train.rollout_importance_sampling_mode,
            bounds: Bounds {
                min: train.rollout_importance_sampling_clip_min.map(f64::from),
                max: train.rollout_importance_sampling_clip_max.map(f64::from),
            },
        })
    }

    /// The bounded ratio, without gradient.
    ///
    /// # Shapes
    /// - old: `[M]`, the trainer's log-probs of the policy that sampled; returns `[M]`.
    pub(super) fn ratio(self, old: &Tensor, streams: &Streams) -> Tensor {
        let sampled = streams.sampled_logprobs.as_ref().expect("a correction has the generator's log-probs");
        let mut difference = old.detach() - sampled;
        if self.mode.is_sequence() {
            difference = streams.sequence_sum(&difference);
        }
        let ratio = difference.exp();
        let min = self.bounds.min.unwrap_or(f64::NEG_INFINITY);
        let max = self.bounds.max.unwrap_or(f64::INFINITY);
        if self.mode.masks() {
            let outside = ratio.lt(min).logical_or(&ratio.gt(max));
            ratio.masked_fill(&outside, 0.0)
        } else {
            ratio.clamp(min, max)
        }
    }
}

/// 1 for tokens of sequences that are kept: of an advantage of at least 0, or whose mean difference, generator's minus
/// policy's log-probs, is not over `threshold` (DeepSeek-V3.2, arXiv 2512.02556, equation 9).
pub(super) fn near_policy(threshold: f64, difference: &Tensor, advantages: &Tensor, streams: &Streams) -> Tensor {
    let near = streams.sequence_mean(difference).le(threshold);
    near.logical_or(&advantages.ge(0.0)).to_kind(Kind::Float)
}
