//! The whole forward pass without gradients, for reference models and scoring.

use tch::{Kind, Tensor};

use crate::autograd_ops::PackedBatch;
use crate::logprob::token_statistics;
use crate::model_config::ModelConfig;
use crate::rotary::RotaryTable;
use crate::transformer::{Head, Layer, Ops};
use crate::weights::Weights;

/// Hidden states after the final norm of every packed token, `[N, C]`.
pub fn hidden_states(config: &ModelConfig, weights: &Weights, batch: &PackedBatch) -> Tensor {
    tch::no_grad(|| {
        let mut x = batch.embed(&weights.embedding()); // [N, C]
        for layer_idx in 0..config.num_layers {
            let layer = Layer::new(config, weights.views(1 + layer_idx), |weight| weight);
            x = layer.forward(batch, config, layer_idx, x);
        }
        let head = Head::new(weights.views(1 + config.num_layers), |weight| weight);
        batch.rms_norm(&x, &head.norm, config.rms_norm_eps)
    })
}

/// The matrix of the head, `[V, C]`: its own, or the embedding where they are tied.
pub fn head_matrix(config: &ModelConfig, weights: &Weights) -> Tensor {
    let head = Head::new(weights.views(1 + config.num_layers), |weight| weight);
    head.lm_head.map_or_else(|| weights.embedding(), |projection| projection.weight)
}

/// Log-prob of each token of a sequence given those before it, through the trainer's path.
///
/// # Shapes
/// - tokens: `[T]`, at least 1; returns `[T - 1]`.
#[must_use]
pub fn score(config: &ModelConfig, weights: &Weights, tokens: &[u32]) -> Vec<f32> {
    let table = RotaryTable::new(config, tokens.len(), weights.device());
    let batch = PackedBatch::new(&[tokens], &table, weights.kind());
    let num_targets = tokens.len() as i64 - 1;
    let hidden = hidden_states(config, weights, &batch).narrow(0, 0, num_targets); // [T - 1, C]
    let targets = batch.tokens.narrow(0, 1, num_targets);
    let (logprobs, _) = token_statistics(&hidden, &head_matrix(config, weights), &targets, 1.0);
    Vec::<f32>::try_from(logprobs.to_kind(Kind::Float)).expect("log-probs are a vector of floats")
}
