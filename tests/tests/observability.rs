//! What a run shows of itself while it runs: `aha status`, asked of real processes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use aha_tests::binary::{aha, text};
use aha_tests::small_run;
use serde_json::Value;

const TOKEN: &str = "a-token-of-this-test";
const PATIENCE: Duration = Duration::from_secs(120);

/// One trainer that generators register with, and one generator; both end with this.
struct Run<'a> {
    folder: &'a Path,
    coordinator: String,
    generator: String,
    children: Vec<Child>,
}

impl<'a> Run<'a> {
    /// `overrides` are both processes'.
    fn start(folder: &'a Path, overrides: &[&str]) -> Self {
        small_run::write(folder);
        let [coordinator, generator] = free_addresses();
        let mut run = Self { folder, coordinator, generator, children: Vec::new() };
        let registers = format!("generator.coordinator={}", run.coordinator);
        for role in ["trainer", "generator"] {
            let mut command = run.aha(&[role, "run.yaml", "--set", &registers, "--set", "train.max_steps=100000"]);
            command.args(overrides.iter().flat_map(|text| ["--set", text]));
            if role == "generator" {
                command.args(["--listen", &run.generator]);
            }
            let log = std::fs::File::create(folder.join(format!("{role}.txt"))).unwrap();
            let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
            run.children.push(child);
        }
        run
    }

    fn aha(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(aha());
        command.args(arguments).current_dir(self.folder).stdin(Stdio::null());
        command.envs([("AHA_TOKEN", TOKEN), ("OMP_NUM_THREADS", "1")]);
        command
    }

    fn status(&self, arguments: &[&str]) -> Output {
        self.aha(&[&["status"], arguments].concat()).output().unwrap()
    }

    /// What `aha status --json` says as soon as it is as `wanted`.
    fn wait_for_status(&self, arguments: &[&str], wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = self.status(&[arguments, &["--json", "--interval", "0.2"]].concat());
            let status = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
            if wanted(&status) {
                return status;
            }
            let log = || std::fs::read_to_string(self.folder.join("trainer.txt")).unwrap();
            assert!(Instant::now() < deadline, "{}\n{}", text(&output), log());
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        for child in &mut self.children {
            // One that has ended already is no concern.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Below the ports that the system gives to others, from a place of this process's own.
fn free_addresses<const N: usize>() -> [String; N] {
    let first = 6_000 + (std::process::id() % 35) as u16 * 100;
    let mut free = (first..).filter(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    std::array::from_fn(|_| format!("127.0.0.1:{}", free.next().unwrap()))
}

#[test]
fn a_run_and_its_generators_are_asked_by_any_of_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::start(folder.path(), &[]);
    let coordinator = run.coordinator.as_str();
    let takes_part = |status: &Value| {
        let runs = &status["runs"][0];
        runs["version"].as_u64() >= Some(2) && runs["members"][0]["takes_part"] == true
    };
    // The coordinator names the generator.
    let status = run.wait_for_status(&[coordinator], takes_part);
    assert_eq!((&status["runs"][0]["run"], &status["runs"][0]["max_steps"]), (&"small".into(), &100_000.into()));
    assert!(status["runs"][0]["members"][0]["heard_seconds"].as_f64().unwrap() <= 15.0, "{status}");
    let generator = &status["generators"][0];
    assert_eq!((&generator["address"], &generator["model"]), (&run.generator.as_str().into(), &"model".into()));
    assert!(generator["lag"].as_u64() <= Some(1) && generator["generation_tokens"].as_u64() > Some(0), "{status}");
    // So do the run's folder, and the recipe of the run.
    for name in ["runs/small", "run.yaml"] {
        let busy = |status: &Value| status["generators"][0]["tokens_per_second"].as_f64() > Some(0.0);
        run.wait_for_status(&[name], busy);
    }

    let [nobody] = free_addresses();
    let shown = run.status(&[&run.generator, &nobody]);
    assert!(shown.status.success(), "one of two answers: {}", text(&shown));
    let lines = String::from_utf8(shown.stdout).unwrap();
    assert!(lines.starts_with("GENERATOR ") && lines.contains(&format!("\n{} ", run.generator)), "{lines}");
    assert!(lines.contains(&format!("\n{nobody}  no answer: ")), "{lines}");

    let stranger = run.aha(&["status", &run.generator]).env("AHA_TOKEN", "another-token-than-it").output().unwrap();
    assert_eq!(stranger.status.code(), Some(1), "nobody answers a stranger: {}", text(&stranger));
    assert!(text(&stranger).contains("asks for a token"), "{}", text(&stranger));
}

/// Takes connections and never answers.
#[test]
fn whoever_is_silent_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let started = Instant::now();
    let arguments = ["status", &address, "--timeout", "0.5", "--interval", "0"];
    let output = Command::new(aha()).args(arguments).current_dir(folder.path()).output().unwrap();
    assert!(started.elapsed() < PATIENCE / 4, "{:?}", started.elapsed());
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{address}  no answer: not within 0.5 s\n"));
}
