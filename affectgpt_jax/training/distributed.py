"""Several processes as one run: how they find each other, and what they exchange.

A launcher starts the processes of a run: `srun`, `mpirun`, or one command for each process with
`--coordinator_address=HOST:PORT --process_id=I --num_processes=N`. Before JAX starts, process 0
listens at the coordinator's address and calls the roll: an error names each process that is missing
or that was started with another config. These connections stay open beside JAX's collectives.
Process 0 sends its decisions over them, and each process learns at once that another one has failed
or is gone, where a collective would wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import re
import selectors
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypedDict, TypeVar

import jax

from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.json import parse_json
from affectgpt_jax.common.text import print_lines

Value = TypeVar("Value")
# Bytes of a message between processes, and of the first one, by which a process is known.
MAX_MESSAGE = 2**24
MAX_HELLO = 2**12
# What knocks at the port has so long to say who it is, and no more may do so at a time.
HELLO_TIMEOUT_S = 5.0
MAX_KNOCKING = 256
# Within this time after its own deadline process 0 has told the others who is missing.
NAMING_S = 10.0


class LaunchError(UserError, RuntimeError):
    """Processes that do not come together as one run."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """The place of a process in its run.

    Attributes:
        coordinator_address: "HOST:PORT", where process 0 listens.
        process_id, num_processes: its number, from 0, and the number of processes.
        local_process_id: its number among the processes of its machine, which is the one device
            that it takes; None if it takes all devices that it sees.
    """

    coordinator_address: str
    process_id: int
    num_processes: int
    local_process_id: int | None = None


# --- how a process was launched -------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run of several processes to a command's."""
    add = parser.add_argument_group("several processes; SLURM and Open MPI set these").add_argument
    add(
        "--coordinator-address",
        default="",
        metavar="HOST:PORT",
        help="of process 0, where all can reach it",
    )
    add("--process-id", type=int, metavar="I", help="number of this process, from 0")
    add("--num-processes", type=int, metavar="N", help="how many there are")
    add(
        "--join-timeout",
        type=int,
        default=300,
        metavar="S",
        help="seconds to wait for all of them at the start; default: 300",
    )


def find_launch(
    values: argparse.Namespace, environ: Mapping[str, str] = os.environ
) -> Launch | None:
    """How this process was launched: by flags, else by SLURM or Open MPI; None for a run of one.

    Args:
        values: the flags of `add_flags`.
        environ: the environment.

    Raises:
        LaunchError: flags that are incomplete or out of range, or no address of process 0.
    """
    given = values.process_id is not None or values.num_processes is not None
    if given:
        if (
            values.process_id is None
            or values.num_processes is None
            or not values.coordinator_address
        ):
            raise LaunchError(
                "--coordinator_address=HOST:PORT, --process_id=I and --num_processes=N belong "
                "together; name all three, or none under srun or mpirun"
            )
        launch = Launch(values.coordinator_address, values.process_id, values.num_processes)
    else:
        found = _slurm(environ) or _open_mpi(environ)
        if found is None:
            if values.coordinator_address:
                raise LaunchError(
                    f"--coordinator_address={values.coordinator_address} is given, but neither "
                    "--process_id and --num_processes nor SLURM or Open MPI say which process "
                    "this is"
                )
            return None
        launch = dataclasses.replace(
            found, coordinator_address=values.coordinator_address or found.coordinator_address
        )
    if not 0 <= launch.process_id < launch.num_processes:
        raise LaunchError(
            f"--process_id={launch.process_id} of --num_processes={launch.num_processes}; expected "
            f"0 to {launch.num_processes - 1}"
        )
    if launch.num_processes == 1:
        return None
    if not re.fullmatch(r"\S+:\d+", launch.coordinator_address):
        raise LaunchError(
            f"the coordinator {launch.coordinator_address!r} is not HOST:PORT; name the host of "
            "process 0 and a free port there, as --coordinator_address=node001:5123"
        )
    return launch


# JAX's own detection (`jax._src.clusters`) does not fit:
# - jax 0.10 does not recognise Open MPI 5, so that each process would run alone; jax 0.12 needs
#   mpi4py.
# - It takes the number of tasks from the SLURM job. A batch script that was submitted from an
#   interactive step, whose variables it inherits, would wait for processes that nobody starts.
# - It gives all steps of a SLURM job one port.
# - A process whose launcher shows it one device would look for the device of its local number.
def _slurm(environ: Mapping[str, str]) -> Launch | None:
    """What `srun` sets for each task. Only steps have these variables: a batch script is alone."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    if any(name not in environ for name in names):
        return None
    num_processes, process_id, nodes, job = (environ[name] for name in names)
    # "node001", "node001,node007", "node[001-004,009],other3"
    prefix, number = re.match(r"([^,\[]*)(?:\[(\w+))?", nodes).groups()
    step = environ.get("SLURM_STEP_ID", "0")
    return Launch(
        f"{prefix}{number or ''}:{_port(f'{job}.{step}')}",
        int(process_id),
        int(num_processes),
        _local_process_id(
            environ, environ.get("SLURM_LOCALID"), environ.get("SLURM_STEP_TASKS_PER_NODE")
        ),
    )


def _open_mpi(environ: Mapping[str, str]) -> Launch | None:
    """What `mpirun` sets for each process. Of several hosts, only versions before 5 name one."""
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    if any(name not in environ for name in names):
        return None
    size, rank = (environ[name] for name in names)
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    neighbours = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    found = re.search(r"tcp://([^,:]+)", uri)
    host = "127.0.0.1" if neighbours == size else found[1] if found else ""
    port = _port(environ.get("PMIX_NAMESPACE") or uri)
    return Launch(
        f"{host}:{port}" if host else "",
        int(rank),
        int(size),
        _local_process_id(environ, environ.get("OMPI_COMM_WORLD_LOCAL_RANK"), neighbours),
    )


def _port(job: str) -> int:
    """A port that all processes derive from the name of their job.

    It is above the ports that Linux gives to outgoing connections.
    """
    return 61440 + zlib.crc32(job.encode()) % 4096


def _local_process_id(
    environ: Mapping[str, str], number: str | None, neighbours: str | None
) -> int | None:
    """The device of its machine that a process takes; None for all that it sees.

    A launcher that binds devices to processes shows each process its own device alone.
    """
    bound = "," not in environ.get("CUDA_VISIBLE_DEVICES", ",")
    alone = neighbours is None or re.match(r"1(\(x\d+\))?$", neighbours)
    return None if number is None or alone or bound else int(number)


# --- the processes of a run -----------------------------------------------------------------------


class ProcessGroup:
    """The processes of a run, as one of them sees the others.

    Attributes:
        process_id, num_processes: as in `Launch`.
        is_main_process: whether this is process 0, the only one that writes.
    """

    def __init__(self, process_id: int = 0, num_processes: int = 1):
        self.process_id, self.num_processes = process_id, num_processes
        self.is_main_process = process_id == 0
        self._links: dict[int, _Link] = {}
        self._ending = threading.Lock()

    def from_main_process(
        self, compute: Callable[[], Value], timeout_s: float | None = None
    ) -> Value:
        """Call `compute()` on process 0, and return its value, a JSON value, on every process.

        If it raises, the exit of the group on process 0 ends the others.

        Raises:
            LaunchError: on the others, if there is no value within `timeout_s`.
        """
        if not self.is_main_process:
            try:
                return self._links[0].receive(timeout_s)
            except queue.Empty:
                raise LaunchError(
                    f"process 0 on {self._links[0].host} says nothing for {timeout_s:.0f} s; look "
                    "whether it waits for another process, or whether something else listens there"
                ) from None
        value = compute()
        for link in self._links.values():
            link.send(value)
        return value

    def main_process_first(self, compute: Callable[[], Value]) -> Value:
        """Call `compute()` on each process, on the others after it has returned on process 0.

        For work that writes a file which the others then find.
        """
        if self.is_main_process:
            value = compute()
            self.from_main_process(lambda: None)
            return value
        self.from_main_process(lambda: None)
        return compute()

    def gather(self, value: Any, timeout_s: float | None = None) -> list[Any]:
        """The JSON values of all processes, in their order, on process 0; empty on the others.

        Raises:
            LaunchError: on process 0, naming the processes that sent none within `timeout_s`.
        """
        if not self.is_main_process:
            self._links[0].send(value)
            return []
        found, silent = [value], []
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for number in range(1, self.num_processes):
            link = self._links[number]
            try:
                left = None if deadline is None else max(0, deadline - time.monotonic())
                found.append(link.receive(left))
            except queue.Empty:
                silent.append(f"process {number} on {link.host}")
        if silent:
            raise LaunchError(f"no answer from {', '.join(silent)} within {timeout_s:g} s")
        return found

    def meet(self) -> None:
        """Wait until all processes have called this."""
        self.gather(None)
        self.from_main_process(lambda: None)

    def require_same(self, facts: Mapping[str, str], timeout_s: float | None = None) -> None:
        """Refuse a run whose processes differ in one of these facts.

        Raises:
            LaunchError: on process 0, naming the process and the fact; or, on any, if the others
                say nothing within `timeout_s`.
        """
        for number, theirs in enumerate(self.gather(dict(facts), timeout_s)):
            for name in sorted(facts.keys() | theirs.keys()):
                if facts.get(name) != theirs.get(name):
                    raise LaunchError(
                        f"process {number} on {self._links[number].host} has {name}="
                        f"{theirs.get(name)}, but process 0 has {facts.get(name)}; start all "
                        "processes with the same command, code and files"
                    )
        self.from_main_process(lambda: None, timeout_s)

    def fail(self, sentence: str) -> None:
        """Tell the others that this process ends, and why. They end too."""
        for link in self._links.values():
            link.send(sentence, kind="failed")

    def close(self) -> None:
        """Leave the run once all processes have called this.

        JAX waits for the others at the end as well, but not for long.
        """
        self.meet()
        for link in self._links.values():
            link.send(None, kind="bye")

    def _watch(self, number: int, link: _Link) -> None:
        """Read a link in a thread, and end this process when the other one fails or is gone."""

        def follow() -> None:
            sentence = link.read()
            if sentence is not None:
                self._end(number, f"process {number} on {link.host} {sentence}")

        self._links[number] = link
        threading.Thread(target=follow, name=f"link to process {number}", daemon=True).start()

    def _end(self, sender: int, sentence: str) -> None:
        with self._ending:  # never released: only the first sentence is printed
            for number, link in self._links.items():
                if number != sender:
                    link.send(sentence, kind="relayed")
            line = (
                f"error: process {self.process_id} of {self.num_processes} stops, since "
                f"{sentence}; the same command resumes from the newest checkpoint"
            )
            print_lines([line], sys.stderr)
            # The main thread may wait in a collective that never ends.
            os._exit(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: object) -> None:
        if kind is None or issubclass(kind, SystemExit):
            self.close()
        else:
            self.fail((str(error).splitlines() or [kind.__name__])[0])


class _Link:
    """A connection to another process. Each line is a JSON message, `[kind, value]`."""

    def __init__(self, connection: socket.socket, host: str = ""):
        # A lost machine closes no connection. Keep-alive finds that out in minutes, not hours.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.host = host
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._values: queue.Queue = queue.Queue()
        self._sending = threading.Lock()

    def send(self, value: Any, kind: str = "value") -> None:
        """Send a message.

        Raises:
            ValueError: it is longer than the other side reads.
        """
        line = json.dumps([kind, value]).encode() + b"\n"
        if len(line) > MAX_MESSAGE:
            raise ValueError(
                f"a message of {len(line):,} bytes, over the {MAX_MESSAGE:,} of a link between "
                "processes; write a file, and let each process read it"
            )
        # If the other side is gone, the thread that reads from it reports that.
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(line)

    def receive(self, timeout_s: float | None = None) -> Any:
        """Wait for the next value; raises `queue.Empty` after `timeout_s`."""
        return self._values.get(timeout=timeout_s)

    def read(self) -> str | None:
        """Read messages until the other side leaves; returns why, or None after its "bye"."""
        with contextlib.suppress(OSError):
            while line := self._lines.readline(MAX_MESSAGE):
                try:
                    kind, value = parse_json(line, "a message", tuple[str, Any])
                except ReadError as error:
                    return f"sends what is no message ({error})"
                if kind == "value":
                    self._values.put(value)
                elif kind == "bye":
                    return None
                else:
                    return f"failed: {value}" if kind == "failed" else f"reports that {value}"
        return "is gone without a word (killed, out of memory, or its machine lost)"


def check_shared(file: Path) -> None:
    """Refuse a workdir that is another directory here than on process 0.

    Args:
        file: of the workdir, which process 0 has just written.

    Raises:
        LaunchError: it is not there.
    """
    if not file.exists():
        raise LaunchError(
            f"{file.parent} is not the directory that process 0 writes to; name a --workdir on a "
            "file system that all machines share"
        )


@contextlib.contextmanager
def join(
    launch: Launch | None, facts: Mapping[str, str], timeout_s: float, say: Callable[[str], None]
) -> Iterator[ProcessGroup]:
    """Bring the processes of a run together and start JAX on all of them.

    Args:
        launch: of this process; None for a run of one.
        facts: must be the same in all processes.
        timeout_s: how long to wait for all of them.
        say: receives one line about each process, on process 0.

    Raises:
        LaunchError: processes that do not come in time, come twice, or differ; the message names
            them.
    """
    if launch is None:
        yield ProcessGroup()
        return
    deadline = time.monotonic() + timeout_s
    host, port = launch.coordinator_address.rsplit(":", 1)
    group = ProcessGroup(launch.process_id, launch.num_processes)
    meet = _call_the_roll if group.is_main_process else _report
    for number, link in meet(launch, host, int(port), deadline).items():
        group._watch(number, link)
    with group:
        left = max(1.0, deadline - time.monotonic())
        # Process 0 waits as long for the others, and names those that are missing.
        group.require_same(facts, left if group.is_main_process else left + NAMING_S)
        service = group.from_main_process(_free_port)
        jax.distributed.initialize(
            f"{host}:{service}",
            launch.num_processes,
            launch.process_id,
            local_device_ids=launch.local_process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, int(deadline - time.monotonic())),
            # The links say which process failed or is gone, and JAX can only abort, even where a
            # job that was suspended as a whole wakes up. So it is to wait for longer than any does.
            heartbeat_timeout_seconds=10**6,
            shutdown_timeout_seconds=60,
        )
        devices = jax.local_devices()
        here = f"{socket.gethostname()} (pid {os.getpid()}): {len(devices)} x "
        for number, line in enumerate(group.gather(here + devices[0].device_kind)):
            say(f"process {number} of {group.num_processes} on {line}")
        yield group


def leave(launch: Launch, status: int, sentence: str = "") -> NoReturn:
    """End one of several processes at once, with a sentence on standard error.

    JAX's own way out waits for the other processes, which may hang in a collective.
    """
    if sentence:
        text = f"process {launch.process_id} of {launch.num_processes}: {sentence}"
        print_lines([text], sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _call_the_roll(launch: Launch, host: str, port: int, deadline: float) -> dict[int, _Link]:
    """On process 0: wait for all others, and return a link to each."""
    loopback = host in ("localhost", "127.0.0.1")
    try:
        # On all addresses: the host's name may resolve to another address here than elsewhere.
        server = socket.create_server(("127.0.0.1" if loopback else "", port), backlog=1024)
    except OSError as error:
        raise LaunchError(
            f"process 0 cannot listen at {launch.coordinator_address}: {error.strerror or error}; "
            "name a free port with --coordinator_address=HOST:PORT"
        ) from None
    links: dict[int, _Link] = {}

    def refuse(sentence: str) -> LaunchError:
        for link in links.values():
            link.send(sentence, kind="failed")
        return LaunchError(sentence)

    with server, contextlib.closing(_hellos(server, deadline)) as hellos:
        while missing := sorted(set(range(1, launch.num_processes)) - links.keys()):
            try:
                connection, hello = next(hellos)
            except TimeoutError:
                names = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
                raise refuse(
                    f"process 0 waited at {launch.coordinator_address} for {launch.num_processes} "
                    f"processes, but {names} did not come; look whether they were started and can "
                    "reach it, or raise --join_timeout"
                ) from None
            number, link = hello["process_id"], _Link(connection, hello["host"])
            if hello["num_processes"] != launch.num_processes or number not in missing:
                links[-1] = link  # receives the refusal as well
                raise refuse(
                    f"process {number} of {hello['num_processes']} came from {link.host}, but "
                    f"process 0 waits for {', '.join(map(str, missing[:10]))} of "
                    f"{launch.num_processes}; give each process a number of its own, and all the "
                    "same --num_processes"
                )
            links[number] = link
    return links


class _Hello(TypedDict):
    """The first message of a process."""

    process_id: int
    num_processes: int
    host: str


@dataclasses.dataclass
class _Knock:
    """What a connection has said so far, and until when it may say who it is."""

    until: float
    said: bytes = b""


def _hellos(server: socket.socket, deadline: float) -> Iterator[tuple[socket.socket, _Hello]]:
    """The connections of processes, in the order in which their first messages are there.

    All are listened to at once, each until its own deadline: what says nothing, or something else,
    as a port scanner does, is let go and holds up nobody.

    Raises:
        TimeoutError: at the deadline.
    """
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        knocking: dict[socket.socket, _Knock] = {}  # in the order of their deadlines

        def let_go(connection: socket.socket) -> None:
            selector.unregister(connection)
            del knocking[connection]

        try:
            while (now := time.monotonic()) < deadline:
                first = min([deadline, *(knock.until for knock in knocking.values())])
                for key, _ in selector.select(max(0.0, first - now)):
                    if key.fileobj is not server:
                        knock = knocking[key.fileobj]
                        try:
                            more = _read_up_to_line_end(key.fileobj)
                        except BlockingIOError:  # there was nothing after all
                            continue
                        knock.said += more
                        if knock.said.endswith(b"\n") or not more or len(knock.said) > MAX_HELLO:
                            let_go(key.fileobj)
                            if hello := _as_hello(knock.said):
                                key.fileobj.setblocking(True)
                                yield key.fileobj, hello
                            else:
                                key.fileobj.close()
                        continue
                    try:
                        connection = server.accept()[0]
                    except OSError:  # it has left, or there are too few file handles
                        time.sleep(0.01)
                        continue
                    connection.setblocking(False)
                    knocking[connection] = _Knock(time.monotonic() + HELLO_TIMEOUT_S)
                    selector.register(connection, selectors.EVENT_READ)
                over = max(0, len(knocking) - MAX_KNOCKING)
                late = [c for c, knock in knocking.items() if knock.until < time.monotonic()]
                for connection in {*list(knocking)[:over], *late}:
                    let_go(connection)
                    connection.close()
            raise TimeoutError
        finally:
            for connection in knocking:
                connection.close()


def _read_up_to_line_end(connection: socket.socket) -> bytes:
    """What there is of a line, and nothing behind it; b"" if the other side has left.

    Raises:
        BlockingIOError: there is nothing yet.
    """
    try:
        there = connection.recv(MAX_HELLO + 1, socket.MSG_PEEK)
        return connection.recv(there.find(b"\n") + 1 or len(there))
    except BlockingIOError:
        raise
    except OSError:
        return b""


def _as_hello(line: bytes) -> _Hello | None:
    try:
        return parse_json(line, "a message", tuple[Literal["hello"], _Hello])[1]
    except ReadError:
        return None


def _report(launch: Launch, host: str, port: int, deadline: float) -> dict[int, _Link]:
    """On every other process: connect to process 0, and return the link."""
    hello = {
        "process_id": launch.process_id,
        "num_processes": launch.num_processes,
        "host": socket.gethostname(),
    }
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            connection.settimeout(None)
            link = _Link(connection, host)
            link.send(hello, kind="hello")
            return {0: link}
        except OSError as error:  # process 0 may not listen yet
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"process {launch.process_id} of {launch.num_processes} cannot reach process 0 "
                    f"at {launch.coordinator_address}: {error.strerror or error}; look whether it "
                    "was started, and whether its host and port can be reached from here"
                ) from None
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
