//! What must not change a step: recomputation, chunks, shared prompts, another run.

use aha_nn::comm::ProcessGroup;
use aha_nn::weights::Weights;
use tch::Kind;

use super::{
    ADAMW, alone, config, device, largest_difference, on_ranks, options, policy, sequences, train, train_sharded,
};
use crate::test_ranks::flatten;
use crate::torch::learner::{Learner, LearnerOptions, LocalBatch};
use crate::torch::zero::Zero;

#[test]
fn recomputing_activations_changes_nothing() {
    let model = config("qwen3", true);
    let (kept, a) = alone(&model, false);
    for interval in 1..=3 {
        for (stage, size) in [(0, 1), (2, 2), (3, 2)] {
            let shared = model.clone();
            let results = on_ranks(size, move |group| {
                let options =
                    LearnerOptions { gradient_checkpointing_interval: interval, ..options(policy(0.05), true) };
                let (learner, outputs) = train_sharded(&shared, stage.into(), group, options, &sequences(3, true));
                (flatten(learner.zero().weights()), outputs[2].grad_norm)
            });
            for (weights, grad_norm) in results {
                if size == 1 {
                    assert!(flatten(kept.zero().weights()).equal(&weights));
                    assert_eq!(a[2].grad_norm, grad_norm);
                }
                assert!(largest_difference(&weights, &flatten(kept.zero().weights())) < 1e-5);
            }
        }
    }
}

#[test]
fn chunks_of_logits_change_nothing() {
    let model = config("qwen2", true);
    let run = |logit_rows: i64| {
        let options = LearnerOptions { logit_rows, ..options(policy(0.05), false) };
        let group = ProcessGroup::solo("test", device());
        let (learner, outputs) = train_sharded(&model, 0.into(), group, options, &sequences(3, true));
        (flatten(learner.zero().weights()), outputs)
    };
    let (whole, a) = run(1000);
    for logit_rows in [1, 3] {
        let (chunked, b) = run(logit_rows);
        assert!(largest_difference(&whole, &chunked) < 1e-5);
        assert!((a[0].grad_norm - b[0].grad_norm).abs() < 1e-5 * a[0].grad_norm);
    }
}

#[test]
fn sharing_prompts_changes_nothing() {
    let model = config("qwen2", true);
    let sequences = sequences(3, true);
    let all: Vec<usize> = (0..sequences.len()).collect();
    let run = |share_prompts: bool| {
        let weights = Weights::random(&model, 5, 1, Kind::Float, device());
        let zero = Zero::new(0, ProcessGroup::solo("test", device()), weights);
        let reference = Weights::random(&model, 99, 1, Kind::Float, device());
        let options = LearnerOptions { share_prompts, ..options(policy(0.05), false) };
        let mut learner = Learner::new(model.clone(), options, zero, Some(reference.into()));
        let batch =
            LocalBatch { sequences: &sequences, micro_batches: std::slice::from_ref(&all), num_micro_batches: 1 };
        let logprobs = learner.statistics(&batch).unwrap().logprobs;
        (logprobs, learner.step(&batch, &ADAMW).unwrap())
    };
    let ((shared, a), (whole, b)) = (run(true), run(false));
    for (shared, whole) in shared.iter().zip(&whole).chain(a.logprobs.iter().zip(&b.logprobs)) {
        assert_eq!(shared.len(), whole.len());
        assert!(shared.iter().zip(whole).all(|(shared, whole)| (shared - whole).abs() < 1e-5), "{shared:?}, {whole:?}");
    }
    assert!((a.grad_norm - b.grad_norm).abs() < 1e-5 * b.grad_norm, "{} is not {}", a.grad_norm, b.grad_norm);
    assert!((a.entropy_sum - b.entropy_sum).abs() < 1e-3, "{} is not {}", a.entropy_sum, b.entropy_sum);
}

#[test]
fn two_runs_are_equal_to_the_last_bit() {
    let model = config("qwen2", true);
    let ((a, first), (b, second)) = (alone(&model, false), alone(&model, false));
    assert!(flatten(a.zero().weights()).equal(&flatten(b.zero().weights())));
    assert_eq!(first[2].loss.to_bits(), second[2].loss.to_bits());
}

#[test]
fn a_policy_that_has_not_moved_has_ratio_one() {
    let model = config("qwen2", true);
    let (_, outputs) = train(&model, 0, ProcessGroup::solo("test", device()), false, false);
    assert_eq!((outputs[0].sums.clipped_low, outputs[0].sums.clipped_high), (0.0, 0.0));
    assert!(outputs[0].grad_norm > 0.0);
}

#[test]
fn the_reference_moves_towards_the_policy() {
    let model = config("qwen2", true);
    let (mut learner, _) = alone(&model, false);
    let before = flatten(learner.reference().unwrap());
    let policy = flatten(learner.zero().weights());
    learner.sync_reference(0.6).unwrap();
    let expect = &before * 0.4 + &policy * 0.6;
    assert!(largest_difference(&flatten(learner.reference().unwrap()), &expect) < 1e-6);
    assert!(flatten(learner.zero().weights()).equal(&policy), "the policy must not move");
    learner.sync_reference(1.0).unwrap();
    assert!(largest_difference(&flatten(learner.reference().unwrap()), &policy) < 1e-6);
}
