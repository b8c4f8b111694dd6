//! The whole forward pass without gradients, for reference models and scoring.

use tch::{Kind, Tensor};

use crate::autograd_ops::PackedBatch;
use crate::comm::CommError;
use crate::fused_ops::TrainedMatrix;
use crate::logprob::token_statistics;
use crate::model_config::ModelConfig;
use crate::rotary::RotaryTable;
use crate::transformer::{Head, Layer, Ops};
use crate::unit::{ModelWeights, Unit, Walk};
use crate::weights::Weights;

/// What it says of whole weights in errors that cannot happen.
const ALONE: &str = "whole weights need no other rank";

/// Hidden states after the final norm of every packed token, `[N, C]`.
pub fn hidden_states(config: &ModelConfig, weights: &Weights, batch: &PackedBatch) -> Tensor {
    let mut walk = Walk::forward(config);
    let x = layers(config, weights, batch, &mut walk).expect(ALONE);
    let (_units, head, _) = head(weights, &mut walk).expect(ALONE);
    tch::no_grad(|| batch.rms_norm(&x.into(), &head.norm, config.rms_norm_eps)).into()
}

/// The matrix of the head, `[V, C]`: its own, or the embedding where they are tied.
pub fn head_matrix(config: &ModelConfig, weights: &Weights) -> Tensor {
    let head = Head::new(weights.views(1 + config.num_layers), |weight| weight);
    head.lm_head.map_or_else(|| weights.embedding(), |projection| projection.weight)
}

/// Log-probs of some packed tokens, and the entropies of the distributions that they are taken from.
///
/// # Shapes
/// - rows: `[M]`, packed rows that predict the tokens, `[M]`, both i64; returns `[M]` fp32 twice.
///
/// # Errors
/// If ranks share the weights and cannot reach each other.
pub fn statistics(
    config: &ModelConfig,
    weights: &dyn ModelWeights,
    batch: &PackedBatch,
    (rows, tokens): (&Tensor, &Tensor),
    temperature: f64,
) -> Result<(Tensor, Tensor), CommError> {
    let mut walk = Walk::forward(config);
    let x = layers(config, weights, batch, &mut walk)?;
    let (_units, head, matrix) = head(weights, &mut walk)?;
    let rows = x.index_select(0, rows).into(); // [M, C]
    let hidden = tch::no_grad(|| batch.rms_norm(&rows, &head.norm, config.rms_norm_eps));
    Ok(token_statistics(&hidden.into(), &matrix, tokens, temperature))
}

/// The head with its matrix, `[V, C]`: its own, or the embedding where they are tied. Both have memory while the units
/// live.
///
/// # Errors
/// As [`statistics`].
pub fn head(weights: &dyn ModelWeights, walk: &mut Walk) -> Result<(Vec<Unit>, Head<Tensor>, Tensor), CommError> {
    let mut units = vec![walk.next(weights)?];
    let head = Head::new(units[0].params(), |weight| weight);
    let matrix = match &head.lm_head {
        Some(projection) => projection.weight.shallow_clone(),
        None => {
            units.push(walk.next(weights)?);
            units[1].params().remove(0)
        }
    };
    Ok((units, head, matrix))
}

/// The output of the last layer, `[N, C]`. No gradient flows.
fn layers(
    config: &ModelConfig,
    weights: &dyn ModelWeights,
    batch: &PackedBatch,
    walk: &mut Walk,
) -> Result<Tensor, CommError> {
    let embedding = walk.next(weights)?;
    let mut x = tch::no_grad(|| batch.embed(&embedding.params()[0])); // [N, C]
    drop(embedding);
    for layer_idx in 0..config.num_layers {
        let unit = walk.next(weights)?;
        let layer = Layer::new(config, unit.params(), TrainedMatrix::from);
        x = tch::no_grad(|| layer.forward(batch, config, layer_idx, x));
    }
    Ok(x.into())
}

/// Log-prob of each token of a sequence given those before it, through the trainer's path.
///
/// # Shapes
/// - tokens: `[T]`, at least 1; returns `[T - 1]`.
#[must_use]
pub fn score(config: &ModelConfig, weights: &dyn ModelWeights, tokens: &[u32]) -> Vec<f32> {
    let table = RotaryTable::new(config, tokens.len(), weights.device());
    let batch = PackedBatch::new(&[tokens], &table, weights.kind());
    let num_targets = tokens.len() as i64 - 1;
    let rows = Tensor::arange(num_targets, (Kind::Int64, weights.device()));
    let targets = batch.tokens.narrow(0, 1, num_targets);
    let statistics = statistics(config, weights, &batch, (&rows, &targets), 1.0);
    let (logprobs, _) = statistics.expect(ALONE);
    Vec::<f32>::try_from(logprobs.to_kind(Kind::Float)).expect("log-probs are a vector of floats")
}
