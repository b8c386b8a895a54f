"""What XLA's CUDA compiler makes of an update on GPUs that are not here:
`python -m benchmarks.compiled [--only WORD] [--add]`.

The step that `python -m affectgpt_jax.plan --compile` with the same flags compiles (extra
gpu-compile). Nothing is run: bytes and launches are the compiler's, times follow from them, see
`roofline.compiled_floor`. Every case is written as soon as it is compiled.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from affectgpt_jax.common.json import read_json
from benchmarks import harness
from benchmarks.harness import Report

PLAN = "python -m affectgpt_jax.plan --config=affectgpt_qwen25_7b --compile"
DEVICES = ("a100-80g", "h100-80g", "h200-141g")


class Case(NamedTuple):
    """A workload on devices of one kind.

    Attributes:
        workload: its name.
        device: of `training.devices.DEVICES`.
        flags: of the plan.
    """

    workload: str
    device: str
    flags: tuple[str, ...]

    @property
    def command(self) -> str:
        return " ".join((PLAN, f"--device={self.device}", *self.flags))


def cases() -> list[Case]:
    """All cases, the workloads one after the other."""
    anchor = ("--devices=1", "--shape=2x4096", "--config.input=text", "--config.lora.dropout=0")
    # 48 clips of the paper's lengths fill six rows; the paper's three are one GPU's.
    packed = ("--devices=1", "--config.pack_length=2048", "--config.batch_size=6")
    workloads = {
        "anchor": anchor,
        "anchor, fp8": (*anchor, "--config.base_precision=fp8"),
        "packed 48": packed,
        **{
            f"paper, {n} GPU{'s' * (n > 1)}": (f"--devices={n}", f"--config.batch_size={3 * n}")
            for n in (1, 8, 64)
        },
    }
    return [
        Case(workload, device, flags)
        for workload, flags in workloads.items()
        for device in DEVICES
        if not (workload == "anchor, fp8" and device.startswith("a100"))
    ]


def make(case: Case) -> dict[str, Any]:
    """Compile a case; returns what was found, with the estimate and the command."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        words = [*case.command.split()[1:], f"--json={path}"]
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        plan = read_json(path, dict[str, Any])
    return {
        "command": case.command,
        "workload": case.workload,
        "device": plan["device"]["name"],
        "devices": plan["layout"]["devices"],
        "rows": plan["layout"]["rows"],
        "length": plan["rows"]["length"],
        "targets": plan["rows"]["targets"],
        "attention": plan["attention"]["name"],
        "estimate_gib": plan["estimate"]["peak_gib"],
        "date": datetime.date.today().isoformat(),
        **{key: value for key, value in plan["compiled"].items() if key != "largest"},
    }


def run(args: argparse.Namespace) -> Report:
    """Every case that is asked for; returns the report."""
    path = args.out or harness.RESULTS / f"{result(args)}.json"
    report = harness.load(path) if args.add and path.is_file() else {"cases": []}
    for case in cases():
        have = [made["command"] for made in report["cases"]]
        if args.only in case.workload and case.command not in have:
            report["cases"].append(make(case))
            about = {"command": harness.command("compiled", args.words), **harness.describe()}
            harness.save({"environment": about, **report}, path)
    order = [case.command for case in cases()]
    report["cases"].sort(key=lambda made: order.index(made["command"]))
    return {"cases": report["cases"]}


def result(_: argparse.Namespace) -> str:
    """The name of the result: by JAX's version, since the compiler comes with it."""
    import jax

    return f"compiled_jax_{'.'.join(jax.__version__.split('.')[:2])}"


def number(key: str, form: str = ",.0f") -> Callable[[Report], str]:
    """A cell of a number."""
    return lambda made: format(made[key], form)


COLUMNS = {
    "workload": lambda m: m["workload"],
    "GPUs": lambda m: f"{m['devices']} x {m['device']}",
    "rows of one": lambda m: f"{m['rows']} x {m['length']:,}",
    "remat, attention": lambda m: f"{m['remat']}, {m['attention']}",
    "peak GiB (estimate)": lambda m: f"{m['peak_gib']:.1f} ({m['estimate_gib']:.1f})",
    "moved GB": number("moved_gb"),
    "of it no matmul": lambda m: f"{m['moved_gb'] - m['matmul_gb'] - m['attention_gb']:,.0f}",
    "copies, fills": number("movement_gb", ".1f"),
    "launches": number("launches"),
    # Cases of one device of before this was told have none.
    "links ms (alone)": lambda m: "{:.1f} ({:.1f})".format(
        m.get("network_ms", 0), m.get("network_alone_ms", 0)
    ),
    "floor ms": number("floor_ms"),
    "tokens/s of one": number("tokens_per_s"),
    "MFU": number("mfu", ".0%"),
}


def table(report: Report) -> str:
    """A Markdown table of the cases."""
    version = report["cases"][0]["jax"]
    return f"**Compiled by jax {version}, not run**\n\n{harness.columns(COLUMNS, report['cases'])}"


OVERVIEW = {
    "compiled, not run": lambda m: f"{m['workload']}, {m['device']}, jax {m['jax']}",
    **{
        name: COLUMNS[name]
        for name in ("peak GiB (estimate)", "of it no matmul", "floor ms", "tokens/s of one", "MFU")
    },
}


def overview(reports: Sequence[Report]) -> str:
    """The anchor's rows, in short."""
    found = [m for report in reports for m in report["cases"] if m["workload"] == "anchor"]
    names = {"of it no matmul": "moved beside matmuls, GB"}
    return harness.columns({names.get(k, k): cell for k, cell in OVERVIEW.items()}, found)


def flags(add: Callable[..., Any]) -> None:
    add("--only", default="", metavar="WORD", help="workloads with this in their name")
    add("--add", action="store_true", help="keep the cases that the file has")


def tables(reports: Sequence[Report]) -> str:
    return "\n\n".join(map(table, reports))


COMMAND = harness.Measurement("compiled", run, tables, result, flags=flags)

if __name__ == "__main__":
    COMMAND.main()
