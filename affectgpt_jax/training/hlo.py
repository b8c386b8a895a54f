"""HLO modules in text form: computations, instructions, and how often each computation runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Array(NamedTuple):
    """An array's dtype, as HLO spells it, and its sizes."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * _bits(self.dtype) // 8


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: unique in the module.
        shape: of the result, as text; `arrays` reads it.
        opcode: such as "fusion".
        operands: names of instructions of the same computation.
        argument: the text between the parentheses, for parameters and constants.
        attributes: the text behind them.
        is_root: whether it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of all arrays of the result."""
        return shape_bytes(self.shape)

    def called(self, *keys: str) -> list[str]:
        """Names of the computations of these attributes, such as "body" or "calls"."""
        found = []
        for key in keys:
            for group, single in re.findall(
                rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes
            ):
                found += [name.strip(" %") for name in (group or single).split(",")]
        return found


Computation = dict[str, Instruction]
# Attributes that name what runs as often as the instruction itself.
_CALLS = ("to_apply", "calls", "true_computation", "false_computation", "branch_computations")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\("
)
_ARRAY = re.compile(r"\b(pred|token|bf16|[fsuc]\d+\w*)\[([\d,]*)\]")


class Module(NamedTuple):
    """Computations by name, and which of them is run."""

    computations: dict[str, Computation]
    entry: str

    def times(self) -> dict[str, int]:
        """How often each computation runs; 0 if that could not be told."""
        found = dict.fromkeys(self.computations, 0)

        def visit(name: str, factor: int) -> None:
            if name not in found:
                return
            found[name] += factor
            for instruction in self.computations[name].values():
                if instruction.opcode == "while":
                    (body,) = instruction.called("body")
                    visit(body, factor * self.trip_count(instruction))
                else:
                    for called in instruction.called(*_CALLS):
                        visit(called, factor)

        visit(self.entry, 1)
        return found

    def trip_count(self, loop: Instruction) -> int:
        """Iterations of a `while`; 0 where neither XLA nor its condition tells.

        A condition tells where it counts up from 0 to a constant, as JAX's scans do.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        (name,) = loop.called("condition")
        condition = self.computations.get(name, {}).values()
        less = any(
            i.is_root and i.opcode == "compare" and "direction=LT" in i.attributes
            for i in condition
        )
        limits = [
            int(i.argument)
            for i in condition
            if i.opcode == "constant" and re.fullmatch(r"s(32|64)\[\]\S*", i.shape)
        ]
        return limits[0] if less and len(limits) == 1 else 0


def parse(text: str) -> Module:
    """A module in HLO's text form.

    Raises:
        ValueError: no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is not None and line.startswith("}"):
            current = None
        elif not line.startswith(" ") and (header := _HEADER.match(line)):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            argument, attributes = _split_at_parenthesis(line[found.end() :])
            current[found["name"]] = Instruction(
                found["name"],
                found["shape"],
                found["opcode"],
                tuple(dict.fromkeys(re.findall(r"%([\w.\-]+)", argument))),
                argument,
                attributes,
                found["root"] is not None,
            )
    if not entry:
        raise ValueError("the text holds no HLO module")
    return Module(computations, entry)


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, those of tuples one after the other."""
    return [
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _ARRAY.findall(shape)
    ]


def shape_bytes(shape: str) -> int:
    return sum(array.bytes for array in arrays(shape))


def elements(shape: str) -> list[str]:
    """The elements of a tuple's shape; of any other shape, itself alone."""
    return list(_elements(shape)) if shape.startswith("(") else [shape]


def base_opcode(instruction: Instruction) -> str:
    """The opcode without "-start", which says that it runs beside what follows."""
    return instruction.opcode.removesuffix("-start")


def result_shape(instruction: Instruction) -> str:
    """What an operation writes: of an asynchronous one, a part of what its start returns."""
    if not instruction.opcode.endswith("-start"):
        return instruction.shape
    parts, opcode = elements(instruction.shape), base_opcode(instruction)
    if opcode == "copy":
        return parts[0]
    # Operands and result, or of all-reduces before jax 0.12 the result alone.
    if opcode == "all-reduce" and not parts[0].startswith("("):
        return instruction.shape
    return parts[1]


def _elements(shape: str) -> Iterator[str]:
    depth, start = 0, 1
    for place, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or depth == 0:
            yield re.sub(r"/\*.*?\*/", "", shape[start:place]).strip()
            start = place + 1


def _split_at_parenthesis(text: str) -> tuple[str, str]:
    """The text up to the parenthesis that closes one opened before it, and what follows."""
    depth = 1
    for parenthesis in re.finditer(r"[()]", text):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return text[: parenthesis.start()], text[parenthesis.end() :]
    return text, ""


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    if dtype == "token":
        return 0
    return int(re.match(r"[a-z]+(\d+)", dtype)[1])
