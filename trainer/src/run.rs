//! The training loop: take prompts, roll out, exchange, advantages, pack, step, publish.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use aha_core::config::{RewardSpec, RunConfig, SleepMode};
use aha_core::ids::PolicyVersion;
use aha_core::rollout::{Completion, Group};
use aha_nn::runtime;
use aha_nn::unit::ModelWeights;
use anyhow::Result;
use serde::Serialize;

use crate::evaluate::{self, Evaluation, evaluate};
use crate::generators::{Generators, PolicyRollouts};
use crate::kl_reward::divergences;
use crate::loggers::{CompletionRecord, Metrics};
use crate::optimize::optimize;
use crate::sampling::{Sampler, rollout_request};
use crate::session::Session;
use crate::skips::Skip;
use crate::step_metrics::{lag_metrics, rollout_metrics, step_metrics};
use crate::stop::{Outcome, StopRequest};
use crate::torch::objective::{Objective, PolicyObjective};
use crate::training_batch::TrainingBatch;
use crate::world::World;

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

/// Trains the policy by GRPO until `train.max_steps`, going on from the run's newest checkpoint if it has one, or until
/// it is to stop.
///
/// `connect` is called when everything on this side is ready, and finds the generators.
///
/// # Errors
/// Names what failed and whom it waited for. The run can be started again.
pub fn run(
    config: &RunConfig,
    world: &World,
    stop: &StopRequest,
    connect: impl FnOnce(&mut Session) -> Result<Box<dyn Generators>>,
) -> Result<Outcome<Summary>> {
    let objective = Objective::Policy(PolicyObjective::new(&config.train));
    let mut session = Session::start(config, world, objective, stop)?;
    let mut generators = connect(&mut session)?;
    let generators = &mut *generators;
    generators.sleep()?;
    make_room(&mut session);
    generators.publish(session.group(), &*session.learner.policy(), PolicyVersion(session.step))?;
    let first_step = session.step;
    // Of a run that goes on, the evaluation before the checkpoint has decided whether it is the best.
    evaluate_if_due(&mut session, generators, first_step)?;
    for step in first_step..config.train.max_steps {
        if let Some(stopped) = session.stop_if_due(step, &|| generators.received())? {
            if let Some(loggers) = session.loggers {
                loggers.finish()?;
            }
            return Ok(Outcome::Stopped(stopped));
        }
        let skip = train_step(&mut session, generators, step)?;
        session.skips.note(step + 1, skip.as_ref())?;
        if let Some(evaluation) = evaluate_if_due(&mut session, generators, step + 1)? {
            session.note_evaluation(&evaluation);
        }
        session.sync_reference_if_due(step + 1)?;
        session.save_if_due(step + 1, &|| generators.received())?;
    }
    finish(session).map(Outcome::Finished)
}

/// One step; returns whether updates of it were left out.
fn train_step(session: &mut Session, generators: &mut dyn Generators, step: u64) -> Result<Option<Skip>> {
    let _span = tracing::debug_span!("train_step", step = step + 1).entered();
    let mut clock = Clock::start();
    let mut metrics = Metrics::default();
    let config = session.config.clone();
    let prompts = session.prompts.step_prompts(step)?;
    begin_rollouts(session, generators, step)?;
    let policy = session.learner.policy();
    let published = (&*policy as &dyn ModelWeights, PolicyVersion(step));
    let rollouts = &mut PolicyRollouts { generators, trainers: session.group(), policy: published };
    let sampler = Sampler { rollouts, group: session.group(), config: &config, step };
    let replacements = |round, count, seen: &_| session.prompts.replacements((step, round), count, seen);
    let sampled = sampler.sample(prompts, replacements)?;
    drop(policy);
    clock.lap("time/generate");
    clock.split_off("time/exchange", sampled.exchange);
    generators.sleep()?;
    let groups = sampled.groups;
    let mut batch = TrainingBatch::new(&groups, &config, step);
    let mut divergence = None;
    if config.train.use_kl_in_reward {
        let found = divergences(&session.learner, &config.train, &batch)?;
        batch = TrainingBatch::with_divergences(&groups, &config, step, &found.by_completion);
        divergence = Some(found.mean);
    }
    metrics.extend(rollout_metrics(&groups, &batch, &config).iter());
    metrics.extend(lag_metrics(&groups, &config, step).iter());
    metrics.set("sampling/late_groups", sampled.num_late as f64);
    if config.train.dynamic_sampling {
        metrics.set("sampling/dropped_groups", sampled.num_dropped as f64);
        metrics.set("sampling/resample_rounds", f64::from(sampled.num_rounds));
    }
    let adamw = session.adamw(step);
    let output = optimize(&mut session.learner, &config.train, &mut batch, (&adamw, &mut session.entropy))?;
    clock.lap("time/train");
    make_room(session);
    let push = generators.publish(session.group(), &*session.learner.policy(), PolicyVersion(step + 1))?;
    clock.lap("weights/push_seconds");

    let logprobs: Vec<&[f32]> =
        groups.iter().flat_map(|group| &group.completions).map(|completion| completion.logprobs.as_slice()).collect();
    let idle = generators.take_idle().as_secs_f64();
    step_metrics((session.group(), &config), (&output, idle), &logprobs, &mut metrics)?;
    if let Some(divergence) = divergence {
        metrics.set("kl", divergence);
    }
    if config.train.has_entropy_bonus() {
        metrics.set("entropy_coef", f64::from(session.entropy.entropy_coef));
    }
    metrics.set("learning_rate", adamw.lr);
    metrics.set("generators", generators.num_generators() as f64);
    metrics.set("weights/swap_seconds", push.swap_seconds);
    finish_metrics(&mut metrics, &clock, &groups, &config);
    if let Some(loggers) = &mut session.loggers {
        loggers.log_completions(step + 1, &records(&groups, &batch, &config))?;
        loggers.log_step(step + 1, &metrics)?;
    }
    if batch.excluded.iter().all(|excluded| *excluded) {
        return Ok(Some(Skip::Unjudged(unjudged(&groups, generators))));
    }
    let num_not_finite = output.num_skipped - batch.num_left_out * config.train.num_iterations;
    Ok(Skip::not_finite(num_not_finite))
}

/// Why no completion of a step has a verdict, with what this rank knows of it.
fn unjudged(groups: &[Group], generators: &dyn Generators) -> String {
    let rewards = groups.iter().flat_map(|group| &group.completions).flat_map(|completion| &completion.rewards);
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for reward in rewards.filter(|reward| !reward.is_verdict()) {
        *counts.entry((&reward.function, &reward.outcome)).or_default() += 1;
    }
    let counts = counts.into_iter().map(|((function, outcome), count)| format!("reward {function}: {count} {outcome}"));
    let failures = generators.rewarders().failures().map(|failure| format!("the last failure: {failure}"));
    counts.chain(failures).collect::<Vec<_>>().join("; ")
}

/// Begins the rollouts of this step and of as many later ones as `rollout.max_lag` allows, where they have not begun.
fn begin_rollouts(session: &mut Session, generators: &mut dyn Generators, step: u64) -> Result<()> {
    let config = &session.config;
    let end = step.saturating_add(config.rollout.max_lag).min(config.train.max_steps - 1);
    for step in step + generators.num_ahead() as u64..=end {
        let world = (session.world.rank, session.world.size);
        let request = rollout_request(config, world, &session.prompts.step_prompts(step)?, (step, 0));
        let of_step = session.received.extract_if(.., |received| received.step == step);
        let received: Vec<Completion> = of_step.flat_map(|received| received.completions).collect();
        generators.begin(step, &request, &received);
    }
    Ok(())
}

/// Where generators and trainers take turns with the memory, gives back what only training needs.
fn make_room(session: &mut Session) {
    let config = &session.config;
    if config.launch.colocate || config.rollout.sleep_while_training != SleepMode::Nothing {
        session.learner.zero_mut().release_gradients();
        runtime::release_memory();
    }
}

fn evaluate_if_due(session: &mut Session, generators: &mut dyn Generators, step: u64) -> Result<Option<Evaluation>> {
    if !evaluate::is_due(&session.config, step) {
        return Ok(None);
    }
    let policy = session.learner.policy();
    let published = (&*policy as &dyn ModelWeights, PolicyVersion(step));
    let mut rollouts = PolicyRollouts { generators, trainers: session.group(), policy: published };
    let evaluation = evaluate(session, &mut rollouts, PolicyVersion(step))?;
    drop(policy);
    if let Some(loggers) = &mut session.loggers {
        evaluate::record(session.run_dir.path(), step, &evaluation)?;
        loggers.log_evaluation(&evaluation)?;
    }
    Ok(Some(evaluation))
}

fn finish(mut session: Session) -> Result<Summary> {
    let model = session.save_model()?;
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
    if let Some(sink) = &mut session.sink {
        sink.finish(&model);
    }
    Ok(summary)
}

fn records(groups: &[Group], batch: &TrainingBatch, config: &RunConfig) -> Vec<CompletionRecord> {
    let best: f32 = config.rewards.iter().map(|spec| spec.weight).sum();
    let completions =
        groups.iter().flat_map(|group| group.completions.iter().map(move |completion| (group, completion)));
    completions
        .zip(&batch.advantages)
        .map(|((group, completion), &advantage)| {
            let scored = |function: &str| completion.rewards.iter().find(|reward| reward.function == function);
            let score = |spec: &RewardSpec| scored(spec.name()).map_or(0.0, |reward| spec.weight * reward.score);
            let reward: f32 = config.rewards.iter().map(score).sum();
            CompletionRecord::new(&group.prompt, completion, advantage, reward >= best)
        })
        .collect()
}

fn finish_metrics(metrics: &mut Metrics, clock: &Clock, groups: &[Group], config: &RunConfig) {
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
    let waited = clock.laps.iter().find(|(name, _)| *name == "time/generate").map_or(seconds, |(_, seconds)| *seconds);
    metrics.set("time/wait_for_rollouts", waited);
    // Generators that work ahead have the whole step for it.
    let generate = if config.rollout.max_lag > 0 { seconds } else { waited };
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

    /// Takes a part of the last lap for a lap of its own.
    fn split_off(&mut self, name: &'static str, part: Duration) {
        if let Some((_, seconds)) = self.laps.last_mut() {
            *seconds -= part.as_secs_f64();
        }
        self.laps.push((name, part.as_secs_f64()));
    }

    fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.laps.push((name, (now - self.last).as_secs_f64()));
        self.last = now;
    }
}
