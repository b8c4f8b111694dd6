//! Launches of `elementwise.cu`.

use super::launch::{Args, whole_warps};
use super::{DevicePtr, Launch, Program};

/// `residual[i] = table[tokens[i]]`.
#[derive(Debug, Clone, Copy)]
pub struct Embed {
    /// `N`.
    pub num_rows: usize,
    /// `C`, a multiple of 8.
    pub width: usize,
    /// i32 `[N]`.
    pub tokens: DevicePtr,
    /// bf16 `[V, C]`.
    pub table: DevicePtr,
    /// fp32 `[N, C]`.
    pub residual: DevicePtr,
}

/// `residual += delta`, then `out` is the norm of `residual`.
#[derive(Debug, Clone, Copy)]
pub struct AddRmsNorm {
    /// Of `out`.
    pub num_rows: usize,
    /// `C`, a multiple of 8.
    pub width: usize,
    pub epsilon: f32,
    /// fp32 `[N, C]`.
    pub residual: DevicePtr,
    /// bf16 `[N, C]`; nothing is added if there is none.
    pub delta: Option<DevicePtr>,
    /// bf16 `[C]`.
    pub weight: DevicePtr,
    /// bf16 `[num_rows, C]`.
    pub out: DevicePtr,
    /// i32 `[num_rows]`: the rows of `residual` that are wanted, which is left unchanged then. None: all of them.
    pub rows: Option<DevicePtr>,
}

/// `out = silu(gate) * up`.
#[derive(Debug, Clone, Copy)]
pub struct SiluMul {
    /// `N`.
    pub num_rows: usize,
    /// `F`, a multiple of 8.
    pub num_features: usize,
    /// bf16 `[N, 2 * F]`: gate, then up.
    pub gate_up: DevicePtr,
    /// bf16 `[N, F]`.
    pub out: DevicePtr,
}

/// Elements that a thread takes.
const VECTOR: usize = 8;
const SILU_THREADS: usize = 256;

impl Embed {
    #[must_use]
    pub fn launch(&self) -> Launch {
        Launch {
            program: Program::Elementwise,
            kernel: "embed",
            grid: [self.num_rows as u32, 1, 1],
            num_threads: whole_warps(self.width / VECTOR),
            args: Args::default().with(self.tokens).with(self.table).with(self.residual).with(self.width as i32),
        }
    }
}

impl AddRmsNorm {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let args = Args::default().with(self.residual).with(self.delta.unwrap_or_default());
        let args = args.with(self.weight).with(self.out).with(self.rows.unwrap_or_default());
        Launch {
            program: Program::Elementwise,
            kernel: "add_rms_norm",
            grid: [self.num_rows as u32, 1, 1],
            num_threads: whole_warps(self.width / VECTOR),
            args: args.with(self.width as i32).with(self.epsilon),
        }
    }
}

impl SiluMul {
    #[must_use]
    pub fn launch(&self) -> Launch {
        Launch {
            program: Program::Elementwise,
            kernel: "silu_mul",
            grid: [self.num_features.div_ceil(VECTOR * SILU_THREADS) as u32, self.num_rows as u32, 1],
            num_threads: SILU_THREADS as u32,
            args: Args::default().with(self.gate_up).with(self.out).with(self.num_features as i32),
        }
    }
}

#[cfg(test)]
#[path = "elementwise_tests.rs"]
mod tests;
