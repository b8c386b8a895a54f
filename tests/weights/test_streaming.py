"""Loading block by block: what is read, where it goes, and how much memory that takes."""

import socket
import subprocess
import sys
import tracemalloc

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from safetensors.numpy import save_file
from tiny_model import LLM, random_tree
from trees import assert_same_tree

from affectgpt_jax.models.decoder import ComputeConfig, Decoder, init_base
from affectgpt_jax.models.quantize import quantize
from affectgpt_jax.training.sharding import AXES, make_mesh, tree_shardings
from affectgpt_jax.weights import streaming
from affectgpt_jax.weights.huggingface import WeightsError, load_base, save_base

ABSTRACT = jax.eval_shape(lambda key: init_base(Decoder(LLM), key), jax.random.key(0))
BASE = random_tree(ABSTRACT)
HALVES = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), ABSTRACT)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_base(path, LLM, BASE)
    return path


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """The emulated devices are filled as devices with memory of their own are."""
    monkeypatch.setattr(streaming, "_computes_in_host_memory", lambda device: False)
    monkeypatch.setattr(streaming, "HOST_BLOCK", 600)  # norms and biases have fewer bytes
    monkeypatch.setattr(streaming._DeviceShard, "block_bytes", 1000)


# --- What is read ---------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 100), st.data())
def test_blocks_cover_the_rows_in_equal_shapes_within_their_size(
    tmp_path_factory, r, c, size, data
):
    start = data.draw(st.integers(0, r - 1))
    stop = data.draw(st.integers(start + 1, r))
    values = np.arange(r * c, dtype=np.float32).reshape(r, c)
    path = tmp_path_factory.mktemp("blocks") / "model.safetensors"
    save_file({"other": np.zeros(3, np.float16), "tensor": values}, path)
    tensor = streaming.read_header(path)["tensor"]
    found = np.full_like(values, -1)
    shapes = set()
    for row, block in tensor.blocks(start, stop, size):
        assert start <= row and row + len(block) <= stop
        found[row : row + len(block)] = block
        shapes.add(block.shape)
    np.testing.assert_array_equal(found[start:stop], values[start:stop])
    assert (found[:start] == -1).all() and (found[stop:] == -1).all()
    ((rows, columns),) = shapes
    assert columns == c and (rows == 1 or rows * c * 4 <= size)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_that_names_the_tensor(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"some.weight": np.zeros((4, 4), np.float32)}, path)
    tensor = streaming.read_header(path)["some.weight"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=f"{path}: ends within the tensor some.weight"):
        list(tensor.blocks(0, 4, 32))


@pytest.mark.parametrize(("mesh", "share"), [("tensor:8", 1 / 8), ("fsdp:8", 1), ("data:8", 1)])
def test_rows_are_read_once_and_only_where_a_device_holds_them(directory, monkeypatch, mesh, share):
    """One of eight devices stands for a process; the gate's columns are the file's rows."""
    leaf = ABSTRACT["layers"][1]["gate_proj"]["kernel"]
    sharding = tree_shardings(make_mesh(mesh), ABSTRACT)["layers"][1]["gate_proj"]["kernel"]
    places = sharding.addressable_devices_indices_map(leaf.shape)
    mine = dict([list(places.items())[5]])
    monkeypatch.setattr(type(sharding), "addressable_devices_indices_map", lambda self, shape: mine)
    rows = []
    blocks = streaming.StoredTensor.blocks

    def watched(self, start, stop, size):
        rows.extend(range(start, stop))
        return blocks(self, start, stop, size)

    monkeypatch.setattr(streaming.StoredTensor, "blocks", watched)
    target = streaming.Target(leaf, sharding, transposed=True)
    stored = streaming.read_header(directory / "model.safetensors")
    target.fill(stored["model.layers.1.mlp.gate_proj.weight"])
    assert len(rows) == LLM.intermediate_size * share
    ((index, shard),) = zip(mine.values(), target._shards[0].values(), strict=True)
    expected = np.asarray(BASE["layers"][1]["gate_proj"]["kernel"])[index]
    np.testing.assert_array_equal(shard.arrays()[0], expected)


# --- Devices with memory of their own -------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "abstract"),
    [((2, 1, 1), ABSTRACT), ((1, 2, 1), HALVES), ((1, 1, 2), ABSTRACT)],
    ids=["data", "fsdp, in bfloat16", "tensor"],
)
def test_updates_on_a_device_give_the_same_arrays(directory, as_on_an_accelerator, mesh, abstract):
    # Two devices: every device compiles programs of its own.
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:2], mesh), AXES)
    base = load_base(directory, abstract, tree_shardings(mesh, abstract))
    assert_same_tree(base, jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), BASE, abstract))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantized_kernels_on_a_device_are_the_same_arrays(
    directory, as_on_an_accelerator, precision
):
    module = Decoder(LLM, compute=ComputeConfig(base_precision=precision))
    abstract = jax.eval_shape(lambda key: init_base(module, key), jax.random.key(0))
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:2], (1, 2, 1)), AXES)
    base = load_base(directory, abstract, tree_shardings(mesh, abstract))
    for found, layer in zip(base["layers"], BASE["layers"], strict=True):
        for name in ("q_proj", "down_proj"):
            assert_same_tree(found[name]["kernel"], quantize(layer[name]["kernel"], precision))


def test_updates_on_a_device_are_in_place():
    shard = streaming._DeviceShard((3, 4), np.dtype(np.float32), jax.devices()[:2])
    before = shard.arrays()
    shard.write((0, 2), np.ones((2, 3), np.float32), True)
    assert all(array.is_deleted() for array in before)
    for array in shard.arrays():
        assert array.sum() == 6 and (array[:, 2:] == 1).all()


# --- Memory ---------------------------------------------------------------------------------------


def traced_peak(function):
    """Bytes of NumPy's memory at the worst moment of a call, beyond what was there before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = function()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


# A parameter in each of 8 layers, 2 MiB, stored transposed.
LAYERS, IN, OUT = 8, 512, 1024
SIZE = 4 * LAYERS * IN * OUT


@pytest.fixture
def large(tmp_path):
    values = np.random.default_rng(0).normal(size=(LAYERS, OUT, IN)).astype(np.float32)
    path = tmp_path / "model.safetensors"
    save_file({str(i): layer for i, layer in enumerate(values)}, path)
    stored = streaming.read_header(path)

    def load(sharding):
        leaf = jax.ShapeDtypeStruct((IN, OUT), np.float32)
        targets = [streaming.Target(leaf, sharding, transposed=True) for _ in values]
        streaming.fill_all([(target, stored[str(i)]) for i, target in enumerate(targets)])
        return [target.value() for target in targets]

    return load, values.swapaxes(1, 2)


BLOCK = 2**16
# Blocks of all readers, and half a MiB for threads and whatever else Python allocates.
ALLOWANCE = streaming.READERS * BLOCK + 2**19


@pytest.mark.parametrize("mesh", ["data:8", "fsdp:8"])
def test_host_memory_holds_the_arrays_once_and_a_block_for_every_reader(large, monkeypatch, mesh):
    monkeypatch.setattr(streaming._HostShard, "block_bytes", BLOCK)
    load, values = large
    spec = jax.P("fsdp", None)
    peak, arrays = traced_peak(lambda: load(jax.NamedSharding(make_mesh(mesh), spec)))
    np.testing.assert_array_equal(arrays, values)
    assert SIZE <= peak < SIZE + ALLOWANCE < SIZE * (1 + 1 / LAYERS)
    # What was filled is what the arrays are: no device holds a copy.
    for array in arrays:
        pointers = {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        assert len(pointers) == (1 if mesh == "data:8" else 8)


def test_beside_a_device_host_memory_holds_only_blocks(large, as_on_an_accelerator, monkeypatch):
    monkeypatch.setattr(streaming._DeviceShard, "block_bytes", BLOCK)
    load, values = large
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    load(sharding)  # compiles
    peak, arrays = traced_peak(lambda: load(sharding))
    np.testing.assert_array_equal(arrays, values)
    assert peak < ALLOWANCE < SIZE / LAYERS


# --- Several processes ----------------------------------------------------------------------------

PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
directory, address, rank = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
from pathlib import Path
from safetensors.numpy import load_file
from affectgpt_jax.models.decoder import Decoder, init_base
from affectgpt_jax.training.sharding import make_mesh, tree_shardings
from affectgpt_jax.weights.huggingface import load_base, read_config

llm = read_config(Path(directory))
abstract = jax.eval_shape(lambda key: init_base(Decoder(llm), key), jax.random.key(0))
base = load_base(directory, abstract, tree_shardings(make_mesh("fsdp:4"), abstract))
tensors = load_file(Path(directory, "model.safetensors"))
for i, layer in enumerate(base["layers"]):
    array, whole = layer["down_proj"]["kernel"], tensors[f"model.layers.{i}.mlp.down_proj.weight"].T
    assert len(array.addressable_shards) == 2
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
print([shard.index[1].start for shard in array.addressable_shards])
"""


def test_two_processes_load_their_halves(directory):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(directory), address, str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert outputs == ["[0, 8]", "[16, 24]"]
