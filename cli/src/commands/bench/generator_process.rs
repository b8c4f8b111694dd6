//! A generator of a bench's own.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::launch::supervised;

/// Killed when it is dropped.
pub(super) struct GeneratorProcess(Child);

impl GeneratorProcess {
    pub(super) fn start(config: &Path, address: &str) -> Result<Self> {
        let mut command = own_binary()?;
        command.arg("generator").arg(config).args(["--listen", address]);
        Ok(Self(command.env("OMP_WAIT_POLICY", "PASSIVE").spawn().context("starting the generator")?))
    }

    pub(super) fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for GeneratorProcess {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            tracing::warn!("cannot stop the generator: {error}");
        }
    }
}

/// This program again, silent, for a process that does not outlive this one.
pub(super) fn own_binary() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("finding the aha binary")?);
    command.stdin(Stdio::null()).stdout(Stdio::null()).env(supervised::VARIABLE, std::process::id().to_string());
    Ok(command)
}

/// A loopback address that was free a moment ago.
pub(super) fn free_address() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr())?.to_string())
}
