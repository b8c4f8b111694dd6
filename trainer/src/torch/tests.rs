//! The step against plain autograd, and sharded against whole. `AHA_TEST_DEVICE=cuda` puts the learner that is alone onto
//! a GPU; what it is compared with stays on the CPU.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use aha_core::batch::{LossType, TrainSequence};
use aha_core::config::Train;
use aha_core::manifest::UnitSpec;
use aha_core::objective::{ImportanceSamplingLevel, RolloutImportanceSamplingMode};
use aha_core::optimizer::{OptimizerKind, OptimizerOptions};
use aha_core::random::derive_seed;
use aha_nn::autograd_ops::PackedBatch;
use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};
use aha_nn::model_config::ModelConfig;
use aha_nn::optim::AdamW;
use aha_nn::rotary::RotaryTable;
use aha_nn::transformer::{Head, Layer, Ops};
use aha_nn::unit::ModelWeights;
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

use super::emulated_gpu::with_gpu;
use super::learner::{Learner, LearnerOptions, LocalBatch, StepOutput};
use super::objective::{Objective, PolicyObjective, Tokens};
use super::parameters::{Parameters, Sharding};
use super::targets::Targets;
use super::zero::{FullState, ShardState, Zero};
use crate::test_ranks::{flatten, run_ranks};
use crate::training_batch::Plan;

pub(super) const ADAMW: AdamW = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };

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

/// A copy that shares no memory.
fn copy(weights: &Parameters) -> Weights {
    let units = 0..weights.manifest().units.len();
    let flats = units.map(|unit_idx| weights.unit(unit_idx).unwrap().flat().copy()).collect();
    Weights::from_flats(weights.manifest().clone(), flats)
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

/// The loss and its gradients by whole-graph autograd, with full logits and the formulas written out in f64.
fn reference_gradients(model: &ModelConfig, weights: &Weights, sequences: &[TrainSequence]) -> (f64, Vec<Tensor>) {
    let leaves: Vec<Vec<Tensor>> = (0..weights.num_units())
        .map(|unit_idx| {
            weights.views(unit_idx).iter().map(|view| view.to_kind(Kind::Double).set_requires_grad(true)).collect()
        })
        .collect();
    let views = |unit_idx: usize| leaves[unit_idx].iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
    let table = RotaryTable::new(model, 32, Device::Cpu);
    let reference = Weights::random(model, 99, 1, Kind::Float, Device::Cpu);
    let mut loss = Tensor::zeros([], (Kind::Double, Device::Cpu));
    for sequence in sequences {
        let packed = PackedBatch::new(&[&sequence.token_ids], &table, Kind::Double);
        let frozen: Vec<Vec<Tensor>> = (0..reference.num_units())
            .map(|unit_idx| reference.views(unit_idx).iter().map(|view| view.to_kind(Kind::Double)).collect())
            .collect();
        let logprobs = |views: &dyn Fn(usize) -> Vec<Tensor>| {
            let embedding = views(0).remove(0);
            let mut x = packed.embed(&embedding);
            for layer_idx in 0..model.num_layers {
                x = Layer::new(model, views(1 + layer_idx), |weight| weight).forward(&packed, model, layer_idx, x);
            }
            let head = Head::new(views(1 + model.num_layers), |weight| weight);
            let x = packed.rms_norm(&x, &head.norm, model.rms_norm_eps);
            let matrix = head.lm_head.map_or(embedding, |projection| projection.weight);
            let first = sequence.num_prompt_tokens as i64;
            let count = sequence.num_completion_tokens() as i64;
            let logits = x.matmul(&matrix.transpose(0, 1)) / 0.8;
            let targets = packed.tokens.narrow(0, first, count).unsqueeze(1);
            logits.narrow(0, first - 1, count).log_softmax(-1, Kind::Double).gather(1, &targets, false).squeeze_dim(1)
        };
        let ours = logprobs(&views);
        let theirs = logprobs(&|unit_idx| frozen[unit_idx].iter().map(Tensor::shallow_clone).collect());
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
fn the_step_equals_whole_graph_autograd() {
    check_step();
}

#[test]
fn the_step_by_the_kernels_of_a_gpu_equals_whole_graph_autograd() {
    with_gpu(device(), Kind::Float, check_step);
}

/// Of one micro-batch in `kind`: what it did, and the learner after it.
fn one_step(kind: Kind) -> (StepOutput, Learner) {
    let model = config("qwen3", true);
    let weights = Weights::random(&model, 5, 1, Kind::Float, Device::Cpu);
    let mut own = Weights::zeros(model.manifest(), 1, kind, device());
    for unit_idx in 0..own.num_units() {
        for (mut own, weight) in own.views(unit_idx).into_iter().zip(weights.views(unit_idx)) {
            tch::no_grad(|| own.copy_(&weight.to_kind(Kind::BFloat16)));
        }
    }
    let zero = Zero::new(0, ProcessGroup::solo("one", device()), own);
    let mut learner = self::learner(&model, policy(0.0), zero, false);
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

fn check_step() {
    for (family, tied) in [("qwen2", true), ("qwen3", false), ("llama", false)] {
        let model = config(family, tied);
        let weights = Weights::random(&model, 5, 1, Kind::Float, Device::Cpu);
        let (loss, grads) = reference_gradients(&model, &weights, &sequences(3, true));
        let norm: f64 = grads.iter().map(|grad| grad.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
        let (learner, outputs) = alone(&model, false);
        assert!((outputs[0].loss - loss).abs() < 1e-5, "{family}: {} is not {loss}", outputs[0].loss);
        assert!((outputs[0].grad_norm - norm).abs() < 1e-4 * norm, "{family}: {} is not {norm}", outputs[0].grad_norm);

        // One clipped AdamW step by the formula: at step 1 the moments' bias corrections cancel.
        let scale = (0.5 / (norm + 1e-6)).min(1.0);
        let own = Weights::random(&model, 5, 1, Kind::Float, device());
        let zero = Zero::new(0, ProcessGroup::solo("one", device()), own);
        let mut one = self::learner(&model, policy(0.05), zero, false);
        let sequences = sequences(3, true);
        let all: Vec<usize> = (0..sequences.len()).collect();
        let batch = LocalBatch { sequences: &sequences, micro_batches: &[all], num_micro_batches: 1 };
        one.step(&batch, &ADAMW).unwrap();
        let expected: Vec<Tensor> = (0..weights.num_units())
            .flat_map(|unit_idx| weights.views(unit_idx))
            .zip(&grads)
            .map(|(weight, grad)| {
                let grad = grad * scale;
                let decay = if weight.dim() == 2 { ADAMW.lr * ADAMW.weight_decay } else { 0.0 };
                let update = &grad / (grad.abs() + ADAMW.eps) * ADAMW.lr;
                (weight.to_kind(Kind::Double) * (1.0 - decay) - update).reshape([-1])
            })
            .collect();
        // Adam's first update is the gradient's sign: elements whose gradient is rounding noise are left out.
        let large = Tensor::cat(&grads.iter().map(|grad| grad.abs().gt(1e-6).reshape([-1])).collect::<Vec<_>>(), 0);
        let difference = (flatten(one.zero().weights()) - Tensor::cat(&expected, 0)).abs() * large;
        assert!(difference.max().double_value(&[]) < 2e-5, "{family}: {difference}");
        drop(learner);
    }
}

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

/// Log-softmax of the logits at every completion token of all sequences, `[M, V]`, on one graph with `leaves`.
fn whole_graph(model: &ModelConfig, leaves: &[Vec<Tensor>], sequences: &[TrainSequence]) -> Tensor {
    let views = |unit_idx: usize| leaves[unit_idx].iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
    let table = RotaryTable::new(model, 32, Device::Cpu);
    let rows = sequences.iter().map(|sequence| {
        let packed = PackedBatch::new(&[&sequence.token_ids], &table, Kind::Float);
        let embedding = views(0).remove(0);
        let mut x = packed.embed(&embedding);
        for layer_idx in 0..model.num_layers {
            x = Layer::new(model, views(1 + layer_idx), |weight| weight).forward(&packed, model, layer_idx, x);
        }
        let head = Head::new(views(1 + model.num_layers), |weight| weight);
        let x = packed.rms_norm(&x, &head.norm, model.rms_norm_eps);
        let matrix = head.lm_head.map_or(embedding, |projection| projection.weight);
        let (first, count) = (sequence.num_prompt_tokens as i64, sequence.num_completion_tokens() as i64);
        (x.matmul(&matrix.transpose(0, 1)) / 0.8).narrow(0, first - 1, count).log_softmax(-1, Kind::Float)
    });
    Tensor::cat(&rows.collect::<Vec<_>>(), 0)
}

#[test]
fn objectives_of_sequences_and_entropies_equal_whole_graph_autograd() {
    let gspo = Train {
        importance_sampling_level: ImportanceSamplingLevel::Sequence,
        rollout_importance_sampling_correction: true,
        rollout_importance_sampling_mode: RolloutImportanceSamplingMode::SequenceTruncate,
        ..Train::default()
    };
    let vespo = Train { loss_type: LossType::Vespo, ..Train::default() };
    let token = Train { use_bias_correction_kl: true, beta: 0.1, ..Train::default() };
    for (train, with_old) in [(&gspo, true), (&gspo, false), (&vespo, true), (&token, true), (&token, false)] {
        let model = config("qwen2", true);
        let mut sequences = sequences(3, with_old);
        for (index, sequence) in sequences.iter_mut().enumerate() {
            let len = sequence.num_completion_tokens();
            sequence.advantages = vec![index as f32 - 3.2; len];
            sequence.sampled_logprobs = vec![-3.3; len];
            sequence.entropy_weights = (0..len).map(|token| 0.01 * (token % 3) as f32).collect();
        }
        let weights = Weights::random(&model, 5, 1, Kind::Float, Device::Cpu);
        let leaf = |view: &Tensor| view.detach().copy().set_requires_grad(true);
        let leaves: Vec<Vec<Tensor>> =
            (0..weights.num_units()).map(|unit_idx| weights.views(unit_idx).iter().map(leaf).collect()).collect();
        let reference = Weights::random(&model, 99, 1, Kind::Float, Device::Cpu);
        let frozen: Vec<Vec<Tensor>> = (0..reference.num_units()).map(|unit_idx| reference.views(unit_idx)).collect();
        let all: Vec<usize> = (0..sequences.len()).collect();
        let alone: Vec<Vec<usize>> = all.iter().map(|&index| vec![index]).collect();
        let targets = Targets::new(&sequences, &alone, Device::Cpu);
        let choose = |rows: &Tensor| rows.gather(1, &targets.tokens.unsqueeze(1), false).squeeze_dim(1);
        let rows = whole_graph(&model, &leaves, &sequences); // [M, V]
        let mut streams = targets.streams(&sequences);
        streams.reference_logprobs = Some(choose(&whole_graph(&model, &frozen, &sequences)));
        let tokens = Tokens {
            logprobs: choose(&rows),
            entropies: Some(-(rows.exp() * &rows).sum_dim_intlist(-1, false, Kind::Float)),
        };
        let loss = objective(train).loss(&tokens, &streams).loss;
        let grads = Tensor::run_backward(
            &[&loss],
            &leaves.iter().flatten().map(Tensor::shallow_clone).collect::<Vec<_>>(),
            false,
            false,
        );
        let norm: f64 = grads.iter().map(|grad| grad.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();

        let solo = ProcessGroup::solo("test", Device::Cpu);
        let mut learner = learner(&model, objective(train), Zero::new(0, solo, weights), false);
        let settings = Train { micro_batch_tokens: 20, ..Train::default() };
        let plan = Plan::new(&sequences, &all, &settings, (0, 1)).unwrap();
        let output = learner.step(&plan.of(&sequences), &ADAMW).unwrap();
        let expect = loss.double_value(&[]);
        assert!((output.loss - expect).abs() < 1e-5, "{train:?}: {} is not {expect}", output.loss);
        assert!((output.grad_norm - norm).abs() < 1e-4 * norm, "{train:?}: {} is not {norm}", output.grad_norm);
    }
}
