//! What a request changes about a row of logits before a token is drawn from it: in place, at the tokens concerned.

use std::collections::BTreeMap;

/// The edits of one row, by vLLM's names. Token ids are below the size of the vocabulary.
#[derive(Debug, Clone, Copy)]
pub struct LogitEdits<'a> {
    /// Ascending, none twice. Every other token is masked; empty allows all.
    pub allowed: &'a [u32],
    /// Masked.
    pub bad: &'a [u32],
    /// Masked, too: what must not end a completion yet.
    pub suppress: &'a [u32],
    /// Added to the token's logit.
    pub bias: &'a BTreeMap<u32, f32>,
    /// Divides positive logits and multiplies others, of every token in `counts`.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that were sampled.
    pub presence_penalty: f32,
    /// Subtracted as often as the token was sampled.
    pub frequency_penalty: f32,
    /// Penalised tokens, each once, with the times that they were sampled: 0 for one of the prompt alone.
    pub counts: &'a [(u32, u32)],
}

impl LogitEdits<'_> {
    /// vLLM's order: masks, bias, then the penalties for repetition, frequency and presence; what follows on the
    /// temperature is not done here. The masks come last, which is the same: nothing here changes an infinite logit.
    ///
    /// # Shapes
    /// - logits: `[V]`.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        let Self { repetition_penalty, presence_penalty, frequency_penalty, .. } = *self;
        for (&token, bias) in self.bias {
            change(&mut logits[token as usize], |logit| logit + bias);
        }
        for &(token, count) in self.counts {
            change(&mut logits[token as usize], |logit| {
                let logit = if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
                logit - frequency_penalty * count as f32 - if count > 0 { presence_penalty } else { 0.0 }
            });
        }
        for &token in self.bad.iter().chain(self.suppress) {
            logits[token as usize] = f32::NEG_INFINITY;
        }
        if !self.allowed.is_empty() {
            let mut start = 0;
            for &token in self.allowed {
                logits[start..token as usize].fill(f32::NEG_INFINITY);
                start = token as usize + 1;
            }
            logits[start..].fill(f32::NEG_INFINITY);
        }
    }

    /// Tokens whose logits may change without being masked.
    pub(super) fn changed(&self) -> impl Iterator<Item = u32> {
        self.bias.keys().copied().chain(self.counts.iter().map(|&(token, _)| token))
    }
}

/// A finite logit stays finite, so that no request can mask every token, or look like a model that has diverged.
fn change(logit: &mut f32, edit: impl FnOnce(f32) -> f32) {
    if logit.is_finite() {
        *logit = edit(*logit).clamp(f32::MIN, f32::MAX);
    }
}

#[cfg(test)]
#[path = "logit_edits_tests.rs"]
mod tests;
