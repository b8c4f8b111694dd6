//! A collective in flight.

use super::error::CommError;
use super::group::Shared;
use super::store::millis;
use crate::shim::{self, AhaWork, Message, aha_work_free, aha_work_is_completed, aha_work_wait};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Tensor;

/// How often whoever waits looks whether the group was closed meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

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
    /// is closed then, and what the tensors hold is undefined; what is left of the collective may go on using their memory
    /// until its own time is over.
    pub fn wait(self) -> Result<(), CommError> {
        let Some(raw) = &self.raw else { return Ok(()) };
        loop {
            let rest = self.shared.timeout().saturating_sub(self.ticket.issued.elapsed());
            // Gloo does not always wake whoever waits when its connections are closed. With NCCL, which does, a wait that
            // times out ends the group.
            let slice = if self.shared.is_gloo() { rest.min(LOOK_AGAIN) } else { rest };
            // What ended before it was waited for has not merely taken longer than a slice.
            let has_ended = raw.is_completed();
            let Err(reason) = raw.wait(slice) else { return Ok(()) };
            if has_ended || slice == rest || self.shared.is_closed() {
                return Err(self.shared.fail(self.ticket, reason));
            }
        }
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

    fn wait(&self, limit: Duration) -> Result<(), Message> {
        // SAFETY: the work is alive, and c10d lets any thread wait for it.
        let message = unsafe { aha_work_wait(self.0.as_ptr(), millis(limit)) };
        // SAFETY: the shim returned `message` just now.
        unsafe { shim::check(message) }
    }

    /// Whether it has succeeded or failed.
    fn is_completed(&self) -> bool {
        // SAFETY: the work is alive, and c10d lets any thread ask.
        unsafe { aha_work_is_completed(self.0.as_ptr()) }
    }
}

impl Drop for RawWork {
    fn drop(&mut self) {
        // SAFETY: the work is ours, and nothing uses it after us.
        unsafe { aha_work_free(self.0.as_ptr()) };
    }
}
