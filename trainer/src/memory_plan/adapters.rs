//! What adapters and the frozen base under them take.

use aha_core::config::BaseQuantization;
use aha_core::manifest::{Manifest, ParamSpec};
use aha_nn::lora::{AdapterSpec, Nf4Matrix, Nf4Options};

use super::{FLOAT, Setting};

/// Bytes an element of a matrix takes while it is dequantised, beside the matrix: its codes' values, and those times scales.
const DEQUANTISING: usize = 2 * FLOAT;

impl Setting<'_> {
    /// What the adapters are; `None` where the whole model trains.
    pub(super) fn adapters(&self) -> Option<AdapterSpec> {
        self.lora
            .is_on()
            .then(|| AdapterSpec::new(self.lora).expect("a validated configuration names known projections"))
    }

    /// What trains: the model, or adapters.
    pub(super) fn trained(&self) -> Manifest {
        self.adapters().map_or_else(|| self.model.manifest(), |spec| spec.manifest(self.model))
    }

    /// Bytes of an element of what trains. Adapters are fp32 beside a base of any type.
    pub(super) fn trained_element(&self) -> usize {
        if self.lora.is_on() { FLOAT } else { self.element() }
    }

    pub(super) fn is_quantised(&self) -> bool {
        self.lora.is_on() && self.lora.quantization != BaseQuantization::None
    }

    /// The frozen base.
    pub(super) fn base(&self) -> usize {
        if !self.lora.is_on() {
            return 0;
        }
        let units = self.model.manifest().units;
        let options = Nf4Options { double_quant: self.lora.double_quant };
        let bytes = |(unit_idx, param): (usize, &ParamSpec)| {
            let is_in_layer = (1..=self.model.num_layers).contains(&unit_idx);
            if self.is_quantised() && is_in_layer && param.shape.len() == 2 {
                Nf4Matrix::bytes_of(param.numel(), options)
            } else {
                param.numel() * self.element()
            }
        };
        units
            .iter()
            .enumerate()
            .flat_map(|(idx, unit)| unit.params.iter().map(move |param| (idx, param)))
            .map(bytes)
            .sum()
    }

    /// A layer's weights while it computes, where they are stored in 4 bits.
    pub(super) fn dequantised(&self) -> usize {
        if !self.is_quantised() {
            return 0;
        }
        self.model.manifest().units[1].numel() * self.element()
    }

    /// While the largest matrix of a layer is dequantised.
    pub(super) fn dequantising(&self) -> usize {
        let layer = &self.model.manifest().units[1];
        let largest = layer.params.iter().map(ParamSpec::numel).max().unwrap_or(0);
        if self.is_quantised() { self.dequantised() + largest * DEQUANTISING } else { 0 }
    }

    /// What a layer keeps for its adapters' backward pass: of each the product with `lora_A`, `N r`; and where inputs are
    /// dropped, the mask and what it leaves, `2 N in`.
    pub(super) fn adapter_activations(&self) -> usize {
        let Some(spec) = self.adapters() else { return 0 };
        let layer = &spec.manifest(self.model).units[0];
        let width = |a: &ParamSpec| if self.lora.lora_dropout > 0.0 { 2 * a.shape[1] } else { 0 };
        let per_token: usize = layer.params.iter().step_by(2).map(|a| spec.r + width(a)).sum();
        self.num_tokens * per_token * self.element()
    }
}
