//! Runs the scheduled batches through the model, on the CPU.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aha_core::ids::TokenId;
use aha_core::rollout::{RawLogprobs, Sampling};
use aha_nn::kernels::cpu::{
    Drawn, KvCache, KvLayout, LogitEdits, Pool, RawLogProbs, RopeTables, SampleRequest, SamplingParams, log_softmax_at,
    sample_rows,
};
use aha_nn::logprob::chunk_rows;
use aha_nn::model_config::ModelConfig;
use aha_nn::rotary::RotaryTable;
use aha_nn::tensor_data::f32_slice;
use anyhow::{Context, ensure};
use tch::Device;

use super::arena::Arena;
use super::paged_ops::{Clock, PagedOps, PagedRows};
use super::weights::ServingWeights;
use crate::engine::{BlockId, Choose, Runner, Sampled, StepBatch, StepTimes};

/// How much memory keys and values get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSize {
    /// Tokens of a block, a multiple of 16.
    pub block_size: usize,
    pub num_blocks: usize,
}

/// The model, its cache and its threads.
#[derive(Debug)]
pub struct CpuRunner {
    pool: Arc<Pool>,
    config: ModelConfig,
    /// None while asleep without them.
    weights: Option<ServingWeights>,
    rotary: RotaryTable,
    layout: KvLayout,
    /// One a layer; none while the cache's memory is given back.
    caches: Vec<KvCache>,
    arena: Arena,
    times: StepTimes,
}

impl CacheSize {
    /// As many blocks as fit `bytes`.
    #[must_use]
    pub fn fitting(config: &ModelConfig, block_size: usize, bytes: usize) -> Self {
        let one = layout(config, Self { block_size, num_blocks: 1 });
        Self { block_size, num_blocks: bytes / (one.num_bytes() * config.num_layers) }
    }
}

impl CpuRunner {
    /// `max_model_len` positions get rotary angles. Without weights there is no cache either: both come later.
    #[must_use]
    pub fn new(
        config: &ModelConfig,
        weights: Option<ServingWeights>,
        cache: CacheSize,
        max_model_len: usize,
        pool: Pool,
    ) -> Self {
        let layout = layout(config, cache);
        Self {
            pool: Arc::new(pool),
            config: config.clone(),
            caches: weights.as_ref().map_or_else(Vec::new, |_| new_caches(layout, config.num_layers)),
            weights,
            rotary: RotaryTable::new(config, max_model_len, Device::Cpu),
            layout,
            arena: Arena::default(),
            times: StepTimes::default(),
        }
    }

    fn step(&mut self, batch: &StepBatch) -> anyhow::Result<Vec<Sampled>> {
        let copies: Vec<(u32, u32)> = batch.copies.iter().map(|copy| (copy.from.0, copy.to.0)).collect();
        for cache in &mut self.caches {
            cache.copy_blocks(&copies);
        }
        let tables: Vec<Vec<u32>> = batch.items.iter().map(|item| raw_blocks(&item.block_table)).collect();
        let mut rows = PagedRows::default();
        let mut chosen = Vec::new();
        for (item, table) in batch.items.iter().zip(&tables) {
            rows.push(&item.tokens, item.start, table, self.layout.block_size);
            chosen.extend(item.choose.as_ref().map(|choose| (rows.len() - 1, choose)));
        }
        let ops = self.ops(rows)?;
        let hidden = ops.hidden_states();
        let mut sampled = Vec::with_capacity(chosen.len());
        let mut sampling = Duration::ZERO;
        for chosen in chosen.chunks(chunk_rows(ops.config.vocab_size as i64) as usize) {
            let selected: Vec<usize> = chosen.iter().map(|(row, _)| *row).collect();
            let mut logits = ops.logits(&hidden, &selected);
            let start = Instant::now();
            sampled.extend(choose_tokens(ops.pool, &mut logits.data_mut(), chosen)?);
            sampling += start.elapsed();
        }
        let Clock { gemm, attention } = &ops.clock;
        let (gemm, attention) = (gemm.get(), attention.get());
        drop((hidden, ops));
        self.times.gemm += gemm;
        self.times.attention += attention;
        self.times.sampling += sampling;
        Ok(sampled)
    }

    fn score_tokens(&mut self, tokens: &[TokenId], block_table: &[BlockId]) -> anyhow::Result<Vec<f32>> {
        let table = raw_blocks(block_table);
        let mut rows = PagedRows::default();
        rows.push(tokens, 0, &table, self.layout.block_size);
        let ops = self.ops(rows)?;
        let hidden = ops.hidden_states();
        let vocab_size = ops.config.vocab_size;
        let mut logprobs = Vec::with_capacity(tokens.len());
        let predicting: Vec<usize> = (0..tokens.len() - 1).collect();
        for selected in predicting.chunks(chunk_rows(vocab_size as i64) as usize) {
            let logits = ops.logits(&hidden, selected);
            for (logits, &row) in logits.data().chunks_exact(vocab_size).zip(selected) {
                let target = tokens[row + 1];
                logprobs.push(log_softmax_at(ops.pool, logits, target).with_context(|| format!("token {}", row + 1))?);
            }
        }
        Ok(logprobs)
    }

    fn ops<'a>(&'a mut self, rows: PagedRows<'a>) -> anyhow::Result<PagedOps<'a>> {
        ensure!(!self.caches.is_empty(), "the cache's memory is given back, and no step can run before it is restored");
        let Self { pool, config, weights, rotary, caches, arena, .. } = self;
        let weights = weights.as_ref().context("the weights are given back, and no step can run before others come")?;
        let rope = RopeTables { cos: f32_slice(&rotary.cos), sin: f32_slice(&rotary.sin), head_dim: config.head_dim };
        Ok(PagedOps { pool, config, weights, rope, caches: RefCell::new(caches), arena, clock: Clock::default(), rows })
    }
}

impl Runner for CpuRunner {
    type Staged = ServingWeights;

    fn run(&mut self, batch: &StepBatch) -> anyhow::Result<Vec<Sampled>> {
        // Inside the pool, so that its threads stay awake from one kernel to the next.
        let pool = Arc::clone(&self.pool);
        pool.install(|| tch::no_grad(|| self.step(batch)))
    }

    fn score(&mut self, tokens: &[TokenId], block_table: &[BlockId]) -> anyhow::Result<Vec<f32>> {
        let pool = Arc::clone(&self.pool);
        pool.install(|| tch::no_grad(|| self.score_tokens(tokens, block_table)))
    }

    fn times(&self) -> StepTimes {
        self.times
    }

    fn has_weights(&self) -> bool {
        self.weights.is_some()
    }

    fn swap(&mut self, staged: ServingWeights) -> anyhow::Result<Option<ServingWeights>> {
        Ok(self.weights.replace(staged))
    }

    fn release_weights(&mut self) -> anyhow::Result<()> {
        self.weights = None;
        Ok(())
    }

    fn release_cache(&mut self) -> anyhow::Result<()> {
        self.caches = Vec::new();
        self.arena = Arena::default();
        Ok(())
    }

    fn restore_cache(&mut self) -> anyhow::Result<()> {
        self.caches = new_caches(self.layout, self.config.num_layers);
        Ok(())
    }
}

fn layout(config: &ModelConfig, CacheSize { block_size, num_blocks }: CacheSize) -> KvLayout {
    KvLayout { num_blocks, block_size, num_kv_heads: config.num_kv_heads, head_dim: config.head_dim }
}

fn new_caches(layout: KvLayout, num_layers: usize) -> Vec<KvCache> {
    (0..num_layers).map(|_| KvCache::new(layout)).collect()
}

fn raw_blocks(table: &[BlockId]) -> Vec<u32> {
    table.iter().map(|block| block.0).collect()
}

/// Chooses a token for each row of `logits: [M, V]`.
pub(super) fn choose_tokens(
    pool: &Pool,
    logits: &mut [f32],
    chosen: &[(usize, &Choose)],
) -> anyhow::Result<Vec<Sampled>> {
    let requests: Vec<_> = chosen.iter().map(|(_, choose)| request(choose)).collect();
    let drawn = sample_rows(pool, logits, &requests).into_iter().enumerate();
    drawn
        .map(|(index, drawn)| {
            let Drawn { sample, raw } =
                drawn.with_context(|| format!("row {index} of {} sampled ones", chosen.len()))?;
            Ok(Sampled { token: sample.token, logprob: sample.log_prob, raw: raw.map(raw_logprobs) })
        })
        .collect()
}

fn request(Choose { sampling, uniform, suppress, counts, .. }: &Choose) -> SampleRequest<'_> {
    let Sampling { repetition_penalty, presence_penalty, .. } = **sampling;
    SampleRequest {
        params: sampling_params(sampling),
        uniform: f64::from(*uniform),
        edits: LogitEdits {
            allowed: &sampling.allowed_token_ids,
            bad: &sampling.bad_token_ids,
            suppress,
            bias: &sampling.logit_bias,
            repetition_penalty,
            presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            counts,
        },
        num_top: (sampling.logprobs > 0).then_some(sampling.logprobs as usize),
    }
}

pub(super) fn sampling_params(sampling: &Sampling) -> SamplingParams {
    let Sampling { temperature, top_k, top_p, min_p, .. } = *sampling;
    SamplingParams { temperature, top_k, top_p, min_p }
}

fn raw_logprobs(RawLogProbs { log_prob, top }: RawLogProbs) -> Box<RawLogprobs> {
    Box::new(RawLogprobs { logprob: log_prob, top: top.iter().map(|top| (top.token, top.log_prob)).collect() })
}
