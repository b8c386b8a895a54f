"""Ends of a run before its last step, other than errors: signals, hangs, a workdir in use."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import jax
from jax.experimental import multihost_utils

from affectgpt_jax.common.files import lock_file

# Seconds that a process which is ended for a hang may take to save.
RESCUE_S = 120.0
# Seconds beyond twice the limit, after which a process that does not even watch itself is ended.
LAST_RESORT_S = 60.0


class Stopped(SystemExit):
    """A signal has ended the run; the status is 128 plus the signal's number, as in a shell."""


class StopSignals:
    """Turns SIGTERM and SIGINT into a request to stop, which the loop follows after saving.

    The first signal is remembered; a second SIGINT ends the process at once. Several processes
    agree on the step at which they stop, whichever of them got the signal.

    Args:
        say: prints that a signal has come.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._calls, self._agreed = 0, False

    def reached(self) -> bool:
        """Whether to stop here. Of several processes, all must call it equally often."""
        if jax.process_count() == 1:
            return self._signal is not None
        self._calls += 1
        if not self._agreed:
            self._agreed = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._agreed

    def check(self) -> None:
        """Calls `reached`.

        Raises:
            Stopped: if so.
        """
        if self.reached():
            raise self.stopped()

    def stopped(self) -> Stopped:
        """The exception to raise once everything is saved."""
        return Stopped(128 + (self._signal or signal.SIGTERM))

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._signal is not None:
            # Not through Python's way out, which waits for threads.
            os.write(2, b"interrupted again: stopped at once; the newest checkpoint is whole\n")
            os._exit(128 + number)
        first, self._signal = self._signal is None, signal.Signals(number)
        if not first:
            return
        self._say(
            f"{self._signal.name}: the run ends as soon as it has saved; a second Ctrl-C ends it "
            "at once"
        )
        if number == signal.SIGINT and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # for JAX, which lets the processes agree

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        # JAX itself listens to SIGTERM where there are several processes.
        alone = jax.process_count() == 1
        for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


# The second process of a watchdog: a pipe says that the first still watches itself, and its end
# that nobody has to. Time in which either was suspended does not count.
_WATCHER = """
import os, select, signal, sys, time

signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to both
pid, wait_s = int(sys.argv[1]), float(sys.argv[2])
interval_s = min(wait_s / 8, 5)


def is_stopped():
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "tT"
    except OSError:  # it has just ended
        return True


silent_s, looked_s = 0, time.monotonic()
while silent_s <= wait_s and os.getppid() == pid:
    if select.select([0], [], [], interval_s)[0]:
        if not os.read(0, 4096):
            sys.exit()
        silent_s = 0
    now_s = time.monotonic()
    passed_s, looked_s = now_s - looked_s, now_s
    silent_s += passed_s
    if passed_s > 2 * interval_s or is_stopped():
        silent_s = 0
if os.getppid() == pid:
    os.write(2, b"error: the process no longer watches itself, since a thread keeps the "
        b"interpreter lock; it is ended, and the same command resumes from the newest "
        b"checkpoint\\n")
    os.kill(pid, signal.SIGKILL)
"""


class Watchdog:
    """Ends a process that makes no progress, after it has printed the stacks of all threads.

    Time in which the process was suspended does not count: after it, the count starts anew.

    A thread that never releases the interpreter lock stops the watch as well. So a second process
    watches whether this one still does, and ends it where it does not.

    Args:
        limit_s: the longest time in s between two calls of `beat`; 0 is no limit.
        tell: called with a sentence before the process ends.

    Attributes:
        rescue: called before that, in a thread of its own, for what can still be saved; says what
            it did. It may hang or raise, and has at most `RESCUE_S`.
    """

    def __init__(self, limit_s: float, tell: Callable[[str], None] = lambda sentence: None):
        self._limit_s, self._tell = limit_s, tell
        self._what, self._since_s = "the start", time.monotonic()
        self._done = threading.Event()
        self._ending = threading.Lock()
        self._watcher: subprocess.Popen[bytes] | None = None
        self.rescue: Callable[[], str] | None = None

    def beat(self, what: str) -> None:
        """Note progress, now at `what`; does not return once the process is being ended."""
        with self._ending:
            self._what, self._since_s = what, time.monotonic()

    def _watch(self) -> None:
        interval_s = min(self._limit_s / 4, 10.0)
        looked_s = time.monotonic()
        while not self._done.wait(interval_s):
            now_s = time.monotonic()
            if now_s - looked_s > 2 * interval_s:  # this process was suspended
                self._since_s = now_s
            looked_s = now_s
            self._put_off_last_resort()
            if now_s - self._since_s > self._limit_s:
                self._end()

    @property
    def _last_s(self) -> float:
        return 2 * self._limit_s + LAST_RESORT_S

    def _put_off_last_resort(self) -> None:
        """Let stacks be shown, and the second process end this one, so much later than now."""
        # This must not end the process: its clock does not stop while the process is suspended.
        if _has_descriptor(sys.__stderr__):
            faulthandler.dump_traceback_later(self._last_s, file=sys.__stderr__)
        with contextlib.suppress(OSError):  # it is gone, and this one goes on
            if self._watcher is not None:
                os.write(self._watcher.stdin.fileno(), b".")

    def _start_watcher(self) -> None:
        # Later than the stacks, which it cannot print.
        wait_s = self._last_s + min(10.0, self._last_s / 4)
        arguments = [sys.executable, "-I", "-S", "-c", _WATCHER, str(os.getpid()), str(wait_s)]
        # A run goes on without one, as where no further process may be started.
        with contextlib.suppress(OSError):
            self._watcher = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0
            )
            # This process never waits for the other, which may be suspended alone.
            os.set_blocking(self._watcher.stdin.fileno(), False)

    def _end(self) -> None:
        self._ending.acquire()  # never released: the run does not go on beside its rescue
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        sentence = (
            f"no progress for {self._limit_s:g} s since {self._what}, the stacks of all threads "
            "are above"
        )
        self._tell(sentence)
        print(
            f"error: {sentence}; {self._rescued()}; the same command resumes from the newest "
            "checkpoint. Where this takes so long by its nature, raise config.step_timeout",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _rescued(self) -> str:
        """What `rescue` says of itself, or why it says nothing."""
        said = []

        def run() -> None:
            try:
                said.append(self.rescue())
            except Exception as error:  # of whatever hangs
                said.append(f"it could not be saved ({_first_line(error)})")

        if self.rescue is None:
            return "nothing is saved now"
        thread = threading.Thread(target=run, name="rescue", daemon=True)
        thread.start()
        until_s = time.monotonic() + RESCUE_S
        while thread.is_alive() and (left_s := until_s - time.monotonic()) > 0:
            self._put_off_last_resort()
            thread.join(min(left_s, 1.0))
        return said[0] if said else f"it could not be saved within {RESCUE_S:g} s"

    def __enter__(self) -> Self:
        self.beat("the start of training")
        if self._limit_s:
            self._start_watcher()
            self._put_off_last_resort()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        if self._watcher is not None:
            self._watcher.stdin.close()
            self._watcher.kill()
            self._watcher.wait()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _has_descriptor(stream: object) -> bool:
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False


LOCK_FILE = "run.lock"


def lock_workdir(
    workdir: Path, say: Callable[[str], None] = print
) -> contextlib.AbstractContextManager[None]:
    """Keep other runs out of a workdir, which is made if it is not there.

    Raises:
        FileInUse: another run holds it; the message names its host and process.
        OSError: the workdir cannot be written to.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    advice = "wait for it, stop it, or name another --workdir"
    return lock_file(workdir / LOCK_FILE, str(workdir), advice, say)
