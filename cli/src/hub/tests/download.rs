use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use aha_core::hub::Source;
use serde_json::{Value, json};

use crate::hub::client::Client;
use crate::hub::download::fetch;
use crate::hub::mock::{Answer, Asked, MockHub, TOKEN};
use crate::hub::{Download, Kind};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// `git hash-object` and `sha256sum` of it say so.
const CONTENT: &str = "hello\n";
const GIT_HASH: &str = "ce013625030ba8dba906f756967f9e9ca394464a";
const SHA256: &str = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";

fn small(name: &str) -> Value {
    json!({"rfilename": name, "size": 6, "blobId": GIT_HASH})
}

fn large(name: &str) -> Value {
    json!({"rfilename": name, "size": 6, "blobId": "00", "lfs": {"sha256": SHA256, "size": 6, "pointerSize": 100}})
}

fn listing(siblings: &[Value]) -> Option<Answer> {
    Answer::json(&json!({"id": "me/tiny", "sha": COMMIT, "siblings": siblings}))
}

fn model() -> Vec<Value> {
    let small = ["config.json", "tokenizer.json", "chat_template.jinja", ".gitattributes", "README.md"].map(small);
    let large =
        ["model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors"].map(large);
    small.into_iter().chain(large).collect()
}

fn is_listing(asked: &Asked) -> bool {
    asked.line.starts_with("GET /api/")
}

/// Every file has the same content.
fn tiny(asked: &Asked) -> Option<Answer> {
    if is_listing(asked) { listing(&model()) } else { Answer::of(200, CONTENT) }
}

fn get(client: &Client, is_fresh: bool) -> anyhow::Result<PathBuf> {
    let source = Source::parse("me/tiny").unwrap();
    fetch(client, &Download { source, kind: Kind::Model, local_dir: None, is_fresh })
}

fn error(client: &Client) -> String {
    format!("{:#}", get(client, true).unwrap_err())
}

#[test]
fn a_model_lies_in_the_cache_as_the_hubs_own_tools_have_it() {
    let home = tempfile::tempdir().unwrap();
    let hub = MockHub::start(tiny);
    let folder = get(&hub.client(home.path()), false).unwrap();
    let root = home.path().join("hub/models--me--tiny");
    assert_eq!(folder, root.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(fs::read_link(folder.join("config.json")).unwrap(), Path::new("../../blobs").join(GIT_HASH));
    assert_eq!(fs::read_link(folder.join("model.safetensors")).unwrap(), Path::new("../../blobs").join(SHA256));
    let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"], "and no pickles");
    assert!(names.iter().all(|name| fs::read_to_string(folder.join(name)).unwrap() == CONTENT));
    assert_eq!(hub.asked_for("GET /me/tiny/resolve/").len(), 2, "each content once");
    assert_eq!(hub.asked()[0].line, "GET /api/models/me/tiny/revision/main?blobs=true");
    assert!(hub.asked().iter().all(|asked| asked.headers["authorization"] == format!("Bearer {TOKEN}")));
}

#[test]
fn what_is_in_the_cache_needs_no_network() {
    let home = tempfile::tempdir().unwrap();
    let hub = MockHub::start(tiny);
    let offline = hub.client_with(home.path(), |settings| settings.is_offline = true);
    let refused = error(&offline);
    assert!(refused.contains("me/tiny@main") && refused.contains("HF_HUB_OFFLINE"), "{refused}");
    let folder = get(&hub.client(home.path()), false).unwrap();
    let before = hub.asked().len();
    assert_eq!(get(&hub.client(home.path()), false).unwrap(), folder);
    assert_eq!(get(&offline, true).unwrap(), folder);
    assert_eq!(hub.asked().len(), before);
    get(&hub.client(home.path()), true).unwrap();
    assert_eq!(hub.asked().len(), before + 1, "the listing, and no file again");

    fs::remove_file(folder.join("model.safetensors")).unwrap();
    assert!(error(&offline).contains("not as a whole"), "a model without its weights is none");
}

#[test]
fn a_plain_folder_holds_plain_files() {
    let (home, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let hub = MockHub::start(|asked| {
        let files = [small(".gitattributes"), small("data/train.jsonl"), large("data/b c.parquet")];
        if is_listing(asked) { listing(&files) } else { Answer::of(200, CONTENT) }
    });
    let source = Source::parse("me/tiny@v1").unwrap();
    let local_dir = Some(target.path().to_owned());
    let download = Download { source, kind: Kind::Dataset, local_dir, is_fresh: true };
    fs::create_dir(target.path().join("data")).unwrap();
    fs::write(target.path().join("data/train.jsonl"), "other\n").unwrap();
    assert_eq!(fetch(&hub.client(home.path()), &download).unwrap(), target.path());
    for name in ["data/train.jsonl", "data/b c.parquet"] {
        let path = target.path().join(name);
        assert!(!path.is_symlink() && fs::read_to_string(path).unwrap() == CONTENT, "{name}");
    }
    assert_eq!(hub.asked()[0].line, "GET /api/datasets/me/tiny/revision/v1?blobs=true");
    assert_eq!(hub.asked_for(&format!("GET /datasets/me/tiny/resolve/{COMMIT}/data/b%20c.parquet")).len(), 1);
    assert_eq!(hub.asked_for("GET /datasets/").len(), 2, "a file of another content is fetched again");
    fetch(&hub.client(home.path()), &download).unwrap();
    assert_eq!(hub.asked_for("GET /datasets/").len(), 2, "and one that is as it should be is not");
}

#[test]
fn the_hosts_that_files_lie_on_do_not_see_the_token() {
    let home = tempfile::tempdir().unwrap();
    let others = MockHub::start(|_| Answer::of(200, CONTENT));
    let place = format!("{}/blob?signature=permission", others.endpoint);
    let hub = MockHub::start(move |asked| match asked.line.as_str() {
        _ if is_listing(asked) => listing(&model()),
        "GET /me/tiny/moved" => Answer::with(302, "location", &place),
        _ => Answer::with(307, "location", "/me/tiny/moved"),
    });
    get(&hub.client(home.path()), false).unwrap();
    let moved = hub.asked_for("GET /me/tiny/moved");
    assert!(!moved.is_empty() && moved.iter().all(|asked| asked.headers.contains_key("authorization")));
    assert_eq!(others.asked_for("GET /blob").len(), 2);
    assert!(others.asked().iter().all(|asked| !asked.headers.contains_key("authorization")));
}

#[test]
fn a_torn_file_is_completed_and_a_wrong_one_thrown_away() {
    let home = tempfile::tempdir().unwrap();
    let attempts = AtomicU32::new(0);
    let hub = MockHub::start(move |asked| {
        if is_listing(asked) {
            return listing(&[small("config.json"), large("model.safetensors")]);
        }
        match (asked.headers.get("range"), attempts.fetch_add(1, Ordering::Relaxed)) {
            (None, 0) => Some(Answer { status: 200, body: b"hel".to_vec(), torn: 3, ..Answer::default() }),
            (Some(range), _) if range == "bytes=3-" => Answer::of(206, "lo\n"),
            _ => Answer::of(200, "jello\n"),
        }
    });
    let client = hub.client_with(home.path(), |settings| settings.patience = Duration::from_secs(1));
    let wrong = error(&client);
    assert!(wrong.contains("model.safetensors") && wrong.contains(SHA256), "{wrong}");
    let blobs = home.path().join("hub/models--me--tiny/blobs");
    assert_eq!(fs::read_to_string(blobs.join(GIT_HASH)).unwrap(), CONTENT);
    assert_eq!(fs::read_dir(&blobs).unwrap().count(), 1, "nothing of the other is left");
    assert!(!home.path().join("hub/models--me--tiny/refs").exists(), "what is not whole is not noted");
}

#[test]
fn refusals_name_the_repository_the_status_and_the_way_out() {
    let home = tempfile::tempdir().unwrap();
    let check = |status: u16, code: Option<&'static str>, has_token: bool, expect: &[&str]| {
        let hub = MockHub::start(move |asked| {
            assert_eq!(asked.headers.contains_key("authorization"), has_token);
            Answer::with(status, "x-error-code", code.unwrap_or("Other"))
        });
        let client = hub.client_with(home.path(), |settings| {
            settings.token = settings.token.take().filter(|_| has_token);
            settings.patience = Duration::from_secs(1);
        });
        let error = error(&client);
        for expect in expect.iter().chain(&["me/tiny", &format!("HTTP {status}")]) {
            assert!(error.contains(expect), "no {expect:?} in: {error}");
        }
        assert!(!error.contains(TOKEN), "{error}");
        hub.asked().len()
    };
    assert_eq!(check(401, None, false, &["private or gated", "HF_TOKEN", "hf auth login"]), 1);
    check(401, Some("RepoNotFound"), true, &["no repository me/tiny", "the token"]);
    check(403, Some("GatedRepo"), true, &["gated: accept its licence at http://127.0.0.1", "/me/tiny"]);
    check(404, Some("RevisionNotFound"), true, &["no revision \"main\""]);
    check(404, None, true, &["check the name"]);
    assert_eq!(check(503, None, true, &["try again later", "3 attempts"]), 3);
}

#[test]
fn a_hub_that_hangs_is_given_up() {
    let home = tempfile::tempdir().unwrap();
    let hub = MockHub::start(|_| None);
    let client = hub.client_with(home.path(), |settings| settings.patience = Duration::from_millis(200));
    let started = Instant::now();
    let error = error(&client);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert!(error.contains("timeout") && error.contains("me/tiny"), "{error}");
}

#[test]
fn names_and_hashes_that_would_lead_elsewhere_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let check = |answer: Value, kind: Kind, expect: &str| {
        let hub = MockHub::start(
            move |asked| {
                if is_listing(asked) { Answer::json(&answer) } else { Answer::of(200, CONTENT) }
            },
        );
        let source = Source::parse("me/tiny").unwrap();
        let download = Download { source, kind, local_dir: None, is_fresh: true };
        let error = format!("{:#}", fetch(&hub.client(home.path()), &download).unwrap_err());
        assert!(error.contains(expect), "no {expect:?} in: {error}");
        assert_eq!(hub.asked().len(), 1);
    };
    let of = |file: Value| json!({"sha": COMMIT, "siblings": [file]});
    for name in ["../../../evil", "/etc/evil", "a//b", "a/../b"] {
        check(of(small(name)), Kind::Dataset, name);
    }
    let mut file = large("model.safetensors");
    file["lfs"]["sha256"] = json!("../../../../evil");
    check(of(file), Kind::Model, "no hash of model.safetensors");
    check(json!({"sha": "../../evil", "siblings": []}), Kind::Model, "names no commit");
    check(of(large("pytorch_model.bin")), Kind::Model, "no *.safetensors");
    assert!(!home.path().join("evil").exists());
}
