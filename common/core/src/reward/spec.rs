//! A reward function as a configuration names it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{EXTERNAL, ExternalReward, RewardError, RewardFunction};

/// One entry of `rewards`: keys beside these three are the function's options.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RewardSpec {
    pub function: String,
    /// The name in metrics, unique among `rewards`; unset takes the function's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Of its score in the reward.
    pub weight: f32,
    #[serde(flatten)]
    pub options: Map<String, Value>,
}

impl Default for RewardSpec {
    fn default() -> Self {
        Self { function: String::new(), name: None, weight: 1.0, options: Map::new() }
    }
}

impl RewardSpec {
    /// `function` without options, of weight 1.
    #[must_use]
    pub fn of(function: &str) -> Self {
        Self { function: function.to_owned(), ..Self::default() }
    }

    /// The name in metrics.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.function)
    }

    /// Whether trainers ask somebody for it: generators know nothing of it.
    #[must_use]
    pub fn is_external(&self) -> bool {
        EXTERNAL.contains(&self.function.as_str())
    }

    /// Without the options that say how somebody is asked, and not who judges what.
    #[must_use]
    pub fn without_means(&self) -> Self {
        let mut spec = self.clone();
        if self.is_external() {
            spec.options.retain(|option, _| ["command", "range"].contains(&option.as_str()));
        }
        spec
    }

    /// Whether it can be used.
    ///
    /// # Errors
    /// Names functions that are none, and options that the function does not have or cannot use.
    pub fn check(&self) -> Result<(), RewardError> {
        if self.is_external() { ExternalReward::new(self).map(drop) } else { RewardFunction::new(self).map(drop) }
    }
}
