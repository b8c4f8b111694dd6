//! Evaluation: accuracy on held-out rows and on suites, through the generators and the same rewards as training.

mod questions;
mod record;
mod report;
mod statistics;

use std::time::Instant;

use aha_core::config::{HELD_OUT, RunConfig};
use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::rollout::{Group, Prompt, Sampling};
use aha_core::tokenizer::Tokenizer;
use aha_nn::comm::ProcessGroup;
use aha_nn::model_config::ModelConfig;
use anyhow::Result;

pub use questions::{Asked, Model};
pub use record::{Evaluation, read, record};
pub use report::{Average, Report, write_items};

use crate::exchange::{exchange, share};
use crate::rollouts::{RolloutError, RolloutRequest, Rollouts, all_in_time};
use crate::session::Session;

/// The suites of a run, with their prompts.
///
/// # Errors
/// Data that is not there, and the first row that cannot be asked.
pub fn suites(config: &RunConfig, model: &ModelConfig) -> Result<Vec<Asked>> {
    let suites = config.eval.resolved().map_err(|problems| anyhow::anyhow!(problems.join("; ")))?;
    if suites.is_empty() {
        return Ok(Vec::new());
    }
    let tokenizer = Tokenizer::load(&config.model.path)?;
    let max_model_len = max_model_len(config.generator.max_model_len, model);
    let model = Model { folder: &config.model.path, tokenizer: &tokenizer, max_model_len };
    suites.into_iter().map(|suite| Asked::load(suite, &config.eval.data_dir, model)).collect()
}

/// The longest sequence of a generator with `generator.max_model_len` `asked`.
#[must_use]
pub fn max_model_len(asked: usize, model: &ModelConfig) -> usize {
    if asked == 0 { model.max_position_embeddings } else { asked.min(model.max_position_embeddings) }
}

/// Asks the held-out prompts and all suites. All ranks take part and get the same answer; rank 0 writes a line for every
/// prompt to the run's `evaluations/`.
///
/// # Errors
/// If a generator fails within the deadline, or a file cannot be written.
pub fn evaluate(session: &Session, rollouts: &mut dyn Rollouts, version: PolicyVersion) -> Result<Evaluation> {
    let mut reports = Vec::new();
    let mut ask = |name: &str, prompts: &[Prompt], request: RolloutRequest| -> Result<()> {
        let started = Instant::now();
        let num_samples = request.num_generations;
        let groups = roll_out(session.group(), rollouts, prompts, request)?;
        if session.world.is_main() {
            let file = format!("evaluations/step_{:06}_{name}.jsonl", version.0);
            write_items(&session.run_dir.path().join(file), &groups)?;
        }
        reports.push((name.to_owned(), Report::of(&groups, num_samples, started.elapsed())));
        Ok(())
    };
    if session.config.eval.num_prompts > 0 {
        let prompts = session.prompts.held_out(session.config.eval.num_prompts)?;
        ask(HELD_OUT, &prompts, held_out_request(&session.config, version))?;
    }
    for suite in &session.suites {
        ask(&suite.suite.name, &suite.prompts, suite.request(Vec::new(), session.config.run.seed, version))?;
    }
    Ok(Evaluation::of(version.0, reports))
}

fn held_out_request(config: &RunConfig, min_version: PolicyVersion) -> RolloutRequest {
    RolloutRequest {
        prompts: Vec::new(),
        num_generations: 1,
        sampling: Sampling { temperature: config.eval.temperature, ..config.rollout.sampling() },
        seed: config.run.seed,
        rewards: config.rewards.iter().filter(|spec| spec.name() == config.eval.reward).cloned().collect(),
        min_version,
    }
}

/// The groups of `prompts`, of which each rank asks for its share.
fn roll_out(
    group: &ProcessGroup,
    rollouts: &mut dyn Rollouts,
    prompts: &[Prompt],
    request: RolloutRequest,
) -> Result<Vec<Group>> {
    let num_generations = request.num_generations;
    let own = rollouts.roll_out(&RolloutRequest { prompts: share(prompts, group.rank(), group.size()), ..request })?;
    let groups = exchange(group, prompts.to_vec(), own, num_generations)?;
    Ok(in_time(prompts, groups)?)
}

/// The groups of `prompts`, if all of them came.
///
/// # Errors
/// Names those that did not.
pub fn in_time(prompts: &[Prompt], groups: Vec<Option<Group>>) -> Result<Vec<Group>, RolloutError> {
    let ids: Vec<PromptId> = prompts.iter().map(|prompt| prompt.id).collect();
    all_in_time(&ids, groups)
}

/// Whether `config` asks for an evaluation after `step` steps.
#[must_use]
pub fn is_due(config: &RunConfig, step: u64) -> bool {
    let eval = &config.eval;
    let ends = step == 0 || step == config.train.max_steps;
    eval.is_on() && (ends || eval.eval_steps > 0 && step.is_multiple_of(eval.eval_steps))
}
