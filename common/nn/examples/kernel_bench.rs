//! Speeds of the CPU kernels: `cargo run --release -p aha-nn --example kernel_bench [threads]`.
#![expect(clippy::print_stdout, reason = "printing is its purpose")]

use aha_nn::kernels::cpu::{
    Isa, KvCache, KvLayout, PackedMatrix, Pool, PoolError, QuantizedMatrix, Rows, SamplingParams, SequenceSpan,
    paged_attention, sample_row,
};
use std::time::Instant;

/// Time given to one measurement.
const SECONDS: f64 = 0.3;

fn main() -> Result<(), PoolError> {
    let num_threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1);
    for isa in Isa::available() {
        let pool = Pool::with_isa(num_threads, isa)?;
        println!("== {isa:?}, {num_threads} threads");
        pool.install(|| {
            gemm(&pool);
            streamed(&pool);
            attention(&pool);
            sampling(&pool);
        });
    }
    Ok(())
}

fn gemm(pool: &Pool) {
    println!("{:>6} {:>6} {:>5} {:>10} {:>9} {:>8}", "k", "n", "m", "us", "GFLOP/s", "GB/s");
    for (k, n) in [(576, 1536), (1536, 576), (256, 1024), (576, 49152)] {
        let weight = numbers(k * n);
        let mut packed = PackedMatrix::pack(pool, &[&weight], k);
        for m in [1, 2, 4, 8, 32, 64, 256] {
            let (x, mut out) = (numbers(m * k), vec![0.0; m * n]);
            let seconds = best_seconds(|| packed.gemm(pool, &x, None, &mut out));
            let gflops = (2 * m * k * n) as f64 / seconds * 1e-9;
            println!("{k:6} {n:6} {m:5} {:10.1} {gflops:9.1} {:8.1}", seconds * 1e6, gigabytes(k * n) / seconds);
        }
        let seconds = best_seconds(|| packed.repack(pool, &[&weight]));
        println!("{k:6} {n:6}  pack {:10.1} {:9} {:8.1}", seconds * 1e6, "", 2.0 * gigabytes(k * n) / seconds);
    }
}

/// Weights that come from memory, as those of a model do at every step of decoding.
fn streamed(pool: &Pool) {
    let (k, n, num_matrices) = (576, 1536, 100);
    let weights: Vec<Vec<f32>> = (0..num_matrices).map(|_| numbers(k * n)).collect();
    let exact: Vec<_> = weights.iter().map(|weight| PackedMatrix::pack(pool, &[weight], k)).collect();
    let int8: Vec<_> = weights.iter().map(|weight| QuantizedMatrix::pack(pool, &[weight], k)).collect();
    println!("{num_matrices} weights of {k} to {n}: fp32 us, GFLOP/s, GB/s; int8 us, GOP/s, GB/s");
    for m in [1, 2, 4, 8, 12, 16, 24, 32, 64] {
        let (x, mut out) = (numbers(m * k), vec![0.0; m * n]);
        let exact = best_seconds(|| exact.iter().for_each(|weight| weight.gemm(pool, &x, None, &mut out)));
        let int8 = best_seconds(|| int8.iter().for_each(|weight| weight.gemm(pool, &x, None, &mut out)));
        print!("{m:5}");
        for (seconds, bytes) in [(exact, 4.0), (int8, 1.0)] {
            let seconds = seconds / f64::from(num_matrices);
            let gops = (2 * m * k * n) as f64 / seconds * 1e-9;
            print!(" {:10.1} {gops:9.1} {:8.1}", seconds * 1e6, bytes / 4.0 * gigabytes(k * n) / seconds);
        }
        println!();
    }
}

fn attention(pool: &Pool) {
    println!(
        "{:>6} {:>6} {:>5} {:>5} {:>6} {:>10} {:>9} {:>8}",
        "heads", "kv", "rows", "keys", "layers", "us", "GFLOP/s", "GB/s"
    );
    // Caches of many layers come from memory, those of one from the processor's cache where they fit.
    for (num_heads, num_kv_heads, num_sequences, num_rows, context, num_layers) in [
        (9, 3, 32, 1, 112, 1),
        (9, 3, 32, 1, 112, 30),
        (9, 3, 32, 1, 512, 10),
        (14, 2, 32, 1, 512, 10),
        (9, 3, 1, 512, 512, 1),
        (14, 2, 1, 512, 512, 1),
    ] {
        let (head_dim, block_size) = (64, 16);
        let blocks_per_sequence = context / block_size;
        let layout = KvLayout { num_blocks: num_sequences * blocks_per_sequence, block_size, num_kv_heads, head_dim };
        let slots: Vec<u32> = (0..(num_sequences * context) as u32).collect();
        let kv = numbers(slots.len() * num_kv_heads * head_dim);
        let rows = Rows::new(&kv, num_kv_heads * head_dim);
        let mut caches: Vec<KvCache> = (0..num_layers).map(|_| KvCache::new(layout)).collect();
        caches.iter_mut().for_each(|cache| cache.write(&slots, rows, rows));

        let blocks: Vec<u32> = (0..layout.num_blocks as u32).collect();
        let tables = blocks.chunks(blocks_per_sequence).enumerate();
        let spans: Vec<SequenceSpan> = tables
            .map(|(i, block_table)| {
                let first_position = context - num_rows;
                SequenceSpan { first_row: i * num_rows, num_rows, first_position, block_table }
            })
            .collect();
        let width = num_heads * head_dim;
        let queries = numbers(num_sequences * num_rows * width);
        let mut out = vec![0.0; queries.len()];
        let mut attend = |cache| paged_attention(pool, Rows::new(&queries, width), &spans, cache, &mut out);
        let seconds = best_seconds(|| caches.iter().for_each(&mut attend)) / f64::from(num_layers);
        let pairs: usize = (0..num_rows).map(|i| context - i).sum::<usize>() * num_sequences;
        let gflops = (4 * pairs * width) as f64 / seconds * 1e-9;
        let read = 2.0 * gigabytes(num_sequences * context * num_kv_heads * head_dim) / seconds;
        let (rows, us) = (num_sequences * num_rows, seconds * 1e6);
        println!(
            "{num_heads:6} {num_kv_heads:6} {rows:5} {context:5} {num_layers:6} {us:10.1} {gflops:9.1} {read:8.1}"
        );
    }
}

fn sampling(pool: &Pool) {
    println!("{:>24} {:>10} {:>8}", "sampling 151936", "us", "GB/s");
    let logits: Vec<f32> = numbers(151_936).iter().map(|x| x * 12.0).collect();
    let plain = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    for (name, params) in [
        ("greedy", SamplingParams { temperature: 0.0, ..plain }),
        ("temperature", plain),
        ("top_k 50", SamplingParams { top_k: 50, ..plain }),
        ("top_p 0.95", SamplingParams { top_p: 0.95, ..plain }),
        ("min_p 0.05", SamplingParams { min_p: 0.05, ..plain }),
    ] {
        let seconds = best_seconds(|| {
            std::hint::black_box(sample_row(pool, &logits, &params, 0.7)).ok();
        });
        println!("{name:>24} {:10.1} {:8.1}", seconds * 1e6, gigabytes(logits.len()) / seconds);
    }
}

/// The fastest of many runs: on a shared machine the others measure the neighbours.
fn best_seconds(mut run: impl FnMut()) -> f64 {
    run();
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < SECONDS {
        let lap = Instant::now();
        run();
        best = best.min(lap.elapsed().as_secs_f64());
    }
    best
}

fn gigabytes(floats: usize) -> f64 {
    floats as f64 * 4e-9
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1021) as f32 / 510.5 - 1.0).collect()
}
