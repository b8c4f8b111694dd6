//! Learning-rate schedules, as in transformers' `get_scheduler`.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    Constant,
    /// To 0 along a line.
    #[default]
    Linear,
    /// To 0 along half a cosine.
    Cosine,
    /// To `min_lr_rate` of the peak along half a cosine.
    CosineWithMinLr,
}

/// A schedule over a whole run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub kind: LrSchedulerType,
    pub learning_rate: f64,
    /// Share of the peak that `CosineWithMinLr` ends at.
    pub min_lr_rate: f64,
    pub warmup_steps: u64,
    pub max_steps: u64,
}

impl Schedule {
    /// Learning rate of `step`, counted from 0. As in transformers, step 0 of a warm-up has rate 0.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * step as f64 / self.warmup_steps as f64;
        }
        let span = self.max_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / span).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        let factor = match self.kind {
            LrSchedulerType::Constant => 1.0,
            LrSchedulerType::Linear => 1.0 - progress,
            LrSchedulerType::Cosine => cosine,
            LrSchedulerType::CosineWithMinLr => self.min_lr_rate + (1.0 - self.min_lr_rate) * cosine,
        };
        self.learning_rate * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(kind: LrSchedulerType, expect: [f64; 5]) {
        let schedule = Schedule { kind, learning_rate: 2.0, min_lr_rate: 0.1, warmup_steps: 2, max_steps: 10 };
        for (step, expect) in [0, 1, 2, 6, 10].into_iter().zip(expect) {
            assert!((schedule.at(step) - expect).abs() < 1e-12, "{kind:?} at {step}: {}", schedule.at(step));
        }
    }

    // Expected values: transformers' get_scheduler(...) with peak 2.0, warm-up 2, 10 steps.
    #[test]
    fn schedules_match_transformers() {
        check(LrSchedulerType::Constant, [0.0, 1.0, 2.0, 2.0, 2.0]);
        check(LrSchedulerType::Linear, [0.0, 1.0, 2.0, 1.0, 0.0]);
        check(LrSchedulerType::Cosine, [0.0, 1.0, 2.0, 1.0, 0.0]);
        check(LrSchedulerType::CosineWithMinLr, [0.0, 1.0, 2.0, 1.1, 0.2]);
    }
}
