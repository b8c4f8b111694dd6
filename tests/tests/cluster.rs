//! Trainers and generators as processes of their own, as a cluster starts them: generators are killed, stopped and started
//! while a run goes on, and nothing of it shows in what is learnt.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use aha_tests::binary::aha;
use aha_tests::small_run;
use serde_json::Value;

const NUM_STEPS: usize = 30;
/// So many take longer than any pause after which a generator that was lost is asked again.
const STEPS_UNTIL_ALL_ARE_BACK: usize = 300;
const NUM_TRAINERS: usize = 2;
const COMPLETIONS_PER_STEP: usize = 24;
/// What trainers end with when the run is to go on later.
const RESUMABLE: i32 = 75;
/// Rollouts run up to two steps ahead.
const AHEAD: [&str; 3] = [
    "rollout.max_lag=2",
    "train.rollout_importance_sampling_correction=true",
    "train.rollout_importance_sampling_mode=token_truncate",
];
/// For whatever is waited for, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(150);

/// A run's processes; they end with this.
struct Cluster<'a> {
    folder: &'a Path,
    master: String,
    /// Where generators register.
    coordinator: Option<String>,
    /// By index, with their addresses.
    generators: Vec<(String, Option<Child>)>,
    trainers: Vec<Child>,
}

impl<'a> Cluster<'a> {
    /// Generators that the trainers know from the beginning, and wait for; trainers with these settings.
    fn start(folder: &'a Path, num_generators: usize, settings: &[&str]) -> Self {
        let mut cluster = Self::new(folder, num_generators);
        (0..num_generators).for_each(|index| cluster.start_generator(index));
        let addresses: Vec<_> = cluster.generators.iter().map(|(address, _)| address).collect();
        let listed = format!("generator.addresses={}", serde_json::to_string(&addresses).unwrap());
        let steps = format!("train.max_steps={NUM_STEPS}");
        cluster.start_trainers(&[&[&*listed, &steps, "generator.probe_timeout_seconds=2"], settings].concat());
        cluster
    }

    /// Trainers that wait for generators to register; none is started yet.
    fn registering(folder: &'a Path, num_generators: usize) -> Self {
        let mut cluster = Self::new(folder, num_generators);
        let coordinator = free_addresses(1).remove(0);
        let registry = format!("generator.coordinator={coordinator}");
        cluster.start_trainers(&[&registry, "train.max_steps=100000", "generator.probe_timeout_seconds=60"]);
        cluster.coordinator = Some(coordinator);
        cluster
    }

    fn new(folder: &'a Path, num_generators: usize) -> Self {
        if !folder.join("run.yaml").exists() {
            small_run::write(folder);
        }
        let mut addresses = free_addresses(num_generators + 1);
        let master = addresses.pop().unwrap();
        let generators = addresses.into_iter().map(|address| (address, None)).collect();
        Self { folder, master, coordinator: None, generators, trainers: Vec::new() }
    }

    fn start_trainers(&mut self, overrides: &[&str]) {
        let master = self.master.clone();
        let (host, port) = master.split_once(':').unwrap();
        for rank in 0..NUM_TRAINERS {
            let mut command = self.role("trainer", rank);
            command.args(overrides.iter().flat_map(|text| ["--set", text]));
            command.args(["--set", "train.save_steps=10"]);
            for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", NUM_TRAINERS)] {
                command.env(name, value.to_string());
            }
            let trainer = command.env("MASTER_ADDR", host).env("MASTER_PORT", port).spawn().unwrap();
            self.trainers.push(trainer);
        }
    }

    fn start_generator(&mut self, index: usize) {
        let address = self.generators[index].0.clone();
        let mut command = self.role("generator", index);
        command.args(["--listen", &address]);
        if let Some(coordinator) = &self.coordinator {
            command.args(["--coordinator", coordinator]);
        }
        self.generators[index].1 = Some(command.spawn().unwrap());
    }

    /// `aha ROLE run.yaml`, with a log of its own.
    fn role(&self, role: &str, index: usize) -> Command {
        let log = std::fs::File::options().create(true).append(true).open(self.log(role, index)).unwrap();
        let mut command = Command::new(aha());
        command.args([role, "run.yaml"]).current_dir(self.folder).env("OMP_NUM_THREADS", "1");
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command
    }

    fn log(&self, role: &str, index: usize) -> std::path::PathBuf {
        self.folder.join(format!("{role}-{index}.log"))
    }

    fn signal_generator(&mut self, index: usize, signal: &str) {
        let child = self.generators[index].1.as_mut().unwrap();
        crate::signal(child, signal);
        if signal == "-KILL" {
            child.wait().unwrap();
        }
    }

    /// Waits until so many steps are done.
    fn wait_for_step(&mut self, step: usize) {
        self.wait("a step", |cluster| metrics(cluster.folder).len() >= step);
    }

    /// Waits for all trainers to end well.
    fn finish(self) {
        self.end_with(0);
    }

    /// Ends a run before its last step.
    fn stop(self) {
        for trainer in &self.trainers {
            signal(trainer, "-TERM");
        }
        self.end_with(RESUMABLE);
    }

    fn end_with(mut self, code: i32) {
        let deadline = Instant::now() + PATIENCE;
        while !self.trainers.iter_mut().all(|trainer| trainer.try_wait().unwrap().is_some()) {
            assert!(Instant::now() < deadline, "the end did not come: {}", self.end_of_log("trainer", 0));
            std::thread::park_timeout(Duration::from_millis(10));
        }
        for rank in 0..NUM_TRAINERS {
            let status = self.trainers[rank].wait().unwrap();
            assert_eq!(status.code(), Some(code), "trainer {rank}: {}", self.end_of_log("trainer", rank));
        }
    }

    fn end_of_log(&self, role: &str, index: usize) -> String {
        let log = std::fs::read(self.log(role, index)).unwrap();
        String::from_utf8_lossy(&log[log.len().saturating_sub(4_000)..]).into_owned()
    }

    fn wait(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            let ended = (0..NUM_TRAINERS).find(|&rank| self.trainers[rank].try_wait().unwrap().is_some());
            if ended.is_some() || Instant::now() > deadline {
                let log = self.end_of_log("trainer", ended.unwrap_or(0));
                panic!("{what} did not come, trainer {ended:?} has ended: {log}");
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        let generators = self.generators.iter_mut().filter_map(|(_, child)| child.as_mut());
        for child in generators.chain(&mut self.trainers) {
            // One that has ended already is no concern.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn signal(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Below the ports that the system gives to others, from a place of this process's own, and no port twice.
fn free_addresses(count: usize) -> Vec<String> {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + (std::process::id() % 90) as u16 * 100;
    let ports = std::iter::repeat_with(|| first + TAKEN.fetch_add(1, Ordering::Relaxed));
    let free = ports.filter(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    free.take(count).map(|port| format!("127.0.0.1:{port}")).collect()
}

fn metrics(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("runs/small/metrics.jsonl")).unwrap_or_default();
    // The last line may be in the making.
    text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
}

/// The weights and the optimizer's state of both ranks, at the end.
fn last_checkpoint(folder: &Path) -> Vec<Vec<u8>> {
    let checkpoint = folder.join(format!("runs/small/checkpoints/step-{NUM_STEPS}"));
    let optimizer = |rank: usize| format!("trainer_state/optimizer-{rank:05}-of-{NUM_TRAINERS:05}.safetensors");
    let names = ["model.safetensors".to_owned(), optimizer(0), optimizer(1)];
    names.map(|name| std::fs::read(checkpoint.join(name)).unwrap()).into()
}

/// Prompt and sample index of every completion that a step trained on.
fn samples(folder: &Path, step: usize) -> Vec<(u64, u64)> {
    let path = folder.join(format!("runs/small/completions/step_{step:06}.jsonl"));
    let text = std::fs::read_to_string(&path).unwrap();
    let sample = |line: &str| {
        let record: Value = serde_json::from_str(line).unwrap();
        (record["prompt_id"].as_u64().unwrap(), record["sample_index"].as_u64().unwrap())
    };
    text.lines().map(sample).collect()
}

#[test]
fn generators_may_come_and_go_and_nothing_of_it_is_learnt() {
    let learnt_with = |num_generators| {
        let folder = tempfile::tempdir().unwrap();
        Cluster::start(folder.path(), num_generators, &[]).finish();
        last_checkpoint(folder.path())
    };
    let learnt = learnt_with(1);
    assert!(learnt_with(2) == learnt, "two generators change what is learnt");

    let folder = tempfile::tempdir().unwrap();
    let metrics = run_with_losses(folder.path(), NUM_STEPS, &[]);
    assert!(metrics.iter().all(|step| step["policy/lag"] == 0.0));
    assert!(last_checkpoint(folder.path()) == learnt, "losses change what is learnt");
}

#[test]
fn generators_may_come_and_go_while_rollouts_run_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = run_with_losses(folder.path(), STEPS_UNTIL_ALL_ARE_BACK, &AHEAD);
    assert_eq!(metrics.last().unwrap()["generators"], 3.0, "not all came back");
    let typical = |steps: &[Value]| {
        let mut seconds: Vec<f64> = steps.iter().map(|step| step["step_time"].as_f64().unwrap()).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    let (before, after) = (typical(&metrics[..4]), typical(&metrics[metrics.len() - 20..]));
    assert!(after < 5.0 * before, "steps of {after} s with all generators back, and {before} s before any was lost");
    let lags: Vec<f64> = metrics.iter().map(|step| step["policy/lag"].as_f64().unwrap()).collect();
    assert!(lags.iter().all(|lag| *lag <= 2.0) && lags.contains(&2.0), "{lags:?}");
    for step in &metrics {
        let shares: f64 = (0..3).map(|lag| step[format!("policy/lag_ratio/{lag}")].as_f64().unwrap()).sum();
        assert!((shares - 1.0).abs() < 1e-9, "{step}");
    }
    let differences: Vec<f64> =
        metrics.iter().map(|step| step["sampling/sampling_logp_difference/max"].as_f64().unwrap()).collect();
    assert!(differences.iter().any(|difference| *difference > 1e-3), "of other policies: {differences:?}");
}

#[test]
fn what_was_received_ahead_outlives_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 1, &AHEAD);
    cluster.wait_for_step(10);
    cluster.stop();
    let steps = metrics(folder.path()).len();
    let state = folder.path().join(format!("runs/small/checkpoints/step-{steps}/trainer_state"));
    let received = (0..NUM_TRAINERS).filter(|rank| {
        let file = state.join(format!("rollouts-{rank:05}-of-{NUM_TRAINERS:05}.binpb"));
        std::fs::metadata(file).is_ok_and(|file| file.len() > 0)
    });
    assert!(received.count() > 0, "nothing had come of the steps after {steps}");
    Cluster::start(folder.path(), 1, &AHEAD).finish();
    check_steps(folder.path(), NUM_STEPS);
}

/// Loses a generator, holds one up, and lets both go on within the first 20 steps; returns the metrics of all steps.
fn run_with_losses(folder: &Path, num_steps: usize, settings: &[&str]) -> Vec<Value> {
    let steps = format!("train.max_steps={num_steps}");
    let mut cluster = Cluster::start(folder, 3, &[settings, &[&steps]].concat());
    cluster.wait_for_step(4);
    cluster.signal_generator(0, "-KILL");
    cluster.wait_for_step(8);
    cluster.signal_generator(1, "-STOP");
    cluster.wait_for_step(12);
    cluster.start_generator(0);
    cluster.wait_for_step(20);
    cluster.signal_generator(1, "-CONT");
    cluster.finish();
    let metrics = check_steps(folder, num_steps);
    let generators: Vec<u64> = metrics.iter().map(|step| step["generators"].as_f64().unwrap() as u64).collect();
    assert_eq!((generators[0], generators.iter().min()), (3, Some(&1)), "{generators:?}");
    metrics
}

/// All steps are there, and each has every sample once; returns their metrics.
fn check_steps(folder: &Path, num_steps: usize) -> Vec<Value> {
    let metrics = metrics(folder);
    assert_eq!(metrics.len(), num_steps);
    assert!(
        metrics.iter().all(|step| step["grad_norm"].as_f64().unwrap() > 0.0),
        "a step from which nothing is learnt"
    );
    for step in 1..=num_steps {
        let mut samples = samples(folder, step);
        samples.sort_unstable();
        samples.dedup();
        assert_eq!(samples.len(), COMPLETIONS_PER_STEP, "step {step}: every sample once");
    }
    metrics
}

#[test]
fn generators_register_join_and_leave() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::registering(folder.path(), 3);
    cluster.start_generator(0);
    cluster.wait_for_step(3);
    cluster.start_generator(1);
    cluster.start_generator(2);
    cluster.wait("three generators", |cluster| {
        metrics(cluster.folder).last().is_some_and(|step| step["generators"] == 3.0)
    });
    // This one leaves by itself, with all that it was asked for done.
    cluster.signal_generator(0, "-TERM");
    cluster
        .wait("one to leave", |cluster| metrics(cluster.folder).last().is_some_and(|step| step["generators"] == 2.0));
    let left = cluster.generators[0].1.as_mut().unwrap().wait().unwrap();
    assert!(left.success(), "{left}");
    let log = cluster.log("trainer", 0);
    cluster.stop();
    let log = std::fs::read_to_string(log).unwrap();
    // What it is asked for after that, before the next push, others are asked for; nothing is half done.
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
    let is_whole_group = |warning: &&str| warning.contains("asking again for 4 completions");
    assert!(log.contains("leaves") && warnings.iter().all(is_whole_group), "{warnings:?}");
}
