//! A whole run by mutual TLS and with a token, which is found nowhere afterwards.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aha_tests::binary::{aha, check_refused, text};
use aha_tests::small_run;
use rcgen::{CertificateParams, KeyPair};

const TOKEN: &str = "a-token-that-nobody-else-has";

/// Every file below `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Command lines of the processes that work in `folder`.
fn command_lines(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == folder))
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok())
        .collect()
}

/// A certificate of its own authority, for both sides of a run on loopback; returns the key.
fn write_certificate(folder: &Path) -> String {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(folder.join("cert.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(folder.join("key.pem"), key.serialize_pem()).unwrap();
    key.serialize_pem()
}

#[test]
fn s8_a_run_by_mutual_tls_leaves_its_secrets_nowhere() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().canonicalize().unwrap();
    small_run::write(&folder);
    let key = write_certificate(&folder);
    let files_of_tls = ["tls_cert=cert.pem", "tls_key=key.pem", "tls_ca=cert.pem"];
    let mut child = Command::new(aha())
        .args(["launch", "run.yaml", "--set", "train.max_steps=3", "--set", "logging.json_logs=true"])
        .args(files_of_tls.iter().flat_map(|file| ["--set".to_owned(), format!("security.{file}")]))
        .current_dir(&folder)
        .envs([("AHA_TOKEN", TOKEN), ("RUST_LOG", "trace"), ("OMP_NUM_THREADS", "1")])
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(folder.join("stdout")).unwrap())
        .stderr(std::fs::File::create(folder.join("stderr")).unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(180);
    let mut seen = Vec::new();
    let status = loop {
        seen.extend(command_lines(&folder));
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "the run did not end in time");
        std::thread::park_timeout(Duration::from_millis(50));
    };
    let said = std::fs::read_to_string(folder.join("stderr")).unwrap();
    assert!(status.success(), "{said}");
    assert!(seen.iter().any(|line| line.contains("\0generator\0")), "{seen:?}");
    assert!(!seen.iter().any(|line| line.contains(TOKEN)), "a command line has the token");

    // Base64 of the key, without the lines around it.
    let secrets = [TOKEN, key.lines().nth(1).unwrap()];
    let written: Vec<PathBuf> = files(&folder).into_iter().filter(|path| !path.ends_with("key.pem")).collect();
    assert!(written.iter().any(|path| path.ends_with("runs/small/config.yaml")), "{written:?}");
    let log = std::fs::read_to_string(folder.join("runs/small/logs/generator-0.log")).unwrap();
    assert!(log.contains("TRACE") && log.contains("peer=Server"), "the HTTP/2 library logs too: {log}");
    for role in ["generator-0", "trainer-0", "trainer-1"] {
        let log = std::fs::read_to_string(folder.join(format!("runs/small/logs/{role}.jsonl"))).unwrap();
        assert!(log.contains("\"level\":\"TRACE\""), "{role} logs all it can: {log}");
    }
    for path in written {
        let bytes = std::fs::read(&path).unwrap();
        for secret in secrets {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{} holds a secret", path.display());
        }
    }
}

#[test]
fn s9_a_generator_says_what_it_needs_beyond_loopback() {
    let folder = tempfile::tempdir().unwrap();
    small_run::write(folder.path());
    let beyond = ["generator", "run.yaml", "--listen", "0.0.0.0:0"];
    check_refused(folder.path(), &beyond, &["--listen: 0.0.0.0:0", "AHA_TOKEN", "security.insecure: true"]);
    let output = Command::new(aha())
        .args(["launch", "run.yaml", "--set", "security.token_file=absent", "--set", "security.tls_key=gone"])
        .current_dir(folder.path())
        .env("AHA_TOKEN", "short but secret")
        .output()
        .unwrap();
    let said = text(&output);
    for expect in [
        "security.token_file: absent: no such file",
        "security.tls_key: gone",
        "security.tls_cert: missing",
        "AHA_TOKEN: ",
    ] {
        assert!(said.contains(expect), "no {expect:?} in: {said}");
    }
    assert!(!output.status.success() && !said.contains("short but secret"), "{said}");
    assert!(!folder.path().join("runs").exists(), "a refused run wrote a folder");
}
