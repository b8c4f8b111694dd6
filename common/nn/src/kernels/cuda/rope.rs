//! Launch of `rope.cu`.

use super::launch::{Args, Argument, whole_warps};
use super::{AttentionShape, DevicePtr, Launch, Program};

/// Bias, norm of the heads, rotation, and the way into the cache, from the row of a fused projection.
#[derive(Debug, Clone, Copy)]
pub struct QkvRope {
    pub shape: AttentionShape,
    pub num_kv_heads: usize,
    /// `N`.
    pub num_rows: usize,
    /// bf16 `[N, (H + 2 * K) * D]`: queries, keys, values.
    pub qkv: DevicePtr,
    /// bf16 `[(H + 2 * K) * D]`.
    pub bias: Option<DevicePtr>,
    /// bf16 `[D]` of the queries and of the keys: RMS norm of each head, before it turns.
    pub qk_norms: Option<[DevicePtr; 2]>,
    pub epsilon: f32,
    /// fp32 `[T, D / 2]`.
    pub cos: DevicePtr,
    /// fp32 `[T, D / 2]`.
    pub sin: DevicePtr,
    /// i32 `[N]`, below `T`.
    pub positions: DevicePtr,
    /// i32 `[N]`: block times `block_size` plus the offset in it; negative where nothing is to be kept.
    pub slots: DevicePtr,
    /// bf16 `[N, H * D]`.
    pub queries: DevicePtr,
    /// As in [`super::PagedKv`].
    pub keys: DevicePtr,
    /// As in [`super::PagedKv`].
    pub values: DevicePtr,
}

/// Elements of a head that a thread takes, half of them from each half of the head.
const ELEMENTS_PER_THREAD: usize = 16;

impl QkvRope {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let AttentionShape { head_dim, group, block_size } = self.shape;
        let num_heads = self.num_kv_heads * group;
        let Self { qkv, cos, sin, positions, slots, queries, keys, values, epsilon, .. } = *self;
        let [q_norm, k_norm] = self.qk_norms.unwrap_or_default();
        let args = RopeArgs {
            qkv,
            bias: self.bias.unwrap_or_default(),
            q_norm,
            k_norm,
            cos,
            sin,
            positions,
            slots,
            queries,
            keys,
            values,
            num_heads: num_heads as i32,
            num_kv_heads: self.num_kv_heads as i32,
            block_size: block_size as i32,
            epsilon,
        };
        Launch {
            program: Program::Rope { head_dim },
            kernel: "qkv_rope",
            grid: [self.num_rows as u32, 1, 1],
            num_threads: whole_warps((num_heads + 2 * self.num_kv_heads) * head_dim / ELEMENTS_PER_THREAD),
            args: Args::default().with(args),
        }
    }
}

/// `QkvRope` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RopeArgs {
    qkv: DevicePtr,
    bias: DevicePtr,
    q_norm: DevicePtr,
    k_norm: DevicePtr,
    cos: DevicePtr,
    sin: DevicePtr,
    positions: DevicePtr,
    slots: DevicePtr,
    queries: DevicePtr,
    keys: DevicePtr,
    values: DevicePtr,
    num_heads: i32,
    num_kv_heads: i32,
    block_size: i32,
    epsilon: f32,
}

impl Argument for RopeArgs {}

#[cfg(test)]
#[path = "rope_tests.rs"]
mod tests;
