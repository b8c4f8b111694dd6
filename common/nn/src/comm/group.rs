//! A group of ranks that exchange tensors.

use super::collective::{Collective, ReduceOp};
use super::deadline::within;
use super::error::CommError;
use super::note::{Mismatch, Note};
use super::roll_call::roll_call;
use super::store::{RawStore, Store, c_string, millis};
use super::work::{RawWork, Ticket, Work};
use crate::shim::{
    self, AhaGroup, AhaGroupOptions, Message, aha_gloo_new, aha_group_abort, aha_group_free, aha_nccl_built,
    aha_nccl_new,
};
use std::ffi::CString;
use std::panic::Location;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// A rank that has not come is asked for so often, so that what waits for it can be given up.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// For ranks that nobody has looked for yet when the time to come together is over.
const LAST_LOOK: Duration = Duration::from_secs(1);

/// What carries the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// TCP between CPU tensors.
    Gloo,
    /// NCCL between the tensors of one CUDA device per rank.
    Nccl { device: usize },
}

/// Where a rank listens for its peers. NCCL finds its own way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A host name or address of this machine that the peers can reach.
    Host(String),
    /// A network interface, such as `eth0`.
    Interface(String),
}

/// Which group, and who we are in it.
#[derive(Debug, Clone)]
pub struct GroupSpec {
    /// Names the group in errors and in the store. Used once per store: a group that is made anew takes a new name.
    pub name: String,
    /// From 0, less than `size`.
    pub rank: usize,
    /// Number of ranks, `W`.
    pub size: usize,
    /// For the ranks to come together, and then for every collective.
    pub timeout: Duration,
    pub address: Address,
}

/// A group of ranks.
///
/// All ranks must issue the same collectives with tensors of the same size and kind in the same order: that order is
/// the caller's to agree on, and a rank that departs from it makes all others fail at their deadline, or with
/// [`CommError::Mismatch`] where collectives are checked. A group of one behaves alike and communicates nothing.
#[derive(Debug)]
pub struct ProcessGroup {
    shared: Arc<Shared>,
    /// The number of the last collective. Held while one is issued, so that numbers follow the order on the wire.
    issued: Mutex<u64>,
    /// Compare what the ranks are about to do before each collective.
    is_checked: bool,
}

/// Whether [`Backend::Nccl`] is part of this build.
pub fn nccl_built() -> bool {
    aha_nccl_built()
}

impl ProcessGroup {
    /// Meets the other ranks at `store` and connects to them.
    ///
    /// # Errors
    /// [`CommError::Join`] names the ranks that did not come, a rank that is already taken, or what hindered the
    /// connection; [`CommError::NoNccl`] and [`CommError::Store`] as they say.
    pub fn new(backend: Backend, store: &Store, spec: &GroupSpec) -> Result<Self, CommError> {
        Self::meet(backend, store, spec, spec.timeout)
    }

    /// [`ProcessGroup::new`] whose ranks come together within a limit of its own; the spec's is for collectives alone.
    ///
    /// # Errors
    /// As there.
    pub fn meet(backend: Backend, store: &Store, spec: &GroupSpec, limit: Duration) -> Result<Self, CommError> {
        if matches!(backend, Backend::Nccl { .. }) && !nccl_built() {
            return Err(CommError::NoNccl { group: spec.name.clone() });
        }
        if spec.rank >= spec.size {
            return Err(spec.join_error(format!(
                "ranks of {} go from 0 to {}",
                spec.name,
                spec.size.saturating_sub(1)
            )));
        }
        let (raw, store) = if spec.size == 1 {
            (None, None)
        } else {
            connect(backend, store, spec, limit).map(|(raw, store)| (Some(raw), Some(store)))?
        };
        let device = match backend {
            Backend::Gloo => Device::Cpu,
            Backend::Nccl { device } => Device::Cuda(device),
        };
        let shared = Shared { raw, store, spec: spec.clone(), device, closed: OnceLock::new() };
        Ok(Self { shared: Arc::new(shared), issued: Mutex::new(0), is_checked: false })
    }

    /// The group of one that needs no store.
    pub fn solo(name: &str, device: Device) -> Self {
        let address = Address::Host("localhost".to_owned());
        let spec = GroupSpec { name: name.to_owned(), rank: 0, size: 1, timeout: Duration::MAX, address };
        let shared = Shared { raw: None, store: None, spec, device, closed: OnceLock::new() };
        Self { shared: Arc::new(shared), issued: Mutex::new(0), is_checked: false }
    }

    /// Has the ranks compare before every collective what they are about to do: operation, elements, kind, and the line of
    /// code that asks for it. All ranks do so or none. A collective then begins when every rank has come to it, so that
    /// none overlaps with computation.
    #[must_use]
    pub fn checked(self, is_checked: bool) -> Self {
        Self { is_checked, ..self }
    }

    pub fn name(&self) -> &str {
        &self.shared.spec.name
    }

    pub fn rank(&self) -> usize {
        self.shared.spec.rank
    }

    /// Number of ranks, `W`.
    pub fn size(&self) -> usize {
        self.shared.spec.size
    }

    /// Where the tensors of this group live.
    pub fn device(&self) -> Device {
        self.shared.device
    }

    /// Replaces `tensor` by the reduction over all ranks, in place.
    ///
    /// # Errors
    /// [`CommError::Invalid`] when a tensor does not fit, [`CommError::Collective`] when a peer fails or time runs out,
    /// [`CommError::Closed`] after either an abort or such a failure, [`CommError::Mismatch`] in a checked group; so for
    /// all collectives.
    #[track_caller]
    pub fn all_reduce(&self, tensor: &mut Tensor, op: ReduceOp) -> Result<(), CommError> {
        self.all_reduce_async(tensor, op)?.wait()
    }

    /// Issues [`ProcessGroup::all_reduce`].
    #[track_caller]
    pub fn all_reduce_async(&self, tensor: &mut Tensor, op: ReduceOp) -> Result<Work, CommError> {
        self.issue(Collective::AllReduce { tensor, op })
    }

    /// Reduces over all ranks and leaves each rank its shard.
    ///
    /// # Shapes
    /// - input: `[W * n]`, output: `[n]`, elements `rank * n ..` of the reduction.
    #[track_caller]
    pub fn reduce_scatter(&self, input: &Tensor, output: &mut Tensor, op: ReduceOp) -> Result<(), CommError> {
        self.reduce_scatter_async(input, output, op)?.wait()
    }

    /// Issues [`ProcessGroup::reduce_scatter`].
    #[track_caller]
    pub fn reduce_scatter_async(&self, input: &Tensor, output: &mut Tensor, op: ReduceOp) -> Result<Work, CommError> {
        self.issue(Collective::ReduceScatter { output, input, op })
    }

    /// Puts the shards of all ranks after each other, in the order of ranks.
    ///
    /// # Shapes
    /// - input: `[n]`, output: `[W * n]`.
    #[track_caller]
    pub fn all_gather(&self, input: &Tensor, output: &mut Tensor) -> Result<(), CommError> {
        self.all_gather_async(input, output)?.wait()
    }

    /// Issues [`ProcessGroup::all_gather`].
    #[track_caller]
    pub fn all_gather_async(&self, input: &Tensor, output: &mut Tensor) -> Result<Work, CommError> {
        self.issue(Collective::AllGather { output, input })
    }

    /// Overwrites `tensor` with that of rank `root`.
    #[track_caller]
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CommError> {
        self.broadcast_async(tensor, root)?.wait()
    }

    /// Issues [`ProcessGroup::broadcast`].
    #[track_caller]
    pub fn broadcast_async(&self, tensor: &mut Tensor, root: usize) -> Result<Work, CommError> {
        self.issue(Collective::Broadcast { tensor, root })
    }

    /// Returns when every rank has called it.
    #[track_caller]
    pub fn barrier(&self) -> Result<(), CommError> {
        self.issue(Collective::Barrier)?.wait()
    }

    /// Closes the group from any thread: whatever is in flight fails, here and at the peers, and so does all that follows.
    pub fn abort(&self, reason: &str) {
        self.shared.close(reason);
    }

    /// What the caller got wrong, as an error.
    pub(super) fn invalid(&self, operation: &'static str, reason: String) -> CommError {
        let GroupSpec { name, rank, size, .. } = &self.shared.spec;
        CommError::Invalid { group: name.clone(), operation, rank: *rank, size: *size, reason }
    }

    /// Closes the group because the ranks are not at the same place.
    pub(super) fn mismatch(&self, mismatch: &Mismatch) -> CommError {
        self.shared.close(&mismatch.to_string());
        let GroupSpec { name, rank, size, .. } = &self.shared.spec;
        CommError::Mismatch { group: name.clone(), rank: *rank, size: *size, reason: mismatch.to_string() }
    }

    #[track_caller]
    fn issue(&self, collective: Collective<'_>) -> Result<Work, CommError> {
        if self.is_checked && self.shared.raw.is_some() {
            self.check_match(&collective, Location::caller())?;
        }
        self.issue_unchecked(collective)
    }

    /// Compares with the other ranks. This is a collective whose size is the same whatever it is about.
    fn check_match(&self, collective: &Collective<'_>, caller: &Location<'_>) -> Result<(), CommError> {
        let note = Note::new(&collective.describe(), caller);
        let (input, mut output) = note.tensors(self.size(), self.device());
        self.issue_unchecked(Collective::AllGather { output: &mut output, input: &input })?.wait()?;
        let notes = self.to_bytes(collective.name(), &output)?;
        note.compare(&notes).map_err(|mismatch| self.mismatch(&mismatch))
    }

    fn issue_unchecked(&self, collective: Collective<'_>) -> Result<Work, CommError> {
        let operation = collective.name();
        if let Some(reason) = self.shared.closed.get() {
            let GroupSpec { name, rank, size, .. } = &self.shared.spec;
            let (group, reason) = (name.clone(), reason.clone());
            return Err(CommError::Closed { group, operation, rank: *rank, size: *size, reason });
        }
        collective.check(self.size(), self.device()).map_err(|reason| self.invalid(operation, reason))?;
        let tensors = collective.keep_alive();
        // A number is all it guards, and a number cannot be left half-written by a panic.
        let mut issued = self.issued.lock().unwrap_or_else(PoisonError::into_inner);
        *issued += 1;
        let ticket = Ticket { operation, sequence: *issued, issued: Instant::now() };
        let started = match &self.shared.raw {
            Some(raw) if !collective.is_empty() => {
                // SAFETY: the group is alive, the lock on `issued` keeps others out, the check has passed, and the work
                // holds on to the tensors.
                unsafe { collective.start(raw.0.as_ptr()).map(|work| RawWork::from_ptr(work)) }
            }
            _ => collective.run_alone().map(|()| None),
        };
        let work = started.map_err(|reason| self.shared.fail(ticket, reason))?;
        Ok(Work::new(work, tensors, Arc::clone(&self.shared), ticket))
    }
}

impl GroupSpec {
    fn join_error(&self, reason: String) -> CommError {
        CommError::Join { group: self.name.clone(), rank: self.rank, size: self.size, reason }
    }
}

/// What a group shares with its collectives in flight.
#[derive(Debug)]
pub(super) struct Shared {
    /// `None` in a group of one.
    raw: Option<RawGroup>,
    /// Where the ranks met, with keys of this group; `None` in a group of one.
    store: Option<Store>,
    spec: GroupSpec,
    device: Device,
    /// Why the group is closed, once it is.
    closed: OnceLock<String>,
}

impl Shared {
    pub(super) fn timeout(&self) -> Duration {
        self.spec.timeout
    }

    pub(super) fn is_gloo(&self) -> bool {
        self.device == Device::Cpu
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.get().is_some()
    }

    /// Closes the group because a collective failed. Where that is news, asks which ranks have noticed.
    pub(super) fn fail(&self, ticket: Ticket, reason: String) -> CommError {
        let Ticket { operation, sequence, issued } = ticket;
        let elapsed = issued.elapsed();
        // In a group that was closed before, what libtorch says of lost connections is not the cause.
        let cause = self.closed.get().cloned();
        self.close(&format!("{operation} #{sequence} failed: {reason}"));
        let GroupSpec { name, rank, size, .. } = &self.spec;
        let reason = match (cause, &self.store) {
            (Some(cause), _) => format!("{cause} ({reason})"),
            (None, Some(store)) => {
                let others = roll_call(store, (*rank, *size), &format!("{operation} #{sequence}"));
                format!("{reason}; {others}")
            }
            (None, None) => reason,
        };
        CommError::Collective { group: name.clone(), operation, sequence, rank: *rank, size: *size, elapsed, reason }
    }

    fn close(&self, reason: &str) {
        if self.closed.set(reason.to_owned()).is_err() {
            return;
        }
        if let Some(raw) = &self.raw {
            // SAFETY: the group is alive, and c10d lets any thread abort it.
            let aborted = unsafe { shim::check(aha_group_abort(raw.0.as_ptr())) };
            // A failed abort leaves the deadlines of what is in flight, which end it too.
            drop(aborted);
        }
    }
}

impl Drop for Shared {
    /// A group ends with what it still has in flight, for which whoever gave it up does not wait.
    fn drop(&mut self) {
        if let Some(raw) = self.raw.take().filter(|_| self.is_closed()) {
            // Where there is no thread to be had, it is dropped here.
            drop(thread::Builder::new().name("aha-comm-end".to_owned()).spawn(move || drop(raw)));
        }
    }
}

/// Owns a group of the shim.
#[derive(Debug)]
struct RawGroup(NonNull<AhaGroup>);

// SAFETY: c10d's backends are reference-counted and run their work on threads of their own.
unsafe impl Send for RawGroup {}
// SAFETY: collectives are issued under the lock of `ProcessGroup::issued`; abort may be called by any thread.
unsafe impl Sync for RawGroup {}

impl Drop for RawGroup {
    fn drop(&mut self) {
        // SAFETY: the group is ours, and its last work is gone, because each holds a reference to us.
        unsafe { aha_group_free(self.0.as_ptr()) };
    }
}

/// Announces this rank, waits for the others, and connects to them.
fn connect(backend: Backend, store: &Store, spec: &GroupSpec, limit: Duration) -> Result<(RawGroup, Store), CommError> {
    let started = Instant::now();
    let rest = || limit.saturating_sub(started.elapsed());
    let store = store.scoped(&spec.name, limit)?;
    if store.add(&arrival_key(spec.rank), 1)? > 1 {
        return Err(spec.join_error("this rank is already taken; a group made anew needs a new name".to_owned()));
    }
    let (mut missing, mut unseen) = (Vec::new(), 0..spec.size);
    for rank in unseen.by_ref() {
        if !has_arrived(&store, rank, rest) {
            missing.push(rank);
        }
        if started.elapsed() > limit.saturating_add(LAST_LOOK) || store.give_up().is_over() {
            break;
        }
    }
    if store.give_up().is_over() {
        return Err(spec.join_error("given up, as nobody waits for it any more".to_owned()));
    }
    if !missing.is_empty() {
        let others = if unseen.is_empty() { "" } else { "; others were not looked for" };
        let waited = limit.as_secs_f64();
        return Err(spec.join_error(format!("rank {missing:?} did not come within {waited:.1} s{others}")));
    }
    let (raw_store, options) = (store.raw(), Options::new(backend, spec)?);
    let opened = within(&store.place(), rest(), store.give_up(), move || options.open(backend, &raw_store));
    let group = opened.map_err(|reason| spec.join_error(reason))?;
    Ok((group, store.kept()))
}

/// Waits for a rank for the rest of the time, or until nobody wants to know.
fn has_arrived(store: &Store, rank: usize, rest: impl Fn() -> Duration) -> bool {
    loop {
        let (asked, patience) = (Instant::now(), rest().min(LOOK_AGAIN));
        if store.get_within(&arrival_key(rank), patience).is_ok() {
            return true;
        }
        // A store that fails at once is gone.
        if rest().is_zero() || asked.elapsed() < patience / 2 || store.give_up().is_over() {
            return false;
        }
    }
}

fn arrival_key(rank: usize) -> String {
    format!("arrived/{rank}")
}

/// [`AhaGroupOptions`] with its text.
struct Options {
    rank: i32,
    size: i32,
    timeout: Duration,
    host: Option<CString>,
    interface: Option<CString>,
    device: i32,
}

impl Options {
    fn new(backend: Backend, spec: &GroupSpec) -> Result<Self, CommError> {
        let fail = |reason: String| spec.join_error(reason);
        let int = |number: usize| i32::try_from(number).map_err(|_| fail(format!("{number} is too large")));
        let (host, interface) = match &spec.address {
            Address::Host(host) => (Some(c_string(host).map_err(fail)?), None),
            Address::Interface(interface) => (None, Some(c_string(interface).map_err(fail)?)),
        };
        let device = match backend {
            Backend::Gloo => 0,
            Backend::Nccl { device } => int(device)?,
        };
        Ok(Self { rank: int(spec.rank)?, size: int(spec.size)?, timeout: spec.timeout, host, interface, device })
    }

    fn open(&self, backend: Backend, store: &RawStore) -> Result<RawGroup, Message> {
        let options = AhaGroupOptions {
            rank: self.rank,
            size: self.size,
            timeout_ms: millis(self.timeout),
            host: self.host.as_ref().map_or(ptr::null(), |text| text.as_ptr()),
            interface: self.interface.as_ref().map_or(ptr::null(), |text| text.as_ptr()),
            device: self.device,
        };
        let open = match backend {
            Backend::Gloo => aha_gloo_new,
            Backend::Nccl { .. } => aha_nccl_new,
        };
        let mut group = ptr::null_mut();
        // SAFETY: the store is alive, and `options` with its text and `group` outlive the call.
        let message = unsafe { open(store.as_ptr(), &raw const options, &raw mut group) };
        // SAFETY: the shim returned `message` just now.
        unsafe { shim::check(message) }?;
        NonNull::new(group).map(RawGroup).ok_or_else(|| "the shim returned no group".to_owned())
    }
}
