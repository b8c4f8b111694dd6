//! The inner loop of every matrix product here: a block of accumulators that stays in registers.

use super::number::Number;
use super::simd::Simd;

/// Most rows in a tile, over all instruction sets.
pub(super) const MAX_TILE_ROWS: usize = 12;
/// Most columns of a left operand; longer sums are cut into pieces of this depth.
pub(super) const TILE_DEPTH: usize = 256;
/// Distance between the rows of a left operand. Constant, so that one pointer reaches every row, and not a multiple
/// of a page, so that the rows do not fight for the same lines of the cache.
pub(super) const TILE_STRIDE: usize = TILE_DEPTH + 16;

/// Adds `left[r][k] * right[k][lane]`, over `k` in rising order, to the accumulator of row `r`: one chain of
/// multiply-adds for every output element, whatever the number of rows in the tile.
///
/// # Shapes
/// - left: `[R, depth]` with row stride [`TILE_STRIDE`].
/// - right: `V` pointers to `[depth, LANES]` with row stride `right_stride`.
///
/// Plain loops only: closures over registers are not reliably inlined into code for a wider instruction set.
///
/// # Safety
/// `left` and each of `right` are readable for these shapes.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, const R: usize, const V: usize, T: Number>(
    mut acc: [[S; V]; R],
    left: *const f32,
    right: [*const T; V],
    right_stride: usize,
    depth: usize,
) -> [[S; V]; R] {
    for k in 0..depth {
        let mut columns = [S::splat(0.0); V];
        for v in 0..V {
            // SAFETY: k < depth, so row k of `right` is readable.
            columns[v] = unsafe { T::load::<S>(right[v].add(k * right_stride)) };
        }
        for (r, sums) in acc.iter_mut().enumerate() {
            // SAFETY: r < R and k < depth, so the element of `left` is readable.
            let factor = S::splat(unsafe { *left.add(r * TILE_STRIDE + k) });
            for v in 0..V {
                sums[v] = factor.mul_add(columns[v], sums[v]);
            }
        }
    }
    acc
}

/// Rows `start..start + len` of a larger block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RowTile {
    pub(super) start: usize,
    pub(super) len: usize,
}

/// `num_rows` cut into as few tiles of at most `max_len` as possible, of nearly equal length.
pub(super) fn row_tiles(num_rows: usize, max_len: usize) -> impl Iterator<Item = RowTile> {
    let num_tiles = num_rows.div_ceil(max_len);
    let tile_start = move |t: usize| t * num_rows / num_tiles;
    (0..num_tiles).map(move |t| RowTile { start: tile_start(t), len: tile_start(t + 1) - tile_start(t) })
}

/// Calls a function generic over `<S, ROWS>`, and the type of the numbers where one is named, with the number of rows as a constant. The constant guards keep the
/// compiler from generating tiles that an instruction set never uses.
macro_rules! with_const_rows {
    ($rows:expr, $simd:ident, $function:ident $(::<$number:ident>)? ( $($argument:expr),* )) => {
        match $rows {
            1 => $function::<$simd, 1 $(, $number)?>($($argument),*),
            2 if const { 2 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 2 $(, $number)?>($($argument),*),
            3 if const { 3 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 3 $(, $number)?>($($argument),*),
            4 if const { 4 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 4 $(, $number)?>($($argument),*),
            5 if const { 5 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 5 $(, $number)?>($($argument),*),
            6 if const { 6 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 6 $(, $number)?>($($argument),*),
            7 if const { 7 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 7 $(, $number)?>($($argument),*),
            8 if const { 8 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 8 $(, $number)?>($($argument),*),
            9 if const { 9 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 9 $(, $number)?>($($argument),*),
            10 if const { 10 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 10 $(, $number)?>($($argument),*),
            11 if const { 11 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 11 $(, $number)?>($($argument),*),
            12 if const { 12 <= <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS } => $function::<$simd, 12 $(, $number)?>($($argument),*),
            rows => unreachable!("a tile of {rows} rows, at most {} fit", <$simd as $crate::kernels::cpu::simd::Tile>::TILE_ROWS),
        }
    };
}
pub(super) use with_const_rows;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_all_rows_in_order() {
        for num_rows in 0..100 {
            let tiles: Vec<RowTile> = row_tiles(num_rows, MAX_TILE_ROWS).collect();
            assert_eq!(tiles.len(), num_rows.div_ceil(MAX_TILE_ROWS));
            let mut next = 0;
            for tile in tiles {
                assert_eq!(tile.start, next);
                assert!((1..=MAX_TILE_ROWS).contains(&tile.len));
                next += tile.len;
            }
            assert_eq!(next, num_rows);
        }
    }
}
