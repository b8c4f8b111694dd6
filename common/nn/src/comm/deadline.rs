//! A time limit for calls that have none.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Calls to one place that have missed their limit and have not ended, and to all places.
const MAX_LEFT: usize = 8;
const MAX_LEFT_IN_ALL: usize = 256;

/// How often the caller is asked whether it still wants the answer.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// How many there are, by place.
static LEFT: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());

/// Whether nobody wants an answer any more.
#[derive(Clone)]
pub(super) struct GiveUp(Arc<dyn Fn() -> bool + Send + Sync>);

impl GiveUp {
    pub(super) fn when(is_over: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(is_over))
    }

    pub(super) fn never() -> Self {
        Self::when(|| false)
    }

    pub(super) fn is_over(&self) -> bool {
        (self.0)()
    }
}

impl fmt::Debug for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GiveUp").field(&self.is_over()).finish()
    }
}

/// Runs `call`, which waits for `place`, on a thread of its own, and waits at most `limit` for its answer.
///
/// c10d's store client reads its socket without a time limit, so a server that is stopped but not dead would block it for
/// ever. The thread of a call that missed its limit stays behind, blocked, until the server's end of the connection is
/// closed. Where too many have stayed behind, no other is begun: whoever says where a store is could take all threads.
pub(super) fn within<T: Send + 'static>(
    place: &str,
    limit: Duration,
    give_up: &GiveUp,
    call: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    check_left(place)?;
    let (sender, receiver) = sync_channel(1);
    // Set by the caller when it goes, or by the call when it ends; whoever comes second knows that the call was left.
    let first = Arc::new(AtomicBool::new(false));
    let (ended, left_place) = (Arc::clone(&first), place.to_owned());
    thread::Builder::new()
        .name("aha-comm-deadline".to_owned())
        .spawn(move || {
            // The receiver is gone when the answer comes too late; dropping the answer frees it.
            drop(sender.send(call()));
            if ended.swap(true, Ordering::SeqCst) {
                forget(&left_place);
            }
        })
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    let started = Instant::now();
    let problem = loop {
        let rest = limit.saturating_sub(started.elapsed());
        match receiver.recv_timeout(rest.min(ASK_AGAIN)) {
            Ok(answer) => return answer,
            Err(_) if give_up.is_over() => break "given up, as nobody waits for it any more".to_owned(),
            Err(RecvTimeoutError::Timeout) if rest > ASK_AGAIN => {}
            Err(_) => break format!("no answer within {:.1} s", limit.as_secs_f64()),
        }
    };
    let mut left = left();
    if !first.swap(true, Ordering::SeqCst) {
        *left.entry(place.to_owned()).or_insert(0) += 1;
    }
    Err(problem)
}

fn check_left(place: &str) -> Result<(), String> {
    let left = left();
    let (here, in_all) = (left.get(place).copied().unwrap_or(0), left.values().sum::<usize>());
    if here >= MAX_LEFT || in_all >= MAX_LEFT_IN_ALL {
        return Err(format!("{here} calls to it and {in_all} in all were not answered in time, and still wait"));
    }
    Ok(())
}

fn forget(place: &str) {
    let mut left = left();
    if let Some(count) = left.get_mut(place) {
        *count -= 1;
        if *count == 0 {
            left.remove(place);
        }
    }
}

/// Nothing in here can panic between two changes that belong together.
fn left() -> MutexGuard<'static, BTreeMap<String, usize>> {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner)
}
