//! Rewards of the user's own in whole runs, by the commands of docs/your-own-reward.md.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aha_tests::binary::{aha, check_refused, text};
use aha_tests::docs::commands;
use aha_tests::golden::workspace;
use aha_tests::small_run;
use serde_json::Value;

const DOCUMENT: &str = "docs/your-own-reward.md";
const PATIENCE: Duration = Duration::from_secs(180);
/// What a run ends with that is to go on later.
const RESUMABLE: i32 = 75;

/// A folder in which the document's commands find what they name: a small recipe in place of the demo's.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    std::fs::create_dir(folder.path().join("configs")).unwrap();
    std::fs::rename(folder.path().join("run.yaml"), folder.path().join("configs/countdown-tiny.yaml")).unwrap();
    std::os::unix::fs::symlink(workspace().join("examples"), folder.path().join("examples")).unwrap();
    folder
}

/// The only command of the document that has all of `words`.
#[track_caller]
fn command(words: &[&str]) -> String {
    let mut found = commands(DOCUMENT);
    found.retain(|command| words.iter().all(|word| command.contains(word)));
    let [command] = <[String; 1]>::try_from(found).unwrap();
    command
}

/// A shell that runs a command, with `aha` on its path.
fn shell(folder: &Path, command: &str) -> Command {
    let path = format!("{}:{}", aha().parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).current_dir(folder).stdin(Stdio::null());
    shell.envs([("PATH", path.as_str()), ("OMP_NUM_THREADS", "1"), ("RUST_BACKTRACE", "0")]);
    shell
}

#[track_caller]
fn said(folder: &Path, command: &str) -> String {
    let output = shell(folder, command).output().unwrap();
    assert!(output.status.success(), "{command}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn steps(folder: &Path, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join(format!("runs/{run}/metrics.jsonl"))).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[track_caller]
fn number(step: &Value, name: &str) -> f64 {
    step[name].as_f64().unwrap_or_else(|| panic!("no number {name} in {step}"))
}

#[track_caller]
fn wait_until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not come in time");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// A process and its output, killed with this.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(folder: &Path, command: &str, name: &str) -> Self {
        let log = folder.join(format!("{name}.txt"));
        let file = std::fs::File::options().create(true).append(true).open(&log).unwrap();
        // The shell becomes what it runs, so that signals reach that.
        let mut shell = shell(folder, &format!("exec {command}"));
        let child = shell.process_group(0).stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Self { child, log }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    #[track_caller]
    fn wait_for(&self, words: &str) {
        wait_until(words, || self.said().contains(words).then_some(()));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already is no concern.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn a_command_s_reward_trains_the_same_with_and_without_generators() {
    let folder = folder();
    let folder = folder.path();
    let one = command(&["aha reward", "--function command"]);
    assert_eq!(said(folder, &one), "{\"score\":0.5,\"outcome\":\"score\"}\n");

    let launch = command(&["aha launch", "function: command"]);
    said(folder, &launch);
    let run = steps(folder, "close");
    assert_eq!(run.len() as u64, small_run::MAX_STEPS);
    for step in &run {
        let mean = number(step, "rewards/close/mean");
        assert!((0.0..=1.0).contains(&mean) && number(step, "grad_norm") > 0.0, "{step}");
        assert_eq!(number(step, "completions/excluded"), 0.0, "{step}");
    }
    assert!(run.iter().any(|step| number(step, "rewards/close/mean") > 0.0), "{run:?}");
    assert!(run.iter().any(|step| number(step, "rewards/close/unparsable") > 0.0), "{run:?}");
    for rank in 0..2 {
        assert!(folder.join(format!("runs/close/logs/reward-close-{rank}.log")).is_file(), "of rank {rank}");
    }

    said(folder, &format!("{launch} --colocate --set run.name=colocated"));
    let scores = |run: &str| -> Vec<Value> {
        steps(folder, run).iter().map(|step| step["rewards/close/mean"].clone()).collect()
    };
    assert_eq!(scores("colocated"), scores("close"));

    // Ahead of training, too.
    let ahead = "--set run.name=ahead --set rollout.max_lag=2 --set train.rollout_importance_sampling_correction=true";
    said(folder, &format!("{launch} {ahead}"));
    assert!(steps(folder, "ahead").iter().all(|step| number(step, "completions/excluded") == 0.0));
}

#[test]
fn a_run_whose_rewarder_is_not_there_ends_by_its_name() {
    let folder = folder();
    let rewards = r#"rewards=[{function: rewarder, name: asked, address: "127.0.0.1:1", max_retries: 0}]"#;
    check_refused(
        folder.path(),
        &[
            "launch",
            "configs/countdown-tiny.yaml",
            "--set",
            rewards,
            "--set",
            "eval.reward=asked",
            "--set",
            "train.max_skipped_steps=2",
        ],
        &[
            "step 3: nothing could be trained on in 3 steps in a row",
            "train.max_skipped_steps is 2",
            "reward asked: 24 crash",
            "reward asked (rewarder 127.0.0.1:1)",
        ],
    );
    let steps = steps(folder.path(), "small");
    assert_eq!(steps.len(), 3);
    steps.iter().for_each(check_untrained);
}

/// Of a step in which nothing was judged.
#[track_caller]
fn check_untrained(step: &Value) {
    assert_eq!(number(step, "completions/excluded"), 24.0, "{step}");
    assert_eq!(number(step, "rewards/asked/timeout") + number(step, "rewards/asked/crash"), 24.0, "{step}");
    assert!(number(step, "skipped_updates") == 1.0 && number(step, "grad_norm") == 0.0, "{step}");
    let numbers = step.as_object().unwrap();
    assert!(numbers.values().all(|value| value.as_f64().is_some_and(f64::is_finite)), "{step}");
}

/// The document's own Python, made once by its own command; without a network, what to do.
fn python() -> Result<PathBuf, String> {
    let install = command(&["pip install"]);
    let venv = aha().ancestors().nth(2).unwrap().join("rewarder-venv");
    let is_made = venv.join("made-by");
    if std::fs::read_to_string(&is_made).ok().as_ref() != Some(&install) {
        let output = shell(&workspace(), &install.replace(".venv", &venv.to_string_lossy())).output().unwrap();
        if !output.status.success() {
            return Err(format!("this needs a network once: {install}\n{}", text(&output)));
        }
        std::fs::write(&is_made, &install).unwrap();
    }
    Ok(venv)
}

#[test]
fn a_service_s_reward_trains_and_the_run_outlives_its_death() {
    let venv = match python() {
        Ok(venv) => venv,
        Err(reason) => {
            println!("skipped: {reason}");
            return;
        }
    };
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let here = |command: String| command.replace(".venv", &venv.to_string_lossy()).replace("7000", &port.to_string());
    let folder = folder();
    let folder = folder.path();
    let serve = here(command(&["examples/rewarder.py"]));
    let rewarder = Process::start(folder, &serve, "rewarder");
    rewarder.wait_for("judging at");
    let one = here(command(&["aha reward", "--function rewarder"]));
    assert_eq!(said(folder, &one), "{\"score\":0.5,\"outcome\":\"score\"}\n");

    let launch = here(command(&["aha launch", "function: rewarder"]));
    let endless = format!("{launch} --set train.max_steps=1000000 --set train.max_skipped_steps=1000000");
    let mut run = Process::start(folder, &endless, "run");
    let after = |step: usize, what: &str, wanted: &dyn Fn(&Value) -> bool| {
        wait_until(what, || steps(folder, "asked").into_iter().skip(step).find(|step| wanted(step)))
    };
    let is_judged = |step: &Value| number(step, "completions/excluded") == 0.0;
    after(2, "a third step", &is_judged);

    drop(rewarder);
    let num_before = steps(folder, "asked").len();
    let untrained = after(num_before, "a step without a verdict", &|step| number(step, "completions/excluded") == 24.0);
    check_untrained(&untrained);
    run.wait_for(&format!("reward asked (rewarder 127.0.0.1:{port}) is down until it answers"));

    let num_before = steps(folder, "asked").len();
    let rewarder = Process::start(folder, &serve, "rewarder");
    let trained = after(num_before, "a step with verdicts", &is_judged);
    assert!(number(&trained, "rewards/asked/std") > 0.0 && number(&trained, "grad_norm") > 0.0, "{trained}");
    run.wait_for(&format!("reward asked (rewarder 127.0.0.1:{port}) answers again"));

    let interrupted = Command::new("kill").args(["-INT", &run.child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    assert_eq!(run.child.wait().unwrap().code(), Some(RESUMABLE), "{}", run.said());
    drop(rewarder);
}
