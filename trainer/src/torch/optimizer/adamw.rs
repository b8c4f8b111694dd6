//! The moments of AdamW in fp32.

use aha_nn::optim::{AdamW, AdamWError, fused_adamw};
use tch::{Device, Kind, Tensor};

/// Means of gradients and of their squares, `[owned]` each, fp32.
#[derive(Debug)]
pub(super) struct Moments {
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl Moments {
    pub(super) fn zeros(len: i64, device: Device) -> Self {
        let zeros = || Tensor::zeros([len], (Kind::Float, device));
        Self { exp_avg: zeros(), exp_avg_sq: zeros() }
    }

    /// Moves `target` by the gradient, without weight decay.
    pub(super) fn update(
        &mut self,
        target: &mut Tensor,
        grad: &Tensor,
        step: u64,
        options: &AdamW,
    ) -> Result<(), AdamWError> {
        let options = AdamW { weight_decay: 0.0, ..*options };
        fused_adamw(target, grad, (&mut self.exp_avg, &mut self.exp_avg_sq), step, &options)
    }

    pub(super) fn named(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)]
    }
}
