//! Steps whose updates are left out, because their gradients are not finite or nothing in them was judged: a few in a row
//! are endured.

use anyhow::{Result, bail};

/// Counts steps that were skipped one after the other.
#[derive(Debug)]
pub(crate) struct SkipCounter {
    /// So many in a row are endured.
    limit: u64,
    in_row: u64,
}

/// Why updates of a step were left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Skip {
    /// The gradients of so many.
    NotFinite(u32),
    /// None of its completions has a verdict, for this reason.
    Unjudged(String),
}

impl Skip {
    /// Where there are such updates.
    pub(crate) fn not_finite(num_updates: u32) -> Option<Self> {
        (num_updates > 0).then_some(Self::NotFinite(num_updates))
    }
}

impl SkipCounter {
    pub(crate) fn new(limit: u64) -> Self {
        Self { limit, in_row: 0 }
    }

    /// Notes what became of `step`, counted from 1. The same on all ranks, but for the words of a reason.
    ///
    /// # Errors
    /// Beyond the limit, naming the step.
    pub(crate) fn note(&mut self, step: u64, skip: Option<&Skip>) -> Result<()> {
        let Some(skip) = skip else {
            self.in_row = 0;
            return Ok(());
        };
        self.in_row += 1;
        let (in_row, limit) = (self.in_row, self.limit);
        match skip {
            Skip::NotFinite(_) if in_row > limit => bail!(
                "step {step}: the gradients of {in_row} steps in a row were not finite, and train.max_skipped_steps is \
                 {limit}; lower train.learning_rate or train.max_grad_norm, and look at what the first of them trained on"
            ),
            Skip::Unjudged(reason) if in_row > limit => bail!(
                "step {step}: nothing could be trained on in {in_row} steps in a row, and train.max_skipped_steps is \
                 {limit}: no completion has a verdict: {reason}"
            ),
            Skip::NotFinite(num_skipped) => tracing::warn!(
                "step {step}: NON-FINITE GRADIENTS, {num_skipped} update(s) left out; {in_row} such step(s) in a row, {limit} are endured"
            ),
            Skip::Unjudged(reason) => tracing::warn!(
                "step {step}: NOTHING TRAINED, no completion has a verdict: {reason}; {in_row} such step(s) in a row, {limit} are endured"
            ),
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
            counter.note(step, Skip::not_finite(num_skipped).as_ref()).unwrap();
        }
        let error = counter.note(6, Skip::not_finite(1).as_ref()).unwrap_err().to_string();
        assert!(error.starts_with("step 6: the gradients of 3 steps in a row"), "{error}");
        assert!(error.contains("train.max_skipped_steps is 2"), "{error}");
    }

    #[test]
    fn none_are_endured_where_the_limit_is_0() {
        let mut counter = SkipCounter::new(0);
        counter.note(1, None).unwrap();
        assert!(counter.note(2, Some(&Skip::NotFinite(1))).is_err());
    }

    #[test]
    fn steps_without_a_verdict_end_a_run_by_name_as_well() {
        let mut counter = SkipCounter::new(1);
        let skip = Skip::Unjudged("reward mine (rewarder h:1): refused".to_owned());
        counter.note(1, Some(&skip)).unwrap();
        counter.note(2, None).unwrap();
        counter.note(3, Some(&skip)).unwrap();
        let error = counter.note(4, Some(&skip)).unwrap_err().to_string();
        assert!(error.contains("in 2 steps in a row") && error.contains("reward mine (rewarder h:1)"), "{error}");
    }
}
