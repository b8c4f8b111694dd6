//! One model on one device, as the generator drives it.

use std::collections::BTreeMap;

use tch::Tensor;

use super::network::{Network, Selected};
use super::pass::PassRows;
use super::queue::{GpuError, Queue};
use super::rows::{Choice, Chunk, DecodeRow, GpuSizes, MAX_STOPS, bucket};
use super::step_memory::Region;
use super::weights::GpuWeights;
use crate::kernels::cpu::Sample;
use crate::kernels::cuda::{DeviceSamplingParams, Outcome, SampleStatus, Span, StateField};
use crate::model_config::ModelConfig;

/// Everything on the device.
#[derive(Debug)]
pub struct GpuModel<Q: Queue> {
    queue: Q,
    sizes: GpuSizes,
    network: Network,
    /// Decoding steps by rows and longest context. Dropped before what they refer to.
    graphs: BTreeMap<(usize, usize), Q::Graph>,
}

/// Shortest context that graphs are made for; each next one is four times as long.
const SHORTEST_CONTEXT: usize = 1024;

impl<Q: Queue> GpuModel<Q> {
    /// Without weights it has no cache either: both come later.
    ///
    /// # Errors
    /// If the kernels cannot serve the model, or there is not enough memory.
    pub fn new(queue: Q, config: &ModelConfig, weights: Option<GpuWeights>, sizes: GpuSizes) -> Result<Self, GpuError> {
        let network = Network::new(&queue, config, weights, &sizes)?;
        Ok(Self { queue, sizes, network, graphs: BTreeMap::new() })
    }

    pub fn vocab_size(&self) -> usize {
        self.network.config.vocab_size
    }

    /// Copies blocks of the cache, one pair (from, to) after the other.
    ///
    /// # Errors
    /// If there is no such block.
    pub fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), GpuError> {
        let cache = self.network.cache.as_ref().ok_or(GpuError::Released)?;
        for &(from, to) in copies {
            self.check_blocks(&[from, to])?;
            let [from, mut to] = [from, to].map(|block| cache.select(1, i64::from(block))); // [2 L, K * block_size * D]
            to.f_copy_(&from)?;
        }
        Ok(())
    }

    /// Samples up to `num_tokens` tokens of every row, without a look of the host in between.
    ///
    /// # Errors
    /// If a row does not fit, logits are not finite, or the device fails.
    pub fn decode(&mut self, rows: &[DecodeRow]) -> Result<Vec<Vec<Sample>>, GpuError> {
        check("number of rows", rows.len(), self.sizes.max_num_seqs + 1)?;
        let mut longest = 0;
        for row in rows {
            self.check_decode(row)?;
            longest = longest.max(row.position + row.num_tokens);
        }
        let key = (bucket(rows.len()), self.context_bound(longest));
        if !self.graphs.contains_key(&key) {
            let graph = self.capture(key)?;
            self.graphs.insert(key, graph);
        }
        self.write_state(rows);
        let Self { queue, network, graphs, .. } = self;
        network.step.upload(rows.len())?;
        for _ in 0..rows.iter().map(|row| row.num_tokens).max().unwrap_or(0) {
            queue.replay(&graphs[&key])?;
        }
        network.step.download()?;
        (0..rows.len()).map(|row| self.logged(row)).collect()
    }

    /// Computes the chunks together; chunks of one token that come first count as decoding. `host` gets the index of
    /// each chunk whose choice is [`Choice::Logits`], and its logits `[V]`. The tokens of those that sample come back, in
    /// their order.
    ///
    /// # Errors
    /// If a chunk does not fit, logits are not finite, or the device fails.
    pub fn run(&mut self, chunks: &[Chunk], mut host: impl FnMut(usize, Vec<f32>)) -> Result<Vec<Sample>, GpuError> {
        let rows = self.write_chunks(chunks)?;
        let wanted: Vec<usize> = (0..chunks.len()).filter(|&i| !matches!(chunks[i].choice, Choice::Nothing)).collect();
        self.write_choices(chunks, &wanted);
        let Self { queue, network, .. } = self;
        network.step.upload(chunks.len())?;
        let is_logits = |index: usize| matches!(chunks[wanted[index]].choice, Choice::Logits);
        let selected = Selected { num_selected: wanted.len(), samples: true };
        network.mixed(queue, rows, selected, &mut |first, logits| {
            for row in (0..logits.size()[0] as usize).filter(|row| is_logits(first + row)) {
                host(wanted[first + row], Vec::try_from(logits.get(row as i64))?);
            }
            Ok(())
        })?;
        network.step.download()?;
        let sampled = (0..wanted.len()).filter(|&index| !is_logits(index));
        sampled.map(|index| self.sampled(index)).collect()
    }

    /// Log-probs of `tokens[1..]` given those before. Writes keys and values of all of them.
    ///
    /// # Errors
    /// As for [`GpuModel::run`].
    pub fn score(&mut self, tokens: &[u32], block_table: &[u32]) -> Result<Vec<f32>, GpuError> {
        let mut scores = Vec::with_capacity(tokens.len());
        let most = self.network.step.bounds.rows;
        for (chunk_idx, chunk) in tokens.chunks(most).enumerate() {
            let start = chunk_idx * most;
            let rows = self.write_chunks(&[Chunk { tokens: chunk, start, block_table, choice: Choice::Nothing }])?;
            let targets: Vec<i64> = tokens[start..].iter().skip(1).take(chunk.len()).map(|&t| i64::from(t)).collect();
            let Self { queue, network, .. } = self;
            (0..).zip(network.step.region(Region::Selected)).for_each(|(row, selected)| *selected = row);
            network.step.upload(1)?;
            let targets = Tensor::f_from_slice(&targets)?.f_to_device(queue.device())?;
            let selected = Selected { num_selected: targets.numel(), samples: false };
            network.mixed(queue, rows, selected, &mut |first, logits| {
                let targets = targets.f_narrow(0, first as i64, logits.size()[0])?.f_unsqueeze(1)?; // [M, 1]
                let chosen = logits.f_gather(1, &targets, false)?.f_squeeze_dim(1)?; // [M]
                scores.extend(Vec::<f32>::try_from(chosen.f_sub(&logits.f_logsumexp([1], false)?)?)?);
                Ok(())
            })?;
        }
        match scores.iter().position(|score| !score.is_finite()) {
            Some(row) => Err(GpuError::BadLogit { row, token: tokens[row + 1] as i32 }),
            None => Ok(scores),
        }
    }

    /// Serves `staged` from the next step on. Its values are copied to where graphs expect them, and the set comes back,
    /// to be written again; or else, where there are no weights or either set is borrowed, it takes the place itself.
    ///
    /// # Errors
    /// If the device fails.
    pub fn swap(&mut self, staged: GpuWeights) -> Result<Option<GpuWeights>, GpuError> {
        let own = self.network.weights.as_mut().filter(|serving| !serving.is_borrowed() && !staged.is_borrowed());
        if let Some(serving) = own {
            serving.copy_from(&staged)?;
            self.queue.synchronize()?;
            return Ok(Some(staged));
        }
        self.release_graphs()?;
        self.network.weights = Some(staged);
        Ok(None)
    }

    pub fn has_weights(&self) -> bool {
        self.network.weights.is_some()
    }

    /// Gives the weights back: their memory, or to who has lent them.
    ///
    /// # Errors
    /// If the device fails.
    pub fn release_weights(&mut self) -> Result<(), GpuError> {
        self.release_graphs()?;
        self.network.weights = None;
        self.queue.free_unused_memory()
    }

    /// Gives the cache's memory back.
    ///
    /// # Errors
    /// If the device fails.
    pub fn release_cache(&mut self) -> Result<(), GpuError> {
        self.release_graphs()?;
        self.network.cache = None;
        self.queue.free_unused_memory()
    }

    /// Waits for the graphs, and drops them before what they refer to.
    fn release_graphs(&mut self) -> Result<(), GpuError> {
        self.queue.synchronize()?;
        self.graphs.clear();
        Ok(())
    }

    /// Takes the cache's memory again; what it held is gone.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn restore_cache(&mut self) -> Result<(), GpuError> {
        self.network.restore_cache(&self.queue, self.sizes.num_blocks)
    }

    /// Warms up and captures, with no row in use.
    fn capture(&mut self, (num_rows, max_context_len): (usize, usize)) -> Result<Q::Graph, GpuError> {
        let Self { queue, network, .. } = self;
        network.step.clear();
        network.step.upload(0)?;
        queue.capture(|queue| network.decode(queue, num_rows, max_context_len))
    }

    fn context_bound(&self, context_len: usize) -> usize {
        let bounds = std::iter::successors(Some(SHORTEST_CONTEXT), |bound| Some(4 * bound));
        let fitting = bounds.into_iter().find(|bound| *bound >= context_len);
        fitting.unwrap_or(usize::MAX).min(self.sizes.max_model_len)
    }

    fn write_state(&mut self, rows: &[DecodeRow]) {
        let block_size = self.sizes.block_size;
        let step = &mut self.network.step;
        step.clear();
        for (index, row) in rows.iter().enumerate() {
            let slot = row.block_table[row.position / block_size] as usize * block_size + row.position % block_size;
            let capacity = row.block_table.len() * block_size;
            let fields = [
                (StateField::Token, row.token),
                (StateField::Position, row.position as u32),
                (StateField::ContextLen, row.position as u32 + 1),
                (StateField::Slot, slot as u32),
                (StateField::NumGenerated, row.num_generated),
                (StateField::MinTokens, row.min_tokens),
                (StateField::MaxTokens, row.num_generated + row.num_tokens as u32),
                (StateField::Capacity, capacity as u32),
                (StateField::SeedLow, row.seed as u32),
                (StateField::SeedHigh, (row.seed >> 32) as u32),
                (StateField::SampleIndex, row.sample_index),
                (StateField::Uniform, row.uniform.to_bits()),
            ];
            for (field, value) in fields {
                step.field(field)[index] = value as i32;
            }
            step.put(Region::Params, index, &DeviceSamplingParams::from(row.params).words());
            step.put_ids(Region::Stops, index, row.stops);
            step.put_ids(Region::BlockTables, index, row.block_table);
        }
    }

    fn write_chunks(&mut self, chunks: &[Chunk]) -> Result<PassRows, GpuError> {
        check("number of chunks", chunks.len(), self.sizes.max_num_seqs + 1)?;
        let num_rows = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        check("number of rows", num_rows, self.network.step.bounds.rows + 1)?;
        let num_decodes = chunks.iter().take_while(|chunk| chunk.tokens.len() == 1).count();
        let (mut first_row, mut max_context_len, mut max_span_rows) = (0, 0, 0);
        for (index, chunk) in chunks.iter().enumerate() {
            self.check_chunk(chunk)?;
            let Chunk { tokens, start, block_table, .. } = *chunk;
            let (block_size, step) = (self.sizes.block_size, &mut self.network.step);
            for (position, &token) in (start..).zip(tokens) {
                let slot = block_table[position / block_size] as usize * block_size + position % block_size;
                let row = first_row + position - start;
                step.region(Region::InputTokens)[row] = token as i32;
                step.region(Region::Positions)[row] = position as i32;
                step.region(Region::Slots)[row] = slot as i32;
            }
            step.put_ids(Region::BlockTables, index, block_table);
            if let Some(span_idx) = index.checked_sub(num_decodes) {
                let [first_row, num_rows, first_position] = [first_row, tokens.len(), start].map(|x| x as i32);
                step.put(Region::Spans, span_idx, &Span { first_row, num_rows, first_position }.words());
                max_span_rows = max_span_rows.max(tokens.len());
            } else {
                step.region(Region::ContextLens)[index] = start as i32 + 1;
                max_context_len = max_context_len.max(start + 1);
            }
            first_row += tokens.len();
        }
        let address = |region| self.network.step.address(region, 0);
        Ok(PassRows {
            num_rows,
            num_decodes,
            max_context_len,
            num_spans: chunks.len() - num_decodes,
            max_span_rows,
            tokens: address(Region::InputTokens),
            positions: address(Region::Positions),
            slots: address(Region::Slots),
            context_lens: address(Region::ContextLens),
        })
    }

    /// For the last row of each of the `wanted` chunks. The state is that of sampling alone.
    fn write_choices(&mut self, chunks: &[Chunk], wanted: &[usize]) {
        let step = &mut self.network.step;
        step.clear();
        let ends = chunks.iter().scan(0, |end, chunk| {
            *end += chunk.tokens.len() as i32;
            Some(*end)
        });
        let ends: Vec<i32> = ends.collect();
        for (index, &chunk_idx) in wanted.iter().enumerate() {
            step.region(Region::Selected)[index] = ends[chunk_idx] - 1;
            let Choice::Sample { params, uniform, suppress } = chunks[chunk_idx].choice else { continue };
            step.field(StateField::ContextLen)[index] = 1;
            step.field(StateField::MinTokens)[index] = i32::from(!suppress.is_empty());
            step.field(StateField::Uniform)[index] = uniform.to_bits() as i32;
            step.put(Region::Params, index, &DeviceSamplingParams::from(params).words());
            step.put_ids(Region::Stops, index, suppress);
        }
    }

    /// What a row has sampled in a look.
    fn logged(&mut self, row: usize) -> Result<Vec<Sample>, GpuError> {
        let steps = self.network.step.bounds.steps;
        let step = &mut self.network.step;
        let outcome = Outcome::from_field(step.field(StateField::Outcome)[row]);
        match outcome {
            Some(Outcome::Stop | Outcome::Length) => {}
            Some(Outcome::BadLogit) => {
                return Err(GpuError::BadLogit { row, token: step.region(Region::Tokens)[row] });
            }
            Some(Outcome::NothingAllowed) => return Err(GpuError::NothingAllowed { row }),
            _ => return Err(GpuError::BadOutcome { row, outcome: format!("{outcome:?}") }),
        }
        let num_logged = step.field(StateField::NumLogged)[row] as usize;
        let sample = |index: usize| Sample {
            token: step.region(Region::LoggedTokens)[row * steps + index] as u32,
            log_prob: f32::from_bits(step.region(Region::LoggedLogProbs)[row * steps + index] as u32),
        };
        Ok((0..num_logged.min(steps)).map(sample).collect())
    }

    fn sampled(&mut self, row: usize) -> Result<Sample, GpuError> {
        let step = &mut self.network.step;
        let [token, log_prob, status] =
            [Region::Tokens, Region::LogProbs, Region::Statuses].map(|region| step.region(region)[row]);
        if status == SampleStatus::Sampled as i32 {
            Ok(Sample { token: token as u32, log_prob: f32::from_bits(log_prob as u32) })
        } else if status == SampleStatus::BadLogit as i32 {
            Err(GpuError::BadLogit { row, token })
        } else {
            Err(GpuError::NothingAllowed { row })
        }
    }

    fn check_decode(&self, row: &DecodeRow) -> Result<(), GpuError> {
        let DecodeRow { token, position, block_table, num_tokens, stops, .. } = *row;
        check("number of tokens to sample", num_tokens.wrapping_sub(1), self.sizes.steps_per_look)?;
        self.check_ids(&[token], stops)?;
        self.check_table(block_table, position + num_tokens)
    }

    fn check_chunk(&self, chunk: &Chunk) -> Result<(), GpuError> {
        let stops = if let Choice::Sample { suppress, .. } = chunk.choice { suppress } else { &[] };
        self.check_ids(chunk.tokens, stops)?;
        self.check_table(chunk.block_table, chunk.start + chunk.tokens.len())
    }

    fn check_ids(&self, tokens: &[u32], stops: &[u32]) -> Result<(), GpuError> {
        check("number of stop tokens", stops.len(), MAX_STOPS + 1)?;
        tokens.iter().chain(stops).try_for_each(|&token| check("token", token as usize, self.vocab_size()))
    }

    /// A table over `num_tokens` tokens of one sequence.
    fn check_table(&self, table: &[u32], num_tokens: usize) -> Result<(), GpuError> {
        check("sequence length", num_tokens, self.sizes.max_model_len + 1)?;
        check("last position", num_tokens - 1, table.len() * self.sizes.block_size)?;
        check("number of blocks", table.len(), self.network.step.bounds.blocks + 1)?;
        self.check_blocks(table)
    }

    fn check_blocks(&self, blocks: &[u32]) -> Result<(), GpuError> {
        blocks.iter().try_for_each(|&block| check("block", block as usize, self.sizes.num_blocks))
    }
}

/// Waits for the graphs, before they are dropped with all that they use.
impl<Q: Queue> Drop for GpuModel<Q> {
    fn drop(&mut self) {
        if self.queue.synchronize().is_ok() {
            self.graphs.clear();
        }
    }
}

fn check(what: &'static str, value: usize, bound: usize) -> Result<(), GpuError> {
    if value < bound { Ok(()) } else { Err(GpuError::OutOfBounds { what, value, bound }) }
}
