//! The figures of one step, in the order in which they were set.

use serde::{Serialize, Serializer};

/// Names that more than one place has to agree on; TRL's where TRL has one. `rewards/FUNCTION/mean` and `/std` join them.
pub mod names {
    pub const REWARD: &str = "reward";
    pub const REWARD_STD: &str = "reward_std";
    pub const LOSS: &str = "loss";
    pub const LEARNING_RATE: &str = "learning_rate";
    pub const GRAD_NORM: &str = "grad_norm";
    /// Updates of the step that were left out, because their gradients were not finite or nothing in them was judged.
    pub const SKIPPED_UPDATES: &str = "skipped_updates";
    pub const KL: &str = "kl";
    pub const ENTROPY: &str = "entropy";
    /// Tokens.
    pub const MEAN_LENGTH: &str = "completions/mean_length";
    /// Share of the completions that were cut off, in 0..=1.
    pub const CLIPPED_RATIO: &str = "completions/clipped_ratio";
    /// Largest |trainer log-prob - generator log-prob| of a sampled token.
    pub const LOGP_DIFFERENCE_MAX: &str = "sampling/sampling_logp_difference/max";
    pub const LOGP_DIFFERENCE_MEAN: &str = "sampling/sampling_logp_difference/mean";
    /// Of prompts and completions.
    pub const NUM_TOKENS: &str = "num_tokens";
    /// Seconds of the whole step.
    pub const STEP_TIME: &str = "step_time";
    /// Seconds that the step waited for completions.
    pub const TIME_GENERATE: &str = "time/generate";
    /// Seconds of forward, backward and update.
    pub const TIME_TRAIN: &str = "time/train";
    /// Seconds of the weight push.
    pub const TIME_PUSH: &str = "weights/push_seconds";
    /// Prompt and completion tokens of the step over its whole time.
    pub const TOKENS_PER_SECOND: &str = "tokens_per_second/step";
}

/// Metric values by name, in the order of their first [`set`](Metrics::set): the same in every file and on every step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics(Vec<(String, f64)>);

impl Metrics {
    /// Sets a value; a name that is already there keeps its place.
    pub fn set(&mut self, name: impl Into<String>, value: f64) {
        let name = name.into();
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }

    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }
}

impl<S: Into<String>> FromIterator<(S, f64)> for Metrics {
    fn from_iter<I: IntoIterator<Item = (S, f64)>>(values: I) -> Self {
        let mut metrics = Self::default();
        metrics.extend(values);
        metrics
    }
}

impl<S: Into<String>> Extend<(S, f64)> for Metrics {
    fn extend<I: IntoIterator<Item = (S, f64)>>(&mut self, values: I) {
        for (name, value) in values {
            self.set(name, value);
        }
    }
}

/// A JSON object with every digit of every value; JSON has no NaN and no infinity, they become null.
impl Serialize for Metrics {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().map(|(name, value)| (name, value.is_finite().then_some(value))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_the_first_set() {
        let mut metrics = Metrics::from_iter([("loss", 1.0), ("kl", f64::NAN), ("reward", 0.1 + 0.2)]);
        metrics.set("loss", -0.0);
        let json = serde_json::to_string(&metrics).unwrap();
        assert_eq!(json, r#"{"loss":-0.0,"kl":null,"reward":0.30000000000000004}"#);
        assert_eq!(metrics.get("reward"), Some(0.1 + 0.2));
        assert_eq!(metrics.get("accuracy"), None);
    }
}
