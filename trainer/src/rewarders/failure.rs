//! Why a batch has got no verdict.

use aha_core::reward::Outcome;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) kind: FailureKind,
    pub(super) reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    /// Nobody is there.
    Gone,
    /// Nothing came in time.
    Late,
    /// It is there and says that it failed.
    Failed,
    /// What it says cannot be used, and is not asked for again.
    Lied,
}

/// Of one completion in an answer: what it is worth, or why that is not known.
pub(super) type Verdict = Result<Outcome, String>;

impl Failure {
    pub(super) fn gone(reason: impl Into<String>) -> Self {
        Self { kind: FailureKind::Gone, reason: reason.into() }
    }

    pub(super) fn late(reason: impl Into<String>) -> Self {
        Self { kind: FailureKind::Late, reason: reason.into() }
    }

    pub(super) fn failed(reason: impl Into<String>) -> Self {
        Self { kind: FailureKind::Failed, reason: reason.into() }
    }

    pub(super) fn lied(reason: impl Into<String>) -> Self {
        Self { kind: FailureKind::Lied, reason: reason.into() }
    }

    /// What becomes of the completions.
    pub(super) fn outcome(&self) -> Outcome {
        if self.kind == FailureKind::Late { Outcome::Timeout } else { Outcome::Crash }
    }

    /// Whether it would fail at others too.
    pub(super) fn is_down(&self) -> bool {
        matches!(self.kind, FailureKind::Gone | FailureKind::Late)
    }
}
