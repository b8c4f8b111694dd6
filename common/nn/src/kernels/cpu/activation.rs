//! Elementwise kernels.

use super::simd::{Kernel, Simd};
use super::{Pool, Rows, RowsMut};

/// Rough speeds by which work is divided among threads.
const SILU_FLOATS_PER_NANO: usize = 2;
const ADD_FLOATS_PER_NANO: usize = 8;
/// Elements that one task adds.
const ADD_PIECE: usize = 16 * 1024;

/// `out = silu(gate) * up`, gate and up being the halves of each row: the gated feed-forward layer of
/// <https://arxiv.org/abs/2002.05202>.
///
/// # Shapes
/// - gate_up: `[rows, 2 * num_features]`, out: `[rows, num_features]`.
pub fn silu_mul(pool: &Pool, gate_up: &[f32], num_features: usize, out: &mut [f32]) {
    let gate_up = Rows::new(gate_up, 2 * num_features);
    let out = RowsMut::new(out, num_features).share();
    assert_eq!(gate_up.num_rows(), out.num_rows(), "input and output must have equally many rows");
    pool.for_each(out.num_rows(), num_features / SILU_FLOATS_PER_NANO, |i| {
        let (gate, up) = gate_up.row(i).split_at(num_features);
        // SAFETY: each row is written by one task.
        let out = unsafe { out.row(i) };
        pool.isa().run(SiluMulRow { gate, up, out });
    });
}

/// `x += y`.
///
/// # Shapes
/// - x, y: equally long.
pub fn add(pool: &Pool, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "both must have the same shape");
    let len = x.len();
    if len == 0 {
        return;
    }
    let x = RowsMut::new(x, len).share();
    pool.for_each(len.div_ceil(ADD_PIECE), ADD_PIECE / ADD_FLOATS_PER_NANO, |i| {
        let y = &y[i * ADD_PIECE..len.min((i + 1) * ADD_PIECE)];
        // SAFETY: each piece is written by one task.
        let x = unsafe { x.part(0, i * ADD_PIECE, y.len()) };
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    });
}

struct SiluMulRow<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SiluMulRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let (gates, ups) = (self.gate.chunks(S::LANES), self.up.chunks(S::LANES));
        let one = S::splat(1.0);
        for ((gate, up), out) in gates.zip(ups).zip(self.out.chunks_mut(S::LANES)) {
            let (gate, up) = (S::load(gate, 0.0), S::load(up, 0.0));
            let denominator = S::splat(0.0).sub(gate).exp().add(one);
            gate.div(denominator).mul(up).store(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, pools, random};
    use super::*;

    #[test]
    fn silu_mul_agrees_with_f64() {
        for pool in pools() {
            for width in [1, 16, 37, 1536] {
                let x: Vec<f32> = random(6 * width, 1).iter().map(|x| x * 20.0).collect();
                let mut out = vec![0.0; 3 * width];
                silu_mul(&pool, &x, width, &mut out);
                let mut expect = Vec::new();
                for row in x.chunks(2 * width) {
                    let (gate, up) = row.split_at(width);
                    expect.extend(gate.iter().zip(up).map(|(g, u)| {
                        let g = f64::from(*g);
                        g / (1.0 + (-g).exp()) * f64::from(*u)
                    }));
                }
                assert_close(&out, &expect, 1e-6);
            }
        }
    }

    #[test]
    fn silu_of_large_inputs_is_the_input_or_nothing() {
        for pool in pools() {
            let mut out = [f32::NAN; 2];
            silu_mul(&pool, &[1000.0, -1000.0, 2.0, 2.0], 2, &mut out);
            assert_eq!(out[0], 2000.0);
            assert!(out[1].abs() < 1e-30);
        }
    }

    #[test]
    fn add_covers_every_piece() {
        for pool in pools() {
            for len in [0, 1, ADD_PIECE, 3 * ADD_PIECE + 5] {
                let (mut x, y) = (random(len, 1), random(len, 2));
                let expect: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
                add(&pool, &mut x, &y);
                assert_eq!(x, expect);
            }
        }
    }
}
