//! `cargo xtask bench`: builds for speed, then measures; decoding and greedy answers beside transformers, whole steps and
//! whole runs beside TRL, on the same prompts.

mod curves;
mod eval;
mod step;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::libtorch;
use crate::process::{Status, run_stage};
use crate::workspace::Workspace;

const PEER: &str = "xtask/peers/hf_decode.py";
const PYTHON: &str = ".peers/bin/python";

#[derive(clap::Subcommand)]
pub(crate) enum Bench {
    /// Decode with aha and with transformers in turns, on the same prompts, and print how they compare
    Decode(Decode),
    /// Take GRPO steps with aha and with TRL in turns, on the same prompts, and print how they compare
    Step(step::Step),
    /// Train on Countdown with several losses, with aha and with TRL, and write how the rewards rise to bench/results
    Curves(curves::Curves),
    /// Answer questions greedily with aha and with transformers, and compare them token by token
    Eval(eval::Eval),
    /// Anything else goes to `aha bench`, as in `cargo xtask bench shape --help`
    #[command(external_subcommand)]
    Other(Vec<String>),
}

#[derive(clap::Args)]
pub(crate) struct Decode {
    /// Hugging Face model folder
    #[arg(long, default_value = "models/smollm2-135m")]
    model: PathBuf,
    /// Take random weights for the folder's config.json
    #[arg(long)]
    dummy: bool,
    /// Sequences decoded at once, one row of the table each
    #[arg(long, value_delimiter = ',', default_value = "1,32,64")]
    batch: Vec<usize>,
    /// Samples of each prompt, as GRPO draws them; divides every batch. transformers gets each prompt as often
    #[arg(long, default_value_t = 1)]
    group: usize,
    /// How aha stores the layers' matrices, one row of the table each: none, int8
    #[arg(long, value_delimiter = ',', default_value = "none")]
    quantization: Vec<String>,
    #[arg(long, default_value_t = 46)]
    prompt_tokens: usize,
    /// Tokens of every completion
    #[arg(long, default_value_t = 128)]
    new_tokens: usize,
    /// Measurements of each, in turns; medians count
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Threads of both; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

pub(crate) fn run(workspace: &Workspace, bench: &Bench) -> anyhow::Result<Status> {
    if let Bench::Curves(args @ curves::Curves { aha: Some(aha), .. }) = bench {
        return curves::curves(workspace, &std::path::absolute(aha)?, args).map(|()| Status::Success);
    }
    if let Bench::Eval(args @ eval::Eval { aha: Some(aha), .. }) = bench {
        return eval::eval(workspace, &std::path::absolute(aha)?, args).map(|()| Status::Success);
    }
    libtorch::setup(workspace, None, false)?;
    let build = run_stage("build", workspace.cargo().args(["build", "--release", "--package", "aha"]))?;
    if build.status != Status::Success {
        return Ok(build.status);
    }
    let aha = workspace.release_binary()?;
    match bench {
        Bench::Decode(args) => decode(workspace, &aha, args).map(|()| Status::Success),
        Bench::Step(args) => step::step(workspace, &aha, args).map(|()| Status::Success),
        Bench::Curves(args) => curves::curves(workspace, &aha, args).map(|()| Status::Success),
        Bench::Eval(args) => eval::eval(workspace, &aha, args).map(|()| Status::Success),
        Bench::Other(args) => {
            let error = workspace.command(&aha).arg("bench").args(args).exec();
            Err(error).with_context(|| format!("cannot start {}", aha.display()))
        }
    }
}

fn decode(workspace: &Workspace, aha: &Path, args: &Decode) -> anyhow::Result<()> {
    let python = python(workspace)?;
    ensure!(args.rounds > 0 && !args.batch.is_empty(), "--rounds and --batch must not be empty");
    let is_whole = args.group > 0 && args.batch.iter().all(|batch| batch.is_multiple_of(args.group));
    ensure!(is_whole, "--group {} does not divide every --batch", args.group);
    let threads = threads(args.threads)?;
    let model = std::path::absolute(&args.model)?;
    let prompts = write_prompts(&model, aha, args)?;
    eprintln!("==> decode: {} threads, {} rounds, tokens per second", threads, args.rounds);
    eprintln!("{:>6}  {:>6}  {:>10}  {:>14}  {:>6}", "batch", "", "aha", "transformers", "ratio");
    for &batch in &args.batch {
        let ours = |quantization: &String| {
            let mut command = workspace.command(aha);
            command.args(["bench", "decode", "--json", "--device", "cpu", "--quantization", quantization]);
            command.arg("--model").arg(&model);
            command.arg("--prompts").arg(&prompts);
            command.args(["--batch", &batch.to_string(), "--group", &args.group.to_string()]);
            command.args(["--new-tokens", &args.new_tokens.to_string(), "--threads", &threads.to_string()]);
            command.args(args.dummy.then_some("--load-format=dummy"));
            command
        };
        let mut peer = workspace.command(&python);
        peer.env("OMP_NUM_THREADS", threads.to_string()).arg(PEER).arg(&model).arg("--prompts").arg(&prompts);
        peer.args(["--batch", &batch.to_string(), "--group", &args.group.to_string()]);
        peer.args(["--new-tokens", &args.new_tokens.to_string()]);
        peer.args(["--threads", &threads.to_string()]).args(args.dummy.then_some("--dummy"));
        let (mut our_rates, mut peer_rates) = (vec![Vec::new(); args.quantization.len()], Vec::new());
        for _ in 0..args.rounds {
            for (rates, quantization) in our_rates.iter_mut().zip(&args.quantization) {
                rates.push(rate(&mut ours(quantization))?);
            }
            peer_rates.push(rate(&mut peer)?);
        }
        for (rates, quantization) in our_rates.into_iter().zip(&args.quantization) {
            let label = if quantization == "none" { "fp32" } else { quantization };
            // Of neighbours in time: the machine may be faster in one round than in another.
            let ratio = median(rates.iter().zip(&peer_rates).map(|(own, peer)| own / peer).collect());
            let (own, peer) = (median(rates), median(peer_rates.clone()));
            eprintln!("{batch:>6}  {label:>6}  {own:>10.1}  {peer:>14.1}  {ratio:>6.2}");
        }
    }
    Ok(())
}

/// Prompts of random tokens for the largest batch, beside the build.
fn write_prompts(model: &Path, aha: &Path, args: &Decode) -> anyhow::Result<PathBuf> {
    let path = model.join("config.json");
    let config = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: Value = serde_json::from_slice(&config).with_context(|| path.display().to_string())?;
    let vocab_size = config["vocab_size"].as_u64().filter(|&size| size > 0);
    let vocab_size = vocab_size.with_context(|| format!("{} names no vocab_size", path.display()))?;
    let mut state = 1_u64;
    let mut token = || {
        // Knuth's MMIX generator; its high bits are the random ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % vocab_size
    };
    let num_prompts = args.batch.iter().copied().max().unwrap_or(1);
    let prompts: Vec<Vec<u64>> = (0..num_prompts).map(|_| (0..args.prompt_tokens).map(|_| token()).collect()).collect();
    let path = aha.with_file_name("bench-prompts.json");
    fs::write(&path, serde_json::to_vec(&prompts)?).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// The Python that has the peers.
fn python(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let python = workspace.path(PYTHON);
    ensure!(python.exists(), "the peers are not installed: `cargo xtask peers` puts them into .peers/");
    Ok(python)
}

/// All cores for 0.
fn threads(asked: usize) -> anyhow::Result<usize> {
    match asked {
        0 => Ok(std::thread::available_parallelism().context("counting this machine's cores")?.get()),
        threads => Ok(threads),
    }
}

fn rate(command: &mut Command) -> anyhow::Result<f64> {
    let measured = measure(command)?;
    let rate = measured["tokens_per_second"].as_f64();
    rate.with_context(|| format!("{command:?} printed no tokens_per_second: {measured}"))
}

/// What a benchmark's last line of output says.
fn measure(command: &mut Command) -> anyhow::Result<Value> {
    let output = command.output().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ended with {}: {}", output.status, said.trim());
    let stdout = String::from_utf8_lossy(&output.stdout);
    let measured = stdout.lines().last().and_then(|line| serde_json::from_str(line).ok());
    measured.with_context(|| format!("{command:?} printed no measurement: {stdout}"))
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    let middle = rates.len() / 2;
    if rates.len().is_multiple_of(2) { (rates[middle - 1] + rates[middle]) / 2.0 } else { rates[middle] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!([median(vec![3.0, 1.0, 2.0]), median(vec![4.0, 1.0])], [2.0, 2.5]);
    }

    #[test]
    fn the_last_line_is_the_measurement() {
        let rate_of = |script| rate(Command::new("sh").args(["-c", script]));
        assert!(rate_of("echo '{}'").unwrap_err().to_string().contains("tokens_per_second"));
        assert_eq!(rate_of("echo loading; echo '{\"tokens_per_second\": 2.5}'").unwrap(), 2.5);
        assert!(rate_of("echo nothing").unwrap_err().to_string().contains("nothing"));
        assert!(rate_of("echo why >&2; exit 3").unwrap_err().to_string().contains("why"));
    }
}
