//! Kernels of the trainer in fp32: forward passes that keep little, and the backward passes to them.
//!
//! They run on libtorch's threads, between whose products they stand. Every sum has one order, whatever the number of
//! threads. They panic when shapes disagree.

mod activation;
mod attention;
mod dropout;
mod norm;
mod rope;
mod rows;
mod softmax;
mod squares;

pub use activation::{silu_mul, silu_mul_backward};
pub use attention::merge_attention;
pub use dropout::dropout_mask;
pub use norm::{rms_norm, rms_norm_backward};
pub use rope::{Turn, rope_in_place};
pub use rows::gather_rows;
pub use softmax::{TargetSummary, summarise_targets, target_logprobs_backward};
pub use squares::sum_of_squares;

use super::buffer::{Rows, RowsMut};
use super::simd::{Isa, Kernel, Simd};
use crate::function::parallel_for;

/// Fewer floats are not worth another thread.
const GRAIN_FLOATS: usize = 8 * 1024;

/// Calls `body` with every row's number.
fn for_each_row(num_rows: usize, width: usize, body: impl Fn(usize) + Sync) {
    parallel_for(num_rows, GRAIN_FLOATS.div_ceil(width.max(1)), |rows| rows.for_each(&body));
}
