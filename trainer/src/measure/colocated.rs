//! The time and the memory of GRPO steps of random weights that are sampled from in the same process.

use std::sync::Arc;
use std::time::Instant;

use aha_core::config::RunConfig;
use aha_core::ids::{PolicyVersion, PromptId, TokenId};
use aha_core::random::{derive_seed, sampling_uniform};
use aha_core::rollout::{Group, Origin, Prompt, Sampling};
use aha_nn::model_config::ModelConfig;
use aha_nn::runtime;
use anyhow::{Context, Result};
use serde::Serialize;
use tch::Device;
use tokio::runtime::Runtime;

use super::{Steps, adamw};
use crate::colocated::Colocated;
use crate::entropy::EntropyControl;
use crate::generators::Generators;
use crate::optimize::optimize;
use crate::rollouts::RolloutRequest;
use crate::session::random_learner;
use crate::torch::learner::Learner;
use crate::training_batch::TrainingBatch;
use crate::world::World;

/// The prompts of every step, of random tokens. How many completions each has, and how long they are, `rollout` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RandomPrompts {
    pub count: usize,
    pub tokens: usize,
}

/// One step: the engine samples, sleeps while the rank trains, and is given the new weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Turn {
    pub generate_seconds: f64,
    pub sleep_seconds: f64,
    pub train_seconds: f64,
    /// From the last update to an engine that is awake with the new weights.
    pub push_seconds: f64,
    /// Of that, what the engine's thread took.
    pub swap_seconds: f64,
    pub grad_norm: f64,
    /// Memory that is taken when the engine has sampled: all of a GPU's, or this process's.
    pub awake_bytes: Option<u64>,
    /// When the engine sleeps.
    pub asleep_bytes: Option<u64>,
    /// When the rank has trained, and given its gradients back.
    pub trained_bytes: Option<u64>,
    /// With the new weights, and room for keys and values.
    pub awake_again_bytes: Option<u64>,
}

/// A rank by itself.
struct Rank<'a> {
    config: &'a RunConfig,
    learner: Learner,
    engine: Colocated,
    entropy: EntropyControl,
}

/// Takes steps by `config`, whose `model.path` is a folder that needs no weights; `train`, `rollout` and `generator` count
/// as in a run. Every completion has all its tokens, and rewards are drawn at random.
///
/// # Errors
/// If the device is missing, or cannot do what is asked for.
pub fn measure_colocated(
    config: &RunConfig,
    prompts: RandomPrompts,
    steps: Steps,
    runtime: Arc<Runtime>,
) -> Result<Vec<Turn>> {
    let (world, model) = (World::single(), ModelConfig::load(&config.model.path)?);
    let (learner, _store) = random_learner(config, &world, &model)?;
    let engine = {
        let policy = learner.policy();
        let trainers = learner.zero().group();
        let mut engine = Colocated::start(config, world.local_rank, trainers, &*policy, runtime)?;
        engine.publish(trainers, &*policy, PolicyVersion(0))?;
        engine
    };
    let mut rank = Rank { config, learner, engine, entropy: EntropyControl::new(&config.train) };
    let turn = |step: usize| rank.turn(prompts.request(config, model.vocab_size, step as u64), step as u64);
    let turns: Vec<Turn> = (0..steps.warm_up + steps.measured).map(turn).collect::<Result<_>>()?;
    Ok(turns[steps.warm_up..].to_vec())
}

/// Rewards that say nothing, so that nearly every completion has a gradient.
pub fn draw_rewards(request: &RolloutRequest, groups: &mut [Option<Group>]) {
    for completion in groups.iter_mut().flatten().flat_map(|group| &mut group.completions) {
        for reward in &mut completion.rewards {
            reward.score = sampling_uniform(request.seed ^ completion.prompt_id.0, completion.sample_index, 0);
        }
    }
}

impl Rank<'_> {
    fn turn(&mut self, request: RolloutRequest, step: u64) -> Result<Turn> {
        let Self { config, learner, engine, entropy } = self;
        let device = learner.zero().group().device();
        let (groups, generate_seconds) = timed(device, || {
            let policy = learner.policy();
            engine.roll_out(learner.zero().group(), (&*policy, request.min_version), &request)
        });
        let mut groups = groups?;
        draw_rewards(&request, &mut groups);
        let groups: Vec<Group> =
            groups.into_iter().collect::<Option<_>>().context("rollout.deadline_seconds is over")?;
        let awake_bytes = runtime::used_memory(device);
        let (slept, sleep_seconds) = timed(device, || engine.sleep());
        slept?;
        let asleep_bytes = runtime::used_memory(device);
        let mut batch = TrainingBatch::new(&groups, config, step);
        let options = adamw(&config.train);
        let (output, train_seconds) =
            timed(device, || optimize(learner, &config.train, &mut batch, (&options, entropy)));
        let grad_norm = output?.grad_norm;
        let ((), room_seconds) = timed(device, || {
            learner.zero_mut().release_gradients();
            runtime::release_memory();
        });
        let trained_bytes = runtime::used_memory(device);
        let publish = || engine.publish(learner.zero().group(), &*learner.policy(), PolicyVersion(step + 1));
        let (pushed, publish_seconds) = timed(device, publish);
        let push_seconds = room_seconds + publish_seconds;
        let swap_seconds = pushed?.swap_seconds;
        let awake_again_bytes = runtime::used_memory(device);
        Ok(Turn {
            generate_seconds,
            sleep_seconds,
            train_seconds,
            push_seconds,
            swap_seconds,
            grad_norm,
            awake_bytes,
            asleep_bytes,
            trained_bytes,
            awake_again_bytes,
        })
    }
}

impl RandomPrompts {
    fn request(self, config: &RunConfig, vocab_size: usize, step: u64) -> RolloutRequest {
        let token = |path: &[u64]| (derive_seed(config.run.seed, path) % vocab_size as u64) as TokenId;
        let prompt = |index: u64| Prompt {
            id: PromptId(index),
            text: String::new(),
            token_ids: (0..self.tokens as u64).map(|position| token(&[step, index, position])).collect(),
            columns: serde_json::Map::new(),
            origin: Origin::default(),
        };
        RolloutRequest {
            prompts: (0..self.count as u64).map(prompt).collect(),
            num_generations: config.rollout.num_generations,
            sampling: Sampling { ignore_eos: true, ..config.rollout.sampling() },
            seed: derive_seed(config.run.seed, &[step]),
            rewards: config.rewards.clone(),
            min_version: PolicyVersion(step),
        }
    }
}

/// What `work` gives, and the seconds until the device has done it.
fn timed<T>(device: Device, work: impl FnOnce() -> T) -> (T, f64) {
    runtime::synchronize(device);
    let start = Instant::now();
    let done = work();
    runtime::synchronize(device);
    (done, start.elapsed().as_secs_f64())
}
