//! The shapes, names and first values of adapters.

use aha_core::config::{InitLoraWeights, Lora, TargetModule};
use aha_core::manifest::{Manifest, ParamSpec, UnitSpec};
use aha_core::random::derive_seed;
use tch::{Device, Kind, Tensor};

use crate::model_config::ModelConfig;
use crate::weights::{Weights, normal_values, uniform_values};

/// In front of a parameter's name in PEFT's files.
const PREFIX: &str = "base_model.model.";

/// What the adapters of a model are.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSpec {
    /// Rank.
    pub r: usize,
    pub alpha: f64,
    pub use_rslora: bool,
    /// Each once, in the order of the forward pass.
    pub targets: Vec<TargetModule>,
}

impl AdapterSpec {
    /// # Errors
    /// If a target is unknown.
    pub fn new(lora: &Lora) -> Result<Self, String> {
        Ok(Self { r: lora.r, alpha: lora.lora_alpha, use_rslora: lora.use_rslora, targets: lora.targets()? })
    }

    /// What an adapter's product is multiplied by.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let rank = self.r as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// The adapters under PEFT's names, a unit a layer: for every target `lora_A: [r, in]`, then `lora_B: [out, r]`.
    #[must_use]
    pub fn manifest(&self, config: &ModelConfig) -> Manifest {
        let base = config.manifest();
        let layers = &base.units[1..=config.num_layers];
        let unit = |unit: &UnitSpec| {
            let params = self.targets.iter().flat_map(|target| {
                let weight = weight_of(unit, *target);
                let module = weight.name.trim_end_matches(".weight");
                [
                    ParamSpec::new(format!("{PREFIX}{module}.lora_A.weight"), &[self.r, weight.shape[1]]),
                    ParamSpec::new(format!("{PREFIX}{module}.lora_B.weight"), &[weight.shape[0], self.r]),
                ]
            });
            UnitSpec { name: unit.name.clone(), params: params.collect() }
        };
        Manifest { units: layers.iter().map(unit).collect() }
    }

    /// The pair of `target` among the parameters of a layer's adapters, `[r, in]` and `[out, r]`.
    pub(super) fn pair<'a>(&self, params: &'a [Tensor], target: TargetModule) -> Option<[&'a Tensor; 2]> {
        let index = self.targets.iter().position(|&known| known == target)?;
        Some([&params[2 * index], &params[2 * index + 1]])
    }
}

/// Adapters that change nothing yet, in fp32; the same whatever the world size.
#[must_use]
pub fn fresh_adapters(
    config: &ModelConfig,
    spec: &AdapterSpec,
    (init, seed): (InitLoraWeights, u64),
    (world_size, device): (usize, Device),
) -> Weights {
    let adapters = Weights::zeros(spec.manifest(config), world_size, Kind::Float, device);
    for unit_idx in 0..adapters.num_units() {
        for (param_idx, mut a) in adapters.views(unit_idx).into_iter().enumerate().step_by(2) {
            let seed = derive_seed(seed, &[unit_idx as u64, param_idx as u64]);
            let values = match init {
                InitLoraWeights::Kaiming => uniform_values(a.numel(), (a.size()[1] as f64).powf(-0.5), seed),
                InitLoraWeights::Gaussian => normal_values(a.numel(), 1.0 / spec.r as f64, seed),
            };
            tch::no_grad(|| a.copy_(&Tensor::from_slice(&values).view_as(&a)));
        }
    }
    adapters
}

/// The weight of a projection, `[out, in]`, in a layer's unit of the model's manifest.
fn weight_of(unit: &UnitSpec, target: TargetModule) -> &ParamSpec {
    let suffix = format!(".{}.weight", target.path());
    let found = unit.params.iter().find(|param| param.name.ends_with(&suffix));
    found.expect("a decoder layer has every projection")
}

/// Index of a projection's weight in a layer's unit of the model's manifest.
pub(super) fn weight_idx(unit: &UnitSpec, target: TargetModule) -> usize {
    let weight = weight_of(unit, target);
    unit.params.iter().position(|param| param == weight).expect("it was found there")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_adapters_are_as_peft_makes_them() {
        let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 33, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2});
        let config = ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap();
        let targets = vec![TargetModule::Q, TargetModule::Down];
        let spec = AdapterSpec { r: 16, alpha: 8.0, use_rslora: false, targets };
        let names: Vec<_> = spec.manifest(&config).units[1].params.iter().map(|param| param.name.clone()).collect();
        assert_eq!(names[0], "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight");
        assert_eq!(names[3], "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight");
        let fresh = |init, world_size| fresh_adapters(&config, &spec, (init, 7), (world_size, Device::Cpu));
        for (init, std) in
            [(InitLoraWeights::Kaiming, (3.0 * 96.0_f64).powf(-0.5)), (InitLoraWeights::Gaussian, 1.0 / 16.0)]
        {
            let (one, three) = (fresh(init, 1), fresh(init, 3));
            let params = one.views(1);
            assert_eq!(params.iter().map(Tensor::size).collect::<Vec<_>>(), [[16, 64], [64, 16], [16, 96], [64, 16]]);
            assert!(params[1].abs().max().double_value(&[]) == 0.0 && params[3].abs().max().double_value(&[]) == 0.0);
            let found = params[2].std(true).double_value(&[]);
            assert!((found - std).abs() < 0.05 * std, "{init:?}: {found} is not {std}");
            assert!(params.iter().zip(three.views(1)).all(|(one, three)| one.equal(&three)));
            assert!(!params[0].equal(&one.views(0)[0]));
        }
        let bound = fresh(InitLoraWeights::Kaiming, 1).views(0)[0].abs().max().double_value(&[]);
        assert!(bound <= 1.0 / 8.0 && bound > 0.12, "{bound}");
    }

    #[test]
    fn the_scale_is_alpha_over_rank_or_its_root() {
        let scale = |use_rslora| AdapterSpec { r: 16, alpha: 8.0, use_rslora, targets: Vec::new() }.scale();
        assert_eq!((scale(false), scale(true)), (0.5, 2.0));
    }
}
