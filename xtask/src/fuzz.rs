//! Coverage-guided fuzzing of what aha reads from others, for a bounded time: the targets of `fuzz/`, with libFuzzer.
//!
//! Not a part of `cargo xtask test`: it takes minutes by design. Instrumentation is that of `cargo fuzz`, by options that
//! stable Rust has.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use tempfile::TempDir;

use crate::process::{self, Status, run_stage};
use crate::workspace::Workspace;

/// Where the first inputs of a target are.
#[derive(Clone, Copy)]
enum Seeds {
    /// Files of this ending below this folder.
    Files(&'static str, &'static str),
    /// The target makes them when it starts. Such a target needs libtorch.
    Made,
}

const TARGETS: [(&str, Seeds); 7] = [
    ("config", Seeds::Files("configs", "yaml")),
    ("chat_template", Seeds::Files("tests/golden/chat_template", "jinja")),
    ("reward", Seeds::Files("fuzz/seeds/reward", "txt")),
    ("message", Seeds::Files("fuzz/seeds/message", "binpb")),
    ("tokenizer", Seeds::Files("tests/golden/models", "json")),
    ("safetensors", Seeds::Made),
    ("rpc", Seeds::Made),
];

/// Branches, comparisons and a table of them, as libFuzzer wants them.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";
/// An input that takes longer, or more memory, is a finding.
const SECONDS_OF_AN_INPUT: u32 = 10;
const MEGABYTES: u32 = 2048;

/// Fuzzes the targets of these names, or all, `seconds` each.
///
/// # Errors
/// If there is no such target, or it cannot be built or started; a finding is a failing [`Status`].
pub(crate) fn run(workspace: &Workspace, names: &[String], seconds: u64) -> anyhow::Result<Status> {
    let known: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("{unknown:?} is no fuzz target; there are {}", known.join(", "));
    }
    let is_chosen = |name: &str| names.is_empty() || names.iter().any(|chosen| chosen == name);
    let chosen: Vec<(&str, Seeds)> = TARGETS.into_iter().filter(|(name, _)| is_chosen(name)).collect();
    let folder = workspace.path("target/fuzz");
    let binaries = build(workspace, &folder, chosen.iter().any(|(_, seeds)| matches!(seeds, Seeds::Made)))?;
    let mut status = Status::Success;
    for (name, seeds) in chosen {
        let inputs = folder.join("corpus").join(name);
        let findings = folder.join("findings").join(name);
        for folder in [&inputs, &findings] {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        let mut fuzzer = Command::new(binaries.join(name));
        match seeds {
            Seeds::Files(from, ending) => copy_seeds(&workspace.path(from), ending, &inputs)?,
            Seeds::Made => drop(fuzzer.env("AHA_FUZZ_SEEDS", &inputs)),
        }
        let scratch = scratch()?;
        fuzzer.env("TMPDIR", scratch.path()).env("OMP_NUM_THREADS", "1");
        let log = folder.join(format!("{name}.log"));
        fuzzer.arg(&inputs).arg(format!("-artifact_prefix={}/", findings.display()));
        fuzzer.args([format!("-max_total_time={seconds}"), format!("-timeout={SECONDS_OF_AN_INPUT}")]);
        fuzzer.args([format!("-rss_limit_mb={MEGABYTES}"), "-print_final_stats=1".to_owned()]);
        fuzzer.stderr(File::create(&log).with_context(|| format!("making {}", log.display()))?);
        let stage = run_stage("fuzz", &mut fuzzer)?;
        eprintln!("    {name}: {}", summary(&String::from_utf8_lossy(&fs::read(&log)?)));
        if stage.status != Status::Success {
            eprintln!("    {name}: a finding, below {}; see {}", findings.display(), log.display());
            status = stage.status;
        }
    }
    Ok(status)
}

/// A folder for what targets write for every input: in memory, where there is such a place.
fn scratch() -> anyhow::Result<TempDir> {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.context("making a folder for what targets write")
}

/// Returns the folder of the binaries.
fn build(workspace: &Workspace, folder: &Path, needs_torch: bool) -> anyhow::Result<PathBuf> {
    let version = process::output(Command::new("rustc").arg("-vV")).context("asking rustc for its host")?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    let mut cargo = workspace.command("cargo");
    cargo.args(["build", "--release", "--manifest-path", "fuzz/Cargo.toml", "--target", host]);
    if needs_torch {
        cargo.args(["--features", "torch"]);
    }
    // With a target, the flags are not those of build scripts and macros.
    cargo.arg("--target-dir").arg(folder).env("RUSTFLAGS", FLAGS);
    let stage = run_stage("build the fuzz targets", &mut cargo)?;
    ensure!(stage.status == Status::Success, "the fuzz targets do not build");
    Ok(folder.join(host).join("release"))
}

fn copy_seeds(from: &Path, ending: &str, to: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            copy_seeds(&path, ending, to)?;
        } else if path.extension().is_some_and(|known| known == ending) {
            let parent = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            fs::copy(&path, to.join(format!("{parent}-{name}")))
                .with_context(|| format!("copying {}", path.display()))?;
        }
    }
    Ok(())
}

/// Inputs that were run, places that they reached, and memory, of what libFuzzer says at its end.
fn summary(log: &str) -> String {
    let stat = |name: &str| {
        let line = log.lines().find_map(|line| line.strip_prefix(&format!("stat::{name}:")));
        line.map_or("?", str::trim)
    };
    let covered = log.lines().rev().find_map(|line| line.split_once("cov: ")?.1.split(' ').next());
    let (inputs, memory) = (stat("number_of_executed_units"), stat("peak_rss_mb"));
    format!("{inputs} inputs, {} places reached, {memory} MB at most", covered.unwrap_or("?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_at_its_end_is_read() {
        let log = "#2\tINITED cov: 10 ft: 11\n#9\tDONE   cov: 124 ft: 300 corp: 7/2b\n\
                   stat::number_of_executed_units: 1234\nstat::peak_rss_mb:            45\n";
        assert_eq!(summary(log), "1234 inputs, 124 places reached, 45 MB at most");
    }
}
