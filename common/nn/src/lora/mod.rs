//! Low-rank adaptation (LoRA, arXiv 2106.09685) of a frozen base, which may be quantised to 4 bits (QLoRA, 2305.14314).
//!
//! The adapters are [`crate::weights::Weights`] like any other, one unit a layer, so that whatever trains and shards weights
//! trains and shards adapters. The base is read alone, through [`crate::unit::ModelWeights`].

mod adapter;
mod dropout;
mod forward;
mod merged;
mod nf4;
mod nf4_weights;
mod ops;
pub mod peft;

pub use adapter::{AdapterSpec, fresh_adapters};
pub use dropout::Dropout;
pub use forward::{layer, statistics};
pub use merged::Merged;
pub use nf4::{Nf4Matrix, Nf4Options};
pub use nf4_weights::Nf4Weights;
pub use ops::{AdaptedMatrix, LoraOps};
