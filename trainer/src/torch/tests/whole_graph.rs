//! The step against autograd over one graph with full logits.

use aha_core::batch::{LossType, TrainSequence};
use aha_core::config::Train;
use aha_core::objective::{ImportanceSamplingLevel, RolloutImportanceSamplingMode};
use aha_nn::autograd_ops::PackedBatch;
use aha_nn::comm::ProcessGroup;
use aha_nn::fused_ops::TrainedMatrix;
use aha_nn::model_config::ModelConfig;
use aha_nn::rotary::RotaryTable;
use aha_nn::transformer::{Head, Layer, Ops};
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

use super::{ADAMW, alone, config, device, learner, objective, policy, sequences};
use crate::test_ranks::flatten;
use crate::torch::learner::LocalBatch;
use crate::torch::objective::Tokens;
use crate::torch::targets::Targets;
use crate::torch::zero::Zero;
use crate::training_batch::Plan;

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
            let (first, count) = (sequence.num_prompt_tokens as i64, sequence.num_completion_tokens() as i64);
            let logits = logits(model, views, &packed).narrow(0, first - 1, count);
            let targets = packed.tokens.narrow(0, first, count).unsqueeze(1);
            logits.log_softmax(-1, Kind::Double).gather(1, &targets, false).squeeze_dim(1)
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

pub(super) fn check_step() {
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

/// Over the temperature, `[N, V]`; `views` gives the parameters of a unit.
fn logits(model: &ModelConfig, views: &dyn Fn(usize) -> Vec<Tensor>, packed: &PackedBatch) -> Tensor {
    let embedding = views(0).remove(0);
    let mut x = packed.embed(&embedding);
    for layer_idx in 0..model.num_layers {
        x = Layer::new(model, views(1 + layer_idx), TrainedMatrix::from).forward(packed, model, layer_idx, x);
    }
    let head = Head::new(views(1 + model.num_layers), |weight| weight);
    let x = Tensor::from(packed.rms_norm(&x, &head.norm, model.rms_norm_eps));
    let matrix = head.lm_head.map_or(embedding, |projection| projection.weight);
    x.matmul(&matrix.transpose(0, 1)) / 0.8
}

/// Log-softmax of the logits at every completion token of all sequences, `[M, V]`, on one graph with `leaves`.
fn whole_graph(model: &ModelConfig, leaves: &[Vec<Tensor>], sequences: &[TrainSequence]) -> Tensor {
    let views = |unit_idx: usize| leaves[unit_idx].iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
    let table = RotaryTable::new(model, 32, Device::Cpu);
    let rows = sequences.iter().map(|sequence| {
        let packed = PackedBatch::new(&[&sequence.token_ids], &table, Kind::Float);
        let (first, count) = (sequence.num_prompt_tokens as i64, sequence.num_completion_tokens() as i64);
        logits(model, &views, &packed).narrow(0, first - 1, count).log_softmax(-1, Kind::Float)
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
