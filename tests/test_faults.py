"""What clusters do to a run: after each fault the same command goes on, and the trace of losses is
that of a run that nothing happened to, bit by bit."""

import ctypes
import functools
import itertools
import random
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import (
    Command,
    assert_undisturbed,
    ending,
    finish,
    group,
    limit_file_size,
    losses,
    stop_data_before,
)

from affectgpt_jax import build, program
from affectgpt_jax.data import pipeline
from affectgpt_jax.restore import load_config
from affectgpt_jax.training import stopping
from affectgpt_jax.training.checkpoints import SavedRun

# --- Killed ---------------------------------------------------------------------------------------


def kill_at_random_moments(workdir, kills, rng, *flags):
    """Kill a run, start it again, kill it again; the steps that were done each time."""
    killed = []
    while len(killed) < kills:
        with Command(workdir, *flags) as command:
            if rng.random() < 0.2:  # before it trains
                time.sleep(rng.uniform(0, 3))
            else:
                # Its first line of progress, before which the steps on disk may be another's.
                trains = functools.partial(re.search, r"step \d+/\d+  loss")
                assert command.until(lambda: trains(command.said)), command.said  # noqa: B023
                step = max(losses(workdir)) + rng.randint(0, 3)
                command.until(functools.partial(has_done, workdir, step))
                time.sleep(rng.uniform(0, 0.1))  # in a step, in validation, while it saves
            if command.ended:
                assert command.wait() == 0, command.said
                return killed
            command.signal(signal.SIGKILL)
            assert command.wait() == -signal.SIGKILL
            killed.append(max(losses(workdir), default=0))
    return killed


def kill_at_checkpoint(workdir, step, *flags):
    """Start a run, and kill it when it has saved this step."""
    with Command(workdir, *flags) as command:
        assert command.until((workdir / "checkpoints" / str(step)).exists)
        command.signal(signal.SIGKILL)
        command.wait()


def has_done(workdir, step):
    return max(losses(workdir), default=0) >= step


def test_a_run_that_is_killed_at_five_random_moments_repeats_its_losses(
    records, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    killed = kill_at_random_moments(workdir, 5, random.Random(0), *records)
    finish(workdir, *records)
    assert_undisturbed(workdir, undisturbed)
    print("killed after the steps", killed)
    assert killed and max(killed) > 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_survives_fifty_kills(records, tmp_path):
    flags = (*records, "--config.steps=150", "--config.checkpoint_every=2")
    finish(tmp_path / "expected", *flags)
    killed = kill_at_random_moments(tmp_path / "run", 50, random.Random(1), *flags)
    finish(tmp_path / "run", *flags)
    assert len(killed) == 50
    assert_undisturbed(tmp_path / "run", tmp_path / "expected")
    print("killed after the steps", killed)


def test_a_run_that_is_killed_while_it_saves_resumes_from_the_checkpoint_before(
    records, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    with Command(workdir, *records) as command:
        assert command.until((workdir / "checkpoints" / ".saving-6").exists)
        command.signal(signal.SIGKILL)
        command.wait()
    assert "resumed from the checkpoint of step 3" in finish(workdir, *records)
    assert_undisturbed(workdir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_that_is_killed_while_it_writes_its_data_writes_them_again(split, tmp_path):
    flags = ("--config.data.train=demo", "--config.data.val=demo", "--config.steps=3")
    workdir = tmp_path / "run"
    directory = workdir / "data" / f"demo-0-{split}"
    with Command(workdir, *flags) as command:
        assert command.until(lambda: len([*directory.glob(".writing-*/*")]) > 0)
        time.sleep(0.05)
        command.signal(signal.SIGKILL)
        command.wait()
    assert not (directory / "manifest.json").exists()
    finish(workdir, *flags)
    assert not [*directory.glob(".writing-*")]
    finish(tmp_path / "expected", *flags)
    assert_undisturbed(workdir, tmp_path / "expected")


# --- Told to stop ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_that_is_told_to_stop_saves_first(number, records, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    with Command(workdir, *records) as command:
        assert command.until(command.at_step(2))
        command.signal(number)
        if number == signal.SIGTERM:
            assert "in use by process" in refused(workdir, *records)
        assert command.wait() == 128 + number, command.said
        assert f"{number.name}: the run ends as soon as it has saved" in command.said
        assert "the same command goes on from there" in command.said
    stopped = int(command.said.split("stopped after step ")[1].split(";")[0])
    assert SavedRun(workdir).steps[-1] == stopped < 12
    assert f"resumed from the checkpoint of step {stopped}" in finish(workdir, *records)
    assert_undisturbed(workdir, undisturbed)


def stop_at(call):
    """For a command: a wish to stop that is there when it is asked for the n-th time."""
    calls = itertools.count(1)
    stopping.StopSignals.reached = lambda self: next(calls) >= call


@pytest.mark.slow
@pytest.mark.parametrize("call", [3, 4, 5])  # at the end of step 3, and before each of its batches
def test_a_run_that_stops_where_it_was_to_validate_does_so_when_it_resumes(
    call, records, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    with Command(workdir, *records, before=functools.partial(stop_at, call)) as command:
        assert command.wait() == 143, command.said
    run = SavedRun(workdir)
    assert run.steps == (3,) and run.val_loss(3) is None
    finish(workdir, *records)
    assert_undisturbed(workdir, undisturbed)


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    records, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    kill_at_checkpoint(workdir, 6, *records)
    newest = workdir / "checkpoints" / "6"
    array = max((newest / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)
    said = refused(workdir, *records)
    assert f"{newest} is damaged: {array.relative_to(newest)}: sha256: found" in said
    assert "the newest intact checkpoint is that of step 3: pass --fallback" in said
    assert "going on from step 3" in finish(workdir, *records, "--fallback")
    assert_undisturbed(workdir, undisturbed)
    assert newest.with_name("6.damaged").exists()


def refused(workdir, *flags, **more):
    """What a command says that ends with status 1 and one sentence."""
    with Command(workdir, *flags, **more) as command:
        assert command.wait() == 1, command.said
        (said,) = [line for line in command.said.splitlines() if "error: " in line]
        assert "Traceback" not in command.said
        return said


# --- Disks ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_is_full_stops_the_run_and_a_larger_one_lets_it_go_on(
    records, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    kill_at_checkpoint(workdir, 3, *records)
    said = refused(workdir, *records, before=functools.partial(limit_file_size, 100_000))
    assert "checkpoint cannot be written" in said and "is the disk full?" in said
    assert "resumed from the checkpoint of step 3" in finish(workdir, *records)
    assert_undisturbed(workdir, undisturbed)


def without_the_powers_of_root():
    """Root may write anywhere; without this capability it is bound by permissions as others are."""
    dac_override, dac_read_search = 1, 2
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    for word in (0, 1):  # effective and permitted
        data[word] &= ~(1 << dac_override | 1 << dac_read_search)
    assert libc.capset(header, data) == 0


def test_a_workdir_that_may_not_be_written_is_refused(records, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir(mode=0o555)
    said = refused(workdir, *records, before=without_the_powers_of_root)
    assert said == (
        f"error: {workdir}/run.lock: Permission denied; the run needs a --workdir that it can "
        "write to, with room"
    )


# --- Bad values -----------------------------------------------------------------------------------


def clip_of_step(workdir, step):
    """The name of the first clip that a run sees in a step."""
    config = load_config(workdir)
    directory, llm = build.base_directory(config.llm), build.base_config(config.llm)
    data = build.data(config, workdir, build.tokenizer(directory, llm), lambda text: None)
    batches = pipeline.TrainPipeline(
        data.train,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        num_buckets=config.num_buckets,
        seed=config.seed,
    )
    return data.train[0].dataset.index[batches.planned(step - 1).records[0, 0]].name


@pytest.mark.slow
def test_a_record_that_is_damaged_in_mid_epoch_stops_the_run_by_its_name(
    records, undisturbed, tmp_path
):
    train_records = tmp_path / "train"
    shutil.copytree(records[0].split("=")[1], train_records)
    flags = (f"--config.data.train={train_records}", records[1], "--config.data.verify=False")
    name = clip_of_step(undisturbed, 8)
    (shard,) = train_records.glob("*.array_record")
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(name.encode())] ^= 0x10
    shard.write_bytes(damaged)
    workdir = tmp_path / "run"
    said = refused(workdir, *flags)
    assert f"{shard}, record " in said and f"({name!r}) cannot be read" in said
    assert losses(workdir), "it was to happen in mid-epoch"
    shard.write_bytes(whole)
    finish(workdir, *flags)
    assert_undisturbed(workdir, undisturbed)


def poison_weights(step):
    """For a command: a NaN in a moment of the optimizer, which no loss has shown yet."""
    make = program.make_train_step

    def make_train_step(*args, **kwargs):
        train_step = make(*args, **kwargs)

        def poisoned(state, base, batch):
            state, metrics = train_step(state, base, batch)
            now = state["step"] == step
            moments = jax.tree.map(
                lambda x: jnp.where(now, jnp.nan, x) if x.ndim else x, state["opt_state"]
            )
            return state | {"opt_state": moments}, metrics

        return poisoned

    program.make_train_step = make_train_step


def poison_batch(step):
    """For a command: a NaN in the features of a batch."""
    batch = pipeline.TrainPipeline.batch

    def poisoned(self, number):
        out = batch(self, number)
        if number == step - 1:
            out["features"]["face"][0, 0, 0, 0] = np.nan
        return out

    pipeline.TrainPipeline.batch = poisoned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poison", "step", "said"),
    [
        (poison_weights, 6, "step 6 of 12 gave values that are not finite in opt_state/"),
        (poison_batch, 5, "step 5 of 12 gave train/grad_norm nan, train/loss nan"),
    ],
)
def test_nan_in_weights_or_in_a_batch_stops_the_run_and_is_never_saved(
    poison, step, said, records, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    sentence = refused(workdir, *records, before=functools.partial(poison, step))
    assert said in sentence
    assert f"last good checkpoint: {workdir}/checkpoints/3)" in sentence
    assert SavedRun(workdir).steps == (3,)
    finish(workdir, *records)
    assert_undisturbed(workdir, undisturbed)


# --- Several processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("number_of_signal", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_together_whichever_is_told_to(
    number, number_of_signal, records, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    flags = (*records, "--config.steps=2000", "--config.checkpoint_every=500")
    with ending(group(workdir, 2, *flags)) as commands:
        assert commands[0].until(commands[0].at_step(2))
        commands[number].signal(number_of_signal)
        for command in commands:
            assert command.wait() in (143, 128 + number_of_signal), command.said
        assert "stopped after step" in commands[0].said
    stopped = int(commands[0].said.split("stopped after step ")[1].split(";")[0])
    assert SavedRun(workdir).steps[-1] == stopped < 2000
    assert max(losses(workdir)) == stopped


def test_a_run_whose_data_hang_saves_what_it_has_and_goes_on_from_there(
    records, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    before = functools.partial(stop_data_before, 2)
    with Command(workdir, *records, "--config.step_timeout=12.0", before=before) as command:
        assert command.wait() == 1
        assert "no progress for 12 s since step 1" in command.said
        assert "; step 2 is saved; the same command resumes" in command.said
    assert SavedRun(workdir).steps == (2,)
    assert "resumed from the checkpoint of step 2" in finish(workdir, *records)
    assert_undisturbed(workdir, undisturbed)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_with_the_stacks_of_its_threads(records, tmp_path):
    flags = (*records, "--config.steps=2000", "--config.checkpoint_every=500")
    with ending(group(tmp_path / "run", 2, *flags, "--config.step_timeout=5.0")) as commands:
        assert commands[0].until(commands[0].at_step(2))
        commands[1].signal(signal.SIGSTOP)
        assert commands[0].wait() == 1
        assert "error: no progress for 5 s since step" in commands[0].said
        assert "most recent call first" in commands[0].said
        commands[1].signal(signal.SIGCONT)
        assert commands[1].wait() == 1
        assert "process 0 on 127.0.0.1 failed: no progress for 5 s" in commands[1].said
    assert not [*(tmp_path / "run" / "checkpoints").glob("*")]
