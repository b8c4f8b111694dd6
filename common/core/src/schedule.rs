//! Learning-rate schedules, as in transformers' `get_scheduler`.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// Without a warm-up.
    Constant,
    ConstantWithWarmup,
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
        if step < self.warmup_steps && self.kind != LrSchedulerType::Constant {
            return self.learning_rate * step as f64 / self.warmup_steps as f64;
        }
        let span = self.max_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = (step.saturating_sub(self.warmup_steps) as f64 / span).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        let factor = match self.kind {
            LrSchedulerType::Constant | LrSchedulerType::ConstantWithWarmup => 1.0,
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

    /// The part of `tests/golden/optimizers.json` that is of schedules.
    #[derive(Deserialize)]
    struct Golden {
        schedules: Schedules,
    }

    #[derive(Deserialize)]
    struct Schedules {
        learning_rate: f64,
        max_steps: u64,
        min_lr_rate: f64,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        kind: LrSchedulerType,
        warmup_steps: u64,
        /// Of every step.
        rates: Vec<f64>,
    }

    /// `tests/golden/make_optimizers.py` writes the rates with transformers' own `get_scheduler`.
    #[test]
    fn whole_runs_have_the_rates_of_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/optimizers.json");
        let golden: Golden = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let Schedules { learning_rate, max_steps, min_lr_rate, cases } = golden.schedules;
        assert_eq!(cases.len(), 17);
        for Case { kind, warmup_steps, rates } in cases {
            let schedule = Schedule { kind, learning_rate, min_lr_rate, warmup_steps, max_steps };
            assert_eq!(rates.len() as u64, max_steps);
            for (step, expect) in (0..).zip(rates) {
                let rate = schedule.at(step);
                assert!((rate - expect).abs() < 1e-12, "{kind:?}, warm-up {warmup_steps}, step {step}: {rate}");
            }
        }
    }

    #[test]
    fn decay_ends_at_its_floor_and_stays_there() {
        let end = |kind| {
            let schedule = Schedule { kind, learning_rate: 2.0, min_lr_rate: 0.1, warmup_steps: 2, max_steps: 10 };
            assert_eq!(schedule.at(10), schedule.at(1000));
            schedule.at(10)
        };
        assert_eq!(end(LrSchedulerType::Linear), 0.0);
        assert_eq!(end(LrSchedulerType::Cosine), 0.0);
        assert!((end(LrSchedulerType::CosineWithMinLr) - 0.2).abs() < 1e-12);
    }
}
