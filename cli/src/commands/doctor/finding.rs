//! What a check came to.

use std::fmt;

use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Severity {
    Ok,
    /// A run works, but not as well as it could, or not where something is asked of it that was not checked.
    Warning,
    /// A run fails.
    Problem,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) check: &'static str,
    pub(super) severity: Severity,
    pub(super) finding: String,
    /// What to do about it; none where all is well.
    pub(super) fix: Option<String>,
}

impl Finding {
    pub(super) fn ok(check: &'static str, finding: impl Into<String>) -> Self {
        Self { check, severity: Severity::Ok, finding: finding.into(), fix: None }
    }

    pub(super) fn warning(check: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, severity: Severity::Warning, finding: finding.into(), fix: Some(fix.into()) }
    }

    pub(super) fn problem(check: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { severity: Severity::Problem, ..Self::warning(check, finding, fix) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Ok => "ok",
            Severity::Warning => "warning",
            Severity::Problem => "problem",
        };
        // Messages of libraries may have several lines.
        let indent = |text: &str| text.replace('\n', "\n                         ");
        writeln!(f, "{severity:<8} {:<15} {}", self.check, indent(&self.finding))?;
        self.fix.as_ref().map_or(Ok(()), |fix| writeln!(f, "{:<24} fix: {}", "", indent(fix)))
    }
}

/// Bytes for people.
pub(super) fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64)
}
