//! Reward against completions: the demo's run with several losses and with sharded weights, and the same with TRL.

mod plot;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::{measure, python};
use crate::process::{Status, run_stage};
use crate::workspace::Workspace;
use report::{Curve, Report};

const PEER: &str = "xtask/peers/trl_curve.py";
const SFT_CONFIG: &str = "configs/countdown-tiny-sft.yaml";
const SFT_MODEL: &str = "runs/countdown-tiny-sft/model";
const CONFIG: &str = "configs/countdown-tiny.yaml";
const RUNS: &str = "runs/curves";
const RESULTS: &str = "bench/results";
/// Completions of a step in that recipe.
const COMPLETIONS_PER_STEP: usize = 128;
/// Name of a run and how it differs from the recipe. The first is the one whose prompts TRL gets.
const VARIANTS: [(&str, &[&str]); 4] = [
    ("dapo", &["train.loss_type=dapo"]),
    ("grpo", &["train.loss_type=grpo"]),
    ("dr_grpo", &["train.loss_type=dr_grpo"]),
    ("zero_3", &["train.loss_type=dapo", "train.zero_stage=3"]),
];

#[derive(clap::Args)]
pub(crate) struct Curves {
    /// Seeds of aha's runs
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    seeds: Vec<u64>,
    /// Seeds of TRL's
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    peer_seeds: Vec<u64>,
    /// Losses of TRL's
    #[arg(long, value_delimiter = ',', default_value = "dapo,grpo,dr_grpo")]
    peer_losses: Vec<String>,
    /// Threads of every process
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// What the machine is, for the report
    #[arg(long)]
    hardware: String,
    /// Take this program in place of one built now
    #[arg(long, value_name = "PATH")]
    pub(super) aha: Option<PathBuf>,
}

/// Runs what is not finished in `runs/curves`, and reports on all of it.
pub(super) fn curves(workspace: &Workspace, aha: &Path, args: &Curves) -> anyhow::Result<()> {
    let python = python(workspace)?;
    ensure!(!args.seeds.is_empty() && args.threads > 0, "--seeds must not be empty, --threads at least 1");
    let stray = args.peer_seeds.iter().find(|seed| !args.seeds.contains(seed));
    ensure!(stray.is_none(), "--peer-seeds: {stray:?} is not among --seeds, whose runs TRL takes prompts from");
    if !workspace.path(SFT_MODEL).is_dir() {
        must("supervised phase", workspace.command(aha).args(["sft", SFT_CONFIG]))?;
    }
    let (mut own, mut theirs) = (Vec::new(), Vec::new());
    for (variant, overrides) in VARIANTS {
        for &seed in &args.seeds {
            own.push(ours(workspace, aha, (variant, seed), overrides, args.threads)?);
        }
    }
    for loss_type in &args.peer_losses {
        for &seed in &args.peer_seeds {
            theirs.push(peer((workspace, aha, &python), (loss_type, seed), args.threads)?);
        }
    }
    let report = Report { own, theirs, completions_per_step: COMPLETIONS_PER_STEP, hardware: args.hardware.clone() };
    let date = crate::process::output(Command::new("date").arg("+%F")).context("`date` says nothing")?;
    for (extension, text) in
        [("md", report.markdown(&date)?), ("csv", report.csv()), ("svg", plot::svg(&report.lines(), &report.title()))]
    {
        let path = workspace.path(RESULTS).join(format!("{date}-countdown-curves.{extension}"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}

/// A run of ours; one that is interrupted goes on when this is called again.
fn ours(
    workspace: &Workspace,
    aha: &Path,
    (variant, seed): (&str, u64),
    overrides: &[&str],
    threads: usize,
) -> anyhow::Result<Curve> {
    let name = format!("{variant}-{seed}");
    let folder = workspace.path(RUNS).join(&name);
    if !folder.join("summary.json").exists() {
        let mut command = launch(workspace, aha, (&name, seed), threads);
        command.args(overrides.iter().flat_map(|value| ["--set", value]));
        must("run of aha", &mut command)?;
    }
    let metrics = fs::read_to_string(folder.join("metrics.jsonl")).with_context(|| format!("metrics of {name}"))?;
    let rows: Vec<Value> = metrics.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let summary = read_json(&folder.join("summary.json"))?;
    Curve::new(("aha", variant, seed), &rows, &summary["accuracy_after"], &summary["seconds"])
}

/// A run of TRL on the prompts of ours with the same seed, and the held-out accuracy of its model by our evaluation.
fn peer(
    (workspace, aha, python): (&Workspace, &Path, &Path),
    (loss_type, seed): (&str, u64),
    threads: usize,
) -> anyhow::Result<Curve> {
    let name = format!("trl-{loss_type}-{seed}");
    let folder = workspace.path(RUNS).join(&name);
    let (curve, model) = (folder.join("curve.json"), folder.join("model"));
    if !curve.exists() {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        eprintln!("==> run of TRL");
        let mut command = workspace.command(python);
        command.env("OMP_NUM_THREADS", threads.to_string()).arg(PEER);
        command.arg(workspace.path(RUNS).join(format!("{}-{seed}", VARIANTS[0].0)));
        command.arg("--aha").arg(aha).args(["--loss-type", loss_type]).arg("--out").arg(&model);
        command.args(["--threads", &threads.to_string()]);
        fs::write(&curve, measure(&mut command)?.to_string())?;
    }
    let held_out = format!("{name}-held-out");
    let summary = workspace.path(RUNS).join(&held_out).join("summary.json");
    if !summary.exists() {
        let mut command = launch(workspace, aha, (&held_out, seed), threads);
        // What is looked at is the accuracy before the one step that a run has at least.
        command.arg("--set").arg(format!("model.path={}", model.display())).args(["--set", "train.max_steps=1"]);
        command.args(["--set", "train.warmup_steps=0"]);
        must("held-out accuracy", &mut command)?;
    }
    let (measured, summary) = (read_json(&curve)?, read_json(&summary)?);
    let rows = measured["curve"].as_array().with_context(|| format!("{} has no curve", curve.display()))?;
    Curve::new(("TRL", loss_type, seed), rows, &summary["accuracy_before"], &measured["seconds"])
}

fn launch(workspace: &Workspace, aha: &Path, (name, seed): (&str, u64), threads: usize) -> Command {
    let mut command = workspace.command(aha);
    command.env("OMP_NUM_THREADS", threads.to_string()).args(["launch", CONFIG]);
    let sets = [
        format!("run.output_dir={RUNS}"),
        format!("run.name={name}"),
        format!("run.seed={seed}"),
        format!("train.threads={threads}"),
        format!("generator.threads={threads}"),
        format!("rollout.generation_batch_size={COMPLETIONS_PER_STEP}"),
    ];
    command.args(sets.iter().flat_map(|value| ["--set", value]));
    command
}

fn must(name: &'static str, command: &mut Command) -> anyhow::Result<()> {
    match run_stage(name, command)?.status {
        Status::Success => Ok(()),
        Status::Failure(code) => bail!("{name} failed with exit code {code}: {command:?}; its message is above"),
    }
}

fn read_json(path: &Path) -> anyhow::Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}
