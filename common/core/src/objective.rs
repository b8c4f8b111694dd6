//! The choices that a policy objective is made of; the arithmetic is in the trainer's `torch/objective`.

use serde::{Deserialize, Serialize};

/// Of what the importance ratio between the policy and the one that sampled is taken. With `log_ratio[t]` the
/// difference of the log-probs of token t, and T tokens:
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceSamplingLevel {
    /// Every token has its own: `exp(log_ratio[t])` (PPO, GRPO).
    #[default]
    Token,
    /// All tokens of a completion share `exp(sum(log_ratio) / T)` (GSPO, arXiv 2507.18071, equation 7).
    Sequence,
    /// The value of `sequence`, and the gradient of each token's own log-prob (GSPO-token, arXiv 2507.18071, equation
    /// 14). TRL 1.16 has it no more; as TRL 0.22 did it.
    SequenceToken,
}

/// How the KL divergence from the reference policy is estimated from one sampled token, with `d = ref - logp`
/// (http://joschu.net/blog/kl-approx.html). The gradients are those that a loss term gets; p is the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// `-d`. Unbiased, can be negative. Its gradient, that of the log-prob, is zero on average and pulls nowhere, unless
    /// `use_bias_correction_kl` multiplies it by the ratio: then it is that of KL(p || ref).
    K1,
    /// `d * d / 2`. Biased; its gradient, `-d` times that of the log-prob, is that of KL(p || ref) on average.
    K2,
    /// `exp(d) - d - 1`. Unbiased and never negative; its gradient, `1 - exp(d)` times that of the log-prob, is that of
    /// KL(ref || p) on average, and with `use_bias_correction_kl` that of KL(p || ref). TRL has no other.
    #[default]
    K3,
}

/// What becomes of the ratio between the trainer's and the generator's probability of a completion's tokens where it
/// lies outside of its bounds, and of what the ratio is taken. Names as in TRL's `vllm_importance_sampling_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutImportanceSamplingMode {
    /// Each token's ratio is clipped to the bounds.
    TokenTruncate,
    /// Tokens whose ratio lies outside of the bounds carry no policy loss.
    TokenMask,
    /// The ratio of the whole completion, the product of its tokens', is clipped to the bounds.
    SequenceTruncate,
    /// Completions whose ratio lies outside of the bounds carry no policy loss.
    #[default]
    SequenceMask,
}

impl RolloutImportanceSamplingMode {
    #[must_use]
    pub fn is_sequence(self) -> bool {
        matches!(self, Self::SequenceTruncate | Self::SequenceMask)
    }

    #[must_use]
    pub fn masks(self) -> bool {
        matches!(self, Self::TokenMask | Self::SequenceMask)
    }
}
