//! Weights that are lent, as they are to an engine in this process.

use std::sync::Arc;

use aha_core::config::Train;
use aha_core::optimizer::{OptimizerKind, OptimizerOptions};
use aha_nn::comm::ProcessGroup;
use aha_nn::model_config::ModelConfig;
use aha_nn::unit::ModelWeights;
use aha_nn::weights::Weights;
use tch::Kind;

use super::{ADAMW, config, learner, policy, sequences};
use crate::test_ranks::{flatten, run_ranks};
use crate::torch::learner::Learner;
use crate::torch::parameters::{Parameters, Sharding};
use crate::torch::zero::Zero;
use crate::training_batch::Plan;

/// In bf16, as on a GPU.
fn half_learner(model: &ModelConfig, sharding: Sharding, kind: OptimizerKind, group: ProcessGroup) -> Learner {
    let group = Arc::new(group);
    let weights = Weights::random(model, 5, group.size(), Kind::BFloat16, group.device());
    let weights = Parameters::of(sharding, &group, weights);
    let options = OptimizerOptions { kind, ..OptimizerOptions::default() };
    learner(model, policy(0.0), Zero::with(sharding, group, weights, &options).unwrap(), false)
}

#[test]
fn lent_weights_stay_where_they_are_and_are_not_written_before_they_are_back() {
    let model = config("qwen2", true);
    let kinds = [OptimizerKind::Adamw, OptimizerKind::Adamw8bit, OptimizerKind::Muon];
    let offloaded = Sharding { offload_optimizer: true, ..Sharding::from(2) };
    let whole = [(1, 0.into()), (1, 3.into()), (2, 0.into()), (2, 1.into()), (2, 2.into()), (2, offloaded)];
    for ((size, sharding), kind) in whole.into_iter().flat_map(|case| kinds.map(|kind| (case, kind))) {
        run_ranks(size, |group| check_loans(half_learner(&model, sharding, kind, group)));
    }
}

fn check_loans(mut learner: Learner) {
    let world = (learner.zero().group().rank(), learner.zero().group().size());
    let sequences = sequences(3, true);
    let all: Vec<usize> = (0..sequences.len()).collect();
    let plan = Plan::new(&sequences, &all, &Train { micro_batch_tokens: 20, ..Train::default() }, world).unwrap();
    let addresses = |learner: &Learner| {
        let weights = learner.zero().weights();
        let unit = |unit_idx| weights.unit(unit_idx).unwrap().flat().data_ptr();
        (0..weights.manifest().units.len()).map(unit).collect::<Vec<_>>()
    };
    let before = addresses(&learner);
    for _ in 0..2 {
        let loan = learner.policy().lend().unwrap().expect("every rank has them whole");
        let old = flatten(learner.zero().weights());
        let error = learner.step(&plan.of(&sequences), &ADAMW).unwrap_err().to_string();
        assert!(error.contains("must sleep before they are updated"), "{error}");
        assert!(flatten(learner.zero().weights()).equal(&old));
        drop(loan);
        learner.zero_mut().zero_gradients();
        learner.step(&plan.of(&sequences), &ADAMW).unwrap();
        assert!(!flatten(learner.zero().weights()).equal(&old));
        assert_eq!(addresses(&learner), before);
    }
}

#[test]
fn shards_are_not_lent() {
    let model = config("qwen2", true);
    let offloaded = Sharding { offload_params: true, ..Sharding::from(3) };
    for (size, sharding) in [(2, Sharding::from(3)), (1, offloaded)] {
        run_ranks(size, |group| {
            let learner = half_learner(&model, sharding, OptimizerKind::Adamw, group);
            assert!(learner.policy().lend().unwrap().is_none() && !learner.zero().weights().is_lent());
        });
    }
}
