//! `cargo xtask test`: everything a change must pass, in the order in which it fails soonest.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::libtorch;
use crate::process::{Stage, Status, human, run_stage};
use crate::workspace::Workspace;

/// With the optional features, which the stages after it do without.
const CLIPPY: &str = "clippy --workspace --all-targets --features aha/otel,aha/hub -- -D warnings";
/// What only a binary with the feature has.
const HUB: &str = "test --package aha --features hub hub";

/// Runs every stage, even after one failed, and prints which did. Tests are skipped only where the build fails.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Status> {
    let start = Instant::now();
    libtorch::setup(workspace, None, false)?;
    let setup = Stage { name: "set-up", status: Status::Success, elapsed: start.elapsed() };

    let mut stages = vec![
        setup,
        run_stage("fmt", workspace.cargo().args(["fmt", "--all", "--check"]))?,
        run_stage("clippy", workspace.cargo().args(CLIPPY.split(' ')))?,
        // The whole-run tests start this binary and look for it in their own profile's folder.
        run_stage("build", workspace.cargo().args(["build", "--package", "aha"]))?,
    ];
    if stages.last().is_some_and(|build| build.status == Status::Success) {
        stages.push(run_stage("test", &mut test_command(workspace))?);
        stages.push(run_stage("hub", workspace.cargo().args(HUB.split(' ')))?);
    }
    eprint!("{}", summary(&stages, start.elapsed()));
    let failed = stages.iter().any(|stage| stage.status != Status::Success);
    Ok(if failed { Status::Failure(1) } else { Status::Success })
}

fn test_command(workspace: &Workspace) -> Command {
    let mut test = workspace.cargo();
    test.args(["test", "--workspace", "--no-fail-fast"]);
    // Tests already run side by side; libtorch's own threads on top of that only fight for the cores.
    test.env("OMP_NUM_THREADS", "1");
    test
}

fn summary(stages: &[Stage], total: Duration) -> String {
    let mut table = String::from("\n");
    for Stage { name, status, elapsed } in stages {
        let verdict = match status {
            Status::Success => "ok".to_owned(),
            Status::Failure(code) => format!("FAILED (exit code {code})"),
        };
        table += &format!("  {name:<8}{:>8}  {verdict}\n", human(*elapsed));
    }
    table += &format!("  {:<8}{:>8}\n", "total", human(total));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_names_what_failed() {
        let stage = |name, status| Stage { name, status, elapsed: Duration::from_secs(90) };
        let stages = [stage("fmt", Status::Success), stage("test", Status::Failure(101))];
        let table = summary(&stages, Duration::from_secs(180));
        assert_eq!(table, "\n  fmt        1m30s  ok\n  test       1m30s  FAILED (exit code 101)\n  total      3m00s\n");
    }
}
