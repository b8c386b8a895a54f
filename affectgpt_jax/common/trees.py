"""Sizes and path names of parameter trees, of arrays or of abstract shapes."""

from __future__ import annotations

import math
from typing import Any

import jax


def path_name(path: Any) -> str:
    """A key path of `jax.tree_util` as text, e.g. "layers/q_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_count(tree: Any) -> int:
    """Number of parameters in a tree of arrays or shapes.

    A node that has a shape of its own counts as that: a quantized kernel counts the weights that
    it represents, not the bytes and scales that it holds.
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes; of a sharded array, all its shards together."""
    return sum(_nbytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def device_nbytes(abstract_tree: Any) -> int:
    """Bytes of one device's share of a tree of shapes with shardings."""
    return sum(
        _nbytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(abstract_tree)
    )


def _nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    # A PRNG key's dtype is as wide as the words that it holds.
    return math.prod(shape) * dtype.itemsize
