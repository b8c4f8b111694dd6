//! What a loss counts, for the metrics.

use tch::{Kind, Tensor};

/// Sums over completion tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossSums {
    /// The KL term, before `beta`.
    pub kl: f64,
    /// Tokens whose ratio was clipped from below and above.
    pub clipped_low: f64,
    pub clipped_high: f64,
    /// Tokens whose policy loss was left out: by the policy mask, by the correction's, or as too far off the policy.
    pub masked: f64,
    /// The ratio between trainer and generator that the policy loss is multiplied by.
    pub correction: f64,
    pub correction_min: f64,
    pub correction_max: f64,
}

/// A number of [`LossSums`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    Kl,
    ClippedLow,
    ClippedHigh,
    Masked,
    Correction,
    CorrectionMin,
    CorrectionMax,
}

impl Default for LossSums {
    fn default() -> Self {
        Self {
            kl: 0.0,
            clipped_low: 0.0,
            clipped_high: 0.0,
            masked: 0.0,
            correction: 0.0,
            correction_min: f64::INFINITY,
            correction_max: f64::NEG_INFINITY,
        }
    }
}

impl LossSums {
    /// Adds what some tokens gave.
    pub fn count(&mut self, what: Count, value: f64) {
        match what {
            Count::Kl => self.kl += value,
            Count::ClippedLow => self.clipped_low += value,
            Count::ClippedHigh => self.clipped_high += value,
            Count::Masked => self.masked += value,
            Count::Correction => self.correction += value,
            Count::CorrectionMin => self.correction_min = self.correction_min.min(value),
            Count::CorrectionMax => self.correction_max = self.correction_max.max(value),
        }
    }

    /// Adds what other tokens gave.
    pub fn add(&mut self, other: &Self) {
        self.kl += other.kl;
        self.clipped_low += other.clipped_low;
        self.clipped_high += other.clipped_high;
        self.masked += other.masked;
        self.correction += other.correction;
        self.correction_min = self.correction_min.min(other.correction_min);
        self.correction_max = self.correction_max.max(other.correction_max);
    }
}

/// The sum of `values`, a scalar on their device.
pub(super) fn total(values: &Tensor) -> Tensor {
    values.detach().sum(Kind::Double)
}
