"""Do processes find each other, and how fast are they? `python -m affectgpt_jax.check_cluster`.

    srun python -m affectgpt_jax.check_cluster
    python -m affectgpt_jax.check_cluster --coordinator_address=node001:5123 \\
        --process_id=0 --num_processes=2

Started like training, once per process: by srun or mpirun, or by hand with the flags above. It
calls the roll, adds up arrays over all devices and over neighbouring pairs, and prints how fast
that was, by size and by where the two devices of a pair stand. A process that does not come, does
not answer or is slow is named with the likely cause, and the command ends with status 1.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.training import distributed
from affectgpt_jax.training.distributed import LaunchError, ProcessGroup

KIB, MIB = 2**10, 2**20
SIZES = tuple(4 * KIB * 8**i for i in range(6))  # up to 128 MiB
REPEATS = 10
PAIR_BYTES = 16 * MIB
# Where the two devices of a pair stand, from near to far.
CLASSES = ("in one process", "on one host", "on two hosts")
# A process that does not answer within this time beside the timeout is hung, or gone.
ANSWER_S = 10


class ClusterError(UserError, RuntimeError):
    """A cluster that cannot be trained on as it is."""


class Pair(NamedTuple):
    """Two devices and how fast they add up an array.

    Attributes:
        processes: that hold them.
        hosts: of these processes.
        bytes_per_s: of the array.
    """

    processes: tuple[int, int]
    hosts: tuple[str, str]
    bytes_per_s: float

    @property
    def where(self) -> str:
        if self.processes[0] == self.processes[1]:
            return CLASSES[0]
        return CLASSES[1] if self.hosts[0] == self.hosts[1] else CLASSES[2]


def parse_arguments(argv: Sequence[str]) -> flags.FlagValues:
    """Read the command line.

    Raises:
        LaunchError: an unknown flag or a wrong value, in one sentence.
        SystemExit: after the help.
    """
    values = flags.FlagValues()
    distributed.define_flags(values)
    flags.DEFINE_integer(
        "max_mib", SIZES[-1] // MIB, "largest array, in MiB", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "timeout", 120, "s that a check may take", lower_bound=1, flag_values=values
    )
    flags.DEFINE_float(
        "slowest",
        0.5,
        "share of the median speed that is still accepted; 0 accepts any",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_bool("help", False, "print this help", short_name="h", flag_values=values)
    try:
        rest = values(["check_cluster", *argv])[1:]
    except flags.Error as error:
        raise LaunchError(str(error)) from None
    if values.help:
        print(f"{__doc__}\n\n{values.get_help()}")
        raise SystemExit(0)
    if rest:
        raise LaunchError(f"unexpected argument {rest[0]!r}; flags are --name=value")
    return values


def check(group: ProcessGroup, values: flags.FlagValues, say: Callable[[str], None]) -> None:
    """All checks of processes that have joined.

    Args:
        group: the processes.
        values: of the command line.
        say: told what was found, on process 0.

    Raises:
        ClusterError: a sum that is wrong; on process 0, a process that is slow or does not answer.
    """
    devices = jax.devices()
    hosts = _hosts(group)

    def gather(what: str, measure: Callable[[], Any]) -> list[Any]:
        with _time_limit(group, what, values.timeout):
            mine = measure()
        # Whoever is late says so before this ends.
        try:
            answers = group.gather({"result": mine}, values.timeout + ANSWER_S)
        except LaunchError as error:
            raise ClusterError(f"{what}: {error}; look whether it hangs") from None
        late = [f"process {i} on {hosts[i]}" for i, a in enumerate(answers) if "late" in a]
        if late:
            raise ClusterError(f"{what}: not done in {values.timeout} s on {', '.join(late)}")
        return [answer["result"] for answer in answers]

    slow = []
    seconds = gather("a product on each device", product_time)
    if group.is_main_process:
        slow += slow_products(seconds, hosts, values.slowest, say)
    if len(devices) > 1:
        say(f"sums over all {len(devices)} devices")
        for size in (n for n in SIZES if n <= values.max_mib * MIB):
            what = f"the sum of {_size(size)} over all {len(devices)} devices"
            took = gather(what, lambda size=size: all_reduce_time(devices, size))
            say(_line(size, len(devices), max(took, default=0)))
        size = min(PAIR_BYTES, values.max_mib * MIB)
        rates = gather("sums over pairs of neighbours", lambda: pair_rates(devices, size))
        if group.is_main_process:
            slow += slow_pairs(_pairs(devices, hosts, rates), values.slowest, say)
    if slow:
        raise ClusterError("; ".join(slow))


def _line(size: int, devices: int, seconds: float) -> str:
    """A sum's time, and what crosses each link of a ring meanwhile."""
    if not seconds:  # only process 0 knows, and says it
        return ""
    crossing = 2 * (devices - 1) / devices * size / seconds
    return f"  {_size(size):>8}  {1e3 * seconds:9.3f} ms  {crossing / 1e9:8.3f} GB/s of each link"


def _hosts(group: ProcessGroup) -> list[str]:
    names = group.gather(socket.gethostname())
    return group.from_main_process(lambda: names)


@contextlib.contextmanager
def _time_limit(group: ProcessGroup, what: str, seconds: float) -> Iterator[None]:
    """End the process, naming who does not answer, if what is inside does not end in time."""

    def expired() -> None:
        # The main thread is inside a collective that does not end, so this one speaks.
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
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            group.fail(sentence)
            os._exit(1)

    timer = threading.Timer(seconds, expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def product_time() -> float:
    """Seconds of a matrix product on this process's slowest device."""
    on_cpu = jax.default_backend() == "cpu"
    width, dtype = (512, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    times = []
    for device in jax.local_devices():
        x = jax.device_put(np.ones((width, width), dtype), device)
        times.append(_median_time(lambda x=x: product(x)))
    return max(times)


def _median_time(run: Callable[[], jax.Array], repeats: int = REPEATS) -> float:
    """The median of some runs, in seconds, after one that compiles and connects."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def all_reduce_time(devices: Sequence[jax.Device], size: int) -> float:
    """Seconds in which these devices add up an array, as one process of theirs sees it.

    Args:
        devices: of which this process has at least one.
        size: bytes of the array that each of them has.

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


def neighbours(count: int) -> list[tuple[int, int]]:
    """Pairs `(i, i + 1)` of a ring of devices, first those that can run side by side."""
    pairs = [(i, (i + 1) % count) for i in range(count)] if count > 2 else [(0, 1)][: count - 1]
    return pairs[::2] + pairs[1::2]


def pair_rates(devices: Sequence[jax.Device], size: int) -> list[list[float]]:
    """`[number of the pair, bytes/s]` of the pairs that this process takes part in."""
    here, found = jax.process_index(), []
    for number, pair in enumerate(neighbours(len(devices))):
        two = [devices[i] for i in pair]
        if any(device.process_index == here for device in two):
            found.append([number, size / all_reduce_time(two, size)])
    return found


def _pairs(
    devices: Sequence[jax.Device], hosts: Sequence[str], found: Sequence[list[list[float]]]
) -> list[Pair]:
    """What all processes measured, the slower view of each pair."""
    rates: dict[int, float] = defaultdict(lambda: float("inf"))
    for number, rate in itertools.chain.from_iterable(found):
        rates[int(number)] = min(rates[int(number)], rate)
    pairs = []
    for number, (i, j) in enumerate(neighbours(len(devices))):
        processes = devices[i].process_index, devices[j].process_index
        pairs.append(Pair(processes, tuple(hosts[p] for p in processes), rates[number]))
    return pairs


def slow_products(
    seconds: Sequence[float], hosts: Sequence[str], slowest: float, say: Callable[[str], None]
) -> list[str]:
    """Complaints about processes whose devices compute slowly."""
    median = statistics.median(seconds)
    say(
        f"a product on each device: {1e3 * median:.3f} ms in the median, "
        f"{1e3 * max(seconds):.3f} ms on the slowest"
    )
    return [
        f"process {number} on {hosts[number]} computes at {median / took:.0%} of the median "
        "speed; look for other jobs on its device, and for a lowered clock (nvidia-smi -q -d "
        "PERFORMANCE)"
        for number, took in enumerate(seconds)
        if median < slowest * took
    ]


def slow_pairs(pairs: Sequence[Pair], slowest: float, say: Callable[[str], None]) -> list[str]:
    """Complaints about pairs that are slow among those that stand alike, and whom they share."""
    complaints = []
    for where in CLASSES:
        alike = [pair for pair in pairs if pair.where == where]
        if not alike:
            continue
        median = statistics.median(pair.bytes_per_s for pair in alike)
        least = min(alike, key=lambda pair: pair.bytes_per_s)
        say(
            f"pairs {where}: {median / 1e9:.3f} GB/s in the median of {len(alike)}, "
            f"{least.bytes_per_s / 1e9:.3f} GB/s between processes "
            f"{least.processes[0]} and {least.processes[1]}"
        )
        slow = [pair for pair in alike if pair.bytes_per_s < slowest * median]
        shared = _shared([pair.processes for pair in slow])
        for pair in slow:
            names = " and ".join(
                f"{number} on {host}" for number, host in zip(pair.processes, pair.hosts)
            )
            complaints.append(
                f"between processes {names} a sum runs at {pair.bytes_per_s / median:.0%} of the "
                f"median of pairs {where}; {_CAUSES[where]}"
            )
        if shared:
            complaints.append(f"process {', '.join(map(str, shared))} is in all of these pairs")
    return complaints


def _shared(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Processes that are in more than one pair and in every one of them."""
    if len(pairs) < 2:
        return []
    return sorted(set.intersection(*map(set, pairs)))


_CAUSES: Mapping[str, str] = {
    CLASSES[0]: "look at nvidia-smi topo -m and nvlink -s on that host",
    CLASSES[1]: "look at nvidia-smi topo -m and nvlink -s on that host",
    CLASSES[2]: "look at the link of these hosts (ibstat) and whether NCCL uses InfiniBand "
    "(NCCL_DEBUG=INFO)",
}


def _size(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 and one sentence for trouble that the user can mend."""
    try:
        values = parse_arguments(sys.argv[1:] if argv is None else argv)
        launch = distributed.find_launch(values)
        is_main_process = launch is None or launch.process_id == 0

        def say(line: str) -> None:
            if is_main_process:
                print(line, flush=True)

        if launch is None:
            say("one process: neither flags nor SLURM or Open MPI name any others")
        else:
            say(f"process 0 of {launch.num_processes} waits at {launch.coordinator}")
        facts = {"jax": jax.__version__, "python": sys.version.split()[0]}
        with distributed.join(launch, facts, values.join_timeout, say) as group:
            try:
                check(group, values, say)
            except ClusterError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                group.fail(str(error))
                os._exit(1)  # JAX would wait for the others, who leave as well
            # Nobody leaves while another one still computes.
            group.from_main_process(lambda: None)
        say(f"ok: {jax.process_count()} processes, {jax.device_count()} devices")
    except LaunchError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
