//! Shapes of well-known models, for measuring without their weights.

use std::path::Path;

use aha_nn::model_config::ModelConfig;
use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::json;

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum ModelShape {
    #[value(name = "smollm2-135m")]
    SmolLm2_135m,
    #[value(name = "qwen2.5-0.5b")]
    Qwen25_0_5b,
    #[value(name = "qwen2.5-1.5b")]
    Qwen25_1_5b,
    #[value(name = "qwen2.5-3b")]
    Qwen25_3b,
    #[value(name = "qwen2.5-7b")]
    Qwen25_7b,
}

/// The numbers that differ between the shapes.
struct Sizes {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    vocab_size: usize,
    tie_word_embeddings: bool,
}

impl ModelShape {
    /// That of a well-known model by the name of its folder or repository: `Qwen2.5-3B-Instruct`, `Qwen2.5-Math-1.5B`.
    pub(crate) fn of_name(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_lowercase().replace("-math", "").replace("-coder", "");
        let is_named = |shape: &&Self| {
            let known = shape.to_possible_value();
            let rest = known.as_ref().and_then(|known| name.strip_prefix(known.get_name()));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        Self::value_variants().iter().find(is_named).copied()
    }

    /// Makes a model folder without weights, with a tokenizer that knows a single token: nothing here reads text.
    pub(crate) fn write(self, folder: &Path) -> Result<()> {
        let vocab = json!({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []});
        for (name, content) in [("config.json", self.config()), ("tokenizer.json", vocab)] {
            let path = folder.join(name);
            std::fs::write(&path, content.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    pub(crate) fn model_config(self) -> Result<ModelConfig> {
        let raw = self.config().as_object().cloned().unwrap_or_default();
        ModelConfig::from_json(raw).map_err(anyhow::Error::msg)
    }

    fn config(self) -> serde_json::Value {
        let Sizes { hidden_size, intermediate_size, num_hidden_layers, .. } = self.sizes();
        let Sizes { num_attention_heads, num_key_value_heads, vocab_size, tie_word_embeddings, .. } = self.sizes();
        let (family, architecture) = match self {
            Self::SmolLm2_135m => ("llama", "LlamaForCausalLM"),
            _ => ("qwen2", "Qwen2ForCausalLM"),
        };
        json!({
            "architectures": [architecture],
            "model_type": family,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "vocab_size": vocab_size,
            "tie_word_embeddings": tie_word_embeddings,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
        })
    }

    /// As in the config.json of each model on the Hugging Face hub.
    fn sizes(self) -> Sizes {
        let (hidden_size, intermediate_size, num_hidden_layers, heads, vocab_size, tie_word_embeddings) = match self {
            Self::SmolLm2_135m => (576, 1536, 30, [9, 3], 49_152, true),
            Self::Qwen25_0_5b => (896, 4864, 24, [14, 2], 151_936, true),
            Self::Qwen25_1_5b => (1536, 8960, 28, [12, 2], 151_936, true),
            Self::Qwen25_3b => (2048, 11_008, 36, [16, 2], 151_936, true),
            Self::Qwen25_7b => (3584, 18_944, 28, [28, 4], 152_064, false),
        };
        let [num_attention_heads, num_key_value_heads] = heads;
        Sizes {
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            vocab_size,
            tie_word_embeddings,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_known_by_its_name() {
        let of = |name: &str| ModelShape::of_name(Path::new(name));
        assert!(matches!(of("models/Qwen2.5-3B-Instruct"), Some(ModelShape::Qwen25_3b)));
        assert!(matches!(of("Qwen/Qwen2.5-Math-1.5B"), Some(ModelShape::Qwen25_1_5b)));
        assert!(matches!(of("smollm2-135m"), Some(ModelShape::SmolLm2_135m)));
        assert!(of("Qwen2.5-32B").is_none() && of("Qwen2.5-3Bx").is_none() && of("mine").is_none());
    }

    /// What cuBLASLt asks for before it uses its fastest kernels; in bf16, from the start of a unit's tensor.
    #[test]
    fn every_parameter_of_every_shape_begins_at_a_multiple_of_16_bytes() {
        for shape in ModelShape::value_variants() {
            for unit in shape.model_config().unwrap().manifest().units {
                let mut offset = 0;
                for param in &unit.params {
                    assert_eq!(offset % 16, 0, "{shape:?}: {}", param.name);
                    offset += 2 * param.numel();
                }
            }
        }
    }

    #[test]
    fn every_shape_is_a_model_of_the_size_in_its_name() {
        let billions = [0.1345, 0.494, 1.544, 3.086, 7.616];
        for (shape, expect) in ModelShape::value_variants().iter().zip(billions) {
            let folder = tempfile::tempdir().unwrap();
            shape.write(folder.path()).unwrap();
            let numel = ModelConfig::load(folder.path()).unwrap().manifest().numel() as f64 / 1e9;
            assert!((numel / expect - 1.0).abs() < 0.005, "{shape:?} has {numel} billion parameters");
            aha_core::tokenizer::Tokenizer::load(folder.path()).unwrap();
        }
    }
}
