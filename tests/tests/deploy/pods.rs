//! Pods of Kubernetes' resources, and what each has to have.

use std::path::Path;

use aha_core::config::RunConfig;
use aha_tests::golden::workspace;
use serde_json::Value;

use crate::commands::Invocation;
use crate::{WORKDIR, at, check_image, list, text};

/// Where the ConfigMap `aha-recipe` is mounted.
const RECIPE: &str = "/etc/aha/recipe.yaml";
/// What the binary reads beside `AHA__section__key`.
const VARIABLES: [&str; 5] = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"];

/// The pods that a resource makes.
pub(crate) struct Pods<'a> {
    pub(crate) resource: &'a Value,
    pub(crate) template: &'a Value,
}

/// A command line of `aha` in a container, and its configuration.
pub(crate) struct Role<'a> {
    pub(crate) pods: Pods<'a>,
    pub(crate) container: &'a Value,
    pub(crate) command: Invocation,
    pub(crate) config: RunConfig,
}

pub(crate) fn find<'a>(resources: &'a [Value], kind: &str, name: &str) -> Option<&'a Value> {
    resources.iter().find(|resource| resource["kind"] == *kind && resource["metadata"]["name"] == *name)
}

pub(crate) fn pods(resources: &[Value]) -> Vec<Pods<'_>> {
    let mut found = Vec::new();
    for resource in resources {
        let template = match resource["kind"].as_str().unwrap() {
            "StatefulSet" | "Job" => Some(at(resource, "/spec/template")),
            "JobSet" => Some(at(resource, "/spec/replicatedJobs/0/template/spec/template")),
            "Namespace" | "Service" | "ConfigMap" | "PersistentVolumeClaim" | "NetworkPolicy" => None,
            other => panic!("what pods does {other} make?"),
        };
        found.extend(template.map(|template| Pods { resource, template }));
    }
    found
}

/// Every `aha` that containers start, with the recipe of its ConfigMap or of the image.
#[track_caller]
pub(crate) fn roles<'a>(resources: &'a [Value], scratch: &Path) -> Vec<Role<'a>> {
    let recipe = find(resources, "ConfigMap", "aha-recipe").map(|map| text(map, "/data/recipe.yaml"));
    if let Some(recipe) = recipe {
        std::fs::write(scratch, recipe).unwrap();
    }
    let mut roles = Vec::new();
    for pods in pods(resources) {
        for container in ["/spec/initContainers", "/spec/containers"].iter().flat_map(|at| list(pods.template, at)) {
            let words =
                |pointer| list(container, pointer).iter().map(|word| word.as_str().unwrap()).collect::<Vec<_>>();
            let commands = match words("/command").last() {
                None => vec![Invocation::new(&words("/args"))],
                Some(script) => Invocation::in_shell(script),
            };
            for command in commands {
                let path =
                    if command.recipe() == RECIPE { scratch.to_owned() } else { workspace().join(command.recipe()) };
                let config = command.load(&path, &aha_variables(container));
                let pods = Pods { resource: pods.resource, template: pods.template };
                roles.push(Role { pods, container, command, config });
            }
        }
    }
    roles
}

fn aha_variables(container: &Value) -> Vec<(String, String)> {
    let variables = list(container, "/env").iter();
    let variables = variables.filter(|variable| text(variable, "/name").starts_with("AHA__"));
    variables.map(|variable| (text(variable, "/name").to_owned(), text(variable, "/value").to_owned())).collect()
}

#[track_caller]
pub(crate) fn check_confined(pods: &Pods<'_>) {
    let spec = at(pods.template, "/spec");
    assert_eq!(at(spec, "/securityContext/runAsNonRoot"), true);
    assert_ne!(crate::number(spec, "/securityContext/runAsUser"), 0);
    assert_eq!(at(spec, "/automountServiceAccountToken"), false, "aha asks nothing of Kubernetes");
    assert_eq!(text(spec, "/securityContext/seccompProfile/type"), "RuntimeDefault");
    for container in ["/initContainers", "/containers"].iter().flat_map(|at| list(spec, at)) {
        check_image(text(container, "/image"));
        assert_eq!(at(container, "/securityContext/allowPrivilegeEscalation"), false);
        assert_eq!(at(container, "/securityContext/readOnlyRootFilesystem"), true);
        assert_eq!(text(container, "/securityContext/capabilities/drop/0"), "ALL");
        let [requests, limits] = ["/resources/requests", "/resources/limits"].map(|pointer| at(container, pointer));
        assert!(requests.get("cpu").is_some() && limits.get("memory").is_some(), "{container:#}");
        assert_eq!(requests.get("nvidia.com/gpu"), limits.get("nvidia.com/gpu"), "GPUs are not overcommitted");
    }
}

/// Volumes that containers mount are there, as are the claims and ConfigMaps behind them; and every one is used.
#[track_caller]
pub(crate) fn check_references(pods: &Pods<'_>, resources: &[Value]) {
    let spec = at(pods.template, "/spec");
    let containers: Vec<&Value> = ["/initContainers", "/containers"].iter().flat_map(|at| list(spec, at)).collect();
    let mounts: Vec<&str> = containers
        .iter()
        .flat_map(|container| list(container, "/volumeMounts"))
        .map(|mount| text(mount, "/name"))
        .collect();
    let volumes: Vec<&str> = list(spec, "/volumes").iter().map(|volume| text(volume, "/name")).collect();
    for mount in &mounts {
        assert!(volumes.contains(mount), "no volume is called {mount}");
    }
    for volume in list(spec, "/volumes") {
        assert!(mounts.contains(&text(volume, "/name")), "nobody mounts {volume}");
        let (kind, name) = match volume.as_object().unwrap().keys().find(|key| *key != "name").unwrap().as_str() {
            "emptyDir" => continue,
            "configMap" => ("ConfigMap", text(volume, "/configMap/name")),
            "persistentVolumeClaim" => ("PersistentVolumeClaim", text(volume, "/persistentVolumeClaim/claimName")),
            other => panic!("{other}"),
        };
        assert!(find(resources, kind, name).is_some(), "no {kind} is called {name}");
    }
    for container in containers {
        assert!(container.get("envFrom").is_none(), "variables are named one by one");
        for variable in list(container, "/env") {
            let name = text(variable, "/name");
            assert!(name.starts_with("AHA__") || VARIABLES.contains(&name), "the binary does not read {name}");
            let source = variable.get("valueFrom").map(|source| source.as_object().unwrap().keys().next().unwrap());
            assert!(source.is_none_or(|source| source == "fieldRef"), "{variable}");
        }
    }
}

impl Role<'_> {
    pub(crate) fn mounts(&self) -> Vec<&str> {
        let mounts = list(self.container, "/volumeMounts").iter().map(|mount| text(mount, "/mountPath"));
        mounts.filter(|mount| mount.starts_with(WORKDIR)).collect()
    }

    /// The value of a variable of the container.
    #[track_caller]
    pub(crate) fn variable(&self, name: &str) -> &Value {
        let found = list(self.container, "/env").iter().find(|variable| variable["name"] == *name);
        found.unwrap_or_else(|| panic!("no variable {name}"))
    }

    /// The number of a port that the container names.
    #[track_caller]
    pub(crate) fn port(&self, name: &str) -> u64 {
        let found = list(self.container, "/ports").iter().find(|port| port["name"] == *name);
        crate::number(found.unwrap_or_else(|| panic!("no port {name}")), "/containerPort")
    }
}
