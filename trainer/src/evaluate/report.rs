//! What came of a suite: figures, and a line for every prompt.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use aha_core::rollout::{Completion, FinishReason, Group, Reward};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::statistics;

const UNPARSABLE: &str = "unparsable";

/// The figures of one suite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub prompts: usize,
    /// Completions of a prompt.
    pub num_samples: usize,
    /// The share of right completions: the mean over prompts.
    pub accuracy: f64,
    /// Of 95 %, for the accuracy.
    pub interval: [f64; 2],
    /// pass@k by k.
    pub pass_at: BTreeMap<usize, f64>,
    /// Mean completion length in tokens.
    pub mean_length: f64,
    /// Share of the completions that did not end by themselves.
    pub truncated: f64,
    /// Share of the completions with nothing to judge.
    pub unparsable: f64,
    pub seconds: f64,
}

/// Means of several suites, each with the same weight.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Average {
    pub accuracy: f64,
    pub mean_length: f64,
}

/// One prompt with its completions, as a line of JSON.
#[derive(Debug, Serialize)]
struct Item<'a> {
    prompt_id: u64,
    prompt: &'a str,
    prompt_token_ids: &'a [u32],
    /// The row, with the answer.
    columns: &'a serde_json::Map<String, serde_json::Value>,
    /// Completions that were right.
    right: usize,
    completions: Vec<Line<'a>>,
}

#[derive(Debug, Serialize)]
struct Line<'a> {
    text: &'a str,
    token_ids: &'a [u32],
    finish_reason: FinishReason,
    is_right: bool,
    rewards: &'a [Reward],
}

impl<'a> Item<'a> {
    fn of(group: &'a Group) -> Self {
        let line = |completion: &'a Completion| {
            let Completion { text, token_ids, finish_reason, rewards, .. } = completion;
            Line { text, token_ids, finish_reason: *finish_reason, is_right: is_right(completion), rewards }
        };
        Self {
            prompt_id: group.prompt.id.0,
            prompt: &group.prompt.text,
            prompt_token_ids: &group.prompt.token_ids,
            columns: &group.prompt.columns,
            right: num_right(group),
            completions: group.completions.iter().map(line).collect(),
        }
    }
}

/// The reward that decides; a completion without one is wrong.
fn is_right(completion: &Completion) -> bool {
    completion.rewards.first().is_some_and(|reward| reward.score >= 1.0)
}

fn num_right(group: &Group) -> usize {
    group.completions.iter().filter(|completion| is_right(completion)).count()
}

impl Report {
    /// Of the groups of a suite, all of which have `num_samples` completions, whose first reward decides what is right. A
    /// group with a completion that nobody could judge does not count.
    #[must_use]
    pub fn of(groups: &[Group], num_samples: usize, took: Duration) -> Self {
        let is_judged = |completion: &Completion| completion.rewards.first().is_none_or(Reward::is_verdict);
        let groups: Vec<&Group> = groups.iter().filter(|group| group.completions.iter().all(is_judged)).collect();
        let right: Vec<usize> = groups.iter().map(|group| num_right(group)).collect();
        let (accuracy, interval) = statistics::accuracy(&right, num_samples);
        let num_prompts = groups.len().max(1) as f64;
        let pass_at =
            |k| right.iter().map(|&right| statistics::pass_at(k, right, num_samples)).sum::<f64>() / num_prompts;
        let completions = || groups.iter().flat_map(|group| &group.completions);
        let num_completions = completions().count().max(1) as f64;
        let share = |is_counted: fn(&Completion) -> bool| {
            completions().filter(|completion| is_counted(completion)).count() as f64 / num_completions
        };
        let num_tokens: usize = completions().map(|completion| completion.token_ids.len()).sum();
        Self {
            prompts: groups.len(),
            num_samples,
            accuracy,
            interval,
            pass_at: statistics::ks(num_samples).into_iter().map(|k| (k, pass_at(k))).collect(),
            mean_length: num_tokens as f64 / num_completions,
            truncated: share(|completion| completion.finish_reason == FinishReason::Length),
            unparsable: share(|c| c.rewards.first().is_some_and(|reward| reward.outcome == UNPARSABLE)),
            seconds: took.as_secs_f64(),
        }
    }

    /// The figures by name, without those of time.
    pub fn metrics(&self) -> impl Iterator<Item = (String, f64)> {
        let pass_at = self.pass_at.iter().filter(|(k, _)| **k > 1).map(|(k, value)| (format!("pass_at_{k}"), *value));
        [
            ("accuracy", self.accuracy),
            ("mean_length", self.mean_length),
            ("truncated", self.truncated),
            ("unparsable", self.unparsable),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .chain(pass_at)
    }
}

impl Average {
    /// None of no suites.
    #[must_use]
    pub fn of<'a>(reports: impl IntoIterator<Item = &'a Report>) -> Option<Self> {
        let reports: Vec<&Report> = reports.into_iter().collect();
        let mean =
            |value: fn(&Report) -> f64| reports.iter().map(|report| value(report)).sum::<f64>() / reports.len() as f64;
        let average = Self { accuracy: mean(|report| report.accuracy), mean_length: mean(|report| report.mean_length) };
        (!reports.is_empty()).then_some(average)
    }
}

/// Writes a line for every prompt of a suite to `path`, whose folder is made.
///
/// # Errors
/// Names the file that cannot be written.
pub fn write_items(path: &Path, groups: &[Group]) -> Result<()> {
    let mut text = Vec::new();
    for group in groups {
        serde_json::to_writer(&mut text, &Item::of(group))?;
        writeln!(text)?;
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(path, text));
    written.with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use aha_core::ids::PromptId;
    use aha_core::rollout::{Origin, Prompt};
    use serde_json::{Value, json};

    use super::*;

    fn completion(sample_index: u32, outcome: &str, num_tokens: usize, finish_reason: FinishReason) -> Completion {
        let score = f32::from(u8::from(outcome == "score"));
        let reward =
            |function: &str, score| Reward { function: function.to_owned(), score, outcome: outcome.to_owned() };
        Completion {
            prompt_id: PromptId(0),
            sample_index,
            token_ids: vec![7; num_tokens],
            logprobs: vec![-0.5; num_tokens],
            spans: Vec::new(),
            finish_reason,
            text: "x".to_owned(),
            rewards: vec![reward("equation", score), reward("format", 1.0 - score)],
            raw_logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
        }
    }

    fn groups() -> Vec<Group> {
        let columns = json!({"target": 5}).as_object().unwrap().clone();
        let prompt = |id| Prompt {
            id: PromptId(id),
            text: "q".to_owned(),
            token_ids: vec![1],
            columns: columns.clone(),
            origin: Origin::default(),
        };
        let (stop, length) = (FinishReason::Stop, FinishReason::Length);
        vec![
            Group {
                prompt: prompt(3),
                completions: vec![completion(0, "score", 2, stop), completion(1, "wrong", 4, stop)],
            },
            Group {
                prompt: prompt(4),
                completions: vec![completion(0, "unparsable", 8, length), completion(1, "wrong", 2, stop)],
            },
        ]
    }

    #[test]
    fn the_first_reward_decides() {
        let report = Report::of(&groups(), 2, Duration::from_secs(3));
        assert_eq!((report.prompts, report.accuracy, report.mean_length), (2, 0.25, 4.0));
        assert_eq!(report.pass_at, BTreeMap::from([(1, 0.25), (2, 0.5)]));
        assert_eq!((report.truncated, report.unparsable, report.seconds), (0.25, 0.25, 3.0));
        let names: Vec<String> = report.metrics().map(|(name, _)| name).collect();
        assert_eq!(names, ["accuracy", "mean_length", "truncated", "unparsable", "pass_at_2"]);
        let back: Report = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
        assert_eq!(back, report);
    }

    #[test]
    fn suites_count_alike_whatever_their_size() {
        let report = |accuracy, prompts| Report { accuracy, prompts, ..Report::of(&[], 1, Duration::ZERO) };
        let average = Average::of([&report(1.0, 10), &report(0.0, 1000)]).unwrap();
        assert_eq!(average.accuracy, 0.5);
        assert_eq!(Average::of([]), None);
    }

    #[test]
    fn every_prompt_has_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("evaluations/x.jsonl");
        write_items(&path, &groups()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((lines.len(), &lines[1]["prompt_id"], &lines[0]["columns"]["target"]), (2, &json!(4), &json!(5)));
        assert_eq!((&lines[0]["right"], &lines[1]["right"]), (&json!(1), &json!(0)));
        let first = &lines[0]["completions"][0];
        assert_eq!(
            (&first["is_right"], &first["token_ids"], &first["finish_reason"]),
            (&json!(true), &json!([7, 7]), &json!("stop"))
        );
        assert_eq!(first["rewards"][1], json!({"function": "format", "score": 0.0, "outcome": "score"}));
    }
}
