//! The forward pass of the generator on the CPU, in fp32, over plain slices.
//!
//! The contract that every kernel here keeps is *batch invariance*: a row of the output is a function of its own
//! row of the input (and of its own keys and values) alone, bit for bit. It does not depend on how many rows are in
//! the batch, on how a prompt is cut into prefill chunks, on the number of threads or on alignment. So
//! - every sum has one order, fixed by the length of what is summed;
//! - vector bodies and tails use the same arithmetic, and `exp` is our own in every lane;
//! - threads divide whole outputs among them, never the terms of one sum.
//!
//! Results may differ between instruction sets ([`Isa`]), which is why the choice is made once per [`Pool`].
//! Kernels panic when shapes disagree: that is a bug of the caller, not a condition to handle.

mod activation;
mod attention;
mod buffer;
mod gemm;
mod int8;
mod kv_cache;
mod logit_edits;
mod norm;
mod nucleus;
mod number;
mod rope;
mod sampling;
mod simd;
mod team;
#[cfg(test)]
pub(crate) mod testing;
mod threads;
mod tile;
pub mod training;

pub use activation::{add, silu_mul};
pub use attention::{SequenceSpan, paged_attention};
pub use buffer::{Rows, RowsMut};
pub use gemm::PackedMatrix;
pub use int8::QuantizedMatrix;
pub use kv_cache::{KvCache, KvLayout};
pub use logit_edits::LogitEdits;
pub use norm::RmsNorm;
pub use number::Number;
pub use rope::RopeTables;
#[cfg(test)]
pub(crate) use sampling::tests::reference as reference_probabilities;
pub use sampling::{Drawn, RawLogProbs, Sample, SampleError, SampleRequest, SamplingParams};
pub use sampling::{log_softmax_at, sample_row, sample_rows};
pub use simd::Isa;
pub use threads::{Pool, PoolError};
