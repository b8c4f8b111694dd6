//! `aha sft`: supervised fine-tuning with the same step as reinforcement learning.
//!
//! The streams of a sequence are filled with equal weights instead of advantages; everything after that is shared.

use std::time::Instant;

use aha_core::batch::TrainSequence;
use aha_core::config::RunConfig;
use aha_nn::comm::ReduceOp;
use anyhow::{Result, ensure};
use tch::Tensor;

use crate::loggers::{Metrics, names};
use crate::session::Session;
use crate::skips::Skip;
use crate::stop::{Outcome, StopRequest};
use crate::torch::learner::StepOutput;
use crate::torch::objective::Objective;
use crate::training_batch::Plan;
use crate::world::World;

/// Trains on `data`'s rows with `sft.completion` as the answer, and writes `<run>/model`. `ready` is told when it begins.
///
/// # Errors
/// Names what is missing or failed; the run goes on from its last checkpoint when it is started again.
pub fn run(
    config: &RunConfig,
    world: &World,
    stop: &StopRequest,
    ready: impl FnOnce(&Session),
) -> Result<Outcome<std::path::PathBuf>> {
    ensure!(
        !config.sft.completion.is_empty(),
        "sft.completion: missing; write the answer as a template over the row's columns"
    );
    let mut session = Session::start(config, world, Objective::Supervised, stop)?;
    ready(&session);
    for step in session.step..config.train.max_steps {
        if let Some(stopped) = session.stop_if_due(step, &Vec::new)? {
            if let Some(loggers) = session.loggers {
                loggers.finish()?;
            }
            return Ok(Outcome::Stopped(stopped));
        }
        let (metrics, num_skipped) = supervised_step(&mut session, step)?;
        if let Some(loggers) = &mut session.loggers {
            loggers.log_step(step + 1, &metrics)?;
        }
        session.skips.note(step + 1, Skip::not_finite(num_skipped).as_ref())?;
        session.save_if_due(step + 1, &Vec::new)?;
    }
    let folder = session.save_model()?;
    if let Some(loggers) = session.loggers {
        loggers.finish()?;
    }
    Ok(Outcome::Finished(folder))
}

/// Returns the step's metrics and how many updates were left out.
fn supervised_step(session: &mut Session, step: u64) -> Result<(Metrics, u32)> {
    let start = Instant::now();
    let sft = &session.config.sft;
    let examples = session.prompts.supervised(step, sft)?;
    let num_targets: usize = examples.iter().map(|example| example.completion.len()).sum();
    let sequences: Vec<TrainSequence> = examples
        .into_iter()
        .map(|example| TrainSequence {
            num_prompt_tokens: example.prompt.len(),
            weights: vec![1.0 / num_targets as f32; example.completion.len()],
            token_ids: [example.prompt, example.completion].concat(),
            ..TrainSequence::default()
        })
        .collect();
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.token_ids.len()).collect();
    let world = &session.world;
    let all: Vec<usize> = (0..sequences.len()).collect();
    let plan = Plan::new(&sequences, &all, &session.config.train, (world.rank, world.size))?;
    let options = session.adamw(step);
    let output = session.learner.step(&plan.of(&sequences), &options)?;

    let mut metrics = Metrics::default();
    metrics.set("loss", total_loss(session, &output)?);
    metrics.set("grad_norm", output.grad_norm);
    metrics.set(names::SKIPPED_UPDATES, f64::from(output.num_skipped));
    metrics.set("learning_rate", options.lr);
    metrics.set(names::NUM_TOKENS, lengths.iter().sum::<usize>() as f64);
    let seconds = start.elapsed().as_secs_f64();
    metrics.set("step_time", seconds);
    metrics.set("tokens_per_second/step", lengths.iter().sum::<usize>() as f64 / seconds);
    Ok((metrics, output.num_skipped))
}

fn total_loss(session: &Session, output: &StepOutput) -> Result<f64> {
    let mut loss = Tensor::from_slice(&[output.loss]).to_device(session.group().device());
    session.group().all_reduce(&mut loss, ReduceOp::Sum)?;
    Ok(loss.double_value(&[0]))
}
