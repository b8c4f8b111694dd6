//! Golden records that transformers made.

use std::path::{Path, PathBuf};

use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::save_weights;
use serde_json::{Map, Value};

use crate::formula;

/// What transformers computes for one tiny model.
#[derive(Debug)]
pub struct GoldenModel {
    pub name: &'static str,
    pub config: ModelConfig,
    pub tokens: Vec<u32>,
    /// Of `tokens[1..]`.
    pub logprobs: Vec<f32>,
    pub num_prompt_tokens: usize,
    /// Continuation of the first `num_prompt_tokens` tokens.
    pub greedy: Vec<u32>,
}

/// Folder of the golden files.
#[must_use]
pub fn folder() -> PathBuf {
    workspace().join("tests/golden")
}

/// Root of the workspace, or the copy of it that `AHA_WORKSPACE` names: tests may run where they were not built.
///
/// # Panics
/// Never: this crate lies in the workspace.
#[must_use]
pub fn workspace() -> PathBuf {
    let built_in =
        || Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned();
    std::env::var_os("AHA_WORKSPACE").map_or_else(built_in, PathBuf::from)
}

impl GoldenModel {
    /// # Panics
    /// If the record cannot be read.
    #[must_use]
    pub fn load(name: &'static str) -> Self {
        let path = folder().join("models").join(format!("{name}.json"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let record: Map<String, Value> = serde_json::from_str(&text).expect("a golden record is JSON");
        let tokens = |key: &str| {
            let values = record[key].as_array().expect("a list");
            values.iter().map(|value| value.as_u64().expect("a token") as u32).collect()
        };
        let logprobs = record["logprobs"].as_array().expect("a list");
        Self {
            name,
            config: ModelConfig::from_json(record["config"].as_object().expect("an object").clone())
                .expect("a supported model"),
            tokens: tokens("tokens"),
            logprobs: logprobs.iter().map(|value| value.as_f64().expect("a number") as f32).collect(),
            num_prompt_tokens: record["num_prompt_tokens"].as_u64().expect("a count") as usize,
            greedy: tokens("greedy"),
        }
    }

    /// Writes the model as a Hugging Face folder, with the demo's tokenizer, whose ids it can all embed or not: only
    /// tests that start from tokens use it.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, folder: &Path) {
        save_weights(folder, &self.config, &formula::weights(&self.config, tch::Device::Cpu))
            .expect("a writable folder");
        copy_tokenizer(folder);
    }
}

/// Copies the demo's tokenizer files into a model folder.
///
/// # Panics
/// If they cannot be copied.
pub fn copy_tokenizer(folder: &Path) {
    let source = workspace().join("configs/models/countdown-tiny");
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(source.join(name), folder.join(name)).expect("a writable folder");
    }
}

/// Largest absolute difference of two lists of equal length.
///
/// # Panics
/// If their lengths differ.
#[must_use]
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
