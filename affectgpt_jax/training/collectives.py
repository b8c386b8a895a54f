"""The collectives of a program, read from the HLO that XLA's partitioner wrote.

The text is read right after partitioning, before the passes of a backend: a CPU's compiler turns
bfloat16 into float32 afterwards, a GPU's combines and reorders collectives. So a GPU sends the same
bytes in fewer and larger pieces.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from affectgpt_jax.common.errors import UserError

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """Collectives of one kind over the same mesh axes.

    Attributes:
        kind: of `KINDS`.
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
        compiled = lowered.compile(compiler_options=options)
        written = sorted(Path(folder).glob("*after_spmd-partitioning*.txt"))
        if not written:
            if mesh.size == 1:
                return compiled, []
            raise ProgramError("this version of XLA wrote no partitioned program to read")
        text = written[-1].read_text(encoding="utf-8")
    return compiled, read(text, mesh)


def read(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a partitioned module in HLO's text form, by kind and axes.

    Raises:
        ProgramError: a loop around a collective whose number of iterations is not known, or
            devices that are no axes of the mesh.
    """
    computations = dict(_computations(text))
    times = _times_run(computations)
    totals: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(lambda: [0, 0])
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.match(line)
            if not match:
                continue
            kind = match["kind"]
            groups = _groups(line, kind, mesh.size)
            if groups.shape[1] == 1:
                continue
            if not times[name]:
                raise ProgramError(f"{kind} in a loop of unknown length: {line.strip()[:200]}")
            size = _shape_bytes(match["shape"])
            if kind == "reduce-scatter":
                size *= groups.shape[1]
            total = totals[kind, _axes(groups, mesh)]
            total[0] += times[name]
            total[1] += times[name] * size
    found = [Collective(*key, *total) for key, total in totals.items()]
    return sorted(found, key=lambda c: -c.bytes)


_COLLECTIVE = re.compile(
    rf"\s*(ROOT )?%?[\w.\-]+ = (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(-start)?\("
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]*)\]")


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Names and lines of a module's computations; the entry is called "ENTRY"."""
    name, lines = "", []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name, lines = "ENTRY" if match[1] else match[2], []
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _times_run(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in a step; 0 if that could not be told."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for line in computations.get(name, ()):
            if loop := _WHILE.search(line):
                visit(loop[2], factor * _trip_count(computations.get(loop[1], [])))
            else:
                for called in _CALLED.findall(line):
                    visit(called, factor)

    visit("ENTRY", 1)
    return times


def _trip_count(condition: list[str]) -> int:
    """Iterations of a loop that counts up from 0, as JAX's scans do; 0 for any other."""
    text = "\n".join(condition)
    if not re.search(r"ROOT .* compare\(.*direction=LT", text):
        return 0
    limits = re.findall(r"= s(?:32|64)\[\] constant\((\d+)\)", text)
    return int(limits[0]) if len(limits) == 1 else 0


def _shape_bytes(shape: str) -> int:
    return sum(
        math.prod(int(n) for n in sizes.split(",") if n) * _item_bits(kind) // 8
        for kind, sizes in _ARRAY.findall(shape)
    )


def _item_bits(kind: str) -> int:
    if kind == "pred":
        return 8
    return int(re.match(r"[a-z]+(\d+)", kind)[1])


def _groups(line: str, kind: str, devices: int) -> np.ndarray:
    """Partition numbers `[groups, members]` of a collective, in any of HLO's notations."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)[1]
        return np.array([[int(n) for n in re.findall(r"\d+", p)] for p in pairs.split("},")])
    text = line.split("replica_groups=", 1)[1]
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
    groups = re.match(r"\{(\{.*?\})\}", text)[1]
    return np.array([[int(n) for n in re.findall(r"\d+", g)] for g in groups.split("},")])


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[8]`, or `[4,2]<=[2,4]T(1,0)`: numbers in order, reshaped and transposed."""
    match = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    shape, source, order = ([int(n) for n in g.split(",")] if g else None for g in match.groups())
    source = source or shape
    ids = np.arange(math.prod(shape)).reshape(source)
    ids = ids.transpose(order) if order else ids
    return ids.reshape(shape) if match[2] else ids


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which a group's members differ."""
    places = np.stack(np.unravel_index(groups, mesh.devices.shape))  # [axis, groups, members]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, along in zip(mesh.axis_names, differ) if along)
