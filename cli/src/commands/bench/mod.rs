//! `aha bench`: measured rates of the real parts.

mod colocate;
mod decode;
mod generator_process;
mod push;
mod roofline;
mod step;
mod train;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::shapes::ModelShape;

/// Measure the engine, the training step and weight pushes on this machine.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Colocate(colocate::Args),
    Decode(decode::Args),
    Push(push::Args),
    Step(step::Args),
    Train(train::Args),
    /// Write a model folder of a known shape without weights, for --load-format dummy here and elsewhere
    Shape {
        shape: ModelShape,
        /// Made where it is missing
        folder: PathBuf,
    },
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Colocate(args) => colocate::run(args),
        What::Decode(args) => decode::run(args),
        What::Push(args) => push::run(args),
        What::Step(args) => step::run(args),
        What::Train(args) => train::run(args),
        What::Shape { shape, folder } => {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
            shape.write(folder).map(|()| ExitCode::SUCCESS)
        }
    }
}
