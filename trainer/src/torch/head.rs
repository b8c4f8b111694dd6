//! The head's forward and backward pass, in chunks whose gradient is taken at once, so that the logits of a batch never
//! exist together.

use aha_nn::autograd::grad;
use aha_nn::forward;
use aha_nn::logprob::{TargetLogprobs, token_statistics};
use aha_nn::transformer::Ops;
use aha_nn::unit::Walk;
use tch::Tensor;

use super::learner::{Learner, MicroBatch, StepError, StepOutput, defined, leaf, required};
use super::objective::{Streams, Tokens};

/// What the head's pass over a micro-batch leaves behind.
pub(super) struct HeadGradients {
    /// With respect to the head unit's input, `[N, C]`.
    pub(super) input: Tensor,
    /// Of the head unit's parameters, in manifest order; none where it is frozen. `None` for one that was added where it
    /// belongs.
    pub(super) params: Vec<Option<Tensor>>,
    /// Of the embedding, where the head is tied to it and it was not added there.
    pub(super) embedding: Option<Tensor>,
}

impl Learner {
    /// Log-probs, loss and gradients of the head unit, chunk by chunk.
    pub(super) fn head(
        &mut self,
        batch: &MicroBatch,
        x: &Tensor,
        walk: &mut Walk,
        output: &mut StepOutput,
    ) -> Result<HeadGradients, StepError> {
        let MicroBatch { packed, targets, streams } = batch;
        let is_frozen = self.base.is_some();
        let (_units, head, matrix) = forward::head(self.model(), walk)?;
        let (unit_idx, param_idx) = if head.lm_head.is_some() { (1 + self.config.num_layers, 1) } else { (0, 0) };
        let sums = if is_frozen { None } else { self.gradients(unit_idx, packed) };
        let is_added = sums.is_some();
        let (norm, matrix) = (leaf(&head.norm), matrix.detach());
        let rows = Tensor::embedding(x, &targets.rows, -1, false, false); // [M, C]
        let hidden = Tensor::from(packed.rms_norm(&rows.into(), &norm, self.config.rms_norm_eps)); // [M, C]

        let rows = hidden.detach(); // [M, C]
        let d_tokens = if self.options.objective.spans_sequences() {
            // Costs the head's forward pass once more.
            let (logprobs, entropies) = token_statistics(&rows, &matrix, &targets.tokens, self.options.temperature);
            Some(self.token_gradients(&logprobs, &entropies, streams, output)?)
        } else {
            None
        };
        let mut d_matrix = sums.map(|mut sums| sums.swap_remove(param_idx));
        let (mut d_hidden, mut logprobs) = (Vec::new(), Vec::new());
        let num_rows = targets.rows.size()[0];
        for start in (0..num_rows).step_by(self.options.logit_rows as usize) {
            let len = self.options.logit_rows.min(num_rows - start);
            let [rows, tokens] = [&rows, &targets.tokens].map(|all| all.narrow(0, start, len));
            let chunk = TargetLogprobs::new(&rows, &matrix, &tokens, self.options.temperature);
            let d_chunk = match &d_tokens {
                Some(d_tokens) => d_tokens.iter().map(|all| all.narrow(0, start, len)).collect(),
                None => self.token_gradients(&chunk.logprobs, &chunk.entropies, &streams.narrow(start, len), output)?,
            };
            output.unread.add_entropies(&chunk.entropies);
            logprobs.push(chunk.logprobs.shallow_clone());
            if is_frozen {
                d_hidden.push(chunk.backward_frozen(&d_chunk[0], d_chunk.get(1)));
                continue;
            }
            let (d_rows, sum) = chunk.backward(&d_chunk[0], d_chunk.get(1), d_matrix.take());
            d_hidden.push(d_rows);
            d_matrix = Some(sum);
        }
        output.num_tokens += num_rows as usize;
        output.unread.add_logprobs(targets, Tensor::cat(&logprobs, 0));

        let d_hidden = Some(Tensor::cat(&d_hidden, 0)); // [M, C]
        let [d_x, d_norm] = required(grad(&[hidden], &[x.shallow_clone(), norm], &[d_hidden], false)?);
        if is_frozen {
            return Ok(HeadGradients { input: d_x, params: Vec::new(), embedding: None });
        }
        let d_matrix = (!is_added).then(|| d_matrix.unwrap_or_else(|| matrix.zeros_like()));
        Ok(if head.lm_head.is_some() {
            HeadGradients { input: d_x, params: vec![Some(d_norm), d_matrix], embedding: None }
        } else {
            HeadGradients { input: d_x, params: vec![Some(d_norm)], embedding: d_matrix }
        })
    }

    /// Adds the loss of some tokens to `output` and returns its gradients with respect to their log-probs and, where
    /// they take part, their entropies: each `[M]`.
    fn token_gradients(
        &self,
        logprobs: &Tensor,
        entropies: &Tensor,
        streams: &Streams,
        output: &mut StepOutput,
    ) -> Result<Vec<Tensor>, StepError> {
        let entropies = streams.entropy_weights.as_ref().map(|_| leaf(entropies));
        let tokens = Tokens { logprobs: leaf(logprobs), entropies };
        let loss = self.options.objective.loss(&tokens, streams);
        output.unread.add_loss(&loss);
        Ok(defined(grad(&[loss.loss], &tokens.outputs(), &[None], false)?))
    }
}
