//! `aha sft`: supervised fine-tuning.

use std::process::ExitCode;

use aha_trainer::exporter::Exporter;
use aha_trainer::session::Session;
use aha_trainer::sft;
use aha_trainer::stop::Outcome;
use aha_trainer::world::World;
use anyhow::Result;

use super::stop::{report_stop, stop_on_signals};
use super::{ConfigArgs, network_runtime};
use crate::{hub, logs};

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
    let (mut config, credentials) = args.config.load_with_credentials()?;
    let world = World::from_variables(std::env::vars())?;
    config.model.path = hub::local_model("model.path", &config.model.path)?;
    let sink = if world.is_main() { hub::checkpoint_sink(&config)? } else { None };
    logs::also_to_file(&config, "sft", &world.rank.to_string())?;
    let runtime = network_runtime()?;
    let exporter = Exporter::bind(&config, &credentials, &world, runtime.handle())?;
    let ready = |session: &mut Session| {
        exporter.into_iter().for_each(|exporter| exporter.serve(session));
        session.sink = sink;
    };
    Ok(match sft::run(&config, &world, &stop_on_signals()?, ready)? {
        Outcome::Finished(folder) => {
            if world.is_main() {
                println!("model written to {}", folder.display());
            }
            ExitCode::SUCCESS
        }
        Outcome::Stopped(stopped) => report_stop(&stopped, &world),
    })
}
