//! Layers of a frozen base with adapters.

use aha_core::config::TargetModule;
use tch::{Kind, Tensor};

use super::adapter::AdapterSpec;
use super::merged::Merged;
use super::ops::{AdaptedMatrix, Adapter, LoraOps};
use crate::autograd_ops::PackedBatch;
use crate::comm::CommError;
use crate::forward::head;
use crate::logprob::token_statistics;
use crate::model_config::ModelConfig;
use crate::transformer::{Layer, Ops, Projection};
use crate::unit::Walk;

/// A decoder layer of the base's parameters, with the adapters `adapters` in the order of their manifest, of whatever
/// type: they take part in that of the base.
#[must_use]
pub fn layer(config: &ModelConfig, spec: &AdapterSpec, base: Vec<Tensor>, adapters: &[Tensor]) -> Layer<AdaptedMatrix> {
    let mut targets = TargetModule::ALL.into_iter();
    Layer::new(config, base, |weight| {
        let target = targets.next().expect("a layer has as many matrices as targets");
        let adapter = spec.pair(adapters, target).map(|pair| {
            let [a, b] = pair.map(|matrix| Projection { weight: of_kind(matrix, weight.kind()).into(), bias: None });
            Adapter { target, a, b }
        });
        AdaptedMatrix { weight, adapter }
    })
}

/// As [`crate::forward::statistics`], with adapters beside the base instead of merged into it, and without dropout.
///
/// # Errors
/// If ranks share weights and cannot reach each other.
pub fn statistics(
    config: &ModelConfig,
    model: &Merged<'_>,
    packed: &PackedBatch,
    (rows, tokens): (&Tensor, &Tensor),
    temperature: f64,
) -> Result<(Tensor, Tensor), CommError> {
    let mut walk = Walk::forward(config);
    let embedding = walk.next(model.base)?;
    let mut x = tch::no_grad(|| packed.embed(&embedding.params()[0])); // [N, C]
    drop(embedding);
    for layer_idx in 0..config.num_layers {
        let (base, adapters) = (walk.next(model.base)?, model.adapters.unit(layer_idx)?);
        let ops = LoraOps { packed, scale: model.spec.scale(), dropout: None, layer_idx };
        let layer = layer(config, model.spec, base.params(), &adapters.params());
        x = tch::no_grad(|| layer.forward(&ops, config, layer_idx, x));
    }
    let (_units, head, matrix) = head(model.base, &mut walk)?;
    let rows = Tensor::from(x).index_select(0, rows).into(); // [M, C]
    let hidden = tch::no_grad(|| packed.rms_norm(&rows, &head.norm, config.rms_norm_eps));
    Ok(token_statistics(&hidden.into(), &matrix, tokens, temperature))
}

/// Of this type, on the graph.
fn of_kind(matrix: &Tensor, kind: Kind) -> Tensor {
    if matrix.kind() == kind { matrix.shallow_clone() } else { matrix.to_kind(kind) }
}
