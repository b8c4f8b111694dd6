//! The packed step against sequences padded to rectangles: prompts on the left, completions on the right, a row each, as
//! trainers do it that do not pack. Every operation is written out, and autograd runs over the whole.

use aha_core::batch::TrainSequence;
use aha_nn::comm::ProcessGroup;
use aha_nn::model_config::ModelConfig;
use aha_nn::transformer::{Head, Layer, Ops, Projection};
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

use super::{SUBTRACT, config, device, largest_difference, options, policy, sequences};
use crate::test_ranks::flatten;
use crate::torch::learner::{Learner, LearnerOptions, LocalBatch};
use crate::torch::zero::Zero;

/// A rectangle of `S` rows, `P` columns of prompts and `T` in all; numbers of its tokens are `[S, T, width]`.
struct PaddedBatch {
    /// `[S, T]`.
    tokens: Tensor,
    /// Of angles, `[S, T, 1, D]`.
    cos: Tensor,
    sin: Tensor,
    /// Added to scores, `[S, 1, T, T]`.
    mask: Tensor,
    head_dim: i64,
    /// P.
    num_prompt_columns: i64,
}

impl PaddedBatch {
    /// `padding` is the token that fills what is left.
    fn new(model: &ModelConfig, sequences: &[TrainSequence], padding: i64) -> Self {
        let prompt_columns = sequences.iter().map(|sequence| sequence.num_prompt_tokens).max().unwrap();
        let columns = prompt_columns + sequences.iter().map(TrainSequence::num_completion_tokens).max().unwrap();
        let (mut tokens, mut is_real) = (Vec::new(), Vec::new());
        for sequence in sequences {
            let first = prompt_columns - sequence.num_prompt_tokens;
            for column in 0..columns {
                let token = column.checked_sub(first).and_then(|position| sequence.token_ids.get(position));
                tokens.push(token.map_or(padding, |&token| i64::from(token)));
                is_real.push(token.is_some());
            }
        }
        let shape = [sequences.len() as i64, columns as i64];
        let is_real = Tensor::from_slice(&is_real).view(shape);
        let positions = (is_real.to_kind(Kind::Double).cumsum(1, Kind::Double) - 1.0).clamp_min(0.0); // [S, T]
        let frequencies = Tensor::from_slice(&model.rope.inverse_frequencies(model.head_dim)); // [D / 2]
        let angles = positions.view([shape[0], shape[1], 1, 1]) * Tensor::cat(&[&frequencies, &frequencies], 0);
        let is_seen = Tensor::ones([shape[1], shape[1]], (Kind::Bool, Device::Cpu)).tril(0);
        let is_seen = is_seen.logical_and(&is_real.view([shape[0], 1, 1, shape[1]])); // [S, 1, T, T]
        Self {
            tokens: Tensor::from_slice(&tokens).view(shape),
            cos: angles.cos(),
            sin: angles.sin(),
            // Rows of padding see nothing: a finite number keeps them from becoming NaN.
            mask: (is_seen.to_kind(Kind::Double) - 1.0) * 1e30,
            head_dim: model.head_dim as i64,
            num_prompt_columns: prompt_columns as i64,
        }
    }

    fn heads(&self, x: &Tensor) -> Tensor {
        let (s, t, _) = x.size3().unwrap();
        x.view([s, t, -1, self.head_dim]) // [S, T, heads, D]
    }

    /// Log-probs of the tokens of completions, `[S, T - P]`; those of padding mean nothing.
    fn logprobs(&self, model: &ModelConfig, params: &[Vec<Tensor>]) -> Tensor {
        let unit = |unit_idx: usize| params[unit_idx].iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
        let embedding = unit(0).remove(0);
        let mut x = self.embed(&embedding);
        for layer_idx in 0..model.num_layers {
            x = Layer::new(model, unit(1 + layer_idx), |weight| weight).forward(self, model, layer_idx, x);
        }
        let head = Head::new(unit(1 + model.num_layers), |weight| weight);
        let matrix = head.lm_head.map_or(embedding, |projection| projection.weight);
        let x = self.rms_norm(&x, &head.norm, model.rms_norm_eps);
        let all = (x.matmul(&matrix.transpose(0, 1)) / 0.8).log_softmax(-1, Kind::Double); // [S, T, V]
        let len = self.tokens.size()[1] - self.num_prompt_columns;
        let targets = self.tokens.narrow(1, self.num_prompt_columns, len).unsqueeze(2); // [S, T - P, 1]
        all.narrow(1, self.num_prompt_columns - 1, len).gather(2, &targets, false).squeeze_dim(2)
    }
}

impl Ops for PaddedBatch {
    type Matrix = Tensor;
    type Rows = Tensor;

    fn embed(&self, weight: &Tensor) -> Tensor {
        let (s, t) = self.tokens.size2().unwrap();
        weight.index_select(0, &self.tokens.view([-1])).view([s, t, -1])
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        let square = x.square().mean_dim(-1, true, Kind::Double);
        x / (square + eps).sqrt() * weight
    }

    fn head_norm(&self, x: Tensor, weight: &Tensor, eps: f64) -> Tensor {
        self.rms_norm(&self.heads(&x), weight, eps).flatten(2, 3)
    }

    fn linear<const P: usize>(&self, x: &Tensor, projections: [&Projection<Tensor>; P]) -> [Tensor; P] {
        projections.map(|projection| {
            let product = x.matmul(&projection.weight.transpose(0, 1));
            projection.bias.as_ref().map_or_else(|| product.shallow_clone(), |bias| &product + bias)
        })
    }

    fn add_linear(&self, residual: Tensor, x: &Tensor, projection: &Projection<Tensor>) -> Tensor {
        let [delta] = self.linear(x, [projection]);
        residual + delta
    }

    fn rope(&self, x: Tensor) -> Tensor {
        let x = self.heads(&x);
        let halves = x.chunk(2, -1);
        let turned = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1); // [S, T, heads, D]
        (x * &self.cos + turned * &self.sin).flatten(2, 3)
    }

    fn attention(&self, _layer_idx: usize, qkv: [Tensor; 3]) -> Tensor {
        let [q, k, v] = qkv.map(|x| self.heads(&x).transpose(1, 2)); // [S, heads, T, D]
        let queries_per_key = q.size()[1] / k.size()[1];
        let [k, v] = [k, v].map(|x| x.repeat_interleave_self_int(queries_per_key, 1, None));
        let scores = q.matmul(&k.transpose(2, 3)) / (self.head_dim as f64).sqrt() + &self.mask; // [S, H, T, T]
        scores.softmax(-1, Kind::Double).matmul(&v).transpose(1, 2).flatten(2, 3)
    }

    fn silu_mul(&self, [gate, up]: [Tensor; 2]) -> Tensor {
        gate.sigmoid() * gate * up
    }
}

/// What the padded rectangle says of a batch.
struct Expected {
    loss: f64,
    /// Of the completion tokens of every sequence.
    logprobs: Vec<Tensor>,
    /// Of all parameters, one after the other.
    gradients: Tensor,
}

fn padded(model: &ModelConfig, weights: &Weights, sequences: &[TrainSequence]) -> Expected {
    let double = |weights: &Weights, is_leaf: bool| -> Vec<Vec<Tensor>> {
        let leaf = |view: &Tensor| view.detach().to_kind(Kind::Double).set_requires_grad(is_leaf);
        (0..weights.num_units()).map(|unit_idx| weights.views(unit_idx).iter().map(leaf).collect()).collect()
    };
    let (leaves, frozen) = (double(weights, true), double(&reference(model, Device::Cpu), false));
    let batch = PaddedBatch::new(model, sequences, 17);
    let (ours, theirs) = (batch.logprobs(model, &leaves), batch.logprobs(model, &frozen));
    let mut expected = Expected { loss: 0.0, logprobs: Vec::new(), gradients: Tensor::new() };
    let mut loss = Tensor::zeros([], (Kind::Double, Device::Cpu));
    for (row, sequence) in sequences.iter().enumerate() {
        let real = |rows: &Tensor| rows.get(row as i64).narrow(0, 0, sequence.num_completion_tokens() as i64);
        let stream = |values: &[f32]| Tensor::from_slice(values).to_kind(Kind::Double);
        let (ours, theirs) = (real(&ours), real(&theirs));
        let advantages = stream(&sequence.advantages);
        let ratio = (&ours - stream(&sequence.old_logprobs)).exp();
        let surrogate = (&ratio * &advantages).minimum(&(ratio.clamp(0.8, 1.3) * &advantages));
        let kl = (&theirs - &ours).exp() - (&theirs - &ours) - 1.0;
        loss += ((-surrogate + kl * 0.05) * stream(&sequence.weights)).sum(Kind::Double);
        expected.logprobs.push(ours.detach());
    }
    let flat: Vec<Tensor> = leaves.into_iter().flatten().collect();
    let grads = Tensor::run_backward(&[&loss], &flat, false, false);
    expected.gradients = Tensor::cat(&grads.iter().map(|grad| grad.reshape([-1])).collect::<Vec<_>>(), 0);
    expected.loss = loss.double_value(&[]);
    expected
}

fn reference(model: &ModelConfig, device: Device) -> Weights {
    Weights::random(model, 99, 1, Kind::Float, device)
}

#[test]
fn packed_equals_padded() {
    for (family, tied) in [("qwen2", true), ("qwen3", false), ("llama", false)] {
        let (model, sequences) = (config(family, tied), sequences(3, true));
        let expected = padded(&model, &Weights::random(&model, 5, 1, Kind::Float, Device::Cpu), &sequences);
        for share_prompts in [false, true] {
            let weights = Weights::random(&model, 5, 1, Kind::Float, device());
            let before = flatten(&weights);
            let zero = Zero::new(0, ProcessGroup::solo("test", device()), weights);
            let options = LearnerOptions { share_prompts, max_grad_norm: 0.0, ..options(policy(0.05), false) };
            let mut learner = Learner::new(model.clone(), options, zero, Some(reference(&model, device()).into()));
            let all: Vec<usize> = (0..sequences.len()).collect();
            let batch = LocalBatch { sequences: &sequences, micro_batches: &[all], num_micro_batches: 1 };
            let output = learner.step(&batch, &SUBTRACT).unwrap();
            let place = format!("{family}, prompts shared: {share_prompts}");
            assert!((output.loss - expected.loss).abs() < 1e-5, "{place}: {} is not {}", output.loss, expected.loss);
            for (found, expect) in output.logprobs.iter().zip(&expected.logprobs) {
                let difference = largest_difference(&Tensor::from_slice(found), expect);
                assert!(difference < 1e-5, "{place}: log-probs differ by {difference}");
            }
            let found = (before - flatten(learner.zero().weights())).to_kind(Kind::Double);
            let difference = largest_difference(&found, &expected.gradients);
            let largest = expected.gradients.abs().max().double_value(&[]);
            assert!(largest > 0.01 && difference < 1e-5, "{place}: gradients of {largest} differ by {difference}");
        }
    }
}
