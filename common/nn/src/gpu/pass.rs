//! The operations of the transformer as launches: one pass over the rows of a step.
//!
//! Kernels do more than one operation each, so an operation may only take note of what a later one launches: a
//! projection's output is added to the residual by the norm that follows, and bias, norm and rotation of q, k and v
//! happen on the way into the cache. [`Rows`] says what a value is, and where it lies follows from that.

use std::cell::{Cell, RefCell};

use tch::Tensor;

use super::network::Network;
use super::queue::{GpuError, Queue};
use super::step_memory::Region;
use super::weights::{GpuWeights, stacked};
use crate::kernels::cuda::{
    AddRmsNorm, DecodeAttention, DevicePtr, Embed, Launch, PagedKv, PrefillAttention, QkvRope, SiluMul,
};
use crate::transformer::{Ops, Projection};

/// Which rows a pass has, and where on the device it finds what belongs to each.
#[derive(Debug, Clone, Copy)]
pub(super) struct PassRows {
    /// `N`: those that decode, one a sequence, then the chunks of prompts.
    pub num_rows: usize,
    pub num_decodes: usize,
    /// No sequence that decodes is longer; fixed in a graph.
    pub max_context_len: usize,
    pub num_spans: usize,
    pub max_span_rows: usize,
    /// i32 `[N]`, as are the next two.
    pub tokens: DevicePtr,
    pub positions: DevicePtr,
    pub slots: DevicePtr,
    /// i32 `[num_decodes]`.
    pub context_lens: DevicePtr,
}

/// One pass. The first error ends it: what would follow is not launched.
#[derive(Debug)]
pub(super) struct Pass<'a, Q> {
    network: &'a Network,
    weights: &'a GpuWeights,
    queue: RefCell<&'a mut Q>,
    rows: PassRows,
    /// Whether `delta` is to be added to the residual.
    has_delta: Cell<bool>,
    outcome: RefCell<Result<(), GpuError>>,
}

/// What a value of the pass is: the buffer that holds it, or will.
#[derive(Debug)]
pub(super) enum Rows {
    Residual,
    Normed,
    Qkv { part: usize, first_bias: Option<DevicePtr>, norm: Option<DevicePtr>, is_turned: bool },
    Attended,
    GateUp { part: usize },
    Gated,
}

impl<'a, Q: Queue> Pass<'a, Q> {
    /// # Errors
    /// If there are no weights.
    pub(super) fn new(network: &'a Network, queue: &'a mut Q, rows: PassRows) -> Result<Self, GpuError> {
        let weights = network.weights.as_ref().ok_or(GpuError::NoWeights)?;
        let (queue, outcome) = (RefCell::new(queue), RefCell::new(Ok(())));
        Ok(Self { network, weights, queue, rows, has_delta: Cell::new(false), outcome })
    }

    /// All layers; keys and values of all rows are in the cache then. What the last layer adds is still to be added.
    pub(super) fn layers(&self) {
        let embedded = self.embed(&self.weights.embedding);
        let layers = self.weights.layers.iter().enumerate();
        let config = &self.network.config;
        layers.fold(embedded, |x, (layer_idx, layer)| layer.forward(self, config, layer_idx, x));
    }

    /// The final norm of all rows, or of `num_selected` ones by [`Region::Selected`], into the normed rows.
    pub(super) fn final_norm(&self, num_selected: Option<usize>) {
        let selected = self.network.step.address(Region::Selected, 0);
        let rows = num_selected.map(|_| selected);
        self.norm(num_selected.unwrap_or(self.rows.num_rows), &self.weights.norm, rows);
    }

    /// Logits of the normed rows `first_row..first_row + num_rows`, `[num_rows, V]`.
    pub(super) fn logits(&self, first_row: usize, num_rows: usize) -> Tensor {
        let buffers = &self.network.buffers;
        let normed = buffers.normed.narrow(0, first_row as i64, num_rows as i64);
        let logits = buffers.logits.narrow(0, 0, num_rows as i64);
        self.product(&normed, &self.weights.head, &logits);
        logits
    }

    /// The launch's addresses and sizes must be those of this pass and its network.
    pub(super) fn launch(&self, launch: &Launch) {
        self.attempt(|queue| {
            // SAFETY: only this module and `network` call this, with addresses of the tensors of a `Network`, which
            // keeps them until it has dropped the graphs, and sizes within those it made them with. What kernels read
            // from the step's memory is what `model` has checked: tokens are in the vocabulary, blocks in the cache,
            // positions in the table of angles, selected rows among the rows.
            unsafe { queue.launch(launch) }
        });
    }

    pub(super) fn finish(self) -> Result<(), GpuError> {
        self.outcome.into_inner()
    }

    fn attempt(&self, work: impl FnOnce(&mut Q) -> Result<(), GpuError>) {
        let mut outcome = self.outcome.borrow_mut();
        if outcome.is_ok() {
            *outcome = work(&mut self.queue.borrow_mut());
        }
    }

    fn product(&self, x: &Tensor, weight: &Tensor, out: &Tensor) {
        self.attempt(|queue| queue.product(x, weight, out));
    }

    /// `out = x * weight^T` over the rows of the pass.
    fn project(&self, x: &Tensor, weight: &Tensor, out: &Tensor) {
        let [x, out] = [x, out].map(|rows| rows.narrow(0, 0, self.rows.num_rows as i64));
        self.product(&x, weight, &out);
    }

    fn norm(&self, num_rows: usize, weight: &Tensor, rows: Option<DevicePtr>) {
        let buffers = &self.network.buffers;
        let norm = AddRmsNorm {
            num_rows,
            width: self.network.config.hidden_size,
            epsilon: self.network.config.rms_norm_eps as f32,
            residual: DevicePtr::of(&buffers.residual),
            delta: self.has_delta.take().then(|| DevicePtr::of(&buffers.delta)),
            weight: DevicePtr::of(weight),
            out: DevicePtr::of(&buffers.normed),
            rows,
        };
        self.launch(&norm.launch());
    }

    fn kv(&self, layer_idx: usize, first_sequence: usize) -> Option<PagedKv> {
        let Network { shapes, step, .. } = self.network;
        let [keys, values] = self.network.keys_and_values(layer_idx)?;
        let max_blocks = step.bounds.blocks;
        let block_tables = step.address(Region::BlockTables, first_sequence * max_blocks);
        let (shape, num_kv_heads) = (shapes.attention, shapes.num_kv_heads);
        Some(PagedKv { shape, num_kv_heads, keys, values, block_tables, max_blocks })
    }
}

impl<Q: Queue> Ops for Pass<'_, Q> {
    type Matrix = Tensor;
    type Rows = Rows;

    fn embed(&self, weight: &Tensor) -> Rows {
        let embed = Embed {
            num_rows: self.rows.num_rows,
            width: self.network.config.hidden_size,
            tokens: self.rows.tokens,
            table: DevicePtr::of(weight),
            residual: DevicePtr::of(&self.network.buffers.residual),
        };
        self.launch(&embed.launch());
        Rows::Residual
    }

    fn rms_norm(&self, x: &Rows, weight: &Tensor, _eps: f64) -> Rows {
        let Rows::Residual = x else { panic!("only the residual is normed, and this is {x:?}") };
        self.norm(self.rows.num_rows, weight, None);
        Rows::Normed
    }

    fn head_norm(&self, x: Rows, weight: &Tensor, _eps: f64) -> Rows {
        match x {
            Rows::Qkv { part, first_bias, norm: None, is_turned: false } => {
                Rows::Qkv { part, first_bias, norm: Some(DevicePtr::of(weight)), is_turned: false }
            }
            x => panic!("only heads of q and k are normed, before they turn, and this is {x:?}"),
        }
    }

    fn linear<const P: usize>(&self, x: &Rows, projections: [&Projection<Tensor>; P]) -> [Rows; P] {
        let Rows::Normed = x else { panic!("only normed rows are projected, and these are {x:?}") };
        let buffers = &self.network.buffers;
        let matrix = stacked(&projections.map(|projection| &projection.weight));
        if P == 3 {
            self.project(&buffers.normed, &matrix, &buffers.qkv);
            let first_bias = projections[0].bias.as_ref().map(DevicePtr::of);
            return std::array::from_fn(|part| Rows::Qkv { part, first_bias, norm: None, is_turned: false });
        }
        assert!(P == 2 && projections.iter().all(|projection| projection.bias.is_none()), "gate and up have no bias");
        self.project(&buffers.normed, &matrix, &buffers.gate_up);
        std::array::from_fn(|part| Rows::GateUp { part })
    }

    fn add_linear(&self, residual: Rows, x: &Rows, projection: &Projection<Tensor>) -> Rows {
        let buffers = &self.network.buffers;
        let x = match x {
            Rows::Attended => &buffers.attended,
            Rows::Gated => &buffers.gated,
            x => panic!("{x:?} is added to the residual by no projection"),
        };
        assert!(matches!(residual, Rows::Residual) && projection.bias.is_none(), "biases here are not supported");
        self.project(x, &projection.weight, &buffers.delta);
        self.has_delta.set(true);
        Rows::Residual
    }

    fn rope(&self, x: Rows) -> Rows {
        match x {
            Rows::Qkv { part, first_bias, norm, is_turned: false } => {
                Rows::Qkv { part, first_bias, norm, is_turned: true }
            }
            x => panic!("only q and k turn, and this is {x:?}"),
        }
    }

    fn attention(&self, layer_idx: usize, qkv: [Rows; 3]) -> Rows {
        use Rows::Qkv;
        let [
            Qkv { part: 0, first_bias, norm: q_norm, is_turned: true },
            Qkv { part: 1, norm: k_norm, is_turned: true, .. },
            Qkv { part: 2, norm: None, is_turned: false, .. },
        ] = qkv
        else {
            panic!("attention is over turned q and k, and v, not {qkv:?}")
        };
        let Some(kv) = self.kv(layer_idx, 0) else {
            self.attempt(|_| Err(GpuError::Released));
            return Rows::Attended;
        };
        let Network { buffers, rotary, config, step: _, .. } = self.network;
        let (queries, out) = (DevicePtr::of(&buffers.queries), DevicePtr::of(&buffers.attended));
        let rope = QkvRope {
            shape: kv.shape,
            num_kv_heads: kv.num_kv_heads,
            num_rows: self.rows.num_rows,
            qkv: DevicePtr::of(&buffers.qkv),
            bias: first_bias,
            qk_norms: q_norm.zip(k_norm).map(|(q, k)| [q, k]),
            epsilon: config.rms_norm_eps as f32,
            cos: DevicePtr::of(&rotary.cos),
            sin: DevicePtr::of(&rotary.sin),
            positions: self.rows.positions,
            slots: self.rows.slots,
            queries,
            keys: kv.keys,
            values: kv.values,
        };
        self.launch(&rope.launch());
        let decode = DecodeAttention {
            kv,
            num_sequences: self.rows.num_decodes,
            max_context_len: self.rows.max_context_len,
            queries,
            context_lens: self.rows.context_lens,
            out,
            partial_out: DevicePtr::of(&buffers.partial_out),
            partial_lse: DevicePtr::of(&buffers.partial_lse),
        };
        if self.rows.num_decodes > 0 {
            decode.launches().iter().for_each(|launch| self.launch(launch));
        }
        if let Some(kv) = self.kv(layer_idx, self.rows.num_decodes).filter(|_| self.rows.num_spans > 0) {
            let spans = self.network.step.address(Region::Spans, 0);
            let (num_sequences, max_rows) = (self.rows.num_spans, self.rows.max_span_rows);
            self.launch(&PrefillAttention { kv, num_sequences, max_rows, queries, spans, out }.launch());
        }
        Rows::Attended
    }

    fn silu_mul(&self, gate_up: [Rows; 2]) -> Rows {
        let [Rows::GateUp { part: 0 }, Rows::GateUp { part: 1 }] = gate_up else {
            panic!("SwiGLU is of gate and up, not {gate_up:?}")
        };
        let buffers = &self.network.buffers;
        let silu_mul = SiluMul {
            num_rows: self.rows.num_rows,
            num_features: self.network.config.intermediate_size,
            gate_up: DevicePtr::of(&buffers.gate_up),
            out: DevicePtr::of(&buffers.gated),
        };
        self.launch(&silu_mul.launch());
        Rows::Gated
    }
}
