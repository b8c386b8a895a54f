"""Load a base of Qwen2.5-7B's widths and measure its memory: `python -m benchmarks.load_weights`.

A checkpoint of random bfloat16 weights, in several files with an index, is loaded by processes of
their own. Memory is the kernel's high-water mark of a process (VmHWM in `/proc/self/status`) less
what it held before loading (VmRSS). The loader maps no file, so the mark holds no page of the
disk's cache: RssFile grows by libraries only (`newly_mapped`). What the mark is beyond the arrays
themselves is the cost of loading.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from affectgpt_jax.common.json import write_json
from affectgpt_jax.models.decoder import PUBLISHED, Decoder, DecoderConfig, init_base
from affectgpt_jax.training.sharding import make_mesh, tree_shardings
from affectgpt_jax.weights.hf_config import to_hf
from affectgpt_jax.weights.huggingface import base_tensors, load_base, read_config, weight_files
from benchmarks import harness
from benchmarks.harness import Report, at_least, spread
from benchmarks.turns import Side

GIB = 2**30
# Name -> processes, CPU devices of each, mesh.
CASES = {
    "load_base, one device": (1, 1, "data:1"),
    "load_base, 8 devices, fsdp:8": (1, 8, "fsdp:8"),
    "load_base, 8 devices, tensor:8": (1, 8, "tensor:8"),
    "load_base, 2 processes, fsdp:2": (2, 1, "fsdp:2"),
}


def abstract_base(llm: DecoderConfig) -> Any:
    """Shapes of a base in bfloat16."""
    shapes = jax.eval_shape(lambda key: init_base(Decoder(llm), key), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)


def write_checkpoint(directory: Path, llm: DecoderConfig, file_bytes: int) -> None:
    """Random weights in files of about `file_bytes`, as Hugging Face lays them out."""
    rng = np.random.default_rng(0)
    stored = {
        name: leaf.shape[::-1] if transposed else leaf.shape
        for name, (leaf, transposed) in base_tensors(abstract_base(llm)).items()
    }
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in stored.items():
        if size > file_bytes:
            files, size = [*files, []], 0
        files[-1].append(name)
        size += 2 * int(np.prod(shape))
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        # Finite bfloat16 values: the exponent's highest bit is never set.
        tensors = {
            name: (
                rng.integers(0, 2**16, size=stored[name], dtype=np.uint16) & np.uint16(0xBFFF)
            ).view(jnp.bfloat16)
            for name in names
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    write_json(directory / "config.json", to_hf(llm, "bfloat16"))


def memory(key: str) -> int:
    """Bytes of this process's memory, by their name in `/proc/self/status`."""
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


class Loader:
    """Loads a checkpoint in this process.

    Args:
        devices: CPU devices of this process.
        address: "HOST:PORT" where several processes meet.
        processes: how many there are.
        rank: of this one.
    """

    def __init__(self, devices: int, address: str, processes: int, rank: int):
        jax.config.update("jax_num_cpu_devices", devices)
        if processes > 1:
            jax.distributed.initialize(address, processes, rank)

    def load(self, directory: str, mesh: str) -> dict[str, Any]:
        """Load onto a mesh; the time in s and the memory of this process in bytes."""
        abstract = abstract_base(read_config(Path(directory)))
        shardings = tree_shardings(make_mesh(mesh), abstract)
        jax.block_until_ready(jnp.zeros(1))  # the backend's own memory
        before, mapped = memory("VmRSS"), memory("RssFile")
        began = time.perf_counter()
        base = jax.block_until_ready(load_base(Path(directory), abstract, shardings))
        seconds = time.perf_counter() - began
        buffers = {
            shard.data.unsafe_buffer_pointer(): shard.data.nbytes
            for leaf in jax.tree.leaves(base)
            for shard in leaf.addressable_shards
        }
        arrays = sum(buffers.values())
        return {
            "seconds": seconds,
            "arrays": arrays,
            "beyond": memory("VmHWM") - before - arrays,
            "newly_mapped": memory("RssFile") - mapped,
        }


def measure(directory: Path, case: str) -> dict[str, Any]:
    """Run a case in processes of its own; the largest memory and the longest time of them.

    Raises:
        TurnError: a process failed.
    """
    processes, devices, mesh = CASES[case]
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    told = {"devices": devices, "address": address, "processes": processes}
    with contextlib.ExitStack() as stack:
        sides = [
            stack.enter_context(Side(case, "benchmarks.load_weights:Loader", told | {"rank": rank}))
            for rank in range(processes)
        ]
        for side in sides:
            side.send("load", directory=str(directory), mesh=mesh)
        reports = [side.receive() for side in sides]
    return {key: max(report[key] for report in reports) for key in reports[0]}


def run(args: argparse.Namespace) -> Report:
    """All cases; returns the report.

    Raises:
        TurnError: a process failed.
    """
    # A tied head leaves more of the size to stacked layers, which are what loading is about.
    llm = dataclasses.replace(
        PUBLISHED["Qwen2.5-7B-Instruct"],
        num_hidden_layers=args.layers,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_checkpoint(directory, llm, file_bytes=GIB // 2)
        os.sync()  # or the system would write while the first case reads
        files = weight_files(directory)
        size = sum(path.stat().st_size for path in files)
        cases: dict[str, Any] = {}
        for name in CASES:
            runs = [measure(directory, name) for _ in range(args.repeats + 1)]
            seconds = [run.pop("seconds") for run in runs][1:]  # the first does not count
            cases[name] = spread(seconds) | {"repeats": len(seconds)}
            cases[name] |= {key: max(run[key] for run in runs) for key in runs[0]}
    return {
        "cores": harness.cores(),
        "layers": args.layers,
        "checkpoint_bytes": size,
        "files": len(files),
        "cases": cases,
    }


def table(report: Report) -> str:
    """A Markdown table of a report."""
    size = report["checkpoint_bytes"]

    def gib(key: str) -> Callable[[Any], str]:
        return lambda case: f"{case[1][key] / GIB:.2f} GiB"

    def seconds(key: str) -> Callable[[Any], str]:
        return lambda case: f"{case[1][key]:.2f} s"

    columns = {
        "what": lambda case: case[0],
        "arrays of a process": gib("arrays"),
        "peak beyond them": gib("beyond"),
        "median": seconds("median"),
        "fastest": seconds("lowest"),
        "slowest": seconds("highest"),
        "GB/s": lambda case: f"{size / case[1]['median'] / 1e9:.2f}",
    }
    return (
        f"{report['layers']} layers and the embedding of Qwen2.5-7B, bfloat16, {size / GIB:.2f} "
        f"GiB in {report['files']} files, on {report['cores']} core(s)\n\n"
        + harness.columns(columns, report["cases"].items())
    )


def flags(add: Callable[..., Any]) -> None:
    add("--layers", type=at_least(1), default=4)
    add("--repeats", type=at_least(1), default=3)


COMMAND = harness.Measurement(
    "load_weights",
    run,
    harness.each(table),
    lambda args: "load_weights",
    flags,
)

if __name__ == "__main__":
    COMMAND.main()
