"""Training as commands of their own, small enough to be started, killed and started again."""

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.resource_tracker
import os
import resource
import runpy
import signal
import socket
import sys
import time

import jax
import numpy as np

from affectgpt_jax.data import demo
from affectgpt_jax.data.pipeline import TrainPipeline
from affectgpt_jax.data.records import write_records
from affectgpt_jax.training.checkpoints import SavedRun
from affectgpt_jax.training.metrics_writer import read_metrics

TRAIN = "affectgpt_jax.train"

# Dropout, so that its masks are part of what must repeat; descriptions, which validation does not
# have to write.
SMALL = (
    "--config.steps=12",
    "--config.checkpoint_every=3",
    "--config.log_every=1",
    "--config.max_to_keep=2",
    "--config.batch_size=4",
    "--config.label=description",
    "--config.num_buckets=1",
    "--config.lora.rank=2",
    "--config.lora.dropout=0.1",
    "--config.projectors.fusion_width=16",
    "--config.data.test=",
)


def write_small_records(folder):
    """Flags that name small record directories, which are written under `folder`."""
    for split, size in (("train", 40), ("val", 8)):
        encoders = dict.fromkeys(demo.DEFAULT_FEATURES, "demo")
        write_records(folder / split, demo.World(0).records(split, size), encoders=encoders)
    return tuple(f"--config.data.{split}={folder / split}" for split in ("train", "val"))


# A server that has imported everything forks a process for each command, which saves it half of its
# time. Nothing that it imports starts JAX's devices, or threads.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["affectgpt_jax.train", "tensorboardX", "matplotlib.figure"])


def _run(module, arguments, said, cache, settings, before):
    """`python -m MODULE`, in a process of its own."""
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    # A tracker of its own for what a killed process leaves, or all of it is reported at the end.
    tracker = multiprocessing.resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None
    # Of one device, and with one cache of compiled programs for all commands of a session.
    for name, value in {
        "jax_compilation_cache_dir": cache,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_disable_most_optimizations": True,
        **settings,
    }.items():
        jax.config.update(name, value)
    if before:
        before()
    sys.argv[1:] = arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which `multiprocessing` would leave out


def start(module, arguments, said, settings=None, before=None):
    """Start `python -m MODULE`, whose words go into a file; returns its process."""
    cache = jax.config.jax_compilation_cache_dir
    process = _SERVER.Process(
        target=_run, args=(module, arguments, said, cache, settings or {}, before)
    )
    process.start()
    return process


def limit_file_size(size):
    """For a command: no file may grow over this. Stands in for a full disk, without a mount."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def stop_data_before(step):
    """For a command: the batch of a step, from 0, never comes. Stands in for storage that hangs."""
    whole = TrainPipeline.batches

    def batches(self, start, stop):
        yield from whole(self, start, min(stop, step))
        time.sleep(1000)

    TrainPipeline.batches = batches


class Command:
    """A training command that has been started.

    Args:
        workdir: of the run; what the command prints goes beside it.
        flags: further ones.
        settings: JAX's, by name.
        before: called in the process before it trains.
        module: what runs; `train` is a small run.
    """

    def __init__(self, workdir, *flags, settings=None, before=None, module=TRAIN):
        self.workdir = workdir
        self._said = workdir.parent / f"{workdir.name}-{time.monotonic_ns()}.txt"
        self._said.touch()
        arguments = [f"--workdir={workdir}", *(SMALL if module == TRAIN else ()), *flags]
        self.process = start(module, arguments, self._said, settings, before)

    def wait(self, timeout_s=400):
        """Its status, when it has ended."""
        self.process.join(timeout_s)
        status = self.process.exitcode
        self.kill()
        return status

    @property
    def ended(self):
        return self.process.exitcode is not None

    @property
    def said(self):
        return self._said.read_text()

    def until(self, happened, timeout_s=400):
        """Wait for what `happened()` tells, or for the end of the command; whether it happened."""
        for _ in range(int(timeout_s / 0.002)):
            if happened():
                return True
            if self.ended:
                return False
            time.sleep(0.002)
        self.kill()
        raise TimeoutError(self.said)

    def at_step(self, step):
        """A condition for `until`: the step is logged."""
        return lambda: step in losses(self.workdir)

    def signal(self, number=signal.SIGKILL):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()
        self.process.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def finish(workdir, *flags, **more):
    """Run a command to its end; what it said."""
    with Command(workdir, *flags, **more) as command:
        assert command.wait() == 0, command.said
        return command.said


def enter(folders, process_id):
    """Make a folder of its own the current one of each process."""
    os.chdir(folders[process_id])


def group(workdir, count, *flags, settings=None, before=None, module=TRAIN):
    """Start the processes of one run; `before(i)` is called in each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = (*flags, f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}")
    return [
        Command(
            workdir,
            *flags,
            f"--process_id={i}",
            settings=settings,
            before=before and functools.partial(before, i),
            module=module,
        )
        for i in range(count)
    ]


@contextlib.contextmanager
def ending(commands):
    """Leaves no command behind."""
    with contextlib.ExitStack() as stack:
        for command in commands:
            stack.enter_context(command)
        yield commands


def trace(workdir, prefix=("train/", "val/")):
    """Every logged value that a run repeats, by step and name."""
    with contextlib.suppress(FileNotFoundError):
        return {
            (record["step"], name): value
            for record in read_metrics(workdir / "metrics.jsonl")
            for name, value in record.items()
            if name.startswith(prefix)
        }
    return {}


def losses(workdir):
    return {step: value for (step, _), value in trace(workdir, ("train/loss",)).items()}


def assert_undisturbed(workdir, expected):
    """Compare a run with one that nothing happened to: trace and last weights, bit by bit."""
    assert trace(workdir) == trace(expected)
    found, wanted = SavedRun(workdir), SavedRun(expected)
    assert found.steps[-1] == wanted.steps[-1]
    assert found.best == wanted.best
    for x, y in zip(
        jax.tree.leaves(found.trainable(found.steps[-1])),
        jax.tree.leaves(wanted.trainable(wanted.steps[-1])),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    assert not list(workdir.glob("checkpoints/.*")), "something half-written is left"
