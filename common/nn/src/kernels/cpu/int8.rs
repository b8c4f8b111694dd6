//! Dense products in 8-bit integers: rows are quantised as they come, the weight once, output by output.
//!
//! Both sides are symmetric: `x ~ scale * q` with `q` in -127..=127 and a scale for each row of the input and for each
//! output of the weight (the vector-wise quantisation of LLM.int8(), arXiv 2208.07339). The sums are of whole numbers
//! and exact, so the result is the same on every instruction set and in every batch.

use super::Pool;
use super::buffer::{LINE_BYTES, Rows, RowsMut, SharedRows, with_scratch};
use super::gemm::{PANEL, PREFETCH_ROWS, Start, panel_rows};
use super::number::Number;
use super::simd::{ByteDot, ByteKernel, DEPTH, prefetch};
use super::tile::{RowTile, row_tiles, with_const_rows};

/// Largest quantised magnitude.
const LARGEST: f32 = 127.0;
/// Longest sum that cannot leave 32 bits: its terms are at most 255 * 127.
const MAX_IN_FEATURES: usize = i32::MAX as usize / (255 * 127);
/// Groups between two bursts of prefetching.
const PREFETCH_GROUPS: usize = 8;
/// Numbers that go through registers together while a row is quantised.
const QUANTISED_AT_ONCE: usize = 64;
/// Rough speeds by which work is divided among threads.
const PRODUCTS_PER_NANO: usize = 150;
const QUANTISED_PER_NANO: usize = 2;

/// A weight in 8 bits, laid out for [`QuantizedMatrix::gemm`].
#[derive(Debug)]
pub struct QuantizedMatrix {
    panels: Vec<Panel>,
    in_features: usize,
    out_features: usize,
}

/// [`PANEL`] outputs, zeros past the last of them.
#[derive(Debug, Clone)]
struct Panel {
    /// `[in_features / DEPTH, PANEL, DEPTH]`, zeros past the last input.
    weights: Vec<i8>,
    /// Of each output.
    scales: [f32; PANEL],
    /// Of each output's quantised weights.
    sums: [i32; PANEL],
}

impl QuantizedMatrix {
    /// Quantises weights, in the layout of Hugging Face, stacked along their outputs.
    ///
    /// # Shapes
    /// - weights: each `[out_i, in_features]`; the result maps `in_features` to the sum of `out_i`.
    pub fn pack<T: Number>(pool: &Pool, weights: &[&[T]], in_features: usize) -> Self {
        assert!((1..=MAX_IN_FEATURES).contains(&in_features), "{in_features} inputs, not 1 to {MAX_IN_FEATURES}");
        let out_features = weights.iter().map(|w| w.len()).sum::<usize>() / in_features;
        let mut packed = Self::zeros([out_features, in_features]);
        packed.repack(pool, weights);
        packed
    }

    /// A weight `[out, in]` to be filled by [`QuantizedMatrix::repack`].
    pub fn zeros([out_features, in_features]: [usize; 2]) -> Self {
        let weights_len = in_features.div_ceil(DEPTH) * DEPTH * PANEL;
        let empty = Panel { weights: vec![0; weights_len], scales: [0.0; PANEL], sums: [0; PANEL] };
        Self { panels: vec![empty; out_features.div_ceil(PANEL)], in_features, out_features }
    }

    /// Replaces the values, in place.
    ///
    /// # Shapes
    /// - weights: as given to [`QuantizedMatrix::pack`].
    pub fn repack<T: Number>(&mut self, pool: &Pool, weights: &[&[T]]) {
        let (k, n) = (self.in_features, self.out_features);
        assert!(weights.iter().all(|w| w.len() % k == 0), "every weight must have rows of {k} inputs");
        assert_eq!(weights.iter().map(|w| w.len() / k).sum::<usize>(), n, "the weights must have {n} outputs in all");
        pool.for_each_mut(&mut self.panels, PANEL * k / QUANTISED_PER_NANO, |i, panel| {
            let rows = panel_rows(weights, k, i * PANEL..(i * PANEL + PANEL).min(n));
            with_scratch(k, |row| {
                for (output, values) in rows.iter().enumerate() {
                    row.iter_mut().zip(*values).for_each(|(wide, value)| *wide = value.widen());
                    panel.set_output(output, &row[..values.len()]);
                }
            });
        });
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// `out = x * weight^T + bias`, both sides quantised.
    ///
    /// # Shapes
    /// - x: `[m, in_features]`, bias: `[out_features]`, out: `[m, out_features]`.
    pub fn gemm(&self, pool: &Pool, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        self.product(pool, x, Start { accumulate: false, bias }, out);
    }

    /// `out += x * weight^T + bias`, both sides of the product quantised.
    ///
    /// # Shapes
    /// - As for [`QuantizedMatrix::gemm`].
    pub fn gemm_add(&self, pool: &Pool, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        self.product(pool, x, Start { accumulate: true, bias }, out);
    }

    fn product(&self, pool: &Pool, x: &[f32], start: Start, out: &mut [f32]) {
        let (x, out) = (Rows::new(x, self.in_features), RowsMut::new(out, self.out_features).share());
        let (m, width) = (x.num_rows(), self.in_features.div_ceil(DEPTH));
        assert_eq!(out.num_rows(), m, "input and output must have equally many rows");
        let bias_fits = start.bias.is_none_or(|bias| bias.len() == self.out_features);
        assert!(bias_fits, "the bias must have {} elements", self.out_features);
        if m == 0 {
            return;
        }
        let tiles: Vec<RowTile> = row_tiles(m, pool.isa().run_bytes(TileRows)).collect();
        // A float of scratch is DEPTH bytes.
        with_scratch(m + m * width, |scratch| {
            let (scales, groups) = scratch.split_at_mut(m);
            let [scales_out, groups_out] = [RowsMut::new(scales, 1), RowsMut::new(groups, width)].map(RowsMut::share);
            pool.for_each(tiles.len(), self.in_features * tiles[0].len / QUANTISED_PER_NANO, |i| {
                let RowTile { start, len } = tiles[i];
                for row in start..start + len {
                    // SAFETY: each row's scale is written by one task, and so are the groups of each tile.
                    let (scale, tile) = unsafe { (scales_out.row(row), groups_out.rows(start, len)) };
                    let target = &mut as_bytes_mut(tile)[(row - start) * DEPTH..];
                    scale[0] = pool.isa().run_bytes(QuantiseRow { x: x.row(row), target, step: len * DEPTH });
                }
            });
            let left = Left { tiles: &tiles, scales, groups: as_bytes_mut(groups), width };
            let task_nanos = self.in_features * PANEL * m.max(4) / PRODUCTS_PER_NANO;
            pool.for_each(self.panels.len(), task_nanos, |i| {
                let [panel, next] = [i, (i + 1).min(self.panels.len() - 1)].map(|i| &self.panels[i]);
                pool.isa().run_bytes(MultiplyPanel { panel, next, column: i * PANEL, left, start, out });
            });
        });
    }
}

impl Panel {
    fn set_output(&mut self, output: usize, row: &[f32]) {
        let Scale { scale, inverse } = Scale::of(row);
        let mut sum = 0;
        for (k, &weight) in row.iter().enumerate() {
            let quantised = quantise(weight, inverse);
            sum += i32::from(quantised);
            self.weights[(k / DEPTH * PANEL + output) * DEPTH + k % DEPTH] = quantised;
        }
        (self.scales[output], self.sums[output]) = (scale, sum);
    }
}

#[derive(Debug, Clone, Copy)]
struct Scale {
    scale: f32,
    /// 0 where the numbers are all (nearly) 0.
    inverse: f32,
}

impl Scale {
    /// Of numbers among which one is infinite or not a number, the scale is not a number.
    #[inline(always)]
    fn of(numbers: &[f32]) -> Self {
        // As bit patterns, in which NaN comes after infinity: a maximum of floats would lose it.
        let largest = numbers.iter().fold(0, |largest: u32, x| largest.max(x.abs().to_bits()));
        match f32::from_bits(largest) {
            largest if largest < LARGEST * f32::MIN_POSITIVE => Self { scale: 0.0, inverse: 0.0 },
            largest if largest < f32::INFINITY => Self { scale: largest / LARGEST, inverse: LARGEST / largest },
            _ => Self { scale: f32::NAN, inverse: 0.0 },
        }
    }
}

#[inline(always)]
fn quantise(x: f32, inverse: f32) -> i8 {
    (x * inverse).round_ties_even() as i32 as i8
}

#[inline(always)]
fn as_bytes_mut(floats: &mut [f32]) -> &mut [u8] {
    // SAFETY: any bytes are floats and the other way round, and bytes have no alignment.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size_of_val(floats)) }
}

/// Rows of a tile.
struct TileRows;

impl ByteKernel for TileRows {
    type Output = usize;

    #[inline(always)]
    fn run<B: ByteDot>(self) -> usize {
        B::TILE_ROWS
    }
}

/// Quantises a row; returns its scale.
struct QuantiseRow<'a> {
    x: &'a [f32],
    target: &'a mut [u8],
    /// Distance of its groups of [`DEPTH`] bytes in `target`.
    step: usize,
}

impl ByteKernel for QuantiseRow<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<B: ByteDot>(self) -> f32 {
        let Scale { scale, inverse } = Scale::of(self.x);
        let mut groups = self.target.chunks_mut(self.step);
        for x in self.x.chunks(QUANTISED_AT_ONCE) {
            let mut bytes = [0; QUANTISED_AT_ONCE];
            for (byte, &x) in bytes.iter_mut().zip(x) {
                *byte = quantise(x, inverse).cast_unsigned() ^ B::FLIP;
            }
            for (target, group) in groups.by_ref().zip(bytes.chunks_exact(DEPTH)).take(x.len().div_ceil(DEPTH)) {
                target[..DEPTH].copy_from_slice(group);
            }
        }
        // The padding meets weights of 0, whatever it is.
        scale
    }
}

/// Quantised rows, tile after tile.
#[derive(Clone, Copy)]
struct Left<'a> {
    tiles: &'a [RowTile],
    scales: &'a [f32],
    /// Of each tile `[width, rows, DEPTH]`, so that one pointer reaches all that is multiplied next.
    groups: &'a [u8],
    /// Groups of a row.
    width: usize,
}

struct MultiplyPanel<'a> {
    panel: &'a Panel,
    /// What will be read soon.
    next: &'a Panel,
    /// Of the output, where the panel begins.
    column: usize,
    left: Left<'a>,
    start: Start<'a>,
    out: SharedRows<'a>,
}

impl ByteKernel for MultiplyPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<B: ByteDot>(self) {
        let Left { tiles, scales, width, .. } = self.left;
        let m = scales.len();
        for (i, &rows) in tiles.iter().enumerate() {
            for first in (0..PANEL).step_by(2 * B::LANES) {
                // Each tile fetches its share of the next panel, so that reading and computing go on together.
                let ahead = if first == 0 && m >= PREFETCH_ROWS {
                    i * width / tiles.len()..(i + 1) * width / tiles.len()
                } else {
                    0..0
                };
                with_const_rows!(rows.len, B, multiply_tile(&self, rows, first, ahead));
            }
        }
    }
}

/// `R` rows of two registers of output, from output `first` of the panel on. Fetches groups `ahead` of the next panel.
#[inline(always)]
fn multiply_tile<B: ByteDot, const R: usize>(
    task: &MultiplyPanel,
    rows: RowTile,
    first: usize,
    ahead: std::ops::Range<usize>,
) {
    let Left { scales, groups, width, .. } = task.left;
    let left = groups[rows.start * width * DEPTH..][..R * width * DEPTH].as_ptr();
    let right = task.panel.weights[first * DEPTH..].as_ptr();
    let next = task.next.weights.as_ptr();
    let mut ahead = ahead;
    let groups_at_once = ahead.len().div_ceil(width.div_ceil(PREFETCH_GROUPS));
    let mut acc = [[B::zero(); 2]; R];
    for piece in (0..width).step_by(PREFETCH_GROUPS) {
        for group in ahead.by_ref().take(groups_at_once) {
            for line in 0..PANEL * DEPTH / LINE_BYTES {
                prefetch(next.wrapping_add(group * PANEL * DEPTH + line * LINE_BYTES));
            }
        }
        for group in piece..(piece + PREFETCH_GROUPS).min(width) {
            for (r, sums) in acc.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: `left` holds `width` groups of R * DEPTH bytes; the panel holds `width` groups of PANEL *
                    // DEPTH bytes, and two registers from `first` do not pass the end of a group.
                    *sum = unsafe {
                        let left = left.add((group * R + r) * DEPTH).cast::<[u8; DEPTH]>().read();
                        sum.dot(left, right.add((group * PANEL + v * B::LANES) * DEPTH))
                    };
                }
            }
        }
    }
    let column = task.column + first;
    let width = (2 * B::LANES).min(task.out.width().saturating_sub(column));
    for (r, sums) in acc.into_iter().enumerate() {
        let mut lanes = [0; PANEL];
        for (sum, lanes) in sums.into_iter().zip(lanes.chunks_mut(B::LANES)) {
            // SAFETY: the piece has LANES elements, as two of them fit a panel.
            unsafe { sum.store_ptr(lanes.as_mut_ptr()) };
        }
        let row = rows.start + r;
        // SAFETY: the columns of a panel are written by one task, one tile at a time.
        let target = unsafe { task.out.part(row, column.min(task.out.width()), width) };
        for (i, (target, lane)) in target.iter_mut().zip(lanes).enumerate() {
            let exact = lane - i32::from(B::FLIP) * task.panel.sums[first + i];
            let start = if task.start.accumulate { *target } else { 0.0 };
            let bias = task.start.bias.map_or(0.0, |bias| bias[column + i]);
            *target = exact as f32 * (scales[row] * task.panel.scales[first + i]) + bias + start;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::testing::{assert_same_bits, pools, random};
    use super::*;

    /// Quantised by the formula, and multiplied in f64: exact.
    fn reference(x: &[f32], weight: &[f32], k: usize, bias: Option<&[f32]>) -> Vec<f64> {
        let quantised = |row: &[f32]| -> (Vec<f64>, f64) {
            let scale = row.iter().fold(0.0_f32, |largest, x| largest.max(x.abs())) / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            (row.iter().map(|x| f64::from((x * inverse).round_ties_even())).collect(), f64::from(scale))
        };
        let weights: Vec<_> = weight.chunks(k).map(quantised).collect();
        let mut out = Vec::new();
        for (x, x_scale) in x.chunks(k).map(quantised) {
            for (j, (w, w_scale)) in weights.iter().enumerate() {
                let dot: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                out.push(dot * x_scale * w_scale + bias.map_or(0.0, |b| f64::from(b[j])));
            }
        }
        out
    }

    fn largest_difference(a: &[f32], b: &[f64]) -> f64 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn products_are_those_of_the_quantised_numbers() {
        for pool in pools() {
            for (m, k, n) in [(1, 1, 1), (3, 5, 33), (13, 256, 31), (7, 257, 64), (25, 600, 100), (241, 40, 70)] {
                let (x, weight, bias) = (random(m * k, 1), random(n * k, 2), random(n, 3));
                let packed = QuantizedMatrix::pack(&pool, &[&weight], k);
                assert_eq!((packed.in_features(), packed.out_features()), (k, n));
                let mut out = vec![f32::NAN; m * n];
                packed.gemm(&pool, &x, Some(&bias), &mut out);
                // A number on the edge between two quantised ones may go either way.
                let expect = reference(&x, &weight, k, Some(&bias));
                assert!(largest_difference(&out, &expect) < 0.02, "{m} {k} {n} {:?}", pool.isa());
                let mut twice = out.clone();
                packed.gemm_add(&pool, &x, Some(&bias), &mut twice);
                let expect: Vec<f64> = out.iter().map(|out| 2.0 * f64::from(*out)).collect();
                assert!(largest_difference(&twice, &expect) < 1e-5);
            }
        }
    }

    #[test]
    fn the_error_is_that_of_8_bits() {
        let pool = Pool::new(1).unwrap();
        let (m, k, n) = (8, 576, 64);
        let (x, weight) = (random(m * k, 1), random(n * k, 2));
        let mut out = vec![0.0; m * n];
        QuantizedMatrix::pack(&pool, &[&weight], k).gemm(&pool, &x, None, &mut out);
        let (mut error, mut size) = (0.0, 0.0);
        for (i, out) in out.iter().enumerate() {
            let (x, w) = (&x[i / n * k..][..k], &weight[i % n * k..][..k]);
            let exact: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            error += (f64::from(*out) - exact).powi(2);
            size += exact * exact;
        }
        // Rounding to 1/127 of the largest leaves an error of 1/127 / sqrt(12) on each side of numbers of size 1/sqrt(3).
        let expect = (2.0_f64).sqrt() / 127.0 / 2.0;
        let relative = (error / size).sqrt();
        assert!((0.7 * expect..1.3 * expect).contains(&relative), "{relative} and {expect}");
    }

    #[test]
    fn every_instruction_set_thread_count_and_batch_gives_the_same_bits() {
        let (k, n) = (301, 150);
        let (x, weight, bias) = (random(70 * k, 1), random(n * k, 2), random(n, 3));
        let mut expect = vec![0.0; 70 * n];
        let pools = pools();
        QuantizedMatrix::pack(&pools[0], &[&weight], k).gemm(&pools[0], &x, Some(&bias), &mut expect);
        for pool in &pools {
            let packed = QuantizedMatrix::pack(pool, &[&weight[..40 * k], &weight[40 * k..]], k);
            for m in [1, 2, 5, 12, 13, 31, 63] {
                let mut out = vec![0.0; m * n];
                packed.gemm(pool, &x[m % 7 * k..][..m * k], Some(&bias), &mut out);
                assert_same_bits(&out, &expect[m % 7 * n..][..m * n], &format!("{:?} batch {m}", pool.isa()));
            }
        }
    }

    #[test]
    fn extreme_numbers_neither_overflow_nor_disappear() {
        for pool in pools() {
            let k = MAX_IN_FEATURES;
            let mut out = [0.0; 4];
            let packed = QuantizedMatrix::pack(&pool, &[&vec![-1.0; k]], k);
            packed.gemm(&pool, &vec![1.0; k], None, &mut out[..1]);
            assert!((out[0] + k as f32).abs() < 1e-3 * k as f32, "{out:?}");
            let packed = QuantizedMatrix::pack(&pool, &[&[1.0, 1.0]], 2);
            packed.gemm(&pool, &[0.0, 0.0, f32::NAN, 1.0, f32::INFINITY, 1.0, 1e-45, 0.0], None, &mut out);
            assert!(out[0] == 0.0 && out[1].is_nan() && out[2].is_nan() && out[3] == 0.0, "{out:?}");
        }
    }

    #[test]
    fn repacking_equals_packing() {
        for pool in pools() {
            let (old, new, x) = (random(100 * 70, 1), random(100 * 70, 2), random(3 * 70, 3));
            let mut repacked = QuantizedMatrix::pack(&pool, &[&old], 70);
            repacked.repack(&pool, &[&new]);
            let [mut a, mut b] = [vec![0.0; 300], vec![1.0; 300]];
            repacked.gemm(&pool, &x, None, &mut a);
            QuantizedMatrix::pack(&pool, &[&new], 70).gemm(&pool, &x, None, &mut b);
            assert_same_bits(&a, &b, "repacked weight");
        }
    }

    #[test]
    fn numbers_in_bf16_pack_as_the_same_numbers_in_fp32() {
        let numbers: Vec<bf16> = random(40 * 70, 1).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = numbers.iter().copied().map(bf16::to_f32).collect();
        let (pool, x) = (Pool::new(1).unwrap(), random(3 * 70, 3));
        let [mut a, mut b] = [vec![0.0; 120], vec![1.0; 120]];
        QuantizedMatrix::pack(&pool, &[&numbers], 70).gemm(&pool, &x, None, &mut a);
        QuantizedMatrix::pack(&pool, &[&wide], 70).gemm(&pool, &x, None, &mut b);
        assert_same_bits(&a, &b, "packed weight");
    }
}
