//! A model that knows one thing: which token follows which, with what probability. So what it samples can be told beforehand.

use std::path::Path;

use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::save_weights;
use aha_nn::weights::Weights;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::golden::copy_tokenizer;

const VOCAB_SIZE: i64 = 358;
/// One dimension a token, and some to spare.
const HIDDEN_SIZE: i64 = 384;
/// A logit that nobody samples.
const NEVER: f64 = -60.0;

/// Ids of the demo's tokenizer.
const THINK: i64 = 260;
const END_THINK: i64 = 261;
const NEWLINE: i64 = 198;
const ANSWER: i64 = 262;
const END_ANSWER: i64 = 263;
const THREE: i64 = 18;
const FOUR: i64 = 19;
const PLUS: i64 = 10;
const TIMES: i64 = 9;
const EXCLAMATION: i64 = 0;
const END: i64 = 256;

/// After `<think>`: `</think>\n<answer>3+4</answer>`, in 3 of 10 cases `3*4`; and in 1 of 10 cases no answer, but `!` without
/// an end.
const FOLLOWS: [(i64, i64, f64); 13] = [
    (THINK, END_THINK, 1.0),
    (END_THINK, NEWLINE, 0.9),
    (END_THINK, EXCLAMATION, 0.1),
    (EXCLAMATION, EXCLAMATION, 1.0),
    (NEWLINE, ANSWER, 1.0),
    (ANSWER, THREE, 1.0),
    (THREE, PLUS, 0.7),
    (THREE, TIMES, 0.3),
    (PLUS, FOUR, 1.0),
    (TIMES, FOUR, 1.0),
    (FOUR, END_ANSWER, 1.0),
    (END_ANSWER, END, 1.0),
    (END, END, 1.0),
];

/// Writes the model as a Hugging Face folder with the demo's tokenizer.
///
/// Embeddings are one-hot, the layer adds nothing, and the head has the logarithms of the probabilities.
///
/// # Panics
/// If the folder cannot be written.
pub fn write(folder: &Path) {
    std::fs::create_dir_all(folder).expect("a writable folder");
    let config = json!({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "hidden_act": "silu"});
    let config = ModelConfig::from_json(config.as_object().expect("an object").clone()).expect("a supported model");
    // What RMS normalisation makes of a one-hot row.
    let scale = (HIDDEN_SIZE as f64).sqrt();
    let head = Tensor::full([VOCAB_SIZE, HIDDEN_SIZE], NEVER / scale, (Kind::Float, Device::Cpu));
    for (token, next, probability) in FOLLOWS {
        drop(head.narrow(0, next, 1).narrow(1, token, 1).fill_(probability.ln() / scale));
    }
    let weights = Weights::zeros(config.manifest(), 1, Kind::Float, Device::Cpu);
    for unit_idx in 0..weights.num_units() {
        for (spec, mut view) in weights.manifest.units[unit_idx].params.iter().zip(weights.views(unit_idx)) {
            tch::no_grad(|| match spec.name.as_str() {
                "model.embed_tokens.weight" => {
                    view.copy_(&Tensor::eye_m(VOCAB_SIZE, HIDDEN_SIZE, (Kind::Float, Device::Cpu)));
                }
                "lm_head.weight" => view.copy_(&head),
                name if name.ends_with("norm.weight") => drop(view.fill_(1.0)),
                _ => {}
            });
        }
    }
    save_weights(folder, &config, &weights).expect("a writable folder");
    copy_tokenizer(folder);
}
