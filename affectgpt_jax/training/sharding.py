"""Where arrays live: the mesh, regex rules for parameters, constraints for activations.

Three axes. `data` and `fsdp` both split the batch; `fsdp` also splits every large parameter, and
`tensor` splits heads and feed-forward columns. LoRA training of a 7B model on 80 GB devices fits
replicated, so `data:-1` (all devices) is the default: one all-reduce of the adapters a step.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.trees import path_name

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The first match wins. Kernels are [in, out]; adapters start with an axis of layers, which is never
# split, since a layer is read at a time.
PARAMETER_RULES = (
    (r"embed_tokens$", ("tensor", "fsdp")),
    (r"lm_head$", ("fsdp", "tensor")),
    (r"layers/\d+/(q|k|v|gate|up)_proj/kernel(/(values|scale))?$", ("fsdp", "tensor")),
    (r"layers/\d+/(o|down)_proj/kernel(/(values|scale))?$", ("tensor", "fsdp")),
    (r"layers/\d+/(q|k|v)_proj/bias$", ("tensor",)),
    # Adapters are small, but their optimizer state is twice as large: fsdp splits the long side.
    (r"layers/(q|k|v|gate|up)_proj/lora_a$", (None, "fsdp", None)),
    (r"layers/(q|k|v|gate|up)_proj/lora_b$", (None, None, "tensor")),
    (r"layers/(o|down)_proj/lora_a$", (None, "tensor", None)),
    (r"layers/(o|down)_proj/lora_b$", (None, None, "fsdp")),
    (r".*", ()),
)
# Logical axes of activations, as the models name them.
_ACTIVATION_AXES = {
    "batch": BATCH_AXES,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}


class MeshError(UserError, ValueError):
    """A mesh that the devices cannot form."""


def parse_mesh(text: str, device_count: int) -> tuple[int, int, int]:
    """Axis sizes of e.g. "data:-1" or "data:2,fsdp:4"; -1 takes the devices that are left.

    Raises:
        MeshError: not of that form, or the sizes do not multiply to the number of devices.
    """
    named: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*:\s*(-1|[1-9]\d*)\s*", part)
        if not match or match[1] not in AXES:
            raise MeshError(
                f"mesh {text!r}: {part!r} is not AXIS:SIZE with an axis out of {AXES} "
                "and a size of 1 or more, or -1 for all devices that are left"
            )
        if match[1] in named:
            raise MeshError(f"mesh {text!r} names the axis {match[1]} twice")
        named[match[1]] = int(match[2])
    sizes = dict.fromkeys(AXES, 1) | named
    free = [axis for axis in AXES if sizes[axis] == -1]
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if len(free) > 1:
        raise MeshError(f"mesh {text!r}: only one axis can be -1")
    if free:
        sizes[free[0]] = device_count // fixed
    if math.prod(sizes.values()) != device_count:
        raise MeshError(
            f"mesh {text!r}: its sizes must multiply to the {device_count} devices that are here"
        )
    return tuple(sizes[axis] for axis in AXES)


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over these devices, by default all of all processes.

    Raises:
        MeshError: as `parse_mesh`.
    """
    devices = jax.devices() if devices is None else devices
    shape = parse_mesh(text, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def tree_shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """A `NamedSharding` for every leaf, by `PARAMETER_RULES`.

    The rules match the end of a leaf's path, so they hold for optimizer state as well. A dimension
    that its mesh axis does not divide is left whole.
    """

    def sharding(path, leaf) -> NamedSharding:
        name = path_name(path)
        axes = next(axes for pattern, axes in PARAMETER_RULES if re.search(pattern, name))
        if len(axes) > leaf.ndim:
            axes = ()
        fits = [
            axis if axis and leaf.shape[i] % mesh.shape[axis] == 0 else None
            for i, axis in enumerate(axes)
        ]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def abstract(mesh: Mesh, init: Callable[[jax.Array], Any]) -> Any:
    """Shapes, dtypes and shardings of what `init(key)` returns, without computing it."""
    return with_shardings(mesh, jax.eval_shape(init, jax.random.key(0)))


def with_shardings(mesh: Mesh | AbstractMesh, shapes: Any) -> Any:
    """A tree of shapes with the shardings that its arrays have on a mesh."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        tree_shardings(mesh, shapes),
    )


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree of arrays or shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def data_parallel_size(mesh: Mesh | AbstractMesh) -> int:
    """Number of devices over which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class ActivationConstraint:
    """The function `shard(x, axes)` that models call on activations."""

    mesh: Mesh | AbstractMesh

    @property
    def data_parallel_size(self) -> int:
        return data_parallel_size(self.mesh)

    @property
    def several_devices(self) -> bool:
        return self.mesh.size > 1

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        spec = []
        for size, axis in zip(x.shape, axes, strict=True):
            names = _ACTIVATION_AXES[axis]
            parts = math.prod(
                self.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ())
            )
            spec.append(names if size % parts == 0 else None)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*spec)))


def data_parallel_rank(mesh: Mesh) -> tuple[int, int]:
    """The data-parallel rank of this process, and the number of ranks.

    Rank r of n holds the r-th of n equal parts of a batch's rows. There are as many ranks as
    processes, unless the `tensor` axis spans several processes, which then hold the same rows.

    Raises:
        MeshError: the rows of a process are not one such part.
    """
    count = data_parallel_size(mesh)
    rows = NamedSharding(mesh, P(BATCH_AXES)).devices_indices_map((count,))
    held: dict[int, set[int]] = {}
    for device, (part,) in rows.items():
        held.setdefault(device.process_index, set()).add(part.indices(count)[0])
    mine = held[jax.process_index()]
    size = len(mine)
    shares = {tuple(range(first, first + size)) for first in range(0, count, size)}
    if not {tuple(sorted(parts)) for parts in held.values()} <= shares:
        raise MeshError(
            f"mesh {dict(mesh.shape)}: {jax.process_count()} processes cannot share a batch's rows "
            "equally; let the size of the last axis divide, or be a multiple of, the "
            f"{jax.local_device_count()} devices of a process"
        )
    return min(mine) // size, count // size


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Global arrays from this process's rows of a batch (NumPy), split along the first axis."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    # An explicit transfer, but with several processes JAX's guard takes it for an implicit one.
    with jax.transfer_guard_host_to_device("allow"):
        # One call for the whole tree: each call takes longer than the transfer of a small array.
        return jax.make_array_from_process_local_data(sharding, jax.tree.map(np.asarray, batch))


def shard_whole_batch(mesh: Mesh, batch: Any) -> Any:
    """Global arrays from a batch of which every process has all rows."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__), batch
    )


def abstract_batch(mesh: Mesh, batch: Any) -> Any:
    """Shapes and shardings of a global batch, given as arrays or shapes of all its rows."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
