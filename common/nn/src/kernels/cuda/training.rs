//! Launches of `training.cu`. Rows may be of any width and lie anywhere; those at multiples of 16 bytes are faster.

use super::launch::{Args, Argument, whole_warps};
use super::{DevicePtr, Element, Launch, Program};

/// `out = sum * scales * weight` with `sum = x + delta` and `scales = 1 / sqrt(mean(sum^2) + epsilon)` of each row.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    pub element: Element,
    /// `R`.
    pub num_rows: usize,
    /// `C`, at most [`MAX_NORM_WIDTH`].
    pub width: usize,
    pub epsilon: f32,
    /// `[R, C]`.
    pub x: DevicePtr,
    /// `delta` and `sum`, `[R, C]` each. None: `x` is the sum.
    pub addition: Option<[DevicePtr; 2]>,
    /// `[C]`.
    pub weight: DevicePtr,
    /// `[R, C]`.
    pub out: DevicePtr,
    /// fp32 `[R]`.
    pub scales: DevicePtr,
}

/// The gradients of [`RmsNorm`].
#[derive(Debug, Clone, Copy)]
pub struct RmsNormBackward {
    pub element: Element,
    /// `R`.
    pub num_rows: usize,
    /// `C`, at most [`MAX_NORM_WIDTH`].
    pub width: usize,
    /// The sum, `[R, C]`.
    pub x: DevicePtr,
    /// `[C]`.
    pub weight: DevicePtr,
    /// fp32 `[R]`.
    pub scales: DevicePtr,
    /// `[R, C]`.
    pub d_out: DevicePtr,
    /// `[R, C]`, added to `d_x`: the gradient of the sum where it is used besides.
    pub d_sum: Option<DevicePtr>,
    /// `[R, C]`.
    pub d_x: DevicePtr,
    /// fp32 `[num_parts, C]`, which add up to the gradient of the weight. None: it is not wanted.
    pub d_weight: Option<DevicePtr>,
}

/// Turns every head by the angles of its row, in place.
#[derive(Debug, Clone, Copy)]
pub struct TurnHeads {
    pub element: Element,
    /// `N`.
    pub num_rows: usize,
    pub num_heads: usize,
    /// `D`, even.
    pub head_dim: usize,
    /// `[N, heads * D]`.
    pub x: DevicePtr,
    /// i32 `[N]`, below `T`.
    pub positions: DevicePtr,
    /// fp32 `[T, D / 2]`.
    pub cos: DevicePtr,
    /// fp32 `[T, D / 2]`.
    pub sin: DevicePtr,
    /// Undoes the turn, which is its backward pass.
    pub is_back: bool,
}

/// `out = silu(gate) * up`, `[num_elements]` each.
#[derive(Debug, Clone, Copy)]
pub struct SwiGlu {
    pub element: Element,
    pub num_elements: usize,
    pub gate: DevicePtr,
    pub up: DevicePtr,
    pub out: DevicePtr,
}

/// The gradients of [`SwiGlu`], `[num_elements]` each.
#[derive(Debug, Clone, Copy)]
pub struct SwiGluBackward {
    pub element: Element,
    pub num_elements: usize,
    pub gate: DevicePtr,
    pub up: DevicePtr,
    /// The gradient of the output before, of `up` after.
    pub d_out: DevicePtr,
    pub d_gate: DevicePtr,
}

/// Log-probs of target tokens, entropies, and logarithms of the sums of exponentials, of logits over the temperature.
#[derive(Debug, Clone, Copy)]
pub struct SummariseTargets {
    pub element: Element,
    /// `M`.
    pub num_rows: usize,
    /// `V`.
    pub vocab_size: usize,
    pub temperature: f32,
    /// fp32 `[M, V]`.
    pub logits: DevicePtr,
    /// i64 `[M]`. The log-prob of a target that is not below `V` is NaN.
    pub targets: DevicePtr,
    /// fp32 `[M]`, as are the next two.
    pub logprobs: DevicePtr,
    pub entropies: DevicePtr,
    pub log_sums: DevicePtr,
}

/// The gradients of logits, from those of log-probs and entropies.
#[derive(Debug, Clone, Copy)]
pub struct LogitGradients {
    /// What [`SummariseTargets`] had and wrote.
    pub summary: SummariseTargets,
    /// fp32 `[M]`.
    pub d_logprobs: DevicePtr,
    /// fp32 `[M]`. None: the entropies take no part.
    pub d_entropies: Option<DevicePtr>,
    /// `[M, V]`; the memory of the logits where elements are fp32.
    pub d_logits: DevicePtr,
}

/// Sums of squares of parts, which add up to that of all.
#[derive(Debug, Clone, Copy)]
pub struct SumOfSquares {
    pub element: Element,
    pub num_elements: usize,
    /// fp32 `[num_elements]`.
    pub values: DevicePtr,
    /// f64 `[num_parts]`.
    pub sums: DevicePtr,
}

/// AdamW on fp32 weights, with a rounded copy of them.
#[derive(Debug, Clone, Copy)]
pub struct AdamWUpdate {
    pub element: Element,
    pub num_elements: usize,
    /// fp32 `[num_elements]`, as are the gradient and its moments.
    pub weights: DevicePtr,
    pub grad: DevicePtr,
    pub exp_avg: DevicePtr,
    pub exp_avg_sq: DevicePtr,
    /// bf16 `[num_elements]`.
    pub copy: Option<DevicePtr>,
    pub factors: AdamWFactors,
}

/// `AdamW` of the source.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct AdamWFactors {
    /// The gradient is multiplied by it first.
    pub scale: f32,
    /// What the weights are multiplied by first.
    pub decay: f32,
    pub beta1: f32,
    pub beta2: f32,
    /// `lr / (1 - beta1^step)`.
    pub step_size: f32,
    /// `1 / sqrt(1 - beta2^step)`.
    pub root_scale: f32,
    pub epsilon: f32,
}

impl Argument for AdamWFactors {}

/// A block's threads take one row of a norm, eight elements each.
pub const MAX_NORM_WIDTH: usize = 8192;
/// Elements that a thread takes.
const VECTOR: usize = 8;
/// Of a block, where rows do not decide.
const THREADS: usize = 256;
/// Enough for every multiprocessor of the largest GPU. A number of its own, so that sums are the same on each.
const NORM_THREADS: usize = 128 * 1024;
const SQUARES_BLOCKS: usize = 1024;

/// How many threads share a row of `width` elements, and how many a block has.
fn team(width: usize) -> (usize, usize) {
    assert!(0 < width && width <= MAX_NORM_WIDTH, "rows of {width} elements; the kernel takes 1 to {MAX_NORM_WIDTH}");
    let needed = width.div_ceil(VECTOR);
    if needed <= 32 {
        (needed.next_power_of_two(), THREADS)
    } else {
        let threads = whole_warps(needed) as usize;
        (threads, threads)
    }
}

/// Blocks of [`THREADS`] threads that take `num_elements`.
fn blocks(num_elements: usize) -> u32 {
    num_elements.div_ceil(VECTOR * THREADS) as u32
}

impl RmsNorm {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let (team, num_threads) = team(self.width);
        let [delta, sum] = self.addition.unwrap_or_default();
        let args = NormArgs {
            addresses: [self.x, delta, self.weight, sum, self.out, self.scales],
            sizes: [self.num_rows as i32, self.width as i32, team as i32],
            epsilon: self.epsilon,
        };
        Launch {
            program: Program::Training(self.element),
            kernel: "rms_norm",
            grid: [self.num_rows.div_ceil(num_threads / team) as u32, 1, 1],
            num_threads: num_threads as u32,
            args: Args::default().with(args),
        }
    }
}

impl RmsNormBackward {
    /// Rows of `d_weight`.
    #[must_use]
    pub fn num_parts(num_rows: usize, width: usize) -> usize {
        num_rows.min(NORM_THREADS / team(width).0)
    }

    #[must_use]
    pub fn launch(&self) -> Launch {
        let (team, num_threads) = team(self.width);
        let num_parts = Self::num_parts(self.num_rows, self.width);
        let (d_sum, d_weight) = (self.d_sum.unwrap_or_default(), self.d_weight.unwrap_or_default());
        let args = NormBackwardArgs {
            addresses: [self.x, self.weight, self.scales, self.d_out, d_sum, self.d_x, d_weight],
            sizes: [self.num_rows as i32, num_parts as i32, self.width as i32, team as i32],
        };
        Launch {
            program: Program::Training(self.element),
            kernel: "rms_norm_backward",
            grid: [num_parts.div_ceil(num_threads / team) as u32, 1, 1],
            num_threads: num_threads as u32,
            args: Args::default().with(args),
        }
    }
}

impl TurnHeads {
    #[must_use]
    pub fn launch(&self) -> Launch {
        assert!(self.head_dim.is_multiple_of(2), "a head of {} elements has no halves", self.head_dim);
        let args = TurnArgs {
            addresses: [self.x, self.positions, self.cos, self.sin],
            sizes: [self.num_rows as i32, self.num_heads as i32, self.head_dim as i32],
            sign: if self.is_back { -1.0 } else { 1.0 },
        };
        let num_threads = self.num_rows * self.num_heads * (self.head_dim / 2).div_ceil(VECTOR);
        Launch {
            program: Program::Training(self.element),
            kernel: "turn_heads",
            grid: [num_threads.div_ceil(THREADS) as u32, 1, 1],
            num_threads: THREADS as u32,
            args: Args::default().with(args),
        }
    }
}

impl SwiGlu {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let args = Args::default().with(self.gate).with(self.up).with(self.out);
        Launch {
            program: Program::Training(self.element),
            kernel: "silu_mul",
            grid: [blocks(self.num_elements), 1, 1],
            num_threads: THREADS as u32,
            args: args.with(self.num_elements as i64),
        }
    }
}

impl SwiGluBackward {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let args = Args::default().with(self.gate).with(self.up).with(self.d_out).with(self.d_gate);
        Launch {
            program: Program::Training(self.element),
            kernel: "silu_mul_backward",
            grid: [blocks(self.num_elements), 1, 1],
            num_threads: THREADS as u32,
            args: args.with(self.num_elements as i64),
        }
    }
}

impl SummariseTargets {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let args = SummariseArgs {
            addresses: [self.logits, self.targets, self.logprobs, self.entropies, self.log_sums],
            vocab_size: self.vocab_size as i32,
            sharpness: 1.0 / self.temperature,
        };
        Launch {
            program: Program::Training(self.element),
            kernel: "summarise_targets",
            grid: [self.num_rows as u32, 1, 1],
            num_threads: whole_warps(self.vocab_size.div_ceil(VECTOR).min(512)),
            args: Args::default().with(args),
        }
    }
}

impl LogitGradients {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let SummariseTargets { logits, targets, entropies, log_sums, vocab_size, temperature, .. } = self.summary;
        let d_entropies = self.d_entropies.unwrap_or_default();
        let args = LogitArgs {
            addresses: [logits, targets, entropies, log_sums, self.d_logprobs, d_entropies, self.d_logits],
            vocab_size: vocab_size as i32,
            sharpness: 1.0 / temperature,
        };
        Launch {
            program: Program::Training(self.summary.element),
            kernel: "logit_gradients",
            grid: [self.summary.num_rows as u32, blocks(vocab_size), 1],
            num_threads: THREADS as u32,
            args: Args::default().with(args),
        }
    }
}

impl SumOfSquares {
    /// Of `sums`.
    #[must_use]
    pub fn num_parts(num_elements: usize) -> usize {
        (blocks(num_elements) as usize).min(SQUARES_BLOCKS)
    }

    #[must_use]
    pub fn launch(&self) -> Launch {
        Launch {
            program: Program::Training(self.element),
            kernel: "sum_of_squares",
            grid: [Self::num_parts(self.num_elements) as u32, 1, 1],
            num_threads: THREADS as u32,
            args: Args::default().with(self.values).with(self.sums).with(self.num_elements as i64),
        }
    }
}

impl AdamWUpdate {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let args = Args::default().with(self.weights).with(self.grad).with(self.exp_avg).with(self.exp_avg_sq);
        let args = args.with(self.copy.unwrap_or_default()).with(self.num_elements as i64).with(self.factors);
        Launch {
            program: Program::Training(self.element),
            kernel: "adamw",
            grid: [blocks(self.num_elements), 1, 1],
            num_threads: THREADS as u32,
            args,
        }
    }
}

/// `RmsNorm` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct NormArgs {
    addresses: [DevicePtr; 6],
    sizes: [i32; 3],
    epsilon: f32,
}

/// `RmsNormBackward` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct NormBackwardArgs {
    addresses: [DevicePtr; 7],
    sizes: [i32; 4],
}

/// `TurnHeads` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct TurnArgs {
    addresses: [DevicePtr; 4],
    sizes: [i32; 3],
    sign: f32,
}

/// `SummariseTargets` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct SummariseArgs {
    addresses: [DevicePtr; 5],
    vocab_size: i32,
    sharpness: f32,
}

/// `LogitGradients` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct LogitArgs {
    addresses: [DevicePtr; 7],
    vocab_size: i32,
    sharpness: f32,
}

impl Argument for NormArgs {}
impl Argument for NormBackwardArgs {}
impl Argument for TurnArgs {}
impl Argument for SummariseArgs {}
impl Argument for LogitArgs {}

#[cfg(test)]
#[path = "training_tests.rs"]
mod tests;
