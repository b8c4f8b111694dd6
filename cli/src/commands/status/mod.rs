//! `aha status`: what generators, and the coordinator of a run, are doing now.

mod ask;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use aha_core::config::{Credentials, Generator, RunConfig, Security, TOKEN_VARIABLE};
use anyhow::{Result, bail, ensure};

use super::{ConfigArgs, network_runtime};
use ask::Asked;
use report::Report;

/// Longest that an answer, or the time between two looks, may be asked to take: an hour.
const MAX_SECONDS: f64 = 3600.0;

/// Ask generators, and the coordinator of a run, what they are doing.
///
/// Calls carry the token in AHA_TOKEN, or the token and TLS of a recipe's security section. Whoever does not answer has a
/// row that says why; the exit code is 1 where nobody answers.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  aha status runs/countdown-tiny\n  aha status configs/x.yaml --json\n  AHA_TOKEN=$(cat token) aha status 10.0.0.2:50051 10.0.0.1:50050"
)]
pub(crate) struct Args {
    /// host:port of generators or of a coordinator (generator.coordinator), which names the generators of its run; and a
    /// recipe, or a run's folder, for the credentials, and for addresses where none is given
    #[arg(required = true, value_name = "ADDRESS|RECIPE|RUN")]
    targets: Vec<String>,
    /// Override a key of the recipe: --set security.token_file=token (repeatable)
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Longest wait for an answer
    #[arg(long, default_value_t = 5.0, value_name = "SECONDS")]
    timeout: f64,
    /// Between the two looks that tokens per second are counted over; 0 looks once
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    interval: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let [timeout, interval] = [("timeout", args.timeout), ("interval", args.interval)].map(|(name, seconds)| {
        ensure!((0.0..=MAX_SECONDS).contains(&seconds), "--{name}: must be from 0 to {MAX_SECONDS} seconds");
        Ok(Duration::from_secs_f64(seconds))
    });
    let (timeout, interval) = (timeout?, interval?);
    let (addresses, credentials) = whom_to_ask(args)?;
    let report = network_runtime()?.block_on(async {
        let asked = Asked { credentials: &credentials, timeout };
        let first = asked.all(addresses).await?;
        if interval.is_zero() {
            return Ok::<_, anyhow::Error>(Report::new(&first, None));
        }
        tokio::time::sleep(interval).await;
        let again = asked.all(first.iter().map(|look| look.address.clone()).collect()).await?;
        Ok(Report::new(&again, Some(&first)))
    })?;
    if args.json {
        println!("{}", report.to_json());
    } else {
        print!("{report}");
    }
    Ok(if report.has_answers() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The addresses, and what proves this process to them.
fn whom_to_ask(args: &Args) -> Result<(Vec<String>, Credentials)> {
    let (mut recipes, mut addresses) = (Vec::new(), Vec::new());
    for target in &args.targets {
        match recipe(target) {
            Some(path) => recipes.push(path),
            None => addresses.push(target.clone()),
        }
    }
    ensure!(recipes.len() <= 1, "{} recipes are named: at most one can say what to prove by", recipes.len());
    let Some(config) = recipes.pop() else {
        ensure!(args.overrides.is_empty(), "--set: there is no recipe to override a key of");
        let token = std::env::vars().find(|(name, _)| name == TOKEN_VARIABLE).map(|(_, token)| token);
        let credentials = Credentials::load(&Security::default(), token.as_deref());
        return Ok((addresses, credentials.map_err(|problems| anyhow::anyhow!(problems.join("; ")))?));
    };
    let (config, credentials) = ConfigArgs { config, overrides: args.overrides.clone() }.load_with_credentials()?;
    if addresses.is_empty() {
        addresses = addresses_of(&config)?;
    }
    Ok((addresses, credentials))
}

/// The file that `target` means, where it is no address.
fn recipe(target: &str) -> Option<PathBuf> {
    let path = Path::new(target);
    if path.is_dir() {
        return Some(path.join("config.yaml"));
    }
    let is_recipe = path.is_file() || path.extension().is_some_and(|extension| extension == "yaml");
    is_recipe.then(|| path.to_owned())
}

/// Those of the recipe, or else those of its run: `aha launch` chooses them, and the run's folder has them.
fn addresses_of(config: &RunConfig) -> Result<Vec<String>> {
    let named = |generator: &Generator| -> Vec<String> {
        generator.coordinator.iter().chain(&generator.addresses).cloned().collect()
    };
    let own = named(&config.generator);
    let run = config.run_dir().join("config.yaml");
    if !own.is_empty() || !run.is_file() {
        ensure!(
            !own.is_empty(),
            "generator.addresses and generator.coordinator: none, and there is no {}",
            run.display()
        );
        return Ok(own);
    }
    let theirs = named(&aha_core::config::load(&run, [], &[])?.generator);
    if theirs.is_empty() {
        bail!("{} names no generator and no coordinator: give their addresses", run.display());
    }
    Ok(theirs)
}
