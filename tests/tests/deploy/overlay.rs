//! The overlays of deploy/kubernetes, as they are and with the components that they offer.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::kustomize::build;
use crate::pods::{Role, roles};
use crate::{deploy, read};

/// With a pod for every rank and generator.
const SPREAD: [&str; 2] = ["cpu-demo", "gpu"];
const ON_A_NODE: &str = "gpu-node";
const COMPONENTS: [&str; 2] = ["token", "autoscaling"];

/// An overlay as it would be applied.
pub(crate) struct Overlay {
    /// The folder's, and the components'.
    pub(crate) name: String,
    pub(crate) resources: Vec<Value>,
    pub(crate) components: Vec<&'static str>,
    folder: &'static str,
    /// A copy of deploy/kubernetes, where components are taken in, and the recipe.
    scratch: tempfile::TempDir,
}

impl Overlay {
    /// Every overlay, with every choice of components.
    pub(crate) fn all() -> Vec<Self> {
        Self::spread().into_iter().chain([Self::on_a_node()]).collect()
    }

    pub(crate) fn on_a_node() -> Self {
        Self::build(ON_A_NODE, &[])
    }

    /// Those with a pod for every rank and generator, with every choice of components.
    pub(crate) fn spread() -> Vec<Self> {
        let [token, autoscaling] = COMPONENTS;
        let choices: [&[&'static str]; 4] = [&[], &[token], &[autoscaling], &[token, autoscaling]];
        SPREAD.iter().flat_map(|name| choices.map(|components| Self::build(name, components))).collect()
    }

    #[track_caller]
    pub(crate) fn build(folder: &'static str, components: &[&'static str]) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        copy(&deploy("kubernetes"), scratch.path());
        let mut overlay = Self {
            name: [&[folder], components].concat().join(" and "),
            resources: Vec::new(),
            components: components.to_vec(),
            folder,
            scratch,
        };
        let path = overlay.folder().join("kustomization.yaml");
        let mut text = read(&path);
        for line in components.iter().map(|name| format!("  - ../../components/{name}\n")) {
            for line in ["components:\n", &line] {
                assert!(text.contains(line), "{folder} does not offer {components:?}");
                text = text.replace(&format!("# {line}"), line);
            }
        }
        std::fs::write(path, text).unwrap();
        overlay.resources = build(&overlay.folder());
        overlay
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.scratch.path().join("overlays").join(self.folder)
    }

    pub(crate) fn roles(&self) -> Vec<Role<'_>> {
        roles(&self.resources, &self.scratch.path().join("recipe.yaml"))
    }

    #[track_caller]
    pub(crate) fn role(&self, subcommand: &str) -> Role<'_> {
        let mut found = self.roles().into_iter().filter(|role| role.command.subcommand() == subcommand);
        found.next().unwrap_or_else(|| panic!("nobody starts aha {subcommand}"))
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)
        } else {
            std::fs::write(target, std::fs::read(entry.path()).unwrap()).unwrap();
        }
    }
}
