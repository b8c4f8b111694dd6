//! `aha sft`: supervised fine-tuning.

use std::process::ExitCode;

use aha_trainer::sft;
use aha_trainer::stop::Outcome;
use aha_trainer::world::World;
use anyhow::Result;

use super::ConfigArgs;
use super::stop::{report_stop, stop_on_signals};

/// Fine-tune on worked answers with the trainer's own step, before reinforcement learning.
///
/// SIGTERM or Ctrl-C ends it after the step that it is in, with a checkpoint and exit code 75; a second one at once.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  aha sft configs/countdown-tiny-sft.yaml")]
pub(crate) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let config = args.config.load()?;
    let world = World::from_variables(std::env::vars())?;
    Ok(match sft::run(&config, &world, &stop_on_signals()?)? {
        Outcome::Finished(folder) => {
            if world.is_main() {
                println!("model written to {}", folder.display());
            }
            ExitCode::SUCCESS
        }
        Outcome::Stopped(stopped) => report_stop(&stopped, &world),
    })
}
