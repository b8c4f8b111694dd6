//! Durations, counted by size, without locks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[derive(Debug)]
pub(super) struct Histogram {
    /// In seconds, ascending: a duration counts in the first bucket whose bound it does not exceed.
    bounds: &'static [f64],
    /// `[bounds + 1]`, the last one for what exceeds them all.
    buckets: Vec<AtomicU64>,
    sum_nanoseconds: AtomicU64,
}

/// A histogram at one moment.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Snapshot {
    /// Upper bound in seconds, and how many durations are in this bucket alone; the last one has no bound.
    pub(super) buckets: Vec<(Option<f64>, u64)>,
    pub(super) sum_seconds: f64,
}

impl Histogram {
    pub(super) fn new(bounds: &'static [f64]) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum_nanoseconds: AtomicU64::new(0) }
    }

    pub(super) fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds.partition_point(|&bound| bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_nanoseconds.fetch_add(duration.as_nanos() as u64, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let bounds = self.bounds.iter().copied().map(Some).chain([None]);
        let counts = self.buckets.iter().map(|count| count.load(Ordering::Relaxed));
        let sum_seconds = self.sum_nanoseconds.load(Ordering::Relaxed) as f64 / 1e9;
        Snapshot { buckets: bounds.zip(counts).collect(), sum_seconds }
    }
}

#[cfg(test)]
mod tests {
    use aha_core::random::derive_seed;

    use super::*;

    #[test]
    fn durations_from_several_threads_are_counted_as_one_by_one() {
        const BOUNDS: &[f64] = &[0.001, 0.01, 0.5, 2.0];
        let durations: Vec<Duration> = (0..4_000)
            .map(|index| match derive_seed(1, &[index]) {
                number if number % 4 == 0 => Duration::from_secs_f64(BOUNDS[(number / 4 % 4) as usize]),
                number => Duration::from_nanos(number % 10_u64.pow(5 + (number % 6) as u32)),
            })
            .collect();
        let histogram = Histogram::new(BOUNDS);
        std::thread::scope(|scope| {
            for part in durations.chunks(1_000) {
                scope.spawn(|| part.iter().for_each(|&duration| histogram.observe(duration)));
            }
        });
        let Snapshot { buckets, sum_seconds } = histogram.snapshot();
        let mut below = f64::NEG_INFINITY;
        for (bound, count) in buckets {
            let above = bound.unwrap_or(f64::INFINITY);
            let in_bucket = durations.iter().map(Duration::as_secs_f64).filter(|&d| below < d && d <= above).count();
            assert!(in_bucket > 100 && in_bucket as u64 == count, "{count} and {in_bucket} up to {above}");
            below = above;
        }
        let expected: f64 = durations.iter().map(Duration::as_secs_f64).sum();
        assert!((sum_seconds - expected).abs() < 1e-6 * expected, "{sum_seconds} and {expected}");
    }
}
