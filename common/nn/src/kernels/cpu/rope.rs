//! Rotary position embedding (<https://arxiv.org/abs/2104.09864>) in the `rotate_half` convention of Hugging Face:
//! element `i` of a head turns together with element `i + D / 2`.

use super::simd::{Kernel, Simd};
use super::{Pool, RowsMut};

/// Rough speed by which work is divided among threads.
const FLOATS_PER_NANO: usize = 4;

/// The angles of every position.
///
/// # Shapes
/// - cos, sin: `[positions, D / 2]`.
#[derive(Debug, Clone, Copy)]
pub struct RopeTables<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    /// `D`.
    pub head_dim: usize,
}

impl RopeTables<'_> {
    /// Turns every head of every row by the angles of the row's position, in place.
    ///
    /// # Shapes
    /// - x: `[rows, heads * D]`, positions: `[rows]`, each below the number of positions in the tables.
    pub fn apply(&self, pool: &Pool, x: RowsMut, positions: &[u32]) {
        let (width, half) = (x.width(), self.head_dim / 2);
        assert!(width.is_multiple_of(2 * half), "rows of {width} are not heads of {}", self.head_dim);
        assert_eq!(positions.len(), x.num_rows(), "every row needs a position");
        assert_eq!(self.cos.len(), self.sin.len(), "both tables must have the same shape");
        let x = x.share();
        pool.for_each(x.num_rows(), width / FLOATS_PER_NANO, |i| {
            let angles = positions[i] as usize * half;
            let (cos, sin) = (&self.cos[angles..][..half], &self.sin[angles..][..half]);
            // SAFETY: each row is written by one task.
            let heads = unsafe { x.row(i) };
            pool.isa().run(TurnHeads { heads, cos, sin, sign: 1.0 });
        });
    }
}

/// Turns the heads of a row by its angles, or where `sign` is -1, back.
pub(super) struct TurnHeads<'a> {
    pub(super) heads: &'a mut [f32],
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
    pub(super) sign: f32,
}

impl Kernel for TurnHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let half = self.cos.len();
        for head in self.heads.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            let halves = first.chunks_mut(S::LANES).zip(second.chunks_mut(S::LANES));
            let angles = self.cos.chunks(S::LANES).zip(self.sin.chunks(S::LANES));
            for ((first, second), (cos, sin)) in halves.zip(angles) {
                let (a, b) = (S::load(first, 0.0), S::load(second, 0.0));
                let (cos, sin) = (S::load(cos, 0.0), S::load(sin, 0.0).mul(S::splat(self.sign)));
                a.mul(cos).sub(b.mul(sin)).store(first);
                b.mul(cos).add(a.mul(sin)).store(second);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, pools, random};
    use super::*;

    #[test]
    fn every_pair_turns_by_its_angle() {
        for pool in pools() {
            for head_dim in [2, 8, 64, 80] {
                let (half, num_heads, positions) = (head_dim / 2, 3, [4_u32, 0, 9, 4]);
                let angle = |p: u32, i: usize| f64::from(p) * 10_000_f64.powf(-(i as f64) / half as f64);
                let table = |f: fn(f64) -> f64| -> Vec<f32> {
                    (0..10).flat_map(|p| (0..half).map(move |i| f(angle(p, i)) as f32)).collect()
                };
                let (cos, sin) = (table(f64::cos), table(f64::sin));
                let mut x = random(positions.len() * num_heads * head_dim, 1);
                let mut expect: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                for (head, values) in expect.chunks_mut(head_dim).enumerate() {
                    for i in 0..half {
                        let (sin, cos) = angle(positions[head / num_heads], i).sin_cos();
                        let (a, b) = (values[i], values[i + half]);
                        (values[i], values[i + half]) = (a * cos - b * sin, b * cos + a * sin);
                    }
                }
                let tables = RopeTables { cos: &cos, sin: &sin, head_dim };
                tables.apply(&pool, RowsMut::new(&mut x, num_heads * head_dim), &positions);
                assert_close(&x, &expect, 1e-6);
            }
        }
    }
}
