//! Nothing can hang: networks that fail, processes that are stopped, each against the deadlines that are promised.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod network;
mod process;
mod ranks;
