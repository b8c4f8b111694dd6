//! Losses, gradients and advantages against TRL's own (tests/golden/make_objectives.py).

use aha_core::config::{RewardSpec, RunConfig, Train};
use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::rollout::{Completion, FinishReason, Group, Origin, Prompt, Reward, Span};
use aha_nn::autograd::grad;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::objective::{LossSums, Objective, PolicyObjective, Tokens};
use super::targets::Targets;
use crate::entropy::{EntropyControl, fill_masks, fill_weights};
use crate::training_batch::TrainingBatch;

const LOSS_TOLERANCE: f64 = 1e-5;
const GRADIENT_TOLERANCE: f64 = 1e-5;

#[derive(Debug, Deserialize)]
struct Golden {
    batch: Batch,
    cases: Vec<Case>,
}

/// Per completion, `B` of `T` tokens.
#[derive(Debug, Deserialize)]
struct Batch {
    vocab_size: i64,
    num_generations: usize,
    max_completion_length: u32,
    scores: Vec<Vec<f32>>,
    score_weights: Vec<f32>,
    truncated: Vec<bool>,
    tokens: Vec<Vec<u32>>,
    /// `[T * V]`.
    logits: Vec<Vec<f32>>,
    old_logprobs: Vec<Vec<f32>>,
    sampled_logprobs: Vec<Vec<f32>>,
    reference_logprobs: Vec<Vec<f32>>,
}

#[derive(Debug, Deserialize)]
struct Case {
    name: String,
    /// Whether there are old log-probs.
    moved: bool,
    train: Train,
    members: Option<Vec<usize>>,
    loss: f64,
    advantages: Vec<f32>,
    d_logprobs: Vec<Vec<f32>>,
    d_logits: Option<Vec<Vec<f32>>>,
    /// In the update before this one, and the weight of the entropy after it.
    last_entropy: Option<f64>,
    entropy_coef: Option<f32>,
    kl: Option<f64>,
    clipped_low: Option<f64>,
    clipped_high: Option<f64>,
}

impl Golden {
    fn load() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/objectives.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }
}

impl Batch {
    fn config(&self, case: &Case) -> RunConfig {
        let mut config = RunConfig { train: case.train.clone(), ..RunConfig::default() };
        config.rollout.num_generations = self.num_generations;
        config.rollout.generation_batch_size = self.tokens.len();
        config.rollout.max_completion_length = self.max_completion_length;
        config.rewards = (0..self.scores.len())
            .map(|index| RewardSpec { weight: self.score_weights[index], ..RewardSpec::of(&format!("score-{index}")) })
            .collect();
        config
    }

    fn groups(&self) -> Vec<Group> {
        let completion = |index: usize| Completion {
            prompt_id: PromptId((index / self.num_generations) as u64),
            sample_index: (index % self.num_generations) as u32,
            token_ids: self.tokens[index].clone(),
            logprobs: self.sampled_logprobs[index].clone(),
            spans: vec![Span { version: PolicyVersion(0), num_tokens: self.tokens[index].len() as u32 }],
            finish_reason: if self.truncated[index] { FinishReason::Length } else { FinishReason::Stop },
            text: String::new(),
            rewards: (0..self.scores.len())
                .map(|function| Reward {
                    function: format!("score-{function}"),
                    score: self.scores[function][index],
                    outcome: "score".to_owned(),
                })
                .collect(),
            raw_logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
        };
        let group = |first: usize| Group {
            prompt: Prompt {
                id: PromptId((first / self.num_generations) as u64),
                text: String::new(),
                token_ids: vec![0],
                columns: serde_json::Map::new(),
                origin: Origin::default(),
            },
            completions: (first..first + self.num_generations).map(completion).collect(),
        };
        (0..self.tokens.len()).step_by(self.num_generations).map(group).collect()
    }

    /// Sums over the tokens of every completion that carries loss.
    fn divergences(&self, train: &Train) -> Vec<f32> {
        let pairs = self.old_logprobs.iter().zip(&self.reference_logprobs).zip(&self.truncated);
        pairs
            .map(|((old, reference), truncated)| {
                let sum: f32 = old.iter().zip(reference).map(|(old, reference)| old - reference).sum();
                if train.mask_truncated_completions && *truncated { 0.0 } else { sum }
            })
            .collect()
    }

    /// Values of some sequences one after the other.
    fn gather(values: &[Vec<f32>], indices: &[usize]) -> Tensor {
        Tensor::from_slice(&indices.iter().flat_map(|&index| values[index].clone()).collect::<Vec<_>>())
    }
}

#[track_caller]
fn check_close(case: &str, what: &str, got: &Tensor, expect: &Tensor, tolerance: f64) {
    assert_eq!(got.size(), expect.size(), "{case}: {what}");
    let difference = (got - expect).abs().max().double_value(&[]);
    assert!(difference <= tolerance, "{case}: {what} differ by {difference}\n{got}\n{expect}");
}

fn check(data: &Batch, case: &Case) {
    let config = data.config(case);
    let train = &config.train;
    let name = case.name.as_str();
    let divergences = if train.use_kl_in_reward { data.divergences(train) } else { Vec::new() };
    let mut batch = TrainingBatch::with_divergences(&data.groups(), &config, 0, &divergences);
    let advantages = Tensor::from_slice(&batch.advantages);
    check_close(name, "advantages", &advantages, &Tensor::from_slice(&case.advantages), LOSS_TOLERANCE);
    if case.moved {
        for (sequence, old) in batch.sequences.iter_mut().zip(&data.old_logprobs) {
            sequence.old_logprobs.clone_from(old);
        }
    }
    let mut members = case.members.clone().unwrap_or_else(|| batch.updates.concat());
    members.sort_unstable();

    let logits = Batch::gather(&data.logits, &members).view([-1, data.vocab_size]).set_requires_grad(true);
    let all = logits.log_softmax(-1, Kind::Float); // [M, V]
    let alone: Vec<Vec<usize>> = members.iter().map(|&index| vec![index]).collect();
    let targets = Targets::new(&batch.sequences, &alone, Device::Cpu);
    let logprobs = all.gather(1, &targets.tokens.unsqueeze(1), false).squeeze_dim(1); // [M]
    let entropies = -(all.exp() * &all).sum_dim_intlist(-1, false, Kind::Float); // [M]
    let entropy_weight = weigh_entropies(case, &mut batch, &members, (&targets, &entropies.detach()));
    let mut streams = targets.streams(&batch.sequences);
    streams.reference_logprobs = Some(Batch::gather(&data.reference_logprobs, &members));

    let objective = Objective::Policy(PolicyObjective::new(train));
    let tokens = Tokens { logprobs: logprobs.shallow_clone(), entropies: (entropy_weight > 0.0).then_some(entropies) };
    let loss = objective.loss(&tokens, &streams);
    let value = loss.loss.double_value(&[]);
    assert!((value - case.loss).abs() <= LOSS_TOLERANCE, "{name}: loss {value} is not {}", case.loss);
    let num_tokens = all.size()[0] as f64;
    let mut sums = LossSums::default();
    loss.counts.iter().for_each(|(what, value)| sums.count(*what, value.double_value(&[])));
    for (what, got, expect) in [
        ("kl", sums.kl, case.kl),
        ("clipped_low", sums.clipped_low, case.clipped_low),
        ("clipped_high", sums.clipped_high, case.clipped_high),
    ] {
        if let Some(expect) = expect {
            assert!(
                (got / num_tokens - expect).abs() < LOSS_TOLERANCE,
                "{name}: {what} {} is not {expect}",
                got / num_tokens
            );
        }
    }
    // Objectives that do not say that they span sequences must give the same in parts.
    if !objective.spans_sequences() {
        let half = all.size()[0] / 2;
        let part = |start: i64, len: i64| {
            let entropies = tokens.entropies.as_ref().map(|entropies| entropies.narrow(0, start, len));
            let tokens = Tokens { logprobs: logprobs.narrow(0, start, len), entropies };
            objective.loss(&tokens, &streams.narrow(start, len)).loss.double_value(&[])
        };
        let sum = part(0, half) + part(half, all.size()[0] - half);
        assert!((sum - case.loss).abs() <= LOSS_TOLERANCE, "{name}: in parts {sum}");
    }
    let grads = grad(&[loss.loss], &[logprobs, logits], &[None], false).unwrap();
    let [d_logprobs, d_logits] = [&grads[0], &grads[1]].map(|grad| grad.as_ref().unwrap());
    let expect = Batch::gather(&case.d_logprobs, &members);
    check_close(name, "gradients of log-probs", d_logprobs, &expect, GRADIENT_TOLERANCE);
    if let Some(expect) = &case.d_logits {
        let expect = Batch::gather(expect, &members).view([-1, data.vocab_size]);
        check_close(name, "gradients of logits", d_logits, &expect, GRADIENT_TOLERANCE);
    }
}

/// Fills masks and weights as an update does, and checks how the weight goes on; returns it.
fn weigh_entropies(
    case: &Case,
    batch: &mut TrainingBatch,
    members: &[usize],
    (targets, entropies): (&Targets, &Tensor),
) -> f32 {
    let train = &case.train;
    let mut num_counted = entropies.numel();
    let mut mean_entropy = entropies.mean(Kind::Double).double_value(&[]);
    if train.top_entropy_quantile < 1.0 {
        let mut by_sequence = vec![Vec::new(); batch.sequences.len()];
        targets.pieces.scatter(entropies, &mut by_sequence);
        let flat: Vec<f32> = by_sequence.concat();
        let counted = fill_masks(train, &mut batch.sequences, &by_sequence, &flat);
        (num_counted, mean_entropy) = (counted.num, counted.mean());
    }
    let mut control = EntropyControl { last_entropy: case.last_entropy, ..EntropyControl::new(train) };
    let weight = control.weight(train);
    fill_weights(weight, members, num_counted, &mut batch.sequences);
    control.follow(train, mean_entropy);
    if let Some(expect) = case.entropy_coef {
        assert!((control.entropy_coef - expect).abs() < 1e-7, "{}: {control:?}, not {expect}", case.name);
        assert_eq!(control.last_entropy, Some(mean_entropy), "{}", case.name);
    }
    weight
}

#[test]
fn losses_gradients_and_advantages_are_trl_s() {
    let golden = Golden::load();
    assert!(golden.cases.len() > 100);
    for case in &golden.cases {
        check(&golden.batch, case);
    }
}
