//! `aha data`: what a recipe's rows and prompts are, before a run.

mod countdown;
mod preview;
mod stats;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use aha_nn::model_config::ModelConfig;
use aha_trainer::prompts::PromptSource;
use anyhow::{Context, Result};

use super::ConfigArgs;

/// Look at prompts and rows before a run, or make puzzles.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha data preview configs/countdown-tiny.yaml --rows 2\n  aha data stats configs/countdown-tiny.yaml"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Preview(preview::Args),
    Stats(stats::Args),
    Countdown(countdown::Args),
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Preview(args) => preview::run(args),
        What::Stats(args) => stats::run(args),
        What::Countdown(args) => countdown::run(args),
    }
}

/// Prints text for people or for `head`, which may have seen enough.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("writing to standard output"),
        _ => Ok(()),
    }
}

/// The prompts of a recipe, and the rows that they are made of.
fn prompts(config: &ConfigArgs) -> Result<PromptSource> {
    let config = config.load()?;
    let model = ModelConfig::load(&config.model.path)?;
    Ok(PromptSource::load(&config, &model)?)
}
