//! What the objective gets to see: values of tokens, as flat vectors over the completion tokens of a micro-batch.

use tch::{Kind, Tensor};

/// What the policy says of some tokens.
#[derive(Debug)]
pub struct Tokens {
    /// `[M]`, with gradients.
    pub logprobs: Tensor,
    /// `[M]`, in nats, with gradients; None where nobody asks.
    pub entropies: Option<Tensor>,
}

/// Per-token streams, each `[M]` fp32 but for the ids.
#[derive(Debug)]
pub struct Streams {
    pub weights: Tensor,
    pub advantages: Option<Tensor>,
    /// None for a policy that has not moved: the ratio is 1, and its gradient that of the log-prob.
    pub old_logprobs: Option<Tensor>,
    /// What the generator sampled with.
    pub sampled_logprobs: Option<Tensor>,
    pub reference_logprobs: Option<Tensor>,
    pub policy_mask: Option<Tensor>,
    pub entropy_weights: Option<Tensor>,
    /// `[M]`, i64: the sequence of each token, counted from 0 within the micro-batch.
    pub sequence_ids: Tensor,
    pub num_sequences: i64,
}

impl Tokens {
    /// What a loss has gradients with respect to.
    #[must_use]
    pub fn outputs(&self) -> Vec<Tensor> {
        std::iter::once(&self.logprobs).chain(&self.entropies).map(Tensor::shallow_clone).collect()
    }
}

impl Streams {
    /// Rows `start..start + len`; for objectives that do not span sequences.
    #[must_use]
    pub fn narrow(&self, start: i64, len: i64) -> Self {
        let part = |stream: &Option<Tensor>| stream.as_ref().map(|stream| stream.narrow(0, start, len));
        Self {
            weights: self.weights.narrow(0, start, len),
            advantages: part(&self.advantages),
            old_logprobs: part(&self.old_logprobs),
            sampled_logprobs: part(&self.sampled_logprobs),
            reference_logprobs: part(&self.reference_logprobs),
            policy_mask: part(&self.policy_mask),
            entropy_weights: part(&self.entropy_weights),
            sequence_ids: self.sequence_ids.narrow(0, start, len),
            num_sequences: self.num_sequences,
        }
    }

    /// The sum over its sequence at every token, `[M]`. Differentiable.
    pub(super) fn sequence_sum(&self, values: &Tensor) -> Tensor {
        let sums = Tensor::zeros([self.num_sequences], (Kind::Float, values.device()));
        sums.index_add(0, &self.sequence_ids, values).index_select(0, &self.sequence_ids)
    }

    /// The mean over its sequence at every token, `[M]`. Differentiable.
    pub(super) fn sequence_mean(&self, values: &Tensor) -> Tensor {
        self.sequence_sum(values) / self.sequence_sum(&self.weights.ones_like())
    }
}
