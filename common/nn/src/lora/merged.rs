//! Base and adapters as the one model that they are: `W + scale * B A`, in fp32, made when it is asked for.

use aha_core::manifest::Manifest;
use tch::{Device, Kind};

use super::adapter::{AdapterSpec, weight_idx};
use crate::comm::CommError;
use crate::unit::{ModelWeights, Unit};
use crate::weights::split;

/// The merged weights of a model, of which none exist beyond the units in use.
#[derive(Debug, Clone, Copy)]
pub struct Merged<'a> {
    pub base: &'a dyn ModelWeights,
    pub spec: &'a AdapterSpec,
    /// A unit a layer.
    pub adapters: &'a dyn ModelWeights,
}

impl ModelWeights for Merged<'_> {
    fn manifest(&self) -> &Manifest {
        self.base.manifest()
    }

    fn kind(&self) -> Kind {
        Kind::Float
    }

    fn device(&self) -> Device {
        self.base.device()
    }

    fn unit(&self, unit_idx: usize) -> Result<Unit, CommError> {
        let base = self.base.unit(unit_idx)?;
        let is_layer = (1..=self.adapters.manifest().units.len()).contains(&unit_idx);
        if !is_layer && self.base.kind() == Kind::Float {
            return Ok(base);
        }
        let flat = base.flat().to_dtype(Kind::Float, false, is_layer);
        let params = split(&flat, self.manifest(), unit_idx);
        if is_layer {
            let adapters = self.adapters.unit(unit_idx - 1)?.params();
            for &target in &self.spec.targets {
                let pair = self.spec.pair(&adapters, target).expect("a target has a pair");
                let [a, b] = pair.map(|matrix| matrix.detach().to_kind(Kind::Float));
                let mut weight = params[weight_idx(&self.manifest().units[unit_idx], target)].shallow_clone();
                weight += b.matmul(&a) * self.spec.scale();
            }
        }
        Ok(Unit::new(flat, params, None))
    }
}
