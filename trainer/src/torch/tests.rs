//! Steps of small models, and what they are compared with. `AHA_TEST_DEVICE=cuda` puts the learner that is alone onto a GPU;
//! what it is compared with stays on the CPU.

mod gpu_kernels;
mod invariance;
mod lending;
mod padded;
mod sharding;
mod whole_graph;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use aha_core::batch::TrainSequence;
use aha_core::config::Train;
use aha_core::optimizer::OptimizerOptions;
use aha_core::random::derive_seed;
use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};
use aha_nn::model_config::ModelConfig;
use aha_nn::optim::AdamW;
use aha_nn::unit::ModelWeights;
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

use super::learner::{Learner, LearnerOptions, StepOutput};
use super::objective::{Objective, PolicyObjective};
use super::parameters::{Parameters, Sharding};
use super::zero::Zero;
use crate::training_batch::Plan;

pub(super) const ADAMW: AdamW = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };

/// Takes the gradient off the parameters, but for a part in a million of it.
pub(super) const SUBTRACT: AdamW = AdamW { lr: 1e6, beta1: 0.9, beta2: 0.99, eps: 1e6, weight_decay: 0.0 };

pub(super) fn config(family: &str, tied: bool) -> ModelConfig {
    let raw = serde_json::json!({"model_type": family, "vocab_size": 29, "hidden_size": 16, "intermediate_size": 22,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied,
        "initializer_range": 0.3});
    ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
}

/// Where a learner that is alone computes.
pub(super) fn device() -> Device {
    let name = std::env::var("AHA_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    aha_nn::runtime::device(&name, 0).unwrap()
}

pub(super) fn policy(beta: f32) -> Objective {
    objective(&Train { epsilon_high: Some(0.3), beta, ..Train::default() })
}

fn objective(train: &Train) -> Objective {
    Objective::Policy(PolicyObjective::new(train))
}

/// Sequences of uneven lengths with all streams filled, some of which share a prompt.
pub(super) fn sequences(seed: u64, with_old: bool) -> Vec<TrainSequence> {
    // Group, tokens of its prompt, tokens of the completion.
    let lengths = [(0, 3, 4), (0, 3, 9), (0, 3, 1), (1, 2, 6), (1, 2, 13), (2, 4, 4), (3, 7, 2)];
    let total: usize = lengths.iter().map(|(_, _, completion)| completion).sum();
    lengths
        .iter()
        .enumerate()
        .map(|(index, &(group, prompt, completion))| {
            let owner = |position: usize| if position < prompt { 100 + group } else { index as u64 };
            let draw = |part: u64, position: usize| derive_seed(seed, &[part, owner(position), position as u64]);
            let unit = |part, position| (draw(part, position) % 1000) as f32 / 500.0 - 1.0;
            TrainSequence {
                token_ids: (0..prompt + completion).map(|position| (draw(0, position) % 29) as u32).collect(),
                num_prompt_tokens: prompt,
                weights: vec![1.0 / total as f32; completion],
                advantages: (0..completion).map(|position| unit(1, position)).collect(),
                old_logprobs: if with_old {
                    (0..completion).map(|p| -3.4 + 0.3 * unit(2, p)).collect()
                } else {
                    vec![]
                },
                ..TrainSequence::default()
            }
        })
        .collect()
}

pub(super) fn options(objective: Objective, checkpointing: bool) -> LearnerOptions {
    LearnerOptions {
        objective,
        temperature: 0.8,
        max_grad_norm: 0.5,
        gradient_checkpointing: checkpointing,
        gradient_checkpointing_interval: 1,
        share_prompts: true,
        max_length: 32,
        logit_rows: 7,
    }
}

fn learner(model: &ModelConfig, objective: Objective, zero: Zero, checkpointing: bool) -> Learner {
    let reference = Weights::random(model, 99, 1, Kind::Float, zero.weights().device());
    let reference = objective.needs_reference().then_some(reference.into());
    Learner::new(model.clone(), options(objective, checkpointing), zero, reference)
}

/// Three steps on the same batch by one of `size` ranks.
fn train(
    model: &ModelConfig,
    stage: u8,
    group: ProcessGroup,
    with_old: bool,
    checkpointing: bool,
) -> (Learner, Vec<StepOutput>) {
    let options = options(policy(0.05), checkpointing);
    train_sharded(model, stage.into(), group, options, &sequences(3, with_old))
}

/// Three steps on `sequences`, the reference policy sharded as the policy.
fn train_sharded(
    model: &ModelConfig,
    sharding: Sharding,
    group: ProcessGroup,
    options: LearnerOptions,
    sequences: &[TrainSequence],
) -> (Learner, Vec<StepOutput>) {
    let (size, group) = (group.size(), Arc::new(group));
    let weights = |seed| {
        let weights = Weights::random(model, seed, size, Kind::Float, group.device());
        Parameters::of(sharding, &group, weights)
    };
    let zero = Zero::with(sharding, Arc::clone(&group), weights(5), &OptimizerOptions::default()).unwrap();
    let reference = options.objective.needs_reference().then(|| weights(99));
    train_zero(Learner::new(model.clone(), options, zero, reference), sequences)
}

/// Three steps on `sequences`.
fn train_zero(mut learner: Learner, sequences: &[TrainSequence]) -> (Learner, Vec<StepOutput>) {
    let (rank, size) = (learner.zero().group().rank(), learner.zero().group().size());
    let all: Vec<usize> = (0..sequences.len()).collect();
    let settings = Train { micro_batch_tokens: 20, ..Train::default() };
    let plan = Plan::new(sequences, &all, &settings, (rank, size)).unwrap();
    let step = |index| {
        if index == 2 {
            learner.zero_mut().release_gradients();
            // One number each.
            assert_eq!(learner.zero().held_bytes().gradients, 4 * learner.zero().weights().manifest().units.len());
        }
        learner.step(&plan.of(sequences), &ADAMW).unwrap()
    };
    let outputs = (0..3).map(step).collect();
    (learner, outputs)
}

fn alone(model: &ModelConfig, checkpointing: bool) -> (Learner, Vec<StepOutput>) {
    train(model, 0, ProcessGroup::solo("test", device()), true, checkpointing)
}

pub(super) fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

/// Runs `work` on every rank of a Gloo group; results in the order of ranks.
pub(super) fn on_ranks<T: Send + 'static>(
    size: usize,
    work: impl Fn(ProcessGroup) -> T + Clone + Send + 'static,
) -> Vec<T> {
    let timeout = Duration::from_secs(60);
    let store = Store::host("127.0.0.1", 0, timeout).unwrap();
    let port = store.port();
    let threads: Vec<_> = (0..size)
        .map(|rank| {
            let work = work.clone();
            thread::spawn(move || {
                let store = Store::connect("127.0.0.1", port, timeout).unwrap();
                let address = Address::Host("127.0.0.1".to_owned());
                let spec = GroupSpec { name: "test".to_owned(), rank, size, timeout, address };
                work(ProcessGroup::new(Backend::Gloo, &store, &spec).unwrap())
            })
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}
