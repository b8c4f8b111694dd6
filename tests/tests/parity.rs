//! Both sides' log-probs and greedy continuations against transformers, and against each other on the device that
//! `AHA_TEST_DEVICE` names (the CPU unless it says `cuda`).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use aha_core::config::{DeviceKind, Generator, Model};
use aha_core::rollout::Sampling;
use aha_generator::{GeneratorOptions, LocalGenerator};
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::save_weights;
use aha_nn::weights::Weights;
use aha_nn::{forward, runtime};
use aha_tests::binary::check_runs;
use aha_tests::formula;
use aha_tests::golden::{GoldenModel, copy_tokenizer, largest_difference};
use serde_json::{Value, json};
use tch::{Device, Kind};

const NAMES: [&str; 3] = ["qwen2", "qwen3", "llama"];
/// Of log-probs in fp32 over 512 tokens.
const TOLERANCE: f32 = 1e-3;

fn device() -> Device {
    let name = std::env::var("AHA_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    runtime::device(&name, 0).unwrap()
}

fn generator(folder: &std::path::Path, device: Device) -> LocalGenerator {
    let generator = Generator {
        kv_cache_mib: 16,
        max_num_batched_tokens: 100,
        max_num_seqs: 8,
        threads: 1,
        ..Generator::default()
    };
    let device = if device == Device::Cpu { DeviceKind::Cpu } else { DeviceKind::Cuda };
    let model = Model { path: folder.to_owned(), device, ..Model::default() };
    LocalGenerator::load(&GeneratorOptions { model, seed: 0, generator, gpu: 0, awaits_weights: false }).unwrap()
}

#[test]
fn the_trainers_logprobs_equal_transformers() {
    for name in NAMES {
        let golden = GoldenModel::load(name);
        let weights = formula::weights(&golden.config, device());
        let logprobs = forward::score(&golden.config, &weights, &golden.tokens);
        let difference = largest_difference(&logprobs, &golden.logprobs);
        println!("{name}: trainer against transformers {difference:e}");
        assert!(difference < TOLERANCE);
    }
}

#[tokio::test]
async fn the_generators_logprobs_and_greedy_tokens_equal_transformers() {
    for name in NAMES {
        let golden = GoldenModel::load(name);
        let folder = tempfile::tempdir().unwrap();
        golden.write(folder.path());
        let generator = generator(folder.path(), Device::Cpu);
        let difference = largest_difference(&generator.score(&golden.tokens).await.unwrap(), &golden.logprobs);
        println!("{name}: generator against transformers {difference:e}");
        assert!(difference < TOLERANCE);

        let sampling = Sampling {
            temperature: 0.0,
            max_tokens: golden.greedy.len() as u32,
            ignore_eos: true,
            ..Sampling::default()
        };
        let prompt = &golden.tokens[..golden.num_prompt_tokens];
        let completions = generator.generate(prompt, &sampling, 0, 1).await.unwrap();
        assert_eq!(completions[0].token_ids, golden.greedy, "{name}");
    }
}

#[test]
fn the_command_line_scores_through_both_engines() {
    let golden = GoldenModel::load("qwen3");
    let folder = tempfile::tempdir().unwrap();
    golden.write(folder.path());
    let tokens: Vec<String> = golden.tokens.iter().map(ToString::to_string).collect();
    for engine in ["trainer", "generator"] {
        let arguments =
            ["score", "--model", ".", "--tokens", &tokens.join(","), "--engine", engine, "--device", "cpu", "--json"];
        let answer: Value = serde_json::from_str(&check_runs(folder.path(), &arguments)).unwrap();
        assert_eq!(answer["tokens"].as_array().unwrap().len(), golden.tokens.len());
        let logprobs = answer["logprobs"].as_array().unwrap();
        assert_eq!(logprobs[0], Value::Null);
        let logprobs: Vec<f32> = logprobs[1..].iter().map(|value| value.as_f64().unwrap() as f32).collect();
        assert!(largest_difference(&logprobs, &golden.logprobs) < TOLERANCE, "{engine}");
    }
}

/// Models of a kind each that the GPU kernels serve, with heads of 64, 128 and 32.
fn served_models() -> [(&'static str, ModelConfig); 3] {
    let config = |family: Value| {
        let mut raw = json!({"vocab_size": 353, "intermediate_size": 320, "num_hidden_layers": 3, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 1024, "rope_theta": 10_000.0, "hidden_act": "silu"});
        raw.as_object_mut().unwrap().extend(family.as_object().unwrap().clone());
        ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
    };
    let heads = |query: u64, key: u64, width: u64| json!({"num_attention_heads": query, "num_key_value_heads": key, "head_dim": width});
    let with = |heads: Value, rest: Value| {
        let mut all = heads;
        all.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        config(all)
    };
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    [
        (
            "qwen2",
            with(heads(7, 1, 64), json!({"model_type": "qwen2", "hidden_size": 128, "tie_word_embeddings": true})),
        ),
        (
            "qwen3",
            with(heads(4, 2, 128), json!({"model_type": "qwen3", "hidden_size": 128, "tie_word_embeddings": false})),
        ),
        (
            "llama",
            with(
                heads(6, 3, 32),
                json!({"model_type": "llama", "hidden_size": 128, "tie_word_embeddings": false, "rope_scaling": scaling}),
            ),
        ),
    ]
}

fn mean_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>() / a.len() as f32
}

/// The same weights in bf16.
fn halves(weights: &Weights) -> Weights {
    let halves = Weights::zeros(weights.manifest.clone(), 1, Kind::BFloat16, Device::Cpu);
    for unit_idx in 0..weights.num_units() {
        tch::no_grad(|| halves.flat(unit_idx).shallow_clone().copy_(weights.flat(unit_idx)));
    }
    halves
}

/// The trainer in fp32 must give the CPU's log-probs on any device. The generator computes in bf16 on a GPU: what it
/// scores and what it samples may be off by twice what bf16 costs the trainer's own path on the CPU.
#[tokio::test]
async fn generator_and_trainer_agree_on_the_device() {
    for (name, config) in served_models() {
        let exact = formula::weights(&config, Device::Cpu);
        let folder = tempfile::tempdir().unwrap();
        save_weights(folder.path(), &config, &exact).unwrap();
        copy_tokenizer(folder.path());
        let tokens: Vec<u32> = (0..400_u32).map(|i| i.wrapping_mul(2_654_435_761) >> 8).map(|t| t % 353).collect();
        let expect = forward::score(&config, &exact, &tokens);
        let trainer = forward::score(&config, &formula::weights(&config, device()), &tokens);
        assert!(largest_difference(&trainer, &expect) < TOLERANCE, "{name}: the trainer differs from the CPU's");

        let cost = mean_difference(&forward::score(&config, &halves(&exact), &tokens), &expect);
        let allowed = if device() == Device::Cpu { TOLERANCE } else { 2.0 * cost };
        let generator = generator(folder.path(), device());
        let scored = mean_difference(&generator.score(&tokens).await.unwrap(), &expect);
        let sampling = Sampling { max_tokens: 300, ignore_eos: true, ..Sampling::default() };
        let prompt = &tokens[..100];
        let completion = generator.generate(prompt, &sampling, 1, 1).await.unwrap().remove(0);
        let whole = [prompt, &completion.token_ids].concat();
        let sampled =
            mean_difference(&completion.logprobs, &forward::score(&config, &exact, &whole)[prompt.len() - 1..]);
        println!("{name}: generator against trainer {scored:e} scored, {sampled:e} sampled; bf16 costs {cost:e}");
        assert!(scored <= allowed && sampled <= allowed, "{name}: more than {allowed:e}");
    }
}
