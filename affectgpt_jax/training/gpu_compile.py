"""XLA's CUDA compiler on a machine without a GPU: what it makes of a step, for GPUs that are named.

The compiler comes with JAX's CUDA plugin (the extra `gpu-compile`) and needs neither a GPU nor a
driver: `assets/gpu_targets` holds what it asks of a card. Nothing is measured there, so it chooses
no algorithms: what it says of memory, bytes and collectives holds, and of speed nothing.

The plugin belongs into a process of its own (`affectgpt_jax.gpu_plan`), whose JAX runs on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import importlib.util
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.training import hlo, hlo_traffic
from affectgpt_jax.training.devices import GPUS_PER_NODE
from affectgpt_jax.training.memory import program_bytes

# Matmuls become calls of cuBLAS, which can be told from everything else. The alternative, Triton,
# has to be chosen by measuring anyway.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# JAX's plugin, its distribution, and where CUDA's assembler is.
_PLUGINS = (
    ("jax_plugins.xla_cuda12", "jax-cuda12-pjrt", "nvidia.cuda_nvcc"),
    ("jax_plugins.xla_cuda13", "jax-cuda13-pjrt", "nvidia.cu13"),
)
# As `jax._src.cudnn` counts them; the first without known faults in the graphs that JAX builds.
_CUDNN_VERSION = 91002
# From the first version whose source was read up to the first that was not.
_VERSIONS = ((0, 10), (0, 13))


class CompilerError(UserError, RuntimeError):
    """XLA's CUDA compiler is not installed, or refuses the step."""


def unavailable() -> str:
    """Why nothing can be compiled for GPUs in this installation; empty if it can be."""
    found = [name for plugin, name, nvcc in _PLUGINS if _installed(plugin) and _installed(nvcc)]
    if not found:
        return "XLA's CUDA compiler is not installed: pip install 'affectgpt-jax[gpu-compile]'"
    if not _VERSIONS[0] <= jax.__version_info__[:2] < _VERSIONS[1]:
        low, high = (".".join(map(str, version)) for version in _VERSIONS)
        return (
            f"compiling for GPUs answers private questions of jax >= {low}, < {high}, and this is "
            f"jax {jax.__version__}"
        )
    version = importlib.metadata.version(found[0])
    if version.split(".")[:2] != jax.__version__.split(".")[:2]:
        return (
            f"{found[0]} {version} is not for jax {jax.__version__}: pip install "
            f"'{found[0]}=={jax.__version__}'"
        )
    return ""


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def devices(name: str, count: int) -> list[jax.Device]:
    """So many GPUs, in nodes of at most eight, to compile for; nothing can be put there.

    Args:
        name: of `training.devices.DEVICES`.
        count: 1 or more.
    """
    root = importlib.resources.files("affectgpt_jax") / "assets" / "gpu_targets"
    target = (root / f"{name}.txtpb").read_text(encoding="utf-8")
    node = next(n for n in range(min(count, GPUS_PER_NODE), 0, -1) if count % n == 0)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x{count // node}x{node}"
    )
    return list(topology.devices)


@contextlib.contextmanager
def in_place_of_local_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Answer for a planned GPU what JAX asks the local one while it lowers cuDNN's attention.

    Args:
        capability: the planned device's compute capability.
    """
    from jax._src.cudnn import fused_attention_stablehlo as private

    def parse(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in text.split("."))

    answers = {
        "check_compute_capability": lambda asked: capability >= parse(asked),
        "is_cuda_compute_capability_equal": lambda asked: capability == parse(asked),
        "check_cudnn_version": lambda: _CUDNN_VERSION,
    }
    own = {name: getattr(private, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(private, name, answer)
        yield
    finally:
        for name, answer in own.items():
            setattr(private, name, answer)


def compile_step(
    lowered: jax.stages.Lowered, compiler_options: Mapping[str, Any]
) -> jax.stages.Compiled:
    """Compile a step that was lowered for `devices`.

    Raises:
        CompilerError: the compiler's own first line.
    """
    try:
        return lowered.compile(compiler_options={**OPTIONS, **compiler_options})
    except jax.errors.JaxRuntimeError as error:
        reason = (str(error).splitlines() or ["it gives no reason"])[0]
        raise CompilerError(f"XLA's CUDA compiler refuses the step: {reason}") from error


def read(compiled: jax.stages.Compiled, mesh: Mesh, rank: int) -> dict[str, Any]:
    """What one device holds, launches, moves and sends in a step, of plain values.

    Args:
        compiled: of `compile_step`.
        mesh: over whose devices it is split.
        rank: of the adapters; 0 for none.

    Returns:
        `peak_gib`; `launches`; of the classes of `hlo_traffic`, GB a step: `moved_gb` (of all),
        `matmul_gb`, `attention_gb`, `lora_gb`, `movement_gb`, `other_gb` and `collective_gb`;
        `kinds`, with launches and GB of each; `matmul_tflop`, as executed; `collectives`; and
        `largest`, the launches that move the most beside matmuls and attention.
    """
    module = hlo.parse(compiled.as_text())
    found = hlo_traffic.launches(module, rank)
    kinds = hlo_traffic.totals(found)
    small = [f for f in found if f.kind not in (hlo_traffic.MATMUL, hlo_traffic.ATTENTION)]
    return {
        "peak_gib": program_bytes(compiled) / 2**30,
        "arguments_gib": compiled.memory_analysis().argument_size_in_bytes / 2**30,
        "launches": sum(count for count, _ in kinds.values()),
        "moved_gb": sum(size for _, size in kinds.values()) / 1e9,
        **{f"{kind}_gb": size / 1e9 for kind, (_, size) in kinds.items()},
        "kinds": {
            kind: {"launches": count, "gb": size / 1e9} for kind, (count, size) in kinds.items()
        },
        "matmul_tflop": math.fsum(f.times * f.flops for f in found) / 1e12,
        "collectives": [s._asdict() for s in hlo_traffic.sent(module, rank, mesh)],
        "largest": [_described(f) for f in sorted(small, key=lambda f: -f.bytes)[:30]],
    }


def _described(launch: hlo_traffic.Launch) -> dict[str, Any]:
    return {
        "name": launch.name,
        "kind": launch.kind,
        "times": launch.times,
        "gb": launch.bytes / 1e9,
        "read_mb": launch.read / 1e6,
        "written_mb": launch.written / 1e6,
        "shape": launch.shape,
        "op_name": launch.op_name,
    }
