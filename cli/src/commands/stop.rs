//! Ending a trainer early: signals ask for it, and an exit code says that the run can go on.

use std::process::ExitCode;

use aha_trainer::stop::{StopRequest, Stopped};
use aha_trainer::world::World;
use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The state is saved, and the run goes on when it is started again: `EX_TEMPFAIL` of sysexits.h.
pub(crate) const RESUMABLE: u8 = 75;

/// The first SIGTERM or SIGINT asks the run to stop; the second ends the process as it always does.
pub(super) fn stop_on_signals() -> Result<StopRequest> {
    let request = StopRequest::default();
    for signal in [SIGTERM, SIGINT] {
        // In this order: the signal that sets the flag does not yet find it set.
        flag::register_conditional_default(signal, request.flag())
            .and_then(|_| flag::register(signal, request.flag()))
            .context("listening for signals")?;
    }
    Ok(request)
}

/// Says how to go on.
pub(super) fn report_stop(stopped: &Stopped, world: &World) -> ExitCode {
    if world.is_main() {
        println!("{stopped}");
    }
    ExitCode::from(RESUMABLE)
}
