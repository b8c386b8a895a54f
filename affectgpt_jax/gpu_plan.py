"""A train step, or one of reinforcement, as XLA's CUDA compiler makes it, in a process of its own.

The compiler's plugin would be seen by all that JAX does in its process. So `Compilation` starts
another one, whose JAX runs on the CPU, and `answer` is what that one does: a request comes on
standard input and the answer goes to standard output, both as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Self

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from affectgpt_jax import runtime
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.progress import LiveLine, duration
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.planner import Planner
from affectgpt_jax.rollout_planner import RolloutPlanner
from affectgpt_jax.training import (
    gpu_compile,
    hlo,
    hlo_traffic,
    roofline,
    sharding,
    xla_options,
)
from affectgpt_jax.training.devices import DEVICES, Device
from affectgpt_jax.training.gpu_compile import CompilerError


@dataclasses.dataclass(frozen=True)
class Request:
    """A step to compile.

    Attributes:
        config: as training reads it, of plain values.
        device: of `training.devices.DEVICES`.
        devices: how many.
        rows: the shape of every row of a supervised update.
        remat: the policy.
        rollout: of a step of reinforcement, what `RolloutPlanner` takes: `prompt`, `answer` and
            `supervised`; None for a supervised update.
    """

    config: dict[str, Any]
    device: str
    devices: int
    rows: Bucket
    remat: str
    rollout: dict[str, Any] | None = None


def describe(request: Request) -> dict[str, Any]:
    """Compile an update and describe it, see `gpu_compile.read`, together with its floor.

    Returns:
        What `gpu_compile.read` does, each of `collectives` with `ms` and `alone_ms` a step, see
        `roofline.sent_times`; their sums `network_ms` and `network_alone_ms`; `compile_s`; `tflop`,
        of the model; `floor_ms`, see `roofline.compiled_floor`; `tokens_per_s` and `mfu` there. All
        of one device. Of a step of reinforcement, see `describe_step`.

    Raises:
        CompilerError: the compiler refuses it.
        XlaOptionError: `config.xla_options` holds something that XLA does not take.
    """
    if request.rollout:
        return describe_step(request)
    config, device, mesh, options = _set_up(request)
    planner = Planner(config, device, request.rows, roofline.EFFICIENCY)
    with gpu_compile.in_place_of_local_gpu(device.compute_capability):
        lowered = planner.lower(mesh, request.remat, stand_in=False)
    compiled, seconds = _timed(lowered, options)
    found = gpu_compile.read(compiled, mesh, config.lora.rank)

    share = config.batch_size / request.devices
    flops = type(planner.flops())(*(share * f for f in planner.flops()))
    shape = roofline.Shape(*sharding.parse_mesh(config.mesh, request.devices))
    network = alone = 0.0
    for each in found["collectives"]:
        times = roofline.sent_times(hlo_traffic.Sent(**each), shape, device, config.dtype)
        each["ms"], each["alone_ms"] = (1e3 * seconds for seconds in times)
        network, alone = network + times[0], alone + times[1]
    elsewhere = ("matmul_gb", "attention_gb", "collective_gb")
    moved = 1e9 * (found["moved_gb"] - sum(found[kind] for kind in elsewhere))
    floor = roofline.compiled_floor(
        flops, request.remat, moved, device, config.dtype, config.base_precision, alone
    )
    return found | {
        "network_ms": 1e3 * network,
        "network_alone_ms": 1e3 * alone,
        "jax": jax.__version__,
        "remat": request.remat,
        "compile_s": seconds,
        "tflop": flops.total / 1e12,
        "floor_ms": 1e3 * floor,
        "tokens_per_s": share * request.rows.length / floor,
        "mfu": flops.total / floor / roofline.matmul_peak(device, config.dtype),
    }


def describe_step(request: Request) -> dict[str, Any]:
    """Compile the programs of a step of reinforcement, and describe them.

    Returns:
        `passes`, by name (see `rollout_planner`): `there_gib`, of all that a device holds while it
        runs, `peak_gib`, with its results and temporaries, `launches`, `moved_gb`, `floor_ms`, see
        `roofline.launch_floor`, and `compile_s`; `peak_gib`, the largest of them.
        All of one device, and of one run of each program; `decode` is one token.

    Raises:
        CompilerError, XlaOptionError: as `describe`.
    """
    config, device, mesh, options = _set_up(request)
    planner = RolloutPlanner(config, device, efficiency=roofline.EFFICIENCY, **request.rollout)
    with gpu_compile.in_place_of_local_gpu(device.compute_capability):
        lowered = planner.lower(mesh, request.remat)
    passes = {}
    for name in list(lowered):
        program, there = lowered.pop(name)
        compiled, seconds = _timed(program, options if name == "update" else {})
        memory = compiled.memory_analysis()
        more = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        launches = hlo_traffic.launches(hlo.parse(compiled.as_text()), config.lora.rank)
        passes[name] = {
            "there_gib": there / 2**30,
            "peak_gib": (there + more) / 2**30,
            "launches": sum(launch.times for launch in launches),
            "moved_gb": sum(launch.bytes for launch in launches) / 1e9,
            "floor_ms": 1e3 * roofline.launch_floor(launches, device, config.dtype),
            "compile_s": seconds,
        }
    return {
        "jax": jax.__version__,
        "remat": request.remat,
        "passes": passes,
        "peak_gib": max(found["peak_gib"] for found in passes.values()),
        "compile_s": sum(found["compile_s"] for found in passes.values()),
    }


def _set_up(request: Request) -> tuple[ConfigDict, Device, Mesh, dict[str, xla_options.Value]]:
    """Config, device, mesh of GPUs that are not here, and XLA's options of a request."""
    config = ConfigDict(request.config)
    mesh = sharding.make_mesh(config.mesh, gpu_compile.devices(request.device, request.devices))
    options, _ = xla_options.compiler_options(
        "cuda",
        request.devices,
        xla_options.parse(config.xla_options),
        os.environ.get("XLA_FLAGS", ""),
        xla_options.refusal_by_xla,
    )
    return config, DEVICES[request.device], mesh, options


def _timed(lowered: jax.stages.Lowered, options: Any) -> tuple[jax.stages.Compiled, float]:
    began = time.perf_counter()
    compiled = gpu_compile.compile_step(lowered, options)
    return compiled, time.perf_counter() - began


class Compilation:
    """A compilation in a process of its own, with a line about it on standard error.

    Used in a `with` statement, whose end stops the process if it still runs.

    Args:
        request: what to compile.
        enabled: False starts nothing, and `result` is None.
    """

    def __init__(self, request: Request, enabled: bool = True):
        self._request, self._enabled = request, enabled
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        if self._enabled:
            self._files = contextlib.ExitStack()
            said, found = (
                self._files.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
                for _ in range(2)
            )
            self._said, self._found = said, found
            # It sees no GPU even where there is one, and its own messages are shown if it fails.
            env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
            command = [sys.executable, "-c", "from affectgpt_jax import gpu_plan; gpu_plan.serve()"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=found, stderr=said, env=env, text=True
            )
            with self._process.stdin as pipe:
                json.dump(dataclasses.asdict(self._request), pipe)
            self._line = threading.Thread(target=self._show_progress, daemon=True)
            self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._line.join()
            self._files.close()

    def _show_progress(self) -> None:
        began = time.perf_counter()
        what = f"compiling for {self._request.devices} x {DEVICES[self._request.device].name}"
        with LiveLine(stream=sys.stderr) as line:
            running = True
            while running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.2)
                running = self._process.poll() is None
                line.show(lambda: [what, duration(time.perf_counter() - began)], last=not running)

    def result(self) -> dict[str, Any] | None:
        """What `describe` returns, once it is there.

        Raises:
            CompilerError: the compiler refuses the step, or its process ended for another reason.
        """
        if self._process is None:
            return None
        status = self._process.wait()
        self._line.join()
        self._found.seek(0)
        text = self._found.read()
        if status == 0 and text:
            found = json.loads(text)
            if "error" in found:
                raise CompilerError(found["error"])
            return found
        self._said.seek(0)
        lines = self._said.read().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it says nothing")
        raise CompilerError(f"the process that compiles for GPUs ended with {status}: {last}")


def serve() -> None:
    """Answer one request, as `Compilation` starts it."""
    # What libraries print must not stand in the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    runtime.leave_collectives_to_nccl()  # as where the program is to run
    request = json.load(sys.stdin)
    request["rows"] = Bucket(**request["rows"])
    try:
        found = describe(Request(**request))
    except UserError as error:
        found = {"error": str(error)}
    json.dump(found, answer)
