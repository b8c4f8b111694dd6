use std::fs;
use std::path::Path;

use aha_core::hub::RepositoryId;
use serde_json::{Value, json};

use crate::hub::Push;
use crate::hub::mock::{Answer, Asked, MockHub, TOKEN};
use crate::hub::there::push_by;

const WEIGHTS: &str = "weights of a model";

/// Adapters with a trainer's state beside them.
fn folder(root: &Path) -> std::path::PathBuf {
    let folder = root.join("step-2");
    fs::create_dir_all(folder.join("trainer_state")).unwrap();
    fs::write(folder.join("trainer_state/state.json"), "{}").unwrap();
    fs::write(folder.join(".hidden"), "").unwrap();
    fs::write(folder.join("adapter_model.safetensors"), WEIGHTS).unwrap();
    let base = "/cache/models--Qwen--Qwen2.5-0.5B/snapshots/ab";
    fs::write(folder.join("adapter_config.json"), json!({"base_model_name_or_path": base, "r": 8}).to_string())
        .unwrap();
    folder
}

fn push(folder: &Path) -> Push {
    Push {
        folder: folder.to_owned(),
        id: RepositoryId::parse("me/mine").unwrap(),
        revision: "main".to_owned(),
        is_private: true,
        message: "Step 2".to_owned(),
        with_trainer_state: false,
    }
}

/// Takes everything; weights by `upload`.
fn taking(upload: impl Fn(&str) -> Value + Send + Sync + 'static) -> MockHub {
    MockHub::start(move |asked| {
        let body = || serde_json::from_slice::<Value>(&asked.body).unwrap();
        let path = asked.line.split(' ').nth(1).unwrap();
        match path.split('?').next().unwrap() {
            path if path.contains("/preupload/") => {
                let mode = |file: &Value| {
                    let is_large = file["path"].as_str().unwrap().ends_with(".safetensors");
                    json!({"path": file["path"], "uploadMode": if is_large { "lfs" } else { "regular" }, "shouldIgnore": false})
                };
                let files: Vec<Value> = body()["files"].as_array().unwrap().iter().map(mode).collect();
                Answer::json(&json!({"files": files}))
            }
            path if path.ends_with("/info/lfs/objects/batch") => {
                let own = format!("http://{}", asked.headers["host"]);
                let object = &body()["objects"][0];
                let actions = upload(&own);
                Answer::json(&json!({"objects": [{"oid": object["oid"], "size": object["size"], "actions": actions}]}))
            }
            path if path.contains("/commit/") => {
                Answer::json(&json!({"commitUrl": "https://hub/commit/1", "commitOid": "1"}))
            }
            "/part" => Answer::with(200, "etag", format!("\"{}\"", asked.body.len())),
            // Both are there already.
            path if path == "/api/repos/create" || path.contains("/branch/") => Answer::of(409, "{}"),
            _ => Answer::of(200, "{}"),
        }
    })
}

/// The lines of the one commit.
fn committed(hub: &MockHub) -> Vec<Value> {
    let commits = hub.asked_for("POST /api/models/me/mine/commit/main");
    assert_eq!(commits.len(), 1);
    assert_eq!(commits[0].headers["content-type"], "application/x-ndjson");
    std::str::from_utf8(&commits[0].body).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn body(asked: &Asked) -> Value {
    serde_json::from_slice(&asked.body).unwrap()
}

#[test]
fn a_push_is_one_commit_of_small_files_and_references_to_large_ones() {
    let root = tempfile::tempdir().unwrap();
    let storage = MockHub::start(|_| Answer::of(200, ""));
    let place = format!("{}/store?signature=permission", storage.endpoint);
    let hub = taking(move |own| json!({"upload": {"href": place}, "verify": {"href": format!("{own}/verify")}}));
    let url = push_by(&hub.client(root.path()), &push(&folder(root.path()))).unwrap();
    assert_eq!(url, "https://hub/commit/1");

    let created = body(&hub.asked_for("POST /api/repos/create")[0]);
    assert_eq!(created, json!({"type": "model", "name": "mine", "organization": "me", "private": true}));
    let stored = storage.asked_for("PUT /store");
    assert_eq!((stored.len(), stored[0].body.as_slice()), (1, WEIGHTS.as_bytes()));
    assert!(!stored[0].headers.contains_key("authorization") && !stored[0].headers.contains_key("transfer-encoding"));
    let verified = &hub.asked_for("POST /verify")[0];
    assert_eq!(verified.headers["authorization"], format!("Bearer {TOKEN}"));

    let lines = committed(&hub);
    assert_eq!(lines[0]["value"]["summary"], "Step 2");
    let values: Vec<(&str, &str)> = lines[1..]
        .iter()
        .map(|line| (line["key"].as_str().unwrap(), line["value"]["path"].as_str().unwrap()))
        .collect();
    assert_eq!(values, [("file", "adapter_config.json"), ("lfsFile", "adapter_model.safetensors")]);
    // `printf 'weights of a model' | sha256sum`
    let hash = "ca61ce52a25a9f04bf2df801143a4c2d6bfe8a59e3b3ebf17ffa2cbb915c146e";
    assert_eq!(lines[2]["value"]["oid"], hash);
    assert_eq!(body(verified), json!({"oid": hash, "size": WEIGHTS.len()}));
    let content = base64::Engine::decode(
        &base64::engine::general_purpose::STANDARD,
        lines[1]["value"]["content"].as_str().unwrap(),
    );
    let config: Value = serde_json::from_slice(&content.unwrap()).unwrap();
    assert_eq!(config, json!({"base_model_name_or_path": "Qwen/Qwen2.5-0.5B", "r": 8}), "no folder of this machine");
}

#[test]
fn a_file_may_go_in_parts() {
    let root = tempfile::tempdir().unwrap();
    let hub = taking(|own| {
        let part = format!("{own}/part");
        let header = json!({"chunk_size": "8", "1": part, "00002": part, "3": part});
        json!({"upload": {"href": format!("{own}/complete"), "header": header}})
    });
    push_by(&hub.client(root.path()), &push(&folder(root.path()))).unwrap();
    let parts: Vec<Vec<u8>> = hub.asked_for("PUT /part").into_iter().map(|asked| asked.body).collect();
    assert_eq!(parts.concat(), WEIGHTS.as_bytes());
    assert_eq!(parts.len(), 3);
    let whole = body(&hub.asked_for("POST /complete")[0]);
    assert_eq!(whole["parts"][2], json!({"partNumber": 3, "etag": "\"2\""}));
    assert_eq!(committed(&hub).len(), 3);
}

#[test]
fn what_the_hub_has_is_not_sent_again_and_a_branch_is_made() {
    let root = tempfile::tempdir().unwrap();
    let hub = taking(|_| Value::Null);
    let branch = Push { revision: "trial".to_owned(), with_trainer_state: true, ..push(&folder(root.path())) };
    push_by(&hub.client(root.path()), &branch).unwrap();
    assert!(hub.asked_for("PUT ").is_empty());
    assert_eq!(hub.asked_for("POST /api/models/me/mine/branch/trial").len(), 1);
    let commit = hub.asked_for("POST /api/models/me/mine/commit/trial").remove(0);
    assert!(String::from_utf8(commit.body).unwrap().contains("trainer_state/state.json"));
}

#[test]
fn a_push_that_is_refused_says_what_is_missing() {
    let root = tempfile::tempdir().unwrap();
    let folder = folder(root.path());
    let hub = MockHub::start(|_| Answer::of(403, "{}"));
    let error = |change: fn(&mut crate::hub::settings::Settings)| {
        format!("{:#}", push_by(&hub.client_with(root.path(), change), &push(&folder)).unwrap_err())
    };
    let refused = error(|_| {});
    for expect in ["step-2", "creating me/mine", "HTTP 403", "permission to write to me/mine"] {
        assert!(refused.contains(expect), "no {expect:?} in: {refused}");
    }
    assert!(!refused.contains(TOKEN), "{refused}");
    let before = hub.asked().len();
    assert!(error(|settings| settings.token = None).contains("HF_TOKEN"));
    assert!(error(|settings| settings.is_offline = true).contains("HF_HUB_OFFLINE"));
    assert_eq!(hub.asked().len(), before);
}
