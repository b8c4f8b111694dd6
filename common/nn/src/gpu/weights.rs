//! Weights as the GPU reads them.

use aha_core::manifest::Manifest;
use tch::{Device, Kind, Tensor};

use super::cuda_queue::synchronize;
use super::queue::GpuError;
use crate::model_config::ModelConfig;
use crate::transformer::{Head, Layer};
use crate::weights::{Weights, split};

/// One set of weights, bf16, each unit in the order of the manifest. Memory is never replaced: graphs refer to it.
#[derive(Debug)]
pub struct GpuWeights {
    manifest: Manifest,
    /// One a unit, `[numel]`.
    units: Vec<Tensor>,
    /// `[V, C]`.
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer<Tensor>>,
    /// Weight of the final norm, `[C]`.
    pub(super) norm: Tensor,
    /// `[V, C]`; the embedding where they are tied.
    pub(super) head: Tensor,
}

impl GpuWeights {
    /// Zeros, to be filled unit by unit.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn empty(config: &ModelConfig, device: Device) -> Result<Self, GpuError> {
        let manifest = config.manifest();
        let zeros = |numel: usize| Tensor::f_zeros([numel as i64], (Kind::BFloat16, device));
        let units: Vec<Tensor> = manifest.units.iter().map(|unit| zeros(unit.numel())).collect::<Result<_, _>>()?;
        let views = |unit_idx: usize| split(&units[unit_idx], &manifest, unit_idx);
        let head = Head::new(views(1 + config.num_layers), |matrix| matrix);
        let embedding = views(0).remove(0);
        Ok(Self {
            layers: (0..config.num_layers).map(|layer| Layer::new(config, views(1 + layer), |matrix| matrix)).collect(),
            norm: head.norm,
            head: head.lm_head.map_or_else(|| embedding.shallow_clone(), |projection| projection.weight),
            embedding,
            units,
            manifest,
        })
    }

    /// A copy of `weights`, rounded.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(config: &ModelConfig, weights: &Weights, device: Device) -> Result<Self, GpuError> {
        let mut set = Self::empty(config, device)?;
        for unit_idx in 0..weights.num_units() {
            set.set_unit(unit_idx, &weights.views(unit_idx))?;
        }
        Ok(set)
    }

    /// Replaces the parameters of one unit by copies of `params`, given in the order of the manifest. They may be of any
    /// type, on any device. Done when it returns.
    ///
    /// # Errors
    /// If the copying fails.
    pub fn set_unit(&mut self, unit_idx: usize, new: &[Tensor]) -> Result<(), GpuError> {
        for (mut param, new) in split(&self.units[unit_idx], &self.manifest, unit_idx).into_iter().zip(new) {
            tch::no_grad(|| param.f_copy_(new))?;
        }
        synchronize(self.embedding.device())
    }

    /// Takes the values of another set, in place.
    pub(super) fn copy_from(&mut self, other: &Self) -> Result<(), GpuError> {
        for (unit, other) in self.units.iter_mut().zip(&other.units) {
            tch::no_grad(|| unit.f_copy_(other))?;
        }
        Ok(())
    }
}

/// The matrix whose rows are those of `parts`, which lie one after the other.
pub(super) fn stacked(parts: &[&Tensor]) -> Tensor {
    let width = parts[0].size()[1];
    let mut next = parts[0].data_ptr().addr();
    for part in parts {
        assert_eq!(part.data_ptr().addr(), next, "the parts of a matrix lie one after the other");
        next += part.numel() * part.kind().elt_size_in_bytes();
    }
    let num_rows = parts.iter().map(|part| part.size()[0]).sum();
    parts[0].as_strided([num_rows, width], [width, 1], None)
}
