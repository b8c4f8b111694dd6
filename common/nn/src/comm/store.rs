//! The key-value store where ranks meet: c10d's TCPStore, hosted by one process.

use super::deadline::{GiveUp, within};
use super::error::CommError;
use super::names::Names;
use crate::shim::{
    self, AhaStore, Message, aha_store_add, aha_store_connect, aha_store_free, aha_store_get, aha_store_host,
    aha_store_scoped, aha_store_set, aha_string_free,
};
use std::ffi::{CString, c_char};
use std::os::fd::IntoRawFd;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What c10d may take longer than it was told before it is given up.
const GRACE: Duration = Duration::from_secs(1);

/// A connection to the store, and the server itself in the process that hosts it.
#[derive(Debug, Clone)]
pub struct Store {
    raw: Arc<RawStore>,
    host: String,
    port: u16,
    timeout: Duration,
    give_up: GiveUp,
}

impl Store {
    /// Serves a store on `host` and connects to it. Port 0 picks a free one, which [`Store::port`] tells.
    ///
    /// `host` is an address of this machine, `0.0.0.0` for all of them, or its name, which may yet have to become known.
    /// The store lives as long as this value and its clones.
    ///
    /// # Errors
    /// [`CommError::Store`] when the address is not ours or is in use, or the name is not ours within `timeout`.
    pub fn host(host: &str, port: u16, timeout: Duration) -> Result<Self, CommError> {
        Self::host_by(&Names::of_system(), host, port, timeout)
    }

    pub(super) fn host_by(names: &Names, host: &str, port: u16, timeout: Duration) -> Result<Self, CommError> {
        let fail = |reason: String| store_error(host, port, "listen", reason);
        let listener = names.listen(host, port, timeout).map_err(|error| fail(error.to_string()))?;
        let port = listener.local_addr().map_err(|error| fail(error.to_string()))?.port();
        let name = c_string(host).map_err(fail)?;
        let give_up = GiveUp::never();
        let raw = within(&place(host, port), timeout + GRACE, &give_up, move || {
            RawStore::open(|out| {
                // SAFETY: `name` and `out` outlive the call, and the shim takes over the socket.
                unsafe { aha_store_host(listener.into_raw_fd(), name.as_ptr(), port, millis(timeout), out) }
            })
        });
        Ok(Self { raw: Arc::new(raw.map_err(fail)?), host: host.to_owned(), port, timeout, give_up })
    }

    /// Connects to the store at `host:port`, which may yet have to start, and `host` to become known.
    ///
    /// # Errors
    /// [`CommError::Store`] when nobody answers within `timeout`.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self, CommError> {
        Self::connect_by(&Names::of_system(), host, port, timeout)
    }

    /// [`Store::connect`] that ends, as do all calls of this store and the meeting of a group there, soon after `is_over` says
    /// that nobody waits for it any more.
    ///
    /// # Errors
    /// As there.
    pub fn connect_unless(
        host: &str,
        port: u16,
        timeout: Duration,
        is_over: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Self, CommError> {
        Self::connect_by(&Names::of_system().unless(GiveUp::when(is_over)), host, port, timeout)
    }

    pub(super) fn connect_by(names: &Names, host: &str, port: u16, timeout: Duration) -> Result<Self, CommError> {
        let started = Instant::now();
        let fail = |reason: String| store_error(host, port, "connect", reason);
        let name = c_string(host).map_err(fail)?;
        names.resolve(host, port, timeout).map_err(|error| fail(error.to_string()))?;
        let rest = timeout.saturating_sub(started.elapsed()).max(GRACE);
        let give_up = names.give_up().clone();
        let raw = within(&place(host, port), rest + GRACE, &give_up, move || {
            // It is told the name, so that it asks again whenever it tries again: the address may still be an old one.
            // SAFETY: `name` and `out` outlive the call.
            RawStore::open(|out| unsafe { aha_store_connect(name.as_ptr(), port, millis(rest), out) })
        });
        Ok(Self { raw: Arc::new(raw.map_err(fail)?), host: host.to_owned(), port, timeout, give_up })
    }

    /// The port that the store is served on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets `key` for all ranks to see.
    ///
    /// # Errors
    /// [`CommError::Store`] when the server is gone or silent; so for all operations.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), CommError> {
        self.set_within(key, value, self.timeout)
    }

    /// [`Store::set`] with a limit of its own.
    pub(super) fn set_within(&self, key: &str, value: &[u8], limit: Duration) -> Result<(), CommError> {
        let value = value.to_vec();
        self.call("set", key, limit, move |raw, key| {
            // SAFETY: the store is alive; `key` and `value` outlive the call.
            unsafe { shim::check(aha_store_set(raw, key, value.as_ptr(), value.len())) }
        })
    }

    /// The value of `key`, waiting until some rank has set it.
    pub fn get(&self, key: &str) -> Result<Vec<u8>, CommError> {
        self.get_within(key, self.timeout)
    }

    /// Adds to the number at `key`, from 0, and returns the sum.
    pub fn add(&self, key: &str, delta: i64) -> Result<i64, CommError> {
        self.call("add", key, self.timeout, move |raw, key| {
            let mut sum = 0;
            // SAFETY: the store is alive; `key` and `sum` outlive the call.
            unsafe { shim::check(aha_store_add(raw, key, delta, &raw mut sum)) }?;
            Ok(sum)
        })
    }

    /// [`Store::get`] with a limit of its own.
    pub(super) fn get_within(&self, key: &str, limit: Duration) -> Result<Vec<u8>, CommError> {
        self.call("get", key, limit, move |raw, key| {
            let (mut data, mut len) = (ptr::null_mut(), 0);
            // SAFETY: the store is alive; `key`, `data` and `len` outlive the call.
            unsafe { shim::check(aha_store_get(raw, key, millis(limit), &raw mut data, &raw mut len)) }?;
            // SAFETY: on success `data` points to `len` bytes that are ours.
            let value = unsafe { slice::from_raw_parts(data, len) }.to_vec();
            // SAFETY: `data` is ours to free, and `value` is a copy.
            unsafe { aha_string_free(data.cast::<c_char>()) };
            Ok(value)
        })
    }

    /// A connection of its own to the same server, with all keys under `prefix`.
    pub(super) fn scoped(&self, prefix: &str, timeout: Duration) -> Result<Self, CommError> {
        let raw = self.call("open", prefix, timeout, move |raw, prefix| {
            // SAFETY: the store is alive; `prefix` and `out` outlive the call.
            RawStore::open(|out| unsafe { aha_store_scoped(raw, prefix, millis(timeout), out) })
        })?;
        let give_up = self.give_up.clone();
        Ok(Self { raw: Arc::new(raw), host: self.host.clone(), port: self.port, timeout, give_up })
    }

    /// The same for those who want it as long as it is there.
    pub(super) fn kept(self) -> Self {
        Self { give_up: GiveUp::never(), ..self }
    }

    /// When calls are given up.
    pub(super) fn give_up(&self) -> &GiveUp {
        &self.give_up
    }

    /// `host:port`.
    pub(super) fn place(&self) -> String {
        place(&self.host, self.port)
    }

    /// Shares the connection with a call that must hold it.
    pub(super) fn raw(&self) -> Arc<RawStore> {
        Arc::clone(&self.raw)
    }

    fn call<T: Send + 'static>(
        &self,
        operation: &str,
        key: &str,
        limit: Duration,
        call: impl FnOnce(*const AhaStore, *const c_char) -> Result<T, Message> + Send + 'static,
    ) -> Result<T, CommError> {
        let fail = |reason: String| store_error(&self.host, self.port, &format!("{operation} {key}"), reason);
        let (raw, key) = (self.raw(), c_string(key).map_err(fail)?);
        within(&self.place(), limit + GRACE, &self.give_up, move || call(raw.as_ptr(), key.as_ptr())).map_err(fail)
    }
}

/// Owns a store of the shim.
#[derive(Debug)]
pub(super) struct RawStore(NonNull<AhaStore>);

// SAFETY: c10d's stores lock around every operation and may be used and freed from any thread.
unsafe impl Send for RawStore {}
// SAFETY: as above.
unsafe impl Sync for RawStore {}

impl RawStore {
    pub(super) fn as_ptr(&self) -> *const AhaStore {
        self.0.as_ptr()
    }

    fn open(open: impl FnOnce(*mut *mut AhaStore) -> *mut c_char) -> Result<Self, Message> {
        let mut raw = ptr::null_mut();
        // SAFETY: the closure returns what a shim function returned just now.
        unsafe { shim::check(open(&raw mut raw)) }?;
        NonNull::new(raw).map(Self).ok_or_else(|| "the shim returned no store".to_owned())
    }
}

impl Drop for RawStore {
    fn drop(&mut self) {
        // SAFETY: the shim gave us this store, and nothing uses it after us.
        unsafe { aha_store_free(self.0.as_ptr()) };
    }
}

/// For the shim: whole milliseconds, at least 1, because c10d takes 0 for "no limit".
pub(super) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).max(1)
}

/// For the shim: text without a NUL inside.
pub(super) fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|_| format!("{text:?} has a NUL character"))
}

fn place(host: &str, port: u16) -> String {
    format!("{host}:{port}")
}

fn store_error(host: &str, port: u16, operation: &str, reason: String) -> CommError {
    CommError::Store { address: place(host, port), operation: operation.to_owned(), reason }
}
