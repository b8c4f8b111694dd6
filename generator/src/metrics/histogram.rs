//! Durations and numbers, counted by size, without locks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aha_proto::metrics::Snapshot;

const NANOSECONDS: f64 = 1e9;

#[derive(Debug)]
pub(super) struct Histogram {
    /// In seconds or as numbers, ascending: a value counts in the first bucket whose bound it does not exceed.
    bounds: Vec<f64>,
    /// `[bounds + 1]`, the last one for what exceeds them all.
    buckets: Vec<AtomicU64>,
    /// In nanoseconds, or as it is.
    sum: AtomicU64,
    per_unit: f64,
}

impl Histogram {
    /// `bounds` are in seconds.
    pub(super) fn of_durations(bounds: &[f64]) -> Self {
        Self::new(bounds.to_vec(), NANOSECONDS)
    }

    /// Of numbers up to about `max`, with bounds 1, 2, 5, 10, 20, 50 and so on: vLLM's for numbers of tokens.
    pub(super) fn of_numbers(max: usize) -> Self {
        let bounds = (0..).flat_map(|exponent| [1, 2, 5].map(|digit| digit * 10_usize.pow(exponent)));
        Self::new(bounds.take_while(|&bound| bound <= max).map(|bound| bound as f64).collect(), 1.0)
    }

    pub(super) fn observe(&self, duration: Duration) {
        self.count(duration.as_nanos() as u64);
    }

    pub(super) fn observe_number(&self, number: usize) {
        self.count(number as u64);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let bounds = self.bounds.iter().copied().map(Some).chain([None]);
        let counts = self.buckets.iter().map(|count| count.load(Ordering::Relaxed));
        let sum = self.sum.load(Ordering::Relaxed) as f64 / self.per_unit;
        Snapshot { buckets: bounds.zip(counts).collect(), sum }
    }

    fn new(bounds: Vec<f64>, per_unit: f64) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum: AtomicU64::new(0), per_unit }
    }

    fn count(&self, value: u64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value as f64 / self.per_unit);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
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
        let histogram = Histogram::of_durations(BOUNDS);
        std::thread::scope(|scope| {
            for part in durations.chunks(1_000) {
                scope.spawn(|| part.iter().for_each(|&duration| histogram.observe(duration)));
            }
        });
        let snapshot = histogram.snapshot();
        let coarser = snapshot.coarser(2);
        assert_eq!((coarser.buckets[0].0, coarser.buckets.len(), coarser.sum), (Some(0.5), 3, snapshot.sum));
        assert_eq!(coarser.buckets[0].1, snapshot.buckets[..3].iter().map(|(_, count)| count).sum::<u64>());
        let Snapshot { buckets, sum } = snapshot;
        let mut below = f64::NEG_INFINITY;
        for (bound, count) in buckets {
            let above = bound.unwrap_or(f64::INFINITY);
            let in_bucket = durations.iter().map(Duration::as_secs_f64).filter(|&d| below < d && d <= above).count();
            assert!(in_bucket > 100 && in_bucket as u64 == count, "{count} and {in_bucket} up to {above}");
            below = above;
        }
        let expected: f64 = durations.iter().map(Duration::as_secs_f64).sum();
        assert!((sum - expected).abs() < 1e-6 * expected, "{sum} and {expected}");
    }

    #[test]
    fn numbers_are_counted_up_to_the_bounds_that_vllm_has() {
        let histogram = Histogram::of_numbers(100);
        [0, 1, 2, 3, 100, 101].into_iter().for_each(|number| histogram.observe_number(number));
        let snapshot = histogram.snapshot();
        let bounds: Vec<f64> = snapshot.buckets.iter().filter_map(|(bound, _)| *bound).collect();
        assert_eq!(bounds, [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        let counts: Vec<u64> = snapshot.buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!((counts, snapshot.sum), (vec![2, 1, 1, 0, 0, 0, 1, 1], 207.0));
    }
}
