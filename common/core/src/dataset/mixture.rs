//! Which of several sources a run's next prompts are from.
//!
//! Prompt `k` of a source of weight `w` is due at the time `(k + 1/2) / w`, and prompts come in the order of these times.
//! So after any number of prompts each source has had its share but for a few, and where a step begins can be computed
//! without those before it.

use super::SplitMix64;

/// Sources by their weights, which are over 0 and finite.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture {
    /// Their sum is 1.
    weights: Vec<f64>,
}

impl Mixture {
    #[must_use]
    pub fn new(weights: &[f64]) -> Self {
        // By the largest first: the sum of large weights would be infinite.
        let largest = weights.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let sum: f64 = weights.iter().map(|weight| weight / largest).sum();
        Self { weights: weights.iter().map(|weight| weight / largest / sum).collect() }
    }

    /// How many of the first `start` prompts are from each source.
    #[must_use]
    pub fn before(&self, start: u64) -> Vec<u64> {
        if let [_] = self.weights[..] {
            return vec![start];
        }
        // A time at which every source is at most half a prompt off its share, so that fewer than `start` are due.
        let time = start.saturating_sub(self.weights.len() as u64) as f64;
        let mut counts: Vec<u64> = (0..self.weights.len()).map(|source| self.due_before(source, time)).collect();
        while counts.iter().sum::<u64>() < start {
            let source = self.next(&counts);
            counts[source] += 1;
        }
        counts
    }

    /// The source of the prompt that follows those of `counts`.
    #[must_use]
    pub fn next(&self, counts: &[u64]) -> usize {
        let times = counts.iter().enumerate().map(|(source, &count)| (self.due(source, count), source));
        // The first of equals.
        times.reduce(|first, other| if other.0 < first.0 { other } else { first }).map_or(0, |(_, source)| source)
    }

    /// One of `sources` at random, by their weights; `None` where there are none.
    #[must_use]
    pub fn draw(&self, sources: &[usize], random: &mut SplitMix64) -> Option<usize> {
        if sources.len() > 1 {
            let total: f64 = sources.iter().map(|&source| self.weights[source]).sum();
            let mut position = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64 * total;
            for &source in sources {
                if position < self.weights[source] {
                    return Some(source);
                }
                position -= self.weights[source];
            }
        }
        // What rounding left over.
        sources.last().copied()
    }

    fn due(&self, source: usize, index: u64) -> f64 {
        (index as f64 + 0.5) / self.weights[source]
    }

    /// Prompts of a source that are due before a time, by the same arithmetic as [`Self::due`].
    fn due_before(&self, source: usize, time: f64) -> u64 {
        let mut count = (time * self.weights[source]).round() as u64;
        while count > 0 && self.due(source, count - 1) >= time {
            count -= 1;
        }
        while self.due(source, count) < time {
            count += 1;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the start, prompt by prompt.
    fn walk(mixture: &Mixture, len: u64) -> Vec<Vec<u64>> {
        let mut counts = vec![0; mixture.weights.len()];
        let mut all = vec![counts.clone()];
        for _ in 0..len {
            let source = mixture.next(&counts);
            counts[source] += 1;
            all.push(counts.clone());
        }
        all
    }

    #[test]
    fn any_start_is_where_walking_leads_and_shares_are_kept() {
        let mut random = SplitMix64::new(1);
        for _ in 0..60 {
            let num_sources = 1 + random.below(6) as usize;
            let weight = |random: &mut SplitMix64| match random.below(3) {
                0 => 1.0,
                1 => random.below(1000) as f64 / 10.0 + 1e-3,
                _ => 1.0 / (1.0 + random.below(7) as f64),
            };
            let weights: Vec<f64> = (0..num_sources).map(|_| weight(&mut random)).collect();
            let mixture = Mixture::new(&weights);
            let sum: f64 = weights.iter().sum();
            for (start, counts) in walk(&mixture, 700).iter().enumerate() {
                assert_eq!(&mixture.before(start as u64), counts, "{weights:?} at {start}");
                for (count, weight) in counts.iter().zip(&weights) {
                    let share = start as f64 * weight / sum;
                    assert!((*count as f64 - share).abs() <= num_sources as f64, "{weights:?} at {start}");
                }
            }
        }
    }

    #[test]
    fn extreme_weights_and_far_starts_have_an_end() {
        for weights in [vec![1e-300, 1e300], vec![f64::MAX, f64::MAX], vec![1e-9, 1.0, 1.0]] {
            let mixture = Mixture::new(&weights);
            for start in [0, 1, 1000, 1 << 40] {
                assert_eq!(mixture.before(start).iter().sum::<u64>(), start, "{weights:?}");
            }
        }
        assert_eq!(Mixture::new(&[3.0]).before(u64::MAX), [u64::MAX]);
        assert_eq!(Mixture::new(&[3.0, 1.0]).before(40), [30, 10]);
    }

    #[test]
    fn sources_are_drawn_by_their_weights() {
        let mixture = Mixture::new(&[1.0, 2.0, 5.0]);
        let mut random = SplitMix64::new(3);
        let mut counts = |sources: &[usize]| {
            let mut counts = [0_usize; 3];
            for _ in 0..8000 {
                counts[mixture.draw(sources, &mut random).unwrap()] += 1;
            }
            counts.map(|count| (count as f64 / 1000.0).round())
        };
        assert_eq!((counts(&[0, 1, 2]), counts(&[0, 1])), ([1.0, 2.0, 5.0], [3.0, 5.0, 0.0]));
        assert_eq!((mixture.draw(&[1], &mut random), mixture.draw(&[], &mut random)), (Some(1), None));
    }
}
