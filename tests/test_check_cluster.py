"""The check of a cluster: real processes on this machine, and what is made of their speeds."""

import contextlib
import functools
import os
import queue
import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from affectgpt_jax import check_cluster
from affectgpt_jax.training import distributed
from affectgpt_jax.training.distributed import LaunchError

# Speeds of processes that share two cores say nothing, so none is too slow.
SMALL = ("--max_mib=1", "--slowest=0")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(numbers, processes, *flags, program=("-m", "affectgpt_jax.check_cluster"), port=None):
    """Some processes of a run of so many; they are killed at the end."""
    port = port or free_port()
    common = [
        f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={processes}",
        *SMALL,
        *flags,
    ]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "4"}
    running = [
        subprocess.Popen(
            [sys.executable, *program, *common, f"--process_id={number}"],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in numbers
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def finish(process):
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


# --- Processes that find each other ---------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_find_each_other_are_called_and_measured(count):
    with started(range(count), count) as running:
        results = [finish(process) for process in running]
    assert [code for code, _, _ in results] == [0] * count, results
    said = results[0][1]
    for number in range(count):
        assert f"process {number} of {count} on {socket.gethostname()}" in said
    for size in ("4 KiB", "32 KiB", "256 KiB"):
        assert re.search(rf"all-reduce of +{size}: +[\d.]+ ms, +[\d.]+ GB/s", said)
    assert "2 MiB" not in said, "larger than --max_mib"
    assert f"ok: {count} processes, {count} devices" in said
    assert all("all-reduce" not in output for _, output, _ in results[1:])


def test_one_process_checks_its_own_devices():
    code = "import jax; jax.config.update('jax_num_cpu_devices', 3)\n"
    code += f"from affectgpt_jax import check_cluster; check_cluster.main({list(SMALL)})"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "8"}
    said = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert said.count("all-reduce of") == 3
    assert "ok: 1 processes, 3 devices" in said


# --- Processes that do not ------------------------------------------------------------------------


def test_a_process_that_does_not_come_is_named():
    with started([0, 1], 3, "--join_timeout=8") as running:
        (code, _, errors), (other_code, _, other_errors) = map(finish, running)
    assert code == other_code == 1
    assert "for 3 processes, but 2 did not come" in errors
    assert "2 did not come" in other_errors


def test_an_address_where_nobody_listens_is_named():
    port = free_port()
    with started([1], 2, "--join_timeout=1", port=port) as (process,):
        code, _, errors = finish(process)
    assert code == 1
    assert f"cannot reach process 0 at 127.0.0.1:{port}" in errors


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with started([0], 2, "--join_timeout=1", port=port) as (process,):
            code, _, errors = finish(process)
    assert code == 1
    assert f"cannot listen at 127.0.0.1:{port}" in errors


# What a process of this number does in place of a check: it stops as if its machine had, or dies.
_DISTURBED = """
import os
import sys
from affectgpt_jax import check_cluster
check_cluster.ANSWER_S = 2
if "--process_id=1" in sys.argv:
    check_cluster.{check} = lambda *_: os.kill(os.getpid(), {signal})
check_cluster.main(sys.argv[1:])
"""


def test_a_process_that_hangs_is_named():
    program = ("-c", _DISTURBED.format(check="all_reduce_time", signal=int(signal.SIGSTOP)))
    with started(range(3), 3, "--timeout=6", program=program) as running:
        (code, _, errors), (other_code, _, _) = finish(running[0]), finish(running[2])
    assert code == other_code == 1
    assert "all-reduce of 4 KiB over all 3 devices did not end within 6 s; no answer from" in errors
    assert "from process 1 on" in errors and "process 2 on" not in errors


def test_who_gives_no_answer_is_named():
    answers = {number: queue.Queue() for number in (1, 2, 3)}
    group = distributed.ProcessGroup(0, 4)
    for number, waiting in answers.items():
        receive = functools.partial(waiting.get, True)
        group._links[number] = SimpleNamespace(host=f"host{number}", receive=receive)
    for number in (1, 3):
        answers[number].put(None)
    with pytest.raises(LaunchError, match="no answer from process 2 on host2 within 0.1 s"):
        group.gather(0, timeout_s=0.1)
    for number, waiting in answers.items():
        waiting.put(10 * number)
    assert group.gather(0, timeout_s=0.1) == [0, 10, 20, 30]


def test_a_process_that_dies_is_named():
    program = ("-c", _DISTURBED.format(check="all_reduce_time", signal=int(signal.SIGKILL)))
    with started(range(2), 2, program=program) as running:
        code, _, errors = finish(running[0])
    assert code == 1
    assert "process 1 on" in errors and "gone without a word" in errors


# --- Speeds ---------------------------------------------------------------------------------------


def test_a_slow_device_is_named():
    said = []
    complaints = check_cluster.slow_processes([1.0, 1.1, 2.5, 0.9], list("abcd"), 0.5, said.append)
    assert len(complaints) == 1
    assert complaints[0].startswith("process 2 on c computes at 42% of the median speed")
    assert "2500.000 ms on the slowest" in said[0]


def test_a_slow_process_ends_the_command(monkeypatch):
    slow = "process 0 on here computes at 10% of the median speed"
    monkeypatch.setattr(check_cluster, "slow_processes", lambda *_: [slow])
    with pytest.raises(SystemExit, match=slow):
        check_cluster.main(SMALL)


def test_a_wrong_sum_is_an_error(monkeypatch):
    place = jax.make_array_from_callback
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, sharding, fill: place(shape, sharding, lambda index: 1.5 * fill(index)),
    )
    with pytest.raises(check_cluster.ClusterError, match="is 9.0, not 6.0"):
        check_cluster.all_reduce_time(jax.devices()[:3], 4096)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--no_such_flag=1"], 2, "unrecognized arguments: --no-such-flag=1"),
        (["--timeout=0"], 2, "--timeout is 0; expected 1 or more"),
        (["--slowest=1.5"], 2, "--slowest is 1.5; expected a share from 0 to 1"),
        (["extra"], 2, "unrecognized arguments: extra"),
        (["--process_id=1"], 1, "belong together"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(flags, status, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        check_cluster.main(flags)
    said = capsys.readouterr().err if status == 2 else stopped.value.code
    assert message in said and (status == 1 or stopped.value.code == 2)
