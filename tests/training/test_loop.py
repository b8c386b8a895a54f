"""What the training loop promises about the device: compiled first, donated, nothing in between."""

import functools
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from tiny_model import make_batch, make_model

from affectgpt_jax import build, runtime, train
from affectgpt_jax.common import trees
from affectgpt_jax.common.identity import Identity
from affectgpt_jax.configs import demo as demo_config
from affectgpt_jax.data.pipeline import TrainPipeline
from affectgpt_jax.models.affectgpt import init_random_base
from affectgpt_jax.program import Program, lower_step
from affectgpt_jax.training import loop, sharding
from affectgpt_jax.training.checkpoints import Checkpoints, SavedRun
from affectgpt_jax.training.distributed import ProcessGroup
from affectgpt_jax.training.losses import cross_entropy
from affectgpt_jax.training.metrics_writer import read_metrics
from affectgpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from affectgpt_jax.training.step import init_state, make_train_step

# --- The update -----------------------------------------------------------------------------------


# By which profiles tell them apart (`benchmarks.profile_table`).
SCOPES = "embedding Fusion attention low_rank dropout lm_head optimizer".split()


def lowered_step(mesh_text, dropout=0.0):
    """A tiny update, lowered as training does, and its abstract state."""
    mesh, config = sharding.make_mesh(mesh_text), demo_config.get_config()
    model = make_model(dropout=dropout)
    optimizer_config = build.optimizer_config(config)
    optimizer = make_optimizer(optimizer_config, 10)
    schedule = learning_rate_schedule(optimizer_config, 10)
    state = sharding.abstract(mesh, lambda key: init_state(model, optimizer, key))
    base = sharding.abstract(mesh, lambda key: init_random_base(model, key))
    batch = sharding.abstract_batch(mesh, make_batch([16] * 8))
    step = make_train_step(model, cross_entropy, optimizer, schedule, seed=0)
    return lower_step(step, mesh, state, base, batch), state


@pytest.fixture(scope="module")
def names_of_operations():
    return lowered_step("data:8", dropout=0.1)[0].as_text(debug_info=True)


def test_every_array_of_the_state_is_updated_in_its_own_memory():
    lowered, state = lowered_step("data:2,fsdp:2,tensor:2")
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    donated, kept = lowered.args_info[0][0], lowered.args_info[0][1:]
    assert all(info.donated for info in jax.tree.leaves(donated))
    assert not any(info.donated for info in jax.tree.leaves(kept))
    # Donated is a wish; what XLA made of it is that outputs share the memory of inputs.
    assert compiled.memory_analysis().alias_size_in_bytes >= trees.device_nbytes(state)


@pytest.mark.parametrize("scope", SCOPES)
def test_profilers_see_the_parts_of_the_model_by_name(scope, names_of_operations):
    assert re.search(rf"[/(]{scope}[/)]", names_of_operations)


# --- The loop -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(demo_records):
    """Flags of a run of a few steps on text alone."""
    return [
        *(f"--config.data.{split}={demo_records[split]}" for split in ("train", "val")),
        "--config.data.test=",
        "--config.input=text",
        "--config.label=description",
        "--config.steps=2",
        "--config.checkpoint_every=2",
        "--config.batch_size=8",
        "--config.num_buckets=1",
    ]


def test_everything_is_compiled_before_the_first_batch_is_read(records, tmp_path, monkeypatch):
    order = []
    compile_steps, batches = Program.compile, TrainPipeline.batches

    def compiling(*args, **kwargs):
        compiled = compile_steps(*args, **kwargs)
        order.append(f"compiled {len(compiled)}")
        return compiled

    def reading(self, *args, **kwargs):
        order.append(f"reading of {len(self.buckets)}")
        return batches(self, *args, **kwargs)

    monkeypatch.setattr(Program, "compile", compiling)
    monkeypatch.setattr(TrainPipeline, "batches", reading)
    train.main([f"--workdir={tmp_path}", *records])
    assert order == ["compiled 1", "reading of 1"]


def test_an_array_that_slips_into_a_step_from_the_host_is_an_error(records, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.sharding, "shard_batch", lambda mesh, batch: batch)
    with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
        train.main([f"--workdir={tmp_path}", *records])


def test_a_step_forbids_transfers_in_both_directions_and_saving_does_not(
    records, tmp_path, monkeypatch
):
    seen = {}

    def watch(owner, name, where):
        before = getattr(owner, name)

        def watching(*args, **kwargs):
            seen[where] = (
                jax.config.jax_transfer_guard_host_to_device,
                jax.config.jax_transfer_guard_device_to_host,
            )
            return before(*args, **kwargs)

        monkeypatch.setattr(owner, name, watching)

    watch(loop.StepReporter, "submit", "step")
    watch(train.Checkpoints, "save", "save")
    train.main([f"--workdir={tmp_path}", *records])
    assert seen["step"] == ("disallow", "disallow")
    assert "disallow" not in seen["save"]


class TwoBatches:
    """Training data of which the third batch never comes: `hangs` is called instead."""

    def __init__(self, hangs):
        self.hangs = hangs

    def batches(self, start, stop):
        yield from [{"tokens": np.zeros((8, 4), np.int32)}] * 2
        self.hangs()

    def samples(self, step):
        return np.ones((8, 2), int)

    def component_counts(self, step):
        return {"train": 8}


def test_what_is_finished_is_saved_where_the_next_batch_does_not_come(tmp_path):
    mesh, config = sharding.make_mesh("data:8"), demo_config.get_config()
    config.steps = config.checkpoint_every = 9
    state = {
        "trainable": {"lora": {"a": np.zeros(4, np.float32)}},
        "opt_state": {"m": np.zeros(4, np.float32)},
        "step": np.int32(0),
    }
    state = jax.device_put(state, sharding.replicated(mesh))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, base, batch):
        return jax.tree.map(lambda leaf: leaf + 1, state), {"loss": 1.0 / (1 + state["step"])}

    said = []

    def hangs():
        with ThreadPoolExecutor(1) as pool:  # a thread of its own, as the watchdog's
            said.append(pool.submit(session.watchdog.rescue).result())
        raise TimeoutError("never came")

    session = loop.Session(config, tmp_path, ProcessGroup())
    with pytest.raises(TimeoutError, match="never came"):
        with session.running(0), Checkpoints(tmp_path, Identity("b", "0" * 64)) as checkpoints:
            none = lambda *_: ({}, [])  # noqa: E731
            loop.run_steps(
                session, {4: update}, state, {}, TwoBatches(hangs), mesh, checkpoints, none, 0,
                lambda samples: 0,
            )  # fmt: skip
    assert said == ["step 2 is saved"]
    saved = SavedRun(tmp_path)
    assert saved.steps == (2,) and saved.val_loss(2) is None
    np.testing.assert_array_equal(saved.trainable(2)["lora"]["a"], np.full(4, 2.0))
    logged = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert [(r["step"], r["train/loss"]) for r in logged] == [(1, 1.0), (2, 0.5)]


# --- Compiled programs ----------------------------------------------------------------------------


def test_a_program_is_compiled_once_and_found_again(tmp_path, monkeypatch):
    from jax.experimental.compilation_cache import compilation_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    found = []
    listener = lambda event, **_: found.append(event)  # noqa: E731
    try:
        for name, value in zip(names, (None, 0.0)):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        runtime.use_compilation_cache()
        jax.monitoring.register_event_listener(listener)
        for _ in range(2):
            jax.clear_caches()
            jax.jit(lambda x: np.float32(3) * x + 1).lower(
                jax.ShapeDtypeStruct((7,), "f4")
            ).compile()
        hits = found.count("/jax/compilation_cache/cache_hits")
        assert hits == 1
        assert list((tmp_path / "affectgpt_jax" / "xla").iterdir())
    finally:
        jax.monitoring.unregister_event_listener(listener)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
