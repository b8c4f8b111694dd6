//! The decoder on a GPU, for the generator: weights, cache, buffers and graphs of one device.
//!
//! [`GpuModel`] is everything that touches the device, and its functions take plain data which they check: whatever a
//! caller says, kernels stay within their memory. It is generic over a [`Queue`]: [`CudaQueue`] is a real GPU, and the
//! generator's tests have one that runs the same kernels on the CPU. **[`CudaQueue`] has not run on a GPU yet.**
//!
//! bf16 weights, keys and values; products by libtorch, summed in fp32; fp32 residual and logits; all else by the
//! kernels of [`crate::kernels::cuda`]. Those are batch-invariant, cuBLAS is not: how many rows a product has may change
//! the last bits of each.

mod cuda_queue;
mod model;
mod network;
mod pass;
mod queue;
mod rows;
mod step_memory;
mod weights;

pub use cuda_queue::{CudaGraph, CudaQueue};
pub use model::GpuModel;
pub use queue::{GpuError, Queue};
pub use rows::{Choice, Chunk, DecodeRow, GpuSizes, MAX_STOPS};
pub use weights::GpuWeights;
