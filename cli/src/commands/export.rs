//! `aha export`: a checkpoint as a plain model folder.

use std::path::PathBuf;
use std::process::ExitCode;

use aha_trainer::export::{Export, best_checkpoint, newest_checkpoint};
use anyhow::{Result, bail};

use super::DtypeName;
use crate::hub;

/// Write a checkpoint as a plain Hugging Face folder, with adapters merged into their base.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  aha export --run runs/countdown-tiny --out models/countdown\n  \
                        aha export --checkpoint runs/qwen2.5-1.5b-countdown-lora/checkpoints/step-100 --out models/merged")]
pub(crate) struct Args {
    /// Folder of a run, whose newest checkpoint is taken
    #[arg(long, value_name = "DIR", required_unless_present = "checkpoint", conflicts_with = "checkpoint")]
    run: Option<PathBuf>,
    /// Take the run's best checkpoint (eval.keep_best) instead
    #[arg(long, requires = "run")]
    best: bool,
    /// A checkpoint, or a PEFT folder
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Folder to write, which must not be there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Type of the weights; as in the checkpoint, or in the base of adapters, unless named
    #[arg(long, value_enum)]
    dtype: Option<DtypeName>,
    /// Base model of adapters, where it is not the folder that they name
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let checkpoint = match (&args.checkpoint, &args.run) {
        (Some(checkpoint), _) => checkpoint.clone(),
        (None, Some(run)) if args.best => best_checkpoint(run)?,
        (None, Some(run)) => newest_checkpoint(run)?,
        (None, None) => bail!("name --run or --checkpoint"),
    };
    let base = args.base.as_deref().map(|base| hub::local_model("--base", base)).transpose()?;
    let export = Export { checkpoint, base, kind: args.dtype.map(Into::into) };
    let exported = export.write(&args.out)?;
    if args.json {
        println!("{}", serde_json::to_string(&exported)?);
    } else {
        let base = exported.base.map(|base| format!(", merged into {}", base.display())).unwrap_or_default();
        println!(
            "{} parameters in {} written to {}\n  from {}{base}",
            exported.num_parameters,
            exported.dtype,
            args.out.display(),
            exported.checkpoint.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}
