//! What a process holds on to, which may not grow with what it reads.

use std::cell::Cell;

/// Memory that libFuzzer's own notes and the allocator's may take, in KiB.
const SLACK_KIB: u64 = 256 << 10;
/// Of pools that grow up to a bound.
const SLACK_THREADS: u64 = 64;
/// Inputs between two looks.
const LOOK_EVERY: u32 = 64;
/// Looks before the process counts as warm.
const WARM_UP: u32 = 30;

thread_local! {
    static INPUTS: Cell<u32> = const { Cell::new(0) };
    static LOOKS: Cell<u32> = const { Cell::new(0) };
    static BASE: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

/// Looks now and then; to be called after every input.
///
/// # Panics
/// If there is much more memory or are many more threads than when the process was warm.
pub fn check() {
    INPUTS.set(INPUTS.get().wrapping_add(1));
    if INPUTS.get() % LOOK_EVERY != 0 {
        return;
    }
    let looks = LOOKS.get().saturating_add(1);
    LOOKS.set(looks);
    let now = held();
    if looks <= WARM_UP {
        BASE.set(now);
        return;
    }
    let base = BASE.get();
    assert!(now.0 < base.0 + SLACK_KIB, "{} KiB are held, and {} were when it was warm", now.0, base.0);
    assert!(now.1 < base.1 + SLACK_THREADS, "there are {} threads, and {} were when it was warm", now.1, base.1);
}

/// Memory in KiB, and threads.
fn held() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux says what a process holds");
    let number = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("it says all of it");
        line.trim_start_matches(':').split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
    };
    (number("VmRSS"), number("Threads"))
}
