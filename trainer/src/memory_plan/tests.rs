//! Predictions against the peak memory of real steps, each in a process of its own.

use std::process::Command;
use std::sync::Arc;

use aha_core::batch::TrainSequence;
use aha_core::config::Train;
use aha_core::optimizer::OptimizerOptions;
use aha_core::random::derive_seed;
use aha_nn::comm::ProcessGroup;
use aha_nn::optim::AdamW;
use aha_nn::runtime;
use aha_nn::weights::Weights;

use super::*;
use crate::torch::learner::{Learner, LearnerOptions, LocalBatch};
use crate::torch::objective::{Objective, PolicyObjective};
use crate::torch::parameters::{Parameters, ParametersBuilder, Sharding};
use crate::torch::zero::Zero;

/// The setting of the process that is measured, as JSON of [`Train`].
const TRAIN: &str = "AHA_TEST_MEMORY_OF";
/// What it prints before its answer, in bytes.
const ANSWER: &str = "grew by ";

const NUM_SEQUENCES: usize = 8;
const PROMPT: usize = 64;
const COMPLETION: usize = 192;

fn model() -> ModelConfig {
    let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 8192, "hidden_size": 384,
        "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
        "tie_word_embeddings": true});
    ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
}

fn sequences() -> Vec<TrainSequence> {
    let token = |index: usize, position: usize| {
        // All prompts differ: nothing is shared.
        (derive_seed(1, &[index as u64, position as u64]) % 8192) as u32
    };
    (0..NUM_SEQUENCES)
        .map(|index| TrainSequence {
            token_ids: (0..PROMPT + COMPLETION).map(|position| token(index, position)).collect(),
            num_prompt_tokens: PROMPT,
            weights: vec![1e-3; COMPLETION],
            advantages: vec![1.0; COMPLETION],
            ..TrainSequence::default()
        })
        .collect()
}

fn predicted(train: &Train) -> usize {
    let setting = Setting {
        model: &model(),
        train,
        kind: Kind::Float,
        device: Device::Cpu,
        world_size: 1,
        num_tokens: NUM_SEQUENCES * (PROMPT + COMPLETION),
        num_targets: NUM_SEQUENCES * COMPLETION,
    };
    let TrainerPlan { device, host } = trainer(&setting);
    assert_eq!(host, Plan::default());
    println!("{device:?}");
    device.total()
}

/// Growth of the peak from before the model was there to the end of two steps.
fn measured(train: &Train) -> usize {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory_plan::tests::steps_of_a_setting", "--ignored", "--nocapture"])
        .env(TRAIN, serde_json::to_string(train).unwrap())
        // Tensors of real models are mapped one by one; these are small, and freed ones would stay in malloc's heap.
        .env("MALLOC_MMAP_THRESHOLD_", "1048576")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let answer = text.lines().find_map(|line| line.split_once(ANSWER)).unwrap().1;
    answer.trim().parse().unwrap()
}

#[test]
#[ignore = "measures a process of its own: run by predictions_are_near_the_measured_peak"]
fn steps_of_a_setting() {
    let train: Train = serde_json::from_str(&std::env::var(TRAIN).unwrap()).unwrap();
    steps(&train, &sequences()[..1], &small());
    let before = runtime::memory().unwrap().rss as usize;
    steps(&train, &sequences(), &model());
    println!("{ANSWER}{}", runtime::memory().unwrap().peak_rss as usize - before);
}

/// A model that has every operation's code loaded before memory is measured.
fn small() -> ModelConfig {
    let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 8192, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": true});
    ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
}

fn steps(train: &Train, sequences: &[TrainSequence], model: &ModelConfig) {
    let group = Arc::new(ProcessGroup::solo("test", Device::Cpu));
    let sharding = Sharding {
        stage: train.zero_stage,
        offload_optimizer: train.offload_optimizer,
        offload_params: train.offload_params,
    };
    let weights = |seed| {
        let mut builder = ParametersBuilder::new(sharding, &group, model.manifest(), Kind::Float);
        for unit_idx in 0..model.manifest().units.len() {
            builder.add(&Weights::random_unit(model, seed, unit_idx));
        }
        builder.finish()
    };
    let zero = Zero::with(sharding, Arc::clone(&group), weights(1), &OptimizerOptions::default()).unwrap();
    let reference: Option<Parameters> = (train.beta > 0.0).then(|| weights(2));
    let options = LearnerOptions {
        objective: Objective::Policy(PolicyObjective::new(train)),
        temperature: 1.0,
        max_grad_norm: 1.0,
        gradient_checkpointing: train.gradient_checkpointing,
        gradient_checkpointing_interval: train.gradient_checkpointing_interval,
        share_prompts: true,
        max_length: PROMPT + COMPLETION,
        logit_rows: chunk_rows(model.vocab_size as i64),
    };
    let mut learner = Learner::new(model.clone(), options, zero, reference);
    let all: Vec<usize> = (0..sequences.len()).collect();
    let batch = LocalBatch { sequences, micro_batches: &[all], num_micro_batches: 1 };
    let adamw = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0 };
    for _ in 0..2 {
        assert!(learner.step(&batch, &adamw).unwrap().num_skipped == 0);
    }
}

#[test]
fn predictions_are_near_the_measured_peak() {
    let plain = Train { zero_stage: 0, ..Train::default() };
    let all = Train { gradient_checkpointing: true, ..plain.clone() };
    let half = Train { gradient_checkpointing_interval: 2, ..all.clone() };
    let reference = Train { beta: 0.1, offload_optimizer: true, ..all.clone() };
    let streamed = Train { zero_stage: 3, offload_params: true, ..plain.clone() };
    for train in [plain, all, half, reference, streamed] {
        let (predicted, measured) = (predicted(&train), measured(&train));
        let what = format!(
            "recompute {} / {}, stage {}, beta {}",
            train.gradient_checkpointing, train.gradient_checkpointing_interval, train.zero_stage, train.beta
        );
        let ratio = predicted as f64 / measured as f64;
        println!("{what}: {:.0} MB predicted, {:.0} MB measured", predicted as f64 / 1e6, measured as f64 / 1e6);
        assert!((ratio - 1.0).abs() < 0.15, "{what}: {predicted} bytes predicted, {measured} measured");
    }
}

#[test]
fn shares_and_offload_are_where_they_should_be() {
    let model = model();
    let padded: usize = model.manifest().units.iter().map(|unit| unit.padded_numel(4)).sum();
    let train = Train { zero_stage: 3, offload_optimizer: true, offload_params: true, ..Train::default() };
    let setting = Setting {
        model: &model,
        train: &train,
        kind: Kind::BFloat16,
        device: Device::Cuda(0),
        world_size: 4,
        num_tokens: 100,
        num_targets: 50,
    };
    let plan = trainer(&setting);
    let term = |plan: &Plan, name: &str| plan.terms.iter().find(|(known, _)| *known == name).map(|(_, bytes)| *bytes);
    assert_eq!(term(&plan.host, "weights"), Some(padded / 4 * 2));
    // Masters are padded as the weights are; moments are not.
    assert_eq!(term(&plan.host, "optimizer"), Some(padded / 4 * 4 + model.manifest().numel() * 8 / 4));
    assert_eq!(term(&plan.device, "gradients"), Some(padded / 4 * 4));
    assert_eq!((term(&plan.device, "weights"), term(&plan.device, "optimizer")), (None, None));
    let whole = Train { zero_stage: 2, ..Train::default() };
    let plan = trainer(&Setting { train: &whole, ..setting });
    assert_eq!(term(&plan.device, "weights"), Some(padded * 2));
    assert_eq!(plan.host, Plan::default());
}
