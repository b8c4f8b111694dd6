//! What can go wrong between ranks.

use std::time::Duration;

/// Why ranks could not meet or exchange.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    /// The store could not be opened, or did not answer.
    #[error("store {address}: {operation} failed: {reason}")]
    Store { address: String, operation: String, reason: String },
    /// The ranks did not all come together.
    #[error("group {group}: rank {rank} of {size} could not join: {reason}")]
    Join { group: String, rank: usize, size: usize, reason: String },
    /// The caller's mistake, found before anything was sent.
    #[error("group {group}: {operation} on rank {rank} of {size} refused: {reason}")]
    Invalid { group: String, operation: &'static str, rank: usize, size: usize, reason: String },
    /// A collective failed or ran out of time. The group is closed.
    #[error("group {group}: {operation} #{sequence} on rank {rank} of {size} failed after {:.1} s: {reason}", elapsed.as_secs_f64())]
    Collective {
        group: String,
        operation: &'static str,
        /// Which collective of this group on this rank, from 1.
        sequence: u64,
        rank: usize,
        size: usize,
        /// Since it was issued.
        elapsed: Duration,
        reason: String,
    },
    /// The ranks are not at the same place of the program, or run different builds of it. The group is closed.
    #[error(
        "group {group}: rank {rank} of {size} is out of step: {reason}; all ranks must run the same build and configuration"
    )]
    Mismatch { group: String, rank: usize, size: usize, reason: String },
    /// The group was aborted, or an earlier collective failed.
    #[error("group {group}: {operation} on rank {rank} of {size} refused: the group is closed: {reason}")]
    Closed { group: String, operation: &'static str, rank: usize, size: usize, reason: String },
    /// NCCL was asked for, and libtorch is a CPU build.
    #[error("group {group}: this build has no NCCL; build against a CUDA libtorch, or use gloo")]
    NoNccl { group: String },
}
