//! Pods of Kubernetes' resources, and what each has to have.

use std::path::Path;

use aha_core::config::{Credentials, RunConfig, TOKEN_VARIABLE};
use aha_tests::golden::workspace;
use serde_json::Value;

use crate::commands::Invocation;
use crate::{WORKDIR, at, check_image, list, text};

/// Where the ConfigMap `aha-recipe` is mounted.
const RECIPE: &str = "/etc/aha/recipe.yaml";
/// What the binary reads beside `AHA__section__key`.
const VARIABLES: [&str; 7] =
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", TOKEN_VARIABLE];
/// What a pod's fields are, for one.
const FIELDS: [(&str, &str); 2] =
    [("status.podIP", POD_IP), ("metadata.annotations['batch.kubernetes.io/job-completion-index']", "0")];
pub(crate) const POD_IP: &str = "10.42.0.7";
/// The Secret that has the token, its key, and what lies there.
pub(crate) const SECRET: (&str, &str) = ("aha-token", "token");
pub(crate) const TOKEN: &str = "what-is-in-the-secret";

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
    /// Its variables, as the process finds them.
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) config: RunConfig,
}

pub(crate) fn find<'a>(resources: &'a [Value], kind: &str, name: &str) -> Option<&'a Value> {
    resources.iter().find(|resource| resource["kind"] == *kind && resource["metadata"]["name"] == *name)
}

pub(crate) fn pods(resources: &[Value]) -> Vec<Pods<'_>> {
    let mut found = Vec::new();
    for resource in resources {
        let template = match resource["kind"].as_str().unwrap() {
            "Deployment" | "Job" => Some(at(resource, "/spec/template")),
            "JobSet" => Some(at(resource, "/spec/replicatedJobs/0/template/spec/template")),
            "Namespace" | "Service" | "ConfigMap" | "PersistentVolumeClaim" | "NetworkPolicy" => None,
            "HorizontalPodAutoscaler" => None,
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
            let environment = environment(container);
            let words = |pointer| -> Vec<String> {
                list(container, pointer).iter().map(|word| expand(word.as_str().unwrap(), &environment)).collect()
            };
            let commands = match words("/command").last() {
                None => vec![Invocation::new(&words("/args"))],
                Some(script) => Invocation::in_shell(script),
            };
            for command in commands {
                let path =
                    if command.recipe() == RECIPE { scratch.to_owned() } else { workspace().join(command.recipe()) };
                let keys: Vec<_> = environment.iter().filter(|(name, _)| name.starts_with("AHA__")).cloned().collect();
                let config = command.load(&path, &keys);
                let pods = Pods { resource: pods.resource, template: pods.template };
                roles.push(Role { pods, container, command, environment: environment.clone(), config });
            }
        }
    }
    roles
}

/// The variables of a container: each may refer to those before it.
#[track_caller]
fn environment(container: &Value) -> Vec<(String, String)> {
    let mut known: Vec<(String, String)> = Vec::new();
    for variable in list(container, "/env") {
        let source = variable.get("valueFrom");
        let value = match source.map(|source| (source.get("fieldRef"), source.get("secretKeyRef"))) {
            None => expand(text(variable, "/value"), &known),
            Some((Some(field), None)) => {
                let path = text(field, "/fieldPath");
                let found = FIELDS.iter().find(|(name, _)| *name == path);
                found.unwrap_or_else(|| panic!("what is a pod's {path}?")).1.to_owned()
            }
            Some((None, Some(secret))) => {
                assert_eq!((text(secret, "/name"), text(secret, "/key")), SECRET);
                TOKEN.to_owned()
            }
            other => panic!("{other:?}"),
        };
        known.push((text(variable, "/name").to_owned(), value));
    }
    known
}

/// `$(NAME)` becomes the variable's value.
#[track_caller]
fn expand(text: &str, variables: &[(String, String)]) -> String {
    let Some((before, rest)) = text.split_once("$(") else { return text.to_owned() };
    let (name, after) = rest.split_once(')').unwrap_or_else(|| panic!("{text} does not end"));
    let found = variables.iter().find(|(known, _)| known == name);
    let (_, value) = found.unwrap_or_else(|| panic!("{text} refers to {name}, which is not set before it"));
    format!("{before}{value}{}", expand(after, variables))
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
            let reference = format!("$({name})");
            let is_argument = list(container, "/args").iter().any(|word| word.as_str().unwrap().contains(&reference));
            let is_read = name.starts_with("AHA__") || VARIABLES.contains(&name) || is_argument;
            assert!(is_read, "the binary does not read {name}");
            let is_secret = variable.pointer("/valueFrom/secretKeyRef").is_some();
            assert_eq!(is_secret, name == TOKEN_VARIABLE, "the token alone is secret, and always: {variable}");
        }
    }
}

impl Role<'_> {
    pub(crate) fn mounts(&self) -> Vec<&str> {
        let mounts = list(self.container, "/volumeMounts").iter().map(|mount| text(mount, "/mountPath"));
        mounts.filter(|mount| mount.starts_with(WORKDIR)).collect()
    }

    /// What it proves itself by, and asks of others.
    pub(crate) fn credentials(&self) -> Credentials {
        let token = self.environment.iter().find(|(name, _)| name == TOKEN_VARIABLE).map(|(_, value)| value.as_str());
        Credentials::load(&self.config.security, token).unwrap()
    }

    /// A variable of the container.
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
