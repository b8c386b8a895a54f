"""The collectives of a program, read from the HLO that XLA's partitioner wrote.

The text is read right after partitioning, before the passes of a backend: a CPU's compiler turns
bfloat16 into float32 afterwards, a GPU's combines and reorders collectives. So a GPU sends the same
bytes in fewer and larger pieces.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.training import hlo


class Collective(NamedTuple):
    """Collectives of one kind over the same mesh axes.

    Attributes:
        kind: of `hlo.COLLECTIVES`.
        axes: mesh axes whose devices exchange data.
        count: operations in a step, counted once per iteration of a loop.
        bytes: sum over these operations of the whole array: the result of an all-gather, the input
            of a reduce-scatter, and the operand on each device of the other kinds.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int


class ProgramError(UserError, RuntimeError):
    """A partitioned program that XLA did not write, or that cannot be parsed."""


def compile_and_read(lowered: Any, mesh: Mesh) -> tuple[Any, list[Collective]]:
    """Compile a lowered step, on emulated CPU devices as well, and read its collectives.

    Args:
        lowered: of `jax.jit(...).lower(...)`.
        mesh: over whose devices it is split.

    Returns:
        The compiled step, and its collectives, the largest first.

    Raises:
        ProgramError: this version of XLA writes the program in another way.
    """
    with tempfile.TemporaryDirectory(prefix="affectgpt-plan-") as folder:
        options = {
            "xla_dump_to": folder,
            "xla_dump_hlo_pass_re": "spmd-partitioning",
            "xla_dump_hlo_as_text": True,
            # The program is not run; without LLVM's optimisations it compiles in half the time.
            "xla_backend_optimization_level": 0,
        }
        with _without_cache():
            compiled = lowered.compile(compiler_options=options)
        written = sorted(Path(folder).glob("*after_spmd-partitioning*.txt"))
        if not written:
            if mesh.size == 1:
                return compiled, []
            raise ProgramError("this version of XLA wrote no partitioned program to read")
        text = written[-1].read_text(encoding="utf-8")
    return compiled, read(text, mesh)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Programs are compiled anew: of one that comes from JAX's cache on disk XLA writes nothing."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def read(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a partitioned module in HLO's text form, by kind and axes.

    Of a conditional, all branches are counted.

    Raises:
        ProgramError: a loop around a collective whose number of iterations is not known, or
            devices that are no axes of the mesh.
    """
    module = hlo.parse(text)
    times = module.times()
    totals: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(lambda: [0, 0])
    for name, computation in module.computations.items():
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in hlo.COLLECTIVES:
                continue
            found = groups(instruction.attributes, kind, mesh.size)
            if found.shape[1] == 1:
                continue
            if not times[name]:
                raise ProgramError(
                    f"{kind} in a loop of unknown length: {instruction.name} of {name}"
                )
            total = totals[kind, axes(found, mesh)]
            total[0] += times[name]
            total[1] += times[name] * array_bytes(instruction, kind, found.shape[1])
    found = [Collective(*key, *total) for key, total in totals.items()]
    return sorted(found, key=lambda c: -c.bytes)


def array_bytes(instruction: hlo.Instruction, kind: str, members: int) -> int:
    """Bytes of a collective over groups of so many members, as `Collective` counts them."""
    size = hlo.shape_bytes(hlo.result_shape(instruction))
    return size * members if kind == "reduce-scatter" else size


def groups(attributes: str, kind: str, devices: int) -> np.ndarray:
    """Partition numbers `[groups, members]` of a collective, in any of HLO's notations."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)[1]
        return np.array([[int(n) for n in re.findall(r"\d+", p)] for p in pairs.split("},")])
    text = attributes.split("replica_groups=", 1)[1]
    if match := re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\)+)? \{(.*?)\}", text):
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]))
        ids = _iota(match[2] + ")") if match[2] else np.arange(devices)
        ids = ids.reshape([int(size) for size in sizes])
        moved = [names.index(name) for name in re.findall(r"'(\w+)'", match[3])]
        ids = np.moveaxis(ids, moved, range(-len(moved), 0))
        return ids.reshape(-1, math.prod(int(sizes[i]) for i in moved))
    if match := re.match(r"\[(\d+),(\d+)\]<=", text):
        return _iota(text)
    if text.startswith("{}"):
        return np.arange(devices)[None]
    listed = re.match(r"\{(\{.*?\})\}", text)[1]
    return np.array([[int(n) for n in re.findall(r"\d+", g)] for g in listed.split("},")])


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[8]`, or `[4,2]<=[2,4]T(1,0)`: numbers in order, reshaped and transposed."""
    match = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    shape, source, order = ([int(n) for n in g.split(",")] if g else None for g in match.groups())
    source = source or shape
    ids = np.arange(math.prod(shape)).reshape(source)
    ids = ids.transpose(order) if order else ids
    return ids.reshape(shape) if match[2] else ids


def axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which a group's members differ."""
    places = np.stack(np.unravel_index(groups, mesh.devices.shape))  # [axis, groups, members]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, along in zip(mesh.axis_names, differ) if along)
