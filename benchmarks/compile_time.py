"""How long a train step takes to compile: `python -m benchmarks.compile_time`.

The 28 layers of Qwen2.5-7B from shapes alone, so that no memory is needed: each time a process of
its own lowers and compiles the update of three rows, cold, and then from the cache that the cold
one has filled. Writes `benchmarks/results/compile_time_...`, under the name of the machine's scale
as `benchmarks.all` has it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.train_step import RESULTS, at_least, default_scale
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

        from affectgpt_jax import build
        from affectgpt_jax.data.packing import Bucket
        from affectgpt_jax.data.pipeline import collate
        from affectgpt_jax.models.affectgpt import init_random_base
        from affectgpt_jax.train import lower_step
        from affectgpt_jax.training import sharding
        from affectgpt_jax.training.losses import cross_entropy
        from affectgpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
        from affectgpt_jax.training.step import init_state, make_train_step
        from benchmarks import sides, synthetic, workloads

        config = self.workload.config
        mesh = sides.one_device()
        model = build.model(config, self.workload.llm, sharding.ActivationConstraint(mesh))
        optimizer_config = build.optimizer_config(config)
        optimizer = make_optimizer(optimizer_config, config.steps)
        schedule = learning_rate_schedule(optimizer_config, config.steps)
        how = workloads.prompt_processor(self.workload)
        shapes = {name: (synthetic.FRAMES, width) for name, width in how.features.items()}
        bucket = Bucket(self.length, self.targets)
        batch = collate([[]] * config.batch_size, how, shapes, bucket)
        step = make_train_step(model, cross_entropy, optimizer, schedule, seed=0)
        abstract_state = sharding.abstract(mesh, lambda key: init_state(model, optimizer, key))
        abstract_base = sharding.abstract(mesh, lambda key: init_random_base(model, key))
        events: list[str] = []
        jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
        began = time.perf_counter()
        lowered = lower_step(
            step, mesh, abstract_state, abstract_base, sharding.abstract_batch(mesh, batch)
        )
        traced = time.perf_counter()
        lowered.compile()
        done = time.perf_counter()
        return {
            "lower_s": traced - began,
            "compile_s": done - traced,
            "hits": events.count("/jax/compilation_cache/cache_hits"),
            "environment": environment.describe(),
        }


def run(args: argparse.Namespace) -> dict[str, Any]:
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
    about = found["cold"][0]["environment"]
    about["command"] = environment.command("benchmarks.compile_time", args.words)
    return {
        "environment": about,
        "settings": {"scale": args.scale, "length": args.length},
        "cores": len(os.sched_getaffinity(0)),
        "seconds": {
            kind: {
                name: statistics.median(run[name] for run in runs)
                for name in ("lower_s", "compile_s")
            }
            | {
                "together": [run["lower_s"] + run["compile_s"] for run in runs],
                "hits": [run["hits"] for run in runs],
            }
            for kind, runs in found.items()
        },
    }


def table(report: Mapping[str, Any]) -> str:
    """A Markdown table of a report."""
    lines = ["| train step | traced and lowered | compiled | together |", "|---|---|---|---|"]
    for kind, found in report["seconds"].items():
        lines.append(
            f"| {kind} | {found['lower_s']:.1f} s | {found['compile_s']:.1f} s "
            f"| {statistics.median(found['together']):.1f} s |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=("full", "small", "tiny"), default="full")
    parser.add_argument("--length", type=at_least(2), default=512, help="tokens of a row")
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/compile_time_...")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.words = list(argv)
    report = run(args)
    # The full shapes are compiled everywhere; only a trial has others.
    name = default_scale() if args.scale == "full" else f"{args.scale}_model"
    environment.save(report, args.out or RESULTS / f"compile_time_{name}.json")
    print(table(report))


if __name__ == "__main__":
    main()
