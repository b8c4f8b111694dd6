//! The training loop: take prompts, roll out, exchange, advantages, pack, step, publish.

use std::time::Instant;

use aha_core::config::RunConfig;
use aha_core::ids::PolicyVersion;
use aha_core::random::derive_seed;
use aha_core::rollout::Group;
use anyhow::{Result, bail};
use serde::Serialize;

use crate::evaluate::{self, Evaluation, evaluate};
use crate::exchange::{exchange, share};
use crate::loggers::{CompletionRecord, Metrics};
use crate::publish::Publisher;
use crate::rollouts::{RolloutRequest, Rollouts};
use crate::session::Session;
use crate::step_metrics::{rollout_metrics, step_metrics};
use crate::torch::learner::{LocalBatch, StepOutput};
use crate::torch::objective::{Objective, PolicyObjective};
use crate::training_batch::{Plan, TrainingBatch};
use crate::world::World;

/// Steps in a row whose gradients may be NaN or infinite before the run stops.
const MAX_SKIPPED: u32 = 3;

/// What `summary.json` holds.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    pub accuracy_before: Option<f64>,
    pub accuracy_after: Option<f64>,
    /// Held-out prompts that each accuracy was measured on.
    pub puzzles: usize,
    pub steps: u64,
    /// Wall time of this process, from its start.
    pub seconds: f64,
}

/// Trains the policy by GRPO until `train.max_steps`, going on from the run's newest checkpoint if it has one.
///
/// `connect` is called when everything on this side is ready, and finds the generators.
///
/// # Errors
/// Names what failed and whom it waited for. The run can be started again.
pub fn run<R: Rollouts>(
    config: &RunConfig,
    world: &World,
    connect: impl FnOnce(&Session) -> Result<(R, Publisher)>,
) -> Result<Summary> {
    let mut session = Session::start(config, world, objective(config))?;
    let (mut rollouts, mut publisher) = connect(&session)?;
    let rollouts = &mut rollouts;
    publisher.publish(session.learner.zero().weights(), PolicyVersion(session.step))?;
    let first_step = session.step;
    evaluate_if_due(&mut session, rollouts, first_step)?;
    let mut num_skipped = 0;
    for step in first_step..config.train.max_steps {
        let skipped = train_step(&mut session, rollouts, &mut publisher, step)?;
        num_skipped = if skipped { num_skipped + 1 } else { 0 };
        if num_skipped == MAX_SKIPPED {
            bail!("the gradients of {MAX_SKIPPED} steps in a row were not finite; lower train.learning_rate");
        }
        evaluate_if_due(&mut session, rollouts, step + 1)?;
        session.save_if_due(step + 1)?;
    }
    finish(session)
}

/// One step; true if its update was left out.
fn train_step(
    session: &mut Session,
    rollouts: &mut dyn Rollouts,
    publisher: &mut Publisher,
    step: u64,
) -> Result<bool> {
    let mut clock = Clock::start();
    let mut metrics = Metrics::default();
    let config = session.config.clone();
    let prompts = session.prompts.step_prompts(step)?;
    let own = rollouts.roll_out(&RolloutRequest {
        prompts: share(&prompts, session.world.rank, session.world.size),
        num_generations: config.rollout.num_generations,
        sampling: config.rollout.sampling(),
        seed: derive_seed(config.run.seed, &[step]),
        rewards: config.rewards.iter().map(|spec| spec.function.clone()).collect(),
        version: PolicyVersion(step),
    })?;
    clock.lap("time/generate");
    let groups = exchange(session.group(), prompts, own, config.rollout.num_generations)?;
    clock.lap("time/exchange");
    let mut batch = TrainingBatch::new(&groups, &config);
    metrics.extend(rollout_metrics(&groups, &batch, &config).iter());
    let output = optimize(session, &mut batch, step)?;
    clock.lap("time/train");
    let push = publisher.publish(session.learner.zero().weights(), PolicyVersion(step + 1))?;
    clock.lap("weights/push_seconds");

    let sampled: Vec<&[f32]> =
        groups.iter().flat_map(|group| &group.completions).map(|completion| completion.logprobs.as_slice()).collect();
    step_metrics(session.group(), &output, &sampled, &mut metrics)?;
    metrics.set("learning_rate", session.adamw(step).lr);
    metrics.set("policy/lag", lag(&groups, step));
    metrics.set("weights/swap_seconds", push.swap_seconds);
    finish_metrics(&mut metrics, &clock, &groups);
    if let Some(loggers) = &mut session.loggers {
        loggers.log_completions(step + 1, &records(&groups, &batch, &config))?;
        loggers.log_step(step + 1, &metrics)?;
    }
    Ok(output.skipped)
}

/// `train.num_iterations` optimizer steps on one batch. The first needs no old log-probs, since its policy sampled the
/// batch; it leaves those that the others compare with. Returns the first one's output.
fn optimize(session: &mut Session, batch: &mut TrainingBatch, step: u64) -> Result<StepOutput> {
    let train = &session.config.train;
    let num_iterations = train.num_iterations;
    let plan = Plan::new(&batch.sequences, train, session.world.rank, session.world.size)?;
    let options = session.adamw(step);
    let mut first = None;
    for _ in 0..num_iterations {
        let local = LocalBatch {
            sequences: &batch.sequences,
            micro_batches: &plan.micro_batches,
            num_micro_batches: plan.num_micro_batches,
        };
        let output = session.learner.step(&local, &options)?;
        if first.is_none() {
            for (sequence, logprobs) in batch.sequences.iter_mut().zip(&output.logprobs) {
                sequence.old_logprobs.clone_from(logprobs);
            }
            first = Some(output);
        }
    }
    first.ok_or_else(|| anyhow::anyhow!("train.num_iterations must be at least 1"))
}

fn evaluate_if_due(session: &mut Session, rollouts: &mut dyn Rollouts, step: u64) -> Result<()> {
    if !evaluate::is_due(&session.config, step) {
        return Ok(());
    }
    let evaluation = evaluate(session, rollouts, PolicyVersion(step))?;
    if let Some(loggers) = &mut session.loggers {
        evaluate::record(session.run_dir.path(), &evaluation)?;
        loggers.log_evaluation(step, evaluation.accuracy, evaluation.prompts)?;
    }
    Ok(())
}

fn finish(session: Session) -> Result<Summary> {
    session.save_model()?;
    let evaluations = evaluate::read(session.run_dir.path())?;
    let accuracy = |evaluation: Option<&Evaluation>| evaluation.map(|evaluation| evaluation.accuracy);
    let summary = Summary {
        accuracy_before: accuracy(evaluations.first()),
        accuracy_after: accuracy(evaluations.last()),
        puzzles: evaluations.last().map_or(0, |evaluation| evaluation.prompts),
        steps: session.config.train.max_steps,
        seconds: session.started.elapsed().as_secs_f64(),
    };
    if let Some(loggers) = session.loggers {
        loggers.finish()?;
        session.run_dir.write_summary(&summary)?;
    }
    Ok(summary)
}

fn objective(config: &RunConfig) -> Objective {
    let train = &config.train;
    Objective::Policy(PolicyObjective {
        epsilon: f64::from(train.epsilon),
        epsilon_high: f64::from(train.epsilon_high.unwrap_or(train.epsilon)),
        beta: f64::from(train.beta),
    })
}

/// Versions between the oldest token of the step and the policy that trains on it.
fn lag(groups: &[Group], step: u64) -> f64 {
    let completions = groups.iter().flat_map(|group| &group.completions);
    let oldest = completions.flat_map(|completion| &completion.spans).map(|span| span.version.0).min();
    oldest.map_or(0.0, |oldest| step.saturating_sub(oldest) as f64)
}

fn records(groups: &[Group], batch: &TrainingBatch, config: &RunConfig) -> Vec<CompletionRecord> {
    let best: f32 = config.rewards.iter().map(|spec| spec.weight).sum();
    let completions =
        groups.iter().flat_map(|group| group.completions.iter().map(move |completion| (group, completion)));
    completions
        .zip(batch.advantages.iter().zip(&batch.rewards))
        .map(|((group, completion), (&advantage, &reward))| {
            CompletionRecord::new(&group.prompt, completion, advantage, reward >= best)
        })
        .collect()
}

fn finish_metrics(metrics: &mut Metrics, clock: &Clock, groups: &[Group]) {
    let completions =
        || groups.iter().flat_map(|group| group.completions.iter().map(move |completion| (group, completion)));
    let new_tokens: usize = completions().map(|(_, completion)| completion.token_ids.len()).sum();
    let all_tokens: usize =
        completions().map(|(group, completion)| group.prompt.token_ids.len() + completion.token_ids.len()).sum();
    metrics.set("num_tokens", all_tokens as f64);
    for (name, seconds) in &clock.laps {
        metrics.set(*name, *seconds);
    }
    let seconds = clock.started.elapsed().as_secs_f64();
    let generate =
        clock.laps.iter().find(|(name, _)| *name == "time/generate").map_or(seconds, |(_, seconds)| *seconds);
    metrics.set("step_time", seconds);
    metrics.set("tokens_per_second/generate", new_tokens as f64 / generate);
    metrics.set("tokens_per_second/step", all_tokens as f64 / seconds);
}

/// Where the time of a step goes.
#[derive(Debug)]
struct Clock {
    started: Instant,
    last: Instant,
    laps: Vec<(&'static str, f64)>,
}

impl Clock {
    fn start() -> Self {
        let now = Instant::now();
        Self { started: now, last: now, laps: Vec::new() }
    }

    fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.laps.push((name, (now - self.last).as_secs_f64()));
        self.last = now;
    }
}
