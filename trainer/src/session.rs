//! What `aha trainer` and `aha sft` have in common: the ranks' group, the run folder, the model, and going on from a
//! checkpoint.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aha_core::config::{DeviceKind, Dtype, RunConfig, Train};
use aha_core::schedule::Schedule;
use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};
use aha_nn::fused_kernels;
use aha_nn::kernels::cuda::CompileCache;
use aha_nn::logprob::chunk_rows_on;
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::{check_weights, load_units};
use aha_nn::optim::AdamW;
use aha_nn::runtime;
use aha_nn::unit::ModelWeights;
use aha_nn::weights::Weights;
use anyhow::{Context, Result};
use tch::{Device, Kind};

use crate::adapters;
use crate::checkpoint::{self, Best, Checkpoint, Progress};
use crate::checkpoint_sink::CheckpointSink;
use crate::entropy::EntropyControl;
use crate::evaluate::{self, Asked, Evaluation};
use crate::loggers::{LoggerOptions, Loggers};
use crate::model_card::ModelCard;
use crate::prompts::PromptSource;
use crate::rollouts::Received;
use crate::run_dir::RunDir;
use crate::skips::SkipCounter;
use crate::stop::{StopRequest, StopWatch, Stopped};
use crate::torch::learner::{Learner, LearnerOptions};
use crate::torch::objective::{Objective, PolicyObjective};
use crate::torch::parameters::{Parameters, ParametersBuilder, Sharding};
use crate::torch::zero::Zero;
use crate::world::World;

/// A rank that is ready to train.
#[derive(Debug)]
pub struct Session {
    pub config: RunConfig,
    pub world: World,
    pub run_dir: RunDir,
    pub prompts: PromptSource,
    /// Asked beside held-out prompts.
    pub suites: Vec<Asked>,
    pub learner: Learner,
    pub entropy: EntropyControl,
    /// Steps that are done; training goes on with this one, counted from 0.
    pub step: u64,
    /// What had been received of later steps when the run was interrupted.
    pub received: Vec<Received>,
    /// Only rank 0 writes.
    pub loggers: Option<Loggers>,
    /// Where checkpoints and the model go as well; none unless the caller gives one to rank 0.
    pub sink: Option<Box<dyn CheckpointSink>>,
    pub started: Instant,
    pub(crate) skips: SkipCounter,
    stop: StopWatch,
    /// The best evaluation so far, where `eval.keep_best` is on.
    best: Option<Best>,
    /// Steps of the newest checkpoint; 0 where there is none.
    saved: u64,
    /// Rank 0 serves it: the others may still be reading from it when this rank has joined.
    _store: Option<Store>,
}

impl Session {
    /// Meets the other ranks, opens the run folder, and loads the newest checkpoint or else the base model.
    ///
    /// # Errors
    /// Names what is missing or does not fit.
    pub fn start(config: &RunConfig, world: &World, objective: Objective, stop: &StopRequest) -> Result<Self> {
        let started = Instant::now();
        let device = device(config, world)?;
        runtime::set_num_threads(num_threads(config, world));
        runtime::cache_memory();
        let model_config = ModelConfig::load(&config.model.path)?;
        let prompts = PromptSource::load(config, &model_config)?;
        let mut suites = Vec::new();
        if objective != Objective::Supervised {
            prompts.check_run()?;
            suites = evaluate::suites(config, &model_config)?;
        }

        // Before anything is written: a run that cannot begin leaves no folder.
        if !config.model.random_init && !RunDir::exists(config) {
            check_weights(&config.model.path, &model_config)?;
            adapters::check(config, &model_config)?;
        }
        let (group, store) = join(config, world, device)?;
        let run_dir = RunDir::open(config, &group)?;
        let checkpoint = checkpoint::latest(&run_dir, &group)?;
        let group = Arc::new(group);
        load_kernels(config, &model_config, device)?;
        let learner = learner((config, objective), &model_config, checkpoint.as_ref(), &group)?;
        let step = checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.state.step);
        let remembered = checkpoint.as_ref().and_then(|checkpoint| checkpoint.state.entropy);
        let entropy = remembered.unwrap_or_else(|| EntropyControl::new(&config.train));
        let best = checkpoint.as_ref().and_then(|checkpoint| checkpoint.state.best.clone());
        let best = best.filter(|_| config.eval.keep_best);
        let received = checkpoint.as_ref().map_or_else(|| Ok(Vec::new()), Checkpoint::received)?;
        let loggers = if world.rank == 0 { Some(loggers(config, &run_dir, step)?) } else { None };
        Ok(Self {
            config: config.clone(),
            world: world.clone(),
            run_dir,
            prompts,
            suites,
            learner,
            entropy,
            step,
            received,
            loggers,
            sink: None,
            started,
            skips: SkipCounter::new(config.train.max_skipped_steps),
            stop: StopWatch::new(stop, config.train.max_wall_clock_seconds, started),
            best,
            saved: step,
            _store: store,
        })
    }

    pub fn group(&self) -> &ProcessGroup {
        self.learner.zero().group()
    }

    /// The optimizer's constants for `step`, counted from 0.
    #[must_use]
    pub fn adamw(&self, step: u64) -> AdamW {
        let train = &self.config.train;
        let schedule = Schedule {
            kind: train.lr_scheduler_type,
            learning_rate: train.learning_rate,
            min_lr_rate: train.min_lr_rate,
            warmup_steps: train.num_warmup_steps(),
            max_steps: train.max_steps,
        };
        AdamW {
            lr: schedule.at(step),
            beta1: train.adam_beta1,
            beta2: train.adam_beta2,
            eps: train.adam_epsilon,
            weight_decay: train.weight_decay,
        }
    }

    /// Moves the reference policy where `train.sync_ref_model` asks for it after `step` steps.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn sync_reference_if_due(&mut self, step: u64) -> Result<()> {
        let train = &self.config.train;
        if train.sync_ref_model && step.is_multiple_of(train.ref_model_sync_steps) {
            self.learner.sync_reference(train.ref_model_mixup_alpha)?;
        }
        Ok(())
    }

    /// Takes note of an evaluation: where `eval.keep_best` is on and it is better than all before, the step is saved.
    pub fn note_evaluation(&mut self, evaluation: &Evaluation) {
        let eval = &self.config.eval;
        let Some(value) = evaluation.metric(&eval.metric).filter(|_| eval.keep_best) else { return };
        if self.best.as_ref().is_none_or(|best| value > best.value) {
            self.best = Some(Best { step: evaluation.step, metric: eval.metric.clone(), value });
        }
    }

    /// Writes a checkpoint where `train.save_steps` asks for one after `step` steps, where the step's evaluation is the best,
    /// and always after the last. `received` tells what has come of later steps.
    ///
    /// # Errors
    /// If it cannot be written whole; checkpoints before it stay.
    pub fn save_if_due(&mut self, step: u64, received: &dyn Fn() -> Vec<Received>) -> Result<()> {
        let train = &self.config.train;
        let is_best = self.best.as_ref().is_some_and(|best| best.step == step);
        if is_best || step.is_multiple_of(train.save_steps) || step == train.max_steps {
            self.save(step, &received())?;
        }
        Ok(())
    }

    /// Whether the run ends after `step` steps, before its last; what is done is then saved.
    ///
    /// # Errors
    /// If the ranks cannot agree, or the checkpoint cannot be written whole.
    pub fn stop_if_due(&mut self, step: u64, received: &dyn Fn() -> Vec<Received>) -> Result<Option<Stopped>> {
        let Some(reason) = self.stop.decide(Instant::now(), self.learner.zero().group())? else { return Ok(None) };
        if step > self.saved {
            self.save(step, &received())?;
        }
        Ok(Some(Stopped { step, max_steps: self.config.train.max_steps, reason }))
    }

    fn save(&mut self, step: u64, received: &[Received]) -> Result<()> {
        let started = Instant::now();
        if let Some(loggers) = &self.loggers {
            loggers.sync()?;
        }
        let entropy = self.config.train.use_adaptive_entropy.then_some(self.entropy);
        let progress = Progress { step, entropy, best: self.best.as_ref(), received };
        let folder = checkpoint::save(&self.run_dir, &self.config, &self.learner, progress)?;
        self.saved = step;
        self.stop.saved_in(started.elapsed());
        if let Some(sink) = &mut self.sink {
            sink.checkpoint(&folder, step);
        }
        Ok(())
    }

    /// Writes the finished model to the run's `model/`, with its card.
    ///
    /// # Errors
    /// If it cannot be written whole.
    pub fn save_model(&self) -> Result<std::path::PathBuf> {
        let folder = self.run_dir.model();
        let base = &self.config.model.path;
        let weights = (&*self.learner.policy(), self.learner.kind());
        checkpoint::save_model(&folder, base, self.learner.config(), weights, self.group())?;
        if self.world.is_main() {
            ModelCard::describe(&folder, &folder);
        }
        self.group().barrier()?;
        Ok(folder)
    }
}

/// A policy of random weights (`model.random_init`) with nothing around it, for measuring; the store outlives it.
///
/// # Errors
/// Names what is missing or does not fit.
pub(crate) fn random_learner(
    config: &RunConfig,
    world: &World,
    model_config: &ModelConfig,
) -> Result<(Learner, Option<Store>)> {
    let device = device(config, world)?;
    runtime::set_num_threads(num_threads(config, world));
    runtime::cache_memory();
    load_kernels(config, model_config, device)?;
    let (group, store) = join(config, world, device)?;
    let objective = Objective::Policy(PolicyObjective::new(&config.train));
    Ok((learner((config, objective), model_config, None, &Arc::new(group))?, store))
}

fn device(config: &RunConfig, world: &World) -> Result<Device> {
    let name = match config.model.device {
        DeviceKind::Cpu => "cpu",
        DeviceKind::Cuda => "cuda",
        DeviceKind::Auto => "auto",
    };
    runtime::device(name, world.local_rank).with_context(|| {
        let local_rank = world.local_rank;
        format!(
            "LOCAL_RANK {local_rank}: every trainer rank needs a GPU of its own, as NCCL refuses two on one; start fewer ranks \
             on this machine, check CUDA_VISIBLE_DEVICES, or set model.device: cpu"
        )
    })
}

fn num_threads(config: &RunConfig, world: &World) -> NonZeroUsize {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = if config.train.threads > 0 { config.train.threads } else { world.cores_of_rank(cores) };
    NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN)
}

fn join(config: &RunConfig, world: &World, device: Device) -> Result<(ProcessGroup, Option<Store>)> {
    if world.size == 1 {
        return Ok((ProcessGroup::solo("trainers", device), None));
    }
    let timeout = Duration::from_secs_f64(config.train.collective_timeout_seconds);
    let (host, port) = (&world.master_addr, world.master_port);
    let store = if world.rank == 0 { Store::host(host, port, timeout) } else { Store::connect(host, port, timeout) };
    let store = store.with_context(|| format!("meeting the other ranks at MASTER_ADDR:MASTER_PORT {host}:{port}"))?;
    let backend = match device {
        Device::Cuda(device) => Backend::Nccl { device },
        _ => Backend::Gloo,
    };
    let address = Address::Host(world.own_address(timeout));
    let spec = GroupSpec { name: "trainers".to_owned(), rank: world.rank, size: world.size, timeout, address };
    let group = ProcessGroup::new(backend, &store, &spec)?.checked(config.train.check_collectives);
    Ok((group, Some(store)))
}

/// The policy, fresh or as a checkpoint left it.
fn learner(
    (config, objective): (&RunConfig, Objective),
    model_config: &ModelConfig,
    checkpoint: Option<&Checkpoint>,
    group: &Arc<ProcessGroup>,
) -> Result<Learner> {
    let (kind, device) = (kind(config.model.dtype, group.device()), group.device());
    let sharding = sharding(&config.train);
    let builder = || ParametersBuilder::new(sharding, group, model_config.manifest(), kind);
    let weights = if config.lora.is_on() {
        let folder = checkpoint.map(|checkpoint| checkpoint.folder.as_path());
        let adapters = adapters::initial(config, model_config, folder, (group.size(), device))?;
        Parameters::of(sharding, group, adapters)
    } else {
        initial_weights(config, model_config, checkpoint, builder())?
    };
    let mut zero = Zero::with(sharding, Arc::clone(group), weights, &config.train.optimizer_options())?;
    if let Some(checkpoint) = checkpoint {
        let state = checkpoint.optimizer(zero.weights().manifest())?;
        zero.load_state(checkpoint.state.num_updates, &state)?;
        tracing::info!("going on from {}", checkpoint.folder.display());
    }
    let options = learner_options((config, objective), model_config.vocab_size, device);
    let model_config = model_config.clone();
    if config.lora.is_on() {
        let base = adapters::base(config, &model_config, (kind, device))?;
        return Ok(Learner::of_adapters(model_config, options, zero, base));
    }
    let in_reward = objective != Objective::Supervised && config.train.use_kl_in_reward;
    let reference = if objective.needs_reference() || in_reward {
        Some(reference_weights(config, &model_config, checkpoint, builder())?)
    } else {
        None
    };
    Ok(Learner::new(model_config, options, zero, reference))
}

/// Our kernels on a GPU, where there are some for the model.
fn load_kernels(config: &RunConfig, model: &ModelConfig, device: Device) -> Result<()> {
    if !device.is_cuda() {
        return Ok(());
    }
    let folder = config.generator.kernel_cache.clone().or_else(CompileCache::default_folder);
    let folder =
        folder.context("no home folder to keep compiled GPU kernels in: name one as generator.kernel_cache")?;
    let started = Instant::now();
    let cache = CompileCache::new(folder.clone());
    let are_there = fused_kernels::load(device, kind(config.model.dtype, device), model.hidden_size, &cache)
        .with_context(|| format!("preparing {device:?} and its kernels"))?;
    if are_there {
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(seconds, folder = %folder.display(), "GPU kernels are compiled and loaded");
    } else {
        tracing::warn!(hidden_size = model.hidden_size, "no GPU kernels for this width: libtorch's operations serve");
    }
    Ok(())
}

/// What ranks share out.
fn sharding(train: &Train) -> Sharding {
    Sharding {
        stage: train.zero_stage,
        offload_optimizer: train.offload_optimizer,
        offload_params: train.offload_params,
    }
}

/// Type of the weights in the forward and backward pass.
fn kind(dtype: Dtype, device: Device) -> Kind {
    match (dtype, device) {
        (Dtype::Float32, _) | (Dtype::Auto, Device::Cpu) => Kind::Float,
        (Dtype::Bfloat16, _) | (Dtype::Auto, _) => Kind::BFloat16,
    }
}

fn initial_weights(
    config: &RunConfig,
    model_config: &ModelConfig,
    checkpoint: Option<&Checkpoint>,
    mut builder: ParametersBuilder,
) -> Result<Parameters> {
    if checkpoint.is_none() && config.model.random_init {
        for unit_idx in 0..model_config.manifest().units.len() {
            builder.add(&Weights::random_unit(model_config, config.run.seed, unit_idx));
        }
    } else {
        let folder: &Path = checkpoint.map_or(&config.model.path, |checkpoint| &checkpoint.folder);
        load_units(folder, model_config, |_, params| builder.add(&params))?;
    }
    Ok(builder.finish())
}

/// The initial policy; the one that a checkpoint left where `train.sync_ref_model` moves it.
fn reference_weights(
    config: &RunConfig,
    model_config: &ModelConfig,
    checkpoint: Option<&Checkpoint>,
    mut builder: ParametersBuilder,
) -> Result<Parameters> {
    match checkpoint.and_then(Checkpoint::reference).filter(|_| config.train.sync_ref_model) {
        Some(folder) => {
            load_units(&folder, model_config, |_, params| builder.add(&params))?;
            Ok(builder.finish())
        }
        None => initial_weights(config, model_config, None, builder),
    }
}

fn learner_options((config, objective): (&RunConfig, Objective), vocab_size: usize, device: Device) -> LearnerOptions {
    let supervised = objective == Objective::Supervised;
    let grpo_length = config.data.max_prompt_length + config.rollout.max_completion_length as usize;
    LearnerOptions {
        objective,
        temperature: if supervised { 1.0 } else { f64::from(config.rollout.temperature) },
        max_grad_norm: config.train.max_grad_norm,
        gradient_checkpointing: config.train.gradient_checkpointing,
        gradient_checkpointing_interval: config.train.gradient_checkpointing_interval,
        share_prompts: config.train.share_prompts,
        max_length: if supervised { config.sft.max_length } else { grpo_length },
        logit_rows: chunk_rows_on(device, vocab_size as i64),
    }
}

fn loggers(config: &RunConfig, run_dir: &RunDir, step: u64) -> Result<Loggers> {
    let prefill = config.data.prompt.assistant_prefill.as_deref().unwrap_or_default();
    let options = LoggerOptions {
        tensorboard: config.logging.tensorboard,
        logging_steps: config.logging.logging_steps,
        log_completions: config.logging.num_completions_to_print,
        resume_from: (step > 0).then_some(step),
        seed: config.run.seed,
        max_steps: config.train.max_steps,
        sample_prefix: prefill.rfind('<').map_or("", |start| &prefill[start..]).to_owned(),
    };
    Ok(Loggers::create(run_dir.path(), &options)?)
}
