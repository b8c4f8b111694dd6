//! What a pass works on, and the passes that there are.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::pass::{Pass, PassRows};
use super::queue::{GpuError, Queue};
use super::rows::{GpuSizes, MAX_STOPS, bucket};
use super::step_memory::{Bounds, Region, StepMemory};
use super::weights::GpuWeights;
use crate::kernels::cuda::{
    Advance, DecodeAttention, DevicePtr, KernelShapes, LogitKind, Sample, StateField, Suppress, kv_cache_len,
};
use crate::logprob::chunk_rows;
use crate::model_config::ModelConfig;
use crate::rotary::RotaryTable;

/// The memory of one model on one device. None of it moves while there are graphs.
#[derive(Debug)]
pub(super) struct Network {
    pub config: ModelConfig,
    pub shapes: KernelShapes,
    /// None while they are given back.
    pub weights: Option<GpuWeights>,
    pub rotary: RotaryTable,
    /// bf16 `[2 L, num_blocks, K * block_size * D]`: keys and values of each layer; none while its memory is given back.
    pub cache: Option<Tensor>,
    pub buffers: Buffers,
    pub step: StepMemory,
}

/// What a pass computes, for up to `N` rows.
#[derive(Debug)]
pub(super) struct Buffers {
    /// fp32 `[N, C]`.
    pub residual: Tensor,
    /// `[N, C]`, bf16 as all that follow but the last three.
    pub normed: Tensor,
    /// `[N, (H + 2 K) * D]`.
    pub qkv: Tensor,
    /// `[N, H * D]`.
    pub queries: Tensor,
    /// `[N, H * D]`.
    pub attended: Tensor,
    /// What is to be added to the residual, `[N, C]`.
    pub delta: Tensor,
    /// `[N, 2 F]`.
    pub gate_up: Tensor,
    /// `[N, F]`.
    pub gated: Tensor,
    /// fp32 `[M, V]`, of as many rows at once as bound its memory.
    pub logits: Tensor,
    /// fp32 `[S, H, splits, D]`.
    pub partial_out: Tensor,
    /// fp32 `[S, H, splits]`.
    pub partial_lse: Tensor,
}

/// What is wanted of the first rows that the final norm is of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Selected {
    pub num_selected: usize,
    /// Tokens, or only their logits.
    pub samples: bool,
}

impl Network {
    pub(super) fn new(
        queue: &impl Queue,
        config: &ModelConfig,
        weights: Option<GpuWeights>,
        sizes: &GpuSizes,
    ) -> Result<Self, GpuError> {
        let shapes = KernelShapes::of(config, sizes.block_size, LogitKind::Fp32)?;
        let bounds = Bounds {
            sequences: bucket(sizes.max_num_seqs),
            rows: sizes.max_num_batched_tokens.max(bucket(sizes.max_num_seqs)),
            steps: sizes.steps_per_look,
            stops: MAX_STOPS,
            blocks: sizes.max_model_len.div_ceil(sizes.block_size),
        };
        let mut network = Self {
            config: config.clone(),
            shapes,
            weights,
            rotary: RotaryTable::new(config, sizes.max_model_len, queue.device()),
            cache: None,
            buffers: Buffers::new(queue, &shapes, bounds, sizes.max_model_len)?,
            step: StepMemory::new(queue, bounds)?,
        };
        if network.weights.is_some() {
            network.restore_cache(queue, sizes.num_blocks)?;
        }
        Ok(network)
    }

    pub(super) fn restore_cache(&mut self, queue: &impl Queue, num_blocks: usize) -> Result<(), GpuError> {
        let block = kv_cache_len(self.shapes.attention, self.shapes.num_kv_heads, 1);
        let shape = [2 * self.config.num_layers, num_blocks, block].map(|size| size as i64);
        self.cache = Some(Tensor::f_empty(shape, (Kind::BFloat16, queue.device()))?);
        Ok(())
    }

    pub(super) fn keys_and_values(&self, layer_idx: usize) -> Option<[DevicePtr; 2]> {
        let cache = self.cache.as_ref()?;
        let [_, num_blocks, block] = <[i64; 3]>::try_from(cache.size()).ok()?;
        let at = |index| DevicePtr::of(cache).at(index * (num_blocks * block) as usize, 2);
        Some([at(2 * layer_idx), at(2 * layer_idx + 1)])
    }

    /// One step of `num_rows` sequences whose state is on the device, to the next state: what a graph captures.
    pub(super) fn decode<Q: Queue>(
        &self,
        queue: &mut Q,
        num_rows: usize,
        max_context_len: usize,
    ) -> Result<(), GpuError> {
        let Self { shapes, step, .. } = self;
        let rows = PassRows {
            num_rows,
            num_decodes: num_rows,
            max_context_len,
            num_spans: 0,
            max_span_rows: 0,
            tokens: step.state(StateField::Token, 0),
            positions: step.state(StateField::Position, 0),
            slots: step.state(StateField::Slot, 0),
            context_lens: step.state(StateField::ContextLen, 0),
        };
        let pass = Pass::new(self, queue, rows)?;
        pass.layers();
        pass.final_norm(None);
        self.logits(&pass, Selected { num_selected: num_rows, samples: true }, &mut |_, _| Ok(()))?;
        let Bounds { sequences, steps, stops, blocks, .. } = step.bounds;
        let advance = Advance {
            num_rows,
            stride: sequences,
            state: step.state(StateField::Token, 0),
            tokens: step.address(Region::Tokens, 0),
            log_probs: step.address(Region::LogProbs, 0),
            statuses: step.address(Region::Statuses, 0),
            block_tables: step.address(Region::BlockTables, 0),
            max_blocks: blocks,
            block_size: shapes.attention.block_size,
            stop_tokens: step.address(Region::Stops, 0),
            max_stops: stops,
            logged_tokens: step.address(Region::LoggedTokens, 0),
            logged_log_probs: step.address(Region::LoggedLogProbs, 0),
            log_len: steps,
        };
        pass.launch(&advance.launch());
        pass.finish()
    }

    /// Rows of all kinds, then the logits of `num_selected` of them by [`Region::Selected`]: `see` gets the first row and
    /// the logits `[M, V]` of every chunk, before any edit. From those that are in use by their state, tokens are sampled
    /// if `samples`.
    pub(super) fn mixed<Q: Queue>(
        &self,
        queue: &mut Q,
        rows: PassRows,
        Selected { num_selected, samples }: Selected,
        see: &mut dyn FnMut(usize, &Tensor) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        let pass = Pass::new(self, queue, rows)?;
        pass.layers();
        if num_selected > 0 {
            pass.final_norm(Some(num_selected));
        }
        self.logits(&pass, Selected { num_selected, samples }, see)?;
        pass.finish()
    }

    /// Logits of the first normed rows, in as many chunks as bound their memory.
    fn logits<Q: Queue>(
        &self,
        pass: &Pass<Q>,
        selected: Selected,
        see: &mut dyn FnMut(usize, &Tensor) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        let most = self.buffers.logits.size()[0] as usize;
        for first in (0..selected.num_selected).step_by(most) {
            let num_rows = most.min(selected.num_selected - first);
            let logits = pass.logits(first, num_rows);
            see(first, &logits)?;
            if selected.samples {
                self.sample(pass, DevicePtr::of(&logits), first..first + num_rows);
            }
        }
        Ok(())
    }

    /// Tokens of `rows`, by their state, parameters and stop tokens; the first one's logits are at `logits`.
    fn sample<Q: Queue>(&self, pass: &Pass<Q>, logits: DevicePtr, rows: Range<usize>) {
        let Self { step, shapes, .. } = self;
        let (first, num_rows) = (rows.start, rows.len());
        let (vocab_size, max_stops) = (shapes.vocab_size, step.bounds.stops);
        let context_lens = step.state(StateField::ContextLen, first);
        let suppress = Suppress {
            kind: shapes.logits,
            num_rows,
            vocab_size,
            logits,
            context_lens,
            num_generated: step.state(StateField::NumGenerated, first),
            min_tokens: step.state(StateField::MinTokens, first),
            stop_tokens: step.address(Region::Stops, first * max_stops),
            max_stops,
        };
        let sample = Sample {
            kind: shapes.logits,
            num_rows,
            vocab_size,
            logits,
            params: step.address(Region::Params, 4 * first),
            uniforms: step.state(StateField::Uniform, first),
            context_lens: Some(context_lens),
            tokens: step.address(Region::Tokens, first),
            log_probs: step.address(Region::LogProbs, first),
            statuses: step.address(Region::Statuses, first),
        };
        pass.launch(&suppress.launch());
        pass.launch(&sample.launch());
    }
}

impl Buffers {
    fn new(queue: &impl Queue, shapes: &KernelShapes, bounds: Bounds, max_model_len: usize) -> Result<Self, GpuError> {
        let KernelShapes { attention, num_heads, num_kv_heads, hidden_size, intermediate_size, vocab_size, .. } =
            *shapes;
        let head_dim = attention.head_dim;
        let zeros = |kind, shape: &[usize]| {
            let shape: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
            Tensor::f_zeros(shape.as_slice(), (kind, queue.device()))
        };
        let rows = |width| zeros(Kind::BFloat16, &[bounds.rows, width]);
        let splits = [bounds.sequences, num_heads, DecodeAttention::num_splits(max_model_len)];
        let num_logits = (chunk_rows(vocab_size as i64) as usize).min(bounds.rows);
        Ok(Self {
            residual: zeros(Kind::Float, &[bounds.rows, hidden_size])?,
            normed: rows(hidden_size)?,
            qkv: rows((num_heads + 2 * num_kv_heads) * head_dim)?,
            queries: rows(num_heads * head_dim)?,
            attended: rows(num_heads * head_dim)?,
            delta: rows(hidden_size)?,
            gate_up: rows(2 * intermediate_size)?,
            gated: rows(intermediate_size)?,
            logits: zeros(Kind::Float, &[num_logits, vocab_size])?,
            partial_out: zeros(Kind::Float, &[splits[0], splits[1], splits[2], head_dim])?,
            partial_lse: zeros(Kind::Float, &splits)?,
        })
    }
}
