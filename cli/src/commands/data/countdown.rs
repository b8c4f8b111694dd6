//! `aha data countdown`: writes Countdown puzzles.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;

use aha_core::config::Countdown;
use anyhow::{Context, Result};
use serde_json::{Map, Value};

/// What the puzzles of a file have.
const COLUMNS: [&str; 3] = ["nums", "target", "solution"];

/// Write solvable Countdown puzzles: one JSON object a line, with nums, target and solution.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  aha data countdown --size 1000 --numbers 3..4 --seed 1 --out puzzles.jsonl")]
pub(super) struct Args {
    /// Puzzles to make
    #[arg(long, default_value_t = 50_000)]
    size: usize,
    /// Numbers of a puzzle, such as 4 or 3..4, of which puzzles take turns
    #[arg(long, default_value = "3..4", value_parser = range, value_name = "N..M")]
    numbers: RangeInclusive<usize>,
    #[arg(long, default_value_t = 1)]
    min_number: u32,
    #[arg(long, default_value_t = 99)]
    max_number: u32,
    /// Largest target; the smallest is 1
    #[arg(long, default_value_t = 99)]
    max_target: u32,
    /// Operations that solutions use, of +-*/
    #[arg(long, default_value = "+-*/", allow_hyphen_values = true)]
    operations: String,
    /// Equal seeds make equal puzzles
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let family = Countdown {
        size: args.size,
        numbers: 0,
        min_number: args.min_number,
        max_number: args.max_number,
        max_target: args.max_target,
        operations: args.operations.clone(),
    };
    let puzzles = family.with_seed(args.seed).generate_of(args.numbers.clone())?;
    let writing = || format!("writing {}", args.out.display());
    let mut file = BufWriter::new(File::create(&args.out).with_context(writing)?);
    for row in puzzles.rows() {
        let columns: Map<String, Value> =
            COLUMNS.map(|name| (name.to_owned(), row[name].clone())).into_iter().collect();
        writeln!(file, "{}", Value::Object(columns)).with_context(writing)?;
    }
    file.flush().with_context(writing)?;
    println!("{} puzzles in {}", puzzles.len(), args.out.display());
    Ok(ExitCode::SUCCESS)
}

/// `4`, or `3..4`, in which both ends count.
fn range(text: &str) -> Result<RangeInclusive<usize>, String> {
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    match (first.parse(), last.trim_start_matches('=').parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok(first..=last),
        _ => Err("must be a number, or a range such as 3..4".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_both_its_ends() {
        assert_eq!(range("4"), Ok(4..=4));
        assert_eq!(range("3..4"), Ok(3..=4));
        assert_eq!(range("3..=4"), Ok(3..=4));
        for bad in ["", "4..3", "a", "3..", "..4", "3-4"] {
            assert!(range(bad).is_err(), "{bad}");
        }
    }
}
