//! Greedy answers of aha and of transformers to the same questions, token by token.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::{python, threads};
use crate::process::{Status, run_stage};
use crate::workspace::Workspace;

const PEER: &str = "xtask/peers/hf_eval.py";
const SUITE: &str = "answers";

#[derive(clap::Args)]
pub(crate) struct Eval {
    /// Hugging Face model folder with a chat template
    #[arg(long, default_value = "models/smollm2-135m")]
    model: PathBuf,
    /// Questions: JSON lines
    #[arg(long)]
    rows: PathBuf,
    /// The user's turn, a Jinja template over a row's columns
    #[arg(long, default_value = "{{ question }} Let's think step by step and output the final answer after \"####\".")]
    user: String,
    /// What aha judges answers by
    #[arg(long, default_value = "gsm8k_answer")]
    reward: String,
    #[arg(long, default_value_t = 200)]
    num_prompts: usize,
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// Threads of both; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// An aha binary to take instead of building one
    #[arg(long)]
    pub(super) aha: Option<PathBuf>,
    /// Folder of both programs' answers; transformers' that it has already stay
    #[arg(long)]
    out: PathBuf,
}

/// Where two answers part.
#[derive(Debug, PartialEq)]
struct Difference {
    prompt_id: u64,
    /// The first token that differs.
    at: usize,
    /// By how much transformers' choice led its next one there.
    lead: Option<f64>,
}

pub(super) fn eval(workspace: &Workspace, aha: &Path, args: &Eval) -> anyhow::Result<()> {
    let python = python(workspace)?;
    let threads = threads(args.threads)?.to_string();
    let [model, rows, out] = [&args.model, &args.rows, &args.out].map(std::path::absolute);
    let (model, rows, out) = (model?, rows?, out?);
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let suite = json!({"path": rows, "prompt": {"user": args.user}, "rewards": [{"function": args.reward}],
        "num_prompts": args.num_prompts, "max_completion_length": args.max_tokens});
    let suites = out.join("suites.yaml");
    fs::write(&suites, json!({"eval": {"suites": {SUITE: suite}}}).to_string())?;
    let mut ours = workspace.command(aha);
    ours.args(["eval", "--device", "cpu", "--threads", &threads, "--model"]).arg(&model);
    ours.arg("--config").arg(&suites).arg("--out").arg(&out);
    let reference = out.join("transformers.jsonl");
    let mut peer = workspace.command(&python);
    peer.env("OMP_NUM_THREADS", &threads).arg(PEER).arg(&model).arg("--rows").arg(&rows).args(["--user", &args.user]);
    peer.args(["--num-prompts", &args.num_prompts.to_string(), "--max-tokens", &args.max_tokens.to_string()]);
    peer.args(["--threads", &threads]).arg("--out").arg(&reference);
    for (name, command) in [("aha", &mut ours), ("transformers", &mut peer)] {
        ensure!(run_stage(name, command)?.status == Status::Success, "{name} failed; its message is above");
    }
    report(&lines(&out.join(format!("{SUITE}.jsonl")))?, &lines(&reference)?)
}

fn lines(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| path.display().to_string())).collect()
}

/// # Errors
/// If the prompts are not the same.
fn report(ours: &[Value], theirs: &[Value]) -> anyhow::Result<()> {
    ensure!(ours.len() == theirs.len(), "aha answered {} prompts, and transformers {}", ours.len(), theirs.len());
    let mut differences = Vec::new();
    for (own, peer) in ours.iter().zip(theirs) {
        let is_same = own["prompt_token_ids"] == peer["prompt_token_ids"];
        ensure!(is_same, "prompt {} has other tokens in transformers", own["prompt_id"]);
        differences.extend(difference(own, peer)?);
    }
    let num_right = ours.iter().filter(|own| own["right"] == 1).count();
    let num_same = ours.len() - differences.len();
    eprintln!("{num_same} of {} answers are the same, token by token; {num_right} are right", ours.len());
    for Difference { prompt_id, at, lead } in &differences {
        let lead = lead.map_or("nothing: it had ended".to_owned(), |lead| format!("{lead:.2e}"));
        eprintln!("prompt {prompt_id}: token {at} differs, where transformers' choice led by {lead}");
    }
    Ok(())
}

fn difference(own: &Value, peer: &Value) -> anyhow::Result<Option<Difference>> {
    let tokens = |tokens: &Value| tokens.as_array().cloned().context("a line has no token_ids");
    let (own_tokens, tokens) = (tokens(&own["completions"][0]["token_ids"])?, tokens(&peer["token_ids"])?);
    if own_tokens == tokens {
        return Ok(None);
    }
    let at = own_tokens.iter().zip(&tokens).take_while(|(own, peer)| own == peer).count();
    let prompt_id = own["prompt_id"].as_u64().context("a line has no prompt_id")?;
    Ok(Some(Difference { prompt_id, at, lead: peer["leads"][at].as_f64() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(tokens: Value) -> Value {
        json!({"prompt_id": 3, "prompt_token_ids": [1], "right": 1, "completions": [{"token_ids": tokens}]})
    }

    #[test]
    fn the_first_token_that_differs_is_found() {
        let peer = json!({"prompt_token_ids": [1], "token_ids": [5, 6, 7], "leads": [0.5, 0.25, 0.125]});
        assert_eq!(difference(&own(json!([5, 6, 7])), &peer).unwrap(), None);
        for (tokens, at, lead) in
            [(json!([5, 9, 7]), 1, Some(0.25)), (json!([5, 6]), 2, Some(0.125)), (json!([5, 6, 7, 8]), 3, None)]
        {
            let expect = Difference { prompt_id: 3, at, lead };
            assert_eq!(difference(&own(tokens), &peer).unwrap(), Some(expect));
        }
        assert!(report(&[own(json!([5]))], &[json!({"prompt_token_ids": [2]})]).is_err());
        assert!(report(&[own(json!([5]))], &[]).is_err());
    }
}
