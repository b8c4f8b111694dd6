//! `aha trainer`: one trainer rank.

use std::process::ExitCode;
use std::sync::Arc;

use aha_trainer::colocated::Colocated;
use aha_trainer::exporter::Exporter;
use aha_trainer::fleet::Fleet;
use aha_trainer::run::{self, Summary};
use aha_trainer::stop::Outcome;
use aha_trainer::world::World;
use anyhow::{Result, ensure};
use owo_colors::OwoColorize;

use super::stop::{report_stop, stop_on_signals};
use super::{ConfigArgs, network_runtime};
use crate::launch::supervised;
use crate::{hub, logs};

/// Run one trainer rank; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say which.
///
/// LOCAL_WORLD_SIZE, where it is set, is how many ranks share this machine's cores; otherwise all of them do.
///
/// Calls to generators carry the token in AHA_TOKEN or security.token_file, by TLS where security.tls_ca is set.
///
/// SIGTERM or Ctrl-C ends it after the step that it is in, with a checkpoint and exit code 75; a second one at once.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha trainer configs/countdown-tiny.yaml --set generator.addresses=['127.0.0.1:50051']"
)]
pub(crate) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    supervised::follow_parent()?;
    let (mut config, credentials) = args.config.load_with_credentials()?;
    ensure!(
        config.launch.colocate || !config.generator.addresses.is_empty() || config.generator.coordinator.is_some(),
        "generator.addresses: none; start `aha generator` and name its address, set generator.coordinator and let it register, \
         set launch.colocate, or use `aha launch`"
    );
    let world = World::from_variables(std::env::vars())?;
    config.model.path = hub::local_model("model.path", &config.model.path)?;
    logs::also_to_file(&config, "trainer", &world.rank.to_string())?;
    let runtime = Arc::new(network_runtime()?);
    let exporter = Exporter::bind(&config, &credentials, &world, runtime.handle())?;
    let sink = if world.is_main() { hub::checkpoint_sink(&config)? } else { None };
    let outcome = run::run(&config, &world, &stop_on_signals()?, |session| {
        exporter.into_iter().for_each(|exporter| exporter.serve(session));
        session.sink = sink;
        let (trainers, policy) = (session.group(), session.learner.policy());
        if config.launch.colocate {
            return Ok(Box::new(Colocated::start(&config, world.local_rank, trainers, &*policy, runtime)?));
        }
        Ok(Box::new(Fleet::connect(&config, trainers, &*policy, credentials, runtime)?))
    })?;
    Ok(match outcome {
        Outcome::Finished(summary) => {
            if world.is_main() {
                print_summary(&config.run_dir(), &summary);
            }
            ExitCode::SUCCESS
        }
        Outcome::Stopped(stopped) => report_stop(&stopped, &world),
    })
}

fn print_summary(run_dir: &std::path::Path, summary: &Summary) {
    println!();
    if let (Some(before), Some(after)) = (summary.accuracy_before, summary.accuracy_after) {
        let after = format!("{:.1} %", 100.0 * after);
        println!(
            "held-out accuracy on {} prompts: {:.1} % before, {} after",
            summary.puzzles,
            100.0 * before,
            after.if_supports_color(owo_colors::Stream::Stdout, |text| text.green())
        );
    }
    println!("{} steps in {:.0} s", summary.steps, summary.seconds);
    for (what, name) in [
        ("model", "model"),
        ("metrics", "metrics.jsonl"),
        ("curves", "tensorboard"),
        ("completions", "completions"),
        ("checkpoints", "checkpoints"),
        ("summary", "summary.json"),
    ] {
        println!("  {what:<12} {}", run_dir.join(name).display());
    }
}
