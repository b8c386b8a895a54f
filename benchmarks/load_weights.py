"""Load a base of Qwen2.5-7B's widths and measure its memory: `python -m benchmarks.load_weights`.

A checkpoint of random bfloat16 weights, in several files with an index, is loaded by processes of
their own. Memory is the kernel's high-water mark of a process (VmHWM in `/proc/self/status`) less
what it held before loading (VmRSS). No loader here maps a file, so the mark holds no page of the
disk's cache: RssFile grows by libraries only (`newly_mapped`). What the mark is beyond the arrays
themselves is the cost of loading. Beside it, for comparison: one parameter at a time, as one would
write it down.

Writes `benchmarks/results/load_weights.json`; `--show` prints the table of such a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from affectgpt_jax.models.decoder import PUBLISHED, Decoder, DecoderConfig, init_base
from affectgpt_jax.training.sharding import make_mesh, tree_shardings
from affectgpt_jax.weights.hf_config import to_hf
from affectgpt_jax.weights.huggingface import (
    base_identity,
    load_base,
    read_config,
    tensor_name,
    weight_files,
)
from affectgpt_jax.weights.streaming import StoredTensor, read_header
from benchmarks import environment

RESULTS = Path(__file__).parent / "results" / "load_weights.json"
GIB = 2**30
TRANSPOSED = ("kernel", "lm_head")  # what a file holds as [out, in]
# Name -> processes, CPU devices of each, mesh, loader.
CASES = {
    "load_base, one device": (1, 1, "data:1", "blocks"),
    "load_base, 8 devices, fsdp:8": (1, 8, "fsdp:8", "blocks"),
    "load_base, 8 devices, tensor:8": (1, 8, "tensor:8", "blocks"),
    "load_base, 2 processes, fsdp:2": (2, 1, "fsdp:2", "blocks"),
    "one parameter at a time, one device": (1, 1, "data:1", "parameters"),
}


def abstract_base(llm: DecoderConfig) -> Any:
    """Shapes of a base in bfloat16."""
    shapes = jax.eval_shape(lambda key: init_base(Decoder(llm), key), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)


def write_checkpoint(directory: Path, llm: DecoderConfig, file_bytes: int) -> None:
    """Random weights in files of about `file_bytes`, as Hugging Face lays them out."""
    rng = np.random.default_rng(0)
    stored = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_base(llm)):
        keys = tuple(entry.key for entry in path)
        name, stacked = tensor_name(keys)
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if keys[-1] in TRANSPOSED else shape
        for i in range(leaf.shape[0] if stacked else 1):
            stored[name.format(i)] = shape
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
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(to_hf(llm, "bfloat16")), encoding="utf-8")


def load_by_parameters(directory: Path, abstract: Any, shardings: Any) -> Any:
    """The loader one would write down: stack all layers of a parameter, then place it."""
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        stored |= read_header(path)

    def read(name: str, transposed: bool) -> np.ndarray:
        tensor = stored[name]
        count = math.prod(tensor.shape)
        value = np.fromfile(tensor.path, np.uint16, count, offset=tensor.offset)
        value = value.view(jnp.bfloat16).reshape(tensor.shape)
        return value.T if transposed else value

    def load(path, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        keys = tuple(entry.key for entry in path)
        name, stacked = tensor_name(keys)
        names = [name.format(i) for i in range(leaf.shape[0])] if stacked else [name]
        values = [read(name, keys[-1] in TRANSPOSED) for name in names]
        return jax.device_put(np.stack(values) if stacked else values[0], sharding)

    return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def memory(key: str) -> int:
    """Bytes of this process's memory, by their name in `/proc/self/status`."""
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def load_here(directory: Path, mesh: str, loader: str) -> dict[str, Any]:
    """Load a checkpoint in this process; its time in s and its memory in bytes."""
    abstract = abstract_base(read_config(directory))
    shardings = tree_shardings(make_mesh(mesh), abstract)
    load = load_base if loader == "blocks" else load_by_parameters
    jax.block_until_ready(jnp.zeros(1))  # the backend's own memory
    before, mapped = memory("VmRSS"), memory("RssFile")
    began = time.perf_counter()
    base = jax.block_until_ready(load(directory, abstract, shardings))
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
    """Run a case in processes of its own; the largest memory and the longest time of them."""
    processes, devices, mesh, loader = CASES[case]
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.load_weights", f"--directory={directory}"]
    command += [f"--mesh={mesh}", f"--loader={loader}", f"--devices={devices}"]
    running = [
        subprocess.Popen(
            [*command, "--group", f"localhost:{port}", str(processes), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{case}: a process failed")
    reports = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {key: max(report[key] for report in reports) for key in reports[0]}


def summary(seconds: list[float]) -> dict[str, Any]:
    """Of repeated measurements, the first of which does not count."""
    counted = seconds[1:]
    return {
        "median_s": statistics.median(counted),
        "min_s": min(counted),
        "max_s": max(counted),
        "repeats": len(counted),
    }


def seconds_of(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def read_all(directory: Path) -> None:
    """Read every byte of a checkpoint into one buffer: what any loader pays at least."""
    buffer = bytearray(4 * 2**20)
    for path in weight_files(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def table(report: dict[str, Any]) -> str:
    """A Markdown table of a report."""
    size = report["checkpoint_bytes"]
    lines = [
        f"{report['layers']} layers and the embedding of Qwen2.5-7B, bfloat16, {size / GIB:.2f} "
        f"GiB in {report['files']} files, on {report['cores']} core(s)",
        "",
        "| what | arrays of a process | peak beyond them | median | fastest | slowest | GB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        held = f"{case['arrays'] / GIB:.2f} GiB" if "arrays" in case else ""
        beyond = f"{case['beyond'] / GIB:.2f} GiB" if "beyond" in case else ""
        lines.append(
            f"| {name} | {held} | {beyond} | {case['median_s']:.2f} s | {case['min_s']:.2f} s "
            f"| {case['max_s']:.2f} s | {size / case['median_s'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", type=Path, help="print the table of a result file and stop")
    # What a process of a case is started with.
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mesh", help=argparse.SUPPRESS)
    parser.add_argument("--loader", help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--group", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text(encoding="utf-8"))))
        return
    if args.directory:
        jax.config.update("jax_num_cpu_devices", args.devices)
        address, processes, rank = args.group
        if int(processes) > 1:
            jax.distributed.initialize(address, int(processes), int(rank))
        print(json.dumps(load_here(args.directory, args.mesh, args.loader)))
        return
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
        calls = range(args.repeats + 1)
        cases: dict[str, Any] = {}
        for name in CASES:
            runs = [measure(directory, name) for _ in calls]
            cases[name] = summary([run.pop("seconds") for run in runs])
            cases[name] |= {key: max(run[key] for run in runs) for key in runs[0]}
        for name, function in {"base_identity": base_identity, "reading alone": read_all}.items():
            cases[name] = summary([seconds_of(lambda f=function: f(directory)) for _ in calls])
    report = {
        "environment": environment.describe(),
        "cores": len(os.sched_getaffinity(0)),
        "layers": args.layers,
        "checkpoint_bytes": size,
        "files": len(files),
        "cases": cases,
    }
    environment.save(report, args.out)
    print(table(report))


if __name__ == "__main__":
    main()
