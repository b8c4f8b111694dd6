//! Processes that are not to outlive this one.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Has the kernel kill what `command` starts when the thread that starts it ends, and with that when this process does,
/// however it ends.
pub fn end_with_parent(command: &mut Command) -> &mut Command {
    let parent = std::process::id();
    let follow = move || {
        // SAFETY: takes two numbers, and touches no memory.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: takes nothing, and touches no memory.
        let is_orphan = unsafe { libc::getppid() }.unsigned_abs() != parent;
        // It may have ended before that took hold.
        if is_orphan { Err(io::Error::from_raw_os_error(libc::ESRCH)) } else { Ok(()) }
    };
    // SAFETY: between fork and exec it makes system calls alone; no lock is taken and no memory.
    unsafe { command.pre_exec(follow) }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_process_ends_with_the_thread_that_started_it() {
        let start = || {
            let mut command = Command::new("sleep");
            end_with_parent(command.arg("600").stdout(Stdio::piped())).spawn().unwrap()
        };
        let mut child = std::thread::spawn(start).join().unwrap();
        // Open as long as the process lives.
        assert_eq!(child.stdout.take().unwrap().read(&mut [0]).unwrap(), 0);
        assert!(!child.wait().unwrap().success());
    }
}
