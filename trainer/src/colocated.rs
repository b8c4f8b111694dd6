//! Engines in the trainers' own processes: each rank samples its share by itself, and trains when all have theirs.
//!
//! There is no network between them and no second copy of the weights in another process. While a rank trains, its engine
//! has neither weights nor keys and values. A new version is lent to it where both read the same memory: bf16 on a GPU, and
//! whole on every rank; the rank writes no weights while they are lent. Elsewhere it is copied into the engine, unit by unit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aha_core::config::RunConfig;
use aha_core::ids::PolicyVersion;
use aha_core::rollout::{Completion, Group, Prompt};
use aha_generator::{GeneratorOptions, LocalGenerator};
use aha_nn::comm::ProcessGroup;
use aha_nn::unit::ModelWeights;
use anyhow::{Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::runtime::Runtime;

use crate::agreement::agree;
use crate::clients::seconds;
use crate::generators::{Generators, is_filled_everywhere};
use crate::publish::{PublishError, PushReport};
use crate::rewarders::Rewarders;
use crate::rollouts::{Late, Received, RolloutError, RolloutRequest};

/// What errors call the engine.
const OWN: &str = "in this process";
/// Prompts in flight.
const MAX_IN_FLIGHT: usize = 256;

/// An engine in this process.
#[derive(Debug)]
pub struct Colocated {
    engine: LocalGenerator,
    runtime: Arc<Runtime>,
    rewarders: Rewarders,
    deadline: Duration,
    num_ranks: usize,
    /// When it was last done, and how long it had nothing to do.
    last_done: Option<Instant>,
    idle: Duration,
}

impl Colocated {
    /// Starts the engine of a rank, on the GPU that the rank trains on or on the CPU.
    ///
    /// # Errors
    /// Names the file that cannot be used, or the setting that cannot be met.
    pub fn start(
        config: &RunConfig,
        local_rank: usize,
        trainers: &ProcessGroup,
        policy: &dyn ModelWeights,
        runtime: Arc<Runtime>,
    ) -> Result<Self> {
        let options = GeneratorOptions { gpu: local_rank, awaits_weights: true, ..GeneratorOptions::from(config) };
        let engine = {
            let _entered = runtime.enter();
            LocalGenerator::load(&options)?
        };
        let (own, theirs) = (engine.manifest_hash(), policy.manifest().hash());
        ensure!(own == theirs, "the engine's model has manifest {own:016x}, and the trainer's {theirs:016x}");
        let deadline = seconds(config.rollout.deadline_seconds);
        let rewarders = Rewarders::of_run(config, trainers.rank(), runtime.handle())?;
        let num_ranks = trainers.size();
        Ok(Self { engine, runtime, rewarders, deadline, num_ranks, last_done: None, idle: Duration::ZERO })
    }

    /// The groups of a request, and those that were not there in time.
    async fn sample(&self, request: &RolloutRequest) -> Result<(Vec<Option<Group>>, Vec<Late>), RolloutError> {
        let started = Instant::now();
        let groups = request.prompts.iter().map(|prompt| self.group(request, prompt, started));
        let groups: Vec<Option<Group>> = stream::iter(groups).buffered(MAX_IN_FLIGHT).try_collect().await?;
        let (expected, waited) = (request.num_generations, started.elapsed());
        let late = |(prompt, group): (&Prompt, &Option<Group>)| {
            let (generator, prompt) = (OWN.to_owned(), prompt.id);
            group.is_none().then_some(Late { generator, prompt, missing: expected, expected, waited })
        };
        let late = request.prompts.iter().zip(&groups).filter_map(late).collect();
        Ok((groups, late))
    }

    async fn group(
        &self,
        request: &RolloutRequest,
        prompt: &Prompt,
        started: Instant,
    ) -> Result<Option<Group>, RolloutError> {
        let samples = (0..request.num_generations as u32).collect();
        let answer = self.engine.answer(request.message(prompt, samples, OWN.to_owned()));
        let rest = self.deadline.saturating_sub(started.elapsed());
        let Ok(completions) = tokio::time::timeout(rest, answer).await else { return Ok(None) };
        let refused = |reason: String| {
            let (generator, prompt) = (OWN.to_owned(), prompt.id);
            RolloutError::Refused { generator, prompt, reason }
        };
        let mut completions = completions.map_err(|error| refused(error.to_string()))?;
        let (expected, mut spans) = (request.min_version, completions.iter().flat_map(|completion| &completion.spans));
        if let Some(span) = spans.find(|span| span.version != expected) {
            // Final: nobody else could have it.
            return Err(refused(format!("it sampled with policy {}, not {expected}", span.version)));
        }
        self.rewarders.judge(prompt, &request.rewards, &mut completions).await;
        Ok(Some(Group { prompt: prompt.clone(), completions }))
    }
}

impl Generators for Colocated {
    fn publish(
        &mut self,
        trainers: &ProcessGroup,
        policy: &dyn ModelWeights,
        version: PolicyVersion,
    ) -> Result<PushReport, PublishError> {
        let started = Instant::now();
        let served = self.runtime.block_on(self.engine.serve(policy, version));
        let problem = |error: anyhow::Error| PublishError::Generator {
            generator: OWN.to_owned(),
            problem: format!("cannot serve {version}: {error:#}"),
        };
        let seconds = started.elapsed().as_secs_f64();
        let swap_seconds = served.as_ref().map_or(0.0, Duration::as_secs_f64);
        agree(trainers, served.map(|_| Vec::new()).map_err(problem))?;
        let bytes = (policy.manifest().numel() * policy.kind().elt_size_in_bytes()) as u64;
        Ok(PushReport { seconds, bytes, receive_seconds: seconds - swap_seconds, swap_seconds })
    }

    fn sleep(&mut self) -> Result<(), PublishError> {
        let problem = |error| PublishError::Generator { generator: OWN.to_owned(), problem: format!("{error}") };
        self.runtime.block_on(self.engine.sleep()).map_err(problem)
    }

    fn num_generators(&self) -> usize {
        self.num_ranks
    }

    /// Nothing: it has the processor for itself when it is waited for.
    fn begin(&mut self, _step: u64, _request: &RolloutRequest, _received: &[Completion]) {}

    fn num_ahead(&self) -> usize {
        0
    }

    fn received(&self) -> Vec<Received> {
        Vec::new()
    }

    fn rewarders(&self) -> &Rewarders {
        &self.rewarders
    }

    fn take_idle(&mut self) -> Duration {
        std::mem::take(&mut self.idle)
    }

    fn roll_out(
        &mut self,
        trainers: &ProcessGroup,
        _policy: (&dyn ModelWeights, PolicyVersion),
        request: &RolloutRequest,
    ) -> Result<Vec<Option<Group>>, RolloutError> {
        self.idle += self.last_done.map_or(Duration::ZERO, |done| done.elapsed());
        let sampled = self.runtime.block_on(self.sample(request));
        self.last_done = Some(Instant::now());
        let (groups, late) = match sampled {
            Ok((groups, late)) => (groups, Ok(late)),
            Err(error) => (Vec::new(), Err(error)),
        };
        let is_filled = is_filled_everywhere(trainers, late)?;
        debug_assert!(is_filled, "an engine of one's own does not come back");
        Ok(groups)
    }
}
