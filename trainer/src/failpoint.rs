//! Places at which a test kills the process. Outside of tests they do nothing.

/// The process is killed when this is called for the `n`-th time, `n` being the variable [`KILL_AT`].
#[cfg(test)]
pub(crate) fn reached() {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NUM_REACHED: AtomicU64 = AtomicU64::new(0);
    let Some(kill_at) = std::env::var(KILL_AT).ok().and_then(|text| text.parse::<u64>().ok()) else { return };
    if NUM_REACHED.fetch_add(1, Ordering::SeqCst) + 1 == kill_at {
        let killed = std::process::Command::new("kill").args(["-KILL", &std::process::id().to_string()]).status();
        unreachable!("kill does not return: {killed:?}");
    }
}

#[cfg(test)]
pub(crate) const KILL_AT: &str = "AHA_TEST_KILL_AT";

#[cfg(not(test))]
pub(crate) fn reached() {}
