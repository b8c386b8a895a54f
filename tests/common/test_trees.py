"""Sizes and path names of trees."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from affectgpt_jax.common import trees
from affectgpt_jax.models.quantize import quantize

TREE = {
    "layers": {"q_proj": {"kernel": jnp.zeros((3, 4), jnp.bfloat16)}},
    "norms": [jnp.zeros(5, jnp.float32), jax.ShapeDtypeStruct((), jnp.int8)],
}


def test_path_names_join_keys_and_indices_by_slashes():
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(TREE)]
    assert [trees.path_name(path) for path in paths] == [
        "layers/q_proj/kernel",
        "norms/0",
        "norms/1",
    ]


def test_parameters_and_bytes_of_arrays_and_of_shapes():
    assert trees.parameter_count(TREE) == 3 * 4 + 5 + 1
    assert trees.nbytes(TREE) == 2 * 3 * 4 + 4 * 5 + 1


def test_a_quantized_kernel_counts_the_weights_that_it_represents():
    kernel = jnp.ones((128, 8), jnp.float32)
    for precision in ("int8", "nf4"):
        assert trees.parameter_count({"kernel": quantize(kernel, precision)}) == kernel.size
    assert trees.nbytes({"kernel": quantize(kernel, "nf4")}) == 128 * 8 // 2 + 2 * 2 * 8


def test_bytes_of_a_key_are_those_of_its_words():
    assert trees.nbytes({"key": jax.random.key(0)}) == 8


def test_bytes_of_one_device_are_those_of_its_shard():
    mesh = AbstractMesh((4,), ("fsdp",))
    for axis, share in ((None, 1), ("fsdp", 4)):
        sharding = NamedSharding(mesh, PartitionSpec(axis))
        leaf = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding)
        assert trees.device_nbytes({"x": leaf}) == 4 * 8 * 3 // share
