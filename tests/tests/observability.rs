//! What a run shows of itself while it runs: `aha status`, the trainer's metrics and JSON logs, of real processes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use aha_tests::binary::{aha, check_refused, text};
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

/// Below the ports that the system gives to others, from a place of this process's own, and no port twice.
fn free_addresses<const N: usize>() -> [String; N] {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let first = 6_000 + (std::process::id() % 35) as u16 * 100;
    let ports = std::iter::repeat_with(|| first + TAKEN.fetch_add(1, Ordering::Relaxed));
    let mut free = ports.filter(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok());
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

/// The answer of a metrics page to one request.
fn scrape(address: &str, header: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: here\r\nconnection: close\r\n{header}\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_trainer_serves_its_newest_step_and_every_process_logs_json() {
    let folder = tempfile::tempdir().unwrap();
    let [metrics] = free_addresses();
    let run = Run::start(folder.path(), &[&format!("logging.metrics_address={metrics}"), "logging.json_logs=true"]);
    run.wait_for_status(&[&run.coordinator], |status| status["runs"][0]["version"].as_u64() >= Some(2));

    let stranger = scrape(&metrics, "");
    assert!(stranger.starts_with("HTTP/1.1 401 ") && !stranger.contains("aha_trainer"), "{stranger}");
    let page = scrape(&metrics, &format!("authorization: Bearer {TOKEN}\r\n"));
    assert!(page.starts_with("HTTP/1.1 200 ") && page.contains("text/plain; version=0.0.4"), "{page}");
    let value = |name: &str| {
        let line = page.lines().find_map(|line| line.strip_prefix(&format!("aha_trainer_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in: {page}")).parse::<f64>().unwrap()
    };
    let run_label = "{run=\"small\"}";
    assert!(value(&format!("step{run_label}")) >= 1.0 && value(&format!("max_steps{run_label}")) == 100_000.0);
    for name in ["reward", "loss", "step_time", "time_generate", "time_train", "policy_lag", "generators"] {
        assert!(value(&format!("{name}{run_label}")).is_finite());
    }
    assert!(value(&format!("tokens_total{run_label}")) > 0.0);
    assert!(value("rewards_mean{run=\"small\",function=\"equation\"}") >= 0.0);

    let logs = folder.path().join("runs/small/logs");
    let mut names: Vec<String> =
        std::fs::read_dir(&logs).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let port = run.generator.rsplit_once(':').unwrap().1;
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names[0].starts_with("generator-") && names[0].ends_with(&format!("-{port}.jsonl")), "{names:?}");
    assert_eq!(names[1], "trainer-0.jsonl");
    for (name, (role, said)) in names.iter().zip([("generator", "listens on"), ("trainer", "generators register at")]) {
        let text = std::fs::read_to_string(logs.join(name)).unwrap();
        // The last line may be in the making.
        let lines: Vec<Value> = text.lines().map_while(|line| serde_json::from_str(line).ok()).collect();
        assert!(lines.iter().all(|line| line["role"] == role && line["level"].is_string()), "{text}");
        let says = |line: &Value| line["fields"]["message"].as_str().is_some_and(|message| message.contains(said));
        assert!(lines.iter().any(says), "no {said:?} in: {text}");
    }
}

#[test]
fn s9_a_trainer_s_metrics_say_what_they_need_beyond_loopback() {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    for role in ["trainer", "sft"] {
        let overrides = ["generator.addresses=['127.0.0.1:1']", "logging.metrics_address=0.0.0.0:0"];
        let arguments: Vec<&str> =
            [role, "run.yaml"].into_iter().chain(overrides.iter().flat_map(|text| ["--set", text])).collect();
        check_refused(folder.path(), &arguments, &["logging.metrics_address: 0.0.0.0:0", "AHA_TOKEN"]);
    }
    assert!(!folder.path().join("runs").exists());
}

/// What `aha doctor` says, as JSON, with its exit code.
fn doctor(command: &mut Command) -> (Vec<Value>, Option<i32>) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let findings = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    (findings, output.status.code())
}

#[track_caller]
fn check_problem(findings: &[Value], check: &str, expect: &str) {
    let of_check = |finding: &&Value| finding["check"] == check && finding["severity"] == "problem";
    let found = findings.iter().filter(of_check).find(|finding| finding["finding"].as_str().unwrap().contains(expect));
    let found = found.unwrap_or_else(|| panic!("no problem of {check} with {expect:?} in {findings:?}"));
    assert!(found["fix"].as_str().is_some_and(|fix| !fix.is_empty()), "{found}");
}

#[test]
fn a_doctor_finds_what_a_run_would_fail_of_and_nothing_where_all_is_well() {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let aha_doctor = || {
        let mut command = Command::new(aha());
        command.args(["doctor", "--json"]).current_dir(folder.path()).env_remove("OMP_NUM_THREADS");
        command
    };
    let (findings, code) = doctor(aha_doctor().arg("run.yaml"));
    assert_eq!(code, Some(0), "{findings:?}");
    for check in ["libtorch", "gloo", "open files", "shared memory", "threads", "run folder", "memory", "ranks"] {
        assert!(findings.iter().any(|finding| finding["check"] == check), "no {check} in {findings:?}");
    }
    assert!(!folder.path().join("runs").exists(), "nothing stays behind");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let taken = format!("logging.metrics_address={address}");
    let nowhere = "run.output_dir=run.yaml/runs";
    let overrides = ["--set", &taken, "--set", nowhere, "--set", "generator.kv_cache_mib=1000000000"];
    let world = [("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")];
    let mut command = aha_doctor();
    command.args(["run.yaml", "--listen", &address.to_string()]).args(overrides).envs(world);
    let (findings, code) = doctor(command.env("MASTER_PORT", address.port().to_string()));
    assert_eq!(code, Some(1));
    for (check, expect) in [
        ("ports", "--listen: "),
        ("ports", "logging.metrics_address: "),
        ("rendezvous", "is taken"),
        ("run folder", "nothing can be written"),
        ("memory", "as aha plan predicts"),
    ] {
        check_problem(&findings, check, expect);
    }

    let (findings, code) = doctor(aha_doctor().args(["run.yaml", "--set", "model.path=absent"]).env("RANK", "0"));
    assert_eq!(code, Some(1));
    check_problem(&findings, "model", "absent");
    check_problem(&findings, "ranks", "RANK is set, but WORLD_SIZE");
    let (findings, _) = doctor(aha_doctor().args(["run.yaml", "--set", "train.max_step=1"]));
    check_problem(&findings, "recipe", "train.max_step");
}

#[test]
fn a_doctor_finds_that_few_files_may_be_open() {
    let script = format!("ulimit -n 100 && exec {} doctor --json", aha().display());
    let (findings, code) = doctor(Command::new("sh").args(["-c", &script]));
    assert_eq!(code, Some(1));
    check_problem(&findings, "open files", "100 files may be open");
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
