//! One module a subcommand.

use std::path::{Path, PathBuf};

use aha_core::config::{self, Credentials, DeviceKind, Dtype, Generator, Model, Quantization, RunConfig};
use aha_generator::GeneratorOptions;
use aha_nn::runtime;
use anyhow::{Context, Result};
use tch::{Device, Kind};
use tokio::runtime::Runtime;

pub(crate) mod bench;
pub(crate) mod data;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod generate;
pub(crate) mod generator;
pub(crate) mod hub;
pub(crate) mod plan;
pub(crate) mod reward;
pub(crate) mod score;
pub(crate) mod sft;
pub(crate) mod shapes;
pub(crate) mod status;
pub(crate) mod stop;
mod table;
pub(crate) mod trainer;

/// A configuration file with its overrides, as every role takes it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ConfigArgs {
    /// YAML recipe, such as configs/countdown-tiny.yaml
    pub(crate) config: PathBuf,
    /// Override a key: --set train.learning_rate=1e-6 (repeatable)
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
}

impl ConfigArgs {
    /// Reads, layers and validates the configuration, with the files that it names secrets by.
    pub(crate) fn load(&self) -> Result<RunConfig> {
        self.load_with_credentials().map(|(config, _)| config)
    }

    /// Like [`ConfigArgs::load`], for those who call or are called.
    pub(crate) fn load_with_credentials(&self) -> Result<(RunConfig, Credentials)> {
        Ok(config::load_with_credentials(&self.config, std::env::vars(), &self.overrides)?)
    }

    /// The arguments that give a child process the same configuration.
    pub(crate) fn to_arguments(&self) -> Vec<String> {
        let mut arguments = vec![path_text(&self.config)];
        for text in &self.overrides {
            arguments.extend(["--set".to_owned(), text.clone()]);
        }
        arguments
    }
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// How an engine in this process stores the layers' matrices.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Quantize {
    /// fp32, exact
    None,
    /// 8-bit integers, but for the head
    Int8,
}

impl From<Quantize> for Quantization {
    fn from(quantize: Quantize) -> Self {
        match quantize {
            Quantize::None => Self::None,
            Quantize::Int8 => Self::Int8,
        }
    }
}

/// A model for this process: where it computes, in what, and from which weights.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Placement {
    /// Where to compute; auto takes a GPU where there is one
    #[arg(long, value_enum, default_value_t = DeviceName::Auto)]
    device: DeviceName,
    /// Type of weights and cache: bfloat16 on a GPU unless named, float32 on a CPU
    #[arg(long, value_enum)]
    dtype: Option<DtypeName>,
    /// Where weights come from
    #[arg(long, value_enum, default_value_t = LoadFormat::Safetensors)]
    load_format: LoadFormat,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum DeviceName {
    Auto,
    Cpu,
    Cuda,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum DtypeName {
    Float32,
    Bfloat16,
}

impl DeviceName {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

impl From<DeviceName> for DeviceKind {
    fn from(device: DeviceName) -> Self {
        match device {
            DeviceName::Auto => Self::Auto,
            DeviceName::Cpu => Self::Cpu,
            DeviceName::Cuda => Self::Cuda,
        }
    }
}

impl From<DtypeName> for Dtype {
    fn from(dtype: DtypeName) -> Self {
        match dtype {
            DtypeName::Float32 => Self::Float32,
            DtypeName::Bfloat16 => Self::Bfloat16,
        }
    }
}

impl From<DtypeName> for Kind {
    fn from(dtype: DtypeName) -> Self {
        match dtype {
            DtypeName::Float32 => Self::Float,
            DtypeName::Bfloat16 => Self::BFloat16,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LoadFormat {
    /// The folder's files
    Safetensors,
    /// Random numbers: only the folder's config.json and tokenizer are read
    Dummy,
}

impl Placement {
    fn device(self) -> Result<Device> {
        Ok(runtime::device(self.device.name(), 0)?)
    }

    fn kind(self) -> Result<Kind> {
        Ok(match (self.dtype, self.device()?) {
            (Some(dtype), _) => dtype.into(),
            (None, Device::Cpu) => Kind::Float,
            (None, _) => Kind::BFloat16,
        })
    }

    /// A model folder served in this process.
    fn options(self, model: &Path, generator: Generator) -> Result<GeneratorOptions> {
        let device = if self.device()? == Device::Cpu { DeviceKind::Cpu } else { DeviceKind::Cuda };
        let dtype = match self.dtype {
            None => Dtype::Auto,
            Some(DtypeName::Float32) => Dtype::Float32,
            Some(DtypeName::Bfloat16) => Dtype::Bfloat16,
        };
        anyhow::ensure!(
            (device, dtype) != (DeviceKind::Cpu, Dtype::Bfloat16),
            "--dtype bfloat16: on a CPU this command serves float32; `aha generator` with model.dtype: bfloat16 keeps bf16"
        );
        let random_init = self.load_format == LoadFormat::Dummy;
        let model = Model { path: model.to_owned(), random_init, dtype, device };
        Ok(GeneratorOptions { model, seed: 0, generator, gpu: 0, awaits_weights: false })
    }
}

/// The async runtime beside the thread that owns the device.
fn network_runtime() -> Result<Runtime> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.context("starting the network runtime")
}
