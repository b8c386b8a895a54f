"""Signals, the watchdog and the lock, in processes that do nothing else."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from affectgpt_jax.common.files import FileInUse
from affectgpt_jax.training.stopping import (
    LOCK_FILE,
    Stopped,
    StopSignals,
    Watchdog,
    lock_workdir,
)


def python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_wish_until_the_loop_asks(number):
    said, before = [], signal.getsignal(number)
    with StopSignals(said.append) as stop:
        assert not stop.reached()
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.reached()
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.code == 128 + number
    assert said == [
        f"{number.name}: the run ends as soon as it has saved; a second Ctrl-C ends it at once"
    ]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_interrupt_ends_the_process_at_once(first):
    code = """
import time
from affectgpt_jax.training.stopping import StopSignals
with StopSignals(lambda text: print(text, flush=True)):
    print("ready", flush=True)
    while True:  # a step that never ends
        time.sleep(0.01)
"""
    with python(code) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[first])
        assert process.stdout.readline().startswith(f"{first}: the run ends as soon as it has sav")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert "stopped at once" in process.stderr.read()


# --- The watchdog ---------------------------------------------------------------------------------

HANG = """
import sys, threading
from affectgpt_jax.training.stopping import Watchdog

def stuck_in_here(event):
    event.wait()

event = threading.Event()
threading.Thread(target=stuck_in_here, args=[event], daemon=True).start()
with Watchdog(0.5, lambda sentence: print("told:", sentence, flush=True)) as watchdog:
    watchdog.beat("step 7")
    event.wait()
"""


def test_a_hang_shows_all_stacks_and_ends_the_process():
    with python(HANG) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.startswith("told: no progress for 0.5 s since step 7")
    assert err.count("most recent call first") >= 3
    assert "stuck_in_here" in err
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "no progress for 0.5 s since step 7" in sentence
    assert "raise config.step_timeout" in sentence


def test_a_process_that_goes_on_is_left_alone(monkeypatch):
    def bite(self):
        raise AssertionError("it bit")

    monkeypatch.setattr(Watchdog, "_end", bite)
    now = [0.0]
    monkeypatch.setattr("affectgpt_jax.training.stopping.time.monotonic", lambda: now[0])
    watchdog = Watchdog(10.0)
    ticks = iter(range(100))

    def tick(interval_s):
        now[0] += interval_s
        if (count := next(ticks)) % 3 == 0:
            watchdog.beat(f"step {count}")
        return count > 30

    monkeypatch.setattr(watchdog._done, "wait", tick)
    watchdog._watch()
    assert now[0] > 70


KEEPS_THE_LOCK = """
import ctypes
from affectgpt_jax.training import stopping

stopping.LAST_RESORT_S = 1
with stopping.Watchdog(1.0):
    print("watching", flush=True)
    ctypes.PyDLL(None).sleep(1000)  # a function of C that keeps the interpreter lock
"""


def test_a_hang_that_keeps_the_interpreter_lock_ends_the_process():
    with python(KEEPS_THE_LOCK) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "Timeout" in err and "in <module>" in err, "its stacks"
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "keeps the interpreter lock" in sentence and "the same command resumes" in sentence


def test_a_suspension_is_no_such_hang():
    with python(KEEPS_THE_LOCK.replace("ctypes.PyDLL(None).sleep(1000)", "input()")) as process:
        assert process.stdout.readline() == "watching\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)  # the watcher, which is not suspended, waits for 3.75 s
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        assert process.poll() is None


RESCUE = """
import sys, threading
from affectgpt_jax.training import stopping

def fails():
    raise RuntimeError("Array has been deleted")

def saves():
    threading.Thread(target=lambda: print(watchdog.beat("step 8"), flush=True), daemon=True).start()
    event.wait(0.3)
    return "step 7 is saved"

stopping.RESCUE_S = 0.5
event = threading.Event()
with stopping.Watchdog(0.5) as watchdog:
    watchdog.rescue = {"hangs": event.wait, "fails": fails, "saves": saves}[sys.argv[1]]
    watchdog.beat("step 7")
    event.wait()
"""


def test_what_can_still_be_saved_is_saved_before_a_hang_ends_the_process():
    for kind, words in (
        ("saves", "are above; step 7 is saved; the same command resumes"),
        ("fails", "it could not be saved (Array has been deleted); the same"),
        ("hangs", "it could not be saved within 0.5 s; the same command"),
    ):
        with python(RESCUE, kind) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert words in err
        assert "None" not in out, "the run went on while it was saved"


def test_time_in_which_a_process_was_suspended_is_no_lack_of_progress(monkeypatch):
    """Of a limit of 10 s, 7.5 s have passed when the process is suspended for 5 s."""
    now, bitten = [0.0], []
    monkeypatch.setattr("affectgpt_jax.training.stopping.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Watchdog, "_end", lambda self: bitten.append(now[0]))
    watchdog = Watchdog(10.0)

    def tick(interval_s):
        now[0] += interval_s + (5.0 if now[0] == 7.5 else 0.0)
        return bool(bitten)

    monkeypatch.setattr(watchdog._done, "wait", tick)
    watchdog._watch()
    assert bitten == [15.0 + 12.5]


def test_a_process_that_was_suspended_goes_on_when_it_wakes():
    code = """
import faulthandler, sys
from affectgpt_jax.training.stopping import Watchdog
later = faulthandler.dump_traceback_later
# The last resort comes after the pause, too.
faulthandler.dump_traceback_later = lambda wait_s, **how: later(wait_s / 32, **how)
with Watchdog(2.0):
    print("watching", flush=True)
    sys.stdin.readline()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "watching\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    # Long enough for the watchdog to look, and within its limit.
    time.sleep(0.8)
    _, said = process.communicate("\n", timeout=60)
    assert process.returncode == 0 and "error" not in said


def test_no_limit_is_no_watch():
    with Watchdog(0.0) as watchdog:
        assert not [t for t in threading.enumerate() if t.name == "watchdog"]
        watchdog.beat("anything")


# --- The lock -------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from affectgpt_jax.training.stopping import lock_workdir
with lock_workdir(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_by_host_and_process_until_the_first_is_gone(tmp_path):
    with python(HOLD, tmp_path / "run") as first:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(FileInUse) as error:
            with lock_workdir(tmp_path / "run"):
                raise AssertionError("two at once")
        assert re.fullmatch(
            rf"{tmp_path}/run is in use by process {first.pid} on {socket.gethostname()}, since "
            r"[-\d]+ [:\d]+; wait for it, stop it, or name another --workdir",
            str(error.value),
        )
        first.kill()
        first.wait()
        with lock_workdir(tmp_path / "run"):
            holder = json.loads((tmp_path / "run" / LOCK_FILE).read_text())
    assert holder["pid"] == os.getpid()
