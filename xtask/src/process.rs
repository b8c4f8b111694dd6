//! Child processes: run, time, report.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;

/// How a stage ended, as this program's own exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Success,
    Failure(u8),
}

/// A stage that has run.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) name: &'static str,
    pub(crate) status: Status,
    pub(crate) elapsed: Duration,
}

/// Runs `command` on this terminal and waits for it.
///
/// # Errors
/// Only when it cannot be started; a failing exit code is a [`Status`].
pub(crate) fn run_stage(name: &'static str, command: &mut Command) -> anyhow::Result<Stage> {
    eprintln!("==> {name}");
    let start = Instant::now();
    let status = command.status().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    Ok(Stage { name, status: exit_code(status), elapsed: start.elapsed() })
}

/// Standard output of a short command, or `None` if it is missing or fails.
pub(crate) fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// `3m12s`, `4.2s`.
pub(crate) fn human(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    if seconds >= 60 {
        format!("{}m{:02}s", seconds / 60, seconds % 60)
    } else {
        format!("{:.1}s", elapsed.as_secs_f64())
    }
}

/// Death by signal N is reported as shells do: 128 + N.
fn exit_code(status: std::process::ExitStatus) -> Status {
    use std::os::unix::process::ExitStatusExt;
    if status.success() {
        return Status::Success;
    }
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Status::Failure(u8::try_from(code).unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_and_signals_come_through() {
        let status_of = |script| run_stage("test", Command::new("sh").args(["-c", script])).unwrap().status;
        assert_eq!(status_of("exit 0"), Status::Success);
        assert_eq!(status_of("exit 3"), Status::Failure(3));
        assert_eq!(status_of("kill -TERM $$"), Status::Failure(143));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = run_stage("test", &mut Command::new("no-such-program")).unwrap_err();
        assert!(error.to_string().contains("no-such-program"), "{error}");
        assert_eq!(output(&mut Command::new("no-such-program")), None);
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(human(Duration::from_millis(4230)), "4.2s");
        assert_eq!(human(Duration::from_secs(192)), "3m12s");
    }
}
