//! `aha sft`: supervised fine-tuning with the same step as reinforcement learning.
//!
//! The streams of a sequence are filled with equal weights instead of advantages; everything after that is shared.

use std::time::Instant;

use aha_core::batch::TrainSequence;
use aha_core::config::RunConfig;
use aha_nn::comm::ReduceOp;
use anyhow::{Result, ensure};
use serde::Serialize;
use tch::Tensor;

use crate::evaluate;
use crate::loggers::{Metrics, names};
use crate::prompts::Example;
use crate::session::Session;
use crate::skips::Skip;
use crate::stop::{Outcome, StopRequest};
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
    ready: impl FnOnce(&mut Session),
) -> Result<Outcome<std::path::PathBuf>> {
    ensure!(
        !config.sft.completion.is_empty() || config.sft.messages.is_some(),
        "sft.completion: missing; write the answer as a template over the row's columns, or name a column of conversations \
         in sft.messages"
    );
    let mut session = Session::start(config, world, Objective::Supervised, stop)?;
    ready(&mut session);
    let first_step = session.step;
    evaluate_if_due(&mut session, first_step)?;
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
        evaluate_if_due(&mut session, step + 1)?;
        session.save_if_due(step + 1, &Vec::new)?;
    }
    let folder = session.save_model()?;
    if let Some(loggers) = session.loggers {
        loggers.finish()?;
    }
    if let Some(sink) = &mut session.sink {
        sink.finish(&folder);
    }
    Ok(Outcome::Finished(folder))
}

/// Returns the step's metrics and how many updates were left out.
fn supervised_step(session: &mut Session, step: u64) -> Result<(Metrics, u32)> {
    let start = Instant::now();
    let sequences = sequences(session.prompts.supervised(step, &session.config.sft)?);
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.token_ids.len()).collect();
    let plan = plan(session, &sequences)?;
    let options = session.adamw(step);
    let output = session.learner.step(&plan.of(&sequences), &options)?;

    let mut metrics = Metrics::default();
    metrics.set("loss", sum(session, output.loss)?);
    metrics.set("grad_norm", output.grad_norm);
    metrics.set(names::SKIPPED_UPDATES, f64::from(output.num_skipped));
    metrics.set("learning_rate", options.lr);
    metrics.set(names::NUM_TOKENS, lengths.iter().sum::<usize>() as f64);
    let seconds = start.elapsed().as_secs_f64();
    metrics.set("step_time", seconds);
    metrics.set("tokens_per_second/step", lengths.iter().sum::<usize>() as f64 / seconds);
    Ok((metrics, output.num_skipped))
}

/// Equal weights for the tokens that are to be learnt.
fn sequences(examples: Vec<Example>) -> Vec<TrainSequence> {
    let num_targets: usize = examples.iter().flat_map(|example| &example.is_target).map(|&is| usize::from(is)).sum();
    let weight = 1.0 / num_targets as f32;
    let sequence = |example: Example| TrainSequence {
        num_prompt_tokens: example.prompt.len(),
        weights: example.is_target.iter().map(|&is_target| if is_target { weight } else { 0.0 }).collect(),
        token_ids: [example.prompt, example.completion].concat(),
        ..TrainSequence::default()
    };
    examples.into_iter().map(sequence).collect()
}

fn plan(session: &Session, sequences: &[TrainSequence]) -> Result<Plan> {
    let all: Vec<usize> = (0..sequences.len()).collect();
    Ok(Plan::new(sequences, &all, &session.config.train, (session.world.rank, session.world.size))?)
}

/// One line of `evaluations.jsonl`.
#[derive(Debug, Serialize)]
struct EvalLoss {
    /// Steps done.
    step: u64,
    /// Mean over the tokens to be learnt, in nats.
    eval_loss: f64,
    examples: usize,
}

/// Measures the loss on held-out rows where it is due; all ranks take part.
fn evaluate_if_due(session: &mut Session, step: u64) -> Result<()> {
    let config = &session.config;
    if config.eval.num_prompts == 0 || !evaluate::is_due(config, step) {
        return Ok(());
    }
    let sequences = sequences(session.prompts.held_out_examples(config.eval.num_prompts, &config.sft)?);
    let plan = plan(session, &sequences)?;
    let logprobs = session.learner.statistics(&plan.of(&sequences))?.logprobs;
    let loss = |(sequence, logprobs): (&TrainSequence, &Vec<f32>)| {
        let tokens = sequence.weights.iter().zip(logprobs);
        -tokens.map(|(&weight, &logprob)| f64::from(weight) * f64::from(logprob)).sum::<f64>()
    };
    let loss = sum(session, sequences.iter().zip(&logprobs).map(loss).sum())?;
    if let Some(loggers) = &mut session.loggers {
        let evaluation = EvalLoss { step, eval_loss: loss, examples: sequences.len() };
        evaluate::record(session.run_dir.path(), step, &evaluation)?;
        loggers.log_eval_loss(step, loss, sequences.len())?;
    }
    Ok(())
}

/// Over all ranks.
fn sum(session: &Session, value: f64) -> Result<f64> {
    let mut sum = Tensor::from_slice(&[value]).to_device(session.group().device());
    session.group().all_reduce(&mut sum, ReduceOp::Sum)?;
    Ok(sum.double_value(&[0]))
}
