//! The step by the kernels of a GPU, which run on the CPU where there is none.

use aha_nn::comm::ProcessGroup;
use aha_nn::unit::ModelWeights;
use aha_nn::weights::Weights;
use tch::{Device, Kind};

use super::whole_graph::check_step;
use super::{ADAMW, config, device, learner, policy, sequences};
use crate::torch::emulated_gpu::with_gpu;
use crate::torch::learner::{Learner, LocalBatch, StepOutput};
use crate::torch::zero::Zero;

#[test]
fn the_step_by_the_kernels_of_a_gpu_equals_whole_graph_autograd() {
    with_gpu(device(), Kind::Float, check_step);
}

/// Of one micro-batch in `kind`: what it did, and the learner after it.
fn one_step(kind: Kind) -> (StepOutput, Learner) {
    let model = config("qwen3", true);
    let weights = Weights::random(&model, 5, 1, Kind::Float, Device::Cpu);
    let own = Weights::zeros(model.manifest(), 1, kind, device());
    for unit_idx in 0..own.num_units() {
        for (mut own, weight) in own.views(unit_idx).into_iter().zip(weights.views(unit_idx)) {
            tch::no_grad(|| own.copy_(&weight.to_kind(Kind::BFloat16)));
        }
    }
    let zero = Zero::new(0, ProcessGroup::solo("one", device()), own);
    let mut learner = learner(&model, policy(0.0), zero, false);
    let sequences = sequences(3, true);
    let all: Vec<usize> = (0..sequences.len()).collect();
    let batch = LocalBatch { sequences: &sequences, micro_batches: &[all], num_micro_batches: 1 };
    (learner.step(&batch, &ADAMW).unwrap(), learner)
}

#[test]
fn a_step_in_bf16_by_the_kernels_of_a_gpu_is_as_near_to_fp32_as_libtorchs() {
    let (exact, _) = one_step(Kind::Float);
    let (unfused, _) = one_step(Kind::BFloat16);
    let (ours, learner) = with_gpu(device(), Kind::BFloat16, || one_step(Kind::BFloat16));
    let error = |output: &StepOutput| {
        let pairs = output.logprobs.iter().flatten().zip(exact.logprobs.iter().flatten());
        let squares: Vec<f64> = pairs.map(|(ours, exact)| f64::from(ours - exact).powi(2)).collect();
        (squares.iter().sum::<f64>() / squares.len() as f64).sqrt()
    };
    assert!(error(&ours) < 1.1 * error(&unfused), "{} is over {}", error(&ours), error(&unfused));
    assert!((ours.loss - exact.loss).abs() < 0.02, "{} is not {}", ours.loss, exact.loss);
    assert!((ours.grad_norm / exact.grad_norm - 1.0).abs() < 0.03, "{} is not {}", ours.grad_norm, exact.grad_norm);

    // The update's copy is its fp32 weights, rounded.
    for state in learner.zero().state().iter().filter(|state| state.name == "master") {
        let unit = learner.zero().weights().unit(state.unit_idx).unwrap();
        let weights = unit.flat().narrow(0, 0, state.tensor.numel() as i64).to_device(Device::Cpu);
        assert_eq!(weights.kind(), Kind::BFloat16);
        assert!(weights.equal(&state.tensor.to_kind(Kind::BFloat16)), "unit {}", state.unit_idx);
    }
}
