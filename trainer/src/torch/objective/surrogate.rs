//! What stands in for the policy's improvement: the clipped ratio, or what other papers put in its place.

use aha_core::batch::LossType;
use aha_core::config::Train;
use tch::{Kind, Tensor};

use super::sums::total;
use super::{Count, Streams};

/// A token's policy loss, from its ratio r, advantage A and log-prob.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Surrogate {
    /// `-min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`: PPO (arXiv 1707.06347, equation 7), with DAPO's
    /// upper end (arXiv 2503.14476) and INTELLECT-2's bound for negative advantages (arXiv 2505.07291).
    Clip { epsilon: f64, epsilon_high: f64, delta: Option<f64> },
    /// `-sg(min(r, epsilon_high)) A logp` (CISPO, arXiv 2506.13585).
    Cispo { epsilon_high: f64 },
    /// `-4 / tau * sigmoid(tau (r - 1)) A`, tau by the sign of A (SAPO, arXiv 2511.20347).
    Sapo { temperature_pos: f64, temperature_neg: f64 },
    /// `-sg(e^lambda w^k e^(-lambda w)) A logp`, w the product of its sequence's ratios (VESPO, arXiv 2602.10693).
    Vespo { pos: Gamma, neg: Gamma },
}

/// Shape of a gamma weight that is 1 at 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gamma {
    pub k: f64,
    pub lambda: f64,
}

/// All `[M]`.
#[derive(Debug)]
pub(super) struct Inputs<'a> {
    pub(super) logprobs: &'a Tensor,
    pub(super) ratio: &'a Tensor,
    /// By token, whatever the ratio's level.
    pub(super) log_ratio: &'a Tensor,
    pub(super) advantages: &'a Tensor,
    /// The ratio between trainer and generator, where that is corrected for.
    pub(super) rho: Option<&'a Tensor>,
    pub(super) streams: &'a Streams,
}

impl Surrogate {
    pub(super) fn new(train: &Train) -> Self {
        let epsilon = f64::from(train.epsilon);
        let epsilon_high = f64::from(train.epsilon_high.unwrap_or(train.epsilon));
        let gamma = |k: f32, lambda: f32| Gamma { k: f64::from(k), lambda: f64::from(lambda) };
        match train.loss_type {
            LossType::Grpo | LossType::DrGrpo | LossType::Dapo | LossType::Bnpo | LossType::Luspo => {
                Self::Clip { epsilon, epsilon_high, delta: train.delta.map(f64::from) }
            }
            LossType::Cispo => Self::Cispo { epsilon_high },
            LossType::Sapo => Self::Sapo {
                temperature_pos: f64::from(train.sapo_temperature_pos),
                temperature_neg: f64::from(train.sapo_temperature_neg),
            },
            LossType::Vespo => Self::Vespo {
                pos: gamma(train.vespo_k_pos, train.vespo_lambda_pos),
                neg: gamma(train.vespo_k_neg, train.vespo_lambda_neg),
            },
        }
    }

    /// Whether it looks at whole sequences of its own accord, the generator's differences included.
    pub(super) fn weighs_sequences(self) -> bool {
        matches!(self, Self::Vespo { .. })
    }

    /// `[M]`.
    pub(super) fn losses(self, inputs: &Inputs<'_>) -> Tensor {
        let Inputs { logprobs, ratio, advantages, .. } = *inputs;
        match self {
            Self::Clip { epsilon, epsilon_high, delta } => {
                let clipped = ratio.clamp(1.0 - epsilon, 1.0 + epsilon_high);
                let bounded = delta.map_or_else(|| ratio.shallow_clone(), |delta| ratio.clamp_max(delta));
                -(bounded * advantages).minimum(&(clipped * advantages))
            }
            Self::Cispo { epsilon_high } => -(ratio.detach().clamp_max(epsilon_high) * advantages * logprobs),
            Self::Sapo { temperature_pos, temperature_neg } => {
                let temperature = by_sign(&advantages.gt(0.0), temperature_pos, temperature_neg);
                let gate = (&temperature * (ratio - 1.0)).sigmoid() * 4.0 / temperature;
                -(gate * advantages)
            }
            Self::Vespo { pos, neg } => -(gamma_weights(pos, neg, inputs) * advantages * logprobs),
        }
    }

    /// Counts tokens whose ratio is outside of the bounds on the side where its advantage would push it further.
    pub(super) fn clipped(self, ratio: &Tensor, advantages: &Tensor) -> Vec<(Count, Tensor)> {
        let (low, high) = match self {
            Self::Clip { epsilon, epsilon_high, .. } => (1.0 - epsilon, 1.0 + epsilon_high),
            Self::Cispo { epsilon_high } => (f64::NEG_INFINITY, epsilon_high),
            Self::Sapo { .. } | Self::Vespo { .. } => return Vec::new(),
        };
        vec![
            (Count::ClippedLow, total(&ratio.lt(low).logical_and(&advantages.lt(0.0)))),
            (Count::ClippedHigh, total(&ratio.gt(high).logical_and(&advantages.gt(0.0)))),
        ]
    }
}

/// Ratios are bounded in log space, where TRL and the paper's own code do it: e^20 is as good as infinite.
const LARGEST_LOG_RATIO: f64 = 20.0;
const SMALLEST_RATIO: f64 = 1e-8;

/// VESPO's weight of each sequence at its tokens, without gradient.
fn gamma_weights(pos: Gamma, neg: Gamma, inputs: &Inputs<'_>) -> Tensor {
    let smallest = SMALLEST_RATIO.ln();
    let mut log_ratio = inputs.log_ratio.detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO);
    if let Some(rho) = inputs.rho {
        log_ratio += rho.log().clamp(smallest, LARGEST_LOG_RATIO);
    }
    let log_w = inputs.streams.sequence_sum(&log_ratio).clamp(smallest, LARGEST_LOG_RATIO);
    let positive = inputs.advantages.ge(0.0);
    let k = by_sign(&positive, pos.k, neg.k);
    let lambda = by_sign(&positive, pos.lambda, neg.lambda).clamp_min(1e-4);
    let w = log_w.exp();
    (&lambda + k * log_w - &lambda * w).exp().nan_to_num(0.0, 0.0, 0.0)
}

/// One value where `positive`, another elsewhere; `[M]` fp32.
fn by_sign(positive: &Tensor, pos: f64, neg: f64) -> Tensor {
    let mask = positive.to_kind(Kind::Float);
    &mask * pos + (mask.neg() + 1.0) * neg
}
