//! A runner whose "model" is a hash, over a KV cache that remembers who wrote what.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use aha_core::config::KvPolicy;
use aha_core::ids::{PolicyVersion, TokenId};
use aha_core::random::{derive_seed, sampling_uniform};
use aha_core::rollout::{FinishReason, Sampling};

use super::batch::{BatchItem, Choose, Runner, Sampled, StepBatch};
use super::block_manager::{BlockCopy, BlockId};
use super::config::EngineConfig;
use super::request::RequestKey;
use super::sequence::Task;
use super::stats::StepTimes;

pub(super) const EOS: TokenId = 1;
const VOCAB_SIZE: u64 = 40;

/// Room for everything at once.
pub(super) const ROOMY: EngineConfig = EngineConfig {
    block_size: 4,
    num_blocks: 2000,
    max_num_seqs: 64,
    max_num_batched_tokens: 512,
    max_model_len: 200,
    steps_per_look: 1,
    kv: KvPolicy::Recompute,
    enable_prefix_caching: true,
    eos_token_ids: Vec::new(),
    version: PolicyVersion(0),
};

pub(super) fn config(change: impl FnOnce(&mut EngineConfig)) -> EngineConfig {
    let mut config = EngineConfig { eos_token_ids: vec![EOS], ..ROOMY };
    change(&mut config);
    config
}

/// A sequence of numbers for one seed.
#[derive(Debug)]
pub(super) struct Random {
    seed: u64,
    num_drawn: u64,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, num_drawn: 0 }
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.num_drawn += 1;
        (derive_seed(self.seed, &[self.num_drawn]) % bound as u64) as usize
    }

    /// A prompt of 1 to `max_len` tokens, which may begin as others do.
    pub(super) fn prompt(&mut self, max_len: usize) -> Vec<TokenId> {
        let len = 1 + self.below(max_len);
        let common = 0..self.below(len + 1);
        let mut token = |index| if common.contains(&index) { index * 3 } else { self.below(VOCAB_SIZE as usize) };
        (0..len).map(|index| token(index) as TokenId % VOCAB_SIZE as TokenId).collect()
    }
}

/// What is asked in a test, without the channel.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) key: RequestKey,
    pub(super) prompt: Vec<TokenId>,
    pub(super) sample_indices: Vec<u32>,
    pub(super) sampling: Sampling,
    pub(super) seed: u64,
}

impl Ask {
    /// Goes on to `max_tokens` in every sample.
    pub(super) fn new(key: u64, prompt_len: usize, num_samples: u32, max_tokens: u32) -> Self {
        let prompt = (0..prompt_len).map(|index| (key as TokenId * 7 + index as TokenId) % 40).collect();
        let sampling = Sampling { max_tokens, ignore_eos: true, ..Sampling::default() };
        Self { key: RequestKey(key), prompt, sample_indices: (0..num_samples).collect(), sampling, seed: key }
    }

    pub(super) fn random(random: &mut Random, key: u64) -> Self {
        let max_tokens = 1 + random.below(24) as u32;
        let sampling = Sampling {
            max_tokens,
            min_tokens: random.below(max_tokens as usize + 1) as u32 / 2,
            temperature: random.below(4) as f32,
            stop_token_ids: vec![random.below(VOCAB_SIZE as usize) as TokenId],
            ignore_eos: random.below(8) == 0,
            repetition_penalty: [1.0, 1.0, 1.5][random.below(3)],
            frequency_penalty: [0.0, 0.0, 0.5][random.below(3)],
            bad_token_ids: vec![random.below(VOCAB_SIZE as usize) as TokenId],
            allowed_token_ids: [vec![], (5..35).rev().chain([7]).collect()][random.below(2)].clone(),
            ..Sampling::default()
        };
        let sampling = if random.below(2) == 0 { sampling } else { without_edits(sampling) };
        let first = random.below(3) as u32;
        let sample_indices = (first..=first + random.below(6) as u32).rev().collect();
        Self { key: RequestKey(key), prompt: random.prompt(30), sample_indices, sampling, seed: key % 3 }
    }

    pub(super) fn task(&self) -> Task {
        Task::new(self.key, self.prompt.clone(), self.sampling.clone(), self.seed, &[EOS])
    }

    /// What one sample must be, by the definition of the model: no blocks, no batch. `weights(i)` are those that token
    /// `i` is sampled under, and `cached(i, p)` those that filled position `p` of the cache by then.
    pub(super) fn expect(
        &self,
        sample_index: u32,
        weights: impl Fn(usize) -> u64,
        cached: impl Fn(usize, usize) -> u64,
    ) -> Expected {
        let mut tokens = self.prompt.clone();
        for index in 0..self.sampling.max_tokens as usize {
            let past = tokens[..tokens.len() - 1].iter().enumerate().map(|(p, &token)| (token, cached(index, p)));
            let last = (tokens[tokens.len() - 1], weights(index));
            let hidden = past
                .chain([last])
                .fold(0, |hidden, (token, weights)| attend(hidden, key_value(hidden, token, weights)));
            let stop_allowed = index >= self.sampling.min_tokens as usize;
            let mut stops = self.sampling.stop_token_ids.clone();
            stops.push(EOS);
            stops.retain(|_| !self.sampling.ignore_eos);
            let uniform = sampling_uniform(self.seed, sample_index, index as u32);
            let sampling = Arc::new(self.sampling.clone());
            let suppress = if stop_allowed { Vec::new() } else { stops.clone() }.into();
            let counts = self.counts(&tokens[self.prompt.len()..]);
            let sampled = sample(hidden, &Choose { sampling, uniform, suppress, counts, ahead: None });
            tokens.push(sampled.token);
            if stop_allowed && stops.contains(&sampled.token) {
                return Expected { tokens: tokens.split_off(self.prompt.len()), finish: FinishReason::Stop };
            }
        }
        Expected { tokens: tokens.split_off(self.prompt.len()), finish: FinishReason::Length }
    }

    /// Tokens that penalties concern, counted anew.
    fn counts(&self, completion: &[TokenId]) -> Vec<(TokenId, u32)> {
        let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = self.sampling;
        let mut counts = BTreeMap::new();
        if repetition_penalty != 1.0 {
            counts.extend(self.prompt.iter().map(|&token| (token, 0)));
        }
        if repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0 {
            completion.iter().for_each(|&token| *counts.entry(token).or_insert(0) += 1);
        }
        counts.into_iter().collect()
    }
}

/// The same, so that several tokens may be sampled in a look.
fn without_edits(sampling: Sampling) -> Sampling {
    let Sampling { temperature, max_tokens, min_tokens, stop_token_ids, ignore_eos, .. } = sampling;
    Sampling { temperature, max_tokens, min_tokens, stop_token_ids, ignore_eos, ..Sampling::default() }
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Expected {
    pub(super) tokens: Vec<TokenId>,
    pub(super) finish: FinishReason,
}

/// One slot of the cache. `value` hashes the token with everything that it attended to.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Slot {
    token: TokenId,
    position: usize,
    value: u64,
    weights: u64,
}

#[derive(Debug)]
pub(super) struct FakeRunner {
    config: EngineConfig,
    weights: u64,
    has_weights: bool,
    slots: Vec<Option<Slot>>,
    /// What the step after so many does instead.
    trouble: Option<(u64, Trouble)>,
    num_steps: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Trouble {
    Error,
    Panic,
    OneTokenShort,
}

impl FakeRunner {
    pub(super) fn new(config: &EngineConfig) -> Self {
        let slots = vec![None; config.num_blocks * config.block_size];
        Self { config: config.clone(), weights: 0, has_weights: true, slots, trouble: None, num_steps: 0 }
    }

    /// Fails after so many steps.
    pub(super) fn with_trouble(config: &EngineConfig, trouble: Option<(u64, Trouble)>) -> Self {
        Self { trouble, ..Self::new(config) }
    }

    /// Checks that the cache holds exactly `tokens` under a block table, and of these weights where they are given.
    pub(super) fn check_history(&self, block_table: &[BlockId], tokens: &[TokenId], weights: Option<u64>) {
        let mut hidden = 0;
        for (position, &token) in tokens.iter().enumerate() {
            let slot = self.slots[self.slot(block_table, position)].expect("the slot was written");
            assert_eq!((slot.token, slot.position), (token, position));
            assert_eq!(slot.value, key_value(hidden, token, slot.weights), "it attended to other tokens");
            assert!(weights.is_none_or(|weights| weights == slot.weights), "it is of other weights");
            hidden = attend(hidden, slot.value);
        }
    }

    fn slot(&self, block_table: &[BlockId], position: usize) -> usize {
        let block_size = self.config.block_size;
        block_table[position / block_size].0 as usize * block_size + position % block_size
    }

    /// The budgets are kept, and nobody reads or writes what another writes.
    fn check_batch(&self, batch: &StepBatch) {
        assert!(!batch.items.is_empty() && batch.items.len() <= self.config.max_num_seqs);
        let num_tokens: usize = batch.items.iter().map(|item| item.tokens.len()).sum();
        assert!(num_tokens <= self.config.max_num_batched_tokens);
        let mut writers: HashMap<BlockId, usize> = HashMap::new();
        let all_decode = batch.items.iter().all(|item| item.tokens.len() == 1 && item.choose.is_some());
        for (index, item) in batch.items.iter().enumerate() {
            assert!(!item.tokens.is_empty());
            assert!(item.num_to_sample() <= if all_decode { self.config.steps_per_look } else { 1 });
            // Of the tokens that are sampled, the last is not computed.
            let end = item.start + item.tokens.len() + item.num_to_sample().max(1) - 1;
            assert!(item.block_table.len() * self.config.block_size >= end);
            for &block in &item.block_table[item.start / self.config.block_size..end.div_ceil(self.config.block_size)] {
                assert_eq!(writers.insert(block, index), None, "{block:?} is written twice");
            }
        }
        for (index, item) in batch.items.iter().enumerate() {
            for block in &item.block_table {
                assert!(writers.get(block).is_none_or(|&writer| writer == index), "{block:?} is read and written");
            }
        }
    }

    fn run_item(&mut self, item: &BatchItem) -> u64 {
        let mut hidden = 0;
        for position in 0..item.start {
            let slot = self.slots[self.slot(&item.block_table, position)].expect("the slot was written");
            assert_eq!(slot.position, position);
            hidden = attend(hidden, slot.value);
        }
        for (position, &token) in (item.start..).zip(&item.tokens) {
            let value = key_value(hidden, token, self.weights);
            let slot = self.slot(&item.block_table, position);
            self.slots[slot] = Some(Slot { token, position, value, weights: self.weights });
            hidden = attend(hidden, value);
        }
        hidden
    }
}

impl FakeRunner {
    /// Samples what follows in the same look.
    fn go_on(&mut self, mut item: BatchItem, choose: &Choose, sampled: &mut Vec<Sampled>) {
        let Choose { sampling, ahead: Some(ahead), .. } = choose else { return };
        for index in ahead.num_generated + 1..ahead.num_generated + ahead.num_tokens as u32 {
            let token = sampled.last().unwrap().token;
            if index > sampling.min_tokens && ahead.stop_token_ids.contains(&token) {
                return;
            }
            (item.start, item.tokens) = (item.start + 1, vec![token]);
            let hidden = self.run_item(&item);
            let may_stop = index >= sampling.min_tokens;
            let suppress = if may_stop { Arc::new([]) } else { Arc::clone(&ahead.stop_token_ids) };
            let uniform = sampling_uniform(ahead.seed, ahead.sample_index, index);
            sampled.push(sample(hidden, &Choose { uniform, suppress, ..choose.clone() }));
        }
    }
}

impl Runner for FakeRunner {
    type Staged = u64;

    fn run(&mut self, batch: &StepBatch) -> anyhow::Result<Vec<Sampled>> {
        self.check_batch(batch);
        for &BlockCopy { from, to } in &batch.copies {
            let block_size = self.config.block_size;
            let from = from.0 as usize * block_size;
            self.slots.copy_within(from..from + block_size, to.0 as usize * block_size);
        }
        let mut sampled = Vec::new();
        for item in &batch.items {
            let hidden = self.run_item(item);
            if let Some(choose) = &item.choose {
                assert!(choose.sampling.allowed_token_ids.is_sorted_by(|a, b| a < b));
                sampled.push(sample(hidden, choose));
                self.go_on(item.clone(), choose, &mut sampled);
            }
        }
        self.num_steps += 1;
        match self.trouble {
            Some((after, trouble)) if self.num_steps > after => match trouble {
                Trouble::Error => anyhow::bail!("the fake device is on fire"),
                Trouble::Panic => panic!("the fake device is gone"),
                Trouble::OneTokenShort => sampled.truncate(sampled.len().saturating_sub(1)),
            },
            _ => {}
        }
        Ok(sampled)
    }

    fn score(&mut self, tokens: &[TokenId], block_table: &[BlockId]) -> anyhow::Result<Vec<f32>> {
        let (tokens, block_table) = (tokens.to_vec(), block_table.to_vec());
        let num_scored = tokens.len() - 1;
        self.run_item(&BatchItem { tokens, start: 0, block_table, choose: None });
        Ok((1..=num_scored).map(|index| -(index as f32)).collect())
    }

    fn times(&self) -> StepTimes {
        StepTimes::default()
    }

    fn swap(&mut self, staged: u64) -> anyhow::Result<Option<u64>> {
        self.has_weights = true;
        Ok(Some(std::mem::replace(&mut self.weights, staged)))
    }

    fn has_weights(&self) -> bool {
        self.has_weights
    }

    fn release_weights(&mut self) -> anyhow::Result<()> {
        assert!(self.slots.is_empty(), "the engine sleeps");
        self.has_weights = false;
        Ok(())
    }

    fn release_cache(&mut self) -> anyhow::Result<()> {
        assert!(!self.slots.is_empty());
        self.slots = Vec::new();
        Ok(())
    }

    fn restore_cache(&mut self) -> anyhow::Result<()> {
        assert!(self.slots.is_empty());
        self.slots = vec![None; self.config.num_blocks * self.config.block_size];
        Ok(())
    }
}

/// Every count changes the outcome.
fn sample(hidden: u64, Choose { sampling, uniform, suppress, counts, .. }: &Choose) -> Sampled {
    let randomness = if sampling.temperature > 0.0 { u64::from(uniform.to_bits()) } else { 0 };
    let counted = counts.iter().fold(0, |hash, &(token, count)| mix(hash, u64::from(token) << 32 | u64::from(count)));
    let hash = derive_seed(hidden, &[randomness, counted]);
    let Sampling { allowed_token_ids: allowed, bad_token_ids: bad, .. } = &**sampling;
    let is_open = |token: &TokenId| {
        !suppress.contains(token) && !bad.contains(token) && (allowed.is_empty() || allowed.contains(token))
    };
    let candidates = (0..VOCAB_SIZE).map(|offset| ((hash + offset) % VOCAB_SIZE) as TokenId);
    let token = candidates.into_iter().find(is_open).expect("some token is left");
    Sampled { token, logprob: -((hash >> 32) as f32) / u32::MAX as f32, raw: None }
}

fn key_value(hidden: u64, token: TokenId, weights: u64) -> u64 {
    mix(mix(hidden, u64::from(token) + 1), weights + 1)
}

fn attend(hidden: u64, value: u64) -> u64 {
    mix(hidden, value)
}

/// A step of a hash in which order matters.
fn mix(state: u64, value: u64) -> u64 {
    let product =
        (state ^ value.rotate_left(23)).wrapping_add(0x9E37_79B9_7F4A_7C15).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    product ^ product >> 29
}
