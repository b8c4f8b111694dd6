//! The shape of a model, read from a Hugging Face `config.json`.
//!
//! Both spellings are read: transformers v4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and v5 (`rope_parameters`,
//! `dtype`).

use std::path::{Path, PathBuf};

use aha_core::manifest::{Manifest, ParamSpec, UnitSpec};
use serde_json::{Map, Value};
use tch::Kind;

/// Wider or deeper is a mistake, or meant to take all memory before any weight is read. Whatever is computed from sizes
/// within these bounds fits 64 bits.
const MAX_SIZE: usize = 1 << 22;
const MAX_LAYERS: usize = 1 << 12;

/// A family of decoder models whose layers differ only in biases and norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    /// Biases on q, k and v.
    Qwen2,
    /// RMS norms on the heads of q and k.
    Qwen3,
}

/// Rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Option<Llama3Scaling>,
}

/// Llama 3's stretching of low rotary frequencies (`rope_type: llama3`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope: Rope,
    /// Longest sequence that the model was made for.
    pub max_position_embeddings: usize,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub output_bias: bool,
    /// Biases in the feed-forward part.
    pub mlp_bias: bool,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// The file as it was read, written back into checkpoints.
    raw: Map<String, Value>,
}

#[derive(Debug, thiserror::Error)]
pub enum ModelConfigError {
    #[error("cannot read {path}: {reason}", path = path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{path}: {problem}", path = path.display())]
    Unsupported { path: PathBuf, problem: String },
}

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// If there is none, it is no JSON, or it describes a model that is not supported.
    pub fn load(folder: &Path) -> Result<Self, ModelConfigError> {
        let path = folder.join("config.json");
        let unreadable = |reason: String| ModelConfigError::Unreadable { path: path.clone(), reason };
        let text = std::fs::read_to_string(&path).map_err(|error| unreadable(error.to_string()))?;
        let raw: Map<String, Value> = serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        Self::from_json(raw).map_err(|problem| ModelConfigError::Unsupported { path, problem })
    }

    /// Reads the parsed `config.json`.
    ///
    /// # Errors
    /// Says which key is missing, has a wrong type, or asks for what is not supported.
    pub fn from_json(raw: Map<String, Value>) -> Result<Self, String> {
        let family = family(&raw)?;
        let fields = Fields(&raw);
        let hidden_size = fields.size("hidden_size")?;
        let num_heads = fields.size("num_attention_heads")?;
        let num_kv_heads = fields.size_or("num_key_value_heads", num_heads)?;
        let num_layers = fields.size("num_hidden_layers")?;
        if num_layers > MAX_LAYERS {
            return Err(format!("num_hidden_layers is {num_layers}, and at most {MAX_LAYERS} are supported"));
        }
        if num_heads % num_kv_heads != 0 {
            return Err(format!(
                "num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
            ));
        }
        let head_dim = fields.size_or("head_dim", hidden_size / num_heads)?;
        if head_dim == 0 {
            return Err(format!("hidden_size {hidden_size} leaves nothing for each of {num_heads} heads"));
        }
        if head_dim % 2 != 0 {
            return Err(format!("head_dim {head_dim} is odd, which rotary embeddings cannot have"));
        }
        if num_heads * head_dim > MAX_SIZE {
            return Err(format!("{num_heads} heads of {head_dim} are wider than {MAX_SIZE}, which is the limit"));
        }
        if let Some(activation) = raw.get("hidden_act").and_then(Value::as_str).filter(|&name| name != "silu") {
            return Err(format!("hidden_act {activation:?} is not supported, only \"silu\""));
        }
        if fields.flag("use_sliding_window") {
            return Err("use_sliding_window is not supported: attention is full".to_owned());
        }
        let attention_bias = fields.flag("attention_bias");
        let config = Self {
            family,
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: fields.number_or("rms_norm_eps", 1e-6)?,
            rope: rope(&raw)?,
            max_position_embeddings: fields.count_or("max_position_embeddings", 2048)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings"),
            qkv_bias: family == Family::Qwen2 || attention_bias,
            output_bias: family != Family::Qwen2 && attention_bias,
            mlp_bias: family == Family::Llama && fields.flag("mlp_bias"),
            initializer_range: fields.number_or("initializer_range", 0.02)?,
            raw: Map::new(),
        };
        Ok(Self { raw, ..config })
    }

    /// The `config.json` to write beside these weights.
    #[must_use]
    pub fn to_json(&self, dtype: &str) -> Value {
        let mut raw = self.raw.clone();
        let key = if raw.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        raw.insert(key.to_owned(), dtype.into());
        raw.insert("use_cache".to_owned(), true.into());
        Value::Object(raw)
    }

    /// Type of the weights that the file lies beside, as far as it says: bf16, or else fp32, which holds fp16 too.
    #[must_use]
    pub fn stored_kind(&self) -> Kind {
        let dtype = self.raw.get("torch_dtype").or_else(|| self.raw.get("dtype")).and_then(Value::as_str);
        if dtype == Some("bfloat16") { Kind::BFloat16 } else { Kind::Float }
    }

    /// Query heads that share a key-value head.
    #[must_use]
    pub fn group_size(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// The parameters under their Hugging Face names, unit by unit.
    #[must_use]
    pub fn manifest(&self) -> Manifest {
        let embedding = UnitSpec {
            name: "embedding".to_owned(),
            params: vec![ParamSpec::new("model.embed_tokens.weight", &[self.vocab_size, self.hidden_size])],
        };
        let mut head = vec![ParamSpec::new("model.norm.weight", &[self.hidden_size])];
        if !self.tie_word_embeddings {
            head.push(ParamSpec::new("lm_head.weight", &[self.vocab_size, self.hidden_size]));
        }
        let mut units = vec![embedding];
        units.extend((0..self.num_layers).map(|layer| self.layer_spec(layer)));
        units.push(UnitSpec { name: "head".to_owned(), params: head });
        Manifest { units }
    }

    /// The order that `transformer::Layer::new` takes its parameters in. Projections of the same input lie one after the
    /// other, so that they are one matrix where they are, and so do the biases of q, k and v.
    fn layer_spec(&self, layer: usize) -> UnitSpec {
        let (c, f, d) = (self.hidden_size, self.intermediate_size, self.head_dim);
        let (query, kv) = (self.num_heads * d, self.num_kv_heads * d);
        let mut params = Vec::new();
        let mut add = |name: &str, shape: &[usize]| {
            params.push(ParamSpec::new(format!("model.layers.{layer}.{name}"), shape));
        };
        add("input_layernorm.weight", &[c]);
        let qkv = [("q", query), ("k", kv), ("v", kv)];
        for (name, rows) in qkv {
            add(&format!("self_attn.{name}_proj.weight"), &[rows, c]);
        }
        for (name, rows) in qkv.into_iter().filter(|_| self.qkv_bias) {
            add(&format!("self_attn.{name}_proj.bias"), &[rows]);
        }
        add("self_attn.o_proj.weight", &[c, query]);
        if self.output_bias {
            add("self_attn.o_proj.bias", &[c]);
        }
        if self.family == Family::Qwen3 {
            add("self_attn.q_norm.weight", &[d]);
            add("self_attn.k_norm.weight", &[d]);
        }
        add("post_attention_layernorm.weight", &[c]);
        for (name, rows, columns) in [("gate", f, c), ("up", f, c), ("down", c, f)] {
            add(&format!("mlp.{name}_proj.weight"), &[rows, columns]);
            if self.mlp_bias {
                add(&format!("mlp.{name}_proj.bias"), &[rows]);
            }
        }
        UnitSpec { name: format!("layers.{layer}"), params }
    }
}

impl Rope {
    /// Angle per position of each pair of a head's dimensions, `[D / 2]`.
    ///
    /// Llama 3's scaling as in its reference implementation: long wavelengths are stretched by `factor`, short ones
    /// kept, those between interpolated.
    #[must_use]
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let plain = (0..head_dim / 2).map(|pair| self.theta.powf(-2.0 * pair as f64 / head_dim as f64));
        let Some(scaling) = self.scaling else { return plain.collect() };
        let Llama3Scaling { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } = scaling;
        plain
            .map(|frequency| {
                let turns = original_max_position_embeddings * frequency / std::f64::consts::TAU;
                let smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                frequency * (smooth + (1.0 - smooth) / factor)
            })
            .collect()
    }
}

fn family(raw: &Map<String, Value>) -> Result<Family, String> {
    let name = raw.get("model_type").and_then(Value::as_str).unwrap_or("missing");
    match name {
        "llama" => Ok(Family::Llama),
        "qwen2" => Ok(Family::Qwen2),
        "qwen3" => Ok(Family::Qwen3),
        _ => Err(format!("model_type is {name:?}; supported are \"llama\", \"qwen2\" and \"qwen3\"")),
    }
}

fn rope(raw: &Map<String, Value>) -> Result<Rope, String> {
    let empty = Map::new();
    let section = |key: &str| raw.get(key).and_then(Value::as_object);
    let section = section("rope_parameters").or_else(|| section("rope_scaling")).unwrap_or(&empty);
    let fields = Fields(section);
    let theta = match section.get("rope_theta") {
        Some(_) => fields.number("rope_theta")?,
        None => Fields(raw).number_or("rope_theta", 10_000.0)?,
    };
    let kind = section.get("rope_type").or_else(|| section.get("type")).and_then(Value::as_str).unwrap_or("default");
    let scaling = match kind {
        "default" => None,
        "llama3" => Some(Llama3Scaling {
            factor: fields.number("factor")?,
            low_freq_factor: fields.number("low_freq_factor")?,
            high_freq_factor: fields.number("high_freq_factor")?,
            original_max_position_embeddings: fields.number("original_max_position_embeddings")?,
        }),
        other => return Err(format!("rope_type {other:?} is not supported, only \"default\" and \"llama3\"")),
    };
    Ok(Rope { theta, scaling })
}

struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    /// Of a tensor.
    fn size(&self, key: &str) -> Result<usize, String> {
        let size = self.count(key)?;
        if size > MAX_SIZE {
            return Err(format!("{key} is {size}, and at most {MAX_SIZE} is supported"));
        }
        Ok(size)
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize, String> {
        if self.0.get(key).is_none_or(Value::is_null) { Ok(default) } else { self.size(key) }
    }

    fn count(&self, key: &str) -> Result<usize, String> {
        let value = self.0.get(key).ok_or_else(|| format!("{key} is missing"))?;
        let count = value.as_u64().filter(|&count| count > 0 && count < 1 << 32);
        count.map(|count| count as usize).ok_or_else(|| format!("{key} must be a positive integer, got {value}"))
    }

    fn count_or(&self, key: &str, default: usize) -> Result<usize, String> {
        if self.0.get(key).is_none_or(Value::is_null) { Ok(default) } else { self.count(key) }
    }

    fn number(&self, key: &str) -> Result<f64, String> {
        let value = self.0.get(key).ok_or_else(|| format!("{key} is missing"))?;
        value.as_f64().ok_or_else(|| format!("{key} must be a number, got {value}"))
    }

    fn number_or(&self, key: &str, default: f64) -> Result<f64, String> {
        if self.0.get(key).is_none_or(Value::is_null) { Ok(default) } else { self.number(key) }
    }

    fn flag(&self, key: &str) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(extra: Value) -> Result<ModelConfig, String> {
        let mut raw = json!({"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2});
        for (key, value) in extra.as_object().unwrap() {
            raw[key] = value.clone();
        }
        ModelConfig::from_json(raw.as_object().unwrap().clone())
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64});
        let v4 = parse(json!({"rope_theta": 5e5, "rope_scaling": scaling})).unwrap();
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(5e5);
        let v5 = parse(json!({"rope_parameters": parameters})).unwrap();
        assert_eq!(v4.rope, v5.rope);
        assert_eq!(v4.rope.theta, 5e5);
        assert_eq!(parse(json!({})).unwrap().rope, Rope { theta: 10_000.0, scaling: None });
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (extra, expect) in [
            (json!({"model_type": "gpt2"}), "gpt2"),
            (json!({"hidden_act": "gelu"}), "hidden_act"),
            (json!({"rope_scaling": {"rope_type": "yarn"}}), "yarn"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"vocab_size": -1}), "vocab_size"),
            (json!({"vocab_size": 4_194_305}), "vocab_size is 4194305"),
            (json!({"num_hidden_layers": 4_294_967_295_u64}), "num_hidden_layers is 4294967295"),
            (json!({"num_attention_heads": 32, "num_key_value_heads": 32}), "nothing for each of 32 heads"),
            (json!({"head_dim": 2_097_152}), "4 heads of 2097152"),
        ] {
            let problem = parse(extra).unwrap_err();
            assert!(problem.contains(expect), "{problem}");
        }
    }

    #[test]
    fn families_differ_in_biases_norms_and_head() {
        let names =
            |extra| parse(extra).unwrap().manifest().params().map(|param| param.name.clone()).collect::<Vec<_>>();
        let llama = names(json!({}));
        assert!(llama.contains(&"lm_head.weight".to_owned()) && !llama.iter().any(|name| name.ends_with("bias")));
        let qwen2 = names(json!({"model_type": "qwen2", "tie_word_embeddings": true}));
        assert_eq!(qwen2.iter().filter(|name| name.ends_with("bias")).count(), 6);
        let first = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias"];
        assert_eq!(qwen2[2..8], first.map(|name| format!("model.layers.0.self_attn.{name}")));
        assert!(!qwen2.contains(&"lm_head.weight".to_owned()));
        let qwen3 = names(json!({"model_type": "qwen3"}));
        assert!(qwen3.contains(&"model.layers.1.self_attn.q_norm.weight".to_owned()));
    }
}
