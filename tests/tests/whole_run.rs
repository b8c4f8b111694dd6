//! `aha launch` with two trainer ranks and a generator: repeatable, resumable, and leaving nothing behind.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aha_tests::binary::{aha, check_refused, check_runs, run, text};
use aha_tests::small_run::{self, MAX_STEPS};
use serde_json::{Map, Value};

/// What the trainers and the launch end with when the run is to go on later.
const RESUMABLE: i32 = 75;

/// Metrics that depend on the machine's mood.
const TIMED: [&str; 4] = ["time/", "step_time", "tokens_per_second/", "weights/"];

/// The metrics of every step, without timings.
fn metrics(folder: &Path) -> Vec<Map<String, Value>> {
    let text = std::fs::read_to_string(folder.join("runs/small/metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let step: Map<String, Value> = serde_json::from_str(line).unwrap();
            step.into_iter().filter(|(name, _)| !TIMED.iter().any(|timed| name.starts_with(timed))).collect()
        })
        .collect()
}

fn launch(folder: &Path, overrides: &[&str]) -> String {
    let mut arguments = vec!["launch", "run.yaml"];
    arguments.extend(overrides.iter().flat_map(|text| ["--set", text]));
    check_runs(folder, &arguments)
}

/// Processes whose command line or working folder names `folder`.
fn processes_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == folder))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[track_caller]
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(90);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen in time");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn a_run_is_repeatable_and_resumes_where_it_was_interrupted() {
    let whole = tempfile::tempdir().unwrap();
    small_run::write(whole.path());
    let said = launch(whole.path(), &[]);
    assert!(said.contains("held-out accuracy on 8 prompts"), "{said}");
    check_run_folder(&whole.path().join("runs/small"));

    // A generator that sleeps without its weights changes nothing either.
    let interrupted = interrupted_and_resumed(&["rollout.sleep_while_training=weights"]);
    assert_eq!(metrics(interrupted.path()), metrics(whole.path()));

    let other = tempfile::tempdir().unwrap();
    small_run::write(other.path());
    launch(other.path(), &["run.seed=2"]);
    assert_ne!(metrics(other.path())[0], metrics(whole.path())[0]);

    check_refused(
        whole.path(),
        &["launch", "run.yaml", "--set", "train.learning_rate=1e-4"],
        &["train.learning_rate", "0.0001", "0.001", "run.name"],
    );
}

/// A run that is interrupted after the first checkpoint, by the signal that Ctrl-C sends, and started again.
fn interrupted_and_resumed(overrides: &[&str]) -> tempfile::TempDir {
    let interrupted = tempfile::tempdir().unwrap();
    let folder = interrupted.path().canonicalize().unwrap();
    small_run::write(&folder);
    small_run::write_base(&folder);
    let mut child = Command::new(aha())
        .args(["launch", "run.yaml"])
        .args(overrides.iter().flat_map(|text| ["--set", text]))
        .current_dir(&folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the first checkpoint", || folder.join("runs/small/checkpoints/step-2").is_dir());
    let interrupted_it = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted_it.success());
    assert_eq!(child.wait().unwrap().code(), Some(RESUMABLE));
    assert_eq!(processes_in(&folder), Vec::<String>::new(), "processes stayed behind");
    let saved = metrics(&folder).len();
    assert!(folder.join(format!("runs/small/checkpoints/step-{saved}")).is_dir(), "step {saved} is not saved");
    assert!(saved as u64 + 5 <= MAX_STEPS, "interrupted after step {saved} only: fewer than five follow");
    launch(&folder, overrides);
    interrupted
}

/// The files of the last checkpoint: weights, and the optimizer's state of both ranks.
fn last_checkpoint(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let checkpoint = folder.join(format!("runs/small/checkpoints/step-{MAX_STEPS}"));
    let read = |name: &str| (name.to_owned(), std::fs::read(checkpoint.join(name)).unwrap());
    [
        "model.safetensors",
        "trainer_state/state.json",
        "trainer_state/optimizer-00000-of-00002.safetensors",
        "trainer_state/optimizer-00001-of-00002.safetensors",
    ]
    .map(read)
    .into()
}

#[test]
fn a_run_goes_on_to_the_last_bit_under_every_optimizer() {
    for optimizer in ["adamw", "adamw_8bit", "muon"] {
        let overrides = [format!("train.optimizer={optimizer}")];
        let overrides = overrides.each_ref().map(String::as_str);
        let whole = tempfile::tempdir().unwrap();
        small_run::write(whole.path());
        launch(whole.path(), &overrides);
        let resumed = interrupted_and_resumed(&overrides);
        assert_eq!(metrics(resumed.path()), metrics(whole.path()), "{optimizer}");
        for ((name, found), (_, expect)) in last_checkpoint(resumed.path()).iter().zip(last_checkpoint(whole.path())) {
            assert!(*found == expect, "{optimizer}: {name} differs");
        }
    }
}

#[test]
fn a_run_stops_before_its_time_is_over() {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let stopped = run(folder.path(), &["launch", "run.yaml", "--set", "train.max_wall_clock_seconds=0.001"]);
    assert_eq!(stopped.status.code(), Some(RESUMABLE), "{}", text(&stopped));
    assert!(text(&stopped).contains("train.max_wall_clock_seconds"), "{}", text(&stopped));
    launch(folder.path(), &[]);
    assert_eq!(metrics(folder.path()).len() as u64, MAX_STEPS);
}

/// Options with state, draws or exchanges of their own, all at once.
const EVERY_OPTION: [&str; 18] = [
    "train.loss_type=grpo",
    "train.importance_sampling_level=sequence",
    "train.num_iterations=2",
    "train.steps_per_generation=3",
    "train.beta=0.05",
    "train.use_bias_correction_kl=true",
    "train.sync_ref_model=true",
    "train.ref_model_sync_steps=1",
    "train.rollout_importance_sampling_correction=true",
    "train.off_policy_mask_threshold=0.5",
    "train.top_entropy_quantile=0.5",
    "train.entropy_coef=0.01",
    "train.use_adaptive_entropy=true",
    "train.entropy_target=9",
    "train.entropy_coef_delta=0.001",
    "train.soft_punish_cache=23",
    "train.dynamic_sampling=true",
    "train.max_resample_rounds=2",
];

#[test]
fn a_run_with_every_option_of_the_loss_is_repeatable_and_resumes() {
    let whole = tempfile::tempdir().unwrap();
    small_run::write(whole.path());
    launch(whole.path(), &EVERY_OPTION);
    let steps = metrics(whole.path());
    assert_eq!(steps.len() as u64, MAX_STEPS);
    let numbers = |name: &str| -> Vec<f64> {
        steps.iter().map(|step| step[name].as_f64().unwrap_or_else(|| panic!("no {name} in {step:?}"))).collect()
    };
    for ratio in numbers("sampling/importance_sampling_ratio/max") {
        assert!((ratio - 1.0).abs() < 1e-2, "trainer and generator agree, and their ratio is {ratio}");
    }
    assert!(numbers("policy_loss/masked_ratio").iter().all(|&masked| masked > 0.3 && masked < 0.6));
    assert!(numbers("rewards/soft_overlong_punishment/mean").iter().all(|&mean| mean < 0.0));
    // Entropies are under the target: the weight rises with each of a step's six updates.
    let coefs = numbers("entropy_coef");
    assert!(
        coefs.iter().enumerate().all(|(step, coef)| (coef - 0.016 - 0.006 * step as f64).abs() < 1e-5),
        "{coefs:?}"
    );
    // The reference has just become a mix of itself and the policy: it is near, and not there.
    assert!(numbers("kl")[MAX_STEPS as usize - 1] > 0.0);
    let checkpoint = whole.path().join(format!("runs/small/checkpoints/step-{MAX_STEPS}"));
    assert!(checkpoint.join("trainer_state/reference/model.safetensors").is_file());
    assert_eq!(metrics(interrupted_and_resumed(&EVERY_OPTION).path()), steps);
}

/// Adapters on a quantised base, with randomness of their own.
const ADAPTERS: [&str; 9] = [
    "model.random_init=false",
    "lora.r=4",
    "lora.lora_dropout=0.1",
    "lora.quantization=nf4",
    "train.beta=0.05",
    "train.entropy_coef=0.05",
    "train.soft_punish_cache=23",
    "train.num_iterations=2",
    "train.learning_rate=1e-2",
];

#[test]
fn a_run_of_adapters_is_repeatable_and_resumes() {
    let whole = tempfile::tempdir().unwrap();
    small_run::write(whole.path());
    small_run::write_base(whole.path());
    launch(whole.path(), &ADAPTERS);
    let steps = metrics(whole.path());
    assert!(steps[MAX_STEPS as usize - 1]["kl"].as_f64().unwrap() > 1e-4);
    assert_eq!(metrics(interrupted_and_resumed(&ADAPTERS).path()), steps);
}

fn check_run_folder(run: &Path) {
    let steps = metrics(run.parent().unwrap().parent().unwrap());
    assert_eq!(steps.len() as u64, MAX_STEPS);
    for step in &steps {
        let difference = step["sampling/sampling_logp_difference/max"].as_f64().unwrap();
        assert!(difference < 1e-3, "generator and trainer differ by {difference}");
        for name in ["reward", "loss", "grad_norm", "kl", "entropy", "learning_rate", "completions/mean_length"] {
            assert!(step[name].is_number(), "{name} is {:?}", step.get(name));
        }
    }
    let summary: Value = serde_json::from_str(&std::fs::read_to_string(run.join("summary.json")).unwrap()).unwrap();
    assert_eq!((summary["steps"].as_u64(), summary["puzzles"].as_u64()), (Some(MAX_STEPS), Some(8)));
    assert!(summary["accuracy_before"].is_number() && summary["accuracy_after"].is_number());
    for name in [
        "config.yaml",
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
        &format!("checkpoints/step-{MAX_STEPS}/model.safetensors"),
        &format!("checkpoints/step-{MAX_STEPS}/trainer_state/state.json"),
        "completions/step_000001.jsonl",
        "tensorboard",
        "logs/generator-0.log",
        "logs/trainer-1.log",
    ] {
        assert!(run.join(name).exists(), "{name} is missing");
    }
}

/// The newest process of a role in `folder`: the generator, or the trainer of a rank.
fn role_of(folder: &Path, role: &str, rank: usize) -> String {
    let is_it = |pid: &String| {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let is_rank = role == "generator" || read("environ").split('\0').any(|line| line == format!("RANK={rank}"));
        read("cmdline").split('\0').nth(1) == Some(role) && is_rank
    };
    processes_in(folder).into_iter().find(is_it).unwrap()
}

/// A launch whose standard error [`wait_for_end`] reads.
fn start_launch(folder: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(aha());
    command.args(["launch", "run.yaml"]).args(arguments).current_dir(folder);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Whether it succeeded, and what it said.
fn wait_for_end(mut child: Child) -> (bool, String) {
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
    (child.wait().unwrap().success(), said)
}

fn kill(pid: &str) {
    assert!(Command::new("kill").args(["-KILL", pid]).status().unwrap().success());
}

#[test]
fn a_launch_with_restarts_survives_a_lost_generator_and_a_lost_trainer() {
    let whole = tempfile::tempdir().unwrap();
    small_run::write(whole.path());
    launch(whole.path(), &[]);

    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    small_run::write(&folder);
    let mut child = start_launch(&folder, &["--max-restarts", "2"]);
    for (step, role, rank) in [(2, "generator", 0), (6, "trainer", 1)] {
        wait_until("a checkpoint", || {
            assert!(child.try_wait().unwrap().is_none(), "the launch ended before step {step}");
            folder.join(format!("runs/small/checkpoints/step-{step}")).is_dir()
        });
        kill(&role_of(&folder, role, rank));
    }
    let (succeeded, said) = wait_for_end(child);
    assert!(succeeded, "{said}");
    for expect in ["generator-0 was killed by signal 9; it is started again, restarts left: 1", "restarts left: 0"] {
        assert!(said.contains(expect), "no {expect:?} in {said}");
    }
    assert!(said.contains("trainer-1 was killed by signal 9; all roles are started again"), "{said}");
    let names_collective =
        |line: &str| line.contains(" #") && line.contains("on rank 0 of ") && line.contains("failed after");
    assert!(said.lines().any(names_collective), "no collective is named in {said}");
    assert_eq!(metrics(&folder), metrics(whole.path()));
    assert!(last_checkpoint(&folder) == last_checkpoint(whole.path()));
    assert_eq!(processes_in(&folder), Vec::<String>::new(), "processes stayed behind");
}

#[test]
fn a_lost_generator_ends_the_run_and_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    small_run::write(&folder);
    let mut child = start_launch(&folder, &["--set", "train.max_steps=1000"]);
    wait_until("the first step", || {
        assert!(child.try_wait().unwrap().is_none(), "the launch ended before the first step");
        folder.join("runs/small/completions/step_000001.jsonl").is_file()
    });
    kill(&role_of(&folder, "generator", 0));
    let (succeeded, said) = wait_for_end(child);
    assert!(!succeeded, "{said}");
    assert!(said.contains("generator-0 was killed by signal 9"), "{said}");
    assert_eq!(processes_in(&folder), Vec::<String>::new(), "processes stayed behind");
}
