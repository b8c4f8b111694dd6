//! A collective in flight.

use super::error::CommError;
use super::group::Shared;
use super::store::millis;
use crate::shim::{self, AhaWork, aha_work_free, aha_work_wait};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;
use tch::Tensor;

/// A collective that was issued. Its tensors must not be touched before [`Work::wait`] has returned.
#[derive(Debug)]
#[must_use = "a collective has happened only after `wait`"]
pub struct Work {
    /// `None` when there was nothing to communicate.
    raw: Option<RawWork>,
    /// Keep what is read and written alive.
    _tensors: Vec<Tensor>,
    shared: Arc<Shared>,
    ticket: Ticket,
}

/// Which collective it is, for its errors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    pub(super) operation: &'static str,
    pub(super) sequence: u64,
    pub(super) issued: Instant,
}

impl Work {
    pub(super) fn new(raw: Option<RawWork>, tensors: Vec<Tensor>, shared: Arc<Shared>, ticket: Ticket) -> Self {
        Self { raw, _tensors: tensors, shared, ticket }
    }

    /// Blocks until the collective is done. The group's timeout counts from when it was issued.
    ///
    /// # Errors
    /// [`CommError::Collective`] when it is late, when a peer is gone or when the group is aborted meanwhile; the group
    /// is closed then, and what the tensors hold is undefined.
    pub fn wait(self) -> Result<(), CommError> {
        let Some(raw) = &self.raw else { return Ok(()) };
        let rest = self.shared.timeout().saturating_sub(self.ticket.issued.elapsed());
        // SAFETY: the work is alive, and c10d lets any thread wait for it.
        let message = unsafe { aha_work_wait(raw.0.as_ptr(), millis(rest)) };
        // SAFETY: the shim returned `message` just now.
        unsafe { shim::check(message) }.map_err(|reason| self.shared.fail(self.ticket, reason))
    }
}

/// Owns a work of the shim.
#[derive(Debug)]
pub(super) struct RawWork(NonNull<AhaWork>);

// SAFETY: c10d's works are reference-counted and locked; they may be waited for and freed by any thread.
unsafe impl Send for RawWork {}

impl RawWork {
    /// # Safety
    /// `raw` is null or a work that nobody else frees.
    pub(super) unsafe fn from_ptr(raw: *mut AhaWork) -> Option<Self> {
        NonNull::new(raw).map(Self)
    }
}

impl Drop for RawWork {
    fn drop(&mut self) {
        // SAFETY: the work is ours, and nothing uses it after us.
        unsafe { aha_work_free(self.0.as_ptr()) };
    }
}
