//! What has to be on the machine before anything can be built.

use std::env;
use std::fmt::Write as _;
use std::process::Command;

use anyhow::bail;

use crate::process::output;

/// Python versions that wheels of libtorch's version exist for.
const PYTHONS: std::ops::RangeInclusive<Version> = Version(3, 10)..=Version(3, 14);

/// Looked for in this order: the machine's default first.
const PYTHON_NAMES: [&str; 6] = ["python3", "python3.14", "python3.13", "python3.12", "python3.11", "python3.10"];

/// Major and minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

/// Checks the compilers and prints what was found.
///
/// # Errors
/// Lists everything that is missing, each with the command that installs it.
pub(crate) fn check_compilers() -> anyhow::Result<()> {
    report(vec![rustc(), cxx()])
}

/// A Python that can install wheels, needed only to fetch libtorch: the program's name.
pub(crate) fn find_python() -> anyhow::Result<&'static str> {
    let mut seen = Vec::new();
    for name in PYTHON_NAMES {
        let Some(version) = output(Command::new(name).arg("--version")) else { continue };
        if !Version::parse(&version).is_some_and(|version| PYTHONS.contains(&version)) {
            seen.push(format!("{name} is {version}"));
        } else if let Some(pip) = output(Command::new(name).args(["-m", "pip", "--version"])) {
            let pip = pip.split(" from ").next().unwrap_or_default();
            eprintln!("  {version}, {pip}");
            return Ok(name);
        } else {
            seen.push(format!("{name} ({version}) has no pip"));
        }
    }
    let Version(major, oldest) = *PYTHONS.start();
    let seen = if seen.is_empty() { "no python3 on PATH".to_owned() } else { seen.join(", ") };
    bail!(
        "fetching libtorch needs Python {major}.{oldest} to {major}.{} with pip: {seen}\n  {}",
        PYTHONS.end().1,
        install_hint("python3 python3-pip python3-venv", "python3 python3-pip")
    )
}

fn rustc() -> Result<String, String> {
    let needed = env!("CARGO_PKG_RUST_VERSION");
    let update = "install it from https://rustup.rs, or run `rustup update stable`";
    let program = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let found = output(Command::new(program).arg("--version")).ok_or(format!("no rustc on PATH: {update}"))?;
    if Version::parse(&found) < Version::parse(needed) {
        return Err(format!("{found} is too old, {needed} is needed: {update}"));
    }
    Ok(found)
}

fn cxx() -> Result<String, String> {
    // The same choice that the `cc` crate makes.
    let programs = env::var("CXX").map_or_else(|_| vec!["c++".to_owned()], |cxx| vec![cxx]);
    let found = programs.iter().find_map(|program| output(Command::new(program).arg("--version")));
    let missing = || format!("no C++ compiler ({}): {}", programs.join(", "), install_hint("g++", "gcc-c++"));
    found.and_then(|version| version.lines().next().map(str::to_owned)).ok_or_else(missing)
}

fn report(checks: Vec<Result<String, String>>) -> anyhow::Result<()> {
    let mut problems = String::new();
    for check in checks {
        match check {
            Ok(found) => eprintln!("  {found}"),
            Err(problem) => write!(problems, "\n  {problem}")?,
        }
    }
    if !problems.is_empty() {
        bail!("this machine cannot build aha yet:{problems}");
    }
    Ok(())
}

/// The command that installs packages, with the names of Debian's and of Fedora's family.
fn install_hint(debian: &str, fedora: &str) -> String {
    let has = |program: &str| output(Command::new(program).arg("--version")).is_some();
    if has("apt-get") {
        format!("sudo apt-get install {debian}")
    } else if has("dnf") {
        format!("sudo dnf install {fedora}")
    } else {
        format!("install {debian} (Debian's names) with the package manager of this system")
    }
}

impl Version {
    /// The first `N.M` in a text such as `rustc 1.95.0 (59807616e 2026-04-14)`.
    fn parse(text: &str) -> Option<Self> {
        text.split_whitespace().find_map(|word| {
            let mut parts = word.split('.');
            Some(Self(parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_print() {
        assert_eq!(Version::parse("rustc 1.95.0 (59807616e 2026-04-14)"), Some(Version(1, 95)));
        assert_eq!(Version::parse("Python 3.11.7"), Some(Version(3, 11)));
        assert_eq!(Version::parse("1.90"), Some(Version(1, 90)));
        assert_eq!(Version::parse("none"), None);
        assert!(Version(3, 9) < Version(3, 10));
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let error = report(vec![Err("no rustc".into()), Ok("c++".into()), Err("no python".into())]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("no rustc") && text.contains("no python"), "{text}");
    }
}
