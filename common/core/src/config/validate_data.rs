//! What the sources of prompts must satisfy.

use super::validate::Problems;
use super::{DataSource, RunConfig, Source};
use crate::dataset::Filter;
use crate::nearest::hint;

/// Longest name of a source.
const MAX_NAME: usize = 64;

impl RunConfig {
    pub(super) fn check_data(&self, problems: &mut Problems) {
        let data = &self.data;
        problems.unless(data.max_prompt_length > 0, || "data.max_prompt_length: must be at least 1".to_owned());
        for (index, source) in data.all_sources().iter().enumerate() {
            let prefix = if data.sources.is_empty() { "data".to_owned() } else { format!("data.sources[{index}]") };
            self.check_source(&prefix, source, problems);
        }
        for (index, source) in data.sources.iter().enumerate() {
            self.check_name(index, source, problems);
        }
        let elsewhere = [
            ("path", data.path.is_some()),
            ("split", data.split.is_some()),
            ("subset", data.subset.is_some()),
            ("columns", !data.columns.is_empty()),
            ("filter", data.filter.is_some()),
            ("shuffle_seed", data.shuffle_seed.is_some()),
            ("take", data.take.is_some()),
        ];
        for (key, is_set) in elsewhere {
            problems.unless(data.sources.is_empty() || !is_set, || {
                format!("data.{key}: is of one source, and data.sources has several: set it there")
            });
        }
    }

    fn check_source(&self, prefix: &str, source: &Source, problems: &mut Problems) {
        let needs_path = source.source != DataSource::Countdown;
        problems
            .unless(!needs_path || source.path.is_some(), || format!("{prefix}.path: missing; a file source reads it"));
        let held_out = source.held_out.unwrap_or_default();
        problems
            .unless((0.0..1.0).contains(&held_out), || format!("{prefix}.held_out: must be in [0, 1), got {held_out}"));
        let has_prompt = source.prompt.as_ref().is_some_and(|prompt| !prompt.user.is_empty());
        problems.unless(has_prompt || self.sft.messages.is_some(), || {
            format!(
                "{prefix}.prompt.user: missing; write the question as a template over the row's columns, or name a \
                 template"
            )
        });
        problems.unless(source.take != Some(0), || format!("{prefix}.take: must be at least 1"));
        if let Some(Err(error)) = source.filter.as_deref().map(Filter::new) {
            problems.0.push(format!("{prefix}.filter: {error}"));
        }
        let puzzle = &source.countdown;
        problems.unless((1..=6).contains(&puzzle.numbers), || {
            format!("{prefix}.countdown.numbers: must be 1 to 6, got {}", puzzle.numbers)
        });
        problems.unless(puzzle.min_number >= 1 && puzzle.min_number <= puzzle.max_number, || {
            format!("{prefix}.countdown: numbers from {} to {} are none", puzzle.min_number, puzzle.max_number)
        });
        let operations = !puzzle.operations.is_empty() && puzzle.operations.chars().all(|c| "+-*/".contains(c));
        problems.unless(operations, || {
            format!("{prefix}.countdown.operations: must be some of +-*/, got {:?}", puzzle.operations)
        });
        problems.unless(puzzle.size > 0, || format!("{prefix}.countdown.size: must be at least 1"));
    }

    /// What only one of several sources has.
    fn check_name(&self, index: usize, source: &Source, problems: &mut Problems) {
        let name = source.name.as_str();
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        problems.unless((1..=MAX_NAME).contains(&name.len()) && name.chars().all(is_plain), || {
            format!("data.sources[{index}].name: must be 1 to {MAX_NAME} letters, digits, - or _, got {name:?}")
        });
        problems.unless(self.data.sources[..index].iter().all(|other| other.name != name), || {
            format!("data.sources[{index}].name: {name:?} is the name of another source")
        });
        problems.positive(&format!("data.sources[{index}].weight"), source.weight);
        let known = || self.rewards.iter().map(|reward| reward.name());
        for reward in source.rewards.iter().flatten() {
            problems.unless(known().any(|name| name == reward), || {
                let hint = hint(reward, known());
                format!("data.sources[{index}].rewards: {reward:?} is not the name of one of rewards{hint}")
            });
        }
        problems.unless(source.rewards.as_ref().is_none_or(|rewards| !rewards.is_empty()), || {
            format!("data.sources[{index}].rewards: names none; leave it out for all of them")
        });
    }
}

impl Source {
    /// Whether the reward of this name scores its completions.
    #[must_use]
    pub fn asks_for(&self, reward: &str) -> bool {
        self.rewards.as_ref().is_none_or(|rewards| rewards.iter().any(|name| name == reward))
    }
}
