//! Whole GRPO steps of aha and of TRL, in turns.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::{measure, median, python, threads};
use crate::workspace::Workspace;

const PEER: &str = "xtask/peers/trl_step.py";
/// What `aha bench step` has as well.
const SYSTEM: &str = "You are a helpful assistant.";
const NUM_QUESTIONS: i64 = 256;
/// Parts of our step, as `aha bench step` names them.
const PARTS: [&str; 10] =
    ["generate", "exchange", "train", "reference", "forward", "head", "backward", "reduce", "optimizer", "push"];

#[derive(clap::Args)]
pub(crate) struct Step {
    /// Hugging Face model folder
    #[arg(long, default_value = "models/smollm2-135m")]
    model: PathBuf,
    /// Prompts of a step
    #[arg(long, default_value_t = 4)]
    prompts: usize,
    /// Completions of a prompt
    #[arg(long, default_value_t = 8)]
    group: usize,
    /// Tokens of every completion
    #[arg(long, default_value_t = 128)]
    new_tokens: usize,
    /// Weights of the KL penalty, one row of the table each
    #[arg(long, value_delimiter = ',', default_value = "0.001,0")]
    beta: Vec<f64>,
    /// Steps of a measurement; medians count
    #[arg(long, default_value_t = 2)]
    steps: usize,
    /// Measurements of each, in turns; medians count
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Threads of both; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Most tokens of a micro-batch of ours; TRL's is a prompt with its completions
    #[arg(long, default_value_t = 1280)]
    micro_batch_tokens: usize,
    /// What our generator gives back while the trainer trains: nothing, cache, or weights as well
    #[arg(long, default_value = "weights")]
    sleep: String,
}

/// Seconds of a step, and bytes of memory at most.
struct Measured {
    seconds: f64,
    memory: f64,
    whole: Value,
}

pub(super) fn step(workspace: &Workspace, aha: &Path, args: &Step) -> anyhow::Result<()> {
    let python = python(workspace)?;
    ensure!(args.rounds > 0 && args.steps > 0, "--rounds and --steps must be at least 1");
    let threads = threads(args.threads)?;
    let model = std::path::absolute(&args.model)?;
    let questions = aha.with_file_name("bench-questions.jsonl");
    fs::write(&questions, self::questions()).with_context(|| format!("cannot write {}", questions.display()))?;
    eprintln!("==> step: {threads} threads, {} rounds of {} steps", args.rounds, args.steps);
    let shape = |command: &mut Command, beta: f64| {
        command.arg("--questions").arg(&questions);
        for (name, value) in [("--prompts", args.prompts), ("--group", args.group), ("--new-tokens", args.new_tokens)] {
            command.args([name, &value.to_string()]);
        }
        command.args(["--steps", &args.steps.to_string(), "--beta", &beta.to_string()]);
        command.args(["--threads", &threads.to_string()]);
    };
    for &beta in &args.beta {
        let mut ours = workspace.command(aha);
        ours.args(["bench", "step", "--json", "--model"]).arg(&model);
        ours.args(["--micro-batch-tokens", &args.micro_batch_tokens.to_string(), "--sleep", &args.sleep]);
        shape(&mut ours, beta);
        let mut peer = workspace.command(&python);
        peer.env("OMP_NUM_THREADS", threads.to_string()).arg(PEER).arg(&model).args(["--system", SYSTEM]);
        shape(&mut peer, beta);
        let (mut own, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            own.push(measured(&mut ours, "seconds_per_step")?);
            theirs.push(measured(&mut peer, "seconds_per_step")?);
        }
        report(beta, &own, &theirs);
    }
    Ok(())
}

/// Sums to find, as the same chat turn for both.
fn questions() -> String {
    let question = |index: i64| {
        let [a, b, c] = [7, 11, 13].map(|factor| 1 + index * factor % 97);
        let text = format!(
            "Using the numbers [{a}, {b}, {c}], create an equation that equals {}. Show your work in <think> </think> \
             tags and the answer in <answer> </answer> tags.",
            a + b - c
        );
        format!("{}\n", json!({ "question": text }))
    };
    (0..NUM_QUESTIONS).map(question).collect()
}

fn measured(command: &mut Command, seconds: &str) -> anyhow::Result<Measured> {
    let whole = measure(command)?;
    let number = |name: &str| whole[name].as_f64().with_context(|| format!("{command:?} measured no {name}: {whole}"));
    Ok(Measured { seconds: number(seconds)?, memory: number("peak_rss_bytes")?, whole })
}

fn report(beta: f64, own: &[Measured], theirs: &[Measured]) {
    let middle = |all: &[Measured], value: fn(&Measured) -> f64| median(all.iter().map(value).collect());
    // Of neighbours in time: the machine may be faster in one round than in another.
    let ratio = |value: fn(&Measured) -> f64| {
        median(own.iter().zip(theirs).map(|(own, peer)| value(peer) / value(own)).collect())
    };
    let row = |what: &str, unit: f64, value: fn(&Measured) -> f64| {
        let (own, peer) = (middle(own, value) / unit, middle(theirs, value) / unit);
        eprintln!("{what:>16}  {own:>8.2}  {peer:>8.2}  {:>6.2}", ratio(value));
    };
    eprintln!("{:>16}  {:>8}  {:>8}  {:>6}", format!("beta {beta}"), "aha", "TRL", "ratio");
    row("seconds a step", 1.0, |measured| measured.seconds);
    row("peak GB", 1e9, |measured| measured.memory);
    for part in PARTS {
        let values: Option<Vec<f64>> =
            own.iter().map(|measured| measured.whole[format!("{part}_seconds")].as_f64()).collect();
        if let Some(values) = values {
            eprintln!("{part:>16}  {:>8.2}", median(values));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_one_a_line() {
        let text = questions();
        let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.len() as i64, NUM_QUESTIONS);
        assert!(rows.iter().all(|row| row["question"].as_str().unwrap().starts_with("Using the numbers [")));
    }
}
