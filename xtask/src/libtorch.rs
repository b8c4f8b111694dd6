//! libtorch, as PyPI's torch wheel ships it: fetched once into `.libtorch/`, where `.cargo/config.toml` points.
//!
//! The wheels find each other's shared libraries by relative RPATH, so the folder is all there is to it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail, ensure};

use crate::process::{human, output};
use crate::toolchain;
use crate::workspace::Workspace;

/// What the `tch` crate of this workspace binds.
const TORCH_VERSION: &str = "2.11.0";
/// A caller's own libtorch may be another patch release.
const TORCH_SERIES: &str = "2.11.";
/// Holds the version once everything is in place.
const STAMP: &str = "aha-torch-version";
/// Wheels and unpacked files lie side by side while pip works.
const INSTALL_BYTES: u64 = 6 << 30;

/// Makes the machine ready for `cargo build`. Does nothing, at once, where that is already so.
///
/// `dir` replaces `.libtorch/`; `force` fetches even a complete libtorch again.
pub(crate) fn setup(workspace: &Workspace, dir: Option<&Path>, force: bool) -> anyhow::Result<()> {
    eprintln!("==> set-up");
    toolchain::check_compilers()?;
    let default_dir = workspace.path(".libtorch");
    if dir.is_none() {
        if env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
            return check_python_torch();
        }
        // Cargo hands its own `[env]` value on to xtask: only another value is the caller's.
        if let Some(own) = env::var_os("LIBTORCH").map(PathBuf::from).filter(|own| *own != default_dir.join("torch")) {
            return check_own(&own);
        }
    }
    let dir = dir.unwrap_or(&default_dir);
    if !force && is_complete(dir)? {
        eprintln!("  libtorch {TORCH_VERSION} in {}", dir.display());
        return Ok(());
    }
    check_platform()?;
    install(toolchain::find_python()?, dir)
}

/// Whether `dir` holds all of libtorch. A folder that pip filled without our help is adopted if its files are all there.
fn is_complete(dir: &Path) -> anyhow::Result<bool> {
    let stamp = dir.join(STAMP);
    if let Ok(version) = fs::read_to_string(&stamp) {
        return Ok(version.trim() == TORCH_VERSION && dir.join("torch/lib/libtorch_cpu.so").exists());
    }
    let record = dir.join(format!("torch-{TORCH_VERSION}.dist-info/RECORD"));
    let Ok(record) = fs::read_to_string(record) else { return Ok(false) };
    let mut files = record.lines().filter_map(|line| line.split(',').next()).filter(|file| file.starts_with("torch/"));
    let complete = files.all(|file| file.contains("__pycache__") || dir.join(file).exists());
    if complete {
        fs::write(&stamp, TORCH_VERSION).with_context(|| format!("cannot write {}", stamp.display()))?;
    }
    Ok(complete)
}

/// Installs beside `dir` and renames at the end, so that an interrupted installation never looks whole.
fn install(python: &str, dir: &Path) -> anyhow::Result<()> {
    let start = Instant::now();
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = dir.file_name().context("the libtorch folder needs a name")?.to_string_lossy().into_owned();
    remove_leftovers(parent, &name)?;
    check_space(parent)?;

    let partial = parent.join(format!("{name}.partial-{}", std::process::id()));
    let temporary = partial.join("tmp");
    fs::create_dir_all(&temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
    eprintln!("  fetching torch {TORCH_VERSION} and the libraries it needs into {} (a minute or two)", dir.display());
    let packages = partial.join("packages");
    let status = Command::new(python)
        .args(["-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-compile", "--target"])
        .arg(&packages)
        .arg(format!("torch=={TORCH_VERSION}"))
        // On the same file system, so that pip renames 4 GB instead of copying them.
        .env("TMPDIR", std::path::absolute(&temporary)?)
        // A pip.conf that prefers user installations contradicts --target.
        .env("PIP_USER", "0")
        // The warning is about the system's Python, which --target leaves alone.
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .status()
        .with_context(|| format!("cannot start {python}"))?;
    if !status.success() {
        remove_dir(&partial)?;
        bail!(
            "pip could not install torch=={TORCH_VERSION} (its message is above); check the network and the proxy \
             settings, then run `cargo xtask setup` again, or set LIBTORCH to a libtorch {TORCH_SERIES}x folder"
        );
    }
    fs::write(packages.join(STAMP), TORCH_VERSION)?;
    ensure!(is_complete(&packages)?, "pip succeeded, but {} is not a libtorch", packages.display());
    if dir.exists() {
        remove_dir(dir)?;
    }
    fs::rename(&packages, dir).with_context(|| format!("cannot move libtorch to {}", dir.display()))?;
    remove_dir(&partial)?;
    eprintln!("  libtorch {TORCH_VERSION} in {} after {}", dir.display(), human(start.elapsed()));
    Ok(())
}

/// Removes what interrupted installations left, unless the process that is named in the folder still runs.
fn remove_leftovers(parent: &Path, name: &str) -> anyhow::Result<()> {
    let prefix = format!("{name}.partial-");
    for entry in fs::read_dir(parent).with_context(|| format!("cannot list {}", parent.display()))? {
        let entry = entry?;
        let file_name = entry.file_name();
        let Some(pid) = file_name.to_str().and_then(|name| name.strip_prefix(&prefix)) else { continue };
        ensure!(
            !Path::new("/proc").join(pid).exists(),
            "process {pid} is installing into {} right now: wait for it, or remove that folder",
            entry.path().display()
        );
        remove_dir(&entry.path())?;
    }
    Ok(())
}

fn remove_dir(dir: &Path) -> anyhow::Result<()> {
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}

fn check_platform() -> anyhow::Result<()> {
    let (os, arch) = (env::consts::OS, env::consts::ARCH);
    ensure!(
        os == "linux" && matches!(arch, "x86_64" | "aarch64"),
        "aha fetches libtorch for Linux on x86_64 and aarch64; on {os} {arch}, install PyTorch {TORCH_SERIES}x yourself \
         and set LIBTORCH_USE_PYTORCH=1, or set LIBTORCH to its folder"
    );
    Ok(())
}

fn check_space(parent: &Path) -> anyhow::Result<()> {
    let Some(free) = output(Command::new("df").arg("-Pk").arg(parent)).as_deref().and_then(parse_df) else {
        eprintln!("  cannot tell how much space is free: about {} GB are needed", INSTALL_BYTES >> 30);
        return Ok(());
    };
    ensure!(
        free >= INSTALL_BYTES,
        "libtorch needs about {} GB while it installs, {} has {:.1} GB free",
        INSTALL_BYTES >> 30,
        parent.display(),
        free as f64 / f64::from(1 << 30)
    );
    Ok(())
}

/// Free bytes out of what `df -Pk DIR` prints.
fn parse_df(text: &str) -> Option<u64> {
    let kilobytes: u64 = text.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// The caller's `LIBTORCH`: used as it is, if its version fits.
fn check_own(dir: &Path) -> anyhow::Result<()> {
    ensure!(dir.join("lib").is_dir(), "LIBTORCH is {}, which has no lib folder", dir.display());
    // libtorch archives carry `build-version`, wheels `version.py`.
    let version = fs::read_to_string(dir.join("build-version")).ok().or_else(|| {
        let python = fs::read_to_string(dir.join("version.py")).ok()?;
        let line = python.lines().find(|line| line.starts_with("__version__"))?;
        Some(line.split(['\'', '"']).nth(1)?.to_owned())
    });
    let version = version.with_context(|| format!("LIBTORCH is {}, which does not tell its version", dir.display()))?;
    check_series(version.trim(), &format!("LIBTORCH is {}", dir.display()))
}

/// The caller's `LIBTORCH_USE_PYTORCH`: the PyTorch that Python imports.
fn check_python_torch() -> anyhow::Result<()> {
    // The same choice that torch-sys makes.
    let python = if env::var_os("VIRTUAL_ENV").is_some() { "python" } else { "python3" };
    let version = output(Command::new(python).args(["-c", "import torch; print(torch.__version__)"]))
        .with_context(|| format!("LIBTORCH_USE_PYTORCH is set, but {python} cannot import torch"))?;
    check_series(&version, &format!("LIBTORCH_USE_PYTORCH is set, {python} has PyTorch"))
}

fn check_series(version: &str, what: &str) -> anyhow::Result<()> {
    ensure!(version.starts_with(TORCH_SERIES), "{what} of version {version}: aha needs {TORCH_SERIES}x");
    eprintln!("  {what} of version {version}: used as it is, nothing fetched");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_space_is_read_from_df() {
        let text = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/vda 100 40 60 40% /";
        assert_eq!(parse_df(text), Some(60 * 1024));
        assert_eq!(parse_df("df: no such folder"), None);
    }

    #[test]
    fn a_folder_counts_once_every_file_is_there() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_complete(dir.path()).unwrap());
        fs::create_dir_all(dir.path().join("torch-2.11.0.dist-info")).unwrap();
        fs::create_dir_all(dir.path().join("torch/lib")).unwrap();
        let record = "torch/lib/libtorch_cpu.so,sha256=x,1\ntorch/lib/libc10.so,sha256=y,1\n../bin/torchrun,,\n";
        fs::write(dir.path().join("torch-2.11.0.dist-info/RECORD"), record).unwrap();
        fs::write(dir.path().join("torch/lib/libtorch_cpu.so"), "").unwrap();
        assert!(!is_complete(dir.path()).unwrap());
        fs::write(dir.path().join("torch/lib/libc10.so"), "").unwrap();
        assert!(is_complete(dir.path()).unwrap());
        assert_eq!(fs::read_to_string(dir.path().join(STAMP)).unwrap(), TORCH_VERSION);
        fs::write(dir.path().join(STAMP), "2.10.0").unwrap();
        assert!(!is_complete(dir.path()).unwrap());
    }

    #[test]
    fn leftovers_go_unless_their_process_lives() {
        let dir = tempfile::tempdir().unwrap();
        // Above the largest process id that Linux hands out.
        let dead = dir.path().join(".libtorch.partial-4194999");
        fs::create_dir_all(dead.join("tmp")).unwrap();
        remove_leftovers(dir.path(), ".libtorch").unwrap();
        assert!(!dead.exists());
        let alive = dir.path().join(format!(".libtorch.partial-{}", std::process::id()));
        fs::create_dir_all(&alive).unwrap();
        assert!(remove_leftovers(dir.path(), ".libtorch").is_err());
        assert!(alive.exists());
    }

    #[test]
    fn an_own_libtorch_is_checked_for_its_version() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check_own(dir.path()).is_err());
        fs::create_dir(dir.path().join("lib")).unwrap();
        assert!(check_own(dir.path()).is_err());
        fs::write(dir.path().join("version.py"), "__all__ = []\n__version__ = '2.11.0+cu130'\n").unwrap();
        check_own(dir.path()).unwrap();
        fs::write(dir.path().join("build-version"), "2.9.1+cpu\n").unwrap();
        assert!(check_own(dir.path()).unwrap_err().to_string().contains("2.9.1"));
    }
}
