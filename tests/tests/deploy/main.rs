//! The files in deploy/, held against the binary and against each other.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod autoscaling;
mod commands;
mod compose;
mod docker;
mod kubernetes;
mod kustomize;
mod overlay;
mod pods;
mod slurm;

use std::path::{Path, PathBuf};

use aha_core::config::{self, RunConfig};
use aha_tests::golden::workspace;
use serde_json::Value;

use commands::Invocation;

/// Folder in the image that recipes' relative paths start from.
const WORKDIR: &str = "/var/lib/aha";

fn deploy(path: &str) -> PathBuf {
    workspace().join("deploy").join(path)
}

#[track_caller]
fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The documents of a YAML file.
#[track_caller]
fn yaml(path: &Path) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What `pointer` finds in `value`.
#[track_caller]
fn at<'a>(value: &'a Value, pointer: &str) -> &'a Value {
    value.pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {value:#}"))
}

#[track_caller]
fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    at(value, pointer).as_str().unwrap_or_else(|| panic!("{pointer} is no text in {value:#}"))
}

#[track_caller]
fn number(value: &Value, pointer: &str) -> u64 {
    at(value, pointer).as_u64().unwrap_or_else(|| panic!("{pointer} is no number in {value:#}"))
}

/// A list, empty where there is none.
fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// An image of this version, under any registry: `NAME:TAG`, never `latest`.
#[track_caller]
fn check_image(image: &str) {
    let version = env!("CARGO_PKG_VERSION");
    let (name, tag) = image.rsplit_once(':').unwrap_or_else(|| panic!("{image} has no tag"));
    assert_eq!(name.rsplit('/').next(), Some("aha"), "{image} is not what deploy/docker builds");
    assert_eq!(tag, version, "{image} is not of this version");
}

/// Seconds of `5m` or `330s`.
#[track_caller]
fn seconds(text: &str) -> f64 {
    let (digits, unit) = text.split_at(text.len() - 1);
    let digits: f64 = digits.parse().unwrap_or_else(|_| panic!("{text} is no duration"));
    digits * [("s", 1.0), ("m", 60.0), ("h", 3600.0)].iter().find(|(name, _)| *name == unit).unwrap().1
}

/// The folders that a run reads and writes lie in the image, or in `mounts` of the container.
#[track_caller]
fn check_folders(config: &RunConfig, mounts: &[&str]) {
    let image = format!("{WORKDIR}/configs");
    let folders = [Some(&config.model.path), config.data.path.as_ref()].into_iter().flatten();
    for folder in folders.map(|folder| PathBuf::from(WORKDIR).join(folder)) {
        let found = mounts.iter().chain([&image.as_str()]).any(|mount| folder.starts_with(mount));
        assert!(found, "{} is in none of {mounts:?}", folder.display());
    }
    let runs = PathBuf::from(WORKDIR).join(&config.run.output_dir);
    assert!(mounts.iter().any(|mount| runs.starts_with(mount)), "{} is not kept: {mounts:?}", runs.display());
}

#[test]
fn the_readme_names_files_that_exist() {
    let readme = read(&deploy("README.md"));
    let words = readme.split(|c: char| c.is_whitespace() || "`()[]".contains(c));
    let paths: Vec<&str> = words
        .map(|word| word.trim_end_matches([',', '.', ':', ';']))
        .filter(|word| word.starts_with("deploy/"))
        .collect();
    assert!(paths.len() > 5, "{paths:?}");
    for path in paths {
        assert!(workspace().join(path).exists(), "deploy/README.md names {path}");
    }
    for line in readme.lines().filter(|line| line.starts_with("docker run")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let image = words.iter().position(|word| word.starts_with("aha:")).unwrap();
        check_image(words[image]);
        let command = Invocation::new(&words[image + 1..]);
        assert!(command.is_taken() && workspace().join(command.recipe()).is_file(), "{line}");
    }
    let sections = ["docker", "compose", "kubernetes", "slurm"];
    for folder in std::fs::read_dir(deploy("")).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_dir()) {
        let name = folder.file_name().into_string().unwrap();
        assert!(
            sections.contains(&name.as_str()) && readme.contains(&format!("deploy/{name}")),
            "{name} is not explained"
        );
    }
}

/// Loads a recipe of configs/, or of a file, as a role would with these variables and overrides.
#[track_caller]
fn load(recipe: &Path, variables: &[(String, String)], overrides: &[String]) -> RunConfig {
    config::load(recipe, variables.iter().cloned(), overrides).unwrap_or_else(|error| panic!("{error}"))
}
