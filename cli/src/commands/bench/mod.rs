//! `aha bench`: measured rates of the real parts.

mod decode;
mod shapes;
mod step;

use std::process::ExitCode;

use anyhow::Result;

/// Measure the engine and the training step on this machine.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Decode(decode::Args),
    Step(step::Args),
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Decode(args) => decode::run(args),
        What::Step(args) => step::run(args),
    }
}
