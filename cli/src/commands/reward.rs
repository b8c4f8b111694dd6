//! `aha reward`: scores completions from standard input.

use std::io::{BufRead, Write};
use std::process::ExitCode;

use aha_core::config::parse_override;
use aha_core::dataset::Row;
use aha_core::reward::{Answer, Outcome, RewardFunction, RewardSpec};
use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Score completions with a reward function: one JSON object a line in, one a line out.
///
/// A line holds `completion` and the columns that the function reads.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  echo '{\"completion\": \"2*3 </think>\\n<answer>2*3</answer>\", \"target\": 6, \"nums\": [2, 3]}' | aha reward --function equation"
)]
pub(crate) struct Args {
    /// Reward function, as in a recipe's rewards; an unknown name lists them
    #[arg(long)]
    function: String,
    /// Set one of its options: --option column=solution (repeatable)
    #[arg(long = "option", value_name = "NAME=VALUE")]
    options: Vec<String>,
    /// Accepted for uniformity: the answer is JSON either way
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let options = args.options.iter().map(|text| parse_override(text)).collect::<Result<_, _>>()?;
    let function = RewardFunction::new(&RewardSpec { options, ..RewardSpec::of(&args.function) })?;
    let mut output = std::io::stdout().lock();
    for (index, line) in std::io::stdin().lock().lines().enumerate() {
        let line = line.context("reading standard input")?;
        if line.trim().is_empty() {
            continue;
        }
        let outcome = score(&function, &line).with_context(|| format!("line {}", index + 1))?;
        writeln!(output, "{}", json!({"score": outcome.score(), "outcome": outcome.name()}))?;
        output.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn score(function: &RewardFunction, line: &str) -> Result<Outcome> {
    let mut columns: Row = serde_json::from_str(line).context("not a JSON object")?;
    let completion = match columns.remove("completion") {
        Some(Value::String(completion)) => completion,
        Some(other) => anyhow::bail!("completion must be a string, got {other}"),
        None => anyhow::bail!("completion is missing"),
    };
    function.check_columns(&columns)?;
    Ok(function.score(&Answer::of(&completion), &columns))
}
