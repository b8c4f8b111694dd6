//! One module a subcommand.

use std::path::{Path, PathBuf};

use aha_core::config::{self, Generator, Model, Quantization, RunConfig};
use aha_generator::GeneratorOptions;
use anyhow::{Context, Result};
use tokio::runtime::Runtime;

pub(crate) mod bench;
pub(crate) mod generate;
pub(crate) mod generator;
pub(crate) mod reward;
pub(crate) mod score;
pub(crate) mod sft;
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
    /// Reads, layers and validates the configuration.
    pub(crate) fn load(&self) -> Result<RunConfig> {
        Ok(config::load(&self.config, std::env::vars(), &self.overrides)?)
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

/// A model folder served in this process.
fn local_options(model: &Path, generator: Generator) -> GeneratorOptions {
    GeneratorOptions { model: Model { path: model.to_owned(), ..Model::default() }, seed: 0, generator }
}

/// The async runtime beside the thread that owns the device.
fn network_runtime() -> Result<Runtime> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.context("starting the network runtime")
}
