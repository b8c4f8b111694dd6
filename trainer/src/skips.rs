//! Steps whose updates are left out, because their gradients are not finite: a few in a row are endured.

use anyhow::{Result, bail};

/// Counts steps that were skipped one after the other.
#[derive(Debug)]
pub(crate) struct SkipCounter {
    /// So many in a row are endured.
    limit: u64,
    in_row: u64,
}

impl SkipCounter {
    pub(crate) fn new(limit: u64) -> Self {
        Self { limit, in_row: 0 }
    }

    /// Notes what became of `step`, counted from 1: `num_skipped` of its updates were left out. The same on all ranks.
    ///
    /// # Errors
    /// Beyond the limit, naming the step.
    pub(crate) fn note(&mut self, step: u64, num_skipped: u32) -> Result<()> {
        self.in_row = if num_skipped > 0 { self.in_row + 1 } else { 0 };
        let (in_row, limit) = (self.in_row, self.limit);
        if in_row > limit {
            bail!(
                "step {step}: the gradients of {in_row} steps in a row were not finite, and train.max_skipped_steps is \
                 {limit}; lower train.learning_rate or train.max_grad_norm, and look at what the first of them trained on"
            );
        }
        if in_row > 0 {
            tracing::warn!(
                "step {step}: NON-FINITE GRADIENTS, {num_skipped} update(s) left out; {in_row} such step(s) in a row, {limit} are endured"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_with_finite_gradients_starts_the_count_again() {
        let mut counter = SkipCounter::new(2);
        for (step, num_skipped) in [(1, 1), (2, 3), (3, 0), (4, 1), (5, 1)] {
            counter.note(step, num_skipped).unwrap();
        }
        let error = counter.note(6, 1).unwrap_err().to_string();
        assert!(error.starts_with("step 6: the gradients of 3 steps in a row"), "{error}");
        assert!(error.contains("train.max_skipped_steps is 2"), "{error}");
    }

    #[test]
    fn none_are_endured_where_the_limit_is_0() {
        let mut counter = SkipCounter::new(0);
        counter.note(1, 0).unwrap();
        assert!(counter.note(2, 1).is_err());
    }
}
