//! The trainer: rollouts, GRPO steps on sharded weights, the push to the generators.
#![cfg_attr(not(test), forbid(unsafe_code))]

mod adapters;
mod agreement;
pub mod checkpoint;
pub mod checkpoint_sink;
pub mod clients;
pub mod colocated;
mod durable;
pub mod entropy;
pub mod evaluate;
pub mod exchange;
pub mod export;
pub mod exporter;
mod failpoint;
pub mod fleet;
pub mod flops;
pub mod generators;
mod kl_reward;
pub mod loggers;
pub mod measure;
pub mod memory_plan;
pub mod model_card;
pub mod optimize;
pub mod prompts;
pub mod publish;
pub mod rewarders;
pub mod rollouts;
pub mod run;
pub mod run_dir;
mod sampling;
pub mod session;
pub mod sft;
mod skips;
pub mod step_metrics;
pub mod stop;
#[cfg(test)]
mod test_generator;
#[cfg(test)]
mod test_ranks;
pub mod torch;
pub mod training_batch;
pub mod world;
