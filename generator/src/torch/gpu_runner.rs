//! Runs the scheduled batches through the model, on a GPU.

use std::time::{Duration, Instant};

use aha_core::ids::TokenId;
use aha_nn::gpu::{Choice, Chunk, DecodeRow, GpuModel, GpuWeights, MAX_STOPS, Queue};
use aha_nn::kernels::cpu::{Pool, Sample};
use anyhow::Context;

use super::model_runner::{choose_tokens, sampling_params};
use crate::engine::{Ahead, BatchItem, BlockId, Choose, Runner, Sampled, StepBatch, StepTimes};

const _: () = assert!(Ahead::MAX_STOPS <= MAX_STOPS);

/// The model on its device. Where every sequence decodes, tokens are sampled there without the host in between; logits
/// that a request wants edited or reported are sampled on the host.
#[derive(Debug)]
pub struct GpuRunner<Q: Queue> {
    model: GpuModel<Q>,
    /// For what is sampled on the host.
    pool: Pool,
    host_sampling: Duration,
}

impl<Q: Queue> GpuRunner<Q> {
    #[must_use]
    pub fn new(model: GpuModel<Q>, pool: Pool) -> Self {
        Self { model, pool, host_sampling: Duration::ZERO }
    }

    fn decode(&mut self, rows: &[DecodeRow]) -> anyhow::Result<Vec<Sampled>> {
        let sampled = self.model.decode(rows).context("decode on the GPU")?;
        Ok(sampled.into_iter().flatten().map(without_raw).collect())
    }

    fn mixed(&mut self, batch: &StepBatch, tables: &[Vec<u32>]) -> anyhow::Result<Vec<Sampled>> {
        let goes_on = batch.items.iter().any(|item| item.num_to_sample() > 1);
        anyhow::ensure!(!goes_on, "several tokens are asked for in a step with prompts");
        let chunk = |(item, block_table)| {
            let BatchItem { tokens, start, choose, .. }: &BatchItem = item;
            let block_table: &Vec<u32> = block_table;
            let choice = choose.as_ref().map_or(Choice::Nothing, choice);
            Chunk { tokens, start: *start, block_table, choice }
        };
        let chunks: Vec<Chunk> = batch.items.iter().zip(tables).map(chunk).collect();
        let mut from_host = Vec::new();
        let Self { model, pool, host_sampling } = self;
        let from_device = model.run(&chunks, |index, mut logits| {
            let start = Instant::now();
            let chosen: Vec<(usize, &Choose)> = batch.items[index].choose.iter().map(|choose| (0, choose)).collect();
            from_host.push(choose_tokens(pool, &mut logits, &chosen));
            *host_sampling += start.elapsed();
        });
        let mut from_device = from_device.context("compute prompts on the GPU")?.into_iter().map(without_raw);
        let mut from_host = from_host.into_iter();
        let mut sampled = Vec::new();
        for chunk in &chunks {
            match chunk.choice {
                Choice::Nothing => {}
                Choice::Sample { .. } => sampled.extend(from_device.next()),
                Choice::Logits => {
                    sampled.extend(from_host.next().transpose().context("sample on the host")?.into_iter().flatten());
                }
            }
        }
        Ok(sampled)
    }
}

impl<Q: Queue> Runner for GpuRunner<Q> {
    type Staged = GpuWeights;

    fn run(&mut self, batch: &StepBatch) -> anyhow::Result<Vec<Sampled>> {
        let copies: Vec<(u32, u32)> = batch.copies.iter().map(|copy| (copy.from.0, copy.to.0)).collect();
        self.model.copy_blocks(&copies).context("copy blocks of the KV cache")?;
        let tables: Vec<Vec<u32>> = batch.items.iter().map(|item| raw_blocks(&item.block_table)).collect();
        match batch.items.iter().zip(&tables).map(|(item, table)| decode_row(item, table)).collect::<Option<Vec<_>>>() {
            Some(rows) => self.decode(&rows),
            None => self.mixed(batch, &tables),
        }
    }

    fn score(&mut self, tokens: &[TokenId], block_table: &[BlockId]) -> anyhow::Result<Vec<f32>> {
        Ok(self.model.score(tokens, &raw_blocks(block_table))?)
    }

    /// What the GPU does is not told apart.
    fn times(&self) -> StepTimes {
        StepTimes { sampling: self.host_sampling, ..StepTimes::default() }
    }

    fn has_weights(&self) -> bool {
        self.model.has_weights()
    }

    fn swap(&mut self, staged: GpuWeights) -> anyhow::Result<Option<GpuWeights>> {
        self.model.swap(staged).context("put new weights in place on the GPU")
    }

    fn release_weights(&mut self) -> anyhow::Result<()> {
        Ok(self.model.release_weights()?)
    }

    fn release_cache(&mut self) -> anyhow::Result<()> {
        Ok(self.model.release_cache()?)
    }

    fn restore_cache(&mut self) -> anyhow::Result<()> {
        Ok(self.model.restore_cache()?)
    }
}

/// An item that needs nothing but one token after the other.
fn decode_row<'a>(item: &'a BatchItem, block_table: &'a [u32]) -> Option<DecodeRow<'a>> {
    let (&[token], Some(choose)) = (item.tokens.as_slice(), &item.choose) else { return None };
    let Choice::Sample { params, uniform, suppress } = choice(choose) else { return None };
    let first = DecodeRow {
        token,
        position: item.start,
        block_table,
        params,
        uniform,
        num_tokens: 1,
        seed: 0,
        sample_index: 0,
        num_generated: 0,
        min_tokens: u32::from(!suppress.is_empty()),
        stops: suppress,
    };
    Some(match &choose.ahead {
        None => first,
        Some(Ahead { num_tokens, seed, sample_index, num_generated, stop_token_ids }) => DecodeRow {
            num_tokens: *num_tokens,
            seed: *seed,
            sample_index: *sample_index,
            num_generated: *num_generated,
            min_tokens: choose.sampling.min_tokens,
            stops: stop_token_ids,
            ..first
        },
    })
}

fn choice(choose: &Choose) -> Choice<'_> {
    let Choose { sampling, uniform, suppress, .. } = choose;
    if sampling.edits_logits() || sampling.logprobs > 0 || suppress.len() > MAX_STOPS {
        return Choice::Logits;
    }
    Choice::Sample { params: sampling_params(sampling), uniform: *uniform, suppress }
}

fn without_raw(Sample { token, log_prob }: Sample) -> Sampled {
    Sampled { token, logprob: log_prob, raw: None }
}

fn raw_blocks(table: &[BlockId]) -> Vec<u32> {
    table.iter().map(|block| block.0).collect()
}
