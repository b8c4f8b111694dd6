//! The importance ratio between the policy and the one that sampled, by token or sequence.

use aha_core::objective::ImportanceSamplingLevel;
use tch::Tensor;

use super::Streams;

/// # Shapes
/// - log_ratio: `[M]`, log-probs minus the old ones; returns `[M]`, a sequence's ratio at each of its tokens.
pub(super) fn ratio(
    level: ImportanceSamplingLevel,
    log_ratio: &Tensor,
    logprobs: &Tensor,
    streams: &Streams,
) -> Tensor {
    match level {
        ImportanceSamplingLevel::Token => log_ratio.exp(),
        ImportanceSamplingLevel::Sequence => streams.sequence_mean(log_ratio).exp(),
        // The value of the sequence's ratio with the gradient of the token's log-prob.
        ImportanceSamplingLevel::SequenceToken => {
            (streams.sequence_mean(&log_ratio.detach()) + logprobs - logprobs.detach()).exp()
        }
    }
}
