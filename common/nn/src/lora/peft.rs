//! Adapters in PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`, read and written.

use std::path::{Path, PathBuf};

use aha_core::config::{BaseQuantization, InitLoraWeights, Lora, TargetModule};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tch::{Device, Kind};

use super::adapter::AdapterSpec;
use super::nf4::Nf4Options;
use crate::model_config::ModelConfig;
use crate::model_folder::{ModelFolderError, StoredTensor, bad_tensor, map, save_tensors, unreadable};
use crate::unit::ModelWeights;
use crate::weights::Weights;

/// The files of a folder.
pub const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The version whose fields are written.
const PEFT_VERSION: &str = "0.21.2";

/// In the head of the tensors' file: how the base was stored under these adapters. PEFT does not read it.
const QUANTIZATION: &str = "base_quantization";

/// What a folder says of its adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFolder {
    pub path: PathBuf,
    pub spec: AdapterSpec,
    /// How the base was quantised when the adapters were trained, as far as the folder says it.
    pub quantization: Option<Nf4Options>,
}

/// The fields that matter here. All that would change what an adapter computes must be as it is by default.
#[derive(Deserialize)]
struct Fields {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
}

/// Fields that must be absent, null, false, empty or "none": nothing here computes what they ask for.
const UNSUPPORTED: [&str; 15] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "arrow_config",
    "alora_invocation_tokens",
];

/// Writes the two files: fp32 adapters under PEFT's names, and every field that PEFT writes.
///
/// # Errors
/// Names the file that cannot be written.
pub fn save(
    folder: &Path,
    base_model: &Path,
    lora: &Lora,
    adapters: &dyn ModelWeights,
) -> Result<(), ModelFolderError> {
    let [config, tensors] = FILES.map(|name| folder.join(name));
    let unwritable = |path: &Path, reason: String| ModelFolderError::Unwritable { path: path.to_owned(), reason };
    let spec = AdapterSpec::new(lora).map_err(|problem| unwritable(&config, problem))?;
    let quantization = match (lora.quantization, lora.double_quant) {
        (BaseQuantization::None, _) => "none",
        (BaseQuantization::Nf4, false) => "nf4",
        (BaseQuantization::Nf4, true) => "nf4_double_quant",
    };
    save_tensors(&tensors, Kind::Float, adapters, &[(QUANTIZATION, quantization)])?;
    let text = format!("{:#}\n", adapter_config(base_model, lora, &spec));
    std::fs::write(&config, text).map_err(|error| unwritable(&config, error.to_string()))
}

/// Reads what a folder says of its adapters, and checks that `config` is a model that they fit.
///
/// # Errors
/// Names the file and the field or tensor that is missing, does not fit, or asks for what is not supported.
pub fn open(folder: &Path, config: &ModelConfig) -> Result<AdapterFolder, ModelFolderError> {
    let [config_path, tensors_path] = FILES.map(|name| folder.join(name));
    let raw = read_config(&config_path)?;
    if let Some((field, value)) =
        UNSUPPORTED.iter().filter_map(|&field| raw.get_key_value(field)).find(|(_, v)| asks(v))
    {
        return Err(unreadable(&config_path, format!("{field} is {value}, which is not supported")));
    }
    let fields: Fields = serde_json::from_value(Value::Object(raw)).map_err(|error| unreadable(&config_path, error))?;
    if fields.peft_type != "LORA" || fields.r == 0 {
        let problem = format!("peft_type {:?} with r {} is no LoRA", fields.peft_type, fields.r);
        return Err(unreadable(&config_path, problem));
    }

    let file = map(&tensors_path)?;
    let (_, metadata) = SafeTensors::read_metadata(&file).map_err(|error| unreadable(&tensors_path, error))?;
    let names: Vec<String> = metadata.tensors().into_keys().collect();
    let has = |target: &TargetModule| names.iter().any(|name| name.contains(&format!(".{}.lora_", target.path())));
    let targets = TargetModule::ALL.into_iter().filter(has).collect();
    let spec = AdapterSpec { r: fields.r, alpha: fields.lora_alpha, use_rslora: fields.use_rslora, targets };
    let manifest = spec.manifest(config);
    if let Some(stray) = names.iter().find(|name| manifest.params().all(|param| param.name != **name)) {
        return Err(bad_tensor(&tensors_path, stray, "belongs to no projection of the model's layers".to_owned()));
    }
    let quantization = metadata.metadata().as_ref().and_then(|metadata| metadata.get(QUANTIZATION));
    let quantization = quantization.and_then(|text| match text.as_str() {
        "nf4" => Some(Nf4Options { double_quant: false }),
        "nf4_double_quant" => Some(Nf4Options { double_quant: true }),
        _ => None,
    });
    Ok(AdapterFolder { path: folder.to_owned(), spec, quantization })
}

/// The folder of the base model that a folder of adapters names.
///
/// # Errors
/// If it names none.
pub fn base_model(folder: &Path) -> Result<PathBuf, ModelFolderError> {
    let path = folder.join(FILES[0]);
    let raw = read_config(&path)?;
    let name = raw.get("base_model_name_or_path").and_then(Value::as_str);
    name.map(PathBuf::from).ok_or_else(|| unreadable(&path, "base_model_name_or_path is missing"))
}

fn read_config(path: &Path) -> Result<Map<String, Value>, ModelFolderError> {
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, error))?;
    serde_json::from_str(&text).map_err(|error| unreadable(path, error))
}

impl AdapterFolder {
    /// The adapters in fp32, padded for `world_size` ranks.
    ///
    /// # Errors
    /// Names the tensor that is missing or of another shape or type.
    pub fn load(
        &self,
        config: &ModelConfig,
        (world_size, device): (usize, Device),
    ) -> Result<Weights, ModelFolderError> {
        let path = self.path.join(FILES[1]);
        let file = map(&path)?;
        let tensors = SafeTensors::deserialize(&file).map_err(|error| unreadable(&path, error))?;
        let manifest = self.spec.manifest(config);
        // Memory is taken for what is there, not for the rank that the configuration claims.
        let mut stored = Vec::new();
        for spec in manifest.params() {
            let view = tensors.tensor(&spec.name).map_err(|error| bad_tensor(&path, &spec.name, error.to_string()))?;
            stored.push(StoredTensor::new(&path, spec, view)?);
        }
        let mut stored = stored.into_iter();
        let adapters = Weights::zeros(manifest.clone(), world_size, Kind::Float, device);
        for unit_idx in 0..adapters.num_units() {
            for (mut target, stored) in adapters.views(unit_idx).into_iter().zip(&mut stored) {
                let source = stored.to_tensor()?;
                tch::no_grad(|| target.copy_(&source));
            }
        }
        Ok(adapters)
    }
}

impl AdapterSpec {
    /// What of a folder's adapters differs from `self`, in words; `None` if nothing does.
    #[must_use]
    pub fn difference(&self, found: &Self) -> Option<String> {
        let names = |spec: &Self| spec.targets.iter().map(|target| target.name()).collect::<Vec<_>>().join(", ");
        let pairs = [
            ("lora.r", self.r.to_string(), found.r.to_string()),
            ("lora.lora_alpha", self.alpha.to_string(), found.alpha.to_string()),
            ("lora.use_rslora", self.use_rslora.to_string(), found.use_rslora.to_string()),
            ("lora.target_modules", format!("[{}]", names(self)), format!("[{}]", names(found))),
        ];
        let differing = pairs.into_iter().filter(|(_, ours, theirs)| ours != theirs);
        let texts: Vec<_> =
            differing.map(|(key, ours, theirs)| format!("{key} is {ours}, and there {theirs}")).collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }
}

/// Whether the value of a field asks for anything.
fn asks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::String(text) => text != "none",
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Number(_) => true,
    }
}

fn adapter_config(base_model: &Path, lora: &Lora, spec: &AdapterSpec) -> Value {
    let alpha = if spec.alpha.fract() == 0.0 { json!(spec.alpha as i64) } else { json!(spec.alpha) };
    let init = match lora.init_lora_weights {
        InitLoraWeights::Kaiming => json!(true),
        InitLoraWeights::Gaussian => json!("gaussian"),
    };
    let targets: Vec<_> = spec.targets.iter().map(|target| target.name()).collect();
    let mut config = json!({
        "alpha_pattern": {},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "ensure_weight_tying": false,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": init,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": false,
        "lora_dropout": lora.lora_dropout,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": spec.r,
        "rank_pattern": {},
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": spec.use_rslora,
    });
    for absent in [
        "alora_invocation_tokens",
        "arrow_config",
        "auto_mapping",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "lora_ga_config",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "revision",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "velora_config",
    ] {
        config[absent] = Value::Null;
    }
    config.sort_all_objects();
    config
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;
    use crate::lora::adapter::fresh_adapters;

    fn config() -> ModelConfig {
        let raw = json!({"model_type": "qwen2", "vocab_size": 33, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2});
        ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
    }

    fn lora() -> Lora {
        let target_modules = ["v_proj", "gate_proj"].map(str::to_owned).to_vec();
        Lora { r: 3, lora_alpha: 6.5, use_rslora: true, target_modules, ..Lora::default() }
    }

    fn adapters(lora: &Lora) -> Weights {
        let spec = AdapterSpec::new(lora).unwrap();
        fresh_adapters(&config(), &spec, (InitLoraWeights::Gaussian, 4), (2, Device::Cpu))
    }

    fn saved() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let lora = Lora { quantization: BaseQuantization::Nf4, ..lora() };
        save(folder.path(), Path::new("/models/base"), &lora, &adapters(&lora)).unwrap();
        folder
    }

    #[test]
    fn what_is_written_reads_back_equal() {
        let folder = saved();
        let read = open(folder.path(), &config()).unwrap();
        assert_eq!(read.spec, AdapterSpec::new(&lora()).unwrap());
        assert_eq!(base_model(folder.path()).unwrap(), Path::new("/models/base"));
        assert_eq!(read.quantization, Some(Nf4Options { double_quant: true }));
        let (read, written) = (read.load(&config(), (1, Device::Cpu)).unwrap(), adapters(&lora()));
        for unit_idx in 0..written.num_units() {
            let pairs = read.views(unit_idx).into_iter().zip(written.views(unit_idx));
            assert!(pairs.into_iter().all(|(read, written)| read.equal(&written)));
        }
    }

    /// The folder's `adapter_config.json` with other values.
    #[track_caller]
    fn check_refused(changes: Value, expect: &[&str]) {
        let folder = saved();
        let path = folder.path().join(FILES[0]);
        let mut raw: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            raw[key] = value.clone();
        }
        std::fs::write(&path, raw.to_string()).unwrap();
        let opened = open(folder.path(), &config());
        let error = opened.and_then(|folder| folder.load(&config(), (1, Device::Cpu))).unwrap_err().to_string();
        for expect in expect {
            assert!(error.contains(expect), "no {expect:?} in: {error}");
        }
    }

    #[test]
    fn what_is_not_supported_or_does_not_fit_is_named() {
        check_refused(json!({"use_dora": true}), &["adapter_config.json", "use_dora is true"]);
        check_refused(json!({"bias": "all"}), &["bias is \"all\""]);
        check_refused(json!({"modules_to_save": ["lm_head"]}), &["modules_to_save"]);
        check_refused(json!({"rank_pattern": {"q_proj": 2}}), &["rank_pattern"]);
        check_refused(json!({"peft_type": "IA3"}), &["IA3"]);
        check_refused(json!({"r": "many"}), &["adapter_config.json", "many"]);
        check_refused(json!({"r": u64::MAX}), &["v_proj.lora_A.weight", "[3, 16]", "[18446744073709551615, 16]"]);
        check_refused(json!({"r": 4}), &["adapter_model.safetensors", "v_proj.lora_A.weight", "[3, 16]", "[4, 16]"]);
    }

    #[test]
    fn adapters_of_another_model_are_named() {
        let folder = saved();
        let mut shallow = config();
        shallow.num_layers = 1;
        let error = open(folder.path(), &shallow).unwrap_err().to_string();
        assert!(error.contains("layers.1.") && error.contains("belongs to no projection"), "{error}");
        let tensors: Vec<(String, Tensor)> = Vec::new();
        Tensor::write_safetensors(&tensors, folder.path().join(FILES[1])).unwrap();
        let spec = open(folder.path(), &config()).unwrap().spec;
        let difference = AdapterSpec::new(&lora()).unwrap().difference(&spec).unwrap();
        assert_eq!(difference, "lora.target_modules is [v_proj, gate_proj], and there []");
    }
}
