//! Causal attention over a paged cache, the same function for prefill chunks and decoding.
//!
//! Online softmax (<https://arxiv.org/abs/1805.02867>) over tiles of [`KEY_TILE`] keys counted from position 0. Which
//! tiles a query sees, and how far it looks into the last one, follow from its own position only, so neither the chunk
//! it arrived in nor the size of the blocks changes a bit of its result. The query heads that share a key head are
//! rows of the same tile (<https://arxiv.org/abs/2305.13245>): the keys are read once for all of them.

use super::buffer::{LINE, SharedRows, with_scratch};
use super::simd::{Kernel, Simd, prefetch};
use super::tile::{MAX_TILE_ROWS, RowTile, TILE_STRIDE, accumulate, row_tiles, with_const_rows};
use super::{KvCache, KvLayout, Pool, Rows, RowsMut};
use std::ops::Range;

/// Keys per step of the online softmax.
const KEY_TILE: usize = 64;
/// Queries of one sequence that go through the keys together.
const QUERY_BLOCK: usize = 16;
/// Bytes of keys and values from which on they are fetched ahead: fewer are found in the processor's cache, where that
/// would cost a fifth of the speed.
const STREAMED_BYTES: usize = 4 << 20;
/// Multiply-adds of a row between two bursts of fetching.
const PREFETCH_DEPTH: usize = 8;
/// Rough speed by which work is divided among threads.
const FLOPS_PER_NANO: usize = 30;

/// The new tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct SequenceSpan<'a> {
    /// Where they start among the rows of the batch.
    pub first_row: usize,
    pub num_rows: usize,
    /// Position of the first in its sequence; every earlier key is in the cache, and so are those of these tokens.
    pub first_position: usize,
    /// Block of each `block_size` positions, from position 0.
    pub block_table: &'a [u32],
}

/// `softmax(q k^T / sqrt(D)) v` for every row over the keys up to and including its own position.
///
/// # Shapes
/// - queries: `[rows, H * D]` with `H` a multiple of `K`, out: `[rows, H * D]`.
/// - spans: in the order of their rows; rows that belong to none are left alone in `out`.
pub fn paged_attention(pool: &Pool, queries: Rows, spans: &[SequenceSpan], cache: &KvCache, out: &mut [f32]) {
    let KvLayout { num_kv_heads, head_dim, .. } = cache.layout();
    let width = queries.width();
    assert!(width.is_multiple_of(num_kv_heads * head_dim), "{width} is no multiple of {num_kv_heads} * {head_dim}");
    assert_eq!(out.len(), queries.num_rows() * width, "the output must be {} rows of {width}", queries.num_rows());
    check_spans(spans, queries.num_rows(), cache.layout());

    let mut tasks = Vec::new();
    let (mut num_pairs, mut num_keys) = (0, 0);
    for span in spans {
        for kv_head in 0..num_kv_heads {
            for start in (0..span.num_rows).step_by(QUERY_BLOCK) {
                let rows = start..(start + QUERY_BLOCK).min(span.num_rows);
                num_pairs += rows.len() * (span.first_position + rows.end);
                num_keys += span.first_position + rows.end;
                tasks.push((span, kv_head, rows));
            }
        }
    }
    let group = width / (num_kv_heads * head_dim);
    let task_nanos = 4 * head_dim * group * num_pairs / FLOPS_PER_NANO / tasks.len().max(1);
    let is_streamed = 2 * head_dim * num_keys * size_of::<f32>() >= STREAMED_BYTES;
    let out = RowsMut::new(out, width).share();
    pool.for_each(tasks.len(), task_nanos, |i| {
        let block = |i: usize| {
            let (span, kv_head, rows) = tasks.get(i)?.clone();
            Some(QueryBlock { queries, span, kv_head, rows, cache, out })
        };
        let Some(task) = block(i) else { return };
        let next = block(i + 1);
        with_scratch(task.scratch_len(), |scratch| {
            pool.isa().run(Attend { block: &task, is_streamed, next: next.as_ref(), scratch });
        });
    });
}

fn check_spans(spans: &[SequenceSpan], num_rows: usize, layout: KvLayout) {
    let mut next_row = 0;
    for span in spans {
        assert!(span.first_row >= next_row, "row {} belongs to two spans", span.first_row);
        next_row = span.first_row + span.num_rows;
        let num_positions = span.first_position + span.num_rows;
        let num_blocks = num_positions.div_ceil(layout.block_size);
        assert!(span.block_table.len() >= num_blocks, "{num_positions} positions need {num_blocks} blocks");
        let known = span.block_table[..num_blocks].iter().all(|b| (*b as usize) < layout.num_blocks);
        assert!(known, "a block table names a block past the {} of the cache", layout.num_blocks);
    }
    assert!(next_row <= num_rows, "spans reach row {next_row} of {num_rows}");
}

/// One task: some queries of a sequence with one key head.
struct QueryBlock<'a> {
    queries: Rows<'a>,
    span: &'a SequenceSpan<'a>,
    kv_head: usize,
    /// Which of the span.
    rows: Range<usize>,
    cache: &'a KvCache,
    out: SharedRows<'a>,
}

impl QueryBlock<'_> {
    /// Query heads per key head.
    fn group(&self) -> usize {
        let KvLayout { num_kv_heads, head_dim, .. } = self.cache.layout();
        self.out.width() / (num_kv_heads * head_dim)
    }

    fn first_position(&self) -> usize {
        self.span.first_position + self.rows.start
    }

    /// Keys that the last of the queries sees.
    fn num_keys(&self) -> usize {
        self.span.first_position + self.rows.end
    }

    /// The block that holds `position`, and where in it.
    #[inline(always)]
    fn locate(&self, position: usize) -> (u32, usize) {
        let block_size = self.cache.layout().block_size;
        (self.span.block_table[position / block_size], position % block_size)
    }

    fn scratch_len(&self) -> usize {
        let per_row = TILE_STRIDE + self.cache.layout().value_width() + 2;
        self.rows.len() * self.group() * per_row + MAX_TILE_ROWS * TILE_STRIDE
    }
}

struct Attend<'a> {
    block: &'a QueryBlock<'a>,
    /// The keys and values come from memory, and are fetched while others are worked on.
    is_streamed: bool,
    /// What this thread will most likely do then.
    next: Option<&'a QueryBlock<'a>>,
    scratch: &'a mut [f32],
}

/// The online softmax of the rows (query, head in the group) of a block.
struct State<'a> {
    block: &'a QueryBlock<'a>,
    /// `[rows, TILE_STRIDE]`, divided by `sqrt(D)`.
    queries: &'a mut [f32],
    /// `[rows, value_width]`: the values seen so far, weighted relative to `largest`.
    sums: &'a mut [f32],
    /// `[rows]`: the largest score so far.
    largest: &'a mut [f32],
    /// `[rows]`: the sum of the weights.
    totals: &'a mut [f32],
    /// `[MAX_TILE_ROWS, TILE_STRIDE]`: scores, then weights, of a tile.
    weights: &'a mut [f32],
}

/// Keys `start..start + len`, `len <= KEY_TILE`.
#[derive(Clone, Copy)]
struct KeyTile<'a> {
    start: usize,
    len: usize,
    /// Whose keys, from which position on, are worked on next; only where they and the values are to be fetched ahead.
    next: Option<(&'a QueryBlock<'a>, usize)>,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let block = self.block;
        let (num_queries, group, first) = (block.rows.len(), block.group(), block.first_position());
        let mut state = State::new(block, self.scratch);
        // Several queries find in the processor's cache what the first of them has read.
        let is_streamed = self.is_streamed && num_queries == 1;
        for start in (0..first + num_queries).step_by(KEY_TILE) {
            // Queries before `partial.start` are too early for this tile; from `partial.end` on they see all of it.
            let last = start + KEY_TILE - 1;
            let partial = start.saturating_sub(first)..last.saturating_sub(first).min(num_queries);
            let next = match self.next {
                Some(next) if start + KEY_TILE >= block.num_keys() => (next, 0),
                _ => (block, start + KEY_TILE),
            };
            let next = is_streamed.then_some(next);
            for query in partial.clone() {
                let keys = KeyTile { start, len: first + query - start + 1, next };
                state.advance::<S>(query * group..(query + 1) * group, keys);
            }
            state.advance::<S>(partial.end * group..num_queries * group, KeyTile { start, len: KEY_TILE, next });
        }
        state.finish();
    }
}

impl<'a> State<'a> {
    fn new(block: &'a QueryBlock, scratch: &'a mut [f32]) -> Self {
        let KvLayout { head_dim, .. } = block.cache.layout();
        let (group, scale) = (block.group(), 1.0 / (head_dim as f32).sqrt());
        let num_rows = block.rows.len() * group;
        let (queries, rest) = scratch.split_at_mut(num_rows * TILE_STRIDE);
        let (sums, rest) = rest.split_at_mut(num_rows * block.cache.layout().value_width());
        let (largest, rest) = rest.split_at_mut(num_rows);
        let (totals, weights) = rest.split_at_mut(num_rows);
        for (row, target) in queries.chunks_exact_mut(TILE_STRIDE).enumerate() {
            let heads = block.queries.row(block.span.first_row + block.rows.start + row / group);
            let head = &heads[(block.kv_head * group + row % group) * head_dim..][..head_dim];
            for (target, element) in target.iter_mut().zip(head) {
                *target = element * scale;
            }
        }
        sums.fill(0.0);
        largest.fill(f32::NEG_INFINITY);
        totals.fill(0.0);
        Self { block, queries, sums, largest, totals, weights }
    }

    /// Takes `rows` past a tile of keys.
    #[inline(always)]
    fn advance<S: Simd>(&mut self, rows: Range<usize>, keys: KeyTile) {
        for tile in row_tiles(rows.len(), S::TILE_ROWS) {
            let tile = RowTile { start: rows.start + tile.start, ..tile };
            with_const_rows!(tile.len, S, advance_tile(self, tile.start, keys));
        }
    }

    fn finish(self) {
        let KvLayout { head_dim, .. } = self.block.cache.layout();
        let (block, group) = (self.block, self.block.group());
        let sums = self.sums.chunks_exact(block.cache.layout().value_width());
        for (row, (sums, total)) in sums.zip(self.totals.iter()).enumerate() {
            let out_row = block.span.first_row + block.rows.start + row / group;
            let column = (block.kv_head * group + row % group) * head_dim;
            // SAFETY: a query head of a row belongs to one task, as `check_spans` found the spans disjoint.
            let target = unsafe { block.out.part(out_row, column, head_dim) };
            for (target, sum) in target.iter_mut().zip(sums) {
                *target = sum / total;
            }
        }
    }
}

/// Takes `R` rows from `row` on past a tile of keys.
#[inline(always)]
fn advance_tile<S: Simd, const R: usize>(state: &mut State, row: usize, keys: KeyTile) {
    score::<S, R>(state, row, keys);
    let mut decays = [0.0; R];
    for (r, decay) in decays.iter_mut().enumerate() {
        let scores = &mut state.weights[r * TILE_STRIDE..][..keys.len];
        let (largest, total) = (&mut state.largest[row + r], &mut state.totals[row + r]);
        *decay = weigh::<S>(scores, largest, total);
    }
    gather::<S, R>(state, row, keys, decays);
}

/// Scores of the tile; those past `keys.len` are left unspecified.
#[inline(always)]
fn score<S: Simd, const R: usize>(state: &mut State, row: usize, keys: KeyTile) {
    let KvLayout { head_dim, block_size, .. } = state.block.cache.layout();
    let queries = &state.queries[row * TILE_STRIDE..][..R * TILE_STRIDE];
    for first in (0..keys.len).step_by(2 * S::LANES) {
        // A second register past the last key would leave the block table: read the first again instead.
        let second = if first + S::LANES < keys.len { first + S::LANES } else { first };
        let columns = [column(state.block, keys.start + first), column(state.block, keys.start + second)];
        let mut values =
            [first, second].into_iter().flat_map(|key| value_lines(state.block, keys.start + key, S::LANES));
        let mut scores = [[S::splat(0.0); 2]; R];
        for depth in (0..head_dim).step_by(PREFETCH_DEPTH) {
            if keys.next.is_some() {
                values.by_ref().take(2 * PREFETCH_DEPTH).for_each(prefetch);
            }
            let piece = PREFETCH_DEPTH.min(head_dim - depth);
            // SAFETY: `queries` holds R rows at TILE_STRIDE, at least head_dim long; a block of keys holds head_dim rows
            // of block_size, and offset + LANES stays within one because both are multiples of LANES.
            scores = unsafe {
                let columns = columns.map(|column| column.add(depth * block_size));
                accumulate::<S, R, 2, _>(scores, queries.as_ptr().add(depth), columns, block_size, piece)
            };
        }
        for (r, scores) in scores.into_iter().enumerate() {
            let target = &mut state.weights[r * TILE_STRIDE + first..][..2 * S::LANES];
            let (low, high) = target.split_at_mut(S::LANES);
            scores[0].store(low);
            scores[1].store(high);
        }
    }
}

/// Element 0 of the key at `position` and of those that follow in its block.
#[inline(always)]
fn column(block: &QueryBlock, position: usize) -> *const f32 {
    let (block_id, offset) = block.locate(position);
    block.cache.keys(block_id, block.kv_head)[offset..].as_ptr()
}

/// Cache lines of the values at `len` positions of one block.
fn value_lines<'a>(block: &'a QueryBlock, position: usize, len: usize) -> impl Iterator<Item = *const f32> + 'a {
    let (block_id, offset) = block.locate(position);
    let width = block.cache.layout().value_width();
    block.cache.values(block_id, block.kv_head)[offset * width..][..len * width].chunks(LINE).map(<[f32]>::as_ptr)
}

/// Cache lines of the keys of a tile, none if it begins past the last key.
fn key_lines<'a>(block: &'a QueryBlock, start: usize) -> impl Iterator<Item = *const f32> + 'a {
    let KvLayout { head_dim, block_size, .. } = block.cache.layout();
    let positions = (start..block.num_keys().min(start + KEY_TILE)).step_by(LINE);
    positions.flat_map(move |position| {
        let first = column(block, position);
        (0..head_dim).map(move |row| first.wrapping_add(row * block_size))
    })
}

/// Turns scores into weights relative to the new largest score, and returns the factor that the older weights lose.
#[inline(always)]
fn weigh<S: Simd>(scores: &mut [f32], largest: &mut f32, total: &mut f32) -> f32 {
    let mut peak = S::splat(*largest);
    for chunk in scores.chunks(S::LANES) {
        peak = peak.max(S::load(chunk, f32::NEG_INFINITY));
    }
    let peak = peak.largest();
    let decay = S::splat(*largest - peak).exp().to_array()[0];
    let (mut sum, offset) = (S::splat(0.0), S::splat(peak));
    for chunk in scores.chunks_mut(S::LANES) {
        let weight = S::load(chunk, f32::NEG_INFINITY).sub(offset).exp();
        sum = sum.add(weight);
        weight.store(chunk);
    }
    *largest = peak;
    *total = *total * decay + sum.sum();
    decay
}

/// Adds the weighted values of the tile.
#[inline(always)]
fn gather<S: Simd, const R: usize>(state: &mut State, row: usize, keys: KeyTile, decays: [f32; R]) {
    let layout = state.block.cache.layout();
    let width = layout.value_width();
    let mut lines = keys.next.into_iter().flat_map(|(block, start)| key_lines(block, start));
    let lines_at_once = KEY_TILE * layout.head_dim / LINE * PREFETCH_DEPTH / (keys.len * width / (2 * S::LANES));
    for column in (0..width).step_by(2 * S::LANES) {
        let sums = &mut state.sums[row * width + column..];
        let mut acc = [[S::splat(0.0); 2]; R];
        for r in 0..R {
            for v in 0..2 {
                acc[r][v] = S::load(&sums[r * width + v * S::LANES..][..S::LANES], 0.0).mul(S::splat(decays[r]));
            }
        }
        let mut key = 0;
        while key < keys.len {
            let (block, offset) = state.block.locate(keys.start + key);
            let depth = (layout.block_size - offset).min(keys.len - key).min(PREFETCH_DEPTH);
            lines.by_ref().take(lines_at_once).for_each(prefetch);
            let values = state.block.cache.values(block, state.block.kv_head)[offset * width + column..].as_ptr();
            let weights = &state.weights[key..];
            // SAFETY: `weights` holds R rows at TILE_STRIDE, KEY_TILE long; the block holds `depth` rows of `width`
            // from `offset` on, and column + 2 * LANES <= width.
            acc = unsafe {
                let values = [values, values.add(S::LANES)];
                accumulate::<S, R, 2, _>(acc, weights.as_ptr(), values, width, depth)
            };
            key += depth;
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (v, acc) in acc.into_iter().enumerate() {
                acc.store(&mut sums[r * width + v * S::LANES..][..S::LANES]);
            }
        }
    }
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
