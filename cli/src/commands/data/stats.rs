//! `aha data stats`: what became of the rows of every source, and what they are like.

use std::process::ExitCode;

use aha_trainer::loggers::printable;
use aha_trainer::prompts::{ColumnStats, SourceStats};
use anyhow::Result;

use crate::commands::ConfigArgs;

/// Characters of a value that are shown.
const MAX_VALUE_CHARS: usize = 40;

/// Count the rows of every source, the lengths of their prompts, and the values of their columns.
///
/// Every prompt is rendered and tokenised.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  aha data stats configs/countdown-tiny.yaml --set data.countdown.size=1000")]
pub(super) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print one JSON object a source
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    for source in super::prompts(&args.config)?.stats()? {
        let shown =
            if args.json { format!("{}\n", serde_json::to_string(&source)?) } else { printable(&text(&source)) };
        super::print(&shown)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(stats: &SourceStats) -> String {
    let title = if stats.source.is_empty() { String::new() } else { format!("source {}\n", stats.source) };
    let line = |name: &str, value: String| format!("  {name:<16} {value}\n");
    let count = |name: &str, count: usize| line(name, count.to_string());
    let tokens = &stats.prompt_tokens;
    let lengths = format!(
        "min {}, mean {:.1}, p50 {}, p90 {}, p99 {}, max {}",
        tokens.min, tokens.mean, tokens.p50, tokens.p90, tokens.p99, tokens.max
    );
    let columns: String = stats.columns.iter().map(|column| line(&column.name, values(column))).collect();
    [
        title,
        line("weight", stats.weight.to_string()),
        count("rows read", stats.read),
        count("filtered out", stats.filtered),
        count("selected", stats.selected),
        count("too long", stats.too_long),
        count("duplicates", stats.duplicates),
        count("to train on", stats.train),
        count("held out", stats.held_out),
        line("rewards", stats.rewards.join(", ")),
        line("prompt tokens", lengths),
        "columns\n".to_owned(),
        columns,
    ]
    .concat()
}

fn values(column: &ColumnStats) -> String {
    let mut parts: Vec<String> = column.types.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    parts.push(format!("{} distinct", column.distinct));
    if let Some([min, mean, max]) = column.range {
        let of = if column.types.contains_key("number") { "" } else { "length " };
        parts.push(format!("{of}{min} to {max}, mean {mean:.1}"));
    }
    parts.extend(column.most_frequent.iter().map(|(value, count)| format!("{count} x {}", shorten(value))));
    parts.join("; ")
}

fn shorten(value: &str) -> String {
    match value.char_indices().nth(MAX_VALUE_CHARS) {
        Some((end, _)) => format!("{}...", &value[..end]),
        None => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use aha_trainer::prompts::Lengths;

    use super::*;

    #[test]
    fn a_source_is_a_table() {
        let column = ColumnStats {
            name: "nums".to_owned(),
            types: BTreeMap::from([("list", 3)]),
            distinct: 2,
            range: Some([3.0, 3.25, 4.0]),
            most_frequent: vec![("x".repeat(50), 2)],
        };
        let stats = SourceStats {
            source: "math".to_owned(),
            weight: 0.5,
            read: 12,
            filtered: 2,
            selected: 9,
            too_long: 1,
            duplicates: 4,
            train: 7,
            held_out: 1,
            rewards: vec!["format".to_owned()],
            prompt_tokens: Lengths { min: 3, mean: 4.25, p50: 4, p90: 5, p99: 6, max: 7 },
            columns: vec![column],
        };
        let shown = text(&stats);
        for expect in [
            "source math\n  weight           0.5\n  rows read        12\n  filtered out     2\n",
            "  prompt tokens    min 3, mean 4.2, p50 4, p90 5, p99 6, max 7\ncolumns\n",
            &format!("  nums             3 list; 2 distinct; length 3 to 4, mean 3.2; 2 x {}...\n", "x".repeat(40)),
        ] {
            assert!(shown.contains(expect), "no {expect:?} in:\n{shown}");
        }
    }
}
