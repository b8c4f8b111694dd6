//! Adapters beside a frozen model: unit by unit against one graph, sharded against whole, quantised against dequantised.

use std::sync::Arc;

use aha_core::batch::TrainSequence;
use aha_core::config::{InitLoraWeights, TargetModule, Train};
use aha_core::optimizer::{OptimizerKind, OptimizerOptions};
use aha_nn::autograd_ops::{PackedBatch, PromptGroup};
use aha_nn::comm::ProcessGroup;
use aha_nn::forward;
use aha_nn::lora::{self, AdapterSpec, Dropout, LoraOps, Nf4Options, Nf4Weights, fresh_adapters};
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::save_weights;
use aha_nn::optim::AdamW;
use aha_nn::rotary::RotaryTable;
use aha_nn::transformer::{Head, Layer, Ops};
use aha_nn::unit::ModelWeights;
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

use super::adapted::FrozenBase;
use super::learner::{Learner, LearnerOptions, LocalBatch, StepOutput};
use super::optimizer::LEAST_8BIT_NUMEL;
use super::parameters::{Parameters, Sharding};
use super::targets::Targets;
use super::tests::{ADAMW, SUBTRACT, config, largest_difference, on_ranks, options, policy, sequences};
use super::zero::Zero;
use crate::test_ranks::{flatten, run_ranks};
use crate::training_batch::Plan;

const SEED: u64 = 11;

/// What a test varies.
#[derive(Debug, Clone)]
struct Case {
    spec: AdapterSpec,
    dropout: f64,
    /// Recompute every so many-th layer.
    interval: Option<usize>,
}

impl Case {
    fn new(targets: &[TargetModule], use_rslora: bool, dropout: f64) -> Self {
        let spec = AdapterSpec { r: 3, alpha: 5.0, use_rslora, targets: targets.to_vec() };
        Self { spec, dropout, interval: None }
    }

    /// Adapters none of whose matrices is 0, so that all have gradients.
    fn adapters(&self, model: &ModelConfig, world_size: usize) -> Weights {
        let adapters = fresh_adapters(model, &self.spec, (InitLoraWeights::Kaiming, 1), (world_size, Device::Cpu));
        for unit_idx in 0..adapters.num_units() {
            for (index, mut view) in adapters.views(unit_idx).into_iter().enumerate() {
                let noise =
                    (Tensor::arange(view.numel() as i64, (Kind::Float, Device::Cpu)) * 1.7 + index as f64).sin();
                tch::no_grad(|| view += noise.view_as(&view) * 0.1);
            }
        }
        adapters
    }

    fn learner(&self, model: &ModelConfig, base: Box<dyn ModelWeights>, zero: Zero, is_quantised: bool) -> Learner {
        let options = LearnerOptions {
            max_grad_norm: 0.0,
            gradient_checkpointing_interval: self.interval.unwrap_or(1),
            ..options(policy(0.05), self.interval.is_some())
        };
        let (spec, dropout) = (self.spec.clone(), self.dropout);
        let base = FrozenBase { weights: base, is_quantised, spec, dropout, seed: SEED };
        Learner::of_adapters(model.clone(), options, zero, base)
    }
}

fn base(model: &ModelConfig, kind: Kind) -> Weights {
    Weights::random(model, 5, 1, kind, Device::Cpu)
}

fn solo(stage: u8, adapters: Weights) -> Zero {
    Zero::new(stage, ProcessGroup::solo("test", Device::Cpu), adapters)
}

fn steps(learner: &mut Learner, num_steps: usize, adamw: &AdamW) -> Vec<StepOutput> {
    let sequences = sequences(3, true);
    let all: Vec<usize> = (0..sequences.len()).collect();
    let settings = Train { micro_batch_tokens: 20, ..Train::default() };
    let group = learner.zero().group();
    let plan = Plan::new(&sequences, &all, &settings, (group.rank(), group.size())).unwrap();
    (0..num_steps).map(|_| learner.step(&plan.of(&sequences), adamw).unwrap()).collect()
}

/// Log-probs of a sequence's completion tokens on one graph, in f64. Without dropout the adapters are merged into the
/// weights, with it they stand beside them.
fn logprobs(
    model: &ModelConfig,
    frozen: &[Vec<Tensor>],
    adapters: Option<(&Case, &[Vec<Tensor>])>,
    sequence: &TrainSequence,
) -> Tensor {
    let packed = PackedBatch::new(&[&sequence.token_ids], &RotaryTable::new(model, 32, Device::Cpu), Kind::Double);
    let unit = |unit_idx: usize| frozen[unit_idx].iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
    let embedding = unit(0).remove(0);
    let mut x = packed.embed(&embedding);
    for layer_idx in 0..model.num_layers {
        let base = unit(1 + layer_idx);
        x = match adapters {
            Some((case, adapters)) if case.dropout > 0.0 => {
                let group = PromptGroup { prompt: &sequence.token_ids, completions: Vec::new() };
                let dropout = Dropout::new(case.dropout, (SEED, 0), &[group]);
                let scale = case.spec.scale();
                let ops = LoraOps { packed: &packed, scale, dropout: Some(&dropout), layer_idx };
                let layer = lora::layer(model, &case.spec, base, &adapters[layer_idx]);
                layer.forward(&ops, model, layer_idx, x)
            }
            _ => {
                let merged = |weight: &Tensor, target: TargetModule| {
                    let (case, adapters) = adapters?;
                    let index = case.spec.targets.iter().position(|&known| known == target)?;
                    let [a, b] = [2 * index, 2 * index + 1].map(|index| &adapters[layer_idx][index]);
                    let rank = case.spec.r as f64;
                    let scale = case.spec.alpha / if case.spec.use_rslora { rank.sqrt() } else { rank };
                    Some(weight + b.matmul(a) * scale)
                };
                let mut targets = TargetModule::ALL.into_iter();
                let layer =
                    Layer::new(model, base, |weight| merged(&weight, targets.next().unwrap()).unwrap_or(weight).into());
                layer.forward(&packed, model, layer_idx, x)
            }
        };
    }
    let head = Head::new(unit(1 + model.num_layers), |weight| weight);
    let x = Tensor::from(packed.rms_norm(&x, &head.norm, model.rms_norm_eps));
    let matrix = head.lm_head.map_or(embedding, |projection| projection.weight);
    let (first, count) = (sequence.num_prompt_tokens as i64, sequence.num_completion_tokens() as i64);
    let logits = x.matmul(&matrix.transpose(0, 1)) / 0.8;
    let targets = packed.tokens.narrow(0, first, count).unsqueeze(1);
    logits.narrow(0, first - 1, count).log_softmax(-1, Kind::Double).gather(1, &targets, false).squeeze_dim(1)
}

/// The loss and the gradients of all adapters by whole-graph autograd in f64; the reference policy is the base alone.
fn whole_graph(model: &ModelConfig, case: &Case, base: &Weights, adapters: &Weights) -> (f64, Vec<Tensor>) {
    let double = |weights: &Weights, unit_idx| -> Vec<Tensor> {
        weights.views(unit_idx).iter().map(|view| view.detach().to_kind(Kind::Double)).collect()
    };
    let frozen: Vec<Vec<Tensor>> = (0..base.num_units()).map(|unit_idx| double(base, unit_idx)).collect();
    let leaves: Vec<Vec<Tensor>> = (0..adapters.num_units())
        .map(|unit_idx| double(adapters, unit_idx).into_iter().map(|view| view.set_requires_grad(true)).collect())
        .collect();
    let mut loss = Tensor::zeros([], (Kind::Double, Device::Cpu));
    for sequence in &sequences(3, true) {
        let ours = logprobs(model, &frozen, Some((case, &leaves)), sequence);
        let theirs = logprobs(model, &frozen, None, sequence);
        let stream = |values: &[f32]| Tensor::from_slice(values).to_kind(Kind::Double);
        let (advantages, old) = (stream(&sequence.advantages), stream(&sequence.old_logprobs));
        let ratio = (&ours - old).exp();
        let surrogate = (&ratio * &advantages).minimum(&(ratio.clamp(0.8, 1.3) * &advantages));
        let kl = (&theirs - &ours).exp() - (theirs - &ours) - 1.0;
        loss += ((-surrogate + kl * 0.05) * stream(&sequence.weights)).sum(Kind::Double);
    }
    let flat: Vec<Tensor> = leaves.into_iter().flatten().collect();
    let grads = Tensor::run_backward(&[&loss], &flat, false, false);
    (loss.double_value(&[]), grads)
}

#[test]
fn gradients_equal_whole_graph_autograd() {
    use TargetModule::{Down, Gate, K, O, Q, V};
    let cases = [
        Case::new(&TargetModule::ALL, false, 0.0),
        Case::new(&[Q, V], true, 0.0),
        Case::new(&[K, O, Gate, Down], false, 0.0),
        Case::new(&TargetModule::ALL, true, 0.4),
        Case::new(&[Q, Down], false, 0.2),
    ];
    for (family, tied) in [("qwen2", true), ("qwen3", false), ("llama", false)] {
        for case in &cases {
            let model = config(family, tied);
            let (base, adapters) = (base(&model, Kind::Float), case.adapters(&model, 1));
            let (loss, grads) = whole_graph(&model, case, &base, &adapters);
            let expect = Tensor::cat(&grads.iter().map(|grad| grad.reshape([-1])).collect::<Vec<_>>(), 0);
            let before = flatten(&adapters);
            for interval in [None, Some(1), Some(2)] {
                let case = Case { interval, ..case.clone() };
                let zero = solo(0, adapters.copy());
                let mut learner = case.learner(&model, Box::new(base.copy()), zero, false);
                let output = steps(&mut learner, 1, &SUBTRACT).remove(0);
                assert!((output.loss - loss).abs() < 1e-5, "{family}, {case:?}: {} is not {loss}", output.loss);
                let found = before.to_kind(Kind::Double) - flatten(learner.zero().weights()).to_kind(Kind::Double);
                let difference = largest_difference(&found, &expect);
                assert!(difference < 1e-5, "{family}, {case:?}: gradients differ by {difference}");
                let norm = expect.norm().double_value(&[]);
                assert!(norm > 0.01 && (output.grad_norm - norm).abs() < 1e-4 * norm, "{family}, {case:?}: {norm}");
            }
        }
    }
}

#[test]
fn adapters_alone_change() {
    let model = config("qwen2", true);
    let case = Case::new(&TargetModule::ALL, false, 0.1);
    let fresh = || fresh_adapters(&model, &case.spec, (InitLoraWeights::Kaiming, 1), (1, Device::Cpu));
    let mut learner = case.learner(&model, Box::new(base(&model, Kind::Float)), solo(2, fresh()), false);
    steps(&mut learner, 2, &ADAMW);
    for unit_idx in 0..model.num_layers {
        let unit = learner.zero().weights().unit(unit_idx).unwrap();
        for (now, before) in unit.params().iter().zip(fresh().views(unit_idx)) {
            assert!(!now.equal(&before));
        }
    }
    // The base under the policy is what it was: embedding, head, norms and biases are part of it, and only matrices moved.
    let (policy, base) = (learner.policy(), base(&model, Kind::Float));
    for (unit_idx, unit) in base.manifest.units.iter().enumerate() {
        let pairs = policy.unit(unit_idx).unwrap().params().into_iter().zip(base.views(unit_idx));
        for ((now, before), spec) in pairs.zip(&unit.params) {
            let is_adapted = spec.name.ends_with("_proj.weight");
            assert_eq!(now.equal(&before), !is_adapted, "{}", spec.name);
        }
    }
}

#[test]
fn the_merged_policy_says_what_base_and_adapters_say() {
    for (family, tied) in [("qwen2", true), ("qwen3", false)] {
        let model = config(family, tied);
        let case = Case::new(&TargetModule::ALL, true, 0.3);
        let learner =
            case.learner(&model, Box::new(base(&model, Kind::Float)), solo(0, case.adapters(&model, 1)), false);
        let sequences = sequences(3, true);
        let groups: Vec<Vec<usize>> = (0..sequences.len()).map(|index| vec![index]).collect();
        let batch = LocalBatch { sequences: &sequences, micro_batches: &groups, num_micro_batches: groups.len() };
        let found = learner.statistics(&batch).unwrap().logprobs;
        for (index, sequence) in sequences.iter().enumerate() {
            let packed =
                PackedBatch::new(&[&sequence.token_ids], &RotaryTable::new(&model, 32, Device::Cpu), Kind::Float);
            let targets = Targets::new(&sequences, &groups[index..=index], Device::Cpu);
            let places = (&targets.rows, &targets.tokens);
            let (merged, _) = forward::statistics(&model, &*learner.policy(), &packed, places, 0.8).unwrap();
            let difference = largest_difference(&merged, &Tensor::from_slice(&found[index]));
            assert!(difference < 1e-5, "{family}, sequence {index}: {difference}");
        }
    }
}

#[test]
fn every_stage_and_world_size_trains_alike() {
    let model = config("qwen2", true);
    for dropout in [0.0, 0.3] {
        let case = Case::new(&TargetModule::ALL, false, dropout);
        let mut alone =
            case.learner(&model, Box::new(base(&model, Kind::Float)), solo(0, case.adapters(&model, 1)), false);
        let outputs = steps(&mut alone, 3, &ADAMW);
        let expected = flatten(alone.zero().weights());
        for size in [1, 2, 3] {
            for stage in [0, 1, 2] {
                let (model, case) = (model.clone(), case.clone());
                let results = on_ranks(size, move |group| {
                    let zero = Zero::new(stage, group, case.adapters(&model, size));
                    let mut learner = case.learner(&model, Box::new(base(&model, Kind::Float)), zero, false);
                    let outputs = steps(&mut learner, 3, &ADAMW);
                    (flatten(learner.zero().weights()), outputs[2].loss, outputs[2].grad_norm)
                });
                for (weights, _, grad_norm) in &results {
                    let difference = largest_difference(weights, &expected);
                    assert!(difference < 2e-5, "{size} ranks, stage {stage}: adapters differ by {difference}");
                    assert!((grad_norm - outputs[2].grad_norm).abs() < 1e-4 * grad_norm, "{size} ranks, stage {stage}");
                }
                let loss: f64 = results.iter().map(|(_, loss, _)| loss).sum();
                assert!((loss - outputs[2].loss).abs() < 1e-5, "{size} ranks, stage {stage}: {loss}");
            }
        }
    }
}

/// As for whole models: gradients of one split differ from those of another in their last bits, which Muon takes into
/// bf16, and 8 bits into a neighbouring value. The gradients of the matrices that begin as zeros are small, and Muon makes
/// them as large as the others.
#[test]
fn every_optimizer_trains_adapters_alike_on_every_stage_and_world_size() {
    let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 29, "hidden_size": 32, "intermediate_size": 260,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3});
    let model = ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap();
    let mut case = Case::new(&TargetModule::ALL, false, 0.0);
    // Wide enough that some of the matrices have moments of 8 bits.
    case.spec.r = 16;
    let units = case.spec.manifest(&model).units;
    assert!(units[0].params.iter().any(|param| param.numel() >= LEAST_8BIT_NUMEL));
    for (kind, tolerance) in
        [(OptimizerKind::Adamw, 1e-4), (OptimizerKind::Adamw8bit, 0.02), (OptimizerKind::Muon, 0.05)]
    {
        let train = |group: ProcessGroup, sharding: Sharding| {
            let group = Arc::new(group);
            let adapters = Parameters::of(sharding, &group, case.adapters(&model, group.size()));
            let options = OptimizerOptions { kind, ..OptimizerOptions::default() };
            let zero = Zero::with(sharding, group, adapters, &options).unwrap();
            let mut learner = case.learner(&model, Box::new(base(&model, Kind::Float)), zero, false);
            steps(&mut learner, 3, &ADAMW);
            let state: Vec<&str> = learner.zero().state().iter().map(|shard| shard.name).collect();
            (flatten(learner.zero().weights()), state)
        };
        let (expected, state) = train(ProcessGroup::solo("test", Device::Cpu), 0.into());
        let of_kind = match kind {
            OptimizerKind::Adamw => "exp_avg",
            OptimizerKind::Adamw8bit => "exp_avg_codes",
            OptimizerKind::Muon => "momentum_buffer",
        };
        assert!(state.contains(&of_kind), "{kind:?} keeps {state:?}");
        let moved = (&expected - flatten(&case.adapters(&model, 1))).norm().double_value(&[]);
        for size in [1, 2, 3] {
            for stage in [0, 1, 2] {
                let place = format!("{kind:?}, {size} ranks, stage {stage}");
                let results = run_ranks(size, |group| train(group, stage.into()).0);
                // Muon's state is not offloaded, which the configuration refuses by name.
                let offload_optimizer = kind != OptimizerKind::Muon;
                let offloaded = Sharding { stage, offload_optimizer, offload_params: false };
                let elsewhere = run_ranks(size, |group| train(group, offloaded).0);
                for weights in results.iter().chain(&elsewhere) {
                    assert!(weights.equal(&results[0]), "{place}: ranks differ, or offloading makes a difference");
                }
                let difference = (&results[0] - &expected).norm().double_value(&[]);
                assert!(difference < tolerance * moved, "{place}: adapters differ by {difference} of {moved}");
            }
        }
    }
}

#[test]
fn a_quantised_base_trains_as_the_same_base_dequantised() {
    let model = config("qwen3", true);
    let case = Case::new(&TargetModule::ALL, false, 0.2);
    let folder = tempfile::tempdir().unwrap();
    save_weights(folder.path(), &model, &base(&model, Kind::Float)).unwrap();
    for double_quant in [false, true] {
        let options = Nf4Options { double_quant };
        let load = || Nf4Weights::load(folder.path(), &model, options, (Kind::Float, Device::Cpu)).unwrap();
        let (quantised, dequantised) = (load(), base(&model, Kind::Float));
        for unit_idx in 0..dequantised.num_units() {
            let unit = quantised.unit(unit_idx).unwrap();
            let is_layer = (1..=model.num_layers).contains(&unit_idx);
            // Beyond the quantised one there is no padding.
            let mut flat = dequantised.flat(unit_idx).narrow(0, 0, unit.flat().numel() as i64);
            assert_eq!(unit.flat().equal(&flat), !is_layer, "unit {unit_idx}");
            tch::no_grad(|| flat.copy_(unit.flat()));
        }
        let train = |base: Box<dyn ModelWeights>, is_quantised| {
            let mut learner = case.learner(&model, base, solo(2, case.adapters(&model, 1)), is_quantised);
            let outputs = steps(&mut learner, 3, &ADAMW);
            (flatten(learner.zero().weights()), outputs[2].loss)
        };
        let (from_quantised, from_dequantised) =
            (train(Box::new(quantised), true), train(Box::new(dequantised), false));
        assert!(from_quantised.0.equal(&from_dequantised.0));
        assert_eq!(from_quantised.1.to_bits(), from_dequantised.1.to_bits());
    }
}

#[test]
fn a_base_of_bf16_keeps_its_adapters_in_fp32() {
    let model = config("qwen2", true);
    let case = Case::new(&TargetModule::ALL, false, 0.0);
    let train = |kind| {
        let mut learner = case.learner(&model, Box::new(base(&model, kind)), solo(2, case.adapters(&model, 1)), false);
        let output = steps(&mut learner, 1, &SUBTRACT).remove(0);
        assert_eq!(learner.zero().weights().kind(), Kind::Float);
        assert_eq!(learner.kind(), kind);
        (flatten(learner.zero().weights()), output.grad_norm)
    };
    let ((exact, norm), (rounded, rounded_norm)) = (train(Kind::Float), train(Kind::BFloat16));
    assert!((norm - rounded_norm).abs() < 0.05 * norm, "{rounded_norm} is not {norm}");
    let difference = (exact - rounded).norm().double_value(&[]);
    // Beside rounding, a token whose ratio is at a bound may be clipped in one and not in the other.
    assert!(difference < 0.2 * norm, "gradients of norm {norm} differ by {difference}");
}
