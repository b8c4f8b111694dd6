//! Both sides' log-probs and greedy continuations against transformers.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use aha_core::config::{Generator, Model};
use aha_core::rollout::Sampling;
use aha_generator::{GeneratorOptions, LocalGenerator};
use aha_nn::forward;
use aha_tests::binary::check_runs;
use aha_tests::formula;
use aha_tests::golden::{GoldenModel, largest_difference};
use serde_json::Value;

const NAMES: [&str; 3] = ["qwen2", "qwen3", "llama"];
/// Of log-probs in fp32 over 512 tokens.
const TOLERANCE: f32 = 1e-3;

fn generator(folder: &std::path::Path) -> LocalGenerator {
    let generator = Generator {
        kv_cache_mib: 16,
        max_num_batched_tokens: 100,
        max_num_seqs: 8,
        threads: 1,
        ..Generator::default()
    };
    let model = Model { path: folder.to_owned(), ..Model::default() };
    LocalGenerator::load(&GeneratorOptions { model, seed: 0, generator }).unwrap()
}

#[test]
fn the_trainers_logprobs_equal_transformers() {
    for name in NAMES {
        let golden = GoldenModel::load(name);
        let logprobs = forward::score(&golden.config, &formula::weights(&golden.config), &golden.tokens);
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
        let generator = generator(folder.path());
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
        let arguments = ["score", "--model", ".", "--tokens", &tokens.join(","), "--engine", engine, "--json"];
        let answer: Value = serde_json::from_str(&check_runs(folder.path(), &arguments)).unwrap();
        assert_eq!(answer["tokens"].as_array().unwrap().len(), golden.tokens.len());
        let logprobs = answer["logprobs"].as_array().unwrap();
        assert_eq!(logprobs[0], Value::Null);
        let logprobs: Vec<f32> = logprobs[1..].iter().map(|value| value.as_f64().unwrap() as f32).collect();
        assert!(largest_difference(&logprobs, &golden.logprobs) < TOLERANCE, "{engine}");
    }
}
