//! What a process tells Prometheus: a page of text over HTTP.

mod exposition;
mod server;

pub use exposition::{Exposition, Snapshot, Value};
pub use server::MetricsServer;
