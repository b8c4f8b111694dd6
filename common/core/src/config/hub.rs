//! Pushes to the Hugging Face Hub while a run trains.

use serde::{Deserialize, Serialize};

use super::validate::Problems;
use crate::hub::RepositoryId;

/// TRL's `push_to_hub`, `hub_model_id`, `hub_private_repo` and `hub_strategy`. The token is no part of it: it comes from
/// `HF_TOKEN`, or the file that `hf auth login` wrote.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hub {
    /// Trainer rank 0 pushes; in a binary built with the feature `hub`.
    pub push: bool,
    /// `owner/name`; the repository is created where there is none.
    pub model_id: Option<String>,
    /// Whether a repository that is created is private; TRL's default is the owner's.
    pub private: bool,
    pub strategy: HubStrategy,
    /// How long the end of the run waits for pushes; one that takes longer is given up.
    pub timeout_seconds: f64,
}

/// When something is pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HubStrategy {
    /// After every checkpoint, without the trainer's state, where no push is under way; the finished model in the end.
    #[default]
    EverySave,
    /// The finished model.
    End,
}

impl Default for Hub {
    fn default() -> Self {
        Self { push: false, model_id: None, private: true, strategy: HubStrategy::EverySave, timeout_seconds: 3600.0 }
    }
}

impl Hub {
    /// The repository that is pushed to.
    #[must_use]
    pub fn repository(&self) -> Option<RepositoryId> {
        self.model_id.as_deref().and_then(RepositoryId::parse)
    }

    pub(super) fn check(&self, problems: &mut Problems) {
        problems.unless(!self.push || self.model_id.is_some(), || {
            "hub.model_id: missing; name the repository that hub.push is for, as owner/name".to_owned()
        });
        problems.unless(self.model_id.is_none() || self.repository().is_some(), || {
            format!("hub.model_id: {:?} is not of the form owner/name", self.model_id.as_deref().unwrap_or_default())
        });
        problems.positive("hub.timeout_seconds", self.timeout_seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_push_needs_a_repository() {
        let problems = |hub: Hub| {
            let mut problems = Problems::default();
            hub.check(&mut problems);
            problems.0.join("\n")
        };
        assert_eq!(problems(Hub::default()), "");
        assert!(problems(Hub { push: true, ..Hub::default() }).starts_with("hub.model_id: missing"));
        let named = |name: &str| Hub { push: true, model_id: Some(name.to_owned()), ..Hub::default() };
        assert_eq!(problems(named("me/model")), "");
        assert!(problems(named("model")).contains("hub.model_id: \"model\""));
        assert!(problems(Hub { timeout_seconds: 0.0, ..Hub::default() }).contains("hub.timeout_seconds"));
    }
}
