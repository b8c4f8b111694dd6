//! `aha hub`: the Hugging Face Hub.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use aha_core::hub::{RepositoryId, Source, is_revision};
use aha_trainer::export::newest_checkpoint;
use anyhow::{Context, Result, bail, ensure};

use crate::hub::{self, Download, Kind, Push};

/// Fetch models and data sets from the Hugging Face Hub, and push models to it (with the feature `hub`).
///
/// HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to the Hub's own tools.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Download(DownloadArgs),
    Push(PushArgs),
}

/// Fetch a repository into the Hub's cache, and print its folder.
///
/// Of a model, what is of use here: configuration, tokenizer, chat template and safetensors.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha hub download Qwen/Qwen2.5-0.5B-Instruct --local-dir models/qwen2.5-0.5b-instruct"
)]
struct DownloadArgs {
    /// owner/name
    #[arg(value_name = "REPO")]
    repo: String,
    /// It is a data set: all of its files are fetched
    #[arg(long)]
    dataset: bool,
    /// Branch, tag or commit [default: main]
    #[arg(long)]
    revision: Option<String>,
    /// A plain folder instead of the cache
    #[arg(long, value_name = "DIR")]
    local_dir: Option<PathBuf>,
}

/// Push a model folder, or what a run has written, as one commit; the repository is created where there is none.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "aha hub push [OPTIONS] <FOLDER> <REPO>\n       aha hub push [OPTIONS] --run <DIR> <REPO>",
    after_help = "Example:\n  aha hub push --run runs/countdown-tiny me/countdown --private"
)]
struct PushArgs {
    /// The folder, unless --run names one, and the repository, owner/name
    #[arg(required = true, num_args = 1..=2, value_name = "FOLDER REPO")]
    names: Vec<String>,
    /// Folder of a run: its model is pushed, or its newest checkpoint while there is none
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// A repository that is created is for its owner alone
    #[arg(long)]
    private: bool,
    /// Branch, created where there is none
    #[arg(long, default_value = Source::MAIN)]
    revision: String,
    /// Message of the commit
    #[arg(long, default_value = "Upload by aha")]
    message: String,
    /// Push a checkpoint's trainer_state as well, with which training goes on
    #[arg(long)]
    with_trainer_state: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.command {
        Command::Download(args) => println!("{}", hub::download(&download(args)?)?.display()),
        Command::Push(args) => println!("{}", hub::push(&push(args)?)?),
    }
    Ok(ExitCode::SUCCESS)
}

fn download(args: &DownloadArgs) -> Result<Download> {
    let text = match &args.revision {
        Some(revision) => format!("{}@{revision}", args.repo),
        None => args.repo.clone(),
    };
    let source = Source::parse(&text).with_context(|| format!("{text:?} is not of the form owner/name[@revision]"))?;
    let kind = if args.dataset { Kind::Dataset } else { Kind::Model };
    Ok(Download { source, kind, local_dir: args.local_dir.clone(), is_fresh: true })
}

fn push(args: &PushArgs) -> Result<Push> {
    let (folder, repo) = match (&args.run, args.names.as_slice()) {
        (Some(run), [repo]) => (of_run(run)?, repo),
        (None, [folder, repo]) => (PathBuf::from(folder), repo),
        _ => bail!("name a folder and a repository, or --run and a repository"),
    };
    let id = RepositoryId::parse(repo).with_context(|| format!("{repo:?} is not of the form owner/name"))?;
    ensure!(is_revision(&args.revision), "--revision: {:?} is no branch", args.revision);
    ensure!(folder.is_dir(), "{}: no such folder", folder.display());
    Ok(Push {
        folder,
        id,
        revision: args.revision.clone(),
        is_private: args.private,
        message: args.message.clone(),
        with_trainer_state: args.with_trainer_state,
    })
}

fn of_run(run: &Path) -> Result<PathBuf> {
    let model = run.join("model");
    if model.is_dir() { Ok(model) } else { newest_checkpoint(run) }
}
