//! GPU kernels: CUDA C++ in `common/nn/kernels/cuda/`, compiled by NVRTC when a generator or a trainer starts.
//!
//! Three steps, so that all but the last can be done and tested anywhere:
//! - [`KernelShapes::programs`] says which sources to compile with which macros, for a model;
//! - the builders ([`DecodeAttention`], [`QkvRope`], ...) turn shapes and device addresses into a [`Launch`]: plain
//!   data with grid, threads and arguments;
//! - [`Compiler`] makes code of the programs, [`CompileCache`] keeps it, and [`KernelSet`] launches it.
//!
//! The kernels run in the tests on the CPU (`aha-cuda-emulation`) and are compiled for sm_90a and sm_80 wherever
//! the NVRTC library is. With `AHA_TEST_DEVICE=cuda` the same tests run on the GPU, through [`KernelSet`]. **That has not
//! been done yet.**
//!
//! `training.cu` is the trainer's, forward and backward, in bf16 or fp32; all else is the generator's. There,
//! storage is bf16, arithmetic fp32, the residual stream fp32. Like the CPU kernels these are batch-invariant: a row's
//! result does not depend on its neighbours, on the bucket of a CUDA graph or on the longest context in the batch.

mod attention;
mod cache;
mod compiler;
mod driver_info;
mod elementwise;
mod kernel_set;
mod launch;
mod library;
mod program;
mod rope;
mod sampling;
mod step;
#[cfg(test)]
pub(crate) mod testing;
mod training;

pub use attention::{AttentionShape, DecodeAttention, PagedKv, PrefillAttention, Span, kv_cache_len};
pub use cache::CompileCache;
pub use compiler::{CompileError, Compiler, Gpu};
pub use driver_info::{DriverInfo, GpuInfo, driver_info, nccl_version};
pub use elementwise::{AddRmsNorm, Embed, SiluMul};
pub use kernel_set::{KernelSet, LaunchError, Stream, gpu_uuid};
pub use launch::{DevicePtr, Launch};
pub use program::{Element, KernelShapes, LogitKind, Program, UnsupportedShape};
pub use rope::QkvRope;
pub use sampling::{DeviceSamplingParams, Sample, SampleStatus, Suppress};
pub use step::{Advance, Outcome, StateField};
pub use training::{
    AdamWFactors, AdamWUpdate, LogitGradients, MAX_NORM_WIDTH, RmsNorm, RmsNormBackward, SumOfSquares,
    SummariseTargets, SwiGlu, SwiGluBackward, TurnHeads,
};
