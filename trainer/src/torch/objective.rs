//! What is minimised, token by token. The step around it knows no algorithm.
//!
//! The policy objective is GRPO's (arXiv 2402.03300, equation 3) with the clip range of PPO (arXiv 1707.06347,
//! equation 7), whose upper end may differ (DAPO, arXiv 2503.14476), and the k3 estimator of the KL divergence from a
//! reference policy (http://joschu.net/blog/kl-approx.html). As in TRL:
//!
//! ```text
//! ratio = exp(logp - old)
//! loss  = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * (exp(ref - logp) - (ref - logp) - 1)
//! ```

use tch::{Kind, Tensor};

/// What a token's loss is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    Policy(PolicyObjective),
    /// Negative log-likelihood.
    Supervised,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicyObjective {
    pub epsilon: f64,
    pub epsilon_high: f64,
    /// Weight of the KL divergence from the reference policy; 0 needs none.
    pub beta: f64,
}

/// Per-token streams of a chunk, each `[M]` fp32.
#[derive(Debug)]
pub struct Streams {
    pub weights: Tensor,
    pub advantages: Option<Tensor>,
    /// None for a policy that has not moved: the ratio is 1, and its gradient that of the log-prob.
    pub old_logprobs: Option<Tensor>,
    pub reference_logprobs: Option<Tensor>,
}

/// What a chunk gives: the loss to differentiate and sums over its tokens for the metrics.
#[derive(Debug)]
pub struct ChunkLoss {
    /// Scalar.
    pub loss: Tensor,
    /// Sum over tokens of the KL divergence, of clipping below and above. Scalars.
    pub sums: [Tensor; 3],
}

impl Streams {
    /// Rows `start..start + len`.
    #[must_use]
    pub fn narrow(&self, start: i64, len: i64) -> Self {
        let part = |stream: &Option<Tensor>| stream.as_ref().map(|stream| stream.narrow(0, start, len));
        Self {
            weights: self.weights.narrow(0, start, len),
            advantages: part(&self.advantages),
            old_logprobs: part(&self.old_logprobs),
            reference_logprobs: part(&self.reference_logprobs),
        }
    }
}

impl Objective {
    /// # Shapes
    /// - logprobs: `[M]`, with gradients.
    ///
    /// # Panics
    /// If a policy objective gets no advantages.
    #[must_use]
    pub fn chunk_loss(&self, logprobs: &Tensor, streams: &Streams) -> ChunkLoss {
        let zero = || Tensor::zeros([], (Kind::Double, logprobs.device()));
        match self {
            Self::Supervised => {
                ChunkLoss { loss: -(logprobs * &streams.weights).sum(Kind::Float), sums: [zero(), zero(), zero()] }
            }
            Self::Policy(policy) => policy.chunk_loss(logprobs, streams),
        }
    }
}

impl PolicyObjective {
    fn chunk_loss(&self, logprobs: &Tensor, streams: &Streams) -> ChunkLoss {
        let advantages = streams.advantages.as_ref().expect("a policy objective has advantages");
        let detached = logprobs.detach();
        let old = streams.old_logprobs.as_ref().unwrap_or(&detached);
        let ratio = (logprobs - old).exp(); // [M]
        let clipped = ratio.clamp(1.0 - self.epsilon, 1.0 + self.epsilon_high);
        let mut losses = -(&ratio * advantages).minimum(&(clipped * advantages)); // [M]
        let mut kl_sum = Tensor::zeros([], (Kind::Double, logprobs.device()));
        if let Some(reference) = &streams.reference_logprobs {
            let difference = reference - logprobs;
            let kl = difference.exp() - &difference - 1.0; // [M]
            kl_sum = kl.detach().sum(Kind::Double);
            losses += kl * self.beta;
        }
        let below = ratio.lt(1.0 - self.epsilon).logical_and(&advantages.lt(0.0));
        let above = ratio.gt(1.0 + self.epsilon_high).logical_and(&advantages.gt(0.0));
        ChunkLoss {
            loss: (losses * &streams.weights).sum(Kind::Float),
            sums: [kl_sum, below.sum(Kind::Double), above.sum(Kind::Double)],
        }
    }
}
