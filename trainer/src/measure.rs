//! The time of training steps of random weights on random tokens, through the learner that trains.

mod colocated;

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use aha_core::batch::TrainSequence;
use aha_core::config::{RunConfig, Train};
use aha_core::ids::TokenId;
use aha_core::random::derive_seed;
use aha_nn::comm::ReduceOp;
use aha_nn::model_config::ModelConfig;
use aha_nn::optim::AdamW;
use aha_nn::runtime;
use anyhow::{Result, ensure};
use tch::Tensor;

use crate::flops::Computed;
use crate::session::random_learner;
use crate::torch::learner::{Learner, LocalBatch, StepOutput};
use crate::world::World;

pub use colocated::{RandomPrompts, Turn, draw_rewards, measure_colocated};

/// The data of a step, the same in every one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Tokens of every prompt.
    pub prompt_tokens: usize,
    /// Tokens of a completion, drawn evenly.
    pub completion_tokens: RangeInclusive<usize>,
    /// Completions of a prompt; the last group of a micro-batch has what is left of room.
    pub group: usize,
    /// Of every rank; each as full as `train.micro_batch_tokens` allows.
    pub micro_batches: usize,
}

/// How many steps are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    /// Before the clock starts.
    pub warm_up: usize,
    pub measured: usize,
}

/// What was measured on this rank.
#[derive(Debug)]
pub struct Measurement {
    /// Of every measured step.
    pub times: Vec<Duration>,
    /// Of a step, over all ranks.
    pub computed: Computed,
    /// Of the last measured step; NaN or infinite where numbers overflow.
    pub grad_norm: f64,
    /// Parts of one more step, in which the host waits for the device after each.
    pub parts: Vec<(&'static str, Duration)>,
    /// The most memory that this rank took: tensors on a GPU, the process on a CPU.
    pub peak_bytes: Option<u64>,
}

/// The sequences of a rank.
#[derive(Debug)]
struct Batch {
    sequences: Vec<TrainSequence>,
    micro_batches: Vec<Vec<usize>>,
    computed: Computed,
}

/// Takes steps by `config`, of which `model`, `train`, `data.max_prompt_length` and `rollout.max_completion_length` count.
/// All ranks call this together.
///
/// # Errors
/// If the device or another rank is missing, or no completion fits a micro-batch.
pub fn measure(
    config: &RunConfig,
    world: &World,
    model: &ModelConfig,
    workload: &Workload,
    steps: Steps,
) -> Result<Measurement> {
    ensure!(steps.measured > 0, "at least one step must be measured");
    let batch = Batch::new(workload, model.vocab_size, config.train.micro_batch_tokens, world.rank)?;
    let (mut learner, _store) = random_learner(config, world, model)?;
    let mut times = Vec::new();
    let mut grad_norm = 0.0;
    for index in 0..steps.warm_up + steps.measured {
        let (time, output) = step(&mut learner, &batch, config)?;
        if index >= steps.warm_up {
            times.push(time);
            grad_norm = output.grad_norm;
        }
    }
    let device = learner.zero().group().device();
    let peak_bytes = runtime::peak_memory(device);
    learner.time_device();
    let parts = step(&mut learner, &batch, config)?.1.times.named().to_vec();
    Ok(Measurement { times, computed: of_all_ranks(&learner, batch.computed)?, grad_norm, parts, peak_bytes })
}

fn step(learner: &mut Learner, batch: &Batch, config: &RunConfig) -> Result<(Duration, StepOutput)> {
    let options = adamw(&config.train);
    let local = LocalBatch {
        sequences: &batch.sequences,
        micro_batches: &batch.micro_batches,
        num_micro_batches: batch.micro_batches.len(),
    };
    let device = learner.zero().group().device();
    runtime::synchronize(device);
    let start = Instant::now();
    let output = learner.step(&local, &options)?;
    runtime::synchronize(device);
    Ok((start.elapsed(), output))
}

/// The optimizer's constants, without a schedule.
fn adamw(train: &Train) -> AdamW {
    AdamW {
        lr: train.learning_rate,
        beta1: train.adam_beta1,
        beta2: train.adam_beta2,
        eps: train.adam_epsilon,
        weight_decay: train.weight_decay,
    }
}

fn of_all_ranks(learner: &Learner, computed: Computed) -> Result<Computed> {
    let group = learner.zero().group();
    let own = [computed.tokens, computed.targets, computed.pairs].map(|count| count as i64);
    let mut all = Tensor::from_slice(&own).to_device(group.device());
    group.all_reduce(&mut all, ReduceOp::Sum)?;
    let [tokens, targets, pairs] = [0, 1, 2].map(|index| all.int64_value(&[index]) as u64);
    Ok(Computed { tokens, targets, pairs })
}

impl Batch {
    /// A pure function of its arguments.
    fn new(workload: &Workload, vocab_size: usize, budget: usize, rank: usize) -> Result<Self> {
        let Workload { prompt_tokens, completion_tokens, group, micro_batches } = workload;
        let (shortest, longest) = (*completion_tokens.start(), *completion_tokens.end());
        ensure!(
            *prompt_tokens > 0 && shortest > 0 && shortest <= longest && *group > 0 && *micro_batches > 0,
            "prompts, completions, groups and micro-batches must have at least 1 token or member, and the shortest \
             completion ({shortest}) be no longer than the longest ({longest})"
        );
        let needed = prompt_tokens + longest;
        ensure!(
            needed <= budget,
            "a prompt of {prompt_tokens} tokens and a completion of {longest} do not fit a micro-batch of {budget}"
        );
        let draw = |index: &[u64], bound: usize| (derive_seed(rank as u64, index) % bound as u64) as usize;
        let tokens = |piece: u64, len: usize| -> Vec<TokenId> {
            (0..len).map(|position| draw(&[piece, position as u64], vocab_size) as TokenId).collect()
        };
        let mut batch = Self { sequences: Vec::new(), micro_batches: Vec::new(), computed: Computed::default() };
        let mut next = 0_u64; // Every prompt and completion has a number.
        for _ in 0..*micro_batches {
            let (mut room, mut members) = (budget, Vec::new());
            while room >= needed {
                let prompt = tokens(next, *prompt_tokens);
                next += 1;
                room -= prompt_tokens;
                let mut lengths = Vec::new();
                while lengths.len() < *group && room >= longest {
                    let len = shortest + draw(&[next], longest - shortest + 1);
                    let token_ids = [prompt.as_slice(), &tokens(next, len)].concat();
                    next += 1;
                    room -= len;
                    lengths.push(len);
                    members.push(batch.sequences.len());
                    batch.sequences.push(TrainSequence {
                        token_ids,
                        num_prompt_tokens: *prompt_tokens,
                        // Signs alternate as those of good and bad completions do.
                        advantages: vec![if next.is_multiple_of(2) { 1.0 } else { -1.0 }; len],
                        ..TrainSequence::default()
                    });
                }
                batch.computed.add(Computed::group(*prompt_tokens, &lengths));
            }
            batch.micro_batches.push(members);
        }
        let weight = 1.0 / batch.computed.targets as f32;
        for sequence in &mut batch.sequences {
            sequence.weights = vec![weight; sequence.num_completion_tokens()];
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use aha_core::config::DeviceKind;

    use super::*;

    fn workload() -> Workload {
        Workload { prompt_tokens: 5, completion_tokens: 3..=20, group: 4, micro_batches: 3 }
    }

    fn model() -> ModelConfig {
        let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true});
        ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
    }

    #[test]
    fn micro_batches_are_ragged_full_and_always_the_same() {
        let batch = Batch::new(&workload(), 31, 200, 0).unwrap();
        assert_eq!(batch.micro_batches.concat(), (0..batch.sequences.len()).collect::<Vec<_>>());
        assert_eq!(batch.micro_batches.len(), 3);
        let lengths: Vec<usize> = batch.sequences.iter().map(TrainSequence::num_completion_tokens).collect();
        assert!(lengths.iter().all(|len| (3..=20).contains(len)) && lengths.iter().any(|&len| len != lengths[0]));
        for members in &batch.micro_batches {
            let prompts: std::collections::HashSet<&[TokenId]> =
                members.iter().map(|&index| &batch.sequences[index].token_ids[..5]).collect();
            let total = members.iter().map(|&index| lengths[index]).sum::<usize>() + 5 * prompts.len();
            assert!((176..=200).contains(&total), "{total} of 200 tokens");
        }
        let again = Batch::new(&workload(), 31, 200, 0).unwrap();
        assert_eq!(again.sequences, batch.sequences);
        assert_ne!(
            Batch::new(&workload(), 31, 200, 1).unwrap().sequences,
            batch.sequences,
            "ranks have data of their own"
        );
    }

    #[test]
    fn what_cannot_fit_is_refused_by_its_numbers() {
        let error = Batch::new(&workload(), 31, 24, 0).unwrap_err().to_string();
        assert!(
            ["5 tokens", "completion of 20", "micro-batch of 24"].iter().all(|part| error.contains(part)),
            "{error}"
        );
        let none = Workload { group: 0, ..workload() };
        assert!(Batch::new(&none, 31, 200, 0).is_err());
    }

    #[test]
    fn steps_are_timed_and_what_they_compute_is_counted() {
        let mut config = RunConfig::default();
        config.model.device = DeviceKind::Cpu;
        config.model.random_init = true;
        config.data.max_prompt_length = 5;
        config.rollout.max_completion_length = 20;
        config.train = Train { micro_batch_tokens: 100, threads: 1, beta: 0.0, ..Train::default() };
        let steps = Steps { warm_up: 1, measured: 2 };
        let measured = measure(&config, &World::single(), &model(), &workload(), steps).unwrap();
        assert_eq!(measured.times.len(), 2);
        assert!(measured.grad_norm.is_finite() && measured.grad_norm > 0.0);
        let batch = Batch::new(&workload(), 31, 100, 0).unwrap();
        assert_eq!(measured.computed, batch.computed);
        // The learner packs the same tokens.
        let (mut learner, _store) = random_learner(&config, &World::single(), &model()).unwrap();
        let output = step(&mut learner, &batch, &config).unwrap().1;
        assert_eq!(
            (output.num_packed_tokens as u64, output.num_tokens as u64),
            (batch.computed.tokens, batch.computed.targets)
        );
        let parts: Duration = measured.parts.iter().map(|(_, time)| *time).sum();
        assert!(parts > Duration::ZERO && measured.peak_bytes > Some(0));
    }
}
