//! Everything of the generator that touches tensors.

mod arena;
mod matrix;
mod model_runner;
mod paged_ops;
#[cfg(test)]
mod tests;
mod update;
mod weights;

pub use model_runner::{CacheSize, CpuRunner};
pub use update::{Membership, Push, Pushed, UpdateError, WeightReceiver};
pub use weights::ServingWeights;
