//! Ending a run between two steps, before its last: when somebody asks for it, or while there is time left to save.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aha_nn::comm::{CommError, ProcessGroup, ReduceOp};
use tch::Tensor;

/// Asks a run to end after the step that it is in. Any thread may ask, a signal's too.
#[derive(Debug, Clone, Default)]
pub struct StopRequest(Arc<AtomicBool>);

/// How a run came to its end.
#[derive(Debug)]
pub enum Outcome<T> {
    Finished(T),
    Stopped(Stopped),
}

/// A run that ended early, with its state saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// Steps done.
    pub step: u64,
    pub max_steps: u64,
    pub reason: StopReason,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    Requested,
    /// The next step, with a checkpoint after it, would end later than `train.max_wall_clock_seconds` allow.
    WallClock,
}

/// Decides between steps, together with the other ranks, whether there is another one.
#[derive(Debug)]
pub(crate) struct StopWatch {
    request: StopRequest,
    /// From the start of the process.
    limit: Option<Duration>,
    started: Instant,
    /// The end of the last step, once there is one.
    last: Option<Instant>,
    longest_step: Duration,
    longest_save: Duration,
}

impl StopRequest {
    /// What becomes true when the run is to end.
    #[must_use]
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}

impl StopWatch {
    pub(crate) fn new(request: &StopRequest, limit_seconds: Option<f64>, started: Instant) -> Self {
        Self {
            request: request.clone(),
            limit: limit_seconds.map(Duration::from_secs_f64),
            started,
            last: None,
            longest_step: Duration::ZERO,
            longest_save: Duration::ZERO,
        }
    }

    /// How long a checkpoint took.
    pub(crate) fn saved_in(&mut self, duration: Duration) {
        self.longest_save = self.longest_save.max(duration);
    }

    /// All ranks call this between steps; they learn the same. One rank that is asked to stop is enough.
    pub(crate) fn decide(&mut self, now: Instant, group: &ProcessGroup) -> Result<Option<StopReason>, CommError> {
        if let Some(last) = self.last.replace(now) {
            self.longest_step = self.longest_step.max(now - last);
        }
        // A step is measured with the checkpoint that follows it; the one that ends the run comes on top.
        let due = now - self.started + self.longest_step + self.longest_save;
        let late = self.limit.is_some_and(|limit| due > limit);
        let here = [f32::from(u8::from(self.request.0.load(Ordering::Relaxed))), f32::from(u8::from(late))];
        let mut votes = Tensor::from_slice(&here).to_device(group.device());
        group.all_reduce(&mut votes, ReduceOp::Max)?;
        let any = |index: i64| votes.double_value(&[index]) > 0.0;
        Ok(any(0).then_some(StopReason::Requested).or(any(1).then_some(StopReason::WallClock)))
    }
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, max_steps, reason } = self;
        let reason = match reason {
            StopReason::Requested => "as asked",
            StopReason::WallClock => "because train.max_wall_clock_seconds leave no time for another one",
        };
        let saved = if *step > 0 {
            "its checkpoint is written; start the run again to go on from there"
        } else {
            "nothing is lost"
        };
        write!(f, "stopped after step {step} of {max_steps}, {reason}: {saved}")
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::test_ranks::run_ranks;

    fn solo() -> ProcessGroup {
        ProcessGroup::solo("test", Device::Cpu)
    }

    #[test]
    fn one_rank_that_is_asked_stops_all() {
        let reasons = run_ranks(3, |group| {
            let request = StopRequest::default();
            let now = Instant::now();
            let mut watch = StopWatch::new(&request, None, now);
            let before = watch.decide(now, &group).unwrap();
            request.flag().store(group.rank() == 2, Ordering::Relaxed);
            (before, watch.decide(now, &group).unwrap())
        });
        assert_eq!(reasons, [(None, Some(StopReason::Requested)); 3]);
    }

    #[test]
    fn there_must_be_time_for_the_longest_step_and_a_checkpoint() {
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let mut watch = StopWatch::new(&StopRequest::default(), Some(100.0), start);
        let mut decide = |seconds| watch.decide(after(seconds), &solo()).unwrap();
        assert_eq!(decide(20), None, "the start is no step");
        assert_eq!(decide(50), None);
        assert_eq!(decide(60), None, "60 s and the longest step, 30 s, are under 100 s");
        watch.saved_in(Duration::from_secs(5));
        assert_eq!(watch.decide(after(65), &solo()).unwrap(), None);
        assert_eq!(watch.decide(after(66), &solo()).unwrap(), Some(StopReason::WallClock));
    }
}
