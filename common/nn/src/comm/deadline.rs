//! A time limit for calls that have none.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Runs `call` on a thread of its own and waits at most `limit` for its answer.
///
/// c10d's store client reads its socket without a time limit, so a server that is stopped but not dead would block it for
/// ever. The thread of a call that missed its limit stays behind, blocked; such a process is about to end.
pub(super) fn within<T: Send + 'static>(
    limit: Duration,
    call: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("aha-comm-deadline".to_owned())
        .spawn(move || {
            // The receiver is gone when the answer comes too late; dropping the answer frees it.
            drop(sender.send(call()));
        })
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    receiver.recv_timeout(limit).unwrap_or_else(|_| Err(format!("no answer within {:.1} s", limit.as_secs_f64())))
}
