"""Tensors of safetensors files into sharded arrays, a block of rows at a time.

Beside the arrays themselves, host memory holds one block for every reader, whatever the size of the
model. Each process reads what its own devices hold, and each byte of that once, in long runs.

Blocks are read here and not by `safetensors.safe_open(...).get_slice`, which maps the file: every
page that it has read counts as memory of the process until the file is closed, a file that shrinks
while it is read kills the process (SIGBUS), and each slice is a new array.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.json import check_type, parse_json

# Enough to keep a disk, the transposition and the bus to the devices busy at the same time; more
# than there are cores would only take each other's cache.
READERS = min(8, os.cpu_count() or 1)
# Bytes of a block. In host memory it should stay in a core's cache while it is transposed; towards
# a device it should be large beside the cost of a transfer and a launch.
HOST_BLOCK = 4 * 2**20
DEVICE_BLOCK = 32 * 2**20

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_Bounds = tuple[tuple[int, int], ...]


class WeightsError(UserError, ValueError):
    """Weights on disk that cannot be read, do not fit, or cannot be written there."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, `offset` bytes from its start."""

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """All values, as stored.

        Raises:
            WeightsError: the file ends within the tensor.
        """
        values = np.empty(self.shape, self.dtype)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(values.reshape(-1).view(np.uint8)) != values.nbytes:
                raise WeightsError(f"{self.path}: ends within the tensor {self.name}")
        return values

    def blocks(self, start: int, stop: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows `start` to `stop` in blocks of about `size` bytes, as `(first row, [rows, ...])`.

        All blocks have one shape, so that what takes them is compiled once; for that, the last one
        may begin with rows of the one before. A block is valid until the next is asked for.

        Raises:
            WeightsError: the file cannot be read, or ends before the tensor does.
        """
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        rows = min(stop - start, max(1, size // row_bytes))
        block = np.empty((rows, *self.shape[1:]), self.dtype)
        try:
            with self.path.open("rb") as file:
                for row in [*range(start, stop - rows, rows), stop - rows]:
                    file.seek(self.offset + row * row_bytes)
                    if file.readinto(block.view(np.uint8)) != block.nbytes:
                        raise WeightsError(f"{self.path}: ends within the tensor {self.name}")
                    yield row, block
        except OSError as error:
            raise WeightsError(f"{self.path} cannot be read: {error}") from None


class _Entry(TypedDict):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        WeightsError: no whole safetensors file that can be read, or a tensor of another type than
            floating point of 16 to 64 bits.
    """
    try:
        safe_open(path, framework="numpy")  # compares the header with the length of the file
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a whole safetensors file: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    header = parse_json(text, f"{path}, its header", dict, error=WeightsError)
    header.pop("__metadata__", None)
    entries = check_type(header, dict[str, _Entry], f"{path}, its header", error=WeightsError)
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise WeightsError(
                f"{path}: the tensor {name} is of type {entry['dtype']}; expected unquantized "
                f"weights of one of the types {', '.join(DTYPES)}"
            )
        tensors[name] = StoredTensor(
            name,
            path,
            8 + length + entry["data_offsets"][0],
            tuple(entry["shape"]),
            np.dtype(DTYPES[entry["dtype"]]),
        )
    return tensors


class Target:
    """A parameter that is filled from a stored tensor: a sharded array, or a tree of them.

    Args:
        parameter: the shape and dtype of every array; what is stored is cast to the latter.
        shardings: a tree of the same structure: where they go.
        transposed: whether the tensor is stored as `[out, in]` where the array is `[in, out]`.
        encode: makes the tree out of rows of a stored tensor, so that each array is given the same
            rows of its own; for a single array that is stored as it is, the identity.
    """

    def __init__(
        self,
        parameter: Any,
        shardings: Any,
        *,
        transposed: bool,
        encode: Callable[[np.ndarray], Any] = lambda block: block,
    ):
        self._parameter, self._shardings = parameter, shardings
        self._transposed = transposed
        self._encode = encode
        leaves = jax.tree.leaves(parameter)
        self._shards = [
            _make_shards(leaf, sharding)
            for leaf, sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
        ]

    def fill(self, tensor: StoredTensor) -> None:
        """Copy the stored tensor to its place."""
        # What several shards need of the same rows is read once for all of them.
        by_rows = collections.defaultdict(list)
        for leaf, shards in enumerate(self._shards):
            for bounds, shard in shards.items():
                rows, *columns = bounds[::-1] if self._transposed else bounds
                by_rows[rows].append((leaf, columns, shard))
        for (start, stop), parts in by_rows.items():
            size = max(shard.block_bytes for *_, shard in parts)
            for row, block in tensor.blocks(start, stop, size):
                encoded = jax.tree.leaves(self._encode(block))
                for leaf, columns, shard in parts:
                    at = (row - start, *(0 for _ in columns))
                    values = encoded[leaf][(slice(None), *(slice(*column) for column in columns))]
                    shard.write(at[::-1] if self._transposed else at, values, self._transposed)

    def value(self) -> Any:
        """The array or arrays, once every part of them has been filled."""

        def array(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, shards):
            arrays = [array for shard in shards.values() for array in shard.arrays()]
            return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)

        shards = jax.tree.unflatten(jax.tree.structure(self._parameter), self._shards)
        return jax.tree.map(array, self._parameter, self._shardings, shards)


def fill_all(jobs: Iterable[tuple[Target, StoredTensor]]) -> None:
    """Fill targets from their tensors, several at a time, in the order of the disk."""
    jobs = sorted(jobs, key=lambda job: (job[1].path, job[1].offset))
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda job: job[0].fill(job[1]), jobs):
            pass


def _make_shards(
    leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> dict[_Bounds, _HostShard | _DeviceShard]:
    """The parts of an array that this process holds, by their bounds.

    Devices that hold the same part share its reads and, where it can be, its memory.
    """
    devices: dict[_Bounds, list[jax.Device]] = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = (part.indices(n)[:2] for part, n in zip(index, leaf.shape, strict=True))
        devices[tuple(bounds)].append(device)
    return {
        bounds: _make_shard([stop - start for start, stop in bounds], leaf.dtype, group)
        for bounds, group in devices.items()
    }


def _make_shard(
    shape: Sequence[int], dtype: np.dtype, devices: Sequence[jax.Device]
) -> _HostShard | _DeviceShard:
    # A norm or a bias is sent whole: to compile an update for it would take longer.
    small = math.prod(shape) * np.dtype(dtype).itemsize <= HOST_BLOCK
    on_host = small or all(map(_computes_in_host_memory, devices))
    return (_HostShard if on_host else _DeviceShard)(tuple(shape), np.dtype(dtype), devices)


def _computes_in_host_memory(device: jax.Device) -> bool:
    return device.platform == "cpu"


class _HostShard:
    """A shard that is filled as a NumPy array, which a CPU device takes over without a copy.

    XLA's CPU backend has no in-place update of a bfloat16 array, so `_DeviceShard` would copy the
    whole of it for every block.
    """

    block_bytes = HOST_BLOCK

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: Sequence[jax.Device]):
        self._devices = devices
        self._values = _aligned_empty(shape, dtype)

    def write(self, at: tuple[int, ...], block: np.ndarray, transposed: bool) -> None:
        block = np.asarray(block.T if transposed else block)
        place = self._values[tuple(slice(i, i + n) for i, n in zip(at, block.shape, strict=True))]
        if place.dtype == block.dtype:  # NumPy copies whole numbers several times as fast
            place, block = (x.view(f"u{x.itemsize}") for x in (place, block))
        np.copyto(place, block, casting="unsafe")

    def arrays(self) -> list[jax.Array]:
        return [jax.device_put(self._values, device, may_alias=True) for device in self._devices]


class _DeviceShard:
    """A shard in the memory of an accelerator, updated in place by donating its buffer."""

    block_bytes = DEVICE_BLOCK

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: Sequence[jax.Device]):
        self._arrays = [jnp.zeros(shape, dtype, device=device) for device in devices]
        self._lock = threading.Lock()

    def write(self, at: tuple[int, ...], block: np.ndarray, transposed: bool) -> None:
        with self._lock:
            self._arrays = [
                _update(array, jax.device_put(block, array.device), at, transposed)
                for array in self._arrays
            ]
            # The block's memory is about to be used again.
            jax.block_until_ready(self._arrays)

    def arrays(self) -> list[jax.Array]:
        return self._arrays


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _update(
    array: jax.Array, block: jax.Array, at: tuple[jax.Array, ...], transposed: bool
) -> jax.Array:
    block = (block.T if transposed else block).astype(array.dtype)
    return jax.lax.dynamic_update_slice(array, block, at)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory with the alignment at which XLA's CPU backend takes an array over without a copy."""
    alignment = 64
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)
