//! Root-mean-square normalisation (<https://arxiv.org/abs/1910.07467>) and its backward pass.

use super::{GRAIN_FLOATS, Isa, Kernel, Rows, RowsMut, Simd, for_each_row};
use crate::function::parallel_for;

/// Rows whose gradients of the weight are summed together, whatever the number of threads.
const BLOCK_ROWS: usize = 64;

/// `out = x * scales * weight` with `scales = 1 / sqrt(mean(x^2) + eps)` of each row.
///
/// # Shapes
/// - x, out: `[R, C]`, weight: `[C]`, scales: `[R]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, scales: &mut [f32], out: &mut [f32]) {
    let (width, isa) = (weight.len(), Isa::detect());
    assert!(x.len() == out.len() && x.len() == scales.len() * width, "rows must be as wide as the weight");
    let x = Rows::new(x, width);
    let (scales, out) = (RowsMut::new(scales, 1).share(), RowsMut::new(out, width).share());
    for_each_row(x.num_rows(), width, |i| {
        // SAFETY: each row is written by one thread.
        let (scale, out) = unsafe { (scales.row(i), out.row(i)) };
        scale[0] = isa.run(Forward { x: x.row(i), weight, eps, out });
    });
}

/// The gradients of [`rms_norm`].
///
/// # Shapes
/// - x, d_out, d_x: `[R, C]`, scales: `[R]`, weight: `[C]`; returns the gradient of the weight, `[C]`.
pub fn rms_norm_backward(x: &[f32], weight: &[f32], scales: &[f32], d_out: &[f32], d_x: &mut [f32]) -> Vec<f32> {
    let (width, isa) = (weight.len(), Isa::detect());
    assert!([d_out.len(), d_x.len(), scales.len() * width] == [x.len(); 3], "gradients must have the input's shape");
    let (x, d_out) = (Rows::new(x, width), Rows::new(d_out, width));
    let d_x = RowsMut::new(d_x, width).share();
    let num_blocks = x.num_rows().div_ceil(BLOCK_ROWS);
    let mut sums = vec![0.0; num_blocks * width];
    let blocks = RowsMut::new(&mut sums, width).share();
    parallel_for(num_blocks, GRAIN_FLOATS.div_ceil(BLOCK_ROWS * width), |range| {
        for block in range {
            // SAFETY: each block, and its rows, is written by one thread.
            let d_weight = unsafe { blocks.row(block) };
            let rows = block * BLOCK_ROWS..x.num_rows().min((block + 1) * BLOCK_ROWS);
            for (i, &scale) in rows.clone().zip(&scales[rows]) {
                // SAFETY: as above.
                let d_x = unsafe { d_x.row(i) };
                isa.run(Backward { x: x.row(i), weight, scale, d_out: d_out.row(i), d_x, d_weight });
            }
        }
    });
    let mut d_weight = vec![0.0; width];
    for block in sums.chunks_exact(width) {
        d_weight.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
    }
    d_weight
}

struct Forward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

struct Backward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    scale: f32,
    d_out: &'a [f32],
    d_x: &'a mut [f32],
    d_weight: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self) -> f32 {
        let mut squares = [S::splat(0.0); 4];
        for lines in self.x.chunks(4 * S::LANES) {
            for (sum, line) in squares.iter_mut().zip(lines.chunks(S::LANES)) {
                let x = S::load(line, 0.0);
                *sum = x.mul_add(x, *sum);
            }
        }
        let [a, b, c, d] = squares;
        let mean = a.add(b).add(c.add(d)).sum() / self.x.len() as f32;
        let scale = 1.0 / (mean + self.eps).sqrt();
        let factor = S::splat(scale);
        let inputs = self.x.chunks(S::LANES).zip(self.weight.chunks(S::LANES));
        for ((x, weight), out) in inputs.zip(self.out.chunks_mut(S::LANES)) {
            S::load(x, 0.0).mul(factor).mul(S::load(weight, 0.0)).store(out);
        }
        scale
    }
}

impl Kernel for Backward<'_> {
    type Output = ();

    /// With `n = x * scale` and `g = d_out * weight`: `d_x = scale * (g - n * mean(g * n))`, `d_weight += d_out * n`.
    #[inline(always)]
    fn run<S: Simd>(self) {
        let scale = S::splat(self.scale);
        let mut products = [S::splat(0.0); 2];
        let lanes = self.x.chunks(S::LANES).zip(self.weight.chunks(S::LANES)).zip(self.d_out.chunks(S::LANES));
        for (idx, (((x, weight), d_out), d_weight)) in lanes.zip(self.d_weight.chunks_mut(S::LANES)).enumerate() {
            let (normal, d) = (S::load(x, 0.0).mul(scale), S::load(d_out, 0.0));
            let sum = &mut products[idx % 2];
            *sum = d.mul(S::load(weight, 0.0)).mul_add(normal, *sum);
            d.mul_add(normal, S::load(d_weight, 0.0)).store(d_weight);
        }
        let mean = S::splat(-products[0].add(products[1]).sum() / self.x.len() as f32);
        let lanes = self.x.chunks(S::LANES).zip(self.weight.chunks(S::LANES)).zip(self.d_out.chunks(S::LANES));
        for (((x, weight), d_out), d_x) in lanes.zip(self.d_x.chunks_mut(S::LANES)) {
            let normal = S::load(x, 0.0).mul(scale);
            let gradient = S::load(d_out, 0.0).mul(S::load(weight, 0.0));
            normal.mul_add(mean, gradient).mul(scale).store(d_x);
        }
    }
}
