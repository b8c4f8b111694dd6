//! After a failure: which ranks have noticed it, and in what.

use super::store::Store;
use std::time::{Duration, Instant};

/// For all of them together. Those that wait for each other notice at once, as their connections are closed.
const LIMIT: Duration = Duration::from_secs(3);

/// Says in the store that `rank` of `size` has failed at `place`, and returns what the others say there.
pub(super) fn roll_call(store: &Store, (rank, size): (usize, usize), place: &str) -> String {
    let key = |rank: usize| format!("failed/{rank}");
    let started = Instant::now();
    if let Err(error) = store.set_within(&key(rank), place.as_bytes(), LIMIT) {
        return format!("no word of the other ranks: {error}");
    }
    let (mut silent, mut said) = (Vec::new(), Vec::new());
    for other in (0..size).filter(|other| *other != rank) {
        // What is there already comes within a moment.
        let rest = LIMIT.saturating_sub(started.elapsed()).max(LIMIT / 10);
        match store.get_within(&key(other), rest) {
            Ok(place) => said.push(format!("rank {other} failed at {}", String::from_utf8_lossy(&place))),
            Err(_) => silent.push(other),
        }
    }
    if !silent.is_empty() {
        said.push(format!("rank {silent:?} is stopped, gone or elsewhere"));
    }
    said.join(", ")
}
