"""Comparing trees of arrays."""

import jax
import numpy as np


def assert_same_tree(found, expected):
    """The same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, x), y in zip(leaves, jax.tree.leaves(expected), strict=True):
        x, y, name = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        if x.tobytes() != y.tobytes():
            np.testing.assert_array_equal(x, y, err_msg=name)
            raise AssertionError(f"{name}: equal numbers of other bits")
