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

impl Ops for PackedBatch {
    type Matrix = Tensor;

    fn embed(&self, weight: &Tensor) -> Tensor {
        Tensor::embedding(weight, &self.tokens, -1, false, false) // [N, C]
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        x.rms_norm(weight.size(), Some(weight), Some(eps))
    }

    fn linear(&self, x: &Tensor, projection: &Projection<Tensor>) -> Tensor {
        x.linear(&projection.weight, projection.bias.as_ref())
    }

    fn rope(&self, x: Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let rotated = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1); // [N, H, D]
        x * &self.cos + rotated * &self.sin
    }

    fn attention(&self, _layer_idx: usize, [q, k, v]: [Tensor; 3]) -> Tensor {
        self.attention.forward(&q, &k, &v)
    }

    fn silu_mul(&self, gate: Tensor, up: Tensor) -> Tensor {
        gate.silu() * up
    }
}
