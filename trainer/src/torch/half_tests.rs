//! A step in bf16 against the same in fp32 on the CPU. With `AHA_TEST_DEVICE=cuda` the former is on a GPU, where
//! attention, packing and reading of results are other ones.

use aha_nn::comm::ProcessGroup;
use aha_nn::model_config::ModelConfig;
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

use super::learner::{Learner, LocalBatch, StepOutput};
use super::tests::{ADAMW, device, options, policy, sequences};
use super::zero::Zero;

/// Heads as wide as variable-length attention takes them.
fn model(family: &str) -> ModelConfig {
    let raw = serde_json::json!({"model_type": family, "vocab_size": 29, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "tie_word_embeddings": family == "qwen2", "initializer_range": 0.15});
    ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
}

/// What one step says, and the gradient that it took, over all parameters.
fn step(model: &ModelConfig, kind: Kind, device: Device, checkpointing: bool) -> (StepOutput, Tensor) {
    let random = Weights::random(model, 5, 1, Kind::BFloat16, device);
    let flats = (0..random.num_units()).map(|unit_idx| random.flat(unit_idx).to_kind(kind)).collect();
    let weights = Weights::from_flats(random.manifest.clone(), flats);
    let zero = Zero::new(0, ProcessGroup::solo("half", device), weights);
    let mut learner = Learner::new(model.clone(), options(policy(0.0), checkpointing), zero, None);
    let sequences = sequences(3, false);
    let micro_batches = [vec![0, 1, 2, 5], vec![3, 4, 6]];
    let batch = LocalBatch { sequences: &sequences, micro_batches: &micro_batches, num_micro_batches: 2 };
    let output = learner.step(&batch, &ADAMW).unwrap();
    // After the first update the first moment is a multiple of the gradient.
    let moments = learner.zero().state().into_iter().filter(|state| state.name == "exp_avg");
    let flat: Vec<Tensor> = moments.map(|state| state.tensor.to_kind(Kind::Double).view([-1])).collect();
    (output, Tensor::cat(&flat, 0))
}

#[test]
fn a_step_in_bf16_is_near_the_step_in_fp32_on_the_cpu() {
    for (family, checkpointing) in [("qwen2", false), ("qwen3", true)] {
        let model = model(family);
        let (expected, exact) = step(&model, Kind::Float, Device::Cpu, false);
        let (output, half) = step(&model, Kind::BFloat16, device(), checkpointing);
        let norm = |x: &Tensor| x.square().sum(Kind::Double).double_value(&[]).sqrt();
        assert!(exact.numel() > 10_000 && norm(&exact) > 0.0);
        let difference = norm(&(&half - &exact)) / norm(&exact);
        assert!(difference < 0.05, "{family}: gradients differ by {difference} of their norm");
        let of_norm = (output.grad_norm / expected.grad_norm - 1.0).abs();
        assert!(of_norm < 0.05, "{family}: norms {} and {}", output.grad_norm, expected.grad_norm);
        let logprobs = |output: &StepOutput| output.logprobs.concat();
        for (ours, theirs) in logprobs(&output).into_iter().zip(logprobs(&expected)) {
            assert!((ours - theirs).abs() < 0.05, "{family}: log-probs {ours} and {theirs}");
        }
        assert_eq!((output.num_tokens, output.num_packed_tokens), (expected.num_tokens, expected.num_packed_tokens));
        assert!((output.entropy_sum / expected.entropy_sum - 1.0).abs() < 0.01);
    }
}
