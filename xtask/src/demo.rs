//! `cargo xtask demo`: from nothing to a policy that plays Countdown.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::libtorch;
use crate::process::{Stage, Status, human, run_stage};
use crate::workspace::Workspace;

const SFT_CONFIG: &str = "configs/countdown-tiny-sft.yaml";
const SFT_RUN: &str = "runs/countdown-tiny-sft";
const CONFIG: &str = "configs/countdown-tiny.yaml";
const RUN: &str = "runs/countdown-tiny";
/// Where either run leaves its trained model, last of all.
const FINAL_MODEL: &str = "model";
/// Written by a run of reinforcement learning that has come to its end.
const SUMMARY: &str = "summary.json";

/// Set-up, build, a short supervised phase, then the run itself, which takes this process's place and ends with its
/// exit code. What an earlier demo has finished is not done again.
pub(crate) fn run(workspace: &Workspace, fresh: bool) -> anyhow::Result<Status> {
    if fresh {
        for run in [SFT_RUN, RUN] {
            remove_run(workspace, run)?;
        }
    }
    let summary = workspace.path(RUN).join(SUMMARY);
    if summary.exists() {
        eprintln!("the demo is complete: see {RUN}/{SUMMARY}; `cargo xtask demo --fresh` starts over");
        eprint!("{}", fs::read_to_string(&summary).with_context(|| format!("cannot read {}", summary.display()))?);
        return Ok(Status::Success);
    }

    let start = Instant::now();
    // A Ctrl-C reaches the child as well: this process waits until the child has stopped by itself.
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).context("cannot catch signals")?;
    }
    let mut stages = Vec::new();
    libtorch::setup(workspace, None, false)?;
    stages.push(Stage { name: "set-up", status: Status::Success, elapsed: start.elapsed() });
    stages.push(run_stage("build", &mut build_command(workspace))?);
    let aha = workspace.release_binary()?;
    if go_on(&stages, &interrupted) && !workspace.path(SFT_RUN).join(FINAL_MODEL).is_dir() {
        stages.push(run_stage("supervised phase", workspace.command(&aha).args(["sft", SFT_CONFIG]))?);
    }
    let times: Vec<_> = stages.iter().map(|stage| format!("{} {}", stage.name, human(stage.elapsed))).collect();
    eprintln!("==> {}", times.join(", "));
    if !go_on(&stages, &interrupted) {
        return Ok(stages.last().map_or(Status::Failure(1), |last| interrupted_or(last.status)));
    }
    eprintln!("==> reinforcement learning (Ctrl-C stops it, `cargo xtask demo` goes on)");
    // Taking over this process leaves nothing in between: signals and exit code are those of `aha launch`.
    let error = workspace.command(&aha).args(["launch", CONFIG]).exec();
    Err(error).with_context(|| format!("cannot start {}", aha.display()))
}

fn build_command(workspace: &Workspace) -> Command {
    let mut build = workspace.cargo();
    build.args(["build", "--release", "--package", "aha"]);
    build
}

fn go_on(stages: &[Stage], interrupted: &AtomicBool) -> bool {
    !interrupted.load(Ordering::Relaxed) && stages.iter().all(|stage| stage.status == Status::Success)
}

/// A child may well end with 0 after a Ctrl-C; the demo as a whole did not succeed.
fn interrupted_or(status: Status) -> Status {
    if status == Status::Success { Status::Failure(128 + SIGINT as u8) } else { status }
}

fn remove_run(workspace: &Workspace, run: &str) -> anyhow::Result<()> {
    let dir = workspace.path(run);
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        eprintln!("removed {run}");
    }
    Ok(())
}
