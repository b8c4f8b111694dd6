//! The trainer's operations: plain libtorch, differentiable, over packed sequences.

use tch::{Kind, Tensor};

use crate::packed_attention::PackedAttention;
use crate::rotary::RotaryTable;
use crate::transformer::{Ops, Projection};

/// Everything about a micro-batch that the layers need, on the device.
#[derive(Debug)]
pub struct PackedBatch {
    /// `[N]`, i64.
    pub tokens: Tensor,
    cos: Tensor,
    sin: Tensor,
    attention: PackedAttention,
}

impl PackedBatch {
    /// Packs `sequences` one after the other, each with positions from 0.
    #[must_use]
    pub fn new(sequences: &[&[u32]], table: &RotaryTable, kind: Kind) -> Self {
        let device = table.cos.device();
        let tokens: Vec<i64> =
            sequences.iter().flat_map(|tokens| tokens.iter().map(|&token| i64::from(token))).collect();
        let positions: Vec<i64> = sequences.iter().flat_map(|tokens| 0..tokens.len() as i64).collect();
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let [cos, sin] = table.rows(&Tensor::from_slice(&positions).to_device(device), kind);
        Self {
            tokens: Tensor::from_slice(&tokens).to_device(device),
            cos,
            sin,
            attention: PackedAttention::new(&lengths, device),
        }
    }
}

impl PackedBatch {
    /// `[N, heads * D]` or `[N, heads, D]` as the latter.
    fn heads(&self, x: &Tensor) -> Tensor {
        let head_dim = self.cos.size().last().copied().unwrap_or(1);
        x.view([self.tokens.size()[0], -1, head_dim])
    }
}

impl Ops for PackedBatch {
    type Matrix = Tensor;
    type Rows = Tensor;

    fn embed(&self, weight: &Tensor) -> Tensor {
        Tensor::embedding(weight, &self.tokens, -1, false, false) // [N, C]
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        x.rms_norm(weight.size(), Some(weight), Some(eps))
    }

    fn head_norm(&self, x: Tensor, weight: &Tensor, eps: f64) -> Tensor {
        self.rms_norm(&self.heads(&x), weight, eps)
    }

    fn linear<const P: usize>(&self, x: &Tensor, projections: [&Projection<Tensor>; P]) -> [Tensor; P] {
        projections.map(|projection| x.linear(&projection.weight, projection.bias.as_ref()))
    }

    fn add_linear(&self, residual: Tensor, x: &Tensor, projection: &Projection<Tensor>) -> Tensor {
        let [delta] = self.linear(x, [projection]);
        residual + delta
    }

    fn rope(&self, x: Tensor) -> Tensor {
        let x = self.heads(&x);
        let halves = x.chunk(2, -1);
        let rotated = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1); // [N, H, D]
        x * &self.cos + rotated * &self.sin
    }

    fn attention(&self, _layer_idx: usize, [q, k, v]: [Tensor; 3]) -> Tensor {
        self.attention.forward(&q, &k, &self.heads(&v))
    }

    fn silu_mul(&self, [gate, up]: [Tensor; 2]) -> Tensor {
        gate.silu() * up
    }
}
