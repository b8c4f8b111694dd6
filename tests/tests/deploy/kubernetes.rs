//! deploy/kubernetes: each overlay as it would be applied.

use std::path::PathBuf;

use aha_core::config::{Generator, Launch, RunConfig};
use aha_tests::golden::workspace;
use aha_trainer::world::World;
use serde_json::Value;

use crate::kustomize::build;
use crate::pods::{Role, check_confined, check_references, find, pods, roles};
use crate::{at, check_folders, deploy, list, load, number, text};

const OVERLAYS: [&str; 3] = ["cpu-demo", "gpu", "gpu-node"];
/// What a trainer ends with when the run is to go on later.
const RESUMABLE: u64 = 75;

struct Overlay {
    resources: Vec<Value>,
    scratch: tempfile::TempDir,
}

impl Overlay {
    fn build(name: &str) -> Self {
        let resources = build(&deploy("kubernetes/overlays").join(name));
        Self { resources, scratch: tempfile::tempdir().unwrap() }
    }

    fn recipe(&self) -> PathBuf {
        self.scratch.path().join("recipe.yaml")
    }

    fn roles(&self) -> Vec<Role<'_>> {
        roles(&self.resources, &self.recipe())
    }

    #[track_caller]
    fn role(&self, subcommand: &str) -> Role<'_> {
        let mut found = self.roles().into_iter().filter(|role| role.command.subcommand() == subcommand);
        found.next().unwrap_or_else(|| panic!("nobody starts aha {subcommand}"))
    }
}

#[test]
fn every_pod_is_confined_and_refers_to_what_is_there() {
    for name in OVERLAYS {
        let overlay = Overlay::build(name);
        let namespaces: Vec<_> = overlay.resources.iter().filter(|resource| resource["kind"] == "Namespace").collect();
        let [namespace] = namespaces.as_slice() else { panic!("one namespace in {name}") };
        for resource in overlay.resources.iter().filter(|resource| resource["kind"] != "Namespace") {
            assert_eq!(at(resource, "/metadata/namespace"), at(namespace, "/metadata/name"));
        }
        for pods in pods(&overlay.resources) {
            check_confined(&pods);
            check_references(&pods, &overlay.resources);
        }
        assert_eq!(find(&overlay.resources, "ConfigMap", "aha-recipe").is_some(), name != "gpu-node");
    }
}

#[test]
fn every_command_line_is_taken_and_finds_its_folders() {
    let mut subcommands = Vec::new();
    for name in OVERLAYS {
        for role in Overlay::build(name).roles() {
            assert!(role.command.is_taken(), "aha does not take {:?}", role.command.words);
            let mut config = role.config.clone();
            if role.command.subcommand() == "generator" {
                // Prompts come by gRPC.
                config.data.path = None;
            }
            check_folders(&config, &role.mounts());
            let grace = number(role.pods.template, "/spec/terminationGracePeriodSeconds") as f64;
            let Launch { save_seconds, grace_seconds, .. } = role.config.launch;
            let needed = match role.command.subcommand() {
                "trainer" => save_seconds,
                "generator" => grace_seconds,
                "launch" => save_seconds + 2.0 * grace_seconds,
                _ => 0.0,
            };
            assert!(grace >= needed, "{name}: {} s, but {:?} may take {needed} s to end", grace, role.command.words);
            subcommands.push(role.command.subcommand().to_owned());
        }
    }
    assert_eq!(subcommands, ["sft", "generator", "trainer", "generator", "trainer", "launch"]);
}

/// Apart from where its processes are, a run is that of configs/.
#[test]
fn recipes_are_those_of_configs() {
    for name in ["cpu-demo", "gpu"] {
        let overlay = Overlay::build(name);
        let apart = |config: RunConfig| {
            let Generator { addresses, connect_timeout_seconds, .. } = Generator::default();
            let mut config = RunConfig { launch: Launch::default(), ..config };
            config.train.threads = 0;
            config.generator = Generator { addresses, connect_timeout_seconds, ..config.generator };
            config
        };
        let config = overlay.role("trainer").config;
        let original = load(&workspace().join(format!("configs/{}.yaml", config.run.name)), &[], &[]);
        assert_eq!(apart(config), apart(original), "{name}");
    }
}

#[test]
fn ranks_find_each_other() {
    for name in ["cpu-demo", "gpu"] {
        let overlay = Overlay::build(name);
        let role = overlay.role("trainer");
        let jobs = list(role.pods.resource, "/spec/replicatedJobs");
        let [job] = jobs else { panic!("one job of ranks") };
        assert_eq!(number(job, "/replicas"), 1);
        let size = number(job, "/template/spec/completions");
        assert_eq!(number(job, "/template/spec/parallelism"), size, "all ranks run at once");
        assert_eq!(text(job, "/template/spec/completionMode"), "Indexed");
        let rank = text(role.variable("RANK"), "/valueFrom/fieldRef/fieldPath");
        assert_eq!(rank, "metadata.annotations['batch.kubernetes.io/job-completion-index']");

        let value = |name: &str| (name.to_owned(), text(role.variable(name), "/value").to_owned());
        let variables = ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"].map(value);
        let subdomain = role.pods.resource.pointer("/spec/network/subdomain");
        let jobset = text(role.pods.resource, "/metadata/name");
        let subdomain = subdomain.map_or(jobset, |subdomain| subdomain.as_str().unwrap());
        for rank in 0..size {
            let rank = ("RANK".to_owned(), rank.to_string());
            let world = World::from_variables(variables.iter().cloned().chain([rank])).unwrap();
            assert_eq!((world.size as u64, world.local_rank), (size, 0));
            assert_eq!(world.master_addr, format!("{jobset}-{}-0-0.{subdomain}", text(job, "/name")));
        }
        let waiting = at(role.pods.template, "/spec/initContainers/0");
        assert_eq!(text(waiting, "/env/0/value"), text(role.variable("MASTER_ADDR"), "/value"));
        let threads = role.config.train.threads.to_string();
        assert_eq!(text(role.container, "/resources/limits/cpu"), threads, "train.threads are the pod's cores");
    }
}

#[test]
fn the_recipe_lists_every_generator_by_its_name() {
    for name in ["cpu-demo", "gpu"] {
        let overlay = Overlay::build(name);
        let role = overlay.role("generator");
        let (set, service) = (role.pods.resource, text(role.pods.resource, "/spec/serviceName"));
        let service = find(&overlay.resources, "Service", service).expect("the StatefulSet's Service exists");
        assert_eq!(text(service, "/spec/clusterIP"), "None", "only a headless Service names pods");
        assert_eq!(at(service, "/spec/publishNotReadyAddresses"), true);
        let labels = at(role.pods.template, "/metadata/labels");
        for selector in [at(service, "/spec/selector"), at(set, "/spec/selector/matchLabels")] {
            for (label, value) in selector.as_object().unwrap() {
                assert_eq!(labels.get(label), Some(value), "{label} selects no generator");
            }
        }
        let (set, service) = (text(set, "/metadata/name"), text(service, "/metadata/name"));
        let port = role.port("grpc");
        let names = (0..number(role.pods.resource, "/spec/replicas")).map(|n| format!("{set}-{n}.{service}:{port}"));
        assert_eq!(overlay.role("trainer").config.generator.addresses, names.collect::<Vec<_>>(), "{name}");
    }
}

#[test]
fn ports_of_processes_services_and_probes_agree() {
    for name in ["cpu-demo", "gpu"] {
        let overlay = Overlay::build(name);
        let role = overlay.role("generator");
        let (grpc, metrics) = (role.port("grpc"), role.port("metrics"));
        assert_eq!(role.command.option("--listen"), Some(format!("0.0.0.0:{grpc}").as_str()));
        assert_eq!(role.command.option("--metrics-address"), Some(format!("0.0.0.0:{metrics}").as_str()));
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            assert_eq!(number(role.container, &format!("/{probe}/grpc/port")), grpc);
        }
        let service = find(&overlay.resources, "Service", text(role.pods.resource, "/spec/serviceName")).unwrap();
        for port in list(service, "/spec/ports") {
            assert_eq!(number(port, "/port"), role.port(text(port, "/targetPort")));
        }
        check_scraped(&role, metrics);
        let policy = find(&overlay.resources, "NetworkPolicy", "aha").unwrap();
        assert_eq!(number(policy, "/spec/ingress/1/ports/0/port"), metrics);
        let (label, value) = at(policy, "/spec/podSelector/matchLabels").as_object().unwrap().iter().next().unwrap();
        for pods in pods(&overlay.resources) {
            assert_eq!(at(pods.template, "/metadata/labels").get(label), Some(value), "a pod escapes the policy");
        }
    }
    let overlay = Overlay::build("gpu-node");
    let role = overlay.role("launch");
    let address = role.config.generator.metrics_address.unwrap();
    assert!(address.ip().is_unspecified(), "{address} is not reached from outside the pod");
    let metrics = u64::from(address.port());
    assert_eq!(role.port("metrics"), metrics);
    for probe in ["startupProbe", "livenessProbe"] {
        assert_eq!(number(role.container, &format!("/{probe}/httpGet/port")), metrics);
        assert_eq!(text(role.container, &format!("/{probe}/httpGet/path")), "/metrics");
    }
    check_scraped(&role, metrics);
}

#[track_caller]
fn check_scraped(role: &Role<'_>, port: u64) {
    let annotations = at(role.pods.template, "/metadata/annotations");
    assert_eq!(annotations["prometheus.io/port"], port.to_string());
    assert_eq!(annotations["prometheus.io/path"], "/metrics");
}

/// A run that saved before its end goes on, without counting as a failure.
#[test]
fn a_saved_run_goes_on() {
    for (overlay, subcommand, action) in
        [("cpu-demo", "trainer", "FailJob"), ("gpu", "trainer", "FailJob"), ("gpu-node", "launch", "Ignore")]
    {
        let overlay = Overlay::build(overlay);
        let role = overlay.role(subcommand);
        let resource = role.pods.resource;
        let job = resource.pointer("/spec/replicatedJobs/0/template/spec").unwrap_or_else(|| at(resource, "/spec"));
        let rule = at(job, "/podFailurePolicy/rules/0");
        assert_eq!(text(rule, "/action"), action);
        assert_eq!(at(rule, "/onExitCodes/values/0"), RESUMABLE);
        assert_eq!(at(rule, "/onExitCodes/containerName"), at(role.container, "/name"));
        assert_eq!(text(role.pods.template, "/spec/restartPolicy"), "Never", "what a podFailurePolicy asks for");
        if action == "FailJob" {
            let rule = at(resource, "/spec/failurePolicy/rules/0");
            assert_eq!(text(rule, "/onJobFailureReasons/0"), "PodFailurePolicy");
            assert_eq!(text(rule, "/action"), "RestartJobSetAndIgnoreMaxRestarts");
        }
    }
}

#[test]
fn every_role_on_a_gpu_has_one() {
    let gpus = |role: &Role<'_>| number(role.container, "/resources/limits/nvidia.com~1gpu");
    let overlay = Overlay::build("gpu");
    assert_eq!([gpus(&overlay.role("trainer")), gpus(&overlay.role("generator"))], [1, 1]);
    let overlay = Overlay::build("gpu-node");
    let launch = overlay.role("launch");
    assert_eq!(gpus(&launch), (launch.config.launch.trainers + launch.config.launch.generators) as u64);
}
