"""What an optimised GPU module launches, and the bytes that each launch reads and writes.

Read from the text of `Compiled.as_text()`, compiled with `xla_gpu_enable_triton_gemm=false` so that
matmuls are calls of cuBLAS. Bytes are those that cross the memory bus if nothing stays in a cache:
every operand once, every result once; of a slice what it takes, of an update in place what it
writes. A launch in a loop counts as often as the loop runs, and of a conditional the branch that
moves the most.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from affectgpt_jax.training import collectives
from affectgpt_jax.training.hlo import (
    COLLECTIVES,
    Computation,
    Instruction,
    Module,
    arrays,
    base_opcode,
    elements,
    result_shape,
    shape_bytes,
)

MATMUL = "matmul"  # with no small side: limited by arithmetic
ATTENTION = "attention"  # a library's kernel, or a Pallas one; the model has no others
LORA = "lora"  # matmuls with a side of the rank: limited by bytes
MOVEMENT = "movement"  # copies, transposes, fills, concatenations and slices
COLLECTIVE = "collective"
OTHER = "other"  # elementwise functions, reductions, and matmuls of other small sides
KINDS = (MATMUL, ATTENTION, LORA, MOVEMENT, OTHER, COLLECTIVE)

# XLA merges the adapters of one input: q, k and v.
_MERGED_ADAPTERS = 3
_NARROW = 64  # without adapters


class Launch(NamedTuple):
    """One launched operation.

    Attributes:
        name: of the instruction.
        kind: of `KINDS`.
        times: how often it runs in a step.
        read, written: bytes, each time.
        flops: of a matmul, each time; 0 for all others, attention kernels too.
        shape: of the result, as HLO writes it.
        op_name: where the model's source says it comes from.
    """

    name: str
    kind: str
    times: int
    read: int
    written: int
    flops: int
    shape: str
    op_name: str

    @property
    def bytes(self) -> int:
        """Read and written in a step."""
        return self.times * (self.read + self.written)


class Sent(NamedTuple):
    """Equal collectives of a step.

    Attributes:
        kind: of `hlo.COLLECTIVES`.
        axes: mesh axes whose devices exchange data.
        count: how many a step.
        bytes: of each, as `collectives.Collective` counts them.
        in_loop: whether they stand in one.
        overlapped_by: large matmuls between start and end of each.
        overlapped_flops: of these.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    in_loop: bool
    overlapped_by: int
    overlapped_flops: int


def launches(module: Module, rank: int) -> list[Launch]:
    """Everything that a step launches, in the order of the module's text.

    Args:
        module: of a compiled step.
        rank: of the adapters, by which their matmuls are told from the large ones; 0 for none.
    """
    return _launches_of(module, module.entry, 1, rank)


def totals(found: list[Launch]) -> dict[str, tuple[int, int]]:
    """Launches and bytes of a step, by kind."""
    sums: dict[str, list[int]] = {kind: [0, 0] for kind in KINDS}
    for launch in found:
        sums[launch.kind][0] += launch.times
        sums[launch.kind][1] += launch.bytes
    return {kind: (count, size) for kind, (count, size) in sums.items()}


def sent(module: Module, rank: int, mesh: Mesh) -> list[Sent]:
    """The collectives of a step, the largest sum first.

    Args:
        module: of a compiled step.
        rank: as for `launches`.
        mesh: over whose devices the step is split.
    """
    counts: dict[Sent, int] = defaultdict(int)
    times = module.times()
    every = [i for body in module.computations.values() for i in body.values()]
    wrapped = {name for i in every if i.opcode == "async-start" for name in i.called("calls")}
    looped = {name for name, count in times.items() if count != 1}
    for name, body in module.computations.items():
        for start in body.values() if name not in wrapped else ():
            operation = _wrapped(module, start)
            kind = base_opcode(operation)
            if kind not in COLLECTIVES:
                continue
            groups = collectives.groups(operation.attributes, kind, mesh.size)
            if groups.shape[1] == 1:
                continue
            size = collectives.array_bytes(operation, kind, groups.shape[1])
            axes = collectives.axes(groups, mesh)
            between = [i for i in _until_done(body, start) if not _is_free(i)]
            beside = [
                _launch(module, body, i, 1, rank).flops
                for i in between
                if _kind_of(module, body, i, rank) == MATMUL
            ]
            one = Sent(kind, axes, 0, size, name in looped, len(beside), sum(beside))
            # In a loop of unknown length it counts once.
            counts[one] += times[name] or 1
    found = [s._replace(count=count) for s, count in counts.items()]
    return sorted(found, key=lambda s: -s.count * s.bytes)


def _wrapped(module: Module, start: Instruction) -> Instruction:
    """What an `async-start` starts; any other instruction itself."""
    if start.opcode != "async-start":
        return start
    (called,) = start.called("calls")
    return next(i for i in module.computations[called].values() if i.is_root)


# --- Launches -------------------------------------------------------------------------------------

# What launches nothing. The buffers of a start and its end are the same.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier", "add-dependency", "iota", "domain",
}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "CreateBuffer", "Pin", "Unpin", "annotate_device_placement")


def _launches_of(module: Module, name: str, times: int, rank: int) -> list[Launch]:
    body, found = module.computations[name], []
    for instruction in body.values():
        opcode = instruction.opcode
        if opcode == "while":
            # A loop of unknown length is counted once.
            rounds = times * (module.trip_count(instruction) or 1)
            found += _launches_of(module, *instruction.called("body"), rounds, rank)
        elif opcode == "conditional":
            keys = ("true_computation", "false_computation", "branch_computations")
            branches = [
                _launches_of(module, branch, times, rank) for branch in instruction.called(*keys)
            ]
            found += max(branches, key=lambda branch: sum(launch.bytes for launch in branch))
        elif opcode in ("call", "async-start"):
            for called in instruction.called("to_apply", "calls"):
                found += _launches_of(module, called, times, rank)
        elif not _is_free(instruction):
            found.append(_launch(module, body, instruction, times, rank))
    return found


def _is_free(instruction: Instruction) -> bool:
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return True
    return instruction.opcode == "custom-call" and _target(instruction) in _FREE_CALLS


def _launch(
    module: Module, body: Computation, instruction: Instruction, times: int, rank: int
) -> Launch:
    opcode = base_opcode(instruction)
    fused = _fused(module, instruction)
    if fused is not None:
        read, written = _traffic_of_fusion(fused)
    elif opcode in ("dynamic-slice", "slice", "gather"):
        read = written = shape_bytes(result_shape(instruction))
    elif opcode == "dynamic-update-slice":
        read = written = body[instruction.operands[1]].bytes
    else:
        read = sum(body[operand].bytes for operand in instruction.operands if operand in body)
        written = _written(instruction)
    matmul, _ = _matmul_of(fused or body, instruction)
    sides = _sides(fused or body, matmul) if matmul else None
    return Launch(
        name=instruction.name,
        kind=_kind_of(module, body, instruction, rank),
        times=times,
        read=read,
        written=written,
        flops=2 * math.prod(sides) if sides else 0,
        shape=result_shape(instruction),
        op_name=_op_name(instruction),
    )


def _fused(module: Module, instruction: Instruction) -> Computation | None:
    if base_opcode(instruction) != "fusion":
        return None
    (called,) = instruction.called("calls")
    return module.computations[called]


def _written(instruction: Instruction) -> int:
    """Bytes of the result, without the workspace that cuBLAS asks for."""
    shape = result_shape(instruction)
    return shape_bytes(elements(shape)[0] if _is_cublas(instruction) else shape)


def _traffic_of_fusion(body: Computation) -> tuple[int, int]:
    """Bytes that a fusion reads of its parameters, and that it writes."""
    users: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in body.values():
        for operand in instruction.operands:
            users[operand].append(instruction)

    def read_of(name: str) -> int:
        """Of an array, by all that use it; never more than the array."""
        total = 0
        for user in users[name]:
            of_it = user.operands[0] == name
            if user.opcode == "bitcast":
                total += read_of(user.name)
            elif of_it and user.opcode in ("dynamic-slice", "slice", "gather"):
                total += user.bytes
            elif of_it and user.opcode in ("dynamic-update-slice", "scatter"):
                pass  # in place
            elif user.opcode in ("tuple", "get-tuple-element"):
                pass
            else:
                return body[name].bytes
        return min(total, body[name].bytes)

    def written_by(name: str) -> int:
        instruction = body[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return 0
        if opcode == "bitcast":
            return written_by(operands[0]) if operands[0] in body else instruction.bytes
        if opcode == "tuple":
            return sum(written_by(operand) for operand in operands)
        if opcode == "get-tuple-element":
            source = body[operands[0]]
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
            return 0 if index and _is_cublas(source) else instruction.bytes
        if opcode == "dynamic-update-slice" and _is_parameter(body, operands[0]):
            return body[operands[1]].bytes
        if opcode == "scatter" and _is_parameter(body, operands[0]):
            return body[operands[-1]].bytes
        return _written(instruction)

    parameters = [i.name for i in body.values() if i.opcode == "parameter"]
    (root,) = (i.name for i in body.values() if i.is_root)
    return sum(map(read_of, parameters)), written_by(root)


def _is_parameter(body: Computation, name: str) -> bool:
    while body[name].opcode == "bitcast":
        name = body[name].operands[0]
    return body[name].opcode == "parameter"


# --- Kinds ----------------------------------------------------------------------------------------

_MOVING = {
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "copy", "transpose",
    "reshape", "broadcast", "concatenate", "pad", "slice", "dynamic-slice", "dynamic-update-slice",
    "bitcast-convert", "reverse",
}  # fmt: skip
# What moves nothing but counts places, as long as it stands between scalars.
_COUNTING = {
    "add", "subtract", "multiply", "compare", "select", "clamp", "convert", "and", "or", "not",
    "minimum", "maximum",
}  # fmt: skip
_KERNEL = re.compile(r"cudnn\$fmha|mosaic_gpu|xla\.gpu\.triton|__triton\b")


def _kind_of(module: Module, body: Computation, instruction: Instruction, rank: int) -> str:
    opcode = base_opcode(instruction)
    if opcode in COLLECTIVES or opcode in ("send", "recv", "collective-broadcast"):
        return COLLECTIVE
    fused = _fused(module, instruction)
    matmul, where = _matmul_of(fused or body, instruction)
    if matmul is not None:
        sides = _sides(where, matmul)
        # Batched products are those of plain attention, whose sides have nothing to do with a rank.
        if sides and (sides[0] > 1 or min(sides[1:]) > (_MERGED_ADAPTERS * rank or _NARROW)):
            return MATMUL
        # Of the lm_head few rows may be left, as many as the rank.
        by_rank = sides and rank and min(sides[1:]) % rank == 0
        name = _op_name(instruction)
        return LORA if "low_rank" in name or (by_rank and "lm_head" not in name) else OTHER
    if opcode == "custom-call" and _KERNEL.search(_target(instruction)):
        return ATTENTION
    inside = fused if fused is not None else {instruction.name: instruction}
    return MOVEMENT if all(map(_moves, inside.values())) else OTHER


def _moves(instruction: Instruction) -> bool:
    if base_opcode(instruction) in _MOVING:
        return True
    scalar = all(math.prod(array.sizes) == 1 for array in arrays(instruction.shape))
    return instruction.opcode in _COUNTING and scalar


def _matmul_of(
    body: Mapping[str, Instruction], instruction: Instruction
) -> tuple[Instruction | None, Mapping[str, Instruction]]:
    """The matmul that an operation is or, being a fusion of this body, holds."""
    inside = body.values() if base_opcode(instruction) == "fusion" else [instruction]
    return next((i for i in inside if i.opcode == "dot" or _is_cublas(i)), None), body


def _is_cublas(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("custom-call") and "cublas" in _target(instruction)


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
    return found[1] if found else ""


def _op_name(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _sides(
    body: Mapping[str, Instruction], matmul: Instruction
) -> tuple[int, int, int, int] | None:
    """Batch, rows, columns and summed length of a matmul; None where an operand is not known."""
    operands = [body.get(operand) for operand in (*matmul.operands, *matmul.operands)[:2]]
    if None in operands:
        return None
    left, right = (arrays(operand.shape)[0].sizes for operand in operands)

    def of(side: str, kind: str, sizes: tuple[int, ...]) -> int:
        pattern = rf'{side}_{kind}_dim(?:ension)?s"?[:=][\[{{]([^\]}}]*)'
        found = re.search(pattern, matmul.attributes)
        return math.prod(sizes[int(n)] for n in re.findall(r"\d+", found[1])) if found else 1

    batch, summed = of("lhs", "batch", left), of("lhs", "contracting", left)
    rows = math.prod(left) // (batch * summed)
    columns = math.prod(right) // (of("rhs", "batch", right) * of("rhs", "contracting", right))
    return batch, rows, columns, summed


def _until_done(body: Computation, start: Instruction) -> Iterator[Instruction]:
    """What stands between an asynchronous operation and its end; nothing of any other."""
    if not start.opcode.endswith("-start"):
        return
    rest = iter(body.values())
    for instruction in rest:
        if instruction.name == start.name:
            break
    for instruction in rest:
        if instruction.opcode.endswith("-done") and start.name in instruction.operands:
            return
        yield instruction
