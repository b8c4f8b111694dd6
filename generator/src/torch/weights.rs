//! The weights as the engine reads them: matrices packed for the kernels, the rest as they are.
//!
//! There are two sets: one serves, and the other is refilled by the next push while the engine goes on decoding.

use aha_core::config::Quantization;
use aha_nn::kernels::cpu::Pool;
use aha_nn::model_config::ModelConfig;
use aha_nn::transformer::{Head, Layer, Projection};
use aha_nn::weights::{Weights, split};
use tch::{Device, Kind, Tensor};

use super::matrix::Matrix;

/// How many of a layer's projections make up each of its matrices: q, k and v; output; gate and up; down.
const PARTS: [usize; 4] = [3, 1, 2, 1];

/// A projection as a part of a matrix of [`ServingWeights`], by position. Layers name their matrices instead of owning
/// them, so that a set can be refilled in place.
#[derive(Debug, Clone, Copy)]
pub(super) struct MatrixPart {
    matrix_idx: usize,
    pub(super) out_features: usize,
}

/// One set of weights: vectors and embedding in fp32, matrices in the type that they came in, or those of the layers in 8 bits.
#[derive(Debug)]
pub struct ServingWeights {
    config: ModelConfig,
    /// `[V, C]`, for looking tokens up.
    embedding: Tensor,
    layers: Vec<Layer<MatrixPart>>,
    /// Weight of the final norm, `[C]`.
    norm: Tensor,
    /// Those of the layers, then the head, which is never quantised: log-probs depend on it most directly.
    matrices: Vec<Matrix>,
}

impl ServingWeights {
    /// Packs a copy of `weights`, which are on the CPU.
    #[must_use]
    pub fn new(config: &ModelConfig, weights: &Weights, quantization: Quantization, pool: &Pool) -> Self {
        let pack = |stacked: &[Tensor]| {
            let mut matrix = Matrix::zeros(quantization, stacked);
            matrix.repack(pool, stacked);
            matrix
        };
        Self::of(config, |unit_idx| weights.views(unit_idx), pack)
    }

    /// A set to be filled unit by unit with weights of this type. Its matrices take memory as they are filled.
    #[must_use]
    pub fn empty(config: &ModelConfig, kind: Kind, quantization: Quantization) -> Self {
        let manifest = config.manifest();
        let blank = |unit_idx: usize| {
            let flat = Tensor::empty([manifest.units[unit_idx].numel() as i64], (kind, Device::Cpu));
            split(&flat, &manifest, unit_idx)
        };
        Self::of(config, blank, |stacked| Matrix::zeros(quantization, stacked))
    }

    /// `unit` gives the parameters of a unit, and `store` keeps projections that are stacked.
    fn of(
        config: &ModelConfig,
        unit: impl Fn(usize) -> Vec<Tensor>,
        mut store: impl FnMut(&[Tensor]) -> Matrix,
    ) -> Self {
        let mut matrices = Vec::with_capacity(head_idx(config) + 1);
        let mut place = |_, stacked: &[Tensor]| matrices.push(store(stacked));
        let layers =
            (0..config.num_layers).map(|layer| new_layer(config, layer, unit(1 + layer), &mut place)).collect();
        let embedding = fp32_copy(&unit(0)[0]); // [V, C]
        let head = Head::new(unit(1 + config.num_layers), |matrix| matrix);
        let head_matrix = head.lm_head.map_or_else(|| embedding.shallow_clone(), |projection| projection.weight);
        place(head_idx(config), &[head_matrix]);
        Self { config: config.clone(), embedding, layers, norm: fp32_copy(&head.norm), matrices }
    }

    /// Replaces the parameters of one unit by copies of `params`, given in the order of the manifest, in fp32 or bf16.
    pub fn set_unit(&mut self, unit_idx: usize, params: Vec<Tensor>, pool: &Pool) {
        let Self { config, embedding, layers, norm, matrices } = self;
        let mut repack = |matrix_idx: usize, stacked: &[Tensor]| matrices[matrix_idx].repack(pool, stacked);
        match unit_idx.checked_sub(1) {
            None => {
                tch::no_grad(|| embedding.copy_(&params[0]));
                if config.tie_word_embeddings {
                    repack(head_idx(config), &params);
                }
            }
            Some(layer) if layer < config.num_layers => {
                layers[layer] = new_layer(config, layer, params, &mut repack);
            }
            Some(_) => {
                let head = Head::new(params, |matrix| repack(head_idx(config), &[matrix]));
                *norm = fp32_copy(&head.norm);
            }
        }
    }

    pub(super) fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    pub(super) fn layers(&self) -> &[Layer<MatrixPart>] {
        &self.layers
    }

    pub(super) fn norm(&self) -> &Tensor {
        &self.norm
    }

    pub(super) fn head(&self) -> Projection<MatrixPart> {
        let part = MatrixPart { matrix_idx: head_idx(&self.config), out_features: self.config.vocab_size };
        Projection { weight: part, bias: None }
    }

    /// The matrix that consists of these parts.
    pub(super) fn matrix<const P: usize>(&self, parts: [MatrixPart; P]) -> &Matrix {
        let matrix_idx = parts[0].matrix_idx;
        let num_outputs: usize = parts.iter().map(|part| part.out_features).sum();
        let matrix = &self.matrices[matrix_idx];
        let is_whole = parts.iter().all(|part| part.matrix_idx == matrix_idx) && num_outputs == matrix.out_features();
        assert!(is_whole, "{parts:?} do not make up a matrix");
        matrix
    }
}

fn fp32_copy(param: &Tensor) -> Tensor {
    param.to_dtype(Kind::Float, false, true)
}

fn head_idx(config: &ModelConfig) -> usize {
    config.num_layers * PARTS.len()
}

/// A layer whose matrices are handed to `place` in the order of their positions, and whose vectors are copied.
fn new_layer(
    config: &ModelConfig,
    layer: usize,
    params: Vec<Tensor>,
    place: &mut impl FnMut(usize, &[Tensor]),
) -> Layer<MatrixPart> {
    let first_idx = layer * PARTS.len();
    let mut matrix_of_part = PARTS.iter().enumerate().flat_map(|(i, &num_parts)| vec![first_idx + i; num_parts]);
    let params = params.into_iter().map(|param| if param.dim() == 1 { fp32_copy(&param) } else { param }).collect();
    let mut weights = Vec::new();
    let layer = Layer::new(config, params, |weight| {
        let out_features = weight.size()[0] as usize;
        weights.push(weight);
        MatrixPart { matrix_idx: matrix_of_part.next().expect("a layer has these projections"), out_features }
    });
    let mut rest = weights.as_slice();
    for (i, num_parts) in PARTS.into_iter().enumerate() {
        let (stacked, others) = rest.split_at(num_parts);
        place(first_idx + i, stacked);
        rest = others;
    }
    layer
}
