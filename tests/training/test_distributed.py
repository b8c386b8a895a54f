"""Several processes as one run: how they are launched, meet, agree and part."""

import contextlib
import functools
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest
from commands import ending, enter, finish, group, trace

from affectgpt_jax import cli
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records
from affectgpt_jax.training import distributed
from affectgpt_jax.training.distributed import Launch, LaunchError, ProcessGroup

# --- How a process was launched -------------------------------------------------------------------


def launch(*argv, environ=None):
    parser = cli.make_parser("affectgpt train", "")
    distributed.add_flags(parser)
    return distributed.find_launch(parser.parse_args(argv), environ or {})


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-node-1@1",
}


def test_a_process_without_a_launcher_is_alone():
    assert launch() is None
    batch_script = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert launch(environ=batch_script) is None
    # Submitted from an interactive step, it inherits the variables of that step.
    step = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "login1", "SLURM_LOCALID": "0"}
    assert launch(environ=batch_script | step) is None
    assert launch("--coordinator_address=a:1", "--process_id=0", "--num_processes=1") is None


def test_flags_say_where_a_process_stands_and_come_before_the_launcher():
    named = ("--coordinator_address=node001:5123", "--process_id=2", "--num_processes=4")
    assert launch(*named) == launch(*named, environ=SLURM) == Launch("node001:5123", 2, 4)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("node001,node007", "node001"),
        ("gpu[007-008,011]", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("a-b[01-04],c9", "a-b01"),
    ],
)
def test_slurm_names_the_first_node_of_the_step(nodes, host):
    found = launch(environ=SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found.coordinator_address.rsplit(":", 1)[0] == host
    assert (found.process_id, found.num_processes) == (5, 8)


def test_all_tasks_of_a_step_derive_one_port_and_other_steps_another():
    ports = {
        launch(environ=SLURM | {"SLURM_PROCID": str(i), "SLURM_STEP_ID": step}).coordinator_address
        for i in range(8)
        for step in "01"
    }
    assert len(ports) == 2
    assert all(61440 <= int(port.rsplit(":")[1]) < 65536 for port in ports)
    assert launch("--coordinator_address=other:99", environ=SLURM).coordinator_address == "other:99"


@pytest.mark.parametrize(
    ("changes", "local"),
    [
        ({}, 1),  # four tasks a node, each of which sees all devices
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "2"}, None),  # bound by the launcher
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),  # a task with a node to itself
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, None),
    ],
)
def test_tasks_of_one_node_share_its_devices(changes, local):
    assert launch(environ=SLURM | changes).local_process_id == local


def test_open_mpi_on_one_machine_and_on_several():
    found = launch(environ=OPEN_MPI)
    assert found.coordinator_address.startswith("127.0.0.1:") and found.local_process_id == 3
    assert (found.process_id, found.num_processes) == (3, 4)
    several = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(LaunchError, match="is not HOST:PORT; name the host of process 0"):
        launch(environ=several)
    several["OMPI_MCA_orte_hnp_uri"] = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    assert launch(environ=several).coordinator_address.startswith("10.96.0.1:")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--process_id=1"], "name all three"),
        (["--process_id=1", "--num_processes=2"], "name all three"),
        (["--coordinator_address=a:1"], "neither --process_id and --num_processes nor SLURM"),
        (["--coordinator_address=a:1", "--process_id=2", "--num_processes=2"], "expected 0 to 1"),
        (
            ["--coordinator_address=a", "--process_id=1", "--num_processes=2"],
            "'a' is not HOST:PORT",
        ),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(argv, said):
    with pytest.raises(LaunchError, match=said):
        launch(*argv)


# --- How they meet --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    """What would have ended a process; here, several are threads of one."""
    found = []
    monkeypatch.setattr(ProcessGroup, "_end", lambda self, sender, sentence: found.append(sentence))
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(launches, timeout_s=10.0):
    """What each process gets that meets the others, or the error; in threads of this one."""
    results = [None] * len(launches)

    def join(i, launch):
        host, port = launch.coordinator_address.split(":")
        how = distributed._report if launch.process_id else distributed._call_the_roll
        try:
            links = how(launch, host, int(port), distributed.time.monotonic() + timeout_s)
        except LaunchError as error:
            results[i] = error
            return
        results[i] = ProcessGroup(launch.process_id, launch.num_processes)
        for number, link in links.items():
            results[i]._watch(number, link)

    threads = [threading.Thread(target=join, args=pair) for pair in enumerate(launches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def three():
    coordinator = f"127.0.0.1:{free_port()}"
    groups = meet([Launch(coordinator, i, 3) for i in (2, 0, 1)])
    groups.sort(key=lambda group: group.process_id)
    yield groups
    for link in (link for one in groups for link in one._links.values()):
        link.send(None, kind="bye")


def on_all(groups, act):
    """What `act(group)` gives on each, run side by side."""
    results = [None] * len(groups)

    def run(i):
        try:
            results[i] = act(groups[i])
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        # Those that wait for a process 0 that has failed are left behind.
        thread.join(0 if isinstance(results[0], LaunchError) else 10)
    return results


def test_what_process_0_decides_all_get(three):
    values = iter([{"step": 7}, None, "text"])
    for expected in ({"step": 7}, None, "text"):
        found = on_all(three, lambda group: group.from_main_process(lambda: next(values)))
        assert found == [expected] * 3


def test_a_message_that_is_longer_than_a_link_reads_is_not_sent(three, monkeypatch):
    monkeypatch.setattr(distributed, "MAX_MESSAGE", 64)
    with pytest.raises(ValueError, match="a message of 114 bytes, over the 64 of a link"):
        three[0].from_main_process(lambda: "x" * 100)
    assert on_all(three, lambda group: group.from_main_process(lambda: "y")) == ["y"] * 3


def test_the_others_begin_after_process_0_is_done(three):
    order = []
    on_all(three, lambda group: group.main_process_first(lambda: order.append(group.process_id)))
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_nobody_parts_before_all_have_come(three, ends):
    parted = []

    def part(group):
        time.sleep(0.05 * group.process_id)
        parted.append(len(parted))
        group.close()
        assert len(parted) == 3

    assert on_all(three, part) == [None] * 3
    assert not ends


def test_process_0_gathers_in_the_order_of_the_processes(three):
    found = on_all(three, lambda group: group.gather(group.process_id * 10))
    assert found == [[0, 10, 20], [], []]


def test_a_difference_between_processes_is_named(three):
    facts = [{"config.seed": "0", "jax": "1"}, {"config.seed": "0", "jax": "1"}, {"jax": "1"}]
    error, *_ = on_all(three, lambda group: group.require_same(facts[group.process_id]))
    assert "process 2 on " in str(error)
    assert "has config.seed=None, but process 0 has 0" in str(error)


def test_a_process_that_fails_or_leaves_without_a_word_ends_the_others(three, ends):
    three[1].fail("config.seed is wrong")
    three[2]._links[0]._connection.shutdown(socket.SHUT_RDWR)
    for _ in range(500):
        if len(ends) == 3:
            break
        time.sleep(0.01)
    host = socket.gethostname()
    assert f"process 1 on {host} failed: config.seed is wrong" in ends
    assert f"process 2 on {host} is gone without a word (killed, out of memory, or its" in str(ends)


def test_missing_processes_are_named(ends):
    coordinator = f"127.0.0.1:{free_port()}"
    launches = [Launch(coordinator, 0, 4), Launch(coordinator, 2, 4)]
    (error, other) = meet(launches, timeout_s=1.0)
    assert "but 1, 3 did not come" in str(error)
    assert other.process_id == 2
    (lonely,) = meet([Launch(coordinator, 1, 2)], timeout_s=0.5)
    assert f"cannot reach process 0 at {coordinator}: Connection refused" in str(lonely)


@pytest.mark.parametrize(
    ("number", "count", "said"),
    [(1, 3, "process 1 of 3 came from"), (0, 2, "process 0 of 2 came from")],
)
def test_a_process_that_does_not_belong_is_named(number, count, said):
    coordinator = f"127.0.0.1:{free_port()}"
    stranger = Launch(coordinator, number, count)
    results = [None]

    def report():
        host, port = coordinator.split(":")
        (results[0],) = distributed._report(
            stranger, host, int(port), distributed.time.monotonic() + 10
        ).values()

    thread = threading.Thread(target=report)
    thread.start()
    (error,) = meet([Launch(coordinator, 0, 2)])
    thread.join()
    assert said in str(error) and "give each process a number of its own" in str(error)
    assert said in results[0].read()


NOISE = [
    b"",
    b"\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\xfe\x00\n",
    b"[" * 4000 + b"\n",
    b"x" * 100_000,
    b"null\n",
    b'["hello", 3]\n',
    b'["value", {"process_id": 1, "num_processes": 2, "host": "a"}]\n',
    b'["hello", {"process_id": [1], "num_processes": 2, "host": "a"}]\n',
    b'["hello", {"process_id": 1, "num_processes": 2, "host": ["a"]}]\n',
    b'["hello", {"process_id": 1e999, "num_processes": 2, "host": "a"}]\n',
    b'["hello", {"process_id": 1}]\n',
]


def test_what_else_knocks_at_the_port_is_let_go_and_holds_up_nobody():
    coordinator = f"127.0.0.1:{free_port()}"
    found = []
    main_process = threading.Thread(target=lambda: found.extend(meet([Launch(coordinator, 0, 2)])))
    main_process.start()
    host, port = coordinator.split(":")
    start_s = time.monotonic()
    with contextlib.ExitStack() as strangers:

        def knock():
            while True:
                try:
                    connection = socket.create_connection((host, int(port)))
                    return strangers.enter_context(connection)
                except ConnectionRefusedError:
                    continue

        for noise in NOISE:
            with contextlib.suppress(OSError):
                knock().sendall(noise)
        for _ in range(20):  # they stay, and say nothing or half of something
            knock()
            knock().sendall(b'["hel')
        (other,) = meet([Launch(coordinator, 1, 2)])
        main_process.join()
    assert found[0].num_processes == other.num_processes == 2
    assert time.monotonic() - start_s < distributed.HELLO_TIMEOUT_S
    on_all([found[0], other], lambda group: group.close())


def test_who_says_nothing_or_drips_is_let_go_in_time(monkeypatch):
    monkeypatch.setattr(distributed, "HELLO_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        hellos = distributed._hellos(server, time.monotonic() + 2)
        address = server.getsockname()
        with socket.create_connection(address) as silent, socket.create_connection(address) as slow:
            waiting = threading.Thread(target=lambda: pytest.raises(TimeoutError, next, hellos))
            waiting.start()
            dropped = False
            for _ in range(20):  # each byte comes in time, and all of them do not
                time.sleep(0.05)
                try:
                    slow.sendall(b"[")
                except OSError:
                    dropped = True
            silent.settimeout(5)
            assert silent.recv(1) == b"" and dropped
            waiting.join()


def test_only_so_many_may_knock_at_a_time(monkeypatch):
    monkeypatch.setattr(distributed, "MAX_KNOCKING", 2)
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:
        address = server.getsockname()
        hellos = distributed._hellos(server, time.monotonic() + 1)
        waiting = threading.Thread(target=lambda: pytest.raises(TimeoutError, next, hellos))
        waiting.start()
        found = [stack.enter_context(socket.create_connection(address)) for _ in range(4)]
        for connection in found:
            connection.settimeout(0.5)
        assert [found[0].recv(1), found[1].recv(1)] == [b"", b""]
        with pytest.raises(TimeoutError):
            found[3].recv(1)
        waiting.join()


def test_a_message_that_is_none_ends_the_others_with_a_sentence(three, ends):
    three[1]._links[0]._connection.sendall(b"[" * 100_000 + b"\n")
    three[2]._links[0]._connection.sendall(b'"\xff"\n')
    for _ in range(500):
        if len(ends) == 2:
            break
        time.sleep(0.01)
    assert len(ends) == 2
    assert all("sends what is no message" in sentence for sentence in ends)


def test_a_process_0_that_says_nothing_is_named(three):
    error = on_all(three[1:2], lambda group: group.require_same({}, timeout_s=0.1))[0]
    assert "process 0 on 127.0.0.1 says nothing for 0 s" in str(error)
    error = on_all(three[:1], lambda group: group.require_same({}, timeout_s=0.1))[0]
    assert "no answer from process 2 on" in str(error)


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
        (error,) = meet([Launch(coordinator, 0, 2)])
    assert f"process 0 cannot listen at {coordinator}: Address already in use" in str(error)


# --- Training -------------------------------------------------------------------------------------


def assert_same_losses(found, expected):
    """Across layouts the same numbers are added in another order; a dozen updates in float32
    carry that on."""
    found, expected = trace(found), trace(expected)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-4, err_msg=str(key))


def test_two_processes_train_as_one_until_one_is_killed_and_one_goes_on_alone(
    undisturbed, records, tmp_path
):
    workdir = tmp_path / "run"
    with ending(group(workdir, 2, *records)) as commands:
        assert commands[0].until((workdir / "checkpoints" / "6").exists), commands[0].said
        commands[1].signal(signal.SIGKILL)
        assert commands[0].wait(timeout_s=60) == 1
        said = commands[0].said
        assert "process 0 of 2 on " in said and "process 1 of 2 on " in said
        assert "(pid " in said and "): 1 x cpu" in said
        assert "error: process 0 of 2 stops, since process 1 on " in said
        assert "is gone without a word" in said
        assert "workdir" not in commands[1].said, "only the first process reports"
    assert "resumed from the checkpoint of step" in finish(workdir, *records)
    assert_same_losses(workdir, undisturbed)


def test_processes_with_other_records_at_the_same_path_do_not_train_as_one(records, tmp_path):
    """As on machines that hold the records on disks of their own."""
    val = records[1]
    folders = [tmp_path / "0", tmp_path / "1"]
    for seed, folder in enumerate(folders):
        clips = demo.World(seed).records("train", 40)
        write_records(
            folder / "train", clips, encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo")
        )
    flags = ("--config.data.train=train", val)
    started = group(tmp_path / "run", 2, *flags, before=functools.partial(enter, folders))
    with ending(started) as commands:
        assert [command.wait(timeout_s=120) for command in commands] == [1, 1]
        said = commands[0].said
        assert "process 1 on " in said and "has training records (train)=" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (2, 1, "data:-1"),
        (2, 2, "data:2,tensor:2"),
        (2, 2, "tensor:4"),
        (2, 2, "fsdp:4"),
        (4, 1, "data:-1"),
        (4, 1, "fsdp:2,tensor:2"),
    ],
)
def test_several_processes_give_the_losses_of_one(
    count, devices, mesh, undisturbed, records, tmp_path
):
    flags = (*records, f"--config.mesh={mesh}")
    settings = {"jax_num_cpu_devices": devices}
    with ending(group(tmp_path / "run", count, *flags, settings=settings)) as commands:
        for command in commands:
            assert command.wait() == 0, command.said
        assert "Where the time went" in commands[0].said
        assert not any("Where the time went" in command.said for command in commands[1:])
    assert_same_losses(tmp_path / "run", undisturbed)
    assert not [*(tmp_path / "run" / "checkpoints").glob(".*")]


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes_and_on_any_layout(
    undisturbed, records, tmp_path
):
    workdir = tmp_path / "run"
    for count, mesh, step in ((1, "data:-1", 3), (2, "fsdp:2", 6), (4, "data:2,tensor:2", 9)):
        with ending(group(workdir, count, *records, f"--config.mesh={mesh}")) as commands:
            assert commands[0].until((workdir / "checkpoints" / str(step)).exists)
            for command in commands:
                command.signal(signal.SIGKILL)
    finish(workdir, *records)
    assert_same_losses(workdir, undisturbed)


@pytest.mark.slow
def test_two_processes_write_validate_and_score_what_one_does(records, tmp_path):
    """Generated clips, hit rates in validation, answers to the test set and packed rows."""
    flags = (
        "--config.label=ovlabel",
        "--config.steps=4",
        "--config.checkpoint_every=2",
        f"--config.data.test={records[1].split('=')[1]}",
        "--config.pack_length=200",
        "--config.generate.max_new_tokens=4",
        "--config.generate.batch_size=4",
    )
    finish(tmp_path / "one", *records, *flags)
    with ending(group(tmp_path / "two", 2, *records, *flags)) as commands:
        for command in commands:
            assert command.wait() == 0, command.said
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    for file in ("predictions.jsonl", "truth.csv"):
        assert (tmp_path / "two" / file).read_text() == (tmp_path / "one" / file).read_text()


def test_a_run_of_one_needs_nobody():
    one = ProcessGroup()
    assert one.from_main_process(lambda: 3) == one.main_process_first(lambda: 3) == 3
    assert one.gather(4) == [4]
    one.meet()
    one.require_same({"a": "b"})
    one.fail("nobody hears")
    assert jax.process_count() == 1
