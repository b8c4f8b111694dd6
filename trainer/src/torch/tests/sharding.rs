//! Every stage and world size against one rank, for every optimizer; and what a rank holds.

use std::sync::Arc;

use aha_core::config::Train;
use aha_core::manifest::UnitSpec;
use aha_core::optimizer::{OptimizerKind, OptimizerOptions};
use aha_nn::comm::ProcessGroup;
use aha_nn::model_config::ModelConfig;
use aha_nn::unit::ModelWeights;
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

use super::{
    ADAMW, alone, config, device, largest_difference, learner, on_ranks, options, policy, sequences, train,
    train_sharded, train_zero,
};
use crate::test_ranks::{flatten, run_ranks};
use crate::torch::learner::{Learner, LocalBatch, StepOutput};
use crate::torch::parameters::{Parameters, Sharding};
use crate::torch::zero::{FullState, ShardState, Zero};
use crate::training_batch::Plan;

/// Everything that a stage may keep in the CPU's memory.
fn offloaded(stage: u8) -> Sharding {
    Sharding { stage, offload_optimizer: true, offload_params: stage == 3 }
}

#[test]
fn every_stage_and_world_size_trains_alike() {
    for (family, tied) in [("qwen2", true), ("qwen3", false)] {
        let model = config(family, tied);
        let steps = |learner: &mut Learner, plan: &LocalBatch<'_>| -> Vec<StepOutput> {
            (0..2).map(|_| learner.step(plan, &ADAMW).unwrap()).collect()
        };
        let five = move |model: &ModelConfig, sharding: Sharding, group: ProcessGroup| {
            let (sequences, ranks) = (sequences(3, true), (group.rank(), group.size()));
            let (mut learner, _) = train_sharded(model, sharding, group, options(policy(0.05), false), &sequences);
            let all: Vec<usize> = (0..sequences.len()).collect();
            let settings = Train { micro_batch_tokens: 20, ..Train::default() };
            let plan = Plan::new(&sequences, &all, &settings, ranks).unwrap();
            // The policy's own log-probs, through the other kind of pass; of all ranks' sequences together.
            let statistics = learner.statistics(&plan.of(&sequences)).unwrap();
            let sum: f32 = statistics.logprobs.iter().flatten().sum();
            let outputs = steps(&mut learner, &plan.of(&sequences));
            (flatten(learner.zero().weights()), outputs[1].loss, outputs[1].grad_norm, f64::from(sum))
        };
        let (expected, loss, norm, sum) = five(&model, 0.into(), ProcessGroup::solo("test", device()));
        for size in 1..=4 {
            for sharding in (0..=3).flat_map(|stage| [Sharding::from(stage), offloaded(stage)]) {
                let model = model.clone();
                let results = on_ranks(size, move |group| five(&model, sharding, group));
                let case = format!("{family}, {size} ranks, {sharding:?}");
                for (weights, _, grad_norm, _) in &results {
                    let difference = largest_difference(weights, &expected);
                    assert!(difference < 1e-5, "{case}: weights differ by {difference}");
                    assert!((grad_norm - norm).abs() < 1e-5 * norm, "{case}: {grad_norm} is not {norm}");
                }
                let total: f64 = results.iter().map(|(_, loss, ..)| loss).sum();
                assert!((total - loss).abs() < 1e-5, "{case}: {total} is not {loss}");
                let total: f64 = results.iter().map(|(.., sum)| sum).sum();
                assert!((total - sum).abs() < 1e-3, "{case}: {total} is not {sum}");
            }
        }
    }
}

#[test]
fn keeping_the_optimizer_elsewhere_changes_no_bit() {
    let model = config("qwen3", true);
    let run = move |sharding: Sharding| {
        let model = model.clone();
        let results = on_ranks(2, move |group| {
            let options = options(policy(0.05), true);
            flatten(train_sharded(&model, sharding, group, options, &sequences(3, true)).0.zero().weights())
        });
        results.into_iter().next().unwrap()
    };
    for stage in 1..=3 {
        assert!(run(stage.into()).equal(&run(offloaded(stage))), "stage {stage}");
    }
}

#[test]
fn a_rank_holds_what_its_stage_promises() {
    let model = config("qwen2", false);
    let size = 4;
    let units = model.manifest().units;
    let padded: usize = units.iter().map(|unit| unit.padded_numel(size)).sum();
    let updated = |rank: usize, is_shared: bool| -> usize {
        let of_unit = |unit: &UnitSpec| {
            let len = unit.padded_numel(size) / size;
            if is_shared { unit.numel().saturating_sub(rank * len).min(len) } else { unit.numel() }
        };
        units.iter().map(of_unit).sum()
    };
    for stage in 0..=3 {
        for sharding in [Sharding::from(stage), offloaded(stage)] {
            let model = model.clone();
            let held = on_ranks(size, move |group| {
                let options = options(policy(0.0), false);
                let (learner, _) = train_sharded(&model, sharding, group, options, &sequences(3, true));
                (learner.zero().held_bytes(), learner.zero().weights().most_gathered())
            });
            let share = |is_shared: bool| if is_shared { padded / size } else { padded };
            for (rank, (held, most_gathered)) in held.into_iter().enumerate() {
                assert_eq!(held.weights, 4 * share(stage == 3), "weights in {sharding:?}");
                assert_eq!(held.gradients, 4 * share(stage >= 2), "gradients in {sharding:?}");
                // There is no state of padding.
                assert_eq!(held.optimizer, 2 * 4 * updated(rank, stage >= 1), "optimizer in {sharding:?}");
                // The one that is computed, and the next.
                assert_eq!(most_gathered, if stage == 3 { 2 } else { 0 });
            }
        }
    }
}

/// Gradients of one split differ from those of another in their last bits. Muon takes that into bf16, and 8 bits into a
/// neighbouring value: updates differ then by a small part of themselves.
#[test]
fn every_optimizer_trains_alike_on_every_stage_and_world_size() {
    let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 150, "hidden_size": 32, "intermediate_size": 130,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": false,
        "initializer_range": 0.3});
    let model = ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap();
    let initial = flatten(&Weights::random(&model, 5, 1, Kind::Float, Device::Cpu));
    for (kind, tolerance) in [(OptimizerKind::Adamw8bit, 0.02), (OptimizerKind::Muon, 0.02)] {
        let work = |stage: u8, group: ProcessGroup| {
            let learner = learner(&model, policy(0.0), zero_with(&model, kind, stage, group), false);
            flatten(train_zero(learner, &sequences(3, true)).0.zero().weights())
        };
        let expected = work(0, ProcessGroup::solo("test", Device::Cpu));
        check_state_is_taken_back(&model, kind);
        let norm = |difference: Tensor| difference.square().sum(Kind::Double).double_value(&[]).sqrt();
        let moved = norm(&expected - &initial);
        for (size, stage) in [(1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3)] {
            let results = run_ranks(size, |group| work(stage, group));
            for weights in &results {
                assert!(weights.equal(&results[0]), "{kind:?}, {size} ranks, stage {stage}: ranks differ");
            }
            let difference = norm(&results[0] - &expected);
            let place = format!("{kind:?}, {size} ranks, stage {stage}");
            assert!(difference < tolerance * moved, "{place}: weights differ by {difference} of {moved}");
        }
    }
}

fn zero_with(model: &ModelConfig, kind: OptimizerKind, stage: u8, group: ProcessGroup) -> Zero {
    let (sharding, group) = (Sharding::from(stage), Arc::new(group));
    let weights = Weights::random(model, 5, group.size(), Kind::Float, group.device());
    let weights = Parameters::of(sharding, &group, weights);
    let options = OptimizerOptions { kind, ..OptimizerOptions::default() };
    Zero::with(sharding, group, weights, &options).unwrap()
}

/// What one writes another of the same optimizer takes, and one of another optimizer refuses.
#[track_caller]
fn check_state_is_taken_back(model: &ModelConfig, kind: OptimizerKind) {
    let zero = |kind| zero_with(model, kind, 2, ProcessGroup::solo("test", Device::Cpu));
    let states = |zero: &Zero| -> Vec<FullState> {
        let full = |shard: ShardState| FullState {
            unit_idx: shard.unit_idx,
            name: shard.name.to_owned(),
            tensor: shard.tensor.copy(),
        };
        zero.state().into_iter().map(full).collect()
    };
    let (trained, _) = train_zero(learner(model, policy(0.0), zero(kind), false), &sequences(3, true));
    let written = states(trained.zero());
    let mut fresh = zero(kind);
    fresh.load_state(3, &written).unwrap();
    for (found, expect) in states(&fresh).iter().zip(&written) {
        assert!(found.tensor.equal(&expect.tensor), "{kind:?}: {} of unit {}", found.name, found.unit_idx);
    }
    let error = zero(OptimizerKind::Adamw).load_state(3, &written).unwrap_err().to_string();
    assert!(error.contains("exp_avg for unit") && error.contains("another train.optimizer"), "{error}");
}

#[test]
fn an_update_whose_gradients_are_not_finite_on_one_rank_is_left_out_on_all() {
    let model = config("qwen2", true);
    for stage in [0, 1, 2, 3] {
        let results = run_ranks(2, |group| {
            let (rank, size) = (group.rank(), group.size());
            let weights = Weights::random(&model, 5, size, Kind::Float, group.device());
            let before = flatten(&weights);
            let mut learner = learner(&model, policy(0.05), Zero::new(stage, group, weights), false);
            let mut sequences = sequences(3, true);
            let all: Vec<usize> = (0..sequences.len()).collect();
            let settings = Train { micro_batch_tokens: 20, ..Train::default() };
            let plan = Plan::new(&sequences, &all, &settings, (rank, size)).unwrap();
            let good = sequences[0].advantages[0];
            sequences[0].advantages[0] = f32::NAN;
            let skipped = learner.step(&plan.of(&sequences), &ADAMW).unwrap().num_skipped;
            let unmoved = flatten(learner.zero().weights()).equal(&before);
            let num_updates = learner.zero().num_updates();
            sequences[0].advantages[0] = good;
            let taken = learner.step(&plan.of(&sequences), &ADAMW).unwrap();
            (skipped, unmoved, num_updates, taken.num_skipped, taken.grad_norm.is_finite())
        });
        assert_eq!(results, [(1, true, 0, 0, true); 2], "stage {stage}");
    }
}

#[test]
fn optimizer_state_moves_between_world_sizes() {
    let model = config("qwen2", true);
    let shared = model.clone();
    let shards = on_ranks(3, move |group| {
        let (learner, _) = train(&shared, 2, group, true, false);
        (flatten(learner.zero().weights()), learner.zero().state())
    });
    let (alone, _) = alone(&model, false);
    let mut states: Vec<FullState> = Vec::new();
    for (unit_idx, unit) in alone.zero().weights().manifest().units.iter().enumerate() {
        for name in ["exp_avg", "exp_avg_sq"] {
            let tensor = Tensor::zeros([unit.numel() as i64], (Kind::Float, Device::Cpu));
            let parts = shards.iter().flat_map(|(_, shards)| shards);
            for part in parts.filter(|part| part.unit_idx == unit_idx && part.name == name) {
                tensor.narrow(0, part.offset as i64, part.tensor.size()[0]).copy_(&part.tensor);
            }
            states.push(FullState { unit_idx, name: name.to_owned(), tensor });
        }
    }
    // A fourth step from the moments of three ranks equals the fourth step of one.
    let fourth = |mut learner: Learner| {
        let sequences = sequences(3, true);
        let all: Vec<usize> = (0..sequences.len()).collect();
        let batch = LocalBatch { sequences: &sequences, micro_batches: &[all], num_micro_batches: 1 };
        learner.step(&batch, &ADAMW).unwrap();
        flatten(learner.zero().weights())
    };
    let mut zero = Zero::new(1, ProcessGroup::solo("restored", device()), copy(alone.zero().weights()));
    let tensor = states[0].tensor.shallow_clone();
    states[0].tensor = tensor.narrow(0, 0, 9);
    let error = zero.load_state(3, &states).unwrap_err().to_string();
    assert!(error.contains("9 elements of exp_avg for unit embedding"), "{error}");
    states[0].tensor = tensor;
    zero.load_state(3, &states).unwrap();
    let restored = learner(&model, policy(0.05), zero, false);
    assert!(largest_difference(&fourth(restored), &fourth(alone)) < 1e-5);
}

/// A copy that shares no memory.
fn copy(weights: &Parameters) -> Weights {
    let units = 0..weights.manifest().units.len();
    let flats = units.map(|unit_idx| weights.unit(unit_idx).unwrap().flat().copy()).collect();
    Weights::from_flats(weights.manifest().clone(), flats)
}
