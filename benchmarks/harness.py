"""What the commands of `benchmarks` share: flags, the record of the machine, result files, tables.

A command is a `Measurement`: `python -m benchmarks.NAME` measures, writes
`benchmarks/results/RESULT.json` and prints a Markdown table; `--show FILE...` prints the table of
such files.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax.cli import exit_on_error, make_parser
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.identity import code_identity
from affectgpt_jax.common.json import read_json, write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
SCALES = ("full", "small", "tiny")
# Flags that name a file or folder: left out of the command that a result records, or shown as DIR
# where they change what is measured. The path on this machine tells a reader nothing.
PLACES = ("--records", "--out", "--profile", "--workdir", "--measured", "--compiled")
INPUTS = ("--tokenizer", "--lexicon", "--llm")

Report = Mapping[str, Any]


def default_scale() -> str:
    """ "full" where there is an NVIDIA GPU. JAX is not asked: it would take hold of the GPU."""
    return "full" if os.path.exists("/dev/nvidiactl") else "small"


def whole_or_trial(name: str, scale: str, of: str) -> str:
    """A result's name where all machines measure in full: with the machine's scale in it.

    Args:
        name: of the measurement.
        scale: what was measured; below "full" it is a trial, with a name of its own.
        of: whose scale that is.
    """
    return f"{name}_{default_scale()}" if scale == "full" else f"{name}_{scale}_{of}"


def records_folder() -> Path:
    """Where record sets are kept between runs."""
    return Path(tempfile.gettempdir()) / "affectgpt_jax-benchmarks"


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: a whole number with a lower bound."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} given; expected {least} or more")
        return int(text)

    return read


def _shared_flags() -> dict[str, dict[str, Any]]:
    """Arguments of `add_argument`, by the name of a flag that several commands take."""
    return {
        "scale": dict(choices=SCALES, default=default_scale(), help="default: full on a GPU"),
        "steps": dict(type=at_least(1), default=20, help="steps to count, of each side"),
        "block": dict(type=at_least(1), default=5, help="steps of a turn"),
        "warmup": dict(type=at_least(0), default=3, help="steps before the first turn"),
        "tokenizer": dict(default="tiny", help="a tokenizer's directory; default: what ships"),
        "records": dict(type=Path, default=records_folder(), help="where record sets are kept"),
    }


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A command.

    Attributes:
        module: its name in `benchmarks`; the module's docstring is the description.
        run: measures; returns the report. "environment" is filled in where `run` leaves it out.
        tables: Markdown of reports.
        result: name of the result file without ending; "" to write one for `--out` alone.
        flags: adds the command's own flags to a parser.
        shared: names of `_shared_flags` that it takes.
        check: refuses combinations of flags, and fills in what follows from others.
        finish: called with the flags, the report and its path once the report is written and its
            table printed.
        packages: whose versions are recorded beside `PACKAGES`.
        overrides: take `--config.key=value`, as `args.overrides`.
    """

    module: str
    run: Callable[[argparse.Namespace], Report]
    tables: Callable[[Sequence[Report]], str]
    result: Callable[[argparse.Namespace], str]
    flags: Callable[[Callable[..., Any]], None] = lambda add: None
    shared: Sequence[str] = ()
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] | None = None
    finish: Callable[[argparse.Namespace, Report, Path], None] | None = None
    packages: Sequence[str] = ()
    overrides: bool = False

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags of a command line; `words` holds the line itself."""
        description = sys.modules[self.result.__module__].__doc__
        parser = make_parser(f"python -m benchmarks.{self.module}", description)
        self.flags(parser.add_argument)
        known = _shared_flags()
        for name in self.shared:
            parser.add_argument(f"--{name}", **known[name])
        parser.add_argument("--out", type=Path, help="default: in benchmarks/results")
        show = "print the table of such files and stop"
        parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help=show)
        args, others = parser.parse_known_args(argv)
        args.overrides = [word for word in others if self.overrides and "config." in word]
        if unknown := [word for word in others if word not in args.overrides]:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        args.words = list(argv)
        if self.check and not args.show:
            self.check(parser, args)
        return args

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Entry point; ends on errors as all commands do."""
        with exit_on_error():
            self._main(sys.argv[1:] if argv is None else argv)

    def _main(self, argv: Sequence[str]) -> None:
        args = self.parse(argv)
        if args.show:
            print(self.tables([load(path) for path in args.show]))
            return
        from affectgpt_jax import runtime  # loads JAX

        runtime.prepare_plugins()
        report = self.run(args)
        about = report.get("environment") or describe(*self.packages)
        about = {"command": command(self.module, args.words), **about}
        report = {"environment": about, **{k: v for k, v in report.items() if k != "environment"}}
        name = self.result(args)
        path = args.out or (RESULTS / f"{name}.json" if name else None)
        if path:
            save(report, path)
        print(self.tables([report]))
        if self.finish:
            self.finish(args, report, path)


def describe(*more_packages: str) -> dict[str, Any]:
    """Machine, versions and a hash of the code, as every result file carries them."""
    import jax

    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, *more_packages)}
    return {
        "python": platform.python_version(),
        "versions": versions,
        "code": code_identity().sha256,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "platform": device.platform,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or "unknown"


def core_numbers() -> list[int]:
    """The numbers of the cores that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cores() -> int:
    """How many cores this process may use."""
    return len(core_numbers()) or os.cpu_count() or 1


def command(module: str, words: Sequence[str]) -> str:
    """A command as a result file names it: without folders of this machine."""
    kept, before = [], ""
    for word in words:
        flag, sign, _ = word.partition("=")
        if before in INPUTS:
            kept.append("DIR")
        elif flag in INPUTS:
            kept.append(f"{flag}=DIR" if sign else flag)
        elif flag not in PLACES and before not in PLACES:
            kept.append(word)
        before = "" if sign else flag
    return " ".join(["python", "-m", f"benchmarks.{module}", *kept])


def describe_for_gpu(module: str, **request: Any) -> dict[str, Any]:
    """`describe(**request)` of a module of benchmarks, in a process whose JAX knows the compiler
    for GPUs that are not here.

    Raises:
        UserError: the compiler is not installed.
    """
    from affectgpt_jax.training import gpu_compile

    if why := gpu_compile.unavailable():
        raise UserError(why)
    code = f"from benchmarks import harness, {module}; harness.answer({module}.describe)"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    asked = json.dumps(request)
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=asked,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        check=True,
    )
    return json.loads(done.stdout)


def answer(describe: Callable[..., dict[str, Any]]) -> None:
    """Answer the request on standard input, as `describe_for_gpu` asks it."""
    # What libraries print must not stand in the answer.
    output, sys.stdout = sys.stdout, sys.stderr
    json.dump(describe(**json.load(sys.stdin)), output)


def save(report: Report, path: Path) -> None:
    """Write a result file; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report, indent=1)


def load(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ReadError: it cannot be read, or holds no JSON object.
    """
    return read_json(path, dict[str, Any])


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table of cells."""
    lines = [list(header), *map(list, rows)]
    first, *others = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([first, "|---" * len(lines[0]) + "|", *others])


def columns(cells: Mapping[str, Callable[[Any], str]], rows: Iterable[Any]) -> str:
    """A Markdown table, from the heading of each column and what makes a cell of a row."""
    return markdown(cells, [[cell(row) for cell in cells.values()] for row in rows])


def each(table: Callable[[Report], str]) -> Callable[[Sequence[Report]], str]:
    """The table of every report, one after the other."""
    return lambda reports: "\n\n".join(map(table, reports))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range of repeated measurements."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def spread_in_words(found: Mapping[str, float], form: str = ".2f", unit: str = "") -> str:
    """A spread as tables show it: `median (lowest to highest)`."""
    return f"{found['median']:{form}}{unit} ({found['lowest']:{form}} to {found['highest']:{form}})"


def seconds_of(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
