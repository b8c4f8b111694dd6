//! The autoscaler of deploy/kubernetes, held against what trainer rank 0 really serves.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aha_tests::binary::aha;
use aha_tests::small_run;
use aha_trainer::world::World;
use serde_json::Value;

use crate::overlay::Overlay;
use crate::pods::{POD_IP, Role, TOKEN, find};
use crate::slurm::free_ports;
use crate::{at, list, number, read, text};

const PATIENCE: Duration = Duration::from_secs(180);

fn scaled() -> Vec<Overlay> {
    let overlays = Overlay::spread().into_iter();
    overlays.filter(|overlay| overlay.components.contains(&"autoscaling")).collect()
}

#[track_caller]
fn autoscaler(overlay: &Overlay) -> &Value {
    let scaler = find(&overlay.resources, "HorizontalPodAutoscaler", "aha-generator").expect("an autoscaler");
    assert_eq!(text(scaler, "/apiVersion"), "autoscaling/v2");
    scaler
}

#[test]
fn the_autoscaler_scales_the_generators_slowly() {
    for overlay in scaled() {
        let (scaler, generator) = (autoscaler(&overlay), overlay.role("generator"));
        for pointer in ["/apiVersion", "/kind"] {
            assert_eq!(at(scaler, &format!("/spec/scaleTargetRef{pointer}")), at(generator.pods.resource, pointer));
        }
        assert_eq!(at(scaler, "/spec/scaleTargetRef/name"), at(generator.pods.resource, "/metadata/name"));
        let [min, max] = ["/spec/minReplicas", "/spec/maxReplicas"].map(|pointer| number(scaler, pointer));
        assert!(min >= 1 && max > min, "{min} to {max}: without a generator a run ends");

        let step = overlay.role("trainer").config.rollout.deadline_seconds;
        let window = number(scaler, "/spec/behavior/scaleDown/stabilizationWindowSeconds");
        assert!(window as f64 >= step, "generators are taken away after {window} s, and a rollout may take {step} s");
        for direction in ["scaleUp", "scaleDown"] {
            let [policy] = list(scaler, &format!("/spec/behavior/{direction}/policies")) else { panic!("one policy") };
            assert_eq!((text(policy, "/type"), number(policy, "/value")), ("Pods", 1));
            // What Kubernetes takes.
            assert!((1..=1800).contains(&number(policy, "/periodSeconds")), "{policy}");
            assert!(
                number(policy, "/periodSeconds") >= 600,
                "a generator has to load a model and to take a push first"
            );
        }
        assert!(window <= 3600, "what Kubernetes takes");
    }
}

/// Processes that end with this.
struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended already is no concern.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Starts a role as its pod would, with a small run's recipe, and `ports` on loopback in place of those of `rank_0` and the
/// pod.
fn start(role: &Role<'_>, folder: &Path, ports: &[(u64, u16)], rank_0: &str) -> Child {
    let here = |text: &str| {
        let Some((host, port)) = text.rsplit_once(':') else { return text.to_owned() };
        let port = ports.iter().find(|(known, _)| known.to_string() == port);
        let port = port.filter(|_| ["0.0.0.0", POD_IP, rank_0].contains(&host));
        port.map_or(text.to_owned(), |(_, port)| format!("127.0.0.1:{port}"))
    };
    let log = std::fs::File::create(folder.join(format!("{}.log", role.command.subcommand()))).unwrap();
    let mut command = Command::new(aha());
    let recipe = role.command.recipe();
    command.args(role.command.words.iter().map(|word| if word == recipe { "run.yaml".to_owned() } else { here(word) }));
    command.args(["--set", "train.max_steps=100000"]);
    command.envs(role.environment.iter().map(|(name, value)| (name, here(value))));
    // Of two ranks or more, one has to do.
    command.env("WORLD_SIZE", "1").env("MASTER_ADDR", "127.0.0.1").env("OMP_NUM_THREADS", "1");
    command.current_dir(folder).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command.spawn().unwrap()
}

/// The page of metrics, empty where nobody answers.
fn scrape(port: u16, token: &str) -> String {
    let mut page = String::new();
    if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let header = format!("host: here\r\nconnection: close\r\nauthorization: Bearer {token}\r\n\r\n");
        write!(stream, "GET /metrics HTTP/1.1\r\n{header}").unwrap();
        stream.read_to_string(&mut page).unwrap();
    }
    page
}

/// Rank 0 and a generator, by the command lines and variables of their pods: they find each other, prove who they are, and
/// what they serve then has the metric that the autoscaler asks the Service for.
#[test]
fn pods_find_each_other_and_serve_what_the_autoscaler_asks_for() {
    let overlay = Overlay::build("gpu", &["token", "autoscaling"]);
    let (trainer, generator) = (overlay.role("trainer"), overlay.role("generator"));
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let first = free_ports(4);
    let shared = [(trainer.port("coordinator"), first), (generator.port("grpc"), first + 1)];
    let metrics = [(trainer.port("metrics"), first + 2), (generator.port("metrics"), first + 3)];
    let rank_0 = World::from_variables(trainer.environment.iter().cloned()).unwrap().master_addr;
    let roles = [(&trainer, metrics[0]), (&generator, metrics[1])];
    let start =
        |(role, own): (&Role<'_>, (u64, u16))| start(role, folder.path(), &[&shared[..], &[own]].concat(), &rank_0);
    let processes = Processes(roles.map(start).into());

    let scaler = autoscaler(&overlay);
    let [metric] = list(scaler, "/spec/metrics") else { panic!("one metric") };
    let described = at(metric, "/object/describedObject");
    assert!(find(&overlay.resources, text(described, "/kind"), text(described, "/name")).is_some(), "{described}");
    assert!(text(metric, "/object/target/value").parse::<f64>().unwrap() > 0.0);
    let line = format!("\n{}{{run=\"small\"}} ", text(metric, "/object/metric/name"));
    let deadline = Instant::now() + PATIENCE;
    let page = loop {
        let page = scrape(first + 2, TOKEN);
        // The first step is shown with all of its metrics.
        if page.contains("\naha_trainer_step_time") {
            break page;
        }
        let log = |role| read(&folder.path().join(role));
        assert!(Instant::now() < deadline, "{page}\n{}\n{}", log("trainer.log"), log("generator.log"));
        std::thread::park_timeout(Duration::from_millis(100));
    };
    let value = page.split_once(&line).unwrap_or_else(|| panic!("no {line:?} in {page}")).1.lines().next().unwrap();
    assert!(value.parse::<f64>().unwrap() > 0.0, "a step waits for its completions: {value}");
    assert!(scrape(first + 2, "another-token-than-it").starts_with("HTTP/1.1 401 "));
    drop(processes);
}
