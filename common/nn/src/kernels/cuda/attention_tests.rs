//! Tests of [`super`] on the CPU or a GPU, against f64.

use super::super::testing::{Draws, Memory, assert_bf16_close, on_gpu, rounded};
use super::*;
use crate::kernels::cpu::testing::{assert_same_bits, random};

/// Sequences of given lengths in a cache whose other slots are NaN.
struct Case {
    shape: AttentionShape,
    num_kv_heads: usize,
    lens: Vec<usize>,
    /// `[sequences, max_blocks]`.
    block_tables: Vec<i32>,
    /// Of every sequence, `[len, K, D]`.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    /// Of every sequence, `[len, H, D]`.
    queries: Vec<Vec<f32>>,
}

/// As `aha-cuda-emulation` has them, with numbers of key heads.
const SHAPES: [(AttentionShape, usize); 6] = [
    (AttentionShape { head_dim: 32, group: 2, block_size: 16 }, 1),
    (AttentionShape { head_dim: 64, group: 1, block_size: 16 }, 3),
    (AttentionShape { head_dim: 64, group: 3, block_size: 32 }, 3),
    (AttentionShape { head_dim: 64, group: 7, block_size: 16 }, 2),
    (AttentionShape { head_dim: 128, group: 6, block_size: 16 }, 2),
    (AttentionShape { head_dim: 128, group: 16, block_size: 64 }, 1),
];

fn case(shape: AttentionShape, num_kv_heads: usize, lens: &[usize]) -> Case {
    let max_blocks = lens.iter().max().unwrap().div_ceil(shape.block_size) + 1;
    let mut draws = Draws(7);
    // Some blocks belong to nobody, and what is past a sequence's last block names none.
    let mut free = draws.shuffled(lens.len() * max_blocks + 3);
    let mut block_tables = Vec::new();
    for len in lens {
        let owned = len.div_ceil(shape.block_size);
        block_tables.extend(free.drain(..owned));
        block_tables.extend(vec![i32::MAX; max_blocks - owned]);
    }
    let width = num_kv_heads * shape.head_dim;
    let values_of = |seed: u64, width: usize, scale: f32| -> Vec<Vec<f32>> {
        let one = |(i, len): (usize, &usize)| random(len * width, seed + i as u64).iter().map(|x| x * scale).collect();
        lens.iter().enumerate().map(one).collect()
    };
    Case {
        shape,
        num_kv_heads,
        lens: lens.to_vec(),
        block_tables,
        keys: values_of(100, width, 1.0),
        values: values_of(200, width, 1.0),
        queries: values_of(300, width * shape.group, 4.0),
    }
}

impl Case {
    fn max_blocks(&self) -> usize {
        self.block_tables.len() / self.lens.len()
    }

    /// Elements of a row of queries.
    fn width(&self) -> usize {
        self.num_kv_heads * self.shape.group * self.shape.head_dim
    }

    fn put_cache(&self, memory: &mut Memory) -> PagedKv {
        let AttentionShape { head_dim, block_size, .. } = self.shape;
        let num_blocks = self.lens.len() * self.max_blocks() + 3;
        let mut stores = [(); 2].map(|()| vec![f32::NAN; kv_cache_len(self.shape, self.num_kv_heads, num_blocks)]);
        for (store, rows) in stores.iter_mut().zip([&self.keys, &self.values]) {
            for (sequence, rows) in rows.iter().enumerate() {
                for (i, row) in rows.chunks(head_dim).enumerate() {
                    let (position, head) = (i / self.num_kv_heads, i % self.num_kv_heads);
                    let block = self.block_tables[sequence * self.max_blocks() + position / block_size] as usize;
                    let place = (block * self.num_kv_heads + head) * block_size + position % block_size;
                    store[place * head_dim..][..head_dim].copy_from_slice(row);
                }
            }
        }
        PagedKv {
            shape: self.shape,
            num_kv_heads: self.num_kv_heads,
            keys: memory.put_bf16(&stores[0]),
            values: memory.put_bf16(&stores[1]),
            block_tables: memory.put(&self.block_tables),
            max_blocks: self.max_blocks(),
        }
    }

    /// Attention of the query at `position` of a sequence, `[H * D]`.
    fn reference(&self, sequence: usize, position: usize) -> Vec<f64> {
        let AttentionShape { head_dim, group, .. } = self.shape;
        let [queries, keys, values] = [&self.queries, &self.keys, &self.values].map(|rows| rounded(&rows[sequence]));
        let at = |rows: &[f32], p: usize, head: usize, d: usize| {
            f64::from(rows[(p * self.num_kv_heads + head) * head_dim + d])
        };
        let query = &queries[position * self.width()..][..self.width()];
        let mut out = Vec::new();
        for (head, query) in query.chunks(head_dim).enumerate() {
            let score = |p| (0..head_dim).map(|d| f64::from(query[d]) * at(&keys, p, head / group, d)).sum::<f64>();
            let scores: Vec<f64> = (0..=position).map(|p| (score(p) / (head_dim as f64).sqrt()).exp()).collect();
            let total: f64 = scores.iter().sum();
            let mean = |d| (0..=position).map(|p| scores[p] / total * at(&values, p, head / group, d)).sum::<f64>();
            out.extend((0..head_dim).map(mean));
        }
        out
    }

    /// Every sequence's last token, `[sequences, H * D]`.
    fn decode(&self, max_context_len: usize) -> Vec<f32> {
        let mut memory = Memory::default();
        let (num_sequences, width) = (self.lens.len(), self.width());
        let last = |queries: &Vec<f32>| match queries.len() {
            0 => vec![f32::NAN; width],
            len => queries[len - width..].to_vec(),
        };
        let num_partials = num_sequences * DecodeAttention::num_splits(max_context_len);
        let decode = DecodeAttention {
            kv: self.put_cache(&mut memory),
            num_sequences,
            max_context_len,
            queries: memory.put_bf16(&self.queries.iter().flat_map(last).collect::<Vec<_>>()),
            context_lens: memory.put(&self.lens.iter().map(|len| *len as i32).collect::<Vec<_>>()),
            out: memory.put(&vec![0x7fff_u16; num_sequences * width]),
            partial_out: memory.put(&vec![f32::NAN; num_partials * width]),
            partial_lse: memory.put(&vec![f32::NAN; num_partials * width / self.shape.head_dim]),
        };
        memory.run(&decode.launches());
        memory.read_bf16(decode.out)
    }

    /// The tokens of every sequence from its `starts` on, in rows one after the other with one unused row between.
    fn prefill(&self, starts: &[usize]) -> Vec<Vec<f32>> {
        let mut memory = Memory::default();
        let width = self.width();
        let (mut spans, mut queries) = (Vec::new(), Vec::new());
        for (rows, start) in self.queries.iter().zip(starts) {
            let (first_row, rows) = (queries.len() / width, &rows[start * width..]);
            let span = [first_row, rows.len() / width, *start].map(|x| x as i32);
            spans.push(Span { first_row: span[0], num_rows: span[1], first_position: span[2] });
            queries.extend_from_slice(rows);
            queries.extend(vec![f32::NAN; width]);
        }
        let prefill = PrefillAttention {
            kv: self.put_cache(&mut memory),
            num_sequences: spans.len(),
            max_rows: spans.iter().map(|span| span.num_rows as usize).max().unwrap(),
            queries: memory.put_bf16(&queries),
            spans: memory.put(&spans),
            out: memory.put(&vec![0x7fff_u16; queries.len()]),
        };
        memory.run(&[prefill.launch()]);
        let out = memory.read_bf16(prefill.out);
        let rows = |span: &Span| {
            let (first, end) = (span.first_row as usize * width, (span.first_row + span.num_rows) as usize * width);
            assert!(out[end..end + width].iter().all(|x| x.is_nan()), "a row of no span was written");
            out[first..end].to_vec()
        };
        spans.iter().map(rows).collect()
    }
}

/// Weights are rounded to bf16, each by up to 1 / 512 of itself: of a mean of values below 1 in size, that is the most.
const TOLERANCE: f64 = 1.0 / 512.0;

#[test]
fn decoding_agrees_with_f64() {
    for (shape, num_kv_heads) in SHAPES {
        let case = case(shape, num_kv_heads, &[1, 17, 0, 255, 64, 257, 15, 16, 600]);
        let width = case.width();
        for (sequence, out) in case.decode(600).chunks(width).enumerate() {
            match case.lens[sequence] {
                0 => assert_eq!(out, vec![0.0; width], "a row that is not in use is zero"),
                len => assert_bf16_close(out, &case.reference(sequence, len - 1), 1.0, TOLERANCE),
            }
        }
    }
}

/// Heads of Qwen2.5 0.5B, 1.5B, 3B and 7B, on enough blocks to fill a GPU.
#[test]
fn decoding_and_prefill_agree_with_f64_at_the_size_of_a_model() {
    if !on_gpu() {
        eprintln!("skipped: the emulation takes too long; AHA_TEST_DEVICE=cuda runs it");
        return;
    }
    let mut draws = Draws(11);
    for (head_dim, group, num_kv_heads) in [(64, 7, 2), (128, 6, 2), (128, 8, 2), (128, 7, 4)] {
        let mut lens: Vec<usize> = (0..20).map(|_| 1 + draws.below(2000)).collect();
        lens.extend([4096, 4095, 3841, 3840]);
        let case = case(AttentionShape { head_dim, group, block_size: 16 }, num_kv_heads, &lens);
        let width = case.width();
        for (sequence, out) in case.decode(4096).chunks(width).enumerate() {
            assert_bf16_close(out, &case.reference(sequence, lens[sequence] - 1), 1.0, TOLERANCE);
        }
        let starts: Vec<usize> = lens.iter().map(|len| len - len % 61).collect();
        for (sequence, out) in case.prefill(&starts).iter().enumerate() {
            // A row of each is enough.
            let row = (lens[sequence] - starts[sequence]) / 2;
            if let Some(out) = out.chunks(width).nth(row) {
                assert_bf16_close(out, &case.reference(sequence, starts[sequence] + row), 1.0, TOLERANCE);
            }
        }
    }
}

/// With equal scores the result is the mean of the values: one key too many, too few or twice shows at once.
#[test]
fn every_key_counts_once() {
    for (shape, num_kv_heads) in SHAPES {
        let d = shape.head_dim;
        let mut case = case(shape, num_kv_heads, &[5, 31, 32, 33, 256, 300, 513]);
        case.queries.iter_mut().flatten().for_each(|x| *x = 0.0);
        for values in &mut case.values {
            for (i, row) in values.chunks_mut(d).enumerate() {
                let position = i / num_kv_heads;
                row.iter_mut().enumerate().for_each(|(j, x)| *x = f32::from(u8::from(position % d == j)));
            }
        }
        let expect = |len: usize| -> Vec<f64> {
            let count = |j: usize| (0..len).filter(|position| position % d == j).count();
            (0..case.width()).map(|i| count(i % d) as f64 / len as f64).collect()
        };
        for (out, len) in case.decode(513).chunks(case.width()).zip(&case.lens) {
            assert_bf16_close(out, &expect(*len), 0.0, 1e-6);
        }
        let last = case.lens.iter().map(|len| len - 1).collect::<Vec<_>>();
        for (out, len) in case.prefill(&last).iter().zip(&case.lens) {
            assert_bf16_close(out, &expect(*len), 0.0, 1e-6);
        }
    }
}

#[test]
fn neither_neighbours_nor_the_longest_context_change_a_bit() {
    let (shape, num_kv_heads) = SHAPES[3];
    let together = case(shape, num_kv_heads, &[300, 17, 700]);
    let expect = together.decode(700);
    for max_context_len in [701, 1024, 3000] {
        assert_same_bits(&together.decode(max_context_len), &expect, "another longest context");
    }
    let mut alone = case(shape, num_kv_heads, &[300]);
    alone.queries[0].clone_from(&together.queries[0]);
    assert_same_bits(&alone.decode(300), &expect[..alone.width()], "a sequence alone");
}

/// Scores far from zero, of both signs, must neither overflow nor vanish.
#[test]
fn large_scores_are_survived() {
    let (shape, num_kv_heads) = SHAPES[2];
    let mut case = case(shape, num_kv_heads, &[1, 40, 300]);
    case.queries.iter_mut().flatten().for_each(|x| *x *= 40.0);
    let (out, width) = (case.decode(300), case.width());
    for (sequence, len) in case.lens.iter().enumerate() {
        let expect = case.reference(sequence, len - 1);
        assert_bf16_close(&out[sequence * width..][..width], &expect, 1.0, TOLERANCE);
    }
}

#[test]
fn prefill_agrees_with_f64() {
    for (shape, num_kv_heads) in SHAPES {
        let case = case(shape, num_kv_heads, &[1, 23, 70, 16, 33]);
        let starts = [0, 0, 37, 15, 0];
        for (sequence, out) in case.prefill(&starts).iter().enumerate() {
            assert_eq!(out.len(), (case.lens[sequence] - starts[sequence]) * case.width());
            for (row, out) in out.chunks(case.width()).enumerate() {
                assert_bf16_close(out, &case.reference(sequence, starts[sequence] + row), 1.0, TOLERANCE);
            }
        }
    }
}

#[test]
fn chunks_of_a_prefill_do_not_change_a_bit() {
    let (shape, num_kv_heads) = SHAPES[3];
    let case = case(shape, num_kv_heads, &[90]);
    let whole = &case.prefill(&[0])[0];
    for start in [1, 16, 37, 64, 89] {
        assert_same_bits(&case.prefill(&[start])[0], &whole[start * case.width()..], "a later chunk");
    }
}

#[test]
fn grids_cover_the_batch() {
    let kv = PagedKv {
        shape: SHAPES[3].0,
        num_kv_heads: 2,
        keys: DevicePtr(0),
        values: DevicePtr(0),
        block_tables: DevicePtr(0),
        max_blocks: 64,
    };
    let [queries, context_lens, out, partial_out, partial_lse] = [DevicePtr(0); 5];
    let decode = |max_context_len| DecodeAttention {
        kv,
        num_sequences: 5,
        max_context_len,
        queries,
        context_lens,
        out,
        partial_out,
        partial_lse,
    };
    let grids = |max_context_len| {
        let launches = decode(max_context_len).launches();
        launches.iter().map(|launch| (launch.kernel, launch.grid, launch.num_threads)).collect::<Vec<_>>()
    };
    assert_eq!(grids(256), [("decode_attention", [1, 2, 5], 128)]);
    assert_eq!(grids(1000), [("decode_attention", [4, 2, 5], 128), ("combine_splits", [14, 5, 1], 32)]);
    for (max_rows, tiles) in [(0, 0), (1, 1), (9, 1), (10, 2), (512, 56)] {
        let prefill = PrefillAttention { kv, num_sequences: 3, max_rows, queries, spans: DevicePtr(0), out };
        assert_eq!(prefill.launch().grid, [tiles, 2, 3]);
    }
}
