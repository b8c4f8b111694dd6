//! The engine: which tokens of which sequences are computed next, and where their keys and values lie.
//!
//! Block numbers and token ids only, never a tensor: the [`Runner`] does the computing. A step reads as *schedule, run,
//! complete, emit*. Outputs depend on (weights, prompt, seed, sample index) alone, whatever else is in the batch, as
//! long as the runner's rows do not depend on each other.

mod batch;
mod block_manager;
mod config;
mod free_queue;
mod handle;
mod prefix;
mod request;
mod scheduler;
mod sequence;
mod stats;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod thread;

pub use batch::{Ahead, BatchItem, Choose, Runner, Sampled, StepBatch};
pub use block_manager::{BlockCopy, BlockId};
pub use config::{BadEngineConfig, EngineConfig};
pub use handle::{EngineError, EngineHandle, EngineHealth, Scored, Swapped};
pub use request::{Refusal, Request, RequestKey, TokenEvent};
pub use stats::{Activity, Counters, EngineStatus, StepTimes};
pub use thread::{EngineThread, spawn};
