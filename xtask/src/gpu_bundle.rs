//! `cargo xtask gpu-bundle`: a folder that checks and measures aha on a GPU host that has torch's wheel and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use crate::libtorch;
use crate::process::{Status, output, run_stage};
use crate::toolchain;
use crate::workspace::Workspace;

const DEFAULT_OUT: &str = "target/gpu-bundle";
/// Small enough to be carried anywhere.
const MAX_BYTES: u64 = 64 << 20;
/// Made last; a folder with it is one of ours.
const STAMP: &str = "bundle.json";
/// Test programs, by the names of their targets.
const TEST_PROGRAMS: [&str; 3] = ["aha_nn", "aha_trainer", "parity"];
/// Everything but programs: from the workspace, into the bundle.
const FILES: [(&str, &str); 8] = [
    ("xtask/gpu-bundle/run.py", "run.py"),
    ("xtask/gpu-bundle/host.py", "host.py"),
    ("xtask/gpu-bundle/process.py", "process.py"),
    ("xtask/gpu-bundle/report.py", "report.py"),
    ("xtask/peers/hf_decode.py", "hf_decode.py"),
    ("xtask/gpu-bundle/one-step.yaml", "workspace/one-step.yaml"),
    ("configs/models/countdown-tiny", "workspace/configs/models/countdown-tiny"),
    ("tests/golden/models", "workspace/tests/golden/models"),
];

/// Builds for speed, and puts programs, scripts and fixtures into `out`.
pub(crate) fn run(workspace: &Workspace, out: Option<&Path>) -> anyhow::Result<Status> {
    libtorch::setup(workspace, None, false)?;
    let out = std::path::absolute(out.map_or_else(|| workspace.path(DEFAULT_OUT), Path::to_owned))?;
    clear(&out)?;
    // Before the build: what is changed while it goes on is not in it for sure.
    let facts = facts(workspace);
    let build = run_stage("build", workspace.cargo().args(["build", "--release", "--package", "aha"]))?;
    if build.status != Status::Success {
        return Ok(build.status);
    }
    eprintln!("==> test programs");
    let mut programs = test_programs(workspace)?;
    programs.push(("aha".to_owned(), workspace.release_binary()?));
    fs::create_dir_all(out.join("bin")).with_context(|| format!("cannot make {}", out.display()))?;
    for (name, built) in &programs {
        let program = out.join("bin").join(name);
        strip(built, &program)?;
        compress(&program)?;
    }
    for (from, to) in FILES {
        copy(&workspace.path(from), &out.join(to))?;
    }
    let stamp = out.join(STAMP);
    fs::write(&stamp, format!("{facts:#}\n")).with_context(|| format!("cannot write {}", stamp.display()))?;
    let bytes = size(&out)?;
    ensure!(bytes <= MAX_BYTES, "{} has {bytes} bytes, over {MAX_BYTES}: leave a test program out", out.display());
    eprintln!("{}: {:.1} MB", out.display(), bytes as f64 / 1e6);
    eprintln!("Copy it to a GPU host with torch 2.11 for Python, and there: python3 run.py --out results");
    eprintln!("A rehearsal on a CPU: python3 run.py --device cpu --shapes smollm2-135m --batches 2 --new-tokens 8");
    Ok(Status::Success)
}

/// Makes way for a new bundle, and only for that.
fn clear(out: &Path) -> anyhow::Result<()> {
    let is_empty = fs::read_dir(out).map_or(true, |mut entries| entries.next().is_none());
    if is_empty {
        return Ok(());
    }
    ensure!(out.join(STAMP).is_file(), "{} is not empty and holds no bundle: name another --out", out.display());
    fs::remove_dir_all(out).with_context(|| format!("cannot remove {}", out.display()))
}

/// Builds them and asks cargo where they are: names and paths.
fn test_programs(workspace: &Workspace) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--release", "--no-run", "--message-format=json-render-diagnostics"]);
    cargo.args([
        "--package",
        "aha-nn",
        "--package",
        "aha-trainer",
        "--package",
        "aha-tests",
        "--lib",
        "--test",
        "parity",
    ]);
    let built = cargo.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    ensure!(built.status.success(), "the test programs do not build; cargo's message is above");
    executables(&String::from_utf8_lossy(&built.stdout))
}

/// Of every name in [`TEST_PROGRAMS`], the program that cargo's messages speak of.
fn executables(messages: &str) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let messages: Vec<Value> = messages.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let find = |name: &&str| {
        let artifact = messages.iter().find(|message| {
            message["target"]["name"] == **name
                && message["profile"]["test"] == true
                && message["executable"].is_string()
        });
        let path = artifact.and_then(|artifact| artifact["executable"].as_str());
        let path = path.with_context(|| format!("cargo built no test program of {name}"))?;
        Ok(((*name).to_owned(), PathBuf::from(path)))
    };
    TEST_PROGRAMS.iter().map(find).collect()
}

/// Copies a program without its symbols, which are most of it.
fn strip(from: &Path, to: &Path) -> anyhow::Result<()> {
    let status =
        Command::new("strip").arg("-o").args([to, from]).status().context("cannot start strip (of binutils)")?;
    ensure!(status.success(), "strip failed on {}", from.display());
    Ok(())
}

/// Puts `NAME.gz` in the place of a program; `run.py` unpacks it.
fn compress(program: &Path) -> anyhow::Result<()> {
    let python = toolchain::find_python()?;
    let status =
        Command::new(python).args(["-m", "gzip", "--best"]).arg(program).status().context("cannot start Python")?;
    ensure!(status.success(), "Python's gzip failed on {}", program.display());
    fs::remove_file(program).with_context(|| format!("cannot remove {}", program.display()))
}

/// A file, or a folder of files.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let context = || format!("cannot copy {} to {}", from.display(), to.display());
    if from.is_dir() {
        for entry in fs::read_dir(from).with_context(context)? {
            let entry = entry.with_context(context)?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(context)?;
    }
    fs::copy(from, to).map(drop).with_context(context)
}

/// What the result says of the binaries.
fn facts(workspace: &Workspace) -> Value {
    let git = |args: &[&str]| output(workspace.command("git").args(args));
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    let is_clean = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|changes| changes.is_empty());
    let commit = if is_clean { commit } else { format!("{commit} with changes") };
    let date =
        output(Command::new("date").args(["-u", "+%Y-%m-%d"])).unwrap_or_else(|| "at an unknown date".to_owned());
    json!({"commit": commit, "date": date, "machine": std::env::consts::ARCH})
}

/// Bytes of all files below a folder.
fn size(folder: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        let kind = entry.metadata()?;
        bytes += if kind.is_dir() {
            size(&entry.path())?
        } else if kind.is_file() {
            kind.len()
        } else {
            bail!("{} is neither a file nor a folder", entry.path().display())
        };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found_among_cargos_messages() {
        let artifact = |name: &str, test: bool, executable: Value| {
            json!({"reason": "compiler-artifact", "target": {"name": name}, "profile": {"test": test},
                "executable": executable})
            .to_string()
        };
        let mut messages = vec!["not JSON".to_owned(), artifact("aha_nn", false, Value::Null)];
        messages.extend(TEST_PROGRAMS.map(|name| artifact(name, true, json!(format!("/target/{name}-1f")))));
        let found = executables(&messages.join("\n")).unwrap();
        assert_eq!(found[2], ("parity".to_owned(), PathBuf::from("/target/parity-1f")));
        assert_eq!(found.len(), TEST_PROGRAMS.len());
        let error = executables(&messages[..3].join("\n")).unwrap_err().to_string();
        assert!(error.contains("aha_trainer"), "{error}");
    }

    #[test]
    fn only_a_bundle_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        clear(&out).unwrap();
        fs::create_dir(&out).unwrap();
        clear(&out).unwrap();
        fs::write(out.join("precious"), "1234").unwrap();
        assert_eq!(size(folder.path()).unwrap(), 4);
        assert!(clear(&out).unwrap_err().to_string().contains("holds no bundle"));
        fs::write(out.join(STAMP), "{}").unwrap();
        clear(&out).unwrap();
        assert!(!out.exists());
    }

    #[test]
    fn every_file_of_the_bundle_exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for (from, to) in FILES {
            let target = tempfile::tempdir().unwrap();
            copy(&root.join(from), &target.path().join(to)).unwrap();
            assert!(size(target.path()).unwrap() > 0, "{from} is empty");
        }
    }
}
