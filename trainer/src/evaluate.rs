//! Held-out accuracy, through the generators and the same rewards as training.

use std::path::Path;

use aha_core::config::RunConfig;
use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::rollout::Sampling;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::exchange::{exchange, share};
use crate::rollouts::{RolloutRequest, Rollouts, all_in_time};
use crate::session::Session;

const FILE: &str = "evaluations.jsonl";

/// One line of `evaluations.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps done.
    pub step: u64,
    /// Share of the prompts that were answered right.
    pub accuracy: f64,
    pub prompts: usize,
    /// Mean completion length in tokens.
    pub mean_length: f64,
}

/// Asks every held-out prompt once. All ranks take part and get the same answer.
///
/// # Errors
/// If a generator fails within the deadline.
pub fn evaluate(session: &Session, rollouts: &mut dyn Rollouts, version: PolicyVersion) -> Result<Evaluation> {
    let config = &session.config;
    let prompts = session.prompts.held_out(config.eval.num_prompts)?;
    let request = RolloutRequest {
        prompts: share(&prompts, session.world.rank, session.world.size),
        num_generations: 1,
        sampling: Sampling { temperature: config.eval.temperature, ..config.rollout.sampling() },
        seed: config.run.seed,
        rewards: config.rewards.iter().filter(|spec| spec.name() == config.eval.reward).cloned().collect(),
        min_version: version,
    };
    let own = rollouts.roll_out(&request)?;
    let ids: Vec<PromptId> = prompts.iter().map(|prompt| prompt.id).collect();
    let groups = all_in_time(&ids, exchange(session.group(), prompts, own, 1)?)?;
    // What nobody could judge is neither right nor wrong.
    let completions = || groups.iter().flat_map(|group| &group.completions).filter(|completion| completion.is_judged());
    let num_judged = completions().count();
    let right = completions().filter(|completion| completion.rewards.iter().all(|reward| reward.score >= 1.0)).count();
    let num_tokens: usize = completions().map(|completion| completion.token_ids.len()).sum();
    Ok(Evaluation {
        step: version.0,
        accuracy: right as f64 / num_judged.max(1) as f64,
        prompts: num_judged,
        mean_length: num_tokens as f64 / num_judged.max(1) as f64,
    })
}

/// Adds an evaluation to the run's file.
///
/// # Errors
/// If it cannot be written.
pub fn record(run_dir: &Path, evaluation: &Evaluation) -> Result<()> {
    let mut all = read(run_dir)?;
    all.retain(|known| known.step < evaluation.step);
    all.push(*evaluation);
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
    let path = run_dir.join(FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("{}: {line:?}", path.display())))
        .collect()
}

/// Whether `config` asks for an evaluation after `step` steps.
#[must_use]
pub fn is_due(config: &RunConfig, step: u64) -> bool {
    let eval = &config.eval;
    let ends = step == 0 || step == config.train.max_steps;
    eval.num_prompts > 0 && (ends || eval.eval_steps > 0 && step.is_multiple_of(eval.eval_steps))
}
