//! The runner against the trainer's forward pass, and against itself in other company.

use aha_core::config::Quantization;
use aha_core::ids::TokenId;
use aha_core::rollout::Sampling;
use aha_nn::forward::{head_matrix, hidden_states, score};
use aha_nn::kernels::cpu::Pool;
use aha_nn::rotary::RotaryTable;
use aha_nn::weights::{Weights, split};
use aha_nn::{autograd_ops::PackedBatch, model_config::ModelConfig};
use tch::{Device, Kind};

use super::weights::ServingWeights;
use super::{CacheSize, CpuRunner};
use crate::engine::{BatchItem, BlockCopy, BlockId, Choose, Runner, Sampled, StepBatch};
use crate::testing::{Tiny, tiny_config, tiny_weights};

pub(super) const ALL: [Tiny; 3] = [Tiny::Qwen2, Tiny::Qwen3, Tiny::Llama];
const BLOCK_SIZE: usize = 16;
const TOLERANCE: f32 = 1e-4;

fn runner(config: &ModelConfig, weights: &Weights) -> CpuRunner {
    quantised_runner(config, weights, Quantization::None)
}

fn quantised_runner(config: &ModelConfig, weights: &Weights, quantization: Quantization) -> CpuRunner {
    let pool = Pool::new(2).unwrap();
    let serving = ServingWeights::new(config, weights, quantization, &pool);
    CpuRunner::new(config, Some(serving), CacheSize { block_size: BLOCK_SIZE, num_blocks: 24 }, 128, pool)
}

pub(super) fn some_tokens(len: usize, salt: u32) -> Vec<TokenId> {
    (0..len as u32).map(|i| (i * 37 + salt * 101 + i * i) % 256).collect()
}

pub(super) fn choose(temperature: f32, uniform: f32) -> Choose {
    let sampling = Sampling { temperature, ..Sampling::default() }.into();
    Choose { sampling, uniform, suppress: [].into(), counts: Vec::new(), ahead: None }
}

/// A sequence that is computed with some others.
pub(super) struct Sequence {
    pub(super) tokens: Vec<TokenId>,
    num_computed: usize,
    blocks: Vec<BlockId>,
    temperature: f32,
    pub(super) sampled: Vec<Sampled>,
}

impl Sequence {
    pub(super) fn new(prompt: Vec<TokenId>, blocks: &[u32], temperature: f32) -> Self {
        let blocks = blocks.iter().map(|&block| BlockId(block)).collect();
        Self { tokens: prompt, num_computed: 0, blocks, temperature, sampled: Vec::new() }
    }

    /// Up to `chunk` of what is not computed yet; chooses a token when that is all of it.
    fn item(&self, chunk: usize) -> BatchItem {
        let end = self.tokens.len().min(self.num_computed + chunk);
        let uniform = (self.sampled.len() as f32 * 0.37 + 0.11).fract();
        BatchItem {
            tokens: self.tokens[self.num_computed..end].to_vec(),
            start: self.num_computed,
            block_table: self.blocks.clone(),
            choose: (end == self.tokens.len()).then(|| choose(self.temperature, uniform)),
        }
    }
}

/// Steps all sequences together, by chunks of the given sizes, until the first has `num_new` sampled tokens.
pub(super) fn advance(runner: &mut impl Runner, sequences: &mut [Sequence], chunks: &[usize], num_new: usize) {
    for step in 0.. {
        let items: Vec<_> = sequences
            .iter()
            .enumerate()
            .map(|(i, sequence)| sequence.item(chunks[(step + i) % chunks.len()]))
            .collect();
        let batch = StepBatch { copies: Vec::new(), items };
        let mut sampled = runner.run(&batch).unwrap().into_iter();
        for (sequence, item) in sequences.iter_mut().zip(&batch.items) {
            sequence.num_computed += item.tokens.len();
            if item.choose.is_some() {
                let sampled = sampled.next().unwrap();
                sequence.tokens.push(sampled.token);
                sequence.sampled.push(sampled);
            }
        }
        assert!(sampled.next().is_none());
        if sequences[0].sampled.len() == num_new {
            return;
        }
    }
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() < TOLERANCE, "at {index}: {found} and {expected}");
    }
}

/// The most likely next token after each of `tokens`, by the trainer's forward pass.
pub(super) fn most_likely(config: &ModelConfig, weights: &Weights, tokens: &[TokenId]) -> Vec<TokenId> {
    let table = RotaryTable::new(config, tokens.len(), Device::Cpu);
    let hidden = hidden_states(config, weights, &PackedBatch::new(&[tokens], &table, Kind::Float));
    let logits = hidden.matmul(&head_matrix(config, weights).tr());
    Vec::<i64>::try_from(logits.argmax(-1, false)).unwrap().into_iter().map(|token| token as TokenId).collect()
}

#[test]
fn chunked_prefill_and_decoding_agree_with_the_trainers_path() {
    for tiny in ALL {
        let (config, prompt) = (tiny_config(tiny), some_tokens(41, 1));
        let weights = tiny_weights(&config, 1);
        let mut runner = runner(&config, &weights);
        let mut sequences = [Sequence::new(prompt.clone(), &[5, 2, 9, 0, 7], 0.0)];
        advance(&mut runner, &mut sequences, &[7, 1, 20, 16], 30);

        let [sequence] = sequences;
        let expected = most_likely(&config, &weights, &sequence.tokens);
        assert_eq!(sequence.tokens[41..], expected[40..70], "{tiny:?}");
        let logprobs: Vec<f32> = sequence.sampled.iter().map(|sampled| sampled.logprob).collect();
        assert_close(&logprobs, &score(&config, &weights, &sequence.tokens)[40..]);
    }
}

#[test]
fn scores_agree_with_the_trainers_path() {
    for tiny in ALL {
        let config = tiny_config(tiny);
        let weights = tiny_weights(&config, 1);
        let mut runner = runner(&config, &weights);
        for len in [1, 2, 16, 17, 90] {
            let tokens = some_tokens(len, 2);
            let blocks: Vec<_> = (0..len.div_ceil(BLOCK_SIZE) as u32).rev().map(BlockId).collect();
            assert_close(&runner.score(&tokens, &blocks).unwrap(), &score(&config, &weights, &tokens));
        }
    }
}

/// Company, chunk sizes and places in memory must not change a single bit.
#[test]
fn a_sequence_has_the_same_bits_in_any_company() {
    for tiny in ALL {
        let config = tiny_config(tiny);
        let weights = tiny_weights(&config, 3);
        let run = |others: &[(usize, [u32; 6])], chunks: &[usize], blocks: &[u32]| {
            let mut runner = runner(&config, &weights);
            let mut sequences = vec![Sequence::new(some_tokens(37, 4), blocks, 1.0)];
            let others = others.iter().zip(5..);
            sequences.extend(others.map(|((len, blocks), salt)| Sequence::new(some_tokens(*len, salt), blocks, 0.7)));
            advance(&mut runner, &mut sequences, chunks, 25);
            let bits = |sampled: &Sampled| (sampled.token, sampled.logprob.to_bits());
            sequences[0].sampled.iter().map(bits).collect::<Vec<_>>()
        };
        let alone = run(&[], &[64], &[0, 1, 2, 3]);
        let others = [(1, [10, 11, 12, 13, 14, 15]), (50, [16, 17, 18, 19, 20, 21])];
        assert_eq!(alone, run(&[], &[1], &[3, 2, 1, 0]), "{tiny:?}");
        assert_eq!(alone, run(&others[..1], &[5, 16], &[9, 2, 4, 7]), "{tiny:?}");
        assert_eq!(alone, run(&others, &[13, 3, 31], &[22, 0, 23, 1]), "{tiny:?}");
    }
}

#[test]
fn copied_blocks_hold_what_the_original_held() {
    let config = tiny_config(Tiny::Qwen3);
    let mut runner = runner(&config, &tiny_weights(&config, 1));
    let prompt = some_tokens(20, 6);
    let mut original = [Sequence::new(prompt.clone(), &[3, 4, 5], 0.0)];
    advance(&mut runner, &mut original, &[64], 1);
    // The copy shares the full block and has its own of the second one.
    let item = BatchItem {
        tokens: prompt[19..].to_vec(),
        start: 19,
        block_table: vec![BlockId(3), BlockId(8)],
        choose: Some(choose(0.0, 0.0)),
    };
    let copies = vec![BlockCopy { from: BlockId(4), to: BlockId(8) }];
    let copied = runner.run(&StepBatch { copies, items: vec![item] }).unwrap();
    assert_eq!(copied, original[0].sampled);
}

#[test]
fn suppressed_tokens_are_not_sampled() {
    let config = tiny_config(Tiny::Qwen2);
    let mut runner = runner(&config, &tiny_weights(&config, 1));
    let mut first = |suppress: Vec<TokenId>| {
        let choose = Choose { suppress: suppress.into(), ..choose(0.0, 0.0) };
        let (tokens, block_table) = (some_tokens(5, 1), vec![BlockId(0)]);
        let items = vec![BatchItem { tokens, start: 0, block_table, choose: Some(choose) }];
        runner.run(&StepBatch { copies: Vec::new(), items }).unwrap()[0].token
    };
    let likeliest = first(Vec::new());
    let second = first(vec![likeliest]);
    assert_ne!(second, likeliest);
    assert!(![likeliest, second].contains(&first(vec![second, likeliest])));
}

/// Every edit at once, greedily, against the trainer's logits in f64 and vLLM's formulas token by token.
#[test]
fn edits_and_raw_logprobs_agree_with_the_trainers_path() {
    let config = tiny_config(Tiny::Llama);
    let (weights, prompt) = (tiny_weights(&config, 1), some_tokens(9, 1));
    let table = RotaryTable::new(&config, prompt.len(), Device::Cpu);
    let hidden = hidden_states(&config, &weights, &PackedBatch::new(&[&prompt], &table, Kind::Float));
    let logits = hidden.matmul(&head_matrix(&config, &weights).tr()).select(0, prompt.len() as i64 - 1);
    let logits = Vec::<f64>::try_from(logits.to_kind(Kind::Double)).unwrap();
    let log_softmax = |logits: &[f64]| {
        let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
        logits.iter().map(|logit| (logit - total.ln()) as f32).collect::<Vec<f32>>()
    };
    let by_rank = |logits: &[f64]| {
        let mut tokens: Vec<TokenId> = (0..logits.len() as TokenId).collect();
        tokens.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        tokens
    };
    let ranked = by_rank(&logits);

    let sampling = Sampling {
        temperature: 0.0,
        repetition_penalty: 1.8,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        // The likeliest tokens each meet another edit.
        logit_bias: [(ranked[1], -3.0), (ranked[6], 1.0)].into(),
        bad_token_ids: vec![ranked[0]],
        allowed_token_ids: (0..260).filter(|token| *token != ranked[2]).collect(),
        logprobs: 5,
        ..Sampling::default()
    };
    let counts = [(ranked[4], 1), (ranked[5], 3), (ranked[6], 2), (ranked[7], 0), (ranked[200], 0)];
    let edited: Vec<f64> = (0..)
        .zip(&logits)
        .map(|(token, &logit)| {
            let logit = logit + f64::from(*sampling.logit_bias.get(&token).unwrap_or(&0.0));
            let logit = match counts.iter().find(|(counted, _)| *counted == token) {
                None => logit,
                Some((_, count)) => {
                    let repeated = if logit > 0.0 { logit / 1.8 } else { logit * 1.8 };
                    repeated - 0.2 * f64::from(*count) - if *count > 0 { 0.3 } else { 0.0 }
                }
            };
            if [ranked[0], ranked[2], ranked[3]].contains(&token) { f64::NEG_INFINITY } else { logit }
        })
        .collect();
    let suppress = [ranked[3]].into();
    let choose = Choose { counts: counts.into(), suppress, sampling: sampling.into(), uniform: 0.0, ahead: None };
    let items = vec![BatchItem { tokens: prompt, start: 0, block_table: vec![BlockId(0)], choose: Some(choose) }];
    let sampled = runner(&config, &weights).run(&StepBatch { copies: Vec::new(), items }).unwrap().pop().unwrap();

    let token = by_rank(&edited)[0];
    assert_eq!(sampled.token, token);
    assert_close(&[sampled.logprob], &[log_softmax(&edited)[token as usize]]);
    let (raw, expected) = (sampled.raw.unwrap(), log_softmax(&logits));
    assert_close(&[raw.logprob], &[expected[token as usize]]);
    let (top, logprobs): (Vec<TokenId>, Vec<f32>) = raw.top.into_iter().unzip();
    assert_eq!(top, ranked[..5]);
    assert_close(&logprobs, &top.iter().map(|&token| expected[token as usize]).collect::<Vec<_>>());
}

#[test]
fn a_refilled_set_equals_a_new_one() {
    let cases =
        [(Quantization::None, Kind::Float), (Quantization::Int8, Kind::Float), (Quantization::None, Kind::BFloat16)];
    for (tiny, (quantization, kind)) in ALL.into_iter().flat_map(|tiny| cases.map(|case| (tiny, case))) {
        let config = tiny_config(tiny);
        let (old, new) = (tiny_weights(&config, 1), tiny_weights(&config, 2));
        let pool = Pool::new(1).unwrap();
        let mut refilled = ServingWeights::new(&config, &old, quantization, &pool);
        for unit_idx in (0..new.num_units()).rev() {
            // What comes in bf16 is what both have.
            let pushed = new.flat(unit_idx).to_kind(kind);
            tch::no_grad(|| new.flat(unit_idx).shallow_clone().copy_(&pushed));
            refilled.set_unit(unit_idx, split(&pushed, &new.manifest, unit_idx), &pool);
        }
        let (tokens, blocks) = (some_tokens(30, 1), [BlockId(1), BlockId(0)]);
        let mut runner = quantised_runner(&config, &old, quantization);
        let before = runner.score(&tokens, &blocks).unwrap();
        let previous = runner.swap(refilled).unwrap().unwrap();
        let after = runner.score(&tokens, &blocks).unwrap();
        assert_eq!(after, quantised_runner(&config, &new, quantization).score(&tokens, &blocks).unwrap());
        assert_ne!(before, after);
        drop(runner.swap(previous).unwrap());
        assert_eq!(runner.score(&tokens, &blocks).unwrap(), before);
    }
}

#[test]
fn eight_bits_come_close_to_the_exact_model() {
    for tiny in ALL {
        let config = tiny_config(tiny);
        let weights = tiny_weights(&config, 1);
        let (tokens, blocks) = (some_tokens(30, 1), [BlockId(1), BlockId(0)]);
        let exact = score(&config, &weights, &tokens);
        let int8 = quantised_runner(&config, &weights, Quantization::Int8).score(&tokens, &blocks).unwrap();
        let errors = exact.iter().zip(&int8).map(|(exact, int8)| (exact - int8).abs());
        let mean = errors.sum::<f32>() / exact.len() as f32;
        // Not nothing either: that would be the exact path.
        assert!((1e-4..0.1).contains(&mean), "{tiny:?}: {mean}");
    }
}

#[test]
fn a_released_cache_takes_no_step_until_it_is_restored() {
    let config = tiny_config(Tiny::Qwen2);
    let mut runner = runner(&config, &tiny_weights(&config, 1));
    let before = runner.score(&[1, 2, 3], &[BlockId(0)]).unwrap();
    runner.release_cache().unwrap();
    assert!(runner.score(&[1, 2, 3], &[BlockId(0)]).unwrap_err().to_string().contains("given back"));
    runner.restore_cache().unwrap();
    assert_eq!(runner.score(&[1, 2, 3], &[BlockId(0)]).unwrap(), before);
}
