"""How long a train step takes to compile: `python -m benchmarks.compile_time`.

The 28 layers of Qwen2.5-7B from shapes alone, so that no memory is needed: each time a process of
its own lowers and compiles the update of three rows, cold, and then from the cache that the cold
one has filled. The result has the machine's scale in its name.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import harness
from benchmarks.harness import Report, at_least
from benchmarks.turns import Side


class Compiler:
    """Compiles in this process.

    Args:
        workload: arguments of `workloads.make`.
        length: tokens of a row.
        targets: supervised ones.
    """

    def __init__(self, workload: Mapping[str, Any], length: int, targets: int):
        from benchmarks import workloads

        self.workload = workloads.make(**workload)
        self.length, self.targets = length, targets

    def compile(self) -> dict[str, Any]:
        """Seconds of lowering and of compiling, and how many programs the cache had."""
        import jax

        from affectgpt_jax.data.packing import Bucket
        from affectgpt_jax.data.pipeline import collate
        from affectgpt_jax.models.attention import causal
        from affectgpt_jax.program import make_program
        from benchmarks import sides, synthetic, workloads

        config, llm = self.workload.config, self.workload.llm
        processor = workloads.prompt_processor(self.workload)
        shapes = {name: (synthetic.FRAMES, width) for name, width in processor.features.items()}
        bucket = Bucket(self.length, self.targets)
        batch = collate([[]] * config.batch_size, processor, shapes, bucket)
        program = make_program(
            config, sides.one_device(), {self.length: batch}, llm=llm, attend=causal
        )
        events: list[str] = []
        jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
        began = time.perf_counter()
        lowered = program.lower(self.length)
        traced = time.perf_counter()
        lowered.compile()
        done = time.perf_counter()
        return {
            "lower_s": traced - began,
            "compile_s": done - traced,
            "hits": events.count("/jax/compilation_cache/cache_hits"),
            "environment": harness.describe(),
        }


def run(args: argparse.Namespace) -> Report:
    """One measurement; returns the report."""
    told = {"name": "affectgpt", "scale": args.scale, "batch": 3, "dtype": "bfloat16"}
    arguments = {"workload": told, "length": args.length, "targets": args.length // 2}
    found: dict[str, list[dict]] = {"cold": [], "from the cache": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            variables = {"JAX_COMPILATION_CACHE_DIR": cache}
            for kind, runs in found.items():
                with Side(kind, "benchmarks.compile_time:Compiler", arguments, variables) as side:
                    runs.append(side.call("compile"))
    return {
        "environment": found["cold"][0]["environment"],
        "settings": {"scale": args.scale, "length": args.length},
        "cores": harness.cores(),
        "seconds": {
            kind: {
                "lower_s": statistics.median(run["lower_s"] for run in runs),
                "compile_s": statistics.median(run["compile_s"] for run in runs),
                "together": [run["lower_s"] + run["compile_s"] for run in runs],
                "hits": [run["hits"] for run in runs],
            }
            for kind, runs in found.items()
        },
    }


def table(report: Report) -> str:
    """A Markdown table of a report."""
    rows = []
    for kind, found in report["seconds"].items():
        together = statistics.median(found["together"])
        times = (found["lower_s"], found["compile_s"], together)
        rows.append((kind, *(f"{seconds:.1f} s" for seconds in times)))
    return harness.markdown(("train step", "traced and lowered", "compiled", "together"), rows)


def flags(add: Callable[..., Any]) -> None:
    add("--scale", choices=harness.SCALES, default="full", help="of the model")
    add("--length", type=at_least(2), default=512, help="tokens of a row")
    add("--repeats", type=at_least(1), default=3)


COMMAND = harness.Measurement(
    "compile_time",
    run,
    harness.each(table),
    lambda args: harness.whole_or_trial("compile_time", args.scale, "model"),
    flags,
)

if __name__ == "__main__":
    COMMAND.main()
