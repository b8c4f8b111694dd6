//! Launches of `attention.cu`.

use super::launch::{Args, Argument};
use super::{DevicePtr, Launch, Program};

/// What the attention kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// 32, 64 or 128.
    pub head_dim: usize,
    /// Query heads per key head, 1 to 16.
    pub group: usize,
    /// Tokens of a cache block, a multiple of 16.
    pub block_size: usize,
}

/// Keys and values of one layer, each `[num_blocks, K, block_size, D]` in bf16, and who owns which blocks.
#[derive(Debug, Clone, Copy)]
pub struct PagedKv {
    pub shape: AttentionShape,
    pub num_kv_heads: usize,
    pub keys: DevicePtr,
    pub values: DevicePtr,
    /// i32 `[sequences, max_blocks]`: the block of each `block_size` positions of a sequence.
    pub block_tables: DevicePtr,
    pub max_blocks: usize,
}

/// One query a sequence.
#[derive(Debug, Clone, Copy)]
pub struct DecodeAttention {
    pub kv: PagedKv,
    /// `B`.
    pub num_sequences: usize,
    /// No context of the batch is longer; fixed for a CUDA graph.
    pub max_context_len: usize,
    /// bf16 `[B, H * D]`.
    pub queries: DevicePtr,
    /// i32 `[B]`: keys of each sequence, its newest token among them; 0 for a row that is not in use.
    pub context_lens: DevicePtr,
    /// bf16 `[B, H * D]`; zeros for rows that are not in use.
    pub out: DevicePtr,
    /// fp32 `[B, H, S, D]` with `S` of [`Self::num_splits`]; not read if that is 1.
    pub partial_out: DevicePtr,
    /// fp32 `[B, H, S]`.
    pub partial_lse: DevicePtr,
}

/// A chunk of new tokens a sequence. Their keys and values are in the cache already.
#[derive(Debug, Clone, Copy)]
pub struct PrefillAttention {
    pub kv: PagedKv,
    pub num_sequences: usize,
    /// The most new tokens that a sequence has.
    pub max_rows: usize,
    /// bf16 `[N, H * D]`.
    pub queries: DevicePtr,
    /// [`Span`] `[sequences]`.
    pub spans: DevicePtr,
    /// bf16 `[N, H * D]`; rows of no span are left alone.
    pub out: DevicePtr,
}

/// The new tokens of one sequence, as the kernel reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Span {
    pub first_row: i32,
    pub num_rows: i32,
    /// Position of the first in its sequence.
    pub first_position: i32,
}

/// Keys that one thread block of decoding takes (`SPLIT_KEYS`).
const SPLIT_KEYS: usize = 256;
const NUM_THREADS: u32 = 128;
/// Rows (queries times heads of a group) of a thread block of prefill.
const PREFILL_ROWS: usize = 64;

/// Elements of the keys, and of the values, of one layer.
#[must_use]
pub fn kv_cache_len(shape: AttentionShape, num_kv_heads: usize, num_blocks: usize) -> usize {
    num_blocks * num_kv_heads * shape.block_size * shape.head_dim
}

impl Span {
    /// As they lie in memory.
    #[must_use]
    pub fn words(self) -> [i32; 3] {
        [self.first_row, self.num_rows, self.first_position]
    }
}

impl DecodeAttention {
    /// `S`: pieces that the longest context is cut into.
    #[must_use]
    pub fn num_splits(max_context_len: usize) -> usize {
        max_context_len.div_ceil(SPLIT_KEYS).max(1)
    }

    /// To be launched one after the other.
    #[must_use]
    pub fn launches(&self) -> Vec<Launch> {
        let PagedKv { shape, num_kv_heads, .. } = self.kv;
        let num_splits = Self::num_splits(self.max_context_len);
        let program = Program::Attention(shape);
        let Self { queries, context_lens, out, partial_out, partial_lse, .. } = *self;
        let args = DecodeArgs { paged: self.kv.args(), queries, context_lens, out, partial_out, partial_lse };
        let attend = Launch {
            program,
            kernel: "decode_attention",
            grid: [num_splits as u32, num_kv_heads as u32, self.num_sequences as u32],
            num_threads: NUM_THREADS,
            args: Args::default().with(args),
        };
        let args = Args::default().with(context_lens).with(partial_out).with(partial_lse).with(out);
        let combine = Launch {
            program,
            kernel: "combine_splits",
            grid: [(num_kv_heads * shape.group) as u32, self.num_sequences as u32, 1],
            num_threads: 32,
            args: args.with(num_splits as i32),
        };
        if num_splits == 1 { vec![attend] } else { vec![attend, combine] }
    }
}

impl PrefillAttention {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let PagedKv { shape, num_kv_heads, .. } = self.kv;
        let Self { queries, spans, out, .. } = *self;
        Launch {
            program: Program::Attention(shape),
            kernel: "prefill_attention",
            grid: [
                (self.max_rows * shape.group).div_ceil(PREFILL_ROWS) as u32,
                num_kv_heads as u32,
                self.num_sequences as u32,
            ],
            num_threads: NUM_THREADS,
            args: Args::default().with(PrefillArgs { paged: self.kv.args(), queries, spans, out }),
        }
    }
}

impl PagedKv {
    fn args(&self) -> PagedArgs {
        let scale = (self.shape.head_dim as f64).sqrt().recip();
        PagedArgs {
            keys: self.keys,
            values: self.values,
            block_tables: self.block_tables,
            max_blocks: self.max_blocks as i32,
            num_kv_heads: self.num_kv_heads as i32,
            scale_log2: (scale * std::f64::consts::LOG2_E) as f32,
            padding: 0,
        }
    }
}

/// `Paged` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct PagedArgs {
    keys: DevicePtr,
    values: DevicePtr,
    block_tables: DevicePtr,
    max_blocks: i32,
    num_kv_heads: i32,
    scale_log2: f32,
    padding: i32,
}

/// `Decode` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct DecodeArgs {
    paged: PagedArgs,
    queries: DevicePtr,
    context_lens: DevicePtr,
    out: DevicePtr,
    partial_out: DevicePtr,
    partial_lse: DevicePtr,
}

/// `Prefill` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct PrefillArgs {
    paged: PagedArgs,
    queries: DevicePtr,
    spans: DevicePtr,
    out: DevicePtr,
}

impl Argument for DecodeArgs {}
impl Argument for PrefillArgs {}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
