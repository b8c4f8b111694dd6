//! Weights as the GPU reads them.

use aha_core::manifest::{Manifest, UnitSpec};
use tch::{Device, Kind, Tensor};

use super::cuda_queue::synchronize;
use super::queue::GpuError;
use crate::model_config::ModelConfig;
use crate::transformer::{Head, Layer};
use crate::unit::Loan;
use crate::weights::{Weights, split};

/// Bytes: where cuBLASLt wants matrices to begin. Those of real models do where their unit does.
const ALIGNMENT: usize = 16;

/// One set of weights, bf16, each unit in the order of the manifest.
#[derive(Debug)]
pub struct GpuWeights {
    manifest: Manifest,
    /// One a unit, `[at least numel]`.
    units: Vec<Tensor>,
    /// `[V, C]`.
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer<Tensor>>,
    /// Weight of the final norm, `[C]`.
    pub(super) norm: Tensor,
    /// `[V, C]`; the embedding where they are tied.
    pub(super) head: Tensor,
    /// Where the memory is somebody else's.
    loan: Option<Loan>,
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
        Ok(Self::of(config, manifest, units))
    }

    /// The memory of `loan`, for as long as the set lives; none where it is not bf16 on `device`, or begins where products
    /// would be slow. The loan is of a model with the manifest of `config`.
    #[must_use]
    pub fn borrowed(config: &ModelConfig, loan: Loan, device: Device) -> Option<Self> {
        let manifest = config.manifest();
        let serves = |(flat, unit): (&Tensor, &UnitSpec)| {
            let is_in_place = flat.device() == device && flat.data_ptr().addr().is_multiple_of(ALIGNMENT);
            is_in_place && flat.kind() == Kind::BFloat16 && flat.is_contiguous() && flat.numel() >= unit.numel()
        };
        let all_serve = loan.flats.len() == manifest.units.len() && loan.flats.iter().zip(&manifest.units).all(serves);
        all_serve.then(|| {
            let units = loan.flats.iter().map(Tensor::detach).collect();
            Self { loan: Some(loan), ..Self::of(config, manifest, units) }
        })
    }

    fn of(config: &ModelConfig, manifest: Manifest, units: Vec<Tensor>) -> Self {
        let views = |unit_idx: usize| split(&units[unit_idx], &manifest, unit_idx);
        let head = Head::new(views(1 + config.num_layers), |matrix| matrix);
        let embedding = views(0).remove(0);
        Self {
            layers: (0..config.num_layers).map(|layer| Layer::new(config, views(1 + layer), |matrix| matrix)).collect(),
            norm: head.norm,
            head: head.lm_head.map_or_else(|| embedding.shallow_clone(), |projection| projection.weight),
            embedding,
            units,
            manifest,
            loan: None,
        }
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
    /// type, on any device. Done when it returns. Not for a set that is borrowed.
    ///
    /// # Errors
    /// If the copying fails.
    pub fn set_unit(&mut self, unit_idx: usize, new: &[Tensor]) -> Result<(), GpuError> {
        assert!(!self.is_borrowed(), "what is borrowed is only read");
        for (mut param, new) in split(&self.units[unit_idx], &self.manifest, unit_idx).into_iter().zip(new) {
            tch::no_grad(|| param.f_copy_(new))?;
        }
        synchronize(self.embedding.device())
    }

    /// Whether the memory is somebody else's, who writes it when this set is gone.
    pub(super) fn is_borrowed(&self) -> bool {
        self.loan.is_some()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::ModelWeights;

    fn config() -> ModelConfig {
        let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 40, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2});
        ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_borrowed_set_is_the_lenders_memory() {
        let config = config();
        // Padded, as for three ranks.
        let weights = Weights::random(&config, 1, 3, Kind::BFloat16, Device::Cpu);
        let borrowed = GpuWeights::borrowed(&config, weights.lend().unwrap().unwrap(), Device::Cpu).unwrap();
        for unit_idx in 0..weights.num_units() {
            assert_eq!(borrowed.units[unit_idx].data_ptr(), weights.flat(unit_idx).data_ptr());
        }
        assert_eq!(borrowed.embedding.data_ptr(), weights.embedding().data_ptr());
        assert!(weights.is_lent() && borrowed.is_borrowed());
        drop(tch::no_grad(|| weights.embedding().fill_(2.0)));
        assert!(borrowed.embedding.eq(2.0).all().int64_value(&[]) == 1);
        drop(borrowed);
        assert!(!weights.is_lent());
    }

    #[test]
    fn what_the_engine_cannot_read_is_not_borrowed() {
        let config = config();
        let of = |weights: Weights, device| GpuWeights::borrowed(&config, weights.lend().unwrap().unwrap(), device);
        let random = |kind| Weights::random(&config, 1, 1, kind, Device::Cpu);
        assert!(of(random(Kind::BFloat16), Device::Cpu).is_some());
        assert!(of(random(Kind::Float), Device::Cpu).is_none());
        assert!(of(random(Kind::BFloat16), Device::Cuda(0)).is_none());
        let flats = |shift: i64, missing: usize| {
            let flat = |numel: i64| Tensor::zeros([numel + 1], (Kind::BFloat16, Device::Cpu)).narrow(0, shift, numel);
            let units = config.manifest().units;
            let flats = units.iter().map(|unit| flat((unit.numel() - missing) as i64)).collect();
            Weights::from_flats(config.manifest(), flats)
        };
        assert!(of(flats(0, 0), Device::Cpu).is_some());
        assert!(of(flats(1, 0), Device::Cpu).is_none(), "two bytes off");
        assert!(of(flats(0, 1), Device::Cpu).is_none(), "one element short");
    }
}
