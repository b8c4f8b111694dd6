//! A frozen model whose layers' matrices are stored in 4 bits.

use std::path::Path;

use aha_core::manifest::Manifest;
use tch::{Device, Kind, Tensor};

use super::nf4::{Nf4Matrix, Nf4Options};
use crate::comm::CommError;
use crate::model_config::ModelConfig;
use crate::model_folder::{ModelFolderError, load_units};
use crate::unit::{ModelWeights, Unit};
use crate::weights::split;

/// Matrices of layers in 4 bits; embedding, head, norms and biases as they are.
#[derive(Debug)]
pub struct Nf4Weights {
    manifest: Manifest,
    units: Vec<StoredUnit>,
    kind: Kind,
    device: Device,
}

#[derive(Debug)]
enum StoredUnit {
    /// `[numel]`.
    Plain(Tensor),
    Layer(Vec<StoredParam>),
}

#[derive(Debug)]
enum StoredParam {
    Plain(Tensor),
    Nf4(Nf4Matrix),
}

impl Nf4Weights {
    /// Reads a model folder; one unit at a time exists unquantised. Whoever reads a unit gets it in `kind`.
    ///
    /// # Errors
    /// As for [`crate::model_folder::load_weights`].
    pub fn load(
        folder: &Path,
        config: &ModelConfig,
        options: Nf4Options,
        (kind, device): (Kind, Device),
    ) -> Result<Self, ModelFolderError> {
        let mut units = Vec::new();
        load_units(folder, config, |unit_idx, params| {
            let params = params.into_iter().map(|param| param.to_device(device));
            units.push(if (1..=config.num_layers).contains(&unit_idx) {
                StoredUnit::Layer(params.map(|param| StoredParam::new(&param, options, kind)).collect())
            } else {
                let flats: Vec<Tensor> = params.map(|param| param.to_kind(kind).reshape([-1])).collect();
                StoredUnit::Plain(Tensor::cat(&flats, 0))
            });
        })?;
        Ok(Self { manifest: config.manifest(), units, kind, device })
    }
}

impl StoredParam {
    fn new(param: &Tensor, options: Nf4Options, kind: Kind) -> Self {
        if param.dim() == 2 { Self::Nf4(Nf4Matrix::quantise(param, options)) } else { Self::Plain(param.to_kind(kind)) }
    }

    fn read_into(&self, target: &mut Tensor) {
        tch::no_grad(|| match self {
            Self::Plain(param) => target.copy_(param),
            Self::Nf4(matrix) => target.copy_(&matrix.dequantise(target.kind())),
        });
    }
}

impl ModelWeights for Nf4Weights {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn device(&self) -> Device {
        self.device
    }

    fn unit(&self, unit_idx: usize) -> Result<Unit, CommError> {
        let flat = match &self.units[unit_idx] {
            StoredUnit::Plain(flat) => flat.shallow_clone(),
            StoredUnit::Layer(stored) => {
                let numel = self.manifest.units[unit_idx].numel() as i64;
                let flat = Tensor::empty([numel], (self.kind, self.device));
                let params = split(&flat, &self.manifest, unit_idx);
                params.into_iter().zip(stored).for_each(|(mut param, stored)| stored.read_into(&mut param));
                flat
            }
        };
        let params = split(&flat, &self.manifest, unit_idx);
        Ok(Unit::new(flat, params, None))
    }
}
