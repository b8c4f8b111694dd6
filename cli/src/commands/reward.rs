//! `aha reward`: scores completions from standard input.

use std::io::{BufRead, Write};
use std::process::ExitCode;

use aha_core::config::parse_override;
use aha_core::dataset::Row;
use aha_core::ids::PromptId;
use aha_core::reward::{Answer, RewardFunction, RewardSpec};
use aha_core::rollout::{Completion, FinishReason, Origin, Prompt, Reward};
use aha_trainer::rewarders::Rewarders;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::network_runtime;

/// Score completions with a reward function: one JSON object a line in, one a line out.
///
/// A line holds `completion` and the columns that the function reads. A rewarder or a command of your own is asked as in a run;
/// it also gets `prompt`, where the line has one.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  echo '{\"completion\": \"2*3 </think>\\n<answer>2*3</answer>\", \"target\": 6, \"nums\": [2, 3]}' | aha reward --function equation\n  aha reward --function command --option 'command=[python3, reward.py]' < lines.jsonl"
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

/// Who scores.
enum Judge {
    BuiltIn(RewardFunction),
    External(Box<External>),
}

/// A rewarder or a command.
struct External {
    rewarders: Rewarders,
    spec: RewardSpec,
    runtime: Runtime,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let options = args.options.iter().map(|text| parse_override(text)).collect::<Result<_, _>>()?;
    let judge = Judge::new(RewardSpec { options, ..RewardSpec::of(&args.function) })?;
    let mut output = std::io::stdout().lock();
    for (index, line) in std::io::stdin().lock().lines().enumerate() {
        let line = line.context("reading standard input")?;
        if line.trim().is_empty() {
            continue;
        }
        let reward = judge.score(&line).with_context(|| format!("line {}", index + 1))?;
        writeln!(output, "{}", json!({"score": reward.score, "outcome": reward.outcome}))?;
        output.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Judge {
    fn new(spec: RewardSpec) -> Result<Self> {
        if !spec.is_external() {
            return Ok(Self::BuiltIn(RewardFunction::new(&spec)?));
        }
        let runtime = network_runtime()?;
        let rewarders = Rewarders::start(std::slice::from_ref(&spec), None, runtime.handle())?;
        Ok(Self::External(Box::new(External { rewarders, spec, runtime })))
    }

    fn score(&self, line: &str) -> Result<Reward> {
        let mut columns: Row = serde_json::from_str(line).context("not a JSON object")?;
        let text = match columns.remove("completion") {
            Some(Value::String(completion)) => completion,
            Some(other) => anyhow::bail!("completion must be a string, got {other}"),
            None => anyhow::bail!("completion is missing"),
        };
        match self {
            Self::BuiltIn(function) => {
                function.check_columns(&columns)?;
                Ok(Reward::new(function.name(), function.score(&Answer::of(&text), &columns)))
            }
            Self::External(external) => {
                let External { rewarders, spec, runtime } = &**external;
                let (prompt, mut completion) = (prompt(columns), [untokenized(text)]);
                runtime.block_on(rewarders.judge(&prompt, std::slice::from_ref(spec), &mut completion));
                let [Completion { rewards, .. }] = completion;
                rewards.into_iter().next().context("nobody was asked")
            }
        }
    }
}

fn prompt(columns: Row) -> Prompt {
    let text = columns.get("prompt").and_then(Value::as_str).unwrap_or_default().to_owned();
    Prompt { id: PromptId(0), text, token_ids: Vec::new(), columns, origin: Origin::default() }
}

/// A text whose tokens nobody counted.
fn untokenized(text: String) -> Completion {
    Completion {
        prompt_id: PromptId(0),
        sample_index: 0,
        token_ids: Vec::new(),
        logprobs: Vec::new(),
        spans: Vec::new(),
        finish_reason: FinishReason::Stop,
        text,
        rewards: Vec::new(),
        raw_logprobs: Vec::new(),
        prompt_logprobs: Vec::new(),
    }
}
