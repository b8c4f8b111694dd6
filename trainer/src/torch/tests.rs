//! The step against plain autograd, and sharded against whole. `AHA_TEST_DEVICE=cuda` puts the learner that is alone onto
//! a GPU; what it is compared with stays on the CPU.

use std::thread;
use std::time::Duration;

use aha_core::batch::{LossType, TrainSequence};
use aha_core::config::Train;
use aha_core::objective::{ImportanceSamplingLevel, RolloutImportanceSamplingMode};
use aha_core::random::derive_seed;
use aha_nn::autograd_ops::PackedBatch;
use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};
use aha_nn::model_config::ModelConfig;
use aha_nn::optim::AdamW;
use aha_nn::rotary::RotaryTable;
use aha_nn::transformer::{Head, Layer, Ops};
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

use super::learner::{Learner, LearnerOptions, LocalBatch, StepOutput};
use super::objective::{Objective, PolicyObjective, Tokens};
use super::targets::Targets;
use super::zero::{FullState, Zero};
use crate::training_batch::Plan;

pub(super) const ADAMW: AdamW = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };

pub(super) fn config(family: &str, tied: bool) -> ModelConfig {
    let raw = serde_json::json!({"model_type": family, "vocab_size": 29, "hidden_size": 16, "intermediate_size": 22,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied,
        "initializer_range": 0.3});
    ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
}

/// Where a learner that is alone computes.
fn device() -> Device {
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
        share_prompts: true,
        max_length: 32,
        logit_rows: 7,
    }
}

fn learner(model: &ModelConfig, objective: Objective, zero: Zero, checkpointing: bool) -> Learner {
    let reference = Weights::random(model, 99, 1, Kind::Float, zero.weights().device());
    let reference = objective.needs_reference().then_some(reference);
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
    let (rank, size) = (group.rank(), group.size());
    let weights = Weights::random(model, 5, size, Kind::Float, group.device());
    let mut learner = learner(model, policy(0.05), Zero::new(stage, group, weights), checkpointing);
    let sequences = sequences(3, with_old);
    let all: Vec<usize> = (0..sequences.len()).collect();
    let settings = Train { micro_batch_tokens: 20, ..Train::default() };
    let plan = Plan::new(&sequences, &all, &settings, (rank, size)).unwrap();
    let outputs = (0..3).map(|_| learner.step(&plan.of(&sequences), &ADAMW).unwrap()).collect();
    (learner, outputs)
}

fn alone(model: &ModelConfig, checkpointing: bool) -> (Learner, Vec<StepOutput>) {
    train(model, 0, ProcessGroup::solo("test", device()), true, checkpointing)
}

/// All parameters one after the other, on the CPU.
pub(super) fn flatten(weights: &Weights) -> Tensor {
    let views: Vec<Tensor> =
        (0..weights.num_units()).flat_map(|unit_idx| weights.views(unit_idx)).map(|view| view.reshape([-1])).collect();
    Tensor::cat(&views, 0).to_device(Device::Cpu)
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
    let ((kept, a), (recomputed, b)) = (alone(&model, false), alone(&model, true));
    assert!(flatten(kept.zero().weights()).equal(&flatten(recomputed.zero().weights())));
    assert_eq!(a[2].grad_norm, b[2].grad_norm);
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
        let mut learner = Learner::new(model.clone(), options, zero, Some(reference));
        let batch = LocalBatch { sequences: &sequences, micro_batches: &[all.clone()], num_micro_batches: 1 };
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
fn every_stage_and_world_size_trains_alike() {
    let model = config("qwen2", true);
    let (whole, outputs) = alone(&model, false);
    let expected = flatten(whole.zero().weights());
    for size in [1, 2, 3] {
        for stage in [0, 1, 2] {
            let model = model.clone();
            let results = on_ranks(size, move |group| {
                let (learner, outputs) = train(&model, stage, group, true, false);
                let loss: f64 = outputs[2].loss;
                (flatten(learner.zero().weights()), loss, outputs[2].grad_norm)
            });
            for (weights, _, grad_norm) in &results {
                let difference = largest_difference(weights, &expected);
                assert!(difference < 1e-5, "{size} ranks, stage {stage}: weights differ by {difference}");
                assert!((grad_norm - outputs[2].grad_norm).abs() < 1e-5 * grad_norm);
            }
            let loss: f64 = results.iter().map(|(_, loss, _)| loss).sum();
            assert!((loss - outputs[2].loss).abs() < 1e-5, "{size} ranks, stage {stage}: {loss}");
        }
    }
}

#[test]
fn optimizer_state_moves_between_world_sizes() {
    let model = config("qwen2", true);
    let shared = model.clone();
    let shards = on_ranks(3, move |group| {
        let (learner, _) = train(&shared, 2, group, true, false);
        let state: Vec<_> =
            learner.zero().state().into_iter().map(|shard| (shard.unit_idx, shard.offset, shard.tensors)).collect();
        (flatten(learner.zero().weights()), state)
    });
    let (alone, _) = alone(&model, false);
    let mut states: Vec<FullState> = Vec::new();
    for (unit_idx, unit) in alone.zero().weights().manifest.units.iter().enumerate() {
        for name in ["exp_avg", "exp_avg_sq"] {
            let tensor = Tensor::zeros([unit.numel() as i64], (Kind::Float, Device::Cpu));
            for (_, shard) in &shards {
                for (_, offset, tensors) in shard.iter().filter(|(index, ..)| *index == unit_idx) {
                    let (_, part) = tensors.iter().find(|(known, _)| *known == name).unwrap();
                    tensor.narrow(0, *offset as i64, part.size()[0]).copy_(part);
                }
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
    let mut zero = Zero::new(1, ProcessGroup::solo("restored", device()), alone.zero().weights().copy());
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
    learner.sync_reference(0.6);
    let expect = &before * 0.4 + &policy * 0.6;
    assert!(largest_difference(&flatten(learner.reference().unwrap()), &expect) < 1e-6);
    assert!(flatten(learner.zero().weights()).equal(&policy), "the policy must not move");
    learner.sync_reference(1.0);
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
