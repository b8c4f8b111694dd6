//! Whether a rewarder is there: pure decisions of what happened and when.

use std::time::Duration;

use aha_core::reward::Outcome;
use tokio::time::Instant;

/// How long one that failed is left alone before it is looked for again; doubles until it answers.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What is known of it.
#[derive(Debug, Default)]
pub(super) struct Standing(Option<Down>);

#[derive(Debug)]
struct Down {
    outcome: Outcome,
    pause: Duration,
    next_probe: Instant,
}

/// What becomes of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Admission {
    Ask,
    /// It was down and may be back: this batch finds out, and the others do not wait for it.
    Probe,
    /// It is down: this is the outcome.
    Refuse(Outcome),
}

impl Standing {
    pub(super) fn admit(&mut self, now: Instant) -> Admission {
        match &mut self.0 {
            None => Admission::Ask,
            Some(down) if now >= down.next_probe => {
                down.pause = (down.pause * 2).min(LONGEST_PAUSE);
                down.next_probe = now + down.pause;
                Admission::Probe
            }
            Some(down) => Admission::Refuse(down.outcome),
        }
    }

    pub(super) fn is_down(&self) -> bool {
        self.0.is_some()
    }

    /// It has failed at a batch.
    pub(super) fn failed(&mut self, outcome: Outcome, now: Instant) {
        let pause = self.0.as_ref().map_or(FIRST_PAUSE, |down| down.pause);
        self.0 = Some(Down { outcome, pause, next_probe: now + pause });
    }

    /// It has answered. Whether that is news.
    pub(super) fn answered(&mut self) -> bool {
        self.0.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_down_is_looked_for_less_and_less_often_and_by_one_batch_at_a_time() {
        let (mut standing, start) = (Standing::default(), Instant::now());
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        assert_eq!(standing.admit(start), Admission::Ask);
        standing.failed(Outcome::Timeout, start);
        assert!(standing.is_down());
        assert_eq!(standing.admit(start), Admission::Refuse(Outcome::Timeout));
        assert_eq!(standing.admit(after(1)), Admission::Probe);
        assert_eq!(standing.admit(after(2)), Admission::Refuse(Outcome::Timeout));
        standing.failed(Outcome::Crash, after(20));
        assert_eq!(standing.admit(after(21)), Admission::Refuse(Outcome::Crash));
        assert_eq!(standing.admit(after(22)), Admission::Probe);
        assert_eq!(standing.admit(after(25)), Admission::Refuse(Outcome::Crash));
        assert_eq!(standing.admit(after(26)), Admission::Probe);
        assert!(standing.answered() && !standing.answered());
        assert_eq!(standing.admit(after(27)), Admission::Ask);
        standing.failed(Outcome::Crash, after(28));
        assert_eq!(standing.admit(after(29)), Admission::Probe, "the pauses begin anew");
    }
}
