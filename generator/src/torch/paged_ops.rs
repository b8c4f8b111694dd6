//! The operations of the transformer over paged keys and values, by the CPU kernels.
//!
//! fp32 throughout, and batch-invariant: a row's result does not depend on which rows are computed with it.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use aha_core::ids::TokenId;
use aha_nn::kernels::cpu::{KvCache, Pool, RmsNorm, RopeTables, SequenceSpan, paged_attention, silu_mul};
use aha_nn::model_config::ModelConfig;
use aha_nn::tensor_data::f32_slice;
use aha_nn::transformer::{Ops, Projection};
use tch::Tensor;

use super::arena::{Arena, Rows};
use super::weights::{MatrixPart, ServingWeights};

/// New tokens of several sequences, one after the other.
#[derive(Debug, Default)]
pub(super) struct PagedRows<'a> {
    tokens: Vec<TokenId>,
    /// `[N]`, of each token in its sequence.
    positions: Vec<u32>,
    /// `[N]`, where each token's key and value go.
    slots: Vec<u32>,
    spans: Vec<SequenceSpan<'a>>,
}

impl<'a> PagedRows<'a> {
    /// Adds tokens that stand at `start..` of the sequence that owns `block_table`.
    pub(super) fn push(&mut self, tokens: &[TokenId], start: usize, block_table: &'a [u32], block_size: usize) {
        let span =
            SequenceSpan { first_row: self.tokens.len(), num_rows: tokens.len(), first_position: start, block_table };
        self.spans.push(span);
        self.tokens.extend_from_slice(tokens);
        for position in start..start + tokens.len() {
            self.positions.push(position as u32);
            self.slots.push(block_table[position / block_size] * block_size as u32 + (position % block_size) as u32);
        }
    }

    /// `N`.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }
}

/// Time that a pass spends on its large operations.
#[derive(Debug, Default)]
pub(super) struct Clock {
    pub gemm: Cell<Duration>,
    pub attention: Cell<Duration>,
}

/// One forward pass.
#[derive(Debug)]
pub(super) struct PagedOps<'a> {
    pub pool: &'a Pool,
    pub config: &'a ModelConfig,
    pub weights: &'a ServingWeights,
    pub rope: RopeTables<'a>,
    /// One a layer. The pass runs on one thread, which writes a layer's keys before it reads them.
    pub caches: RefCell<&'a mut [KvCache]>,
    pub arena: &'a Arena,
    pub clock: Clock,
    pub rows: PagedRows<'a>,
}

impl<'a> PagedOps<'a> {
    /// Hidden states of all rows after the last layer, `[N, C]`. Their keys and values are in the cache then.
    pub(super) fn hidden_states(&self) -> Rows<'a> {
        let embedded = self.embed(self.weights.embedding()); // [N, C]
        let layers = self.weights.layers().iter().enumerate();
        layers.fold(embedded, |x, (layer_idx, layer)| layer.forward(self, self.config, layer_idx, x))
    }

    /// Logits of the rows `selected` of `hidden: [N, C]`, `[selected, V]`.
    pub(super) fn logits(&self, hidden: &Rows<'a>, selected: &[usize]) -> Rows<'a> {
        let width = self.config.hidden_size;
        let mut rows = self.arena.rows(selected.len(), width); // [M, C]
        for (row, &index) in rows.data_mut().chunks_exact_mut(width).zip(selected) {
            row.copy_from_slice(&hidden.data()[index * width..][..width]);
        }
        let rows = self.rms_norm(&rows, self.weights.norm(), self.config.rms_norm_eps);
        let [logits] = self.linear(&rows, [&self.weights.head()]); // [M, V]
        logits
    }

    /// `[1, out]`, if the projections have biases.
    fn stacked_bias(&self, projections: &[&Projection<MatrixPart>]) -> Option<Rows<'a>> {
        let biases = || projections.iter().filter_map(|projection| projection.bias.as_ref().map(f32_slice));
        let num_biases = biases().map(<[f32]>::len).sum();
        if num_biases == 0 {
            return None;
        }
        let mut stacked = self.arena.rows(1, num_biases);
        let mut start = 0;
        for bias in biases() {
            stacked.data_mut()[start..][..bias.len()].copy_from_slice(bias);
            start += bias.len();
        }
        Some(stacked)
    }
}

impl<'a> Ops for PagedOps<'a> {
    type Matrix = MatrixPart;
    type Rows = Rows<'a>;

    fn embed(&self, weight: &Tensor) -> Rows<'a> {
        let width = weight.size()[1] as usize;
        let mut out = self.arena.rows(self.rows.len(), width); // [N, C]
        let table = f32_slice(weight);
        for (out, &token) in out.data_mut().chunks_exact_mut(width).zip(&self.rows.tokens) {
            out.copy_from_slice(&table[token as usize * width..][..width]);
        }
        out
    }

    fn rms_norm(&self, x: &Rows<'a>, weight: &Tensor, eps: f64) -> Rows<'a> {
        let norm = RmsNorm { weight: f32_slice(weight), epsilon: eps as f32 };
        let mut out = self.arena.rows(x.num_rows(), x.width());
        x.with(|x| out.with_mut(|out| norm.apply(self.pool, x, out)));
        out
    }

    fn head_norm(&self, mut x: Rows<'a>, weight: &Tensor, eps: f64) -> Rows<'a> {
        let norm = RmsNorm { weight: f32_slice(weight), epsilon: eps as f32 };
        x.with_mut(|x| norm.apply_in_place(self.pool, x));
        x
    }

    fn linear<const P: usize>(&self, x: &Rows<'a>, projections: [&Projection<MatrixPart>; P]) -> [Rows<'a>; P] {
        let matrix = self.weights.matrix(projections.map(|projection| projection.weight));
        let mut out = self.arena.rows(x.num_rows(), matrix.out_features()); // [N, out]
        let bias = self.stacked_bias(&projections);
        let bias = bias.as_ref().map(Rows::data);
        timed(&self.clock.gemm, || matrix.gemm(self.pool, &x.data(), bias.as_deref(), &mut out.data_mut()));
        out.split(projections.map(|projection| projection.weight.out_features))
    }

    fn add_linear(&self, mut residual: Rows<'a>, x: &Rows<'a>, projection: &Projection<MatrixPart>) -> Rows<'a> {
        let matrix = self.weights.matrix([projection.weight]);
        let bias = projection.bias.as_ref().map(f32_slice);
        timed(&self.clock.gemm, || matrix.gemm_add(self.pool, &x.data(), bias, &mut residual.data_mut()));
        residual
    }

    fn rope(&self, mut x: Rows<'a>) -> Rows<'a> {
        x.with_mut(|x| self.rope.apply(self.pool, x, &self.rows.positions));
        x
    }

    fn attention(&self, layer_idx: usize, [q, k, v]: [Rows<'a>; 3]) -> Rows<'a> {
        let cache = &mut self.caches.borrow_mut()[layer_idx];
        let mut out = self.arena.rows(q.num_rows(), q.width()); // [N, H * D]
        timed(&self.clock.attention, || {
            k.with(|k| v.with(|v| cache.write(&self.rows.slots, k, v)));
            q.with(|q| paged_attention(self.pool, q, &self.rows.spans, cache, &mut out.data_mut()));
        });
        out
    }

    fn silu_mul(&self, [gate, up]: [Rows<'a>; 2]) -> Rows<'a> {
        let (num_rows, num_features) = (gate.num_rows(), gate.width());
        let mut out = self.arena.rows(num_rows, num_features); // [N, F]
        silu_mul(self.pool, &gate.join(up).data(), num_features, &mut out.data_mut());
        out
    }
}

fn timed(total: &Cell<Duration>, operation: impl FnOnce()) {
    let start = Instant::now();
    operation();
    total.set(total.get() + start.elapsed());
}
