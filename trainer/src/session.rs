//! What `aha trainer` and `aha sft` have in common: the ranks' group, the run folder, the model, and going on from a
//! checkpoint.

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::{Duration, Instant};

use aha_core::config::{DeviceKind, Dtype, RunConfig};
use aha_core::schedule::Schedule;
use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};
use aha_nn::logprob::chunk_rows;
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::{check_weights, load_weights};
use aha_nn::optim::AdamW;
use aha_nn::runtime;
use aha_nn::weights::Weights;
use anyhow::{Context, Result};
use tch::{Device, Kind};

use crate::adapters;
use crate::checkpoint::{self, Checkpoint};
use crate::loggers::{LoggerOptions, Loggers};
use crate::prompts::PromptSource;
use crate::run_dir::RunDir;
use crate::torch::learner::{Learner, LearnerOptions};
use crate::torch::objective::Objective;
use crate::torch::zero::Zero;
use crate::world::World;

/// A rank that is ready to train.
#[derive(Debug)]
pub struct Session {
    pub config: RunConfig,
    pub world: World,
    pub run_dir: RunDir,
    pub prompts: PromptSource,
    pub learner: Learner,
    /// Steps that are done; training goes on with this one, counted from 0.
    pub step: u64,
    /// Only rank 0 writes.
    pub loggers: Option<Loggers>,
    pub started: Instant,
    /// Rank 0 serves it: the others may still be reading from it when this rank has joined.
    _store: Option<Store>,
}

impl Session {
    /// Meets the other ranks, opens the run folder, and loads the newest checkpoint or else the base model.
    ///
    /// # Errors
    /// Names what is missing or does not fit.
    pub fn start(config: &RunConfig, world: &World, objective: Objective) -> Result<Self> {
        let started = Instant::now();
        let device = device(config, world)?;
        runtime::set_num_threads(num_threads(config, world));
        let model_config = ModelConfig::load(&config.model.path)?;
        let prompts = PromptSource::load(config, &model_config)?;
        if objective != Objective::Supervised {
            prompts.check_run()?;
        }

        // Before anything is written: a run that cannot begin leaves no folder.
        if !config.model.random_init && !RunDir::exists(config) {
            check_weights(&config.model.path, &model_config)?;
            adapters::check(config, &model_config)?;
        }
        let (group, store) = join(config, world, device)?;
        let run_dir = RunDir::open(config, &group)?;
        let checkpoint = checkpoint::latest(&run_dir, &group)?;
        let place = (world.size, device);
        let weights = if config.lora.is_on() {
            let folder = checkpoint.as_ref().map(|checkpoint| checkpoint.folder.as_path());
            adapters::initial(config, &model_config, folder, place)?
        } else {
            initial_weights(config, &model_config, checkpoint.as_ref(), place)?
        };
        let step = checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.state.step);
        let mut zero = Zero::new(config.train.zero_stage, group, weights);
        if let Some(checkpoint) = &checkpoint {
            let state = checkpoint.optimizer(&zero.weights().manifest)?;
            zero.load_state(checkpoint.state.num_updates, &state)?;
            tracing::info!("going on from {}", checkpoint.folder.display());
        }
        let options = learner_options(config, objective, model_config.vocab_size);
        let learner = if config.lora.is_on() {
            let base = adapters::base(config, &model_config, (kind(config, device), device))?;
            Learner::of_adapters(model_config, options, zero, base)
        } else {
            let reference = if objective.needs_reference() {
                Some(reference_weights(config, &model_config, checkpoint.as_ref(), device)?)
            } else {
                None
            };
            Learner::new(model_config, options, zero, reference)
        };
        let loggers = if world.rank == 0 { Some(loggers(config, &run_dir, step)?) } else { None };
        Ok(Self {
            config: config.clone(),
            world: world.clone(),
            run_dir,
            prompts,
            learner,
            step,
            loggers,
            started,
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
    pub fn sync_reference_if_due(&mut self, step: u64) {
        let train = &self.config.train;
        if train.sync_ref_model && step.is_multiple_of(train.ref_model_sync_steps) {
            self.learner.sync_reference(train.ref_model_mixup_alpha);
        }
    }

    /// Writes a checkpoint where `train.save_steps` asks for one after `step` steps, and always after the last.
    ///
    /// # Errors
    /// If it cannot be written whole; checkpoints before it stay.
    pub fn save_if_due(&self, step: u64) -> Result<()> {
        let train = &self.config.train;
        if step.is_multiple_of(train.save_steps) || step == train.max_steps {
            checkpoint::save(&self.run_dir, &self.config, &self.learner, step)?;
        }
        Ok(())
    }

    /// Writes the finished model to the run's `model/`.
    ///
    /// # Errors
    /// If it cannot be written whole.
    pub fn save_model(&self) -> Result<std::path::PathBuf> {
        let folder = self.run_dir.model();
        if self.world.rank == 0 {
            let base = &self.config.model.path;
            let weights = (&*self.learner.policy(), self.learner.kind());
            checkpoint::save_model(&folder, base, self.learner.config(), weights)?;
        }
        self.group().barrier()?;
        Ok(folder)
    }
}

fn device(config: &RunConfig, world: &World) -> Result<Device> {
    let name = match config.model.device {
        DeviceKind::Cpu => "cpu",
        DeviceKind::Cuda => "cuda",
        DeviceKind::Auto => "auto",
    };
    Ok(runtime::device(name, world.local_rank)?)
}

fn num_threads(config: &RunConfig, world: &World) -> NonZeroUsize {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = if config.train.threads > 0 { config.train.threads } else { cores / world.size };
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
    let address = Address::Host(world.own_address());
    let spec = GroupSpec { name: "trainers".to_owned(), rank: world.rank, size: world.size, timeout, address };
    Ok((ProcessGroup::new(backend, &store, &spec)?, Some(store)))
}

/// Type of the weights in the forward and backward pass.
fn kind(config: &RunConfig, device: Device) -> Kind {
    match (config.model.dtype, device) {
        (Dtype::Float32, _) | (Dtype::Auto, Device::Cpu) => Kind::Float,
        (Dtype::Bfloat16, _) | (Dtype::Auto, _) => Kind::BFloat16,
    }
}

fn initial_weights(
    config: &RunConfig,
    model_config: &ModelConfig,
    checkpoint: Option<&Checkpoint>,
    (world_size, device): (usize, Device),
) -> Result<Weights> {
    let kind = kind(config, device);
    if checkpoint.is_none() && config.model.random_init {
        return Ok(Weights::random(model_config, config.run.seed, world_size, kind, device));
    }
    let folder: &Path = checkpoint.map_or(&config.model.path, |checkpoint| &checkpoint.folder);
    Ok(load_weights(folder, model_config, world_size, kind, device)?)
}

/// The initial policy; the one that a checkpoint left where `train.sync_ref_model` moves it.
fn reference_weights(
    config: &RunConfig,
    model_config: &ModelConfig,
    checkpoint: Option<&Checkpoint>,
    device: Device,
) -> Result<Weights> {
    let initial = initial_weights(config, model_config, None, (1, device))?;
    match checkpoint.and_then(Checkpoint::reference).filter(|_| config.train.sync_ref_model) {
        Some(folder) => Ok(load_weights(&folder, model_config, 1, initial.kind(), device)?),
        None => Ok(initial),
    }
}

fn learner_options(config: &RunConfig, objective: Objective, vocab_size: usize) -> LearnerOptions {
    let supervised = objective == Objective::Supervised;
    let grpo_length = config.data.max_prompt_length + config.rollout.max_completion_length as usize;
    LearnerOptions {
        objective,
        temperature: if supervised { 1.0 } else { f64::from(config.rollout.temperature) },
        max_grad_norm: config.train.max_grad_norm,
        gradient_checkpointing: config.train.gradient_checkpointing,
        share_prompts: config.train.share_prompts,
        max_length: if supervised { config.sft.max_length } else { grpo_length },
        logit_rows: chunk_rows(vocab_size as i64),
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
