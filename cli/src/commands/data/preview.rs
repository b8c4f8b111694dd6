//! `aha data preview`: prompts as the model gets them.

use std::process::ExitCode;

use aha_trainer::loggers::printable;
use aha_trainer::prompts::PromptPreview;
use anyhow::Result;
use serde_json::{Map, Value};

use crate::commands::ConfigArgs;

/// Show the first prompts of a run: text with its special tokens, tokens, columns and rewards.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha data preview configs/countdown-tiny.yaml --rows 2\n  aha data preview recipe.yaml --source math --set data.prompt.template=r1"
)]
pub(super) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Prompts to show, in the order in which the run asks them
    #[arg(long, default_value_t = 3, value_name = "N")]
    rows: usize,
    /// Those of one of data.sources alone
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    for prompt in super::prompts(&args.config)?.preview(args.source.as_deref(), args.rows)? {
        let shown = if args.json { serde_json::to_string(&prompt)? } else { printable(&text(&prompt)) };
        super::print(&format!("{shown}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(prompt: &PromptPreview) -> String {
    let PromptPreview { source, row, num_tokens, rewards, columns, text } = prompt;
    let source = if source.is_empty() { String::new() } else { format!("source {source}, ") };
    let columns: Map<String, Value> = columns.clone();
    format!(
        "--- {source}row {row} (from 0), {num_tokens} tokens, rewards: {}\n--- {}\n{text}\n",
        rewards.join(", "),
        Value::Object(columns)
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_prompt_is_shown_with_what_is_known_of_it() {
        let mut prompt = PromptPreview {
            source: "math".to_owned(),
            row: 7,
            text: "<|im_start|>user\n2+2?".to_owned(),
            num_tokens: 9,
            rewards: vec!["format".to_owned(), "equation".to_owned()],
            columns: json!({"target": 4}).as_object().unwrap().clone(),
        };
        let rest = "row 7 (from 0), 9 tokens, rewards: format, equation\n--- {\"target\":4}\n<|im_start|>user\n2+2?\n";
        assert_eq!(text(&prompt), format!("--- source math, {rest}"));
        prompt.source.clear();
        assert_eq!(text(&prompt), format!("--- {rest}"));
    }
}
