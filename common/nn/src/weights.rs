//! The weights of a model: one flat tensor a unit, with a view for every parameter.

use aha_core::manifest::{Manifest, ParamSpec, UnitSpec};
use aha_core::random::derive_seed;
use tch::{Device, Kind, Tensor};

use crate::comm::CommError;
use crate::model_config::ModelConfig;
use crate::unit::{Lender, Loan, ModelWeights, Unit};

/// All weights of a model, in the order of its manifest.
#[derive(Debug)]
pub struct Weights {
    pub manifest: Manifest,
    /// One a unit, `[padded_numel]`; the padding is 0.
    flats: Vec<Tensor>,
    lender: Lender,
}

impl Weights {
    /// Zeros, padded so that `world_size` ranks can hold equal shards of every unit.
    #[must_use]
    pub fn zeros(manifest: Manifest, world_size: usize, kind: Kind, device: Device) -> Self {
        let flats = manifest
            .units
            .iter()
            .map(|unit| Tensor::zeros([unit.padded_numel(world_size) as i64], (kind, device)))
            .collect();
        Self::from_flats(manifest, flats)
    }

    /// Takes over the flat tensors of all units.
    ///
    /// # Panics
    /// If there are more or fewer than units.
    #[must_use]
    pub fn from_flats(manifest: Manifest, flats: Vec<Tensor>) -> Self {
        assert_eq!(manifest.units.len(), flats.len(), "a flat tensor for every unit");
        Self { manifest, flats, lender: Lender::default() }
    }

    /// Random weights as transformers initialises them: normal matrices, zero biases, norms of one.
    ///
    /// The same seed gives the same weights whatever the world size.
    #[must_use]
    pub fn random(config: &ModelConfig, seed: u64, world_size: usize, kind: Kind, device: Device) -> Self {
        let weights = Self::zeros(config.manifest(), world_size, kind, device);
        for unit_idx in 0..weights.num_units() {
            for (mut view, values) in weights.views(unit_idx).into_iter().zip(Self::random_unit(config, seed, unit_idx))
            {
                tch::no_grad(|| view.copy_(&values));
            }
        }
        weights
    }

    /// The parameters of one unit of [`Weights::random`], in manifest order: fp32, on the CPU.
    #[must_use]
    pub fn random_unit(config: &ModelConfig, seed: u64, unit_idx: usize) -> Vec<Tensor> {
        let unit = config.manifest().units.remove(unit_idx);
        let random = |(param_idx, spec): (usize, &ParamSpec)| {
            let shape: Vec<i64> = spec.shape.iter().map(|&size| size as i64).collect();
            let options = (Kind::Float, Device::Cpu);
            if spec.name.ends_with("norm.weight") {
                Tensor::ones(&shape, options)
            } else if spec.shape.len() == 2 {
                let seed = derive_seed(seed, &[unit_idx as u64, draw_idx(&unit, param_idx)]);
                Tensor::from_slice(&normal_values(spec.numel(), config.initializer_range, seed)).view(shape.as_slice())
            } else {
                Tensor::zeros(&shape, options)
            }
        };
        unit.params.iter().enumerate().map(random).collect()
    }

    #[must_use]
    pub fn num_units(&self) -> usize {
        self.flats.len()
    }

    /// The flat tensor of a unit, `[padded_numel]`.
    pub fn flat(&self, unit_idx: usize) -> &Tensor {
        &self.flats[unit_idx]
    }

    /// The parameters of a unit as views of its flat tensor, in manifest order.
    #[must_use]
    pub fn views(&self, unit_idx: usize) -> Vec<Tensor> {
        split(&self.flats[unit_idx], &self.manifest, unit_idx)
    }

    /// The embedding matrix, `[V, C]`.
    pub fn embedding(&self) -> Tensor {
        self.views(0).remove(0)
    }

    #[must_use]
    pub fn kind(&self) -> Kind {
        self.flats[0].kind()
    }

    #[must_use]
    pub fn device(&self) -> Device {
        self.flats[0].device()
    }

    /// A copy that shares no memory.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self::from_flats(self.manifest.clone(), self.flats.iter().map(Tensor::copy).collect())
    }

    /// Whether somebody has them by [`ModelWeights::lend`]: they are not to be written.
    #[must_use]
    pub fn is_lent(&self) -> bool {
        self.lender.is_lent()
    }
}

impl ModelWeights for Weights {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn kind(&self) -> Kind {
        self.kind()
    }

    fn device(&self) -> Device {
        self.device()
    }

    fn unit(&self, unit_idx: usize) -> Result<Unit, CommError> {
        Ok(Unit::new(self.flat(unit_idx).shallow_clone(), self.views(unit_idx), None))
    }

    fn lend(&self) -> Result<Option<Loan>, CommError> {
        Ok(Some(self.lender.lend(self.flats.iter().map(Tensor::shallow_clone).collect())))
    }
}

/// The place of a parameter if every bias followed its matrix: what a seed draws does not depend on where biases lie.
fn draw_idx(unit: &UnitSpec, param_idx: usize) -> u64 {
    let before = unit.params[..param_idx].iter().filter_map(|param| param.name.strip_suffix(".weight"));
    let has_bias = |stem: &str| unit.params.iter().any(|param| param.name == format!("{stem}.bias"));
    before.map(|stem| 1 + u64::from(has_bias(stem))).sum()
}

/// Views of the parameters of unit `unit_idx` in any flat tensor laid out like it.
#[must_use]
pub fn split(flat: &Tensor, manifest: &Manifest, unit_idx: usize) -> Vec<Tensor> {
    let mut offset = 0;
    manifest.units[unit_idx]
        .params
        .iter()
        .map(|param| {
            let numel = param.numel() as i64;
            let shape: Vec<i64> = param.shape.iter().map(|&size| size as i64).collect();
            let view = flat.narrow(0, offset, numel).view(shape.as_slice());
            offset += numel;
            view
        })
        .collect()
}

/// Normal numbers by Box and Muller.
pub(crate) fn normal_values(numel: usize, std: f64, seed: u64) -> Vec<f32> {
    random_values(numel, seed, |words| {
        let mut values = [0.0; 4];
        for (pair, values) in words.chunks_exact(2).zip(values.chunks_mut(2)) {
            let radius = std * (-2.0 * uniform(pair[0]).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * uniform(pair[1])).sin_cos();
            values.iter_mut().zip([cos, sin]).for_each(|(value, part)| *value = (radius * part) as f32);
        }
        values
    })
}

/// Numbers spread evenly from `-bound` to `bound`.
pub(crate) fn uniform_values(numel: usize, bound: f64, seed: u64) -> Vec<f32> {
    random_values(numel, seed, |words| words.map(|word| (bound * (2.0 * uniform(word) - 1.0)) as f32))
}

/// In (0, 1).
fn uniform(word: u32) -> f64 {
    (f64::from(word) + 0.5) / (f64::from(u32::MAX) + 1.0)
}

/// Four numbers from each value of a counter, so that threads can share the work.
fn random_values(numel: usize, seed: u64, draw: impl Fn([u32; 4]) -> [f32; 4] + Copy + Send) -> Vec<f32> {
    /// Fewer are not worth a thread.
    const LEAST_PER_THREAD: usize = 1 << 16;
    let key = [seed as u32, (seed >> 32) as u32];
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let per_thread = numel.div_ceil(num_threads).next_multiple_of(4).max(LEAST_PER_THREAD);
    let mut values = vec![0.0; numel];
    std::thread::scope(|scope| {
        for (piece_idx, piece) in values.chunks_mut(per_thread).enumerate() {
            scope.spawn(move || {
                for (values, counter) in piece.chunks_mut(4).zip(piece_idx * per_thread / 4..) {
                    let words = aha_core::random::philox([counter as u32, (counter >> 32) as u32, 0, 1], key);
                    values.iter_mut().zip(draw(words)).for_each(|(value, drawn)| *value = drawn);
                }
            });
        }
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 33, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2});
        ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
    }

    #[test]
    fn random_weights_do_not_depend_on_the_world_size() {
        let [one, three] = [1, 3].map(|size| Weights::random(&config(), 7, size, Kind::Float, Device::Cpu));
        for unit_idx in 0..one.num_units() {
            for (a, b) in one.views(unit_idx).iter().zip(three.views(unit_idx)) {
                assert!(a.equal(&b));
            }
        }
        let std = f64::try_from(one.embedding().std(true)).unwrap();
        assert!((std - 0.02).abs() < 0.002, "{std}");
    }

    #[test]
    fn what_is_drawn_does_not_depend_on_where_biases_lie() {
        let unit = &config().manifest().units[1];
        let place = |name: &str| {
            let is_it = |param: &ParamSpec| param.name.ends_with(&format!("{name}.weight"));
            draw_idx(unit, unit.params.iter().position(is_it).unwrap())
        };
        let names = ["input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"];
        assert_eq!(names.map(place), [0, 1, 3, 5, 7, 9, 11]);
    }

    #[test]
    fn views_share_memory_with_the_flat_tensor() {
        let weights = Weights::zeros(config().manifest(), 4, Kind::Float, Device::Cpu);
        let mut first = weights.views(1).remove(0);
        tch::no_grad(|| first += 2.0);
        assert_eq!(f64::try_from(weights.flat(1).sum(Kind::Double)).unwrap(), 32.0);
    }
}
