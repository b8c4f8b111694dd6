//! `aha`: reinforcement learning for language models in one binary.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line talks to its user")]

mod commands;
mod hub;
mod launch;
mod logs;
mod telemetry;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use telemetry::Telemetry;

use commands::{bench, data, doctor, eval, export, generate, generator, plan, reward, score, sft, status, trainer};

/// Makes language models reason by reinforcement learning: trainer ranks, generators, and the tools around them.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Launch(launch::Args),
    Trainer(trainer::Args),
    Generator(generator::Args),
    Sft(sft::Args),
    Eval(eval::Args),
    Export(export::Args),
    Generate(generate::Args),
    Score(score::Args),
    Data(data::Args),
    Plan(plan::Args),
    Doctor(doctor::Args),
    Status(status::Args),
    Reward(reward::Args),
    Hub(commands::hub::Args),
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // A subcommand comes before all options.
    let role = std::env::args().nth(1).unwrap_or_default();
    let result = Telemetry::from_environment(&role).and_then(|telemetry| {
        logs::init(telemetry.as_ref().map(Telemetry::layer));
        // Telemetry stays until the command has ended.
        run(cli.command)
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Launch(args) => launch::run(&args),
        Command::Trainer(args) => trainer::run(&args),
        Command::Generator(args) => generator::run(&args),
        Command::Sft(args) => sft::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Data(args) => data::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Reward(args) => reward::run(&args),
        Command::Hub(args) => commands::hub::run(&args),
        Command::Bench(args) => bench::run(&args),
    }
}

/// An error with its causes, none of them twice.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(if text.is_empty() { "" } else { ": " });
            text.push_str(&cause);
        }
    }
    text
}
