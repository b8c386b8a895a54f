"""Check that processes reach each other, and how fast: `affectgpt check-cluster`.

    srun affectgpt check-cluster
    affectgpt check-cluster --coordinator_address=node001:5123 \\
        --process_id=0 --num_processes=2

Start it like training, once per process: by srun or mpirun, or by hand with the flags above. It
calls the roll, times a matmul on every device, and prints the bandwidth of all-reduces over all
devices by size. A process that does not come, does not answer or computes slowly is named with the
likely cause, and the command ends with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from affectgpt_jax import cli, runtime
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.text import print_lines
from affectgpt_jax.training import distributed
from affectgpt_jax.training.distributed import LaunchError, ProcessGroup

KIB, MIB = 2**10, 2**20
SIZES = tuple(4 * KIB * 8**i for i in range(6))  # up to 128 MiB
REPEATS = 10
# A process that does not answer within this time beside the timeout hangs, or is gone.
ANSWER_S = 10


class ClusterError(UserError, RuntimeError):
    """A cluster that cannot be trained on as it is."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    parser = cli.make_parser("affectgpt check-cluster", __doc__)
    add = parser.add_argument
    largest = SIZES[-1] // MIB
    add(
        "--max-mib",
        type=int,
        default=largest,
        metavar="MIB",
        help=f"largest array; default: {largest}",
    )
    add("--timeout", type=int, default=120, metavar="S", help="of a check; default: 120")
    add(
        "--slowest",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the median speed that is still accepted; 0 accepts any; default: 0.5",
    )
    distributed.add_flags(parser)
    values = parser.parse_args(argv)
    for name in ("max_mib", "timeout"):
        if getattr(values, name) < 1:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} is {getattr(values, name)}; expected 1 or more")
    if not 0 <= values.slowest <= 1:
        parser.error(f"--slowest is {values.slowest}; expected a share from 0 to 1")
    return values


def check(group: ProcessGroup, values: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Run all checks on processes that have joined.

    Args:
        group: the processes.
        values: the command line.
        say: prints a line on process 0.

    Raises:
        ClusterError: a wrong sum; on process 0, a process that is slow or does not answer.
    """
    devices = jax.devices()
    hosts = group.gather(socket.gethostname())

    def gather(what: str, measure: Callable[[], float]) -> list[float]:
        """Seconds of all processes on process 0; empty on the others."""
        with _time_limit(group, what, values.timeout):
            mine = measure()
        try:
            answers = group.gather({"seconds": mine}, values.timeout + ANSWER_S)
        except LaunchError as error:
            raise ClusterError(f"{what}: {error}; look whether it hangs") from None
        # Process 0 was in time; another process may say here that it was not.
        late = [f"process {i} on {hosts[i]}" for i, a in enumerate(answers) if "late" in a]
        if late:
            raise ClusterError(f"{what}: not done in {values.timeout} s on {', '.join(late)}")
        return [answer["seconds"] for answer in answers]

    seconds = gather("a matmul on each device", matmul_time)
    slow = slow_processes(seconds, hosts, values.slowest, say) if group.is_main_process else []
    for size in SIZES if len(devices) > 1 else ():
        if size > values.max_mib * MIB:
            break
        what = f"the all-reduce of {_size(size)} over all {len(devices)} devices"
        seconds = gather(what, lambda size=size: all_reduce_time(devices, size))
        if group.is_main_process:
            # What crosses each link of a ring.
            rate = 2 * (len(devices) - 1) / len(devices) * size / max(seconds)
            say(
                f"all-reduce of {_size(size):>7}: {1e3 * max(seconds):9.3f} ms, "
                f"{rate / 1e9:8.3f} GB/s on each link of a ring"
            )
    if slow:
        raise ClusterError("; ".join(slow))


@contextlib.contextmanager
def _time_limit(group: ProcessGroup, what: str, seconds: float) -> Iterator[None]:
    """End the run and name who does not answer if the body takes longer than `seconds`."""

    def expired() -> None:
        # The main thread is inside a collective that does not end, so this thread speaks.
        try:
            group.gather({"late": what}, ANSWER_S)
            cause = (
                "all processes are waiting for each other in it; devices cannot reach each other: "
                "look at firewalls between the hosts, at NCCL_SOCKET_IFNAME and NCCL_IB_HCA, and "
                "run again with NCCL_DEBUG=INFO"
            )
        except LaunchError as error:
            cause = f"{error}; look whether it hangs"
        if group.is_main_process:
            sentence = f"{what} did not end within {seconds:g} s; {cause}"
            print_lines([f"error: {sentence}"], sys.stderr)
            group.fail(sentence)
            os._exit(1)

    timer = threading.Timer(seconds, expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def matmul_time() -> float:
    """Seconds of a matmul on this process's slowest device."""
    on_cpu = jax.default_backend() == "cpu"
    width, dtype = (512, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    matmul = jax.jit(lambda x: x @ x)
    times = []
    for device in jax.local_devices():
        x = jax.device_put(np.ones((width, width), dtype), device)
        times.append(_median_time(lambda x=x: matmul(x)))
    return max(times)


def slow_processes(
    seconds: Sequence[float], hosts: Sequence[str], slowest: float, say: Callable[[str], None]
) -> list[str]:
    """A sentence for every process that computes at less than `slowest` of the median speed."""
    median = statistics.median(seconds)
    say(
        f"a matmul on each device: {1e3 * median:.3f} ms in the median, "
        f"{1e3 * max(seconds):.3f} ms on the slowest"
    )
    return [
        f"process {number} on {hosts[number]} computes at {median / took:.0%} of the median "
        "speed; look for other jobs on its device, and for a lowered clock (nvidia-smi -q -d "
        "PERFORMANCE)"
        for number, took in enumerate(seconds)
        if median < slowest * took
    ]


def all_reduce_time(devices: Sequence[jax.Device], size: int) -> float:
    """Seconds in which these devices add up an array, as this process sees it.

    Args:
        devices: of which this process has at least one.
        size: bytes of the array on each of them.

    Raises:
        ClusterError: the sum is wrong.
    """
    mesh = Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))
    shape = (len(devices), size // 4)
    values = np.arange(1, len(devices) + 1, dtype=np.float32)[:, None]
    x = jax.make_array_from_callback(
        shape,
        NamedSharding(mesh, P("devices")),
        lambda index: np.broadcast_to(values[index[0]], (1, shape[1])),
    )
    total = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, P()))
    found = np.asarray(total(x).addressable_data(0))
    expected = len(devices) * (len(devices) + 1) / 2
    if not (found == expected).all():
        raise ClusterError(
            f"the sum over {len(devices)} devices is {found[found != expected][0]}, not "
            f"{expected}; a device or a link computes wrongly: run NVIDIA's dcgmi diag on the hosts"
        )
    return _median_time(lambda: total(x))


def _median_time(run: Callable[[], jax.Array], repeats: int = REPEATS) -> float:
    """The median of some runs, in seconds, after one that compiles and connects."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _size(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    launch = None

    def leave(status: int, sentence: str) -> NoReturn:
        distributed.leave(launch, status, sentence) if launch else cli.leave(status, sentence)

    with cli.exit_on_error(leave=leave):
        values = parse_arguments(argv)
        runtime.prepare_plugins()
        launch = distributed.find_launch(values)

        def say(line: str) -> None:
            if launch is None or launch.process_id == 0:
                print_lines([line])

        if launch is None:
            say("one process: neither flags nor SLURM or Open MPI name any others")
        else:
            say(f"process 0 of {launch.num_processes} waits at {launch.coordinator_address}")
        facts = {"jax": jax.__version__, "python": sys.version.split()[0]}
        with distributed.join(launch, facts, values.join_timeout, say) as group:
            check(group, values, say)
        say(f"ok: {jax.process_count()} processes, {jax.device_count()} devices")


if __name__ == "__main__":
    main()
