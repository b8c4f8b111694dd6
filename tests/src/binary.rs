//! Running the `aha` binary of this build.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The binary beside this test's own: `cargo test --workspace` builds it with the same profile.
///
/// # Panics
/// If it is not built.
#[must_use]
pub fn aha() -> PathBuf {
    let test = std::env::current_exe().expect("a test is a program");
    let profile = test.ancestors().nth(2).expect("tests lie in target/PROFILE/deps");
    let path = profile.join("aha");
    assert!(path.is_file(), "{} is not built: cargo build -p aha, in the profile of the tests", path.display());
    path
}

/// Runs `aha` in `folder` and returns what it said.
///
/// # Panics
/// If it cannot be started.
#[must_use]
pub fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(aha())
        .args(arguments)
        .current_dir(folder)
        .env("OMP_NUM_THREADS", "1")
        .stdin(std::process::Stdio::null())
        .output()
        .expect("aha starts")
}

/// Standard output and error of a run, for messages and searches.
#[must_use]
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs `aha` and expects it to fail with every one of `expect` in what it says.
///
/// # Panics
/// If it does not.
pub fn check_refused(folder: &Path, arguments: &[&str], expect: &[&str]) {
    let output = run(folder, arguments);
    let text = text(&output);
    assert!(!output.status.success(), "{arguments:?} succeeded: {text}");
    assert!(!text.contains("panicked"), "{arguments:?} panicked: {text}");
    for expect in expect {
        assert!(text.contains(expect), "no {expect:?} in what {arguments:?} says: {text}");
    }
}

/// Runs `aha` and expects success.
///
/// # Panics
/// If it fails.
pub fn check_runs(folder: &Path, arguments: &[&str]) -> String {
    let output = run(folder, arguments);
    assert!(output.status.success(), "{arguments:?} failed: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
