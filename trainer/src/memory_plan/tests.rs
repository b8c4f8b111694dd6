//! Predictions against the peak memory of real steps, each in a process of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use aha_core::batch::TrainSequence;
use aha_core::config::{BaseQuantization, Lora, Train};
use aha_core::optimizer::OptimizerOptions;
use aha_core::random::derive_seed;
use aha_nn::comm::ProcessGroup;
use aha_nn::lora::{AdapterSpec, Nf4Options, fresh_adapters};
use aha_nn::model_folder::save_weights;
use aha_nn::optim::AdamW;
use aha_nn::runtime;
use aha_nn::weights::Weights;

use super::*;
use crate::adapters::frozen_weights;
use crate::torch::adapted::FrozenBase;
use crate::torch::learner::{Learner, LearnerOptions, LocalBatch};
use crate::torch::objective::{Objective, PolicyObjective};
use crate::torch::parameters::{Parameters, ParametersBuilder, Sharding};
use crate::torch::zero::Zero;

/// The setting of the process that is measured, as JSON of [`Train`], [`Lora`] and a folder with the frozen base.
const SETTING: &str = "AHA_TEST_MEMORY_OF";
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

fn predicted(train: &Train, lora: &Lora) -> usize {
    let setting = Setting {
        model: &model(),
        train,
        lora,
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
fn measured(train: &Train, lora: &Lora) -> usize {
    let folder = tempfile::tempdir().unwrap();
    for (name, model) in [("small", small()), ("model", model())] {
        let weights = Weights::random(&model, 1, 1, Kind::Float, Device::Cpu);
        std::fs::create_dir(folder.path().join(name)).unwrap();
        save_weights(&folder.path().join(name), &model, &weights).unwrap();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory_plan::tests::steps_of_a_setting", "--ignored", "--nocapture"])
        .env(SETTING, serde_json::to_string(&(train, lora, folder.path())).unwrap())
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
    let setting: (Train, Lora, PathBuf) = serde_json::from_str(&std::env::var(SETTING).unwrap()).unwrap();
    let (train, lora, folder) = (&setting.0, &setting.1, &setting.2);
    let run = |name: &str, model: &ModelConfig, sequences: &[TrainSequence]| {
        let learner = if lora.is_on() {
            adapters_learner(train, lora, model, &folder.join(name))
        } else {
            whole_learner(train, model)
        };
        steps(learner, sequences);
    };
    run("small", &small(), &sequences()[..1]);
    let before = runtime::memory().unwrap().rss as usize;
    run("model", &model(), &sequences());
    println!("{ANSWER}{}", runtime::memory().unwrap().peak_rss as usize - before);
}

/// A model that has every operation's code loaded before memory is measured.
fn small() -> ModelConfig {
    let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 8192, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": true});
    ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
}

fn sharding(train: &Train) -> Sharding {
    Sharding {
        stage: train.zero_stage,
        offload_optimizer: train.offload_optimizer,
        offload_params: train.offload_params,
    }
}

fn options(train: &Train, model: &ModelConfig) -> LearnerOptions {
    LearnerOptions {
        objective: Objective::Policy(PolicyObjective::new(train)),
        temperature: 1.0,
        max_grad_norm: 1.0,
        gradient_checkpointing: train.gradient_checkpointing,
        gradient_checkpointing_interval: train.gradient_checkpointing_interval,
        share_prompts: true,
        max_length: PROMPT + COMPLETION,
        logit_rows: chunk_rows_on(Device::Cpu, model.vocab_size as i64),
    }
}

/// A learner of adapters beside the base in `folder`.
fn adapters_learner(train: &Train, lora: &Lora, model: &ModelConfig, folder: &Path) -> Learner {
    let group = Arc::new(ProcessGroup::solo("test", Device::Cpu));
    let spec = AdapterSpec::new(lora).unwrap();
    let adapters = fresh_adapters(model, &spec, (lora.init_lora_weights, 1), (1, Device::Cpu));
    let adapters = Parameters::of(sharding(train), &group, adapters);
    let zero = Zero::with(sharding(train), group, adapters, &train.optimizer_options()).unwrap();
    let is_quantised = lora.quantization == BaseQuantization::Nf4;
    let quantization = is_quantised.then_some(Nf4Options { double_quant: lora.double_quant });
    let weights = frozen_weights(folder, model, quantization, (Kind::Float, Device::Cpu)).unwrap();
    let base = FrozenBase { weights, is_quantised, spec, dropout: lora.lora_dropout, seed: 1 };
    Learner::of_adapters(model.clone(), options(train, model), zero, base)
}

fn whole_learner(train: &Train, model: &ModelConfig) -> Learner {
    let group = Arc::new(ProcessGroup::solo("test", Device::Cpu));
    let sharding = sharding(train);
    let weights = |seed| {
        let mut builder = ParametersBuilder::new(sharding, &group, model.manifest(), Kind::Float);
        for unit_idx in 0..model.manifest().units.len() {
            builder.add(&Weights::random_unit(model, seed, unit_idx));
        }
        builder.finish()
    };
    let zero = Zero::with(sharding, Arc::clone(&group), weights(1), &OptimizerOptions::default()).unwrap();
    let reference: Option<Parameters> = (train.beta > 0.0).then(|| weights(2));
    Learner::new(model.clone(), options(train, model), zero, reference)
}

fn steps(mut learner: Learner, sequences: &[TrainSequence]) {
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
        check_near(&train, &Lora::default());
    }
}

#[test]
fn predictions_of_adapters_are_near_the_measured_peak() {
    let plain = Train { zero_stage: 0, ..Train::default() };
    let all = Train { gradient_checkpointing: true, beta: 0.1, ..plain.clone() };
    let lora = Lora { r: 16, ..Lora::default() };
    let dropped = Lora { lora_dropout: 0.1, ..lora.clone() };
    let quantised = Lora { quantization: BaseQuantization::Nf4, ..lora.clone() };
    let exact_scales = Lora { double_quant: false, r: 64, ..quantised.clone() };
    for (train, lora) in
        [(&plain, &lora), (&plain, &dropped), (&all, &lora), (&all, &quantised), (&plain, &exact_scales)]
    {
        check_near(train, lora);
    }
}

#[track_caller]
fn check_near(train: &Train, lora: &Lora) {
    let (predicted, measured) = (predicted(train, lora), measured(train, lora));
    let what = format!(
        "recompute {} / {}, stage {}, beta {}, adapters of rank {}, dropout {}, base {:?}",
        train.gradient_checkpointing,
        train.gradient_checkpointing_interval,
        train.zero_stage,
        train.beta,
        lora.r,
        lora.lora_dropout,
        lora.quantization
    );
    let ratio = predicted as f64 / measured as f64;
    println!("{what}: {:.0} MB predicted, {:.0} MB measured", predicted as f64 / 1e6, measured as f64 / 1e6);
    assert!((ratio - 1.0).abs() < 0.15, "{what}: {predicted} bytes predicted, {measured} measured");
}

#[test]
fn adapters_take_what_their_matrices_do() {
    let (model, world_size) = (model(), 2);
    let lora = Lora { r: 8, quantization: BaseQuantization::Nf4, ..Lora::default() };
    let train = Train { zero_stage: 2, beta: 0.1, ..Train::default() };
    let setting = Setting {
        model: &model,
        train: &train,
        lora: &lora,
        kind: Kind::BFloat16,
        device: Device::Cuda(0),
        world_size,
        num_tokens: 100,
        num_targets: 50,
    };
    let plan = trainer(&setting);
    let term = |name: &str| plan.device.terms.iter().find(|(known, _)| *known == name).map(|(_, bytes)| *bytes);
    // By hand: q and o are 384 x 384, k and v 128 x 384, gate, up and down 1536 x 384; q, k and v have biases.
    let (squares, narrow, wide) = (2 * 384 * 384, 2 * 128 * 384, 3 * 1536 * 384);
    let layer = squares + narrow + wide;
    let scales = layer / 64 + 4 * (2 * 9 + 2 * 3 + 3 * 36);
    let vectors = 384 + 2 * 128 + 2 * 384;
    let base = 8 * (layer / 2 + scales + 2 * vectors) + 2 * (8192 * 384 + 384);
    assert_eq!(term("frozen base"), Some(base));
    let adapters = 8 * 8 * (2 * (384 + 384) + 2 * (128 + 384) + 3 * (1536 + 384));
    // Units of adapters are multiples of 256 elements for each rank here, so that nothing is padded.
    assert_eq!((adapters / 8) % (256 * world_size), 0);
    assert_eq!(term("adapters"), Some(4 * adapters));
    assert_eq!(term("gradients"), Some(4 * adapters / world_size));
    assert_eq!(term("optimizer"), Some(8 * adapters / world_size));
    assert_eq!((term("weights"), term("reference model")), (None, None));
}

#[test]
fn shares_and_offload_are_where_they_should_be() {
    let model = model();
    let padded: usize = model.manifest().units.iter().map(|unit| unit.padded_numel(4)).sum();
    let train = Train { zero_stage: 3, offload_optimizer: true, offload_params: true, ..Train::default() };
    let setting = Setting {
        model: &model,
        train: &train,
        lora: &Lora::default(),
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
