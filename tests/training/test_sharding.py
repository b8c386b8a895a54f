"""The mesh and the rules, on the shapes of the 7B model: nothing here holds its weights."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_batch

from affectgpt_jax import build
from affectgpt_jax.common import trees
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.models.affectgpt import init_random_base
from affectgpt_jax.models.decoder import PUBLISHED
from affectgpt_jax.program import lower_step
from affectgpt_jax.training import sharding
from affectgpt_jax.training.losses import cross_entropy
from affectgpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from affectgpt_jax.training.sharding import MeshError, parse_mesh
from affectgpt_jax.training.step import init_state, make_train_step

# --- The mesh -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data:-1", (8, 1, 1)),
        ("data:8", (8, 1, 1)),
        ("fsdp:-1", (1, 8, 1)),
        ("data:2,fsdp:4", (2, 4, 1)),
        ("tensor:2,data:-1", (4, 1, 2)),
        (" data : 2 , fsdp : 2 , tensor : 2 ", (2, 2, 2)),
        ("data:1,fsdp:-1,tensor:8", (1, 1, 8)),
    ],
)
def test_a_mesh_is_read_in_the_order_data_fsdp_tensor(text, shape):
    assert parse_mesh(text, 8) == shape
    assert sharding.make_mesh(text).devices.shape == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "AXIS:SIZE"),
        ("data", "'data' is not AXIS:SIZE"),
        ("rows:8", "'rows:8' is not AXIS:SIZE with an axis out of"),
        ("data:0", "a size of 1 or more"),
        ("data:-2", "or -1 for all devices"),
        ("data:2,", "'' is not AXIS:SIZE"),
        ("data:-1,fsdp:-1", "only one axis can be -1"),
        ("data:4", "8 devices"),
        ("data:16", "8 devices"),
        ("data:-1,fsdp:3", "8 devices"),
        ("data:-1,fsdp:16", "8 devices"),
        ("data:2,data:8", "twice"),
    ],
)
def test_a_mesh_that_the_devices_cannot_form_is_refused(text, message):
    with pytest.raises(MeshError, match=message) as error:
        parse_mesh(text, 8)
    assert repr(text) in str(error.value)


# --- The rules ------------------------------------------------------------------------------------

LLM = PUBLISHED["Qwen2.5-7B-Instruct"]


def paper(mesh, llm=LLM, **changes):
    """Train step and abstract state and base of the paper's config on a mesh."""
    config = affectgpt_qwen25_7b.get_config()
    config.update(changes)
    model = build.model(config, llm, sharding.ActivationConstraint(mesh))
    optimizer_config = build.optimizer_config(config)
    optimizer = make_optimizer(optimizer_config, config.steps)
    schedule = learning_rate_schedule(optimizer_config, config.steps)
    step = make_train_step(model, cross_entropy, optimizer, schedule, seed=config.seed)
    base = sharding.abstract(mesh, lambda key: init_random_base(model, key))
    return step, sharding.abstract(mesh, lambda key: init_state(model, optimizer, key)), base


def splits(tree):
    """By path: into how many parts each dimension of a leaf is split."""
    return {
        trees.path_name(path): tuple(np.array(leaf.shape) // leaf.sharding.shard_shape(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def bytes_per_device(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def test_fsdp_splits_every_large_weight_of_the_7b_base():
    _, _, base = paper(sharding.make_mesh("fsdp:8"))
    found = splits(base)
    for i in range(LLM.num_hidden_layers):
        for name in ("q", "k", "v", "gate", "up"):
            assert found[f"layers/{i}/{name}_proj/kernel"] == (8, 1), (i, name)
        for name in ("o", "down"):
            assert found[f"layers/{i}/{name}_proj/kernel"] == (1, 8), (i, name)
        assert found[f"layers/{i}/q_proj/bias"] == (1,)
        assert found[f"layers/{i}/input_layernorm/scale"] == (1,)
    assert found["embed_tokens"] == (1, 8)
    assert found["lm_head"] == (8, 1)
    assert found["norm/scale"] == (1,)
    # bfloat16, an eighth of it a device; norms and biases are whole, under a thousandth.
    assert 1 <= bytes_per_device(base) / (2 * 7_615_616_512 / 8) < 1.001


def test_tensor_splits_heads_feed_forward_and_vocabulary_of_the_7b_model():
    _, state, base = paper(sharding.make_mesh("data:2,tensor:4"))
    found = splits(base) | splits(state["trainable"]["lora"])
    for name in ("q", "k", "v", "gate", "up"):
        assert found[f"layers/{name}_proj/lora_a"] == (1, 1, 1), name
        assert found[f"layers/{name}_proj/lora_b"] == (1, 1, 4), name
    for name in ("o", "down"):
        assert found[f"layers/{name}_proj/lora_a"] == (1, 4, 1), name
        assert found[f"layers/{name}_proj/lora_b"] == (1, 1, 1), name
    for i in range(LLM.num_hidden_layers):
        for name in ("q", "k", "v", "gate", "up"):
            assert found[f"layers/{i}/{name}_proj/kernel"] == (1, 4), (i, name)
        for name in ("o", "down"):
            assert found[f"layers/{i}/{name}_proj/kernel"] == (4, 1), (i, name)
        for name in "qkv":
            assert found[f"layers/{i}/{name}_proj/bias"] == (4,), (i, name)
    assert found["embed_tokens"] == (4, 1)
    assert found["lm_head"] == (1, 4)
    assert 1 <= bytes_per_device(base) / (2 * 7_615_616_512 / 4) < 1.001


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_the_scales_of_a_quantized_base_lie_where_its_kernels_do(precision):
    _, _, base = paper(sharding.make_mesh("fsdp:4,tensor:2"), base_precision=precision)
    found = splits(base)
    blocks = 4 if precision == "nf4" else 1  # a single block of all inputs cannot be split
    for i in range(LLM.num_hidden_layers):
        for name in ("q", "k", "v", "gate", "up"):
            assert found[f"layers/{i}/{name}_proj/kernel/values"] == (4, 2), (i, name)
            assert found[f"layers/{i}/{name}_proj/kernel/scale"] == (blocks, 2), (i, name)
        for name in ("o", "down"):
            assert found[f"layers/{i}/{name}_proj/kernel/values"] == (2, 4), (i, name)
            assert found[f"layers/{i}/{name}_proj/kernel/scale"] == (min(blocks, 2), 4), (i, name)


def test_data_alone_keeps_everything_whole():
    _, state, base = paper(sharding.make_mesh("data:8"))
    assert all(set(split) <= {1} for split in (splits(base) | splits(state)).values())


def test_optimizer_state_lies_where_its_parameters_do():
    _, state, _ = paper(sharding.make_mesh("fsdp:2,tensor:4"))
    trainable, optimizer = splits(state["trainable"]), splits(state["opt_state"])
    assert trainable["lora/layers/q_proj/lora_a"] == (1, 2, 1)
    assert trainable["fusion/multi/hidden/kernel"] == (1, 1)
    for name, split in trainable.items():
        moments = [other for path, other in optimizer.items() if path.endswith(name)]
        assert moments == [split, split], name


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh("fsdp:4,tensor:2")
    head = jnp.ones((10, 6))
    placed = jax.device_put({"lm_head": head}, sharding.tree_shardings(mesh, {"lm_head": head}))
    assert splits(placed) == {"lm_head": (1, 2)}
    shard = sharding.ActivationConstraint(mesh)
    constrain = jax.jit(lambda x: shard(x, ("batch", None, "heads", None)))
    assert splits([constrain(jnp.ones((8, 3, 4, 5)))]) == {"0": (4, 1, 2, 1)}
    assert splits([constrain(jnp.ones((6, 3, 5, 5)))]) == {"0": (1, 1, 1, 1)}


# --- Batches --------------------------------------------------------------------------------------


def test_a_batch_is_split_by_rows_over_data_and_fsdp():
    mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
    batch = make_batch([16] * 8)
    arrays = sharding.shard_batch(mesh, batch)
    jax.tree.map(np.testing.assert_array_equal, arrays, batch)
    for array, leaf in zip(
        jax.tree.leaves(arrays), jax.tree.leaves(sharding.abstract_batch(mesh, batch)), strict=True
    ):
        assert array.sharding.shard_shape(array.shape) == (2, *array.shape[1:])
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (array.shape, array.dtype, array.sharding)


class _Device:
    """A device of a process that is not this one."""

    def __init__(self, number, process):
        self.id, self.process_index = number, process


@pytest.mark.parametrize(
    ("shape", "devices_each", "shares"),
    [
        ((4, 1, 1), 2, [(0, 2), (1, 2)]),
        ((1, 8, 1), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 2, 2), 4, [(0, 2), (1, 2)]),
        ((1, 1, 4), 2, [(0, 1), (0, 1)]),  # all rows on all devices
        ((2, 1, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_share_the_rows_of_a_batch(shape, devices_each, shares, monkeypatch):
    count = math.prod(shape)
    devices = [_Device(i, i // devices_each) for i in range(count)]
    mesh = SimpleNamespace(shape=dict(zip(sharding.AXES, shape)))
    rows = shape[0] * shape[1]

    class Placed:
        def __init__(self, *_):
            pass

        def devices_indices_map(self, _):
            each = count // rows
            return {d: (slice(d.id // each, d.id // each + 1),) for d in devices}

    monkeypatch.setattr(sharding, "NamedSharding", Placed)
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.data_parallel_rank(mesh) == share


def test_processes_that_cannot_share_rows_equally_are_refused(monkeypatch):
    mesh = SimpleNamespace(shape={"data": 4, "fsdp": 1, "tensor": 1})
    owners = [0, 1, 0, 1]  # neighbouring rows on different processes

    class Placed:
        def __init__(self, *_):
            pass

        def devices_indices_map(self, _):
            return {_Device(i, owner): (slice(i, i + 1),) for i, owner in enumerate(owners)}

    monkeypatch.setattr(sharding, "NamedSharding", Placed)
    with pytest.raises(MeshError, match="cannot share a batch's rows equally"):
        sharding.data_parallel_rank(mesh)


def test_a_whole_batch_is_placed_as_its_shares_are():
    mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
    batch = make_batch([16] * 8)
    whole, shares = sharding.shard_whole_batch(mesh, batch), sharding.shard_batch(mesh, batch)
    jax.tree.map(np.testing.assert_array_equal, whole, batch)
    assert jax.tree.map(lambda x: x.sharding, whole) == jax.tree.map(lambda x: x.sharding, shares)


# --- The paper's step -----------------------------------------------------------------------------


def test_the_papers_step_compiles_for_eight_devices_without_its_weights():
    mesh = sharding.make_mesh("data:2,fsdp:4")
    # Four layers, of which each takes seconds to compile.
    llm = dataclasses.replace(LLM, num_hidden_layers=4)
    step, state, base = paper(mesh, llm, remat="full")
    batch = make_batch([256] * 8, width=256, targets=64)
    batch["features"] = {
        "audio": np.zeros((8, 1, 8, 1024), np.float16),
        "face": np.zeros((8, 1, 8, 768), np.float16),
    }
    held = {id(x) for x in jax.live_arrays()}
    lowered = lower_step(step, mesh, state, base, sharding.abstract_batch(mesh, batch))
    compiled = lowered.compile()
    assert sum(x.nbytes for x in jax.live_arrays() if id(x) not in held) < 2**20
    arguments = compiled.memory_analysis().argument_size_in_bytes
    expected = bytes_per_device((state, base, sharding.abstract_batch(mesh, batch)))
    # XLA leaves out inputs that the step does not read, and rounds small buffers up.
    np.testing.assert_allclose(arguments, expected, rtol=1e-4)
