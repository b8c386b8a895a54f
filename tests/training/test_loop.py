"""What the training loop promises about the device: compiled first, donated, nothing in between."""

import re

import jax
import numpy as np
import pytest
from tiny_model import make_batch, make_model

from affectgpt_jax import build, runtime, train
from affectgpt_jax.common import trees
from affectgpt_jax.configs import demo as demo_config
from affectgpt_jax.data.pipeline import TrainPipeline
from affectgpt_jax.models.affectgpt import init_random_base
from affectgpt_jax.program import Program, lower_step
from affectgpt_jax.training import loop, sharding
from affectgpt_jax.training.losses import cross_entropy
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
