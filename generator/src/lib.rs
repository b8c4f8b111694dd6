//! The rollout service: an engine that batches continuously over a paged KV cache, served by gRPC.
#![cfg_attr(not(test), forbid(unsafe_code))]

mod deadline;
pub mod engine;
mod error;
mod instance;
mod local;
mod metrics;
mod outputs;
mod registrar;
mod request;
mod scorer;
mod server;
mod service;
mod stop;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod torch;

pub use engine::StepTimes;
pub use error::GeneratorError;
pub use instance::GeneratorOptions;
pub use local::LocalGenerator;
pub use registrar::Registrar;
pub use server::GeneratorServer;
