//! What `kubectl kustomize` makes of a folder, as far as deploy/ uses it. Anything else is refused.

use std::path::Path;
use std::process::Command;

use serde_json::{Map, Value};

use crate::overlay::Overlay;
use crate::{at, list, text, yaml};

const KNOWN_KEYS: [&str; 10] = [
    "apiVersion",
    "kind",
    "namespace",
    "labels",
    "resources",
    "components",
    "configMapGenerator",
    "generatorOptions",
    "images",
    "patches",
];

/// The resources of an overlay.
#[track_caller]
pub(crate) fn build(folder: &Path) -> Vec<Value> {
    transform(folder, "Kustomization", Vec::new())
}

/// Adds what the folder names to `resources`, and changes all of them as it says.
#[track_caller]
fn transform(folder: &Path, kind: &str, mut resources: Vec<Value>) -> Vec<Value> {
    let documents = yaml(&folder.join("kustomization.yaml"));
    let [kustomization] = documents.as_slice() else { panic!("one document in {}", folder.display()) };
    for key in kustomization.as_object().unwrap().keys() {
        assert!(KNOWN_KEYS.contains(&key.as_str()), "{key} in {}", folder.display());
    }
    assert_eq!(text(kustomization, "/kind"), kind, "{}", folder.display());
    for resource in list(kustomization, "/resources") {
        let path = folder.join(resource.as_str().unwrap());
        resources.extend(if path.is_dir() { build(&path) } else { yaml(&path) });
    }
    for component in list(kustomization, "/components") {
        resources = transform(&folder.join(component.as_str().unwrap()), "Component", resources);
    }
    for generator in list(kustomization, "/configMapGenerator") {
        assert_eq!(at(kustomization, "/generatorOptions/disableNameSuffixHash"), true);
        resources.push(config_map(folder, generator));
    }
    for pairs in list(kustomization, "/labels") {
        for (name, value) in at(pairs, "/pairs").as_object().unwrap() {
            for resource in &mut resources {
                insert(resource, &["metadata", "labels"], name, value.clone());
            }
        }
    }
    for patch in list(kustomization, "/patches") {
        patch_all(&mut resources, patch);
    }
    for image in list(kustomization, "/images") {
        for resource in &mut resources {
            rename_images(resource, image);
        }
    }
    if let Some(namespace) = kustomization.get("namespace") {
        for resource in resources.iter_mut().filter(|resource| resource["kind"] != "Namespace") {
            insert(resource, &["metadata"], "namespace", namespace.clone());
        }
    }
    resources
}

fn config_map(folder: &Path, generator: &Value) -> Value {
    let file = |name: &Value| {
        let name = name.as_str().unwrap();
        (name.to_owned(), Value::from(std::fs::read_to_string(folder.join(name)).unwrap()))
    };
    let data: Map<String, Value> = list(generator, "/files").iter().map(file).collect();
    serde_json::json!({"apiVersion": "v1", "kind": "ConfigMap", "data": data,
        "metadata": {"name": text(generator, "/name")}})
}

fn insert(value: &mut Value, path: &[&str], name: &str, new: Value) {
    let map = path.iter().fold(value, |value, key| {
        value.as_object_mut().unwrap().entry(*key).or_insert_with(|| Value::Object(Map::new()))
    });
    map.as_object_mut().unwrap().insert(name.to_owned(), new);
}

/// A patch of JSON operations on everything that its target names.
#[track_caller]
fn patch_all(resources: &mut [Value], patch: &Value) {
    let (kind, name) = (text(patch, "/target/kind"), patch.pointer("/target/name"));
    let operations: Vec<Value> = serde_saphyr::from_str(text(patch, "/patch")).unwrap();
    let targets = resources
        .iter_mut()
        .filter(|resource| resource["kind"] == *kind && name.is_none_or(|name| resource["metadata"]["name"] == *name));
    let mut num_patched = 0;
    for target in targets {
        num_patched += 1;
        for operation in &operations {
            apply(target, operation);
        }
    }
    assert!(num_patched > 0, "{kind} {name:?} is not there to be patched");
}

#[track_caller]
fn apply(target: &mut Value, operation: &Value) {
    if text(operation, "/op") == "test" {
        assert_eq!(at(target, text(operation, "/path")), at(operation, "/value"), "{operation}");
        return;
    }
    let (parent, key) = text(operation, "/path").rsplit_once('/').unwrap();
    let place = target.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent} to patch"));
    let value = at(operation, "/value").clone();
    match (text(operation, "/op"), place) {
        ("add", Value::Array(items)) if key == "-" => items.push(value),
        ("add", Value::Object(map)) => drop(map.insert(key.to_owned(), value)),
        ("replace", place) => {
            let old = match place {
                Value::Array(items) => items.get_mut(key.parse::<usize>().unwrap()),
                Value::Object(map) => map.get_mut(key),
                _ => None,
            };
            *old.unwrap_or_else(|| panic!("no {parent}/{key} to replace")) = value;
        }
        (other, _) => panic!("{other} at {parent}/{key}"),
    }
}

fn rename_images(value: &mut Value, image: &Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(old) if key == "image" && old.split(':').next() == image["name"].as_str() => {
                        *old = format!("{}:{}", text(image, "/newName"), text(image, "/newTag"));
                    }
                    _ => rename_images(value, image),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| rename_images(item, image)),
        _ => {}
    }
}

/// Where there is a kubectl: it makes of the overlays what the other tests looked at.
#[test]
fn kustomize_makes_the_same_of_every_overlay() {
    let kubectl = |folder: &Path| Command::new("kubectl").arg("kustomize").arg(folder).output();
    for overlay in Overlay::all() {
        let Ok(output) = kubectl(&overlay.folder()) else {
            println!("skipped: there is no kubectl");
            return;
        };
        let name = &overlay.name;
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let theirs: Vec<Value> = serde_saphyr::from_multiple(&String::from_utf8(output.stdout).unwrap()).unwrap();
        assert_eq!(theirs.len(), overlay.resources.len());
        for resource in &theirs {
            assert!(overlay.resources.contains(resource), "{name}: kustomize makes {resource:#}");
        }
    }
}
