"""Child processes with a time limit, and the time that is left for all of them."""

import os
import signal
import subprocess
import time


class Clock:
    def __init__(self, seconds):
        self.start, self.seconds = time.monotonic(), seconds

    def spent(self):
        return time.monotonic() - self.start

    def is_over(self):
        # Less than this is not worth starting a process for.
        return self.seconds - self.spent() < 5

    def limit(self, seconds):
        return max(1, min(seconds, self.seconds - self.spent()))


class Child:
    """A program in a process group of its own, with its output in a file."""

    def __init__(self, process, log):
        self.process, self.log, self.started = process, log, time.monotonic()
        self.timed_out = False

    def wait(self, limit):
        """Waits at most `limit` seconds; what is not done by then is killed, with all that it started."""
        try:
            self.process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            self.timed_out, self.limit = True, limit
            stop(self)
        self.seconds = time.monotonic() - self.started
        self.output = self.log.read_text(errors="replace")
        self.succeeded = self.process.returncode == 0 and not self.timed_out
        return self

    def verdict(self):
        if self.timed_out:
            return f"not done after {self.limit:.0f} s"
        code = self.process.returncode
        if code == 0:
            return ""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        failed = [line.split()[1].split("::")[-1] for line in self.output.splitlines() if line.endswith("... FAILED")]
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        return f"exit code {code}" + (f": {', '.join(failed[:3])}{more}" if failed else "")


def start(command, log, environment):
    with open(log, "w") as output:
        output.write("$ " + " ".join(map(str, command)) + "\n")
        output.flush()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Child(process, log)


def stop(child):
    """Ends a child and all of its group, first kindly."""
    for kind, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
        try:
            os.killpg(child.process.pid, kind)
            child.process.wait(timeout=patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        break


def tail(text, lines):
    return "\n".join(text.splitlines()[-lines:])
