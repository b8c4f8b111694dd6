//! The weights as the engine reads them: matrices packed for the kernels, the rest as they are.
//!
//! There are two sets: one serves, and the other is refilled by the next push while the engine goes on decoding.

use aha_nn::kernels::cpu::{PackedMatrix, Pool};
use aha_nn::model_config::ModelConfig;
use aha_nn::tensor_data::f32_slice;
use aha_nn::transformer::{Head, Layer, Projection};
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

/// q, k, v, output, gate, up and down.
const MATRICES_PER_LAYER: usize = 7;

/// A matrix of [`ServingWeights`], by position. Layers name their matrices instead of owning them, so that a set can
/// be refilled in place.
#[derive(Debug, Clone, Copy)]
pub(super) struct MatrixId(usize);

/// One set of weights, fp32.
#[derive(Debug)]
pub struct ServingWeights {
    config: ModelConfig,
    /// `[V, C]`, for looking tokens up.
    embedding: Tensor,
    layers: Vec<Layer<MatrixId>>,
    /// Weight of the final norm, `[C]`.
    norm: Tensor,
    /// Those of the layers, then the head.
    matrices: Vec<PackedMatrix>,
}

impl ServingWeights {
    /// Packs a copy of `weights`, which are fp32 on the CPU.
    #[must_use]
    pub fn new(config: &ModelConfig, weights: &Weights, pool: &Pool) -> Self {
        let mut matrices = Vec::with_capacity(config.num_layers * MATRICES_PER_LAYER + 1);
        let mut pack = |_, matrix: &Tensor| matrices.push(pack(matrix, pool));
        let layers =
            (0..config.num_layers).map(|layer| new_layer(config, layer, weights.views(1 + layer), &mut pack)).collect();
        let embedding = weights.embedding().copy(); // [V, C]
        let head = Head::new(weights.views(1 + config.num_layers), |matrix| matrix);
        pack(head_id(config), head.lm_head.as_ref().map_or(&embedding, |projection| &projection.weight));
        Self { config: config.clone(), embedding, layers, norm: head.norm.copy(), matrices }
    }

    /// A set to be filled unit by unit.
    #[must_use]
    pub fn empty(config: &ModelConfig, pool: &Pool) -> Self {
        Self::new(config, &Weights::zeros(config.manifest(), 1, Kind::Float, Device::Cpu), pool)
    }

    /// Replaces the parameters of one unit by copies of `params`, given in the order of the manifest.
    pub fn set_unit(&mut self, unit_idx: usize, params: Vec<Tensor>, pool: &Pool) {
        let params: Vec<Tensor> = params.iter().map(|param| param.to_kind(Kind::Float)).collect();
        let Self { config, embedding, layers, norm, matrices } = self;
        let mut repack = |id: MatrixId, matrix: &Tensor| matrices[id.0].repack(pool, &[f32_slice(matrix)]);
        match unit_idx.checked_sub(1) {
            None => {
                tch::no_grad(|| embedding.copy_(&params[0]));
                if config.tie_word_embeddings {
                    repack(head_id(config), &params[0]);
                }
            }
            Some(layer) if layer < config.num_layers => layers[layer] = new_layer(config, layer, params, &mut repack),
            Some(_) => {
                let head = Head::new(params, |matrix| repack(head_id(config), &matrix));
                *norm = head.norm.copy();
            }
        }
    }

    pub(super) fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    pub(super) fn layers(&self) -> &[Layer<MatrixId>] {
        &self.layers
    }

    pub(super) fn norm(&self) -> &Tensor {
        &self.norm
    }

    pub(super) fn head(&self) -> Projection<MatrixId> {
        Projection { weight: head_id(&self.config), bias: None }
    }

    pub(super) fn matrix(&self, id: MatrixId) -> &PackedMatrix {
        &self.matrices[id.0]
    }
}

fn head_id(config: &ModelConfig) -> MatrixId {
    MatrixId(config.num_layers * MATRICES_PER_LAYER)
}

/// A layer whose matrices are handed to `place` in the order of their positions, and whose vectors are copied.
fn new_layer(
    config: &ModelConfig,
    layer: usize,
    params: Vec<Tensor>,
    place: &mut impl FnMut(MatrixId, &Tensor),
) -> Layer<MatrixId> {
    let mut ids = (layer * MATRICES_PER_LAYER..).map(MatrixId);
    let params = params.into_iter().map(|param| if param.dim() == 1 { param.copy() } else { param }).collect();
    Layer::new(config, params, |matrix| {
        let id = ids.next().expect("positions are endless");
        place(id, &matrix);
        id
    })
}

fn pack(matrix: &Tensor, pool: &Pool) -> PackedMatrix {
    PackedMatrix::pack(pool, &[f32_slice(matrix)], matrix.size()[1] as usize)
}
