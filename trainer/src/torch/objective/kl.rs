//! The penalty on the KL divergence from a reference policy.

use aha_core::config::Train;
use aha_core::objective::KlEstimator;
use tch::Tensor;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KlPenalty {
    /// Over 0.
    pub beta: f64,
    pub estimator: KlEstimator,
    /// Multiply by the ratio, with its gradient.
    pub bias_correction: bool,
}

impl KlPenalty {
    pub(super) fn new(train: &Train) -> Option<Self> {
        (train.loss_beta() > 0.0).then(|| Self {
            beta: f64::from(train.loss_beta()),
            estimator: train.kl_estimator,
            bias_correction: train.use_bias_correction_kl,
        })
    }

    /// # Shapes
    /// - all: `[M]`; returns `[M]`.
    pub(super) fn estimate(self, reference: &Tensor, logprobs: &Tensor, ratio: &Tensor) -> Tensor {
        let difference = reference - logprobs;
        let kl = match self.estimator {
            KlEstimator::K1 => -difference,
            KlEstimator::K2 => difference.square() * 0.5,
            KlEstimator::K3 => difference.exp() - &difference - 1.0,
        };
        if self.bias_correction { kl * ratio } else { kl }
    }
}
