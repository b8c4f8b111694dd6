//! Everything a user can get wrong gets a message that says what, where and what to do, and a non-zero exit.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

use aha_tests::binary::{aha, check_refused, check_runs, text};
use aha_tests::small_run;

/// A folder with a small run in it.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    folder
}

#[track_caller]
fn check_sft(folder: &Path, overrides: &[&str], expect: &[&str]) {
    let mut arguments = vec!["sft", "run.yaml"];
    arguments.extend(overrides.iter().flat_map(|text| ["--set", text]));
    check_refused(folder, &arguments, expect);
    assert!(!folder.join("runs/small/model").exists(), "something was written");
}

#[test]
fn settings_that_make_no_sense() {
    let folder = folder();
    for (setting, expect) in [
        ("train.learning_rat=1", vec!["train.learning_rat: no such key; did you mean train.learning_rate?"]),
        ("trian.max_steps=1", vec!["trian", "did you mean train"]),
        ("train.max_steps=many", vec!["train.max_steps", "many"]),
        ("rollout.num_generations=1", vec!["rollout.num_generations", "at least 2"]),
        ("rollout.generation_batch_size=30", vec!["rollout.generation_batch_size", "30", "multiple"]),
        ("rewards=[{function: equaton}]", vec!["rewards[0].function", "equaton", "equation"]),
        ("run.name=../elsewhere", vec!["run.name", "folder"]),
        ("train.zero_stage=7", vec!["train.zero_stage", "7"]),
    ] {
        check_sft(folder.path(), &[setting], &expect);
    }
    check_refused(folder.path(), &["sft", "absent.yaml"], &["absent.yaml", "no such file"]);
    std::fs::write(folder.path().join("broken.yaml"), "run: [").unwrap();
    check_refused(folder.path(), &["sft", "broken.yaml"], &["broken.yaml"]);
    assert!(!folder.path().join("runs").exists(), "a refused run wrote a folder");
}

#[test]
fn models_that_cannot_be_read() {
    let folder = folder();
    let real = ["model.random_init=false"];
    check_sft(folder.path(), &real, &["model.safetensors"]);
    check_sft(folder.path(), &["model.path=absent"], &["absent", "config.json"]);

    let nowhere = "generator.addresses=['127.0.0.1:9']";
    check_refused(folder.path(), &["trainer", "run.yaml", "--set", nowhere, "--set", real[0]], &["model.safetensors"]);
    assert!(!folder.path().join("runs").exists(), "a run that cannot begin wrote a folder");

    let made = check_runs(folder.path(), &["sft", "run.yaml", "--set", "train.max_steps=1", "--set", "run.name=first"]);
    let weights = folder.path().join("runs/first/model/model.safetensors");
    assert!(made.contains("model written to"), "{made}");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(folder.path().join("model/model.safetensors"), &whole[..whole.len() / 2]).unwrap();
    check_sft(folder.path(), &real, &["model/model.safetensors"]);
    std::fs::write(folder.path().join("model/model.safetensors"), &whole).unwrap();
    let config = std::fs::read_to_string(folder.path().join("model/config.json")).unwrap();
    std::fs::write(
        folder.path().join("model/config.json"),
        config.replace("\"intermediate_size\":64", "\"intermediate_size\":48"),
    )
    .unwrap();
    check_sft(folder.path(), &real, &["mlp.gate_proj.weight", "[64, 32]", "[48, 32]"]);
    std::fs::write(folder.path().join("model/config.json"), config.replace("qwen2", "gpt2")).unwrap();
    check_sft(folder.path(), &real, &["config.json", "gpt2"]);
    assert!(!folder.path().join("runs/small").exists(), "a run that cannot begin wrote a folder");
}

#[test]
fn data_that_does_not_fit() {
    let folder = folder();
    let path = folder.path().join("rows.jsonl");
    let rows: String =
        (0..40).map(|n| format!("{{\"goal\": {n}, \"nums\": [1, {n}], \"solution\": \"1\"}}\n")).collect();
    std::fs::write(&path, rows).unwrap();
    let jsonl = ["data.source=file", "data.path=rows.jsonl"];
    check_sft(folder.path(), &jsonl, &["\"target\"", "goal", "data.columns"]);
    check_sft(folder.path(), &["data.source=file", "data.path=absent.jsonl"], &["absent.jsonl"]);
    std::fs::copy(&path, folder.path().join("rows.parquet")).unwrap();
    check_sft(folder.path(), &["data.source=file", "data.path=rows.parquet"], &["rows.parquet"]);
    let nowhere = "generator.addresses=['127.0.0.1:9']";
    check_refused(
        folder.path(),
        &["trainer", "run.yaml", "--set", nowhere, "--set", "data.max_prompt_length=3"],
        &["data.max_prompt_length", "3"],
    );
    std::fs::write(&path, "{\"target\": 1, \"nums\": [1]}\nnot json\n").unwrap();
    check_sft(folder.path(), &jsonl, &["rows.jsonl:2"]);
}

#[test]
fn generators_that_never_answer() {
    let folder = folder();
    check_refused(folder.path(), &["trainer", "run.yaml"], &["generator.addresses", "aha launch"]);
    check_refused(
        folder.path(),
        &[
            "trainer",
            "run.yaml",
            "--set",
            "generator.addresses=['127.0.0.1:9']",
            "--set",
            "generator.connect_timeout_seconds=1",
        ],
        &["127.0.0.1:9"],
    );
}

#[test]
fn a_prompt_longer_than_the_model() {
    let folder = folder();
    check_refused(folder.path(), &["generate", "--model", "model", "--raw", "--prompt", "x"], &["model.safetensors"]);
    check_runs(folder.path(), &["sft", "run.yaml", "--set", "train.max_steps=1"]);
    let long = "9 ".repeat(400);
    check_refused(
        folder.path(),
        &["generate", "--model", "runs/small/model", "--raw", "--prompt", &long],
        &["256", "tokens"],
    );
    check_refused(
        folder.path(),
        &["score", "--model", "runs/small/model", "--tokens", "1,99999"],
        &["99999", "vocabulary"],
    );
}

/// A file size limit stands in for a full disk: writing fails the same way, half-way through a file.
#[test]
fn a_full_disk_while_checkpointing_keeps_the_earlier_checkpoint() {
    let folder = folder();
    let command = format!("trap '' XFSZ; ulimit -f 120; exec {} sft run.yaml --set train.max_steps=4", aha().display());
    // The limit is over the model's size and under its optimizer's from the start: a first run without it makes step-2.
    let steps = ["sft", "run.yaml", "--set", "train.max_steps=4"];
    let mut first = Command::new(aha()).args(steps).current_dir(folder.path()).spawn().unwrap();
    let checkpoint = folder.path().join("runs/small/checkpoints/step-2");
    while !checkpoint.is_dir() && first.try_wait().unwrap().is_none() {
        std::thread::park_timeout(std::time::Duration::from_millis(5));
    }
    if first.try_wait().unwrap().is_none() {
        first.kill().unwrap();
    }
    first.wait().unwrap();
    std::fs::remove_dir_all(folder.path().join("runs/small/checkpoints/step-4")).ok();
    std::fs::remove_dir_all(folder.path().join("runs/small/model")).ok();
    let output = Command::new("sh").args(["-c", &command]).current_dir(folder.path()).output().unwrap();
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("step-4"), "{said}");
    assert!(checkpoint.join("trainer_state/state.json").is_file(), "the earlier checkpoint is gone: {said}");
    let left: Vec<_> =
        std::fs::read_dir(checkpoint.parent().unwrap()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["step-2"], "{said}");
    let _resumed: String = check_runs(folder.path(), &steps);
}

#[test]
fn rewards_from_standard_input() {
    let run = |line: &str| {
        let command = format!("printf '%s\\n' '{line}' | {} reward --function equation --json", aha().display());
        Command::new("sh").args(["-c", &command]).output().unwrap()
    };
    let right = run(
        r#"{"completion": "x </think>\n<answer> 55 + 36 - 7 - 19 </answer>", "target": 65, "nums": [19, 36, 55, 7]}"#,
    );
    assert_eq!(text(&right).trim(), r#"{"score":1.0,"outcome":"score"}"#);
    let missing = run(r#"{"completion": "x", "nums": [1]}"#);
    assert!(!missing.status.success() && text(&missing).contains("target"), "{}", text(&missing));
}
