//! Trainers that sample in their own processes learn what those with generators learn.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use aha_tests::binary::aha;
use aha_tests::small_run::{self, MAX_STEPS};
use serde_json::Value;

fn launch(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(aha());
    command.args(["launch", "run.yaml"]).args(arguments).current_dir(folder).env("OMP_NUM_THREADS", "1");
    command.stdin(Stdio::null()).output().unwrap()
}

/// Runs to the end; returns its last checkpoint's weights, and its metrics.
fn run(arguments: &[&str]) -> (Vec<u8>, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let output = launch(folder.path(), arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let run = folder.path().join("runs/small");
    let weights = std::fs::read(run.join(format!("checkpoints/step-{MAX_STEPS}/model.safetensors"))).unwrap();
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    (weights, metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

#[test]
fn what_is_learnt_is_the_same_to_the_last_bit() {
    for trainers in ["1", "2"] {
        let (expect, _) = run(&["--trainers", trainers, "--generators", "1"]);
        for stage in ["2", "3"] {
            let stage = format!("train.zero_stage={stage}");
            let (weights, metrics) = run(&["--trainers", trainers, "--colocate", "--set", &stage]);
            assert!(weights == expect, "{trainers} trainers, {stage}");
            for step in &metrics {
                assert_eq!(step["generators"].as_f64().unwrap().to_string(), trainers);
                assert!(step["grad_norm"].as_f64().unwrap() > 0.0 && step["policy/lag"] == 0.0, "{step}");
            }
        }
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    for (settings, expect) in [
        (vec!["--generators", "2"], "cannot be used with '--generators"),
        (vec!["--set", "rollout.max_lag=1"], "launch.colocate: sampling and training take turns"),
        (vec!["--set", "generator.coordinator=127.0.0.1:1"], "launch.colocate: samples in the trainers' processes"),
    ] {
        let output = launch(folder.path(), &[vec!["--colocate"], settings].concat());
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && message.contains(expect), "{message}");
    }
    assert!(!folder.path().join("runs").exists());
}
