//! The forward pass with adapters: the trainer's operations, and a low-rank product beside every adapted projection.

use aha_core::config::TargetModule;
use tch::Tensor;

use super::dropout::Dropout;
use crate::activation::Activation;
use crate::autograd_ops::PackedBatch;
use crate::fused_ops::TrainedMatrix;
use crate::transformer::{Ops, Projection};

/// [`PackedBatch`]'s operations in one layer, over projections that may have adapters.
#[derive(Debug, Clone, Copy)]
pub struct LoraOps<'a> {
    pub packed: &'a PackedBatch,
    pub scale: f64,
    /// Off where there is none.
    pub dropout: Option<&'a Dropout>,
    pub layer_idx: usize,
}

/// A frozen weight, `[out, in]`, and what is learnt beside it.
#[derive(Debug)]
pub struct AdaptedMatrix {
    pub(super) weight: Tensor,
    pub(super) adapter: Option<Adapter>,
}

#[derive(Debug)]
pub(super) struct Adapter {
    pub(super) target: TargetModule,
    /// `[r, in]`.
    pub(super) a: Projection<TrainedMatrix>,
    /// `[out, r]`.
    pub(super) b: Projection<TrainedMatrix>,
}

impl LoraOps<'_> {
    /// `y + scale * dropout(x) A^T B^T`, `[N, out]`, where there is an adapter.
    fn adapt(&self, y: Activation, x: &Activation, adapter: Option<&Adapter>) -> Activation {
        let Some(Adapter { target, a, b }) = adapter else { return y };
        let dropped = self.dropout.map(|dropout| {
            let (width, kind) = (x.rows.size()[1] as usize, (x.rows.kind(), x.rows.device()));
            Activation::from(&x.rows * dropout.mask(self.layer_idx, *target, width, kind)) // [N, in]
        });
        let [low] = self.packed.linear(dropped.as_ref().unwrap_or(x), [a]); // [N, r]
        self.packed.add_linear(y, &(low.rows * self.scale).into(), b)
    }
}

impl Ops for LoraOps<'_> {
    type Matrix = AdaptedMatrix;
    type Rows = Activation;

    fn embed(&self, weight: &Tensor) -> Activation {
        self.packed.embed(weight)
    }

    fn rms_norm(&self, x: &Activation, weight: &Tensor, eps: f64) -> Activation {
        self.packed.rms_norm(x, weight, eps)
    }

    fn head_norm(&self, x: Activation, weight: &Tensor, eps: f64) -> Activation {
        self.packed.head_norm(x, weight, eps)
    }

    fn residual_norm(&self, x: Activation, weight: &Tensor, eps: f64) -> [Activation; 2] {
        self.packed.residual_norm(x, weight, eps)
    }

    fn linear<const P: usize>(&self, x: &Activation, projections: [&Projection<AdaptedMatrix>; P]) -> [Activation; P] {
        let frozen = projections.map(frozen);
        let mut outputs = self.packed.linear(x, frozen.each_ref()).into_iter();
        projections.map(|projection| {
            let y = outputs.next().expect("there are as many outputs as projections");
            self.adapt(y, x, projection.weight.adapter.as_ref())
        })
    }

    fn add_linear(&self, residual: Activation, x: &Activation, projection: &Projection<AdaptedMatrix>) -> Activation {
        let y = self.packed.add_linear(residual, x, &frozen(projection));
        self.adapt(y, x, projection.weight.adapter.as_ref())
    }

    fn rope(&self, x: Activation) -> Activation {
        self.packed.rope(x)
    }

    fn attention(&self, layer_idx: usize, qkv: [Activation; 3]) -> Activation {
        self.packed.attention(layer_idx, qkv)
    }

    fn silu_mul(&self, gate_up: [Activation; 2]) -> Activation {
        self.packed.silu_mul(gate_up)
    }
}

fn frozen(projection: &Projection<AdaptedMatrix>) -> Projection<TrainedMatrix> {
    let bias = projection.bias.as_ref().map(Tensor::shallow_clone);
    Projection { weight: projection.weight.weight.shallow_clone().into(), bias }
}
