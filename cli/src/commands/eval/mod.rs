//! `aha eval`: suites of questions, answered by the engine in this process.

mod answers;
mod results;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use aha_core::config::{self, Eval, Suite, built_in_suites};
use aha_core::ids::PolicyVersion;
use aha_generator::LocalGenerator;
use aha_nn::model_config::ModelConfig;
use aha_trainer::evaluate::{Asked, Model, Report, in_time, max_model_len, write_items};
use aha_trainer::export::{best_checkpoint, newest_checkpoint};
use aha_trainer::rollouts::Rollouts;
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::{Placement, network_runtime};
use crate::hub;
use answers::Answers;
use results::Results;

/// Answer suites of questions and count what is right.
///
/// Data is not part of aha: --data-dir names a folder with gsm8k/test.jsonl and evaluation_suite/NAME.jsonl, and what is not
/// there says where it can be had. docs/evaluation.md has the formulas, and how to add a suite.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  aha eval --model models/smollm2-135m --suite gsm8k --data-dir data --num-prompts 200 --max-tokens 256
  aha eval --model models/qwen2.5-math-1.5b --suite aime,amc,math500,minerva,olympiad_bench --data-dir data --out evals/qwen
  aha eval --run runs/countdown-tiny --best --config suites.yaml --n 16 --temperature 0.6 --json")]
pub(crate) struct Args {
    /// Hugging Face model folder
    #[arg(long, value_name = "DIR", required_unless_present = "run", conflicts_with = "run")]
    model: Option<PathBuf>,
    /// Folder of a run, whose newest checkpoint is taken
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Take the run's best checkpoint (eval.keep_best) instead
    #[arg(long, requires = "run")]
    best: bool,
    /// Suites, built in or of --config: countdown, gsm8k, aime, amc, math500, minerva, olympiad_bench; all of --config unless named
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    suite: Vec<String>,
    /// YAML with eval.suites and, for the engine, generator; a run's recipe will do
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override a key of --config: --set eval.suites.gsm8k.path=test.parquet (repeatable)
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Folder in which relative paths of suites begin; eval.data_dir unless named
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    asking: Asking,
    #[command(flatten)]
    placement: Placement,
    /// Threads of the engine; 0 takes all cores
    #[arg(long)]
    threads: Option<usize>,
    /// Folder for summary.json and SUITE.jsonl, which has a line for every prompt
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// What differs from the suites' own settings.
#[derive(Debug, clap::Args)]
struct Asking {
    /// Ask the first so many prompts; 0 asks all
    #[arg(long)]
    num_prompts: Option<usize>,
    /// Completions of a prompt
    #[arg(long)]
    n: Option<usize>,
    /// 0 is greedy
    #[arg(long)]
    temperature: Option<f32>,
    #[arg(long)]
    top_p: Option<f32>,
    /// Most tokens of a completion
    #[arg(long)]
    max_tokens: Option<u32>,
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

impl Asking {
    fn apply(&self, suite: Suite) -> Suite {
        let Suite { num_prompts, num_samples, mut sampling, .. } = suite;
        sampling.temperature = self.temperature.unwrap_or(sampling.temperature);
        sampling.top_p = self.top_p.unwrap_or(sampling.top_p);
        sampling.max_tokens = self.max_tokens.unwrap_or(sampling.max_tokens);
        let (num_prompts, num_samples) = (self.num_prompts.unwrap_or(num_prompts), self.n.unwrap_or(num_samples));
        Suite { num_prompts, num_samples, sampling, ..suite }
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let (eval, mut generator) = config::load_eval(args.config.as_deref(), &args.overrides)?;
    generator.threads = args.threads.unwrap_or(generator.threads);
    let folder = model_folder(args)?;
    let suites = suites(args, &eval)?;
    let longest = max_model_len(generator.max_model_len, &ModelConfig::load(&folder)?);
    let engine = LocalGenerator::load(&args.placement.options(&folder, generator)?)?;
    let model = Model { folder: &folder, tokenizer: engine.tokenizer(), max_model_len: longest };
    let data_dir = args.data_dir.as_ref().unwrap_or(&eval.data_dir);
    // Before anything is asked: what cannot be asked is found in seconds.
    let load = |suite| Asked::load(suite, data_dir, model);
    let asked = suites.into_iter().map(load).collect::<Result<Vec<_>>>()?;

    let runtime = network_runtime()?;
    let mut results = Results::new(&folder, args.asking.seed);
    for suite in &asked {
        let name = &suite.suite.name;
        let started = Instant::now();
        let mut answers = Answers { engine: &engine, runtime: &runtime, name };
        let groups = answers.roll_out(&suite.request(suite.prompts.clone(), args.asking.seed, PolicyVersion(0)))?;
        let groups = in_time(&suite.prompts, groups)?;
        if let Some(out) = &args.out {
            write_items(&out.join(format!("{name}.jsonl")), &groups)?;
        }
        results.push(&suite.suite, Report::of(&groups, suite.suite.num_samples, started.elapsed()));
    }
    if let Some(out) = &args.out {
        results.write(&out.join("summary.json"))?;
    }
    if args.json {
        println!("{}", json!(results));
    } else {
        print!("{results}");
    }
    Ok(ExitCode::SUCCESS)
}

fn model_folder(args: &Args) -> Result<PathBuf> {
    let folder = match (&args.model, &args.run) {
        (Some(model), _) => return hub::local_model("--model", model),
        (None, Some(run)) if args.best => best_checkpoint(run)?,
        (None, Some(run)) => newest_checkpoint(run)?,
        (None, None) => bail!("name --model or --run"),
    };
    let is_adapter = folder.join("adapter_config.json").exists();
    ensure!(!is_adapter, "{} holds adapters: `aha export` merges them into a model for --model", folder.display());
    Ok(folder)
}

/// The suites to ask, in the order in which they were named.
fn suites(args: &Args, eval: &Eval) -> Result<Vec<Suite>> {
    let names: Vec<&String> =
        if args.suite.is_empty() { eval.suites.0.keys().collect() } else { args.suite.iter().collect() };
    ensure!(
        !names.is_empty(),
        "name --suite, or a --config with eval.suites; built in are {}",
        built_in_suites().join(", ")
    );
    let resolve = |(index, name): (usize, &&String)| {
        ensure!(!names[..index].contains(name), "--suite: {name} is named twice");
        let options = eval.suites.0.get(*name).cloned().unwrap_or_default();
        let suite = Suite::resolve(name, &options).and_then(|suite| args.asking.apply(suite).checked());
        suite.map_err(|problems| anyhow::anyhow!(problems.join("; ")))
    };
    names.iter().enumerate().map(resolve).collect()
}

/// Writes a text whose folder is made where it is not there.
fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(path, text));
    written.with_context(|| format!("writing {}", path.display()))
}
