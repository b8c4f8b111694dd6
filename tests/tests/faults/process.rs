//! Processes of `aha`, and signals to them.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use aha_tests::binary::aha;

/// `aha` with its own log, ended with this.
pub(crate) struct Process {
    child: Child,
    log: std::path::PathBuf,
}

impl Process {
    /// `aha ARGUMENTS` in `folder`.
    pub(crate) fn start(folder: &Path, name: &str, arguments: &[&str], variables: &[(&str, String)]) -> Self {
        let log = folder.join(format!("{name}.log"));
        let file = std::fs::File::options().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new(aha());
        command.args(arguments).current_dir(folder).env("OMP_NUM_THREADS", "1");
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        let child = command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Self { child, log }
    }

    pub(crate) fn signal(&self, signal: &str) {
        send_signal(&self.child.id().to_string(), signal);
    }

    /// Whether it succeeded, and what it said; fails the test after `limit`.
    #[track_caller]
    pub(crate) fn wait(&mut self, limit: Duration) -> (bool, String) {
        let mut status = None;
        wait_until("the end of a process", limit, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        (status.unwrap().success(), self.said())
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already is no concern.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[track_caller]
pub(crate) fn send_signal(pid: &str, signal: &str) {
    assert!(Command::new("kill").args([signal, pid]).status().unwrap().success(), "kill {signal} {pid}");
}

#[track_caller]
pub(crate) fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come within {limit:?}");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// Below the ports that the system gives to others, from a place of this process's own, and no port twice.
pub(crate) fn free_address() -> String {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + (std::process::id() % 90) as u16 * 100;
    let mut ports = std::iter::repeat_with(|| first + TAKEN.fetch_add(1, Ordering::Relaxed));
    let free = ports.find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok()).unwrap();
    format!("127.0.0.1:{free}")
}
