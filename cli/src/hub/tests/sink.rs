use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use aha_core::config::{HubStrategy, RunConfig};
use aha_core::hub::RepositoryId;
use aha_trainer::checkpoint_sink::CheckpointSink;
use serde_json::{Value, json};

use crate::hub::mock::{Answer, MockHub};
use crate::hub::sink::HubSink;

const PATIENCE: Duration = Duration::from_secs(20);

fn sink(hub: &MockHub, home: &Path, change: impl FnOnce(&mut RunConfig)) -> HubSink {
    let mut config = RunConfig::default();
    config.run.name = "test".to_owned();
    config.hub.timeout_seconds = PATIENCE.as_secs_f64();
    change(&mut config);
    HubSink::new(hub.client(home), RepositoryId::parse("me/mine").unwrap(), &config)
}

fn folder(root: &Path, name: &str) -> std::path::PathBuf {
    let folder = root.join(name);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("config.json"), name).unwrap();
    folder
}

/// Takes small files; a commit waits for a word from `gate`.
fn taking(gate: Receiver<()>) -> MockHub {
    let gate = Mutex::new(gate);
    MockHub::start(move |asked| {
        if asked.line.contains("/preupload/") {
            return Answer::json(&json!({"files": [{"path": "config.json", "uploadMode": "regular"}]}));
        }
        if asked.line.contains("/commit/") {
            gate.lock().unwrap().recv_timeout(PATIENCE).unwrap();
            return Answer::json(&json!({"commitUrl": "https://hub/commit/1"}));
        }
        Answer::of(200, "{}")
    })
}

/// Message and content of every commit.
fn commits(hub: &MockHub) -> Vec<(String, String)> {
    let of = |body: &[u8]| {
        let lines: Vec<Value> =
            std::str::from_utf8(body).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let content = lines[1]["value"]["content"].as_str().unwrap();
        let content = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, content).unwrap();
        (lines[0]["value"]["summary"].as_str().unwrap().to_owned(), String::from_utf8(content).unwrap())
    };
    hub.asked_for("POST /api/models/me/mine/commit/main").iter().map(|asked| of(&asked.body)).collect()
}

fn pair(message: &str, content: &str) -> (String, String) {
    (message.to_owned(), content.to_owned())
}

#[test]
fn one_push_is_under_way_at_a_time_and_the_model_is_waited_for() {
    let root = tempfile::tempdir().unwrap();
    let (open, gate) = channel();
    let hub = taking(gate);
    let mut sink = sink(&hub, root.path(), |_| {});
    let first = folder(root.path(), "step-1");
    sink.checkpoint(&first, 1);
    // Checkpoints are removed while training goes on.
    fs::remove_dir_all(first).unwrap();
    sink.checkpoint(&folder(root.path(), "step-2"), 2);
    for _ in 0..2 {
        open.send(()).unwrap();
    }
    sink.finish(&folder(root.path(), "model"));
    assert_eq!(commits(&hub), [pair("step 1 of test", "step-1"), pair("the model of test", "model")]);
}

#[test]
fn the_strategy_end_pushes_the_model_alone() {
    let root = tempfile::tempdir().unwrap();
    let (open, gate) = channel();
    let hub = taking(gate);
    let mut sink = sink(&hub, root.path(), |config| config.hub.strategy = HubStrategy::End);
    sink.checkpoint(&folder(root.path(), "step-1"), 1);
    open.send(()).unwrap();
    sink.finish(&folder(root.path(), "model"));
    assert_eq!(commits(&hub), [pair("the model of test", "model")]);
}

#[test]
fn a_hub_that_hangs_or_refuses_does_not_hold_up_the_run() {
    let root = tempfile::tempdir().unwrap();
    let hub = MockHub::start(|_| None);
    let mut hanging = sink(&hub, root.path(), |config| config.hub.timeout_seconds = 0.3);
    let started = Instant::now();
    hanging.checkpoint(&folder(root.path(), "step-1"), 1);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    hanging.finish(&folder(root.path(), "model"));
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());

    let hub = MockHub::start(|_| Answer::of(401, "{}"));
    let mut refused = sink(&hub, root.path(), |_| {});
    refused.checkpoint(&root.path().join("absent"), 1);
    refused.finish(&folder(root.path(), "model"));
    assert_eq!(hub.asked_for("POST /api/repos/create").len(), 1);
}
