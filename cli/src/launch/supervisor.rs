//! Starts the roles, waits, and stops all of them when one fails or the user asks.
//!
//! With restarts left, a generator that fails is started again by itself, as the trainers go on without it meanwhile. A
//! trainer cannot be replaced: all roles are stopped and started again, and go on from the last checkpoint.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ExitCode, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::role::{Role, RoleKind};
use crate::commands::stop::RESUMABLE;

const EVENT_CAPACITY: usize = 64;

/// The running roles of a launch.
pub(super) struct Supervisor {
    roles: Vec<Role>,
    /// Of the newest process of each role.
    pids: Vec<Pid>,
    /// Roles that have not exited.
    alive: Vec<bool>,
    logs: PathBuf,
    sender: SyncSender<Event>,
    events: Receiver<Event>,
    patience: Patience,
    restarts_left: usize,
}

/// How long to wait for roles that are to end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For trainers to finish their step and to write a checkpoint, after a signal.
    pub(super) save: Duration,
    /// For any role after SIGTERM, before SIGKILL.
    pub(super) grace: Duration,
}

enum Event {
    Exited { index: usize, pid: Pid, status: std::io::Result<ExitStatus> },
    Signal(i32),
}

/// Why a launch ended.
enum End {
    AllDone,
    /// The trainers have saved their state before the last step.
    Saved,
    Failed {
        index: usize,
        code: u8,
        reason: String,
    },
    Interrupted(i32),
}

impl Supervisor {
    /// Starts every role; its output goes to `logs/ROLE.log`, and prefixed to the terminal.
    pub(super) fn start(roles: Vec<Role>, logs: PathBuf, patience: Patience, max_restarts: usize) -> Result<Self> {
        std::fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
        let (sender, events) = sync_channel(EVENT_CAPACITY);
        forward_signals(sender.clone())?;
        let (pids, alive) = (Vec::new(), Vec::new());
        let mut supervisor = Self { roles, pids, alive, logs, sender, events, patience, restarts_left: max_restarts };
        supervisor.spawn_all()?;
        Ok(supervisor)
    }

    fn spawn_all(&mut self) -> Result<()> {
        (self.pids, self.alive) = (Vec::new(), Vec::new());
        for index in 0..self.roles.len() {
            match self.spawn(index) {
                Ok(pid) => {
                    self.pids.push(pid);
                    self.alive.push(true);
                }
                Err(error) => {
                    self.stop_all();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Waits for the run's end: trainers that all succeed, the first failure, or a signal. Leaves no process behind.
    pub(super) fn supervise(mut self) -> Result<ExitCode> {
        let mut end = self.wait_for_end();
        if let End::Interrupted(signal) = end {
            eprintln!("launch: the trainers finish their step and save; interrupt again to stop at once");
            end = self.wait_for_trainers(signal);
        }
        self.stop_all();
        Ok(match end {
            End::AllDone => ExitCode::SUCCESS,
            End::Saved => {
                eprintln!("launch stopped: a checkpoint is written, all roles are stopped. Start it again to go on.");
                ExitCode::from(RESUMABLE)
            }
            End::Failed { index, code, reason } => {
                eprintln!("launch failed: {} {reason}; all roles are stopped", self.roles[index]);
                ExitCode::from(code)
            }
            End::Interrupted(signal) => {
                eprintln!(
                    "launch interrupted; all roles are stopped. Start it again to go on from the last checkpoint."
                );
                ExitCode::from(128_u8.saturating_add(u8::try_from(signal).unwrap_or(0)))
            }
        })
    }

    fn spawn(&self, index: usize) -> Result<Pid> {
        let role = &self.roles[index];
        let failed = || format!("starting {role}");
        let mut child = role.command()?.spawn().with_context(failed)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).with_context(failed)?;
        let readers = [
            child.stdout.take().map(|output| Box::new(output) as Box<dyn Read + Send>),
            child.stderr.take().map(|output| Box::new(output) as Box<dyn Read + Send>),
        ];
        let path = self.logs.join(format!("{role}.log"));
        for output in readers.into_iter().flatten() {
            let log = File::options().create(true).append(true).open(&path).context(path.display().to_string())?;
            let prefix = role.to_string();
            thread::Builder::new().name(format!("{role} output")).spawn(move || tee(output, log, &prefix))?;
        }
        let sender = self.sender.clone();
        thread::Builder::new().name(format!("{role} exit")).spawn(move || wait_for(child, (index, pid), &sender))?;
        Ok(pid)
    }

    /// Starts again what has failed, if that may be; else says why the launch ends.
    fn restart(&mut self, index: usize, code: u8, reason: String) -> Option<End> {
        let role = &self.roles[index];
        let kind = role.kind;
        if self.restarts_left == 0 {
            return Some(End::Failed { index, code, reason });
        }
        self.restarts_left -= 1;
        let left = self.restarts_left;
        let outcome = if kind == RoleKind::Generator {
            eprintln!("launch: {role} {reason}; it is started again, restarts left: {left}");
            self.signal(Signal::KILL, |other| other == &self.roles[index]);
            self.spawn(index).map(|pid| (self.pids[index], self.alive[index]) = (pid, true))
        } else {
            eprintln!(
                "launch: {role} {reason}; all roles are started again, from the last checkpoint, restarts left: {left}"
            );
            if let Some(signal) = self.stop_all() {
                return Some(End::Interrupted(signal));
            }
            self.spawn_all()
        };
        outcome.err().map(|error| End::Failed { index, code: 1, reason: format!("cannot be started again: {error:#}") })
    }

    fn wait_for_end(&mut self) -> End {
        loop {
            match self.events.recv() {
                Ok(Event::Exited { index, pid, status }) => {
                    if !self.note_exit(index, pid) {
                        continue;
                    }
                    let end = match self.after_exit(index, status) {
                        Some(End::Failed { index, code, reason }) => self.restart(index, code, reason),
                        end => end,
                    };
                    if let Some(end) = end {
                        return end;
                    }
                }
                Ok(Event::Signal(signal)) => return End::Interrupted(signal),
                Err(_) => return End::Failed { index: 0, code: 1, reason: "is no longer watched".to_owned() },
            }
        }
    }

    /// Asks the trainers to save and to end, while the generators still serve the step that they are in.
    fn wait_for_trainers(&mut self, signal: i32) -> End {
        self.signal(Signal::TERM, |role| role.kind == RoleKind::Trainer);
        let deadline = Instant::now() + self.patience.save;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Exited { index, pid, status }) => {
                    if !self.note_exit(index, pid) {
                        continue;
                    }
                    match self.after_exit(index, status) {
                        Some(End::Failed { .. }) => return End::Interrupted(signal),
                        Some(end) => return end,
                        None => {}
                    }
                }
                Ok(Event::Signal(_)) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return End::Interrupted(signal);
                }
            }
        }
    }

    /// Whether the process is the newest of its role: others were replaced.
    fn note_exit(&mut self, index: usize, pid: Pid) -> bool {
        let is_newest = self.pids[index] == pid;
        self.alive[index] &= !is_newest;
        is_newest
    }

    fn after_exit(&self, index: usize, status: std::io::Result<ExitStatus>) -> Option<End> {
        use std::os::unix::process::ExitStatusExt;
        let failed = |code: u8, reason: String| Some(End::Failed { index, code, reason });
        let status = match status {
            Ok(status) => status,
            Err(error) => return failed(1, format!("cannot be waited for: {error}")),
        };
        match (status.code(), status.signal()) {
            (Some(code), _)
                if self.roles[index].kind == RoleKind::Trainer && [0, i32::from(RESUMABLE)].contains(&code) =>
            {
                let trainer_left =
                    self.roles.iter().zip(&self.alive).any(|(role, alive)| role.kind == RoleKind::Trainer && *alive);
                let end = if code == 0 { End::AllDone } else { End::Saved };
                (!trainer_left).then_some(end)
            }
            (Some(0), _) => failed(1, "stopped before the trainers were done".to_owned()),
            (Some(code), _) => failed(u8::try_from(code).unwrap_or(1), format!("exited with code {code}")),
            (None, Some(signal)) => failed(1, format!("was killed by signal {signal}")),
            (None, None) => failed(1, "ended for no known reason".to_owned()),
        }
    }

    /// SIGTERM to every group, SIGKILL to those still there after the grace or at a second signal, which is returned.
    fn stop_all(&mut self) -> Option<i32> {
        self.signal(Signal::TERM, |_| true);
        let deadline = Instant::now() + self.patience.grace;
        let mut interrupted = None;
        while self.alive.contains(&true) && interrupted.is_none() {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Exited { index, pid, .. }) => drop(self.note_exit(index, pid)),
                Ok(Event::Signal(signal)) => interrupted = Some(signal),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        // Also the groups of roles that are gone: what they started must not stay either.
        self.signal(Signal::KILL, |_| true);
        interrupted
    }

    fn signal(&self, signal: Signal, whom: impl Fn(&Role) -> bool) {
        for (role, &pid) in self.roles.iter().zip(&self.pids).filter(|(role, _)| whom(role)) {
            match kill_process_group(pid, signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => eprintln!("cannot signal {role}: {error}"),
            }
        }
    }
}

fn forward_signals(sender: SyncSender<Event>) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("listening for signals")?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever() {
            if sender.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

fn wait_for(mut child: Child, (index, pid): (usize, Pid), sender: &SyncSender<Event>) {
    let status = child.wait();
    // The supervisor is gone when the launch has ended, and then nobody needs to know.
    drop(sender.send(Event::Exited { index, pid, status }));
}

/// Copies lines to the log and, prefixed, to standard error.
fn tee(output: impl Read, mut log: File, prefix: &str) {
    for line in BufReader::new(output).split(b'\n') {
        let Ok(line) = line else { return };
        let line = String::from_utf8_lossy(&line);
        if let Err(error) = writeln!(log, "{line}") {
            eprintln!("[{prefix}] its log cannot be written: {error}");
            return;
        }
        eprintln!("[{prefix}] {line}");
    }
}
