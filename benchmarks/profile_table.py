"""Where a step's time goes: `python -m benchmarks.profile_table DIR`.

DIR is what `python -m benchmarks.train_step --profile DIR` left there, which prints the same table:
a trace of steady steps, the compiled programs that ran, and what was in their batches. Every
operation of the trace is looked up in its program, whose metadata says which part of the model it
was written for. At every moment the operations that run share the time, so that the parts add up
to the time of a step.

Beside a part stands the time that its FLOPs would take at the rate of a large matmul on the device:
what is above that is the room for improvement.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.models.flops import Flops
from benchmarks import harness, workloads
from benchmarks.blocks import flops_of
from benchmarks.harness import Report

# First match wins, against an operation's kind and the names of the scopes that it comes from.
PARTS = (
    ("communication", r"^(all-|reduce-scatter|collective-|send|recv)"),
    ("host and device", r"^(memcpy|infeed|outfeed|copy-(start|done))"),
    ("dropout", r"[Dd]ropout|threefry|bernoulli|random_bits"),
    ("LoRA", r"/low_rank/"),
    ("attention", r"/attention/"),
    ("lm_head", r"[/(]lm_head[/)]"),
    ("heads and fusion", r"[/(]Fusion[/)]"),
    ("embedding", r"[/(]embedding[/)]"),
    ("frozen matmuls", r"^(dot|custom-call|convolution)\b.*_proj/"),
    ("norms, rotary, SwiGLU, residuals", r"(closed_call|layers_\d+|norm)/|[/(]Decoder\)?\)/"),
    ("choice of supervised positions", r"jvp|transpose"),
    ("optimizer and metrics", r"[/(]optimizer[/)]|train_step"),
    # The compiler's own: stacks start as zeros, and loops copy what they carry.
    ("copies and zeros", r"^(copy|broadcast|fusion) /$"),
)
OTHER = "other"
# Part -> what of the model's FLOPs it computes.
FLOPS_OF = {
    "frozen matmuls": "frozen",
    "LoRA": "adapters",
    "attention": "attention",
    "lm_head": "lm_head",
}


class ProfileError(UserError):
    """A folder that holds no profile."""


class Operation(NamedTuple):
    """One instruction of a compiled program: its kind, scopes, what it reads, and the computation
    that it calls."""

    kind: str
    scopes: str
    reads: tuple[str, ...]
    calls: str


class Event(NamedTuple):
    """Something that ran from `start` to `end`, in ns."""

    start: float
    end: float
    name: str


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*?\s([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(|\{)")
_MATMULS = ("dot", "custom-call", "convolution")


def read_program(text: str) -> dict[str, str]:
    """Part of the model by name of an operation, from the text of a compiled program.

    A fused operation belongs to the part of its matmul, where it has one. A matmul that XLA has
    rewritten may have lost its scopes: it belongs to the part that reads its result.
    """
    computations: dict[str, dict[str, Operation]] = defaultdict(dict)
    inside = ""
    for line in text.splitlines():
        if line.startswith("}"):
            inside = ""
        elif not line.startswith(" ") and (found := _COMPUTATION.match(line)):
            inside = found[1]
        elif inside and (found := _INSTRUCTION.match(line)):
            scopes = re.search(r'op_name="([^"]*)"', line)
            calls = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", line)
            reads = re.findall(r"%([\w.\-]+)", line[found.end() :].partition(")")[0])
            computations[inside][found[1]] = Operation(
                found[2], scopes[1] if scopes else "", tuple(reads), calls[1] if calls else ""
            )

    def part(name: str, instructions: dict[str, Operation]) -> str:
        operation = instructions[name]
        within = list(computations.get(operation.calls, {}).values())
        matmuls = [inner for inner in within if inner.kind in _MATMULS]
        matmuls += [p for inner in within for p in _inner_matmuls(computations, inner)]
        if matmuls or operation.kind in _MATMULS:
            first = matmuls[0] if matmuls else operation
            return part_of(first.kind, first.scopes or _scopes_of_reader(instructions, name))
        named = [operation, *reversed(within)]
        return part_of(operation.kind, next((o.scopes for o in named if o.scopes), ""))

    return {
        name: part(name, instructions)
        for instructions in computations.values()
        for name in instructions
    }


def _scopes_of_reader(instructions: Mapping[str, Operation], name: str) -> str:
    """Those of the nearest operation that has any and reads a result, or what was made of it."""
    made = {name}
    while True:
        readers = {
            key: o for key, o in instructions.items() if made & {*o.reads} and key not in made
        }
        for reader in readers.values():
            if reader.scopes:
                return reader.scopes
        if not readers:
            return ""
        made |= readers.keys()


def _inner_matmuls(computations: Any, operation: Operation) -> list[Operation]:
    """Matmuls in what a fused operation calls in turn."""
    within = computations.get(operation.calls, {}).values()
    return [inner for inner in within if inner.kind in _MATMULS]


def part_of(kind: str, scopes: str) -> str:
    """The part of the model that an operation belongs to.

    Args:
        kind: its opcode.
        scopes: its `op_name`.
    """
    text = f"{kind} {scopes}/"
    return next((name for name, pattern in PARTS if re.search(pattern, text)), OTHER)


def exclusive(events: Iterable[Event]) -> list[Event]:
    """Events of one thread or stream without the time of those within them."""
    found: list[Event] = []
    stack: list[Event] = []
    clock = 0.0

    def until(time: float) -> None:
        nonlocal clock
        while stack:
            top = stack[-1]
            end = min(top.end, time)
            if end > clock:
                found.append(Event(clock, end, top.name))
                clock = end
            if top.end > time:
                return
            stack.pop()

    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        until(event.start)
        clock = event.start
        stack.append(event)
    until(float("inf"))
    return found


def share_out(events: Iterable[Event]) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Time by name, every moment shared by the events that run in it, and the gaps between.

    Args:
        events: of all threads or streams, none within another of its own.

    Returns:
        ns by name; the intervals between the first start and the last end in which nothing ran.
    """
    moments = sorted(
        [(e.start, 1, e.name) for e in events] + [(e.end, -1, e.name) for e in events],
        key=lambda m: (m[0], m[1]),
    )
    times: dict[str, float] = defaultdict(float)
    gaps: list[tuple[float, float]] = []
    running: dict[str, int] = defaultdict(int)
    count, before = 0, moments[0][0] if moments else 0.0
    for time, change, name in moments:
        if time > before:
            if count:
                for running_name, number in running.items():
                    times[running_name] += (time - before) * number / count
            else:
                gaps.append((before, time))
        before = time
        count += change
        running[name] += change
    return dict(times), gaps


def overlap(gaps: Iterable[tuple[float, float]], others: Sequence[Event]) -> float:
    """Time that lies in a gap and in one of the other events, which do not overlap."""
    return sum(
        max(0.0, min(end, other.end) - max(start, other.start))
        for start, end in gaps
        for other in others
    )


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a trace holds.

    Attributes:
        lanes: operations of each thread of a CPU or stream of a GPU, named (program, operation).
        waits: when the loop waited for a batch.
    """

    lanes: list[list[tuple[str, Event]]]
    waits: list[Event]


def read_trace(directory: Path) -> Trace:
    """The trace in a folder, by JAX's own reader.

    Raises:
        ProfileError: there is none.
    """
    files = sorted(directory.glob("**/*.xplane.pb"))
    if not files:
        raise ProfileError(f"{directory} holds no trace; make one with train_step --profile")
    lanes, waits = [], []
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in planes:
        for line in plane.lines:
            lane = []
            for event in line.events:
                span = Event(event.start_ns, event.start_ns + event.duration_ns, event.name)
                if event.name == "data_wait":
                    waits.append(span)
                # On a GPU the same operations stand in lines derived from those of the streams.
                elif plane in devices and not line.name.startswith("Stream"):
                    continue
                elif bool(devices) == (plane in devices):
                    stats = dict(event.stats)
                    if "hlo_op" in stats:
                        program = f"{stats.get('hlo_module')} {stats.get('program_id')}"
                        lane.append((program, span._replace(name=str(stats["hlo_op"]))))
                    elif plane in devices:
                        lane.append(("", span))
            if lane:
                lanes.append(lane)
    return Trace(lanes, waits)


def match(names: set[str], programs: dict[str, dict[str, str]]) -> dict[str, str]:
    """The program that these operations are of: the one that has most of them."""
    return max(programs.values(), key=lambda parts: len(names & parts.keys()))


def account(trace: Trace, programs: dict[str, dict[str, str]], steps: int) -> dict[str, float]:
    """Seconds of a step by part, in descending order, then "input wait" and "idle".

    Args:
        trace: of `steps` steps.
        programs: name -> part of every operation.
        steps: in the trace.
    """
    names: dict[str, set[str]] = defaultdict(set)
    for lane in trace.lanes:
        for program, event in lane:
            names[program].add(event.name)
    parts = {program: match(found, programs) for program, found in names.items()}
    events = []
    for lane in trace.lanes:
        named = [
            event._replace(
                name=parts[program].get(event.name) or part_of(event.name.lower(), event.name)
            )
            for program, event in lane
        ]
        events += exclusive(named)
    times, gaps = share_out(events)
    idle = sum(end - start for start, end in gaps)
    waited = overlap(gaps, trace.waits)
    found = {k: v / steps / 1e9 for k, v in sorted(times.items(), key=lambda item: -item[1])}
    return found | {"input wait": waited / steps / 1e9, "idle": (idle - waited) / steps / 1e9}


def report_of(directory: Path) -> Report:
    """What the folder of a profile says.

    Raises:
        ProfileError: it holds no profile.
    """
    files = [directory / f"{name}.json" for name in ("about", "block")]
    for path in files:
        if not path.exists():
            raise ProfileError(f"{path} is missing; make a profile with train_step --profile")
    about, block = map(harness.load, files)
    programs = {
        path.name: read_program(path.read_text(encoding="utf-8"))
        for path in directory.glob("program-*.hlo")
    }
    if not programs:
        raise ProfileError(
            f"{directory} holds no program-*.hlo; make a profile with train_step --profile"
        )
    steps = len(block["seconds"])
    times = account(read_trace(directory), programs, steps)
    samples = [sample for step in block["samples"] for sample in step]
    flops = flops_of(workloads.make(**about["settings"]["sides"]["jax"]), samples)
    flops = Flops(*(count / steps for count in flops))
    rate = block["ceilings"]["flop_per_s"]
    return {
        "environment": about["environment"],
        **{key: about["settings"][key] for key in ("workload", "batch", "scale", "packed")},
        "steps": steps,
        "ceilings": block["ceilings"],
        "seconds": times,
        "floors": {part: getattr(flops, kind) / rate for part, kind in FLOPS_OF.items()},
    }


def name_of(found: Report) -> str:
    """A profile's workload, as tables name it."""
    batch = f" {found['batch']}" if found["batch"] else ""
    return f"{found['workload']}{batch}{', packed' if found['packed'] else ''}, {found['scale']}"


def overview(reports: Sequence[Report]) -> str:
    """A Markdown table of profiles side by side: a step's time by part, and what is next."""
    parts = dict.fromkeys(part for found in reports for part in found["seconds"])
    whole = [sum(found["seconds"].values()) for found in reports]
    rows = []
    for part in parts:
        times = [found["seconds"].get(part, 0.0) for found in reports]
        cells = (f"{1e3 * s:,.1f} ms, {s / all:.1%}" if s else "" for s, all in zip(times, whole))
        rows.append((part, *cells))
    rows.append(("all", *(f"{1e3 * seconds:,.0f} ms" for seconds in whole)))
    rows.append(("most to gain in", *map(bottleneck, reports)))
    return harness.markdown(("part", *map(name_of, reports)), rows)


def table(found: Report) -> str:
    """A Markdown table of a profile."""
    total = sum(found["seconds"].values())
    rows = []
    for part, seconds in found["seconds"].items():
        floor = found["floors"].get(part)
        more = (f"{1e3 * t:,.1f} ms" if floor else "" for t in (floor or 0, seconds - (floor or 0)))
        rows.append((part, f"{1e3 * seconds:,.1f} ms", f"{seconds / total:.1%}", *more))
    header = ("part", "a step", "share", "its FLOPs at that rate", "above it")
    return "\n\n".join(
        (
            f"{name_of(found)}, {found['environment']['device']}: {1e3 * total:,.1f} ms a step, "
            f"over {found['steps']} steps; a large matmul runs at "
            f"{found['ceilings']['flop_per_s'] / 1e12:.3g} TFLOP/s, a copy at "
            f"{found['ceilings']['bytes_per_s'] / 1e9:,.0f} GB/s",
            harness.markdown(header, rows),
            f"The most to gain is in {bottleneck(found)} of a step.",
        )
    )


def bottleneck(found: Report) -> str:
    """The part with the most time above what its FLOPs take, and how much of a step that is."""
    room = {k: s - found["floors"].get(k, 0.0) for k, s in found["seconds"].items()}
    part = max(room, key=room.get)
    return f"{part}: {room[part] / sum(found['seconds'].values()):.0%}"


def flags(add: Callable[..., Any]) -> None:
    add("directory", type=Path, nargs="?", help="what train_step --profile wrote")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.directory is None:
        parser.error("name the directory that train_step --profile wrote")


COMMAND = harness.Measurement(
    "profile_table",
    lambda args: report_of(args.directory),
    harness.each(table),
    lambda args: "",
    flags,
    check=check,
)

if __name__ == "__main__":
    COMMAND.main()
