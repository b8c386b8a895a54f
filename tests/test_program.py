"""The seam: any loss, any mesh, from a config and shapes to compiled updates."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from affectgpt_jax import build
from affectgpt_jax.config import ConfigError
from affectgpt_jax.configs import demo
from affectgpt_jax.data.modalities import INPUT_MODES
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.data.pipeline import TrainPipeline, empty_batch
from affectgpt_jax.data.prompts import LABEL_TYPES
from affectgpt_jax.models.affectgpt import loss_sum_and_count
from affectgpt_jax.models.attention import causal
from affectgpt_jax.program import make_program
from affectgpt_jax.training import memory, sharding
from affectgpt_jax.training.losses import cross_entropy

BUCKET = Bucket(16, 4)
ROWS = 8


def make(loss=cross_entropy, mesh="data:1", limit=None, **changes):
    """The program of a small config on text alone."""
    config = demo.get_config()
    config.input, config.batch_size = "text", ROWS
    config.update(changes)
    devices = jax.devices()[: 8 if mesh == "data:8" else 1]
    return make_program(
        config,
        sharding.make_mesh(mesh, devices),
        {BUCKET.length: empty_batch(ROWS, BUCKET, {})},
        loss,
        llm=build.base_config("tiny"),
        attend=causal,
        memory_limit=limit,
    )


def random_rows():
    rng, batch = np.random.default_rng(0), empty_batch(ROWS, BUCKET, {})
    batch["tokens"] = rng.integers(0, 500, (ROWS, 16), dtype=np.int32)
    batch["targets"] = rng.integers(0, 500, (ROWS, 4), dtype=np.int32)
    batch["segment_ids"][:] = 1
    batch["target_positions"][:] = np.arange(8, 12)
    batch["target_weights"][:, :3] = 1
    return batch


def preference(model, base, trainable, batch, key):
    """A loss that counts rows instead of tokens, and reports a metric of its own."""
    total, _ = loss_sum_and_count(model, base, trainable, batch, key)
    rows = jnp.float32(len(batch["tokens"]))
    return 2 * total, rows, {"twice": 4 * total}


def run(program, batch):
    base, state = program.init_base(0), program.init_state(0)
    before = program.eval_step(state["trainable"], base, batch)
    placed = sharding.shard_batch(program.mesh, batch)
    return before, program.compile()[BUCKET.length](state, base, placed)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_any_loss_is_divided_by_its_own_count_and_reports_its_own_metrics(microbatches):
    program = make(preference, gradient_accumulation_steps=microbatches)
    (total, count), (state, metrics) = run(program, random_rows())
    assert count == ROWS
    # Float32 sums of a few hundred terms, in another order.
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["twice"], 2 * total / count, rtol=1e-5)
    assert metrics["supervised_tokens"] == ROWS
    assert state["step"] == 1


def test_cross_entropy_is_the_mean_over_supervised_tokens():
    program, batch = make(), random_rows()
    (total, count), (_, metrics) = run(program, batch)
    assert count == metrics["supervised_tokens"] == batch["target_weights"].sum()
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-5)


def test_a_program_on_another_mesh_has_the_same_parameters_elsewhere():
    program = make()
    mesh = AbstractMesh((2, 4, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    moved = program.on(mesh, remat="full")
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), p.base) for p in (program, moved)]
    assert shapes[0] == shapes[1]
    for layer in moved.base["layers"]:
        kernel = layer["q_proj"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape)[0] == kernel.shape[0] // 4
    assert moved.model.decoder.compute.remat == "full"
    assert moved.model.decoder.compute.shard.data_parallel_size == 8


def test_the_policy_follows_from_the_memory_of_a_device():
    assert make().model.decoder.compute.remat == "none"
    tight = make(limit=1000)
    assert tight.model.decoder.compute.remat == tight.remat.policy == memory.POLICIES[-1]
    assert not tight.remat.fits
    named = make(limit=1000, remat="none")
    assert named.remat is None and named.model.decoder.compute.remat == "none"


def test_rows_that_the_devices_cannot_share_are_refused():
    with pytest.raises(ConfigError, match="use a multiple of 16"):
        make(mesh="data:8", gradient_accumulation_steps=2)


def test_the_same_seed_draws_the_same_state_on_any_mesh():
    one, eight = (make(mesh=mesh).init_state(3) for mesh in ("data:1", "data:8"))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(eight))


# All modes beside all label types; nothing depends on which meets which.
@pytest.mark.parametrize(("mode", "label"), [*zip(INPUT_MODES, itertools.cycle(LABEL_TYPES))])
def test_every_input_mode_and_label_type_has_an_update(mode, label, demo_records, tmp_path):
    config = demo.get_config()
    # The long question with all candidate words needs more tokens than the demo's other prompts.
    config.update({"input": mode, "label": label, "batch_size": ROWS, "max_tokens": 160})
    config.data.update({split: str(path) for split, path in demo_records.items()})
    tokenizer = build.tokenizer(build.base_directory("tiny"), build.base_config("tiny"))
    data = build.data(config, tmp_path, tokenizer, say=print)
    pipeline = TrainPipeline(data.train, batch_size=ROWS, max_tokens=160, num_buckets=1)
    program = make_program(
        config,
        sharding.make_mesh("data:-1"),
        pipeline.filler_batches(),
        llm=build.base_config("tiny"),
        attend=causal,
    )
    [batch] = program.batches.values()
    first = pipeline.batch(0)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, batch)
    assert first["target_weights"].any(axis=1).all(), "every clip has an answer to learn"
    named = {"audio", "face"} if mode == "multi_text" else {"audio", "face", "frame", "image"}
    assert first["features"].keys() == {name for name in named if name in mode or "multi_t" in mode}
    state, metrics = jax.eval_shape(program.train_step, program.state, program.base, batch)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, program.state)
    assert metrics["loss"].shape == ()
