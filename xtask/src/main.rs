//! The project's own commands: `cargo xtask --help`.
#![forbid(unsafe_code)]
#![expect(clippy::print_stderr, reason = "a command line tool that reports to the person in front of it")]

mod bench;
mod checks;
mod demo;
mod fuzz;
mod gpu_bundle;
mod libtorch;
mod peers;
mod process;
mod toolchain;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::bench::Bench;
use crate::process::Status;
use crate::workspace::Workspace;

/// Set-up, demo, tests and measurements of aha.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = "On a fresh machine: cargo xtask demo")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check the toolchain and fetch libtorch into .libtorch/ (once; about 6 GB while it installs, 4.6 GB after)
    Setup {
        /// Fetch libtorch again even if it is there
        #[arg(long)]
        force: bool,
        /// Install somewhere else than .libtorch/
        #[arg(long, hide = true, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Everything a change must pass: set-up, formatting, clippy, all tests
    Test,
    /// Teach a small model the Countdown game; an interrupted demo goes on where it stopped
    Demo {
        /// Remove what earlier demos left in runs/ and start over
        #[arg(long)]
        fresh: bool,
    },
    /// Build for speed and measure: `decode` beside transformers, anything else as `aha bench` does
    #[command(subcommand)]
    Bench(Bench),
    /// Make one folder that checks and measures aha on a GPU host, where only torch's wheel is installed
    GpuBundle {
        /// Where; a bundle that is there is replaced
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Fuzz what aha reads from others with libFuzzer, outside the tests; all targets, or those that are named
    Fuzz {
        targets: Vec<String>,
        /// For each target
        #[arg(long, default_value_t = 600)]
        seconds: u64,
    },
    /// Install the Python frameworks that aha is measured against into .peers/, and SmolLM2-135M into models/
    Peers {
        /// Make the Python environment somewhere else than .peers/
        #[arg(long, hide = true, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(Status::Success) => ExitCode::SUCCESS,
        Ok(Status::Failure(code)) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> anyhow::Result<Status> {
    let workspace = Workspace::find()?;
    match task {
        Task::Setup { force, dir } => libtorch::setup(&workspace, dir.as_deref(), force).map(|()| Status::Success),
        Task::Test => checks::run(&workspace),
        Task::Demo { fresh } => demo::run(&workspace, fresh),
        Task::Bench(bench) => bench::run(&workspace, &bench),
        Task::GpuBundle { out } => gpu_bundle::run(&workspace, out.as_deref()),
        Task::Fuzz { targets, seconds } => fuzz::run(&workspace, &targets, seconds),
        Task::Peers { dir } => peers::install(&workspace, dir.as_deref()).map(|()| Status::Success),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn bench_passes_flags_on() {
        let cli = Cli::try_parse_from(["xtask", "bench", "shape", "--help", "--batch", "8"]).unwrap();
        assert!(matches!(cli.task, Task::Bench(Bench::Other(args)) if args == ["shape", "--help", "--batch", "8"]));
    }
}
