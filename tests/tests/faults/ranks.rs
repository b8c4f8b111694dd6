//! Trainer ranks that fall silent: while they meet, and in the middle of a step.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use aha_tests::chaos::{ChaosProxy, Fault};
use aha_tests::small_run::{self, MAX_STEPS};
use serde_json::{Map, Value};

use crate::process::{Process, free_address, send_signal, wait_until};

/// Of `train.collective_timeout_seconds`, where it is to run out.
const COLLECTIVE: Duration = Duration::from_secs(20);
/// For processes to start and to end, and for steps that nothing disturbs, on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// One of two trainer ranks, which takes `master` for the address of rank 0.
fn start_rank(folder: &Path, rank: usize, master: &str, overrides: &[&str]) -> Process {
    let (host, port) = master.split_once(':').unwrap();
    let mut arguments = vec!["trainer", "run.yaml"];
    arguments.extend(overrides.iter().flat_map(|text| ["--set", text]));
    let numbers = [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)];
    let mut variables: Vec<_> = numbers.map(|(name, value)| (name, value.to_string())).into();
    variables.extend([("MASTER_ADDR", host.to_owned()), ("MASTER_PORT", port.to_owned())]);
    Process::start(folder, &format!("trainer-{rank}"), &arguments, &variables)
}

#[test]
fn ranks_that_meet_over_a_network_that_fails_end_by_name() {
    // From the first byte, and from within the conversation.
    let cases = [(0, Fault::Swallow), (0, Fault::Deaf), (60, Fault::Deaf), (60, Fault::Throttle(1))];
    let overrides = [
        format!("train.collective_timeout_seconds={}", COLLECTIVE.as_secs()),
        "generator.addresses=['localhost:1']".into(),
    ];
    let started = cases.map(|(from, fault)| {
        let folder = tempfile::tempdir().unwrap();
        small_run::write(folder.path());
        let master = free_address();
        let proxy = ChaosProxy::start(&master).unwrap();
        proxy.set_after(from, fault);
        let overrides = overrides.each_ref().map(String::as_str);
        let ranks = [(0, &master), (1, &proxy.address())];
        let ranks = ranks.map(|(rank, address)| start_rank(folder.path(), rank, address, &overrides));
        (folder, proxy, ranks)
    });
    for ((_folder, proxy, mut ranks), case) in started.into_iter().zip(cases) {
        // It waits for the store, and then for the others there.
        let [first, second] = ranks.each_mut().map(|rank| rank.wait(3 * COLLECTIVE + PATIENCE));
        println!("{case:?}\n0: {}\n1: {}", first.1, second.1);
        assert!(!first.0 && !second.0, "{case:?}");
        assert!(first.1.contains("group trainers: rank 0 of 2 could not join"), "{case:?}: {}", first.1);
        let port = proxy.address().rsplit_once(':').unwrap().1.to_owned();
        let named = [format!("store 127.0.0.1:{port}"), "group trainers: rank 1 of 2 could not join".to_owned()];
        assert!(named.iter().any(|named| second.1.contains(named)), "{case:?}: {}", second.1);
    }
}

#[test]
fn strangers_at_the_rendezvous_hinder_nobody() {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let (address, master) = (free_address(), free_address());
    let generator = Process::start(folder.path(), "generator", &["generator", "run.yaml", "--listen", &address], &[]);
    let overrides = [&format!("generator.addresses=['{address}']"), "train.max_steps=2"];
    let mut first = start_rank(folder.path(), 0, &master, &overrides);
    let mut silent = None;
    wait_until("the store", PATIENCE, || {
        silent = TcpStream::connect(&master).ok();
        silent.is_some()
    });
    let mut loud = TcpStream::connect(&master).unwrap();
    loud.write_all(&[0xff; 4096]).unwrap();
    let mut second = start_rank(folder.path(), 1, &master, &overrides);
    for rank in [&mut first, &mut second] {
        let (succeeded, said) = rank.wait(PATIENCE);
        assert!(succeeded, "{said}\ngenerator: {}", generator.said());
    }
    // The silent one was there to the end.
    assert_eq!(silent.unwrap().read(&mut [0; 1]).unwrap_or(0), 0);
}

/// A launch whose trainer of `rank` is stopped after the first checkpoint, and how it ends.
fn stopped_launch(folder: &Path, rank: usize, arguments: &[&str]) -> (bool, String) {
    small_run::write(folder);
    let timeouts = ["collective_timeout_seconds", "push_timeout_seconds"]
        .map(|key| format!("train.{key}={}", COLLECTIVE.as_secs()));
    let mut all = vec!["launch", "run.yaml", "--set", &timeouts[0], "--set", &timeouts[1]];
    all.extend(["--set", "launch.grace_seconds=2"]);
    all.extend(arguments);
    let mut launch = Process::start(folder, "launch", &all, &[]);
    wait_until("the first checkpoint", PATIENCE, || {
        assert!(launch.is_running(), "{}", launch.said());
        folder.join("runs/small/checkpoints/step-2").is_dir()
    });
    send_signal(&pid_of_trainer(folder, rank), "-STOP");
    // A collective of the others, what they then tell each other, and the end or another run.
    launch.wait(3 * COLLECTIVE + PATIENCE)
}

fn processes_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == folder))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn pid_of_trainer(folder: &Path, rank: usize) -> String {
    let is_it = |pid: &String| {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        read("cmdline").split('\0').nth(1) == Some("trainer")
            && read("environ").split('\0').any(|line| line == format!("RANK={rank}"))
    };
    processes_in(folder).into_iter().find(is_it).unwrap()
}

/// The metrics of every step that do not depend on the machine's mood.
fn metrics(folder: &Path) -> Vec<Map<String, Value>> {
    const TIMED: [&str; 4] = ["time/", "step_time", "tokens_per_second/", "weights/"];
    let text = std::fs::read_to_string(folder.join("runs/small/metrics.jsonl")).unwrap();
    let step = |line: &str| -> Map<String, Value> {
        let step: Map<String, Value> = serde_json::from_str(line).unwrap();
        step.into_iter().filter(|(name, _)| !TIMED.iter().any(|timed| name.starts_with(timed))).collect()
    };
    text.lines().map(step).collect()
}

/// Says which collective of `rank` failed, in a group of the two.
#[track_caller]
fn check_names_collective(said: &str, rank: usize) {
    let is_it = |line: &str| {
        let silent = ["is stopped, gone or elsewhere", "no word of the other ranks"];
        line.contains(&format!("on rank {rank} of "))
            && line.contains(" #")
            && line.contains(" failed after ")
            && silent.iter().any(|silent| line.contains(silent))
    };
    assert!(said.lines().any(is_it), "{said}");
}

#[test]
fn a_stopped_trainer_is_noticed_and_a_launch_starts_all_again() {
    let whole = tempfile::tempdir().unwrap();
    small_run::write(whole.path());
    let mut launch = Process::start(whole.path(), "launch", &["launch", "run.yaml"], &[]);
    let (succeeded, said) = launch.wait(PATIENCE);
    assert!(succeeded, "{said}");

    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    let (succeeded, said) = stopped_launch(&folder, 1, &["--max-restarts", "1"]);
    assert!(succeeded, "{said}");
    check_names_collective(&said, 0);
    assert!(said.contains("trainer-0 exited with code 1; all roles are started again"), "{said}");
    assert_eq!(processes_in(&folder), Vec::<String>::new(), "processes stayed behind");
    let last = |folder: &Path| {
        std::fs::read(folder.join(format!("runs/small/checkpoints/step-{MAX_STEPS}/model.safetensors"))).unwrap()
    };
    assert!(last(&folder) == last(whole.path()), "another model was learnt");
    assert_eq!(metrics(&folder), metrics(whole.path()));
}

/// With all that ranks exchange, to be sure that they never differ where they should not.
#[test]
fn checked_collectives_change_nothing() {
    let run = |checked: bool| {
        let folder = tempfile::tempdir().unwrap();
        small_run::write(folder.path());
        let checked = format!("train.check_collectives={checked}");
        let mut all = vec!["launch", "run.yaml", "--set", &checked];
        all.extend(
            ["train.zero_stage=3", "train.use_adaptive_entropy=true", "train.max_steps=4"]
                .iter()
                .flat_map(|text| ["--set", text]),
        );
        let (succeeded, said) = Process::start(folder.path(), "launch", &all, &[]).wait(PATIENCE);
        assert!(succeeded, "{said}");
        metrics(folder.path())
    };
    assert_eq!(run(true), run(false));
}

/// Rank 0 serves the store, and calls the generators.
#[test]
fn a_stopped_first_trainer_ends_a_launch_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    let (succeeded, said) = stopped_launch(&folder, 0, &[]);
    assert!(!succeeded, "{said}");
    check_names_collective(&said, 1);
    assert!(said.contains("launch failed: trainer-1 exited with code 1; all roles are stopped"), "{said}");
    assert_eq!(processes_in(&folder), Vec::<String>::new(), "processes stayed behind");
}
