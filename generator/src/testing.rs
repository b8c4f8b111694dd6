//! Tiny random models for the tests of this crate.

use std::path::Path;

use aha_core::config;
use aha_core::ids::TokenId;
use aha_core::tokenizer::Tokenizer;
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::save_weights;
use aha_nn::weights::Weights;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::instance::GeneratorOptions;

/// Ends a completion; those below are the bytes of the text.
pub(crate) const END: TokenId = 256;

/// A kind of model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tiny {
    /// Biases on q, k and v, tied head.
    Qwen2,
    /// Norms on the heads of q and k, tied head.
    Qwen3,
    /// Stretched rotary frequencies, a head of its own, a bias on the attention's output.
    Llama,
}

pub(crate) fn tiny_config(tiny: Tiny) -> ModelConfig {
    tiny_config_with(tiny, &json!({}))
}

/// With other values for some keys of `config.json`.
pub(crate) fn tiny_config_with(tiny: Tiny, changes: &Value) -> ModelConfig {
    let mut raw = json!({"vocab_size": 260, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": true, "initializer_range": 0.3});
    let family = match tiny {
        Tiny::Qwen2 => json!({"model_type": "qwen2"}),
        Tiny::Qwen3 => json!({"model_type": "qwen3", "head_dim": 24}),
        Tiny::Llama => json!({"model_type": "llama", "attention_bias": true, "tie_word_embeddings": false,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32}}),
    };
    for (key, value) in family.as_object().unwrap().iter().chain(changes.as_object().unwrap()) {
        raw[key] = value.clone();
    }
    ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
}

/// Random everywhere, biases and norms too: zeros and ones would hide a mistake.
pub(crate) fn tiny_weights(config: &ModelConfig, seed: u64) -> Weights {
    let weights = Weights::random(config, seed, 1, Kind::Float, Device::Cpu);
    for unit_idx in 0..weights.num_units() {
        for (index, mut view) in weights.views(unit_idx).into_iter().enumerate().filter(|(_, view)| view.dim() == 1) {
            let ramp = Tensor::arange(view.size()[0], (Kind::Float, Device::Cpu));
            let shift = (ramp * (0.7 + index as f64) + seed as f64).sin() * 0.2;
            tch::no_grad(|| view.copy_(&(&view + shift)));
        }
    }
    weights
}

/// A model folder with the byte tokenizer.
pub(crate) fn tiny_folder(tiny: Tiny, seed: u64) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = tiny_config(tiny);
    save_weights(folder.path(), &config, &tiny_weights(&config, seed)).unwrap();
    write_tokenizer(folder.path());
    folder
}

pub(crate) fn tiny_options(folder: &Path) -> GeneratorOptions {
    GeneratorOptions {
        model: config::Model { path: folder.to_owned(), ..Default::default() },
        seed: 0,
        generator: config::Generator { kv_cache_mib: 8, max_num_seqs: 16, threads: 1, ..Default::default() },
        gpu: 0,
        awaits_weights: false,
    }
}

pub(crate) fn byte_tokenizer() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    write_tokenizer(folder.path());
    Tokenizer::load(folder.path()).unwrap()
}

/// Token i is the byte i for i below 256, and [`END`] is `<|end|>`.
pub(crate) fn write_tokenizer(folder: &Path) {
    let vocab: Map<String, Value> =
        byte_characters().into_iter().enumerate().map(|(id, character)| (character.to_string(), json!(id))).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": END, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), json!({"eos_token": "<|end|>"}).to_string()).unwrap();
}

/// GPT-2's printable character for each byte, which byte-level vocabularies are written in.
fn byte_characters() -> Vec<char> {
    let mut next = 256;
    let mut character = |byte: u32| {
        if matches!(byte, 33..=126 | 161..=172 | 174..=255) {
            return char::from_u32(byte).unwrap();
        }
        next += 1;
        char::from_u32(next - 1).unwrap()
    };
    (0..256).map(&mut character).collect()
}
