//! Dense products with a weight that is packed once and used many times.
//!
//! The weight is kept as panels of [`PANEL`] output columns, contiguous over the input dimension, so the inner loop
//! reads it as one stream. Every output element is the sum, in order, of the bias and of one chain of multiply-adds
//! per [`TILE_DEPTH`] inputs; nothing about that depends on the other rows.

use std::array::from_fn;

use super::Pool;
use super::buffer::{AlignedBuf, LINE_BYTES, Rows, RowsMut, SharedRows, with_scratch};
use super::number::Number;
use super::simd::{Kernel, Simd, prefetch};
use super::tile::{RowTile, TILE_DEPTH, TILE_STRIDE, accumulate, row_tiles, with_const_rows};

/// Output columns per panel: two registers of the widest instruction set.
pub(super) const PANEL: usize = 32;
/// Rows of the input that are worked on together: a [`TILE_DEPTH`] deep block of them fits a 1 MB cache thrice.
const ROW_BLOCK: usize = 240;
/// Rows up to which the weight, not the input, is what must be read without stops: its panels are then worked on one
/// after the other, in the order in which they lie in memory.
const FEW_ROWS: usize = 64;
/// Panels that share a pass over a block of more rows than that.
const PANELS_PER_TASK: usize = 4;
/// Rows from which on the weight is fetched ahead: with fewer, the processor's own prefetching keeps up.
pub(super) const PREFETCH_ROWS: usize = 6;
/// Inputs between two bursts of prefetching.
const PREFETCH_DEPTH: usize = 8;
/// Inputs whose columns are copied together while packing: a cache line of each output.
const PACK_DEPTH: usize = 16;
/// Inputs and outputs that are transposed at once: a register of the smallest instruction set.
const PACK_BLOCK: usize = 4;
/// Rough speeds by which work is divided among threads.
const FLOPS_PER_NANO: usize = 50;
const PACKED_FLOATS_PER_NANO: usize = 2;
const COPIED_FLOATS_PER_NANO: usize = 4;

/// A weight laid out for [`PackedMatrix::gemm`], in the type that it came in: what is computed with is the same, to the
/// last bit, and half of the memory is read in half of the time.
#[derive(Debug)]
pub struct PackedMatrix<T = f32> {
    /// `[panels, in_features, PANEL]`, zeros past `out_features`.
    panels: AlignedBuf<T>,
    in_features: usize,
    out_features: usize,
}

impl<T: Number> PackedMatrix<T> {
    /// Packs weights, in the layout of Hugging Face, stacked along their outputs: one for a plain linear layer, query,
    /// key and value or gate and up for layers that are computed as one product.
    ///
    /// # Shapes
    /// - weights: each `[out_i, in_features]`; the result maps `in_features` to the sum of `out_i`.
    pub fn pack(pool: &Pool, weights: &[&[T]], in_features: usize) -> Self {
        assert!(in_features > 0, "a weight needs inputs");
        let out_features = weights.iter().map(|w| w.len()).sum::<usize>() / in_features;
        let mut packed = Self::zeros([out_features, in_features]);
        packed.repack(pool, weights);
        packed
    }

    /// A weight `[out, in]` to be filled by [`PackedMatrix::repack`].
    pub fn zeros([out_features, in_features]: [usize; 2]) -> Self {
        let panels = AlignedBuf::zeros(out_features.div_ceil(PANEL) * PANEL * in_features);
        Self { panels, in_features, out_features }
    }

    /// Replaces the values, in place.
    ///
    /// # Shapes
    /// - weights: as given to [`PackedMatrix::pack`].
    pub fn repack(&mut self, pool: &Pool, weights: &[&[T]]) {
        let (k, n) = (self.in_features, self.out_features);
        assert!(weights.iter().all(|w| w.len() % k == 0), "every weight must have rows of {k} inputs");
        assert_eq!(weights.iter().map(|w| w.len() / k).sum::<usize>(), n, "the weights must have {n} outputs in all");
        let num_panels = n.div_ceil(PANEL);
        let mut panels: Vec<&mut [T]> = self.panels.as_mut_slice().chunks_exact_mut(PANEL * k).collect();
        assert_eq!(panels.len(), num_panels);
        pool.for_each_mut(&mut panels, PANEL * k / PACKED_FLOATS_PER_NANO, |i, panel| {
            let outputs = i * PANEL..(i * PANEL + PANEL).min(n);
            pack_panel(&panel_rows(weights, k, outputs), panel);
        });
    }

    /// The part of a panel in one depth block; empty past the last panel.
    fn chunk(&self, (block, panel): (usize, usize)) -> &[T] {
        let all = self.panels.as_slice();
        let depth = TILE_DEPTH.min(self.in_features - block * TILE_DEPTH);
        let start = (panel * self.in_features + block * TILE_DEPTH) * PANEL;
        &all[start.min(all.len())..(start + depth * PANEL).min(all.len())]
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// `out = x * weight^T + bias`.
    ///
    /// # Shapes
    /// - x: `[m, in_features]`, bias: `[out_features]`, out: `[m, out_features]`.
    pub fn gemm(&self, pool: &Pool, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        self.product(pool, x, Start { accumulate: false, bias }, out);
    }

    /// `out += x * weight^T + bias`.
    ///
    /// # Shapes
    /// - As for [`PackedMatrix::gemm`].
    pub fn gemm_add(&self, pool: &Pool, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        self.product(pool, x, Start { accumulate: true, bias }, out);
    }

    fn product(&self, pool: &Pool, x: &[f32], start: Start, out: &mut [f32]) {
        let (k, n) = (self.in_features, self.out_features);
        let m = x.len() / k;
        assert_eq!(x.len(), m * k, "the input must have rows of {k}");
        assert_eq!(out.len(), m * n, "the output must be {m} rows of {n}");
        assert!(start.bias.is_none_or(|b| b.len() == n), "the bias must have {n} elements");
        for (x, out) in x.chunks(ROW_BLOCK * k).zip(out.chunks_mut(ROW_BLOCK * n)) {
            let num_rows = x.len() / k;
            with_scratch(num_rows * k.div_ceil(TILE_DEPTH) * TILE_STRIDE, |blocks| {
                copy_blocks(pool, Rows::new(x, k), blocks);
                self.multiply(pool, blocks, start, RowsMut::new(out, n).share());
            });
        }
    }

    /// One row block, `blocks` being `[depth blocks, rows, TILE_STRIDE]`.
    fn multiply(&self, pool: &Pool, blocks: &[f32], start: Start, out: SharedRows) {
        let (k, m) = (self.in_features, out.num_rows());
        let num_panels = self.out_features.div_ceil(PANEL);
        let panels_per_task = if m <= FEW_ROWS { 1 } else { PANELS_PER_TASK };
        let task_nanos = 2 * k * PANEL * panels_per_task * m.max(4) / FLOPS_PER_NANO;
        pool.for_each(num_panels.div_ceil(panels_per_task), task_nanos, |task| {
            let first = task * panels_per_task;
            let panels = first..(first + panels_per_task).min(num_panels);
            pool.isa().run(MultiplyPanels { weight: self, panels, blocks, start, out });
        });
    }
}

/// The rows of the stacked `weights` that make up one panel.
pub(super) fn panel_rows<'a, T>(weights: &[&'a [T]], k: usize, outputs: std::ops::Range<usize>) -> [&'a [T]; PANEL] {
    let mut rows: [&[T]; PANEL] = [&[]; PANEL];
    let mut first_output = 0;
    for weight in weights {
        let end_output = first_output + weight.len() / k;
        for output in outputs.start.max(first_output)..outputs.end.min(end_output) {
            rows[output - outputs.start] = &weight[(output - first_output) * k..][..k];
        }
        first_output = end_output;
    }
    rows
}

/// Cuts rows into blocks of [`TILE_DEPTH`] columns at [`TILE_STRIDE`].
fn copy_blocks(pool: &Pool, x: Rows, blocks: &mut [f32]) {
    let num_rows = x.num_rows();
    let blocks = RowsMut::new(blocks, TILE_STRIDE).share();
    pool.for_each(num_rows, x.width() / COPIED_FLOATS_PER_NANO, |i| {
        for (j, piece) in x.row(i).chunks(TILE_DEPTH).enumerate() {
            // SAFETY: each row of the input is cut by one task.
            let block = unsafe { blocks.row(j * num_rows + i) };
            block[..piece.len()].copy_from_slice(piece);
        }
    });
}

/// Transposes up to [`PANEL`] rows (empty ones are left out) into `packed`.
///
/// Compiled for the baseline on purpose: with AVX-512 the compiler turns this into scatters, at half the speed.
fn pack_panel<T: Copy>(rows: &[&[T]; PANEL], packed: &mut [T]) {
    for (j, target) in packed.chunks_mut(PACK_DEPTH * PANEL).enumerate() {
        for (i, rows) in rows.chunks(PACK_BLOCK).enumerate() {
            for (k, lines) in target.chunks_mut(PACK_BLOCK * PANEL).enumerate() {
                pack_block(rows, j * PACK_DEPTH + k * PACK_BLOCK, lines, i * PACK_BLOCK);
            }
        }
    }
}

/// Transposes what `rows` have from `input` on into `lines`, from column `output` on.
#[inline(always)]
fn pack_block<T: Copy>(rows: &[&[T]], input: usize, lines: &mut [T], output: usize) {
    let depth = lines.len() / PANEL;
    if depth < PACK_BLOCK || rows.iter().any(|row| row.is_empty()) {
        for (i, row) in rows.iter().enumerate().filter(|(_, row)| !row.is_empty()) {
            for (line, value) in lines.chunks_exact_mut(PANEL).zip(&row[input..]) {
                line[output + i] = *value;
            }
        }
        return;
    }
    // Whole blocks of a known size are transposed in registers.
    let block: [[T; PACK_BLOCK]; PACK_BLOCK] = from_fn(|i| {
        let row = &rows[i][input..input + PACK_BLOCK];
        from_fn(|j| row[j])
    });
    for (j, line) in lines.chunks_exact_mut(PANEL).enumerate() {
        line[output..output + PACK_BLOCK].copy_from_slice(&from_fn::<_, PACK_BLOCK, _>(|i| block[i][j]));
    }
}

/// What a sum begins with.
#[derive(Clone, Copy)]
pub(super) struct Start<'a> {
    /// With what the output holds.
    pub(super) accumulate: bool,
    pub(super) bias: Option<&'a [f32]>,
}

struct MultiplyPanels<'a, T> {
    weight: &'a PackedMatrix<T>,
    panels: std::ops::Range<usize>,
    blocks: &'a [f32],
    start: Start<'a>,
    out: SharedRows<'a>,
}

impl<T: Number> Kernel for MultiplyPanels<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let m = self.out.num_rows();
        let num_tiles = m.div_ceil(S::TILE_ROWS);
        for block in 0..self.weight.in_features.div_ceil(TILE_DEPTH) {
            for panel in self.panels.clone() {
                let next = if m < PREFETCH_ROWS { &[] } else { self.weight.chunk(self.chunk_after(block, panel)) };
                for (tile, rows) in row_tiles(m, S::TILE_ROWS).enumerate() {
                    // Each tile fetches its share of the next chunk, so that reading and computing go on together.
                    let share = tile * next.len() / num_tiles..(tile + 1) * next.len() / num_tiles;
                    let halves = PANEL / (2 * S::LANES);
                    for half in 0..halves {
                        let column = panel * PANEL + half * 2 * S::LANES;
                        let share = &next[share.clone()];
                        let ahead = &share[half * share.len() / halves..(half + 1) * share.len() / halves];
                        let place = Place { block, rows, column, ahead };
                        with_const_rows!(rows.len, S, multiply_tile::<T>(&self, place));
                    }
                }
            }
        }
    }
}

impl<T: Number> MultiplyPanels<'_, T> {
    /// The depth block and panel that follow: within the task, or at the beginning of the next one.
    fn chunk_after(&self, block: usize, panel: usize) -> (usize, usize) {
        if panel + 1 < self.panels.end {
            (block, panel + 1)
        } else if (block + 1) * TILE_DEPTH < self.weight.in_features {
            (block + 1, self.panels.start)
        } else {
            (0, self.panels.end)
        }
    }
}

/// Which tile of the output, and which part of its sum.
#[derive(Clone, Copy)]
struct Place<'a, T> {
    block: usize,
    rows: RowTile,
    column: usize,
    /// What will be read soon.
    ahead: &'a [T],
}

/// Adds one depth block to `R` rows of two registers of output.
#[inline(always)]
fn multiply_tile<S: Simd, const R: usize, T: Number>(task: &MultiplyPanels<T>, place: Place<T>) {
    let Place { block, rows, column, ahead } = place;
    let PackedMatrix { panels, in_features, out_features } = task.weight;
    let width = (2 * S::LANES).min(out_features.saturating_sub(column));
    let depth = TILE_DEPTH.min(in_features - block * TILE_DEPTH);
    let left = &task.blocks[(block * task.out.num_rows() + rows.start) * TILE_STRIDE..][..R * TILE_STRIDE];
    let first = (column / PANEL * in_features + block * TILE_DEPTH) * PANEL;
    let right = panels.as_slice()[first..][..depth * PANEL][column % PANEL..].as_ptr();
    let mut acc = [[S::splat(0.0); 2]; R];
    let mut lines = ahead.chunks(LINE_BYTES / size_of::<T>());
    let lines_at_once = lines.len().div_ceil(depth.div_ceil(PREFETCH_DEPTH));
    for start in (0..depth).step_by(PREFETCH_DEPTH) {
        lines.by_ref().take(lines_at_once).for_each(|line| prefetch(line.as_ptr()));
        let piece = PREFETCH_DEPTH.min(depth - start);
        // SAFETY: `left` holds R rows at TILE_STRIDE, the panel holds `depth` rows of PANEL from `first`, and two
        // registers from `column % PANEL` do not pass the end of a row.
        acc = unsafe {
            let right = right.add(start * PANEL);
            accumulate::<S, R, 2, _>(acc, left.as_ptr().add(start), [right, right.add(S::LANES)], PANEL, piece)
        };
    }
    for (r, sums) in acc.into_iter().enumerate() {
        // SAFETY: the columns of a panel are written by one task, one tile at a time.
        let target = unsafe { task.out.part(rows.start + r, column.min(*out_features), width) };
        for (v, (sum, lanes)) in sums.into_iter().zip(target.chunks_mut(S::LANES)).enumerate() {
            let Start { accumulate, bias } = task.start;
            let mut start = if block > 0 || accumulate { S::load(lanes, 0.0) } else { S::splat(0.0) };
            if let (0, Some(bias)) = (block, bias) {
                start = start.add(S::load(&bias[column + v * S::LANES..*out_features], 0.0));
            }
            start.add(sum).store(lanes);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::testing::{assert_close, assert_same_bits, pools, random};
    use super::*;

    fn reference(x: &[f32], weight: &[f32], k: usize, bias: Option<&[f32]>) -> Vec<f64> {
        let mut out = Vec::new();
        for x in x.chunks(k) {
            for (j, w) in weight.chunks(k).enumerate() {
                let dot: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                out.push(dot + bias.map_or(0.0, |b| f64::from(b[j])));
            }
        }
        out
    }

    #[test]
    fn products_agree_with_f64_at_odd_shapes() {
        for pool in pools() {
            for (m, k, n) in [(1, 1, 1), (3, 5, 33), (13, 256, 31), (7, 257, 64), (25, 600, 100), (241, 40, 70)] {
                let (x, weight, bias) = (random(m * k, 1), random(n * k, 2), random(n, 3));
                let packed = PackedMatrix::pack(&pool, &[&weight], k);
                assert_eq!((packed.in_features(), packed.out_features()), (k, n));
                let mut out = vec![f32::NAN; m * n];
                packed.gemm(&pool, &x, Some(&bias), &mut out);
                assert_close(&out, &reference(&x, &weight, k, Some(&bias)), 2e-5);
                packed.gemm(&pool, &x, None, &mut out);
                assert_close(&out, &reference(&x, &weight, k, None), 2e-5);
            }
        }
    }

    #[test]
    fn adding_starts_from_what_is_there() {
        for pool in pools() {
            let (m, k, n) = (5, 600, 70);
            let (x, weight, bias, there) = (random(m * k, 1), random(n * k, 2), random(n, 3), random(m * n, 4));
            let mut out = there.clone();
            PackedMatrix::pack(&pool, &[&weight], k).gemm_add(&pool, &x, Some(&bias), &mut out);
            let product = reference(&x, &weight, k, Some(&bias));
            let expect: Vec<f64> = product.iter().zip(&there).map(|(a, b)| a + f64::from(*b)).collect();
            assert_close(&out, &expect, 2e-5);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_every_batch_on_every_thread_count() {
        let (k, n) = (300, 150);
        let (x, weight, bias) = (random(300 * k, 1), random(n * k, 2), random(n, 3));
        for pools in pools().chunks(2) {
            let packed = PackedMatrix::pack(&pools[0], &[&weight], k);
            let mut alone = vec![0.0; 300 * n];
            for (x, out) in x.chunks(k).zip(alone.chunks_mut(n)) {
                packed.gemm(&pools[0], x, Some(&bias), out);
            }
            for pool in pools {
                for m in (1..=70).chain([239, 240, 241, 300]) {
                    // Starting at row m % 7 moves rows to other tiles and other alignments.
                    let rows = (m % 7).min(300 - m)..;
                    let mut out = vec![0.0; m * n];
                    packed.gemm(pool, &x[rows.start * k..][..m * k], Some(&bias), &mut out);
                    assert_same_bits(&out, &alone[rows.start * n..][..m * n], &format!("{:?} batch {m}", pool.isa()));
                }
            }
        }
    }

    #[test]
    fn stacked_weights_give_stacked_outputs() {
        for pool in pools() {
            let (m, k) = (3, 20);
            let (a, b, c) = (random(50 * k, 1), random(7 * k, 2), random(40 * k, 3));
            let x = random(m * k, 4);
            let stacked = PackedMatrix::pack(&pool, &[&a, &b, &c], k);
            let mut out = vec![0.0; m * 97];
            stacked.gemm(&pool, &x, None, &mut out);
            assert_close(&out, &reference(&x, &[a, b, c].concat(), k, None), 1e-5);
        }
    }

    #[test]
    fn repacking_equals_packing() {
        for pool in pools() {
            let (old, new) = (random(100 * 70, 1), random(100 * 70, 2));
            let mut packed = PackedMatrix::pack(&pool, &[&old], 70);
            packed.repack(&pool, &[&new]);
            assert_same_bits(
                packed.panels.as_slice(),
                PackedMatrix::pack(&pool, &[&new], 70).panels.as_slice(),
                "repacked weight",
            );
        }
    }

    #[test]
    fn weights_in_bf16_give_the_bits_of_the_same_weights_in_fp32() {
        for pool in pools() {
            for (k, n, m) in [(1, 1, 1), (3, 33, 2), (16, 32, 5), (70, 100, 13), (300, 65, 64), (576, 7, 70)] {
                let halves: Vec<bf16> = random(k * n, 1).into_iter().map(bf16::from_f32).collect();
                let wide: Vec<f32> = halves.iter().copied().map(bf16::to_f32).collect();
                let (x, bias) = (random(m * k, 2), random(n, 3));
                let [mut a, mut b] = [vec![0.5; m * n], vec![0.5; m * n]];
                PackedMatrix::pack(&pool, &[&halves], k).gemm_add(&pool, &x, Some(&bias), &mut a);
                PackedMatrix::pack(&pool, &[&wide], k).gemm_add(&pool, &x, Some(&bias), &mut b);
                assert_same_bits(&a, &b, &format!("{:?} {k} to {n}, {m} rows", pool.isa()));
            }
        }
    }

    #[test]
    #[should_panic(expected = "output must be 2 rows of 3")]
    fn wrong_output_shape_is_refused() {
        let pool = Pool::new(1).unwrap();
        PackedMatrix::pack(&pool, &[&[1.0; 6]], 2).gemm(&pool, &[1.0; 4], None, &mut [0.0; 5]);
    }
}
