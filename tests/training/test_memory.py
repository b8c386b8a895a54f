"""What an update is expected to take, against sizes that follow from the shapes, and the choice."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_model import make_batch, make_model

from affectgpt_jax import build
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.models.affectgpt import init_random_base
from affectgpt_jax.models.qwen2 import PUBLISHED
from affectgpt_jax.training import memory, sharding
from affectgpt_jax.training.optimizer import make_optimizer
from affectgpt_jax.training.step import init_state

GIB = 2**30


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


# --- What is saved --------------------------------------------------------------------------------


def test_what_the_backward_pass_reads_again_is_counted_once():
    def squares(x):
        return jnp.sum(jnp.sin(x) ** 2), None  # saves sin and cos

    assert memory.saved_bytes(squares, shape(8, 16)) == 2 * 8 * 16 * 4


def test_arguments_that_the_backward_pass_reads_are_not_counted():
    def product(x, weights):
        return jnp.sum(x @ weights), None

    assert memory.saved_bytes(product, shape(8, 16), shape(16, 32)) == 0


def test_a_scan_saves_for_every_layer_in_the_dtype_of_each_value():
    def layers(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0], dtype=jnp.float32), None

    half = jnp.bfloat16
    saved = memory.saved_bytes(layers, shape(8, 16, dtype=half), shape(5, 16, 16, dtype=half))
    assert saved % (5 * 8 * 16 * 2) == 0 and 1 <= saved // (5 * 8 * 16 * 2) <= 2


# --- The paper's step -----------------------------------------------------------------------------


def paper(rows: int, length: int, targets: int, layout: str = "data:1"):
    """Model, mesh, state, base and batch of the 7B recipe without dropout, all abstract."""
    mesh = jax.make_mesh(
        sharding.parse_mesh(layout, 1 if layout == "data:1" else 8),
        sharding.AXES,
        devices=jax.devices()[: 1 if layout == "data:1" else 8],
        axis_types=(sharding.AxisType.Auto,) * 3,
    )
    config = affectgpt_qwen25_7b.get_config()
    config.lora.dropout = 0.0
    model = build.model(config, PUBLISHED["Qwen2.5-7B-Instruct"])
    optimizer = make_optimizer(build.optimizer_config(config), config.steps)
    state = sharding.abstract(mesh, lambda key: init_state(model, optimizer, key))
    base = sharding.abstract(mesh, lambda key: init_random_base(model, key))
    integers = shape(rows, length, dtype=jnp.int32)
    batch = {
        **dict.fromkeys(("tokens", "positions", "segment_ids", "soft_index"), integers),
        **dict.fromkeys(("target_positions", "targets"), shape(rows, targets, dtype=jnp.int32)),
        "target_weights": shape(rows, targets),
        "features": {
            "audio": shape(rows, 8, 1024, dtype=jnp.float16),
            "face": shape(rows, 8, 768, dtype=jnp.float16),
        },
        "present": dict.fromkeys(("audio", "face"), shape(rows, dtype=bool)),
    }
    return model, mesh, state, base, batch


def test_the_papers_step_takes_what_its_shapes_say():
    model, _, state, base, batch = paper(3, 512, 256)
    full = memory.estimate(memory.with_remat(model, "full"), state, base, batch)
    assert full.base == 2 * 7_615_616_512
    trained = sum(x.size for x in jax.tree.leaves(state["trainable"]))
    assert trained > 40_370_176
    # Parameters, two moments and the gradient in float32, and a few counters.
    assert full.state == pytest.approx(4 * 4 * trained, rel=1e-6)
    # The input of every layer in bfloat16, and beside it the last norm's and the loss's.
    inputs = 28 * 3 * 512 * 3584 * 2
    assert inputs < full.saved < 1.2 * inputs


def test_no_rematerialisation_saves_the_feed_forward_width_three_times():
    model, _, state, base, batch = paper(3, 512, 256)

    # Without attention's scores, which depend on the backend.
    def attend(query, key, value, segment_ids):
        return query

    execution = dataclasses.replace(model.qwen2.execution, attend=attend)
    model = dataclasses.replace(model, qwen2=model.qwen2.clone(execution=execution))
    saved = memory.estimate(model, state, base, batch).saved
    wide, narrow = (28 * 3 * 512 * width * 2 for width in (18944, 3584))
    # gate, up and their product; of the narrow ones, both norms' inputs and outputs, the input of
    # the output projection, and a little.
    assert 3 * wide + 4 * narrow < saved < 3 * wide + 7 * narrow


@pytest.mark.parametrize(
    ("rows", "length", "device_gib", "policy"),
    [(3, 512, 60, "none"), (48, 512, 60, "full"), (3, 512, 30, "dots"), (3, 512, 20, "full")],
)
def test_the_choice_follows_the_devices_memory(rows, length, device_gib, policy):
    model, mesh, state, base, batch = paper(rows, length, 256)
    choice = memory.choose_remat(model, mesh, state, base, batch, 1, device_gib * GIB)
    assert choice.policy == policy


# --- The choice -----------------------------------------------------------------------------------


def tiny(layout="data:1", rows=8):
    mesh = jax.make_mesh(
        sharding.parse_mesh(layout, 8 if layout != "data:1" else 1),
        sharding.AXES,
        devices=jax.devices()[: 8 if layout != "data:1" else 1],
        axis_types=(sharding.AxisType.Auto,) * 3,
    )
    model = make_model()
    optimizer = make_optimizer(build.optimizer_config(affectgpt_qwen25_7b.get_config()), 10)
    state = sharding.abstract(mesh, lambda key: init_state(model, optimizer, key))
    base = sharding.abstract(mesh, lambda key: init_random_base(model, key))
    batch = sharding.abstract_batch(mesh, make_batch([16] * rows))
    return model, mesh, state, base, batch


@pytest.mark.parametrize("policy", memory.POLICIES)
def test_the_first_policy_that_fits_is_chosen(policy):
    model, mesh, state, base, batch = tiny()
    need = memory.estimate(memory.with_remat(model, policy), state, base, batch).total
    choice = memory.choose_remat(model, mesh, state, base, batch, 1, int(need / memory.USABLE) + 1)
    assert choice.policy == policy
    assert "may not fit" not in str(choice)


def test_where_nothing_fits_the_last_policy_is_tried_and_it_says_so():
    choice = memory.choose_remat(*tiny(), 1, 1000)
    assert choice.policy == "full"
    assert str(choice).startswith("remat full: about 0.0 of 0.0 GiB (0.0 base, ")
    assert str(choice).endswith("; it may not fit")


def test_a_device_without_a_limit_keeps_everything():
    choice = memory.choose_remat(*tiny(), 1, memory.device_limit())
    assert choice.policy == "none" and choice.limit is None
    assert "knows no memory limit" in str(choice)


def test_devices_and_accumulation_share_the_rows_and_fsdp_the_parameters():
    one, split = (
        memory.choose_remat(*tiny(layout), parts, None).memory
        for layout, parts in (("data:1", 1), ("data:2,fsdp:2,tensor:2", 2))
    )
    assert split.saved == pytest.approx(one.saved / 8, rel=0.05)
    assert split.base < one.base / 2
