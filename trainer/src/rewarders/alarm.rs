//! Warnings of one kind, not more often than people can read.

use std::time::Duration;

use tokio::time::Instant;

const PAUSE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct Alarm {
    last: Option<Instant>,
    num_kept_back: u64,
}

impl Alarm {
    /// Whether to warn now, and of how many before that were kept back.
    pub(super) fn ring(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now < last + PAUSE) {
            self.num_kept_back += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.num_kept_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_that_were_kept_back_are_counted_in_the_next() {
        let (mut alarm, start) = (Alarm::default(), Instant::now());
        let rings = [0, 1, 9, 10, 11, 30].map(|seconds| alarm.ring(start + Duration::from_secs(seconds)));
        assert_eq!(rings, [Some(0), None, None, Some(2), None, Some(1)]);
    }
}
