//! `evaluations.jsonl`: one JSON object an evaluation.

use std::collections::BTreeMap;
use std::path::Path;

use aha_core::config::{AVERAGE, HELD_OUT};
use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::report::{Average, Report};

const FILE: &str = "evaluations.jsonl";

/// One line of `evaluations.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps done.
    pub step: u64,
    /// Share of the held-out prompts that were answered right; where none are asked, the suites' mean accuracy.
    pub accuracy: f64,
    /// That the accuracy is of.
    pub prompts: usize,
    /// Mean completion length in tokens.
    pub mean_length: f64,
    /// Of every suite, and of held-out prompts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub suites: BTreeMap<String, Report>,
    /// Of the suites, without held-out prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average: Option<Average>,
}

impl Evaluation {
    pub(super) fn of(step: u64, reports: Vec<(String, Report)>) -> Self {
        let average = Average::of(reports.iter().filter(|(name, _)| name != HELD_OUT).map(|(_, report)| report));
        let suites: BTreeMap<String, Report> = reports.into_iter().collect();
        let (accuracy, prompts, mean_length) = match (suites.get(HELD_OUT), average) {
            (Some(report), _) => (report.accuracy, report.prompts, report.mean_length),
            (None, average) => {
                let Average { accuracy, mean_length } = average.unwrap_or(Average { accuracy: 0.0, mean_length: 0.0 });
                (accuracy, suites.values().map(|report| report.prompts).sum(), mean_length)
            }
        };
        Self { step, accuracy, prompts, mean_length, suites, average }
    }

    /// The accuracy that `eval.metric` names.
    #[must_use]
    pub fn metric(&self, name: &str) -> Option<f64> {
        let average = || self.average.filter(|_| name == AVERAGE).map(|average| average.accuracy);
        self.suites.get(name).map(|report| report.accuracy).or_else(average)
    }

    /// Every figure, as `eval/SUITE/accuracy`.
    pub fn metrics(&self) -> impl Iterator<Item = (String, f64)> {
        let of_suite = |(suite, report): (&String, &Report)| {
            let suite = suite.clone();
            report.metrics().map(move |(name, value)| (format!("eval/{suite}/{name}"), value)).collect::<Vec<_>>()
        };
        let average = self.average.into_iter().flat_map(|average| {
            [("accuracy", average.accuracy), ("mean_length", average.mean_length)]
                .map(|(name, value)| (format!("eval/{AVERAGE}/{name}"), value))
        });
        self.suites.iter().flat_map(of_suite).chain(average)
    }
}

#[cfg(test)]
impl Evaluation {
    /// On held-out prompts alone.
    pub(crate) fn example(accuracy: f64) -> Self {
        let report = Report { accuracy, ..Report::of(&[], 1, std::time::Duration::ZERO) };
        Self::of(3, vec![(HELD_OUT.to_owned(), report)])
    }
}

/// Adds what was found after `step` steps to the run's file, in place of what a run before this one found from there on.
///
/// # Errors
/// If it cannot be written.
pub fn record(run_dir: &Path, step: u64, evaluation: &impl Serialize) -> Result<()> {
    let mut all: Vec<Value> = lines(run_dir)?;
    all.retain(|known| known["step"].as_u64().is_some_and(|known| known < step));
    all.push(serde_json::to_value(evaluation)?);
    let mut text = String::new();
    for evaluation in &all {
        text.push_str(&serde_json::to_string(evaluation)?);
        text.push('\n');
    }
    let path = run_dir.join(FILE);
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

/// The evaluations of a run so far, oldest first.
///
/// # Errors
/// If the file is there and cannot be read.
pub fn read(run_dir: &Path) -> Result<Vec<Evaluation>> {
    lines(run_dir)
}

fn lines<T: DeserializeOwned>(run_dir: &Path) -> Result<Vec<T>> {
    let path = run_dir.join(FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("{}: {line:?}", path.display())))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn report(accuracy: f64, prompts: usize) -> Report {
        Report { accuracy, prompts, ..Report::of(&[], 1, Duration::ZERO) }
    }

    #[test]
    fn held_out_prompts_are_no_part_of_the_average() {
        let named = |names: &[(&str, f64)]| {
            Evaluation::of(3, names.iter().map(|&(name, accuracy)| (name.to_owned(), report(accuracy, 10))).collect())
        };
        let all = named(&[("held_out", 1.0), ("a", 0.5), ("b", 0.25)]);
        assert_eq!((all.accuracy, all.prompts), (1.0, 10));
        assert_eq!(
            [all.metric("held_out"), all.metric("b"), all.metric("average")],
            [Some(1.0), Some(0.25), Some(0.375)]
        );
        assert_eq!(all.metric("c"), None);
        let metrics: BTreeMap<String, f64> = all.metrics().collect();
        assert_eq!((metrics["eval/average/accuracy"], metrics["eval/a/accuracy"]), (0.375, 0.5));
        let suites = named(&[("a", 0.5), ("b", 0.25)]);
        assert_eq!((suites.accuracy, suites.prompts), (0.375, 20));
        assert_eq!(named(&[("held_out", 1.0)]).metric("average"), None);
    }

    #[test]
    fn a_file_of_before_there_were_suites_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let old = "{\"step\":0,\"accuracy\":0.25,\"prompts\":8,\"mean_length\":3.5}\n";
        std::fs::write(folder.path().join(FILE), old).unwrap();
        assert_eq!(read(folder.path()).unwrap()[0].accuracy, 0.25);
        let evaluations = [2, 4, 2].map(|step| Evaluation::of(step, vec![("a".to_owned(), report(0.5, 10))]));
        for evaluation in &evaluations {
            record(folder.path(), evaluation.step, evaluation).unwrap();
        }
        let all = read(folder.path()).unwrap();
        assert_eq!(all.iter().map(|known| known.step).collect::<Vec<_>>(), [0, 2], "a run that went back");
        assert_eq!(all[1], evaluations[2]);
        assert!(std::fs::read_to_string(folder.path().join(FILE)).unwrap().starts_with(old));
    }
}
