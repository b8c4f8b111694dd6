//! One child process of a launch.

use std::fmt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::supervised;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RoleKind {
    Generator,
    Trainer,
}

/// What a child is and how it is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Role {
    pub(super) kind: RoleKind,
    pub(super) index: usize,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
}

impl Role {
    pub(super) fn new(kind: RoleKind, index: usize, arguments: Vec<String>) -> Self {
        // A pool of OpenMP threads that spins while it waits takes the cores from the other roles.
        let environment = vec![("OMP_WAIT_POLICY", "PASSIVE".to_owned())];
        Self { kind, index, arguments, environment }
    }

    /// Adds torchrun's variables; `master` is `host:port`.
    pub(super) fn with_world(mut self, rank: usize, size: usize, master: &str) -> Self {
        let (host, port) = master.rsplit_once(':').unwrap_or((master, "0"));
        self.environment.extend([
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("WORLD_SIZE", size.to_string()),
            ("LOCAL_WORLD_SIZE", size.to_string()),
            ("MASTER_ADDR", host.to_owned()),
            ("MASTER_PORT", port.to_owned()),
        ]);
        self
    }

    /// Lets it see one GPU alone.
    pub(super) fn with_gpu(mut self, gpu: &str) -> Self {
        self.environment.push((super::GPUS_VARIABLE, gpu.to_owned()));
        self
    }

    /// Rank 0 talks to the user: it inherits the terminal, for progress bars and colours.
    pub(super) fn owns_terminal(&self) -> bool {
        self.kind == RoleKind::Trainer && self.index == 0
    }

    /// What it is started with, after the binary's name.
    pub(super) fn arguments(&self) -> &[String] {
        &self.arguments
    }

    /// The variables that it gets beside those of the launch.
    pub(super) fn environment(&self) -> &[(&'static str, String)] {
        &self.environment
    }

    /// The command that starts it, in a process group of its own.
    pub(super) fn command(&self) -> Result<Command> {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(std::env::current_exe().context("finding the aha binary")?);
        command.args(&self.arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.env(supervised::VARIABLE, std::process::id().to_string());
        command.stdin(Stdio::null()).process_group(0);
        if !self.owns_terminal() {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        Ok(command)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            RoleKind::Generator => "generator",
            RoleKind::Trainer => "trainer",
        };
        write!(f, "{kind}-{}", self.index)
    }
}

#[cfg(test)]
mod tests {
    use aha_trainer::world::World;

    use super::*;

    #[test]
    fn a_rank_is_told_that_all_are_on_its_machine() {
        let role = Role::new(RoleKind::Trainer, 1, Vec::new()).with_world(1, 2, "127.0.0.1:29500");
        let variables = role.environment.into_iter().map(|(name, value)| (name.to_owned(), value));
        let world = World::from_variables(variables).unwrap();
        assert_eq!((world.rank, world.local_rank, world.size, world.local_size), (1, 1, 2, Some(2)));
        assert_eq!((world.master_addr.as_str(), world.master_port), ("127.0.0.1", 29500));
    }
}
