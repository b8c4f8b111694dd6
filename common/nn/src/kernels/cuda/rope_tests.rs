//! Tests of [`super`] on the CPU or a GPU, against f64.

use super::super::kv_cache_len;
use super::super::testing::{Draws, Memory, assert_bf16_close, bf16_value, rounded};
use super::*;
use crate::kernels::cpu::testing::random;

struct Case {
    shape: AttentionShape,
    num_kv_heads: usize,
    qkv: Vec<f32>,
    bias: Option<Vec<f32>>,
    /// Of queries and keys.
    norms: Option<[Vec<f32>; 2]>,
    positions: Vec<i32>,
    slots: Vec<i32>,
}

const NUM_BLOCKS: usize = 5;
const NUM_POSITIONS: usize = 40;
const EPSILON: f32 = 1e-6;

fn case(shape: AttentionShape, num_kv_heads: usize, with_bias: bool, with_norms: bool) -> Case {
    let (num_rows, width) = (7, (shape.group + 2) * num_kv_heads * shape.head_dim);
    let mut draws = Draws(3);
    let mut slots = draws.shuffled(NUM_BLOCKS * shape.block_size)[..num_rows].to_vec();
    slots[4] = -1;
    Case {
        shape,
        num_kv_heads,
        qkv: random(num_rows * width, 1).iter().map(|x| x * 3.0).collect(),
        bias: with_bias.then(|| random(width, 2)),
        norms: with_norms.then(|| [random(shape.head_dim, 4), random(shape.head_dim, 5)]),
        positions: (0..num_rows).map(|_| draws.below(NUM_POSITIONS) as i32).collect(),
        slots,
    }
}

fn angle(position: i32, pair: usize, head_dim: usize) -> f64 {
    f64::from(position) * 10_000_f64.powf(-2.0 * pair as f64 / head_dim as f64)
}

fn table(head_dim: usize, function: fn(f64) -> f64) -> Vec<f32> {
    let positions = 0..NUM_POSITIONS as i32;
    positions.flat_map(|p| (0..head_dim / 2).map(move |i| function(angle(p, i, head_dim)) as f32)).collect()
}

impl Case {
    /// Row by row: heads of queries, keys and values.
    fn reference(&self) -> Vec<Vec<f64>> {
        let (d, num_heads) = (self.shape.head_dim, self.shape.group * self.num_kv_heads);
        let width = (num_heads + 2 * self.num_kv_heads) * d;
        let bias = self.bias.as_ref().map_or_else(|| vec![0.0; width], |bias| rounded(bias));
        let rows = rounded(&self.qkv);
        let rows = rows.chunks(width).zip(&self.positions);
        let heads = rows.flat_map(|(row, position)| {
            row.chunks(d)
                .zip(bias.chunks(d))
                .enumerate()
                .map(|(head, (x, bias))| {
                    let mut x: Vec<f64> = x.iter().zip(bias).map(|(x, b)| f64::from(*x) + f64::from(*b)).collect();
                    let kind = usize::from(head >= num_heads) + usize::from(head >= num_heads + self.num_kv_heads);
                    if let (Some(norms), true) = (&self.norms, kind < 2) {
                        let mean = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
                        let scale = (mean + f64::from(EPSILON)).sqrt().recip();
                        x.iter_mut().zip(rounded(&norms[kind])).for_each(|(x, w)| *x *= scale * f64::from(w));
                    }
                    if kind < 2 {
                        for i in 0..d / 2 {
                            let (sin, cos) = angle(*position, i, d).sin_cos();
                            let (a, b) = (x[i], x[i + d / 2]);
                            (x[i], x[i + d / 2]) = (a * cos - b * sin, b * cos + a * sin);
                        }
                    }
                    x
                })
                .collect::<Vec<_>>()
        });
        heads.collect()
    }

    fn check(&self) {
        let AttentionShape { head_dim: d, group, block_size } = self.shape;
        let (num_rows, num_heads) = (self.slots.len(), group * self.num_kv_heads);
        let cache_len = kv_cache_len(self.shape, self.num_kv_heads, NUM_BLOCKS);
        let mut memory = Memory::default();
        let rope = QkvRope {
            shape: self.shape,
            num_kv_heads: self.num_kv_heads,
            num_rows,
            qkv: memory.put_bf16(&self.qkv),
            bias: self.bias.as_ref().map(|bias| memory.put_bf16(bias)),
            qk_norms: self.norms.as_ref().map(|norms| [0, 1].map(|kind| memory.put_bf16(&norms[kind]))),
            epsilon: EPSILON,
            cos: memory.put(&table(d, f64::cos)),
            sin: memory.put(&table(d, f64::sin)),
            positions: memory.put(&self.positions),
            slots: memory.put(&self.slots),
            queries: memory.put(&vec![0x7fff_u16; num_rows * num_heads * d]),
            keys: memory.put(&vec![0x7fff_u16; cache_len]),
            values: memory.put(&vec![0x7fff_u16; cache_len]),
        };
        memory.run(&[rope.launch()]);
        let queries = memory.read_bf16(rope.queries);
        let caches = [rope.keys, rope.values].map(|cache| memory.read::<u16>(cache));
        let mut num_written = 0;
        for (i, expect) in self.reference().iter().enumerate() {
            let (row, head) = (i / (num_heads + 2 * self.num_kv_heads), i % (num_heads + 2 * self.num_kv_heads));
            if head < num_heads {
                assert_bf16_close(&queries[(row * num_heads + head) * d..][..d], expect, 0.1, 1e-5);
            } else if let Ok(slot) = usize::try_from(self.slots[row]) {
                let (kind, head) = ((head - num_heads) / self.num_kv_heads, (head - num_heads) % self.num_kv_heads);
                let place = (slot / block_size * self.num_kv_heads + head) * block_size + slot % block_size;
                let stored: Vec<f32> = caches[kind][place * d..][..d].iter().map(|bits| bf16_value(*bits)).collect();
                assert_bf16_close(&stored, expect, 0.1, 1e-5);
                num_written += d;
            }
        }
        let touched = caches.iter().flatten().filter(|bits| **bits != 0x7fff).count();
        assert_eq!(touched, num_written, "other slots must stay as they were");
    }
}

#[test]
fn queries_turn_and_keys_and_values_find_their_slots() {
    for (head_dim, group, num_kv_heads) in [(32, 2, 1), (32, 3, 3), (64, 7, 2), (64, 1, 3), (128, 6, 2), (128, 4, 1)] {
        let shape = AttentionShape { head_dim, group, block_size: 16 };
        for with_bias in [false, true] {
            for with_norms in [false, true] {
                case(shape, num_kv_heads, with_bias, with_norms).check();
            }
        }
    }
}
