//! A run small enough for a test: a random model of a few thousand parameters on two-number puzzles. It solves none, but
//! its completions end at different lengths, and shorter ones are better, so that every step changes it.

use std::path::Path;

use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::save_weights;
use aha_nn::weights::Weights;
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::golden::copy_tokenizer;

/// Steps of the run.
pub const MAX_STEPS: u64 = 10;

/// Writes `model/` and `run.yaml` into `folder`; the run is called `small` and lies below `runs/`.
///
/// # Panics
/// If the folder cannot be written.
pub fn write(folder: &Path) {
    let model = folder.join("model");
    std::fs::create_dir_all(&model).expect("a writable folder");
    let config = json!({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 358,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "initializer_range": 0.1, "hidden_act": "silu"});
    std::fs::write(model.join("config.json"), config.to_string()).expect("a writable folder");
    copy_tokenizer(&model);
    std::fs::write(folder.join("run.yaml"), recipe().to_string()).expect("a writable folder");
}

/// Writes random weights into `model/`, for runs with `model.random_init` off.
///
/// # Panics
/// If the folder cannot be written.
pub fn write_base(folder: &Path) {
    let model = folder.join("model");
    let config = ModelConfig::load(&model).expect("a model folder");
    let weights = Weights::random(&config, 1, 1, Kind::Float, Device::Cpu);
    save_weights(&model, &config, &weights).expect("a writable folder");
}

/// The recipe; JSON is YAML.
#[must_use]
pub fn recipe() -> Value {
    json!({
        "run": {"name": "small", "seed": 1},
        "model": {"path": "model", "random_init": true, "device": "cpu"},
        "data": {
            "countdown": {"size": 200, "numbers": 2, "max_number": 9, "max_target": 81, "operations": "+-*"},
            "held_out": 0.2,
            "max_prompt_length": 64,
            "prompt": {"chat": false, "user": "{{ nums }} {{ target }}\n", "assistant_prefill": "<think>"}
        },
        "rewards": [{"function": "format", "weight": 0.5}, {"function": "equation"}],
        "rollout": {"num_generations": 4, "generation_batch_size": 24, "max_completion_length": 24,
            "stop_token_ids": (20..40).collect::<Vec<_>>(), "deadline_seconds": 60.0},
        "train": {"max_steps": MAX_STEPS, "learning_rate": 1e-3, "beta": 0.01, "soft_punish_cache": 24, "micro_batch_tokens": 256,
            "save_steps": 2, "collective_timeout_seconds": 60.0, "push_timeout_seconds": 60.0, "threads": 1},
        "sft": {"batch_size": 8, "completion": "</think>\n<answer>{{ solution }}</answer>", "max_length": 96},
        "eval": {"num_prompts": 8},
        "generator": {"kv_cache_mib": 8, "max_num_seqs": 16, "max_num_batched_tokens": 128, "max_model_len": 128,
            "threads": 1, "connect_timeout_seconds": 60.0},
        "launch": {"trainers": 2, "generators": 1}
    })
}
