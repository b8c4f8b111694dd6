//! `aha sft`: supervised fine-tuning.

use std::process::ExitCode;

use aha_trainer::sft;
use aha_trainer::world::World;
use anyhow::Result;

use super::ConfigArgs;

/// Fine-tune on worked answers with the trainer's own step, before reinforcement learning.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  aha sft configs/countdown-tiny-sft.yaml")]
pub(crate) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let config = args.config.load()?;
    let world = World::from_variables(std::env::vars())?;
    let folder = sft::run(&config, &world)?;
    if world.is_main() {
        println!("model written to {}", folder.display());
    }
    Ok(ExitCode::SUCCESS)
}
