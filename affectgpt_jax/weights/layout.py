"""Mapping between parameter trees and the tensor names of other libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Shape = tuple[int, ...]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """How another library stores a parameter.

    Attributes:
        name: of the tensor; with `{}` in it, of one tensor per layer: the first axis of ours.
        transposed: ours is `[in, out]`, theirs `[out, in]`.
        batched: theirs has a first axis of size 1 that ours lacks.
    """

    name: str
    transposed: bool = False
    batched: bool = False

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def names(self, shape: Shape) -> list[str]:
        """The tensors that hold a parameter of this shape, in the order of the layers."""
        return [self.name.format(i) for i in range(shape[0])] if self.stacked else [self.name]

    def shape(self, shape: Shape) -> Shape:
        """Shape of each of these tensors."""
        shape = shape[1:] if self.stacked else shape
        shape = shape[::-1] if self.transposed else shape
        return (1, *shape) if self.batched else shape

    def outward(self, value: np.ndarray) -> np.ndarray:
        """Convert a parameter, or one layer of it, to its stored form."""
        value = value.T if self.transposed else value
        return np.ascontiguousarray(value[None] if self.batched else value)

    def inward(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `outward`."""
        value = value[0] if self.batched else value
        return value.T if self.transposed else value


Layout = Callable[[Path], Stored]


def expected_shapes(abstract: Any, layout: Layout) -> dict[str, Shape]:
    """Name and shape of every tensor of a stored tree."""
    shapes = {}
    for path, leaf in _leaves(abstract):
        stored = layout(path)
        shapes |= dict.fromkeys(stored.names(leaf.shape), stored.shape(leaf.shape))
    return shapes


def to_tensors(tree: Any, layout: Layout) -> dict[str, np.ndarray]:
    """A tree of arrays as named tensors, bit for bit."""
    tensors = {}
    for path, leaf in _leaves(tree):
        stored, value = layout(path), np.asarray(leaf)
        layers = value if stored.stacked else [value]
        for name, one in zip(stored.names(value.shape), layers, strict=True):
            tensors[name] = stored.outward(one)
    return tensors


def from_tensors(abstract: Any, layout: Layout, read: Callable[[str], np.ndarray]) -> Any:
    """The inverse of `to_tensors`.

    Args:
        abstract: the tree of `jax.ShapeDtypeStruct`s to fill. Values are cast to its dtypes, and
            placed by its shardings where it has them.
        layout: how each is stored.
        read: the tensor of a name; its shape has been compared with `expected_shapes`.

    Returns:
        A tree of `jax.Array`s. Each process holds the slices of its own devices.
    """

    def leaf(path: Path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        stored = layout(path)
        layers = [stored.inward(read(name)) for name in stored.names(leaf.shape)]
        value = (np.stack(layers) if stored.stacked else layers[0]).astype(leaf.dtype)
        if leaf.sharding is None:
            return jax.numpy.asarray(value)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(lambda path, x: leaf(_keys(path), x), abstract)


def compare_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str | None:
    """Describe missing or misshapen tensors of a file; None where nothing is missing.

    Tensors that are not expected are left to the caller.
    """
    for name, shape in expected.items():
        if name not in found:
            return f"the tensor {name} is missing; expected {shape}"
        if found[name] != shape:
            return f"the tensor {name} is {found[name]}; expected {shape}"
    return None


def _leaves(tree: Any) -> list[tuple[Path, Any]]:
    return [(_keys(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _keys(path: Any) -> Path:
    return tuple(entry.key for entry in path)
