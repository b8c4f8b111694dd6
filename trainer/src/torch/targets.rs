//! Where the loss is: completion tokens among packed rows, and their streams.

use aha_core::batch::TrainSequence;
use tch::{Kind, Tensor};

use super::objective::Streams;

/// The completion tokens of a micro-batch and the packed rows that predict them.
pub(super) struct Targets {
    /// `[M]`, i64: the row before each completion token.
    pub(super) rows: Tensor,
    /// `[M]`, i64: the completion tokens.
    pub(super) tokens: Tensor,
    /// Sequence and number of completion tokens, in packed order.
    pieces: Vec<(usize, usize)>,
}

impl Targets {
    pub(super) fn new(sequences: &[TrainSequence], indices: &[usize], device: tch::Device) -> Self {
        let (mut rows, mut tokens, mut pieces) = (Vec::new(), Vec::new(), Vec::new());
        let mut start = 0_i64;
        for &index in indices {
            let sequence = &sequences[index];
            for position in sequence.num_prompt_tokens..sequence.token_ids.len() {
                rows.push(start + position as i64 - 1);
                tokens.push(i64::from(sequence.token_ids[position]));
            }
            pieces.push((index, sequence.num_completion_tokens()));
            start += sequence.token_ids.len() as i64;
        }
        let to_device = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        Self { rows: to_device(&rows), tokens: to_device(&tokens), pieces }
    }

    pub(super) fn streams(&self, sequences: &[TrainSequence], indices: &[usize]) -> Streams {
        let device = self.rows.device();
        let gather = |stream: fn(&TrainSequence) -> &Vec<f32>| {
            let values: Vec<f32> =
                indices.iter().flat_map(|&index| stream(&sequences[index]).iter().copied()).collect();
            (values.len() as i64 == self.rows.size()[0]).then(|| Tensor::from_slice(&values).to_device(device))
        };
        let weights = gather(|sequence| &sequence.weights);
        let ids = self.pieces.iter().enumerate().flat_map(|(id, &(_, len))| std::iter::repeat_n(id as i64, len));
        Streams {
            weights: weights.expect("every completion token has a weight"),
            advantages: gather(|sequence| &sequence.advantages),
            old_logprobs: gather(|sequence| &sequence.old_logprobs),
            sampled_logprobs: gather(|sequence| &sequence.sampled_logprobs),
            reference_logprobs: None,
            policy_mask: gather(|sequence| &sequence.policy_mask),
            entropy_weights: gather(|sequence| &sequence.entropy_weights),
            sequence_ids: Tensor::from_slice(&ids.collect::<Vec<_>>()).to_device(device),
            num_sequences: self.pieces.len() as i64,
        }
    }

    /// The log-probs of the tokens of rows `start..start + len` among `[len, V]`; `[len]`.
    pub(super) fn choose(&self, all: &Tensor, start: i64, len: i64) -> Tensor {
        all.gather(1, &self.tokens.narrow(0, start, len).unsqueeze(1), false).squeeze_dim(1)
    }

    /// Cuts `[M]` values up by sequence.
    pub(super) fn scatter(&self, values: &Tensor, by_sequence: &mut [Vec<f32>]) {
        let values = Vec::<f32>::try_from(values.to_kind(Kind::Float)).expect("log-probs are a vector of floats");
        let mut rest = values.as_slice();
        for &(index, len) in &self.pieces {
            let (piece, tail) = rest.split_at(len);
            by_sequence[index] = piece.to_vec();
            rest = tail;
        }
    }
}
