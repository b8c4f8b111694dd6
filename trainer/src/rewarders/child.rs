//! A program that answers lines with lines. It is killed, with all that it started, when this is dropped.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use aha_core::config::TOKEN_VARIABLE;
use aha_nn::process::end_with_parent;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStdin, ChildStdout};

use super::failure::Failure;

/// Longest line that is read.
const MAX_LINE_BYTES: usize = 4 << 20;
/// For a program whose output has ended to end itself, so that its exit status can be told.
const LAST_WORDS: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub(super) struct Child {
    process: tokio::process::Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// Before that it may still be getting ready.
    pub(super) has_answered: bool,
}

impl Child {
    /// Starts a program with its arguments in a process group of its own. Its messages are added to `log`, or go to this
    /// process's standard error. Must be called within a runtime.
    pub(super) fn start(command: &[String], log: Option<&Path>) -> io::Result<Self> {
        use std::os::unix::process::CommandExt;
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut command = std::process::Command::new(program);
        command.args(arguments).env_remove(TOKEN_VARIABLE).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(log) = log {
            command.stderr(File::options().create(true).append(true).open(log)?);
        }
        end_with_parent(&mut command);
        let mut process = tokio::process::Command::from(command).kill_on_drop(true).spawn()?;
        let (stdin, stdout) = process.stdin.take().zip(process.stdout.take()).ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { process, stdin, stdout: BufReader::new(stdout), has_answered: false })
    }

    /// Sends a line and returns the one that comes back.
    pub(super) async fn exchange(&mut self, line: &str) -> Result<Vec<u8>, Failure> {
        let (stdin, stdout) = (&mut self.stdin, &mut self.stdout);
        let write = async {
            stdin.write_all(line.as_bytes()).await?;
            stdin.write_all(b"\n").await?;
            stdin.flush().await
        };
        let read = async {
            let mut answer = Vec::new();
            stdout.take(MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut answer).await?;
            Ok(answer)
        };
        // At once, because it may answer before it has read everything.
        match tokio::try_join!(write, read) {
            Ok(((), answer)) if answer.len() > MAX_LINE_BYTES => {
                Err(Failure::lied(format!("a line of more than {MAX_LINE_BYTES} bytes")))
            }
            Ok(((), answer)) if answer.ends_with(b"\n") => {
                self.has_answered = true;
                Ok(answer)
            }
            Ok(_) => Err(self.end(None).await),
            Err(error) => Err(self.end(Some(error)).await),
        }
    }

    async fn end(&mut self, error: Option<io::Error>) -> Failure {
        let reason = match tokio::time::timeout(LAST_WORDS, self.process.wait()).await {
            Ok(Ok(status)) => format!("it ended with {status}"),
            _ => error.map_or_else(|| "it closed its output".to_owned(), |error| error.to_string()),
        };
        Failure::gone(reason)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // None once it has been waited for: its number may be another process's by now.
        let group = self.process.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        if let Some(Err(error)) = group.map(|group| kill_process_group(group, Signal::KILL)) {
            tracing::debug!("cannot end a command: {error}");
        }
    }
}
