//! Tests of [`super`] against f64, and of its independence of batch, chunks, threads and blocks.

use super::super::testing::{assert_close, assert_same_bits, pools, random};
use super::*;

/// One sequence of `len` tokens in a cache that has other, unrelated blocks filled with NaN.
struct Case {
    cache: KvCache,
    table: Vec<u32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    num_heads: usize,
}

fn case(num_heads: usize, num_kv_heads: usize, head_dim: usize, block_size: usize, len: usize) -> Case {
    let needed = len.div_ceil(block_size);
    let layout = KvLayout { num_blocks: 2 * needed + 1, block_size, num_kv_heads, head_dim };
    let table: Vec<u32> = (0..needed as u32).rev().map(|i| 2 * i + 1).collect();
    let mut cache = KvCache::new(layout);
    let width = num_kv_heads * head_dim;
    let all: Vec<u32> = (0..(layout.num_blocks * block_size) as u32).collect();
    let poison = vec![f32::NAN; all.len() * width];
    cache.write(&all, Rows::new(&poison, width), Rows::new(&poison, width));
    let slots: Vec<u32> =
        (0..len).map(|p| table[p / block_size] * block_size as u32 + (p % block_size) as u32).collect();
    let (keys, values) = (random(len * width, 1), random(len * width, 2));
    cache.write(&slots, Rows::new(&keys, width), Rows::new(&values, width));
    let queries = random(len * num_heads * head_dim, 3).iter().map(|q| q * 4.0).collect();
    Case { cache, table, queries, keys, values, num_heads }
}

impl Case {
    /// All positions, fed in chunks of `chunk`.
    fn run(&self, pool: &Pool, chunk: usize) -> Vec<f32> {
        let width = self.num_heads * self.cache.layout().head_dim;
        let mut out = vec![f32::NAN; self.queries.len()];
        let chunks = self.queries.chunks(chunk * width).zip(out.chunks_mut(chunk * width));
        for (i, (queries, out)) in chunks.enumerate() {
            let (num_rows, first_position) = (queries.len() / width, i * chunk);
            let span = SequenceSpan { first_row: 0, num_rows, first_position, block_table: &self.table };
            paged_attention(pool, Rows::new(queries, width), &[span], &self.cache, out);
        }
        out
    }

    fn reference(&self) -> Vec<f64> {
        let KvLayout { num_kv_heads, head_dim, .. } = self.cache.layout();
        let group = self.num_heads / num_kv_heads;
        let mut out = Vec::new();
        for (row, query) in self.queries.chunks(head_dim).enumerate() {
            let (position, kv_head) = (row / self.num_heads, row % self.num_heads / group);
            let at = |store: &[f32], p: usize, d: usize| f64::from(store[(p * num_kv_heads + kv_head) * head_dim + d]);
            let scores: Vec<f64> = (0..=position)
                .map(|p| {
                    let dot: f64 = (0..head_dim).map(|d| f64::from(query[d]) * at(&self.keys, p, d)).sum();
                    (dot / (head_dim as f64).sqrt()).exp()
                })
                .collect();
            let total: f64 = scores.iter().sum();
            out.extend(
                (0..head_dim).map(|d| (0..=position).map(|p| scores[p] / total * at(&self.values, p, d)).sum::<f64>()),
            );
        }
        out
    }
}

#[test]
fn attention_agrees_with_f64() {
    for pool in pools() {
        for (num_heads, num_kv_heads, head_dim, block_size) in
            [(9, 3, 64, 16), (4, 4, 16, 16), (14, 1, 80, 32), (2, 1, 7, 48), (3, 1, 256, 128)]
        {
            let case = case(num_heads, num_kv_heads, head_dim, block_size, 150);
            assert_close(&case.run(&pool, 150), &case.reference(), 3e-6);
        }
    }
}

#[test]
fn chunks_and_threads_do_not_change_a_bit() {
    let case = case(6, 2, 32, 16, 140);
    for pools in pools().chunks(2) {
        let alone = case.run(&pools[0], 1);
        for pool in pools {
            for chunk in (1..=70).chain([100, 128, 140]) {
                assert_same_bits(&case.run(pool, chunk), &alone, &format!("{:?} chunk {chunk}", pool.isa()));
            }
        }
    }
}

#[test]
fn block_size_does_not_change_a_bit() {
    for pool in pools() {
        let expect = case(4, 2, 32, 16, 200).run(&pool, 200);
        for block_size in [32, 48, 64, 128] {
            assert_same_bits(&case(4, 2, 32, block_size, 200).run(&pool, 200), &expect, "block size");
        }
    }
}

#[test]
fn sequences_in_a_batch_do_not_touch_each_other() {
    let case = case(6, 2, 32, 16, 140);
    let width = 6 * 32;
    for pools in pools().chunks(2) {
        let alone = case.run(&pools[0], 1);
        for pool in pools {
            for batch in 1..=70 {
                // Sequence i decodes position 2 i; a prefill chunk comes last; row 0 belongs to nobody.
                let positions: Vec<usize> = (0..batch).map(|i| 2 * i).chain(70..100).collect();
                let mut queries = vec![0.0; width];
                let mut expect = vec![7.0; width];
                for position in &positions {
                    queries.extend(&case.queries[position * width..][..width]);
                    expect.extend(&alone[position * width..][..width]);
                }
                let span = |first_row, num_rows, first_position| SequenceSpan {
                    first_row,
                    num_rows,
                    first_position,
                    block_table: &case.table,
                };
                let mut spans: Vec<SequenceSpan> = (0..batch).map(|i| span(i + 1, 1, 2 * i)).collect();
                spans.push(span(batch + 1, 30, 70));
                let mut out = vec![7.0; queries.len()];
                paged_attention(pool, Rows::new(&queries, width), &spans, &case.cache, &mut out);
                assert_same_bits(&out, &expect, &format!("{:?} batch {batch}", pool.isa()));
            }
        }
    }
}

#[test]
#[should_panic(expected = "belongs to two spans")]
fn overlapping_spans_are_refused() {
    let case = case(1, 1, 16, 16, 16);
    let span = SequenceSpan { first_row: 0, num_rows: 2, first_position: 0, block_table: &case.table };
    let queries = Rows::new(&case.queries, 16);
    paged_attention(&Pool::new(1).unwrap(), queries, &[span, span], &case.cache, &mut [0.0; 256]);
}

#[test]
#[should_panic(expected = "33 positions need 3 blocks")]
fn short_block_tables_are_refused() {
    let case = case(1, 1, 16, 16, 16);
    let span = SequenceSpan { first_row: 0, num_rows: 1, first_position: 32, block_table: &case.table };
    let queries = Rows::new(&case.queries, 16);
    paged_attention(&Pool::new(1).unwrap(), queries, &[span], &case.cache, &mut [0.0; 256]);
}

#[test]
fn keys_that_are_fetched_ahead_change_no_bit() {
    let (num_sequences, num_keys) = (80, 150);
    for pool in pools() {
        for (num_heads, num_kv_heads, head_dim, block_size) in [(9, 3, 64, 16), (2, 1, 256, 128)] {
            let Case { cache, table, queries, .. } = &case(num_heads, num_kv_heads, head_dim, block_size, num_keys);
            assert!(2 * num_sequences * num_keys * num_kv_heads * head_dim * size_of::<f32>() >= STREAMED_BYTES);
            let width = num_heads * head_dim;
            let queries = &queries[..num_sequences * width];
            let span = |first_row: usize, sequence: usize| {
                let first_position = num_keys - 1 - sequence;
                SequenceSpan { first_row, num_rows: 1, first_position, block_table: table }
            };
            let spans: Vec<SequenceSpan> = (0..num_sequences).map(|i| span(i, i)).collect();
            let mut together = vec![f32::NAN; queries.len()];
            paged_attention(&pool, Rows::new(queries, width), &spans, cache, &mut together);
            let mut alone = vec![f32::NAN; queries.len()];
            for (i, (queries, out)) in queries.chunks(width).zip(alone.chunks_mut(width)).enumerate() {
                paged_attention(&pool, Rows::new(queries, width), &[span(0, i)], cache, out);
            }
            assert_same_bits(&together, &alone, &format!("{:?}", pool.isa()));
        }
    }
}
