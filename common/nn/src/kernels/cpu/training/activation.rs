//! The gated feed-forward layer's activation (<https://arxiv.org/abs/2002.05202>) and its backward pass.

use super::{GRAIN_FLOATS, Isa, Kernel, RowsMut, Simd};
use crate::function::parallel_for;

/// `out = silu(gate) * up`, all equally long.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len(), "gate, up and output must have the same shape");
    let (len, isa) = (out.len(), Isa::detect());
    let out = RowsMut::new(out, len.max(1)).share();
    parallel_for(len, GRAIN_FLOATS, |range| {
        // SAFETY: each range is written by one thread.
        let out = unsafe { out.part(0, range.start, range.len()) };
        isa.run(Forward { gate: &gate[range.clone()], up: &up[range], out });
    });
}

/// The gradients of [`silu_mul`]; that of `up` is written over the gradient of its output.
///
/// # Shapes
/// - all equally long; `d_out` is the gradient of the output before, and of `up` after.
pub fn silu_mul_backward(gate: &[f32], up: &[f32], d_out: &mut [f32], d_gate: &mut [f32]) {
    let len = gate.len();
    assert!([up.len(), d_out.len(), d_gate.len()] == [len; 3], "inputs and gradients must have the same shape");
    let isa = Isa::detect();
    let (d_out, d_gate) = (RowsMut::new(d_out, len.max(1)).share(), RowsMut::new(d_gate, len.max(1)).share());
    parallel_for(len, GRAIN_FLOATS, |range| {
        // SAFETY: each range is written by one thread.
        let [d_out, d_gate] = [d_out, d_gate].map(|d| unsafe { d.part(0, range.start, range.len()) });
        isa.run(Backward { gate: &gate[range.clone()], up: &up[range], d_out, d_gate });
    });
}

struct Forward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

struct Backward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    d_out: &'a mut [f32],
    d_gate: &'a mut [f32],
}

#[inline(always)]
fn sigmoid<S: Simd>(x: S) -> S {
    S::splat(1.0).div(S::splat(0.0).sub(x).exp().add(S::splat(1.0)))
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let inputs = self.gate.chunks(S::LANES).zip(self.up.chunks(S::LANES));
        for ((gate, up), out) in inputs.zip(self.out.chunks_mut(S::LANES)) {
            let gate = S::load(gate, 0.0);
            gate.mul(sigmoid(gate)).mul(S::load(up, 0.0)).store(out);
        }
    }
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let inputs = self.gate.chunks(S::LANES).zip(self.up.chunks(S::LANES));
        let gradients = self.d_out.chunks_mut(S::LANES).zip(self.d_gate.chunks_mut(S::LANES));
        for ((gate, up), (d_out, d_gate)) in inputs.zip(gradients) {
            let (gate, d) = (S::load(gate, 0.0), S::load(d_out, 0.0));
            let sigmoid = sigmoid(gate);
            let silu = gate.mul(sigmoid);
            // d silu(g) / dg = s + g s (1 - s) = s + silu (1 - s).
            let slope = silu.mul_add(S::splat(1.0).sub(sigmoid), sigmoid);
            d.mul(S::load(up, 0.0)).mul(slope).store(d_gate);
            d.mul(silu).store(d_out);
        }
    }
}
