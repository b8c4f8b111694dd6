//! Root-mean-square normalisation (<https://arxiv.org/abs/1910.07467>), as Llama, Qwen and SmolLM2 use it.

use super::simd::{Kernel, Simd};
use super::{Pool, Rows, RowsMut};

/// Rough speed by which work is divided among threads.
const FLOATS_PER_NANO: usize = 4;
/// Independent partial sums of squares, enough to hide the latency of the addition.
const PARTIAL_SUMS: usize = 4;

/// `x / sqrt(mean(x^2) + epsilon) * weight` over groups of `weight.len()` consecutive elements.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// `[C]`.
    pub weight: &'a [f32],
    pub epsilon: f32,
}

impl RmsNorm<'_> {
    /// # Shapes
    /// - x: `[rows, C]`, out: `[rows, C]`.
    pub fn apply(&self, pool: &Pool, x: Rows, out: RowsMut) {
        let width = self.weight.len();
        assert_eq!((x.width(), out.width()), (width, width), "rows must be as wide as the weight");
        assert_eq!(x.num_rows(), out.num_rows(), "input and output must have equally many rows");
        let out = out.share();
        pool.for_each(out.num_rows(), width / FLOATS_PER_NANO, |i| {
            // SAFETY: each row is written by one task.
            let out = unsafe { out.row(i) };
            out.copy_from_slice(x.row(i));
            pool.isa().run(NormaliseRow { norm: self, x: out });
        });
    }

    /// Normalises in place. The rows may hold several groups, each normalised alone: the query or key heads of a
    /// token.
    ///
    /// # Shapes
    /// - x: `[rows, groups * C]`.
    pub fn apply_in_place(&self, pool: &Pool, x: RowsMut) {
        let width = x.width();
        assert!(width.is_multiple_of(self.weight.len()), "rows of {width} are not groups of {}", self.weight.len());
        let x = x.share();
        pool.for_each(x.num_rows(), width / FLOATS_PER_NANO, |i| {
            // SAFETY: each row is written by one task.
            let row = unsafe { x.row(i) };
            for group in row.chunks_exact_mut(self.weight.len()) {
                pool.isa().run(NormaliseRow { norm: self, x: group });
            }
        });
    }

    /// `residual += delta`, then `out` is the norm of `residual`.
    ///
    /// # Shapes
    /// - residual, delta, out: `[rows, C]`.
    pub fn add_then_apply(&self, pool: &Pool, residual: &mut [f32], delta: &[f32], out: &mut [f32]) {
        let width = self.weight.len();
        assert_eq!(residual.len(), delta.len(), "residual and delta must have the same shape");
        assert_eq!(residual.len(), out.len(), "residual and output must have the same shape");
        let delta = Rows::new(delta, width);
        let residual = RowsMut::new(residual, width).share();
        let out = RowsMut::new(out, width).share();
        pool.for_each(out.num_rows(), 2 * width / FLOATS_PER_NANO, |i| {
            // SAFETY: each row is written by one task.
            let (residual, out) = unsafe { (residual.row(i), out.row(i)) };
            for (sum, delta) in residual.iter_mut().zip(delta.row(i)) {
                *sum += delta;
            }
            out.copy_from_slice(residual);
            pool.isa().run(NormaliseRow { norm: self, x: out });
        });
    }
}

/// One group, in place.
struct NormaliseRow<'a> {
    norm: &'a RmsNorm<'a>,
    x: &'a mut [f32],
}

impl Kernel for NormaliseRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let mut squares = [S::splat(0.0); PARTIAL_SUMS];
        for lines in self.x.chunks(PARTIAL_SUMS * S::LANES) {
            for (sum, line) in squares.iter_mut().zip(lines.chunks(S::LANES)) {
                let x = S::load(line, 0.0);
                *sum = x.mul_add(x, *sum);
            }
        }
        let [a, b, c, d] = squares;
        let mean = a.add(b).add(c.add(d)).sum() / self.x.len() as f32;
        let scale = S::splat(1.0 / (mean + self.norm.epsilon).sqrt());
        for (x, weight) in self.x.chunks_mut(S::LANES).zip(self.norm.weight.chunks(S::LANES)) {
            S::load(x, 0.0).mul(scale).mul(S::load(weight, 0.0)).store(x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, pools, random};
    use super::*;

    fn reference(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f64> {
        let mut out = Vec::new();
        for group in x.chunks(weight.len()) {
            let mean = group.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / group.len() as f64;
            let scale = 1.0 / (mean + f64::from(epsilon)).sqrt();
            out.extend(group.iter().zip(weight).map(|(x, w)| f64::from(*x) * scale * f64::from(*w)));
        }
        out
    }

    #[test]
    fn rows_are_normalised_at_any_width() {
        for pool in pools() {
            for width in [1, 7, 16, 64, 100, 576, 1000] {
                let (x, weight) = (random(5 * width, 1), random(width, 2));
                let norm = RmsNorm { weight: &weight, epsilon: 1e-6 };
                let mut out = vec![0.0; x.len()];
                norm.apply(&pool, Rows::new(&x, width), RowsMut::new(&mut out, width));
                assert_close(&out, &reference(&x, &weight, 1e-6), 1e-6);

                let mut in_place = x.clone();
                norm.apply_in_place(&pool, RowsMut::new(&mut in_place, 5 * width));
                assert_eq!(in_place, out, "groups of one row equal rows of one group");
            }
        }
    }

    #[test]
    fn the_residual_is_added_first() {
        for pool in pools() {
            let (x, delta, weight) = (random(300, 1), random(300, 2), random(100, 3));
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
            let (mut residual, mut out) = (x, vec![0.0; 300]);
            RmsNorm { weight: &weight, epsilon: 1e-5 }.add_then_apply(&pool, &mut residual, &delta, &mut out);
            assert_eq!(residual, sum);
            assert_close(&out, &reference(&sum, &weight, 1e-5), 1e-6);
        }
    }

    #[test]
    fn columns_outside_the_view_stay() {
        let pool = Pool::new(1).unwrap();
        let mut x = random(40, 1);
        let before = x.clone();
        RmsNorm { weight: &[1.0; 4], epsilon: 1e-6 }.apply_in_place(&pool, RowsMut::columns(&mut x, 20, 4..12));
        for row in 0..2 {
            assert_eq!(x[row * 20..][..4], before[row * 20..][..4]);
            assert_eq!(x[row * 20 + 12..][..8], before[row * 20 + 12..][..8]);
            assert_close(&x[row * 20 + 4..][..8], &reference(&before[row * 20 + 4..][..8], &[1.0; 4], 1e-6), 1e-6);
        }
    }
}
