//! The child's side of `aha launch`: it never outlives its parent.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// Process id of the launcher, set for every child.
pub(crate) const VARIABLE: &str = "AHA_LAUNCHER_PID";

/// Asks the kernel to kill this process when its launcher dies, however it dies. Does nothing without a launcher.
pub(crate) fn follow_parent() -> Result<()> {
    let Ok(launcher) = std::env::var(VARIABLE) else { return Ok(()) };
    set_parent_process_death_signal(Some(Signal::KILL)).context("asking to end with the launcher")?;
    // The launcher may have died before that took hold.
    if getppid().map(Pid::as_raw_nonzero).is_none_or(|parent| parent.to_string() != launcher) {
        bail!("the launcher {launcher} is gone");
    }
    Ok(())
}
