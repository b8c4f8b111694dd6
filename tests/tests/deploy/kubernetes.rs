//! deploy/kubernetes: each overlay as it would be applied.

use aha_core::config::{Credentials, Generator, Launch, Logging, RunConfig};
use aha_nn::comm::host_and_port;
use aha_proto::guard::{check_listen, serving};
use aha_tests::golden::workspace;
use aha_trainer::world::World;
use serde_json::Value;

use crate::overlay::Overlay;
use crate::pods::{POD_IP, Role, check_confined, check_references, find, pods};
use crate::{at, check_folders, list, load, number, read, text};

/// What a trainer ends with when the run is to go on later.
const RESUMABLE: u64 = 75;

#[test]
fn every_pod_is_confined_and_refers_to_what_is_there() {
    for overlay in Overlay::all() {
        let name = &overlay.name;
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
        let has_token = |role: &Role<'_>| role.credentials().token.is_some();
        let serving = overlay.roles().into_iter().filter(|role| role.command.subcommand() != "sft");
        assert!(serving.map(|role| has_token(&role)).all(|has| has == overlay.components.contains(&"token")), "{name}");
    }
}

#[test]
fn every_command_line_is_taken_and_finds_its_folders() {
    let mut subcommands = Vec::new();
    for (name, components) in [("cpu-demo", &[][..]), ("gpu", &["token", "autoscaling"]), ("gpu-node", &[])] {
        for role in Overlay::build(name, components).roles() {
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
        let overlay = Overlay::build(name, &[]);
        let apart = |config: RunConfig| {
            let Generator { coordinator, connect_timeout_seconds, .. } = Generator::default();
            let logging = Logging { metrics_address: None, ..config.logging };
            let generator = Generator { coordinator, connect_timeout_seconds, ..config.generator };
            RunConfig { launch: Launch::default(), security: Default::default(), logging, generator, ..config }
        };
        let config = overlay.role("trainer").config;
        let original = load(&workspace().join(format!("configs/{}.yaml", config.run.name)), &[], &[]);
        assert_eq!(apart(config), apart(original), "{name}");
    }
}

#[test]
fn ranks_find_each_other() {
    for overlay in Overlay::spread() {
        let role = overlay.role("trainer");
        let job = job_of_ranks(&role);
        assert_eq!(number(job, "/replicas"), 1);
        let size = number(job, "/template/spec/completions");
        assert_eq!(number(job, "/template/spec/parallelism"), size, "all ranks run at once");
        assert_eq!(text(job, "/template/spec/completionMode"), "Indexed");
        let rank = text(role.variable("RANK"), "/valueFrom/fieldRef/fieldPath");
        assert_eq!(rank, "metadata.annotations['batch.kubernetes.io/job-completion-index']");
        for rank in 0..size {
            let others = role.environment.iter().filter(|(name, _)| name != "RANK").cloned();
            let world = World::from_variables(others.chain([("RANK".to_owned(), rank.to_string())])).unwrap();
            assert_eq!((world.size as u64, world.local_rank), (size, 0));
            assert_eq!((world.cores_of_rank(8), role.config.train.threads), (8, 0), "a pod's cores are its rank's");
            assert_eq!(world.master_addr, name_of_rank_0(&role));
            assert_eq!(u64::from(world.master_port), role.port("rendezvous"));
        }
        assert_eq!(at(role.container, "/resources/limits/cpu"), at(role.container, "/resources/requests/cpu"));
    }
}

fn job_of_ranks<'a>(role: &Role<'a>) -> &'a Value {
    let [job] = list(role.pods.resource, "/spec/replicatedJobs") else { panic!("one job of ranks") };
    job
}

/// As JobSet names its pods.
#[track_caller]
fn name_of_rank_0(role: &Role<'_>) -> String {
    let set = role.pods.resource;
    assert_eq!(at(set, "/spec/network/enableDNSHostnames"), true);
    assert_eq!(at(set, "/spec/network/publishNotReadyAddresses"), true, "ranks meet before any is ready");
    let name = text(set, "/metadata/name");
    let subdomain = set.pointer("/spec/network/subdomain").map_or(name, |subdomain| subdomain.as_str().unwrap());
    format!("{name}-{}-0-0.{subdomain}", text(job_of_ranks(role), "/name"))
}

#[test]
fn generators_register_at_rank_0_under_their_pods_addresses() {
    for overlay in Overlay::spread() {
        let (trainer, generator) = (overlay.role("trainer"), overlay.role("generator"));
        let named = &trainer.config.generator;
        assert!(named.addresses.is_empty(), "no generator is waited for by name: {:?}", named.addresses);
        let coordinator = named.coordinator.as_deref().expect("rank 0 listens for generators");
        let (host, port) = host_and_port(coordinator).unwrap();
        assert_eq!((host, u64::from(port)), (name_of_rank_0(&trainer).as_str(), trainer.port("coordinator")));
        assert_eq!(generator.command.option("--coordinator"), Some(coordinator));
        let advertised = format!("{POD_IP}:{}", generator.port("grpc"));
        assert_eq!(generator.command.option("--advertise"), Some(advertised.as_str()));

        let deployment = generator.pods.resource;
        assert_eq!(text(deployment, "/kind"), "Deployment");
        assert_eq!(deployment.pointer("/spec/replicas"), None, "applying it again would undo what was scaled");
        check_selects(at(deployment, "/spec/selector/matchLabels"), &generator);
        assert_eq!(number(deployment, "/spec/strategy/rollingUpdate/maxSurge"), 0, "a new one takes an old one's GPU");
        let probe = at(generator.container, "/startupProbe");
        let loading = number(probe, "/periodSeconds") * number(probe, "/failureThreshold");
        assert!(number(deployment, "/spec/progressDeadlineSeconds") > loading);
        let patience = named.connect_timeout_seconds;
        assert!(
            patience >= loading as f64,
            "trainers give up after {patience} s, and a model may load for {loading} s"
        );
    }
}

#[track_caller]
fn check_selects(selector: &Value, role: &Role<'_>) {
    let labels = at(role.pods.template, "/metadata/labels");
    for (label, value) in selector.as_object().unwrap() {
        assert_eq!(labels.get(label), Some(value), "{label} does not select {:?}", role.command.words);
    }
}

#[test]
fn ports_of_processes_services_and_probes_agree() {
    for overlay in Overlay::spread() {
        let role = overlay.role("generator");
        let (grpc, metrics) = (role.port("grpc"), role.port("metrics"));
        assert_eq!(role.command.option("--listen"), Some(format!("0.0.0.0:{grpc}").as_str()));
        assert_eq!(role.command.option("--metrics-address"), Some(format!("0.0.0.0:{metrics}").as_str()));
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            assert_eq!(number(role.container, &format!("/{probe}/grpc/port")), grpc);
        }
        check_scraped(at(role.pods.template, "/metadata/annotations"), metrics);
        let policy = find(&overlay.resources, "NetworkPolicy", "aha").unwrap();
        assert_eq!(number(policy, "/spec/ingress/1/ports/0/port"), metrics);
        let (label, value) = at(policy, "/spec/podSelector/matchLabels").as_object().unwrap().iter().next().unwrap();
        for pods in pods(&overlay.resources) {
            assert_eq!(at(pods.template, "/metadata/labels").get(label), Some(value), "a pod escapes the policy");
        }

        let rank = overlay.role("trainer");
        let address = rank.config.logging.metrics_address.expect("rank 0 serves metrics");
        assert!(address.ip().is_unspecified(), "{address} is not reached from outside the pod");
        assert_eq!((u64::from(address.port()), rank.port("metrics")), (metrics, metrics), "one port is open to all");
        let services = overlay.resources.iter().filter(|resource| resource["kind"] == "Service");
        let [service] = services.collect::<Vec<_>>()[..] else { panic!("one service") };
        let mut selector = at(service, "/spec/selector").clone();
        let index = selector.as_object_mut().unwrap().remove("batch.kubernetes.io/job-completion-index");
        assert_eq!(index, Some("0".into()), "rank 0 alone serves metrics");
        check_selects(&selector, &rank);
        for port in list(service, "/spec/ports") {
            assert_eq!(number(port, "/port"), rank.port(text(port, "/targetPort")));
        }
        check_scraped(at(service, "/metadata/annotations"), metrics);
    }
    let overlay = Overlay::on_a_node();
    let role = overlay.role("launch");
    let address = role.config.generator.metrics_address.unwrap();
    assert!(address.ip().is_unspecified(), "{address} is not reached from outside the pod");
    let metrics = u64::from(address.port());
    assert_eq!(role.port("metrics"), metrics);
    for probe in ["startupProbe", "livenessProbe"] {
        assert_eq!(number(role.container, &format!("/{probe}/httpGet/port")), metrics);
        assert_eq!(text(role.container, &format!("/{probe}/httpGet/path")), "/metrics");
    }
    check_scraped(at(role.pods.template, "/metadata/annotations"), metrics);
}

#[track_caller]
fn check_scraped(annotations: &Value, port: u64) {
    assert_eq!(annotations["prometheus.io/scrape"], "true");
    assert_eq!(annotations["prometheus.io/port"], port.to_string());
    assert_eq!(annotations["prometheus.io/path"], "/metrics");
}

/// Every process may listen where its pod has it listen, and one that nobody said anything to may not.
#[test]
fn whoever_listens_beyond_loopback_says_who_may_call() {
    for overlay in Overlay::all() {
        for role in overlay.roles().iter().filter(|role| role.command.subcommand() != "sft") {
            let addresses = match role.command.subcommand() {
                "generator" => {
                    ["--listen", "--metrics-address"].map(|name| role.command.option(name).unwrap()).to_vec()
                }
                // Rank 0's coordinator, at the pod's address.
                "trainer" => vec!["10.42.0.7:50050"],
                _ => Vec::new(),
            };
            let addresses = addresses.iter().map(|address| address.parse().unwrap());
            let config = &role.config;
            let metrics = config.logging.metrics_address.into_iter().chain(config.generator.metrics_address);
            let addresses: Vec<_> = addresses.chain(metrics).collect();
            assert!(!addresses.is_empty());
            for address in addresses {
                let key = format!("{} of {}", role.command.subcommand(), overlay.name);
                check_listen(&key, address, &serving(&role.credentials())).unwrap();
                assert!(check_listen(&key, address, &Credentials::default()).is_err(), "{address} is loopback");
            }
            let credentials = role.credentials();
            assert_ne!(credentials.insecure, credentials.token.is_some(), "one of both: {}", overlay.name);
        }
    }
}

/// A run that saved before its end goes on, without counting as a failure.
#[test]
fn a_saved_run_goes_on() {
    for (overlay, subcommand, action) in
        [("cpu-demo", "trainer", "FailJob"), ("gpu", "trainer", "FailJob"), ("gpu-node", "launch", "Ignore")]
    {
        let overlay = Overlay::build(overlay, &[]);
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
    let overlay = Overlay::build("gpu", &[]);
    assert_eq!([gpus(&overlay.role("trainer")), gpus(&overlay.role("generator"))], [1, 1]);
    let overlay = Overlay::on_a_node();
    let launch = overlay.role("launch");
    assert_eq!(gpus(&launch), (launch.config.launch.trainers + launch.config.launch.generators) as u64);
}

#[test]
fn the_readme_says_how_the_secret_is_made() {
    let (name, key) = crate::pods::SECRET;
    let command = format!("kubectl -n aha create secret generic {name} --from-literal={key}=");
    assert!(read(&crate::deploy("README.md")).contains(&command), "no {command} in deploy/README.md");
}
