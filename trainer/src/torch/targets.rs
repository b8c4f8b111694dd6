//! Where the loss is: completion tokens among packed rows, and their streams.

use aha_core::batch::TrainSequence;
use aha_nn::tensor_data::to_device;
use tch::{Kind, Tensor};

use super::objective::Streams;

/// The completion tokens of a micro-batch and the packed rows that predict them.
pub(super) struct Targets {
    /// `[M]`, i64: the row before each completion token.
    pub(super) rows: Tensor,
    /// `[M]`, i64: the completion tokens.
    pub(super) tokens: Tensor,
    pub(super) pieces: Pieces,
}

/// Sequence and number of completion tokens, in packed order.
#[derive(Debug, Clone)]
pub(super) struct Pieces(Vec<(usize, usize)>);

impl Targets {
    /// For groups whose prompt is packed once, before their completions.
    pub(super) fn new(sequences: &[TrainSequence], groups: &[Vec<usize>], device: tch::Device) -> Self {
        let (mut rows, mut tokens, mut pieces) = (Vec::new(), Vec::new(), Vec::new());
        let mut next_row = 0_i64;
        for group in groups {
            next_row += sequences[group[0]].num_prompt_tokens as i64;
            let prompt_row = next_row - 1;
            for &index in group {
                let sequence = &sequences[index];
                let completion = &sequence.token_ids[sequence.num_prompt_tokens..];
                tokens.extend(completion.iter().map(|&token| i64::from(token)));
                let before = |offset: i64| if offset == 0 { prompt_row } else { next_row + offset - 1 };
                rows.extend((0..completion.len() as i64).map(before));
                pieces.push((index, completion.len()));
                next_row += completion.len() as i64;
            }
        }
        Self { rows: to_device(&rows, device), tokens: to_device(&tokens, device), pieces: Pieces(pieces) }
    }

    pub(super) fn streams(&self, sequences: &[TrainSequence]) -> Streams {
        let device = self.rows.device();
        let gather = |stream: fn(&TrainSequence) -> &Vec<f32>| {
            let values: Vec<f32> =
                self.pieces.0.iter().flat_map(|&(index, _)| stream(&sequences[index]).iter().copied()).collect();
            (values.len() as i64 == self.rows.size()[0]).then(|| to_device(&values, device))
        };
        let weights = gather(|sequence| &sequence.weights);
        let ids = self.pieces.0.iter().enumerate().flat_map(|(id, &(_, len))| std::iter::repeat_n(id as i64, len));
        Streams {
            weights: weights.expect("every completion token has a weight"),
            advantages: gather(|sequence| &sequence.advantages),
            old_logprobs: gather(|sequence| &sequence.old_logprobs),
            sampled_logprobs: gather(|sequence| &sequence.sampled_logprobs),
            reference_logprobs: None,
            policy_mask: gather(|sequence| &sequence.policy_mask),
            entropy_weights: gather(|sequence| &sequence.entropy_weights),
            sequence_ids: to_device(&ids.collect::<Vec<_>>(), device),
            num_sequences: self.pieces.0.len() as i64,
        }
    }
}

impl Pieces {
    /// Cuts `[M]` values up by sequence.
    pub(super) fn scatter(&self, values: &Tensor, by_sequence: &mut [Vec<f32>]) {
        let values = Vec::<f32>::try_from(values.to_kind(Kind::Float)).expect("log-probs are a vector of floats");
        let mut rest = values.as_slice();
        for &(index, len) in &self.0 {
            let (piece, tail) = rest.split_at(len);
            by_sequence[index] = piece.to_vec();
            rest = tail;
        }
    }
}
