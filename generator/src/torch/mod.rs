//! Everything of the generator that touches tensors.

mod arena;
#[cfg(test)]
mod borrowed_tests;
mod device_runner;
#[cfg(test)]
mod emulated_queue;
mod gpu_runner;
#[cfg(test)]
mod gpu_tests;
mod matrix;
mod model_runner;
mod paged_ops;
#[cfg(test)]
mod tests;
mod update;
mod weights;

pub use device_runner::{DeviceRunner, DeviceWeights, WeightFormat};
pub use gpu_runner::GpuRunner;
pub use model_runner::{CacheSize, CpuRunner};
pub use update::{Membership, Push, Pushed, UpdateError, WeightReceiver};
pub use weights::ServingWeights;
