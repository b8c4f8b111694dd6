//! The part of aha that is plain data and arithmetic: no torch, no I/O runtime, no clock, no environment.
#![forbid(unsafe_code)]

pub mod advantage;
pub mod batch;
pub mod bundle;
pub mod chat_template;
pub mod config;
pub mod dataset;
pub mod hub;
pub mod ids;
mod jinja;
pub mod manifest;
pub mod nearest;
pub mod objective;
pub mod optimizer;
pub mod packing;
pub mod partition;
pub mod prompt;
pub mod random;
pub mod reflection;
pub mod reward;
pub mod rollout;
pub mod schedule;
mod text;
pub mod tokenizer;
