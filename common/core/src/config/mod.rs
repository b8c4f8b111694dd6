//! The configuration of a run: one YAML file, plain structs, validated once.
//!
//! Keys that TRL's `GRPOConfig` has keep its names and meanings. Defaults that differ from TRL's say so.

mod data;
mod eval;
mod hub;
mod load;
mod lora;
mod security;
mod train;
mod validate;
mod validate_data;
mod validate_train;

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use data::{Countdown, Data, DataSource, PromptTemplate, PromptTooLong, Source};
pub use eval::{AVERAGE, Eval, HELD_OUT, Questions, Suite, SuiteOptions, Suites, built_in_suites};
pub use hub::{Hub, HubStrategy};
pub use load::{ConfigError, load, load_eval, load_with_credentials, parse_override};
pub use lora::{ALL_LINEAR, BaseQuantization, InitLoraWeights, Lora, TargetModule};
pub use security::{Credentials, Identity, Secret, Security, TOKEN_VARIABLE};
pub use train::Train;

pub use crate::reward::RewardSpec;
use crate::rollout::Sampling;

/// Everything a run is made of.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RunConfig {
    pub run: Run,
    pub model: Model,
    pub data: Data,
    /// Reward functions; a completion's reward is the weighted sum of their scores.
    pub rewards: Vec<RewardSpec>,
    pub rollout: Rollout,
    pub train: Train,
    pub lora: Lora,
    pub sft: Sft,
    pub eval: Eval,
    pub generator: Generator,
    pub security: Security,
    pub hub: Hub,
    pub logging: Logging,
    pub launch: Launch,
}

/// Where the run lives and what makes it repeatable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Run {
    /// Folder of the run below `output_dir`.
    pub name: String,
    pub output_dir: PathBuf,
    pub seed: u64,
}

/// The model that is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Model {
    /// A Hugging Face folder: config.json, safetensors, tokenizer files; or, in a binary built with the feature `hub`, a
    /// repository of the Hub, `owner/name[@revision]`.
    pub path: PathBuf,
    /// Start from random weights of config.json's shape instead of reading any.
    pub random_init: bool,
    /// Type of the weights in the forward and backward pass; masters and moments are fp32.
    pub dtype: Dtype,
    pub device: DeviceKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// float32 on CPU, bfloat16 on GPU.
    #[default]
    Auto,
    Float32,
    Bfloat16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A GPU where there is one.
    #[default]
    Auto,
    Cpu,
    Cuda,
}

/// How completions are sampled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rollout {
    /// Completions of a step over all ranks; a multiple of `num_generations`.
    pub generation_batch_size: usize,
    /// Completions of a prompt, G.
    pub num_generations: usize,
    pub max_completion_length: u32,
    /// Nothing ends a completion before this many tokens.
    pub min_completion_length: u32,
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    /// Over 1 makes tokens of prompt and completion less likely. As in TRL, it takes part in sampling alone: the
    /// trainer's log-probs leave it out, as they do the cuts above.
    pub repetition_penalty: f32,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    /// Prompts whose completions take longer are replaced by others; at half of it, another generator is asked for what is
    /// missing. A step that begins behind others has their time as well.
    pub deadline_seconds: f64,
    /// Versions that a token may be older than the policy that trains on it. 0 is strictly on policy: generators and
    /// trainers take turns. With k, completions of the k next steps are sampled while a step trains, and go on with new
    /// weights as they come.
    pub max_lag: u64,
    /// What generators give back while the trainers train, for where they share memory.
    pub sleep_while_training: SleepMode,
}

/// Memory that a generator gives back between the completions of a step and the next push.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SleepMode {
    #[default]
    Nothing,
    /// The keys and values, which the next push makes worthless.
    Cache,
    /// The weights as well, which the next push brings; on the CPU.
    Weights,
}

/// What carries weights from trainers to generators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PushBackend {
    /// NCCL where every trainer and generator has a GPU of its own, else Gloo.
    #[default]
    Auto,
    /// TCP between host memory, wherever the weights are.
    Gloo,
    Nccl,
}

/// Supervised fine-tuning (`aha sft`): its own batch and length; the optimizer is `train`'s.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sft {
    /// Sequences of a step.
    pub batch_size: usize,
    /// The completion, a minijinja template over the row's columns; the loss is on its tokens.
    pub completion: String,
    /// Column of whole conversations, lists of `role` and `content`, in place of `data.prompt` and `completion`; the loss is
    /// on what the assistant says.
    pub messages: Option<String>,
    /// Longest sequence in tokens.
    pub max_length: usize,
}

/// The rollout engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Generator {
    /// Addresses (`host:port`) of running generators; `aha launch` fills them in.
    pub addresses: Vec<String>,
    /// Address (`host:port`) at which trainer rank 0 listens for generators that come and go, and generators register;
    /// unset for none.
    pub coordinator: Option<String>,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Memory of the KV cache.
    pub kv_cache_mib: usize,
    /// Sequences decoded at once.
    pub max_num_seqs: usize,
    /// Tokens of one engine step, prefill and decode together.
    pub max_num_batched_tokens: usize,
    /// Longest sequence; 0 takes the model's own limit.
    pub max_model_len: usize,
    /// Tokens of each sequence that a GPU samples between two looks of the host; the CPU looks after each. Completions
    /// do not depend on it; new requests, weights and aborts wait for the next look.
    pub steps_per_look: usize,
    /// What happens to the cache of running sequences when weights change.
    pub kv: KvPolicy,
    /// How the layers' matrices are stored and multiplied on the CPU. A GPU serves bf16 only.
    pub quantization: Quantization,
    /// Keep the keys and values of finished sequences for prompts that begin alike, until the memory is needed.
    pub enable_prefix_caching: bool,
    /// Threads of the engine; 0 takes all cores.
    pub threads: usize,
    /// Folder of compiled GPU kernels, those of trainers too; unset takes `~/.cache/aha/kernels`.
    pub kernel_cache: Option<PathBuf>,
    /// Where Prometheus metrics are served, at `/metrics` over HTTP; unset serves none. The generators of `aha launch`
    /// take this port and those after it.
    pub metrics_address: Option<SocketAddr>,
    /// Serve the metrics under vLLM's names too, for dashboards that know those.
    pub vllm_metric_names: bool,
    /// A client waits this long for a generator that does not answer yet.
    pub connect_timeout_seconds: f64,
    /// A generator that does not answer for this long before a weight push is left out of it. A connection on which nothing
    /// arrives for this long is probed, and lost after as long again; a generator that registered is forgotten after three
    /// times as long.
    pub probe_timeout_seconds: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvPolicy {
    /// Running sequences go on with the keys and values of the older weights.
    Keep,
    /// Running sequences are computed again under the new weights.
    #[default]
    Recompute,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// fp32, exact.
    #[default]
    None,
    /// 8-bit integers: rows are quantised as they come, weights per output. Faster; log-probs differ from the trainer's.
    Int8,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Logging {
    /// Steps between lines on the terminal; metrics.jsonl has every step.
    pub logging_steps: u64,
    pub tensorboard: bool,
    /// Completions shown on the terminal now and then; 0 shows none.
    pub num_completions_to_print: usize,
    /// Every process writes what it logs to `logs/ROLE-RANK.jsonl` in the run's folder as well, one JSON object a line.
    pub json_logs: bool,
    /// Where trainer rank 0 serves Prometheus metrics of the newest step, at `/metrics` over HTTP; unset serves none.
    pub metrics_address: Option<SocketAddr>,
}

/// What `aha launch` starts on this machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Launch {
    /// Trainer ranks; 0 takes one for each GPU but the generators', or 1 on a CPU.
    pub trainers: usize,
    pub generators: usize,
    /// Instead of generators, every trainer rank has an engine in its own process, which samples its share while the rank
    /// does not train, and gives its memory back while it does.
    pub colocate: bool,
    /// Memory of the GPU that each process has, in GiB: what `aha plan` judges by.
    pub device_memory_gib: Option<f64>,
    /// After Ctrl-C or SIGTERM, trainers may take so long to finish their step and to write a checkpoint. A second signal
    /// ends them at once.
    pub save_seconds: f64,
    /// A role that has not stopped this long after SIGTERM is killed.
    pub grace_seconds: f64,
    /// How often a launch goes on after a role has failed: a generator is started again by itself, for a trainer all are,
    /// and go on from the last checkpoint.
    pub max_restarts: usize,
}

impl Default for Run {
    fn default() -> Self {
        Self { name: String::new(), output_dir: "runs".into(), seed: 42 }
    }
}

impl Default for Model {
    fn default() -> Self {
        Self { path: PathBuf::new(), random_init: false, dtype: Dtype::Auto, device: DeviceKind::Auto }
    }
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            generation_batch_size: 64,
            num_generations: 8,
            max_completion_length: 512,
            min_completion_length: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            max_lag: 0,
            deadline_seconds: 1800.0,
            sleep_while_training: SleepMode::Nothing,
        }
    }
}

impl Rollout {
    /// Prompts of a step over all ranks.
    #[must_use]
    pub fn prompts_per_step(&self) -> usize {
        self.generation_batch_size / self.num_generations.max(1)
    }

    #[must_use]
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            max_tokens: self.max_completion_length,
            min_tokens: self.min_completion_length,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            ..Sampling::default()
        }
    }
}

impl Default for Sft {
    fn default() -> Self {
        Self { batch_size: 32, completion: String::new(), messages: None, max_length: 1024 }
    }
}

impl Default for Generator {
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            coordinator: None,
            block_size: 16,
            kv_cache_mib: 1024,
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
            max_model_len: 0,
            steps_per_look: 8,
            kv: KvPolicy::Recompute,
            quantization: Quantization::None,
            enable_prefix_caching: true,
            threads: 0,
            kernel_cache: None,
            metrics_address: None,
            vllm_metric_names: false,
            connect_timeout_seconds: 60.0,
            probe_timeout_seconds: 5.0,
        }
    }
}

impl Default for Logging {
    fn default() -> Self {
        Self {
            logging_steps: 1,
            tensorboard: true,
            num_completions_to_print: 2,
            json_logs: false,
            metrics_address: None,
        }
    }
}

impl Default for Launch {
    fn default() -> Self {
        Self {
            trainers: 0,
            generators: 1,
            colocate: false,
            device_memory_gib: None,
            save_seconds: 300.0,
            grace_seconds: 10.0,
            max_restarts: 0,
        }
    }
}
