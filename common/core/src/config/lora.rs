//! The `lora` section: low-rank adapters that train in place of the model, and how the model under them is stored.
//!
//! Keys that PEFT's `LoraConfig` has keep its names and meanings.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

use super::RunConfig;
use super::validate::Problems;
use crate::nearest::hint;

/// Stands for every name that `target_modules` can hold.
pub const ALL_LINEAR: &str = "all-linear";

/// Low-rank adaptation (LoRA, arXiv 2106.09685): `y = x W^T + scale * dropout(x) A^T B^T`, where W is frozen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lora {
    /// Rank of the adapters; 0 trains the whole model instead.
    pub r: usize,
    /// The scale is `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Share of an adapter's inputs that is set to 0 in training. Log-probs that a step trains on are then noisy, so
    /// the default is 0; TRL's is 0.05.
    pub lora_dropout: f64,
    /// Projections that get an adapter: some of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    /// `down_proj`, or `all-linear`, the default. PEFT's default for these models is `[q_proj, v_proj]`.
    #[serde(deserialize_with = "one_or_several")]
    pub target_modules: Vec<String>,
    /// The scale is `lora_alpha / sqrt(r)` (arXiv 2312.03732).
    pub use_rslora: bool,
    pub init_lora_weights: InitLoraWeights,
    /// A PEFT folder to start from in place of fresh adapters. Rank, alpha and targets must be those of this section.
    pub adapter: Option<PathBuf>,
    /// How the frozen matrices of the layers are stored.
    pub quantization: BaseQuantization,
    /// Store the scales of `nf4` in 8 bits as well.
    pub double_quant: bool,
}

/// What adapters begin as: B is 0, so that they change nothing yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitLoraWeights {
    /// A is uniform within `1 / sqrt(in)` (Kaiming, a = sqrt(5)): PEFT's `true`.
    #[default]
    Kaiming,
    /// A is normal with standard deviation `1 / r`.
    Gaussian,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaseQuantization {
    /// As `model.dtype` says.
    #[default]
    None,
    /// 4-bit normal floats in blocks of 64 (QLoRA, arXiv 2305.14314). A layer's matrices exist in `model.dtype` only while
    /// it computes, so its activations are always computed again in the backward pass.
    Nf4,
}

/// A projection of a decoder layer that can have an adapter, in the order of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TargetModule {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl TargetModule {
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// As Hugging Face calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.path().rsplit('.').next().unwrap_or_default()
    }

    /// Its place within a layer.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

impl FromStr for TargetModule {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|module| module.name() == name);
        found.ok_or_else(|| {
            let known = Self::ALL.map(Self::name);
            let hint = hint(name, known.into_iter().chain([ALL_LINEAR]));
            format!("{name:?} is no projection of a layer{hint}; known are {} and {ALL_LINEAR}", known.join(", "))
        })
    }
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            r: 0,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: vec![ALL_LINEAR.to_owned()],
            use_rslora: false,
            init_lora_weights: InitLoraWeights::Kaiming,
            adapter: None,
            quantization: BaseQuantization::None,
            double_quant: true,
        }
    }
}

impl Lora {
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.r > 0
    }

    /// The projections that `target_modules` names, each once, in the order of the forward pass.
    ///
    /// # Errors
    /// Names the first that is unknown, with the nearest that is.
    pub fn targets(&self) -> Result<Vec<TargetModule>, String> {
        let mut targets = Vec::new();
        for name in &self.target_modules {
            if name == ALL_LINEAR {
                targets.extend(TargetModule::ALL);
            } else {
                targets.push(name.parse()?);
            }
        }
        targets.sort_unstable();
        targets.dedup();
        Ok(targets)
    }
}

impl RunConfig {
    pub(super) fn check_lora(&self, problems: &mut Problems) {
        let lora = &self.lora;
        match lora.targets() {
            Err(problem) => problems.0.push(format!("lora.target_modules: {problem}")),
            Ok(targets) => problems.unless(!targets.is_empty(), || {
                format!("lora.target_modules: empty; name projections, or {ALL_LINEAR}")
            }),
        }
        problems.positive("lora.lora_alpha", lora.lora_alpha);
        problems.unless((0.0..1.0).contains(&lora.lora_dropout), || {
            format!("lora.lora_dropout: must be in [0, 1), got {}", lora.lora_dropout)
        });
        if lora.is_on() {
            problems.unless(!self.model.random_init, || {
                "model.random_init: an adapter is of no use without its base, and random weights are kept nowhere; make a \
                 model folder first, or set lora.r to 0"
                    .to_owned()
            });
            problems.unless(!self.train.sync_ref_model, || {
                "train.sync_ref_model: the reference policy of adapters is the frozen base, which cannot move; set lora.r \
                 to 0 to train the whole model"
                    .to_owned()
            });
            problems.unless(self.train.zero_stage < 3, || {
                format!(
                    "train.zero_stage: {} shards the weights that train, which are small where lora.r is over 0, and the \
                     frozen base is whole on every rank all the same; set train.zero_stage to 2, or lora.r to 0",
                    self.train.zero_stage
                )
            });
            problems.unless(!self.train.offload_params, || {
                "train.offload_params: offloads the weights that train, which are small where lora.r is over 0; set it to \
                 false and train.zero_stage to 2, or lora.r to 0"
                    .to_owned()
            });
        } else {
            problems.unless(lora.adapter.is_none(), || "lora.adapter: has no effect while lora.r is 0".to_owned());
            problems.unless(lora.quantization == BaseQuantization::None, || {
                "lora.quantization: the base is frozen, and may be quantised, only where adapters train; set lora.r"
                    .to_owned()
            });
        }
    }
}

/// A name or a list of names.
fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a name or a list of names")]
    enum Names {
        One(String),
        Several(Vec<String>),
    }
    Ok(match Names::deserialize(deserializer)? {
        Names::One(name) => vec![name],
        Names::Several(names) => names,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config(lora: Value) -> RunConfig {
        RunConfig { lora: serde_json::from_value(lora).unwrap(), ..RunConfig::default() }
    }

    #[track_caller]
    fn check(config: &RunConfig, expect: &[&str]) {
        let problems = config.problems();
        let found = problems.iter().any(|problem| expect.iter().all(|expect| problem.contains(expect)));
        assert!(found, "no {expect:?} in {problems:?}");
    }

    #[test]
    fn targets_are_a_name_or_a_list_in_any_order() {
        let targets = |value: Value| config(json!({"target_modules": value})).lora.targets().unwrap();
        assert_eq!(targets(json!("all-linear")), TargetModule::ALL);
        assert_eq!(targets(json!(["v_proj", "q_proj", "v_proj"])), [TargetModule::Q, TargetModule::V]);
        assert_eq!(targets(json!("down_proj")), [TargetModule::Down]);
        assert_eq!(config(json!({})).lora.targets().unwrap(), TargetModule::ALL);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        check(&config(json!({"target_modules": ["q_prj"]})), &["lora.target_modules: \"q_prj\"", "mean \"q_proj\"?"]);
        check(&config(json!({"target_modules": "all_linear"})), &["mean \"all-linear\"?"]);
        check(&config(json!({"target_modules": []})), &["lora.target_modules: empty"]);
        check(&config(json!({"lora_dropout": 1.0})), &["lora.lora_dropout: must be in [0, 1), got 1"]);
        check(&config(json!({"lora_alpha": 0.0})), &["lora.lora_alpha: must be over 0"]);
        check(&config(json!({"adapter": "x"})), &["lora.adapter: has no effect"]);
        check(&config(json!({"quantization": "nf4"})), &["lora.quantization: ", "set lora.r"]);
        let mut random = config(json!({"r": 4}));
        random.model.random_init = true;
        check(&random, &["model.random_init: "]);
        let mut moving = config(json!({"r": 4}));
        (moving.train.sync_ref_model, moving.train.beta) = (true, 0.1);
        check(&moving, &["train.sync_ref_model: ", "frozen base"]);
        let mut sharded = config(json!({"r": 4}));
        (sharded.train.zero_stage, sharded.train.offload_params) = (3, true);
        check(&sharded, &["train.zero_stage: 3", "lora.r", "set train.zero_stage to 2"]);
        check(&sharded, &["train.offload_params: ", "lora.r", "train.zero_stage to 2"]);
        sharded.lora.r = 0;
        assert_eq!(sharded.problems(), RunConfig::default().problems());
        let fits = config(json!({"r": 4, "quantization": "nf4", "adapter": "x"})).problems();
        assert!(!fits.iter().any(|problem| problem.starts_with("lora.")), "{fits:?}");
    }
}
