//! What is minimised, token by token. The step around it knows no algorithm.
//!
//! With the streams of a token, its weight w, advantage A, policy mask m and entropy weight h:
//!
//! ```text
//! ratio = exp(logp - old), of tokens or sequences                                  (ratio.rs)
//! loss  = sum_t  w * (m * keep * rho * surrogate(ratio, A, logp) + beta * kl(ref, logp)) - h * entropy
//! ```
//!
//! `surrogate` is a clip or what takes its place (surrogate.rs), `rho` corrects for the generator's own log-probs and
//! `keep` drops sequences too far from it (correction.rs), `kl` keeps the policy near a reference (kl.rs). All as in TRL
//! 1.16's `GRPOTrainer._compute_loss`, with sums over the whole step where that has sums over what lies on one device.

mod correction;
mod kl;
mod ratio;
mod streams;
mod sums;
mod surrogate;

use aha_core::config::Train;
use aha_core::objective::ImportanceSamplingLevel;
use tch::{Kind, Tensor};

pub use correction::{Bounds, RolloutCorrection};
pub use kl::KlPenalty;
pub use streams::{Streams, Tokens};
use sums::total;
pub use sums::{Count, LossSums};
pub use surrogate::Surrogate;

/// What a token's loss is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    Policy(PolicyObjective),
    /// Negative log-likelihood.
    Supervised,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicyObjective {
    pub surrogate: Surrogate,
    pub level: ImportanceSamplingLevel,
    /// None needs no reference policy.
    pub kl: Option<KlPenalty>,
    /// None takes the generator's log-probs for the trainer's.
    pub correction: Option<RolloutCorrection>,
    /// Sequences of negative advantage are left out where the generator's log-probs exceed the policy's by more than
    /// this on average.
    pub off_policy_mask_threshold: Option<f64>,
}

/// What some tokens give: the loss to differentiate, and what it did.
#[derive(Debug)]
pub struct Loss {
    /// Scalar.
    pub loss: Tensor,
    /// Scalars for the metrics, on the loss's device.
    pub counts: Vec<(Count, Tensor)>,
}

impl Objective {
    /// The loss of some tokens; of all tokens of a sequence where [`Self::spans_sequences`].
    ///
    /// # Panics
    /// If a policy objective gets no advantages.
    #[must_use]
    pub fn loss(&self, tokens: &Tokens, streams: &Streams) -> Loss {
        let mut loss = match self {
            Self::Supervised => {
                Loss { loss: -(&tokens.logprobs * &streams.weights).sum(Kind::Float), counts: Vec::new() }
            }
            Self::Policy(policy) => policy.loss(&tokens.logprobs, streams),
        };
        if let (Some(weights), Some(entropies)) = (&streams.entropy_weights, &tokens.entropies) {
            loss.loss -= (entropies * weights).sum(Kind::Float);
        }
        loss
    }

    /// Whether a token's loss depends on the log-probs of its whole sequence.
    #[must_use]
    pub fn spans_sequences(&self) -> bool {
        match self {
            Self::Supervised => false,
            Self::Policy(policy) => policy.spans_sequences(),
        }
    }

    #[must_use]
    pub fn needs_reference(&self) -> bool {
        matches!(self, Self::Policy(policy) if policy.kl.is_some())
    }
}

impl PolicyObjective {
    #[must_use]
    pub fn new(train: &Train) -> Self {
        Self {
            surrogate: Surrogate::new(train),
            level: train.importance_sampling_level,
            kl: KlPenalty::new(train),
            correction: RolloutCorrection::new(train),
            off_policy_mask_threshold: train.off_policy_mask_threshold.map(f64::from),
        }
    }

    fn spans_sequences(&self) -> bool {
        self.level != ImportanceSamplingLevel::Token
            || self.surrogate.weighs_sequences()
            || self.correction.is_some_and(|correction| correction.mode.is_sequence())
            || self.off_policy_mask_threshold.is_some()
    }

    fn loss(&self, logprobs: &Tensor, streams: &Streams) -> Loss {
        let advantages = streams.advantages.as_ref().expect("a policy objective has advantages");
        let detached = logprobs.detach();
        let old = streams.old_logprobs.as_ref().unwrap_or(&detached);
        let log_ratio = logprobs - old; // [M]
        let ratio = ratio::ratio(self.level, &log_ratio, logprobs, streams); // [M]
        let rho = self.correction.map(|correction| correction.ratio(old, streams)); // [M]
        let mut losses = self.surrogate.losses(&surrogate::Inputs {
            logprobs,
            ratio: &ratio,
            log_ratio: &log_ratio,
            advantages,
            rho: rho.as_ref(),
            streams,
        }); // [M]
        let mut counts = self.surrogate.clipped(&ratio, advantages);

        let mut factor = streams.policy_mask.as_ref().map(Tensor::shallow_clone);
        if let Some(threshold) = self.off_policy_mask_threshold {
            let sampled = streams.sampled_logprobs.as_ref().unwrap_or(old);
            let keep = correction::near_policy(threshold, &(sampled - &detached), advantages, streams);
            factor = Some(times(factor, &keep));
        }
        if let Some(rho) = &rho {
            counts.push((Count::Correction, total(rho)));
            if rho.numel() > 0 {
                counts.extend([(Count::CorrectionMin, rho.min()), (Count::CorrectionMax, rho.max())]);
            }
            if !self.surrogate.weighs_sequences() {
                factor = Some(times(factor, rho));
            }
        }
        if let Some(factor) = &factor {
            counts.push((Count::Masked, total(&factor.eq(0.0))));
            losses *= factor;
        }
        if let Some(penalty) = self.kl {
            let reference = streams.reference_logprobs.as_ref().expect("a KL penalty has a reference policy");
            let kl = penalty.estimate(reference, logprobs, &ratio); // [M]
            counts.push((Count::Kl, total(&kl)));
            losses += kl * penalty.beta;
        }
        Loss { loss: (losses * &streams.weights).sum(Kind::Float), counts }
    }
}

fn times(factor: Option<Tensor>, other: &Tensor) -> Tensor {
    factor.map_or_else(|| other.shallow_clone(), |factor| factor * other)
}
