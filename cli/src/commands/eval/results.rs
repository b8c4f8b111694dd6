//! The figures of all suites, as a table and as JSON.

use std::fmt;
use std::path::{Path, PathBuf};

use aha_core::config::{AVERAGE, Suite};
use aha_trainer::evaluate::{Average, Report};
use anyhow::Result;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::commands::table::Table;

/// What `summary.json` holds.
#[derive(Debug, Serialize)]
pub(super) struct Results {
    model: PathBuf,
    seed: u64,
    #[serde(serialize_with = "by_name")]
    suites: Vec<SuiteResult>,
    average: Option<Average>,
}

#[derive(Debug, Serialize)]
struct SuiteResult {
    #[serde(skip)]
    name: String,
    temperature: f32,
    top_p: f32,
    max_completion_length: u32,
    #[serde(flatten)]
    report: Report,
}

impl Results {
    pub(super) fn new(model: &Path, seed: u64) -> Self {
        Self { model: model.to_owned(), seed, suites: Vec::new(), average: None }
    }

    pub(super) fn push(&mut self, suite: &Suite, report: Report) {
        self.suites.push(SuiteResult {
            name: suite.name.clone(),
            temperature: suite.sampling.temperature,
            top_p: suite.sampling.top_p,
            max_completion_length: suite.sampling.max_tokens,
            report,
        });
        self.average = Average::of(self.suites.iter().map(|suite| &suite.report));
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        super::write(path, &format!("{}\n", serde_json::to_string_pretty(self)?))
    }
}

fn by_name<S: Serializer>(suites: &[SuiteResult], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(suites.len()))?;
    for suite in suites {
        map.serialize_entry(&suite.name, suite)?;
    }
    map.end()
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let mut table = Table::new([
            "SUITE",
            "PROMPTS",
            "N",
            "ACCURACY",
            "95 %",
            "PASS@K",
            "TOKENS",
            "TRUNCATED",
            "UNPARSABLE",
            "SECONDS",
        ]);
        for SuiteResult { name, report, .. } in &self.suites {
            let [low, high] = report.interval.map(|bound| 100.0 * bound);
            let pass_at = report.pass_at.iter().filter(|(k, _)| **k > 1);
            let pass_at: Vec<String> = pass_at.map(|(k, share)| format!("{k}: {}", percent(*share))).collect();
            table.push([
                name.clone(),
                report.prompts.to_string(),
                report.num_samples.to_string(),
                percent(report.accuracy),
                format!("{low:.1} to {high:.1}"),
                pass_at.join("  "),
                format!("{:.1}", report.mean_length),
                percent(report.truncated),
                percent(report.unparsable),
                format!("{:.1}", report.seconds),
            ]);
        }
        if let Some(average) = self.average.filter(|_| self.suites.len() > 1) {
            let mut row = [const { String::new() }; 10];
            (row[0], row[3], row[6]) =
                (AVERAGE.to_owned(), percent(average.accuracy), format!("{:.1}", average.mean_length));
            table.push(row);
        }
        write!(f, "{table}")
    }
}
