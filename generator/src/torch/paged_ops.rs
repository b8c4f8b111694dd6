//! The operations of the transformer over paged keys and values, by the CPU kernels.
//!
//! fp32 throughout, and batch-invariant: a row's result does not depend on which rows are computed with it.

use std::cell::RefCell;

use aha_core::ids::TokenId;
use aha_nn::kernels::cpu::{
    KvCache, Pool, RmsNorm, RopeTables, Rows, RowsMut, SequenceSpan, paged_attention, silu_mul,
};
use aha_nn::model_config::ModelConfig;
use aha_nn::tensor_data::{f32_slice, f32_slice_mut};
use aha_nn::transformer::{Ops, Projection};
use tch::{Device, Kind, Tensor};

use super::weights::{MatrixId, ServingWeights};

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

/// One forward pass.
#[derive(Debug)]
pub(super) struct PagedOps<'a> {
    pub pool: &'a Pool,
    pub config: &'a ModelConfig,
    pub weights: &'a ServingWeights,
    pub rope: RopeTables<'a>,
    /// One a layer. The pass runs on one thread, which writes a layer's keys before it reads them.
    pub caches: RefCell<&'a mut [KvCache]>,
    pub rows: PagedRows<'a>,
}

impl PagedOps<'_> {
    /// Hidden states of all rows after the last layer, `[N, C]`. Their keys and values are in the cache then.
    pub(super) fn hidden_states(&self) -> Tensor {
        let embedded = self.embed(self.weights.embedding()); // [N, C]
        let layers = self.weights.layers().iter().enumerate();
        layers.fold(embedded, |x, (layer_idx, layer)| layer.forward(self, self.config, layer_idx, &x))
    }

    /// Logits of the rows `selected` of `hidden: [N, C]`, `[selected, V]`.
    pub(super) fn logits(&self, hidden: &Tensor, selected: &[usize]) -> Tensor {
        let width = self.config.hidden_size;
        let mut rows = empty(&[selected.len(), width]); // [M, C]
        for (row, &index) in f32_slice_mut(&mut rows).chunks_exact_mut(width).zip(selected) {
            row.copy_from_slice(&f32_slice(hidden)[index * width..][..width]);
        }
        let rows = self.rms_norm(&rows, self.weights.norm(), self.config.rms_norm_eps);
        self.linear(&rows, &self.weights.head()) // [M, V]
    }
}

impl Ops for PagedOps<'_> {
    type Matrix = MatrixId;

    fn embed(&self, weight: &Tensor) -> Tensor {
        let width = weight.size()[1] as usize;
        let mut out = empty(&[self.rows.len(), width]); // [N, C]
        let table = f32_slice(weight);
        for (out, &token) in f32_slice_mut(&mut out).chunks_exact_mut(width).zip(&self.rows.tokens) {
            out.copy_from_slice(&table[token as usize * width..][..width]);
        }
        out
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        let norm = RmsNorm { weight: f32_slice(weight), epsilon: eps as f32 };
        let width = norm.weight.len();
        let mut out = x.empty_like();
        norm.apply(self.pool, Rows::new(f32_slice(x), width), RowsMut::new(f32_slice_mut(&mut out), width));
        out
    }

    fn linear(&self, x: &Tensor, projection: &Projection<MatrixId>) -> Tensor {
        let matrix = self.weights.matrix(projection.weight);
        let mut out = empty(&[x.size()[0] as usize, matrix.out_features()]); // [N, out]
        let bias = projection.bias.as_ref().map(f32_slice);
        matrix.gemm(self.pool, f32_slice(x), bias, f32_slice_mut(&mut out));
        out
    }

    fn rope(&self, mut x: Tensor) -> Tensor {
        let width = x.numel() / self.rows.positions.len();
        self.rope.apply(self.pool, RowsMut::new(f32_slice_mut(&mut x), width), &self.rows.positions);
        x
    }

    fn attention(&self, layer_idx: usize, [q, k, v]: [Tensor; 3]) -> Tensor {
        let mut caches = self.caches.borrow_mut();
        let cache = &mut caches[layer_idx];
        let (num_rows, layout) = (self.rows.len(), cache.layout());
        let kv_width = layout.num_kv_heads * layout.head_dim;
        cache.write(&self.rows.slots, Rows::new(f32_slice(&k), kv_width), Rows::new(f32_slice(&v), kv_width));
        let width = q.numel() / num_rows;
        let mut out = empty(&[num_rows, width]); // [N, H * D]
        let queries = Rows::new(f32_slice(&q), width);
        paged_attention(self.pool, queries, &self.rows.spans, cache, f32_slice_mut(&mut out));
        out
    }

    fn silu_mul(&self, gate: Tensor, up: Tensor) -> Tensor {
        let num_features = gate.size()[1] as usize;
        let gate_up = Tensor::cat(&[&gate, &up], 1); // [N, 2 * F]
        let mut out = gate;
        silu_mul(self.pool, f32_slice(&gate_up), num_features, f32_slice_mut(&mut out));
        out
    }
}

/// Memory for a result.
fn empty(shape: &[usize]) -> Tensor {
    let shape: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
    Tensor::empty(shape, (Kind::Float, Device::Cpu))
}
