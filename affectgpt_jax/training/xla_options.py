"""XLA options for the train step.

They are passed to the compiler with the program, not through the environment: so they hold for the
train step alone and can depend on the devices, and an option that this version of XLA does not know
is an error that can be caught, where an unknown name in `XLA_FLAGS` ends the process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.models.lora import SEPARATE_MATMULS

Value = str | bool


class XlaOptionError(UserError, ValueError):
    """Compiler options that cannot be used."""


class Option(NamedTuple):
    """A setting that differs from XLA's default, and why.

    Attributes:
        name: of the option, as in `XLA_FLAGS` without dashes.
        value: as `parse` reads it.
        devices: the fewest GPUs for which it is worth setting.
        reason: what it is for and what is known of its effect.
    """

    name: str
    value: Value
    devices: int
    reason: str


# An entry needs a measurement, what the compiler says of the program (`plan --compile`), or the
# advice of JAX's own guide for this case (docs.jax.dev/en/latest/gpu_performance_tips.html).
GPU_OPTIONS = (
    Option(
        *SEPARATE_MATMULS,
        1,
        "keeps XLA from joining a frozen kernel and its adapter's A in one matmul, which copies "
        "the kernel before and the result behind it: 65 GB of the 511 that a step of 2 x 4,096 "
        "tokens moves on an H100, compiled, not run",
    ),
    Option(
        "xla_gpu_enable_latency_hiding_scheduler",
        True,
        2,
        "moves the gradients' all-reduce beside computation; recommended by JAX's guide for more "
        "than one GPU, not measured here",
    ),
)

CPU_OPTIONS = (
    Option(
        "xla_disable_hlo_passes",
        "cse_barrier_expander",
        1,
        "keeps XLA from merging what a rematerialisation policy computes again with the first time "
        "that it is computed, which on CPUs would save no memory",
    ),
)

# JAX reserves 75 % of a GPU by default, and nothing beyond can be used. What it does not manage
# (cuBLAS, cuDNN and NCCL workspaces, the CUDA context) fits a tenth; NVIDIA's guide takes 0.9.
_MEMORY_FRACTION = "0.9"
_MEMORY_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


def reserve_gpu_memory() -> None:
    """Let JAX use 90 % of a GPU's memory, unless the environment says anything of it.

    To be called before the first use of a device; without a GPU nobody reads it.
    """
    if not any(name in os.environ for name in _MEMORY_VARIABLES):
        os.environ[_MEMORY_VARIABLES[0]] = _MEMORY_FRACTION


def describe_gpu_memory(platform: str, limit: int | None, environ: Mapping[str, str]) -> str:
    """What JAX does with a GPU's memory, in a line for people; "" where there is no GPU.

    Args:
        platform: `jax.default_backend()`.
        limit: bytes of one GPU that JAX may use, `memory.device_limit()`.
        environ: the process's environment, after `reserve_gpu_memory`.
    """
    if platform != "gpu" or limit is None:
        return ""
    size, switch = f"{limit / 2**30:.1f} GiB", "XLA_PYTHON_CLIENT_PREALLOCATE"
    if environ.get(switch, "true") in ("false", "False", "0"):
        return (
            f"GPU memory: taken as it is needed, up to {size} a GPU ({switch} is set), which may "
            "fragment it"
        )
    return (
        f"GPU memory: JAX reserves {size} of each GPU now, and nvidia-smi shows all of it in use; "
        f"XLA_CLIENT_MEM_FRACTION is the share, {switch}=false takes memory as it is needed"
    )


def parse(text: str) -> dict[str, Value]:
    """Options of "NAME=VALUE NAME=VALUE"; "" is none. "true" and "false" are booleans.

    Raises:
        XlaOptionError: not of that form, or a name twice.
    """
    options: dict[str, Value] = {}
    for part in text.split():
        match = re.fullmatch(r"(?:--)?(xla_\w+)=(.*)", part)
        if not match:
            raise XlaOptionError(
                f"{part!r} is not NAME=VALUE with the name of an XLA option, as in "
                "xla_gpu_autotune_level=2"
            )
        if match[1] in options:
            raise XlaOptionError(f"{match[1]} is named twice")
        options[match[1]] = {"true": True, "false": False}.get(match[2].lower(), match[2])
    return options


def compiler_options(
    platform: str,
    device_count: int,
    asked: Mapping[str, Value],
    xla_flags: str,
    refusal: Callable[[str, Value], str],
    recomputing: bool = False,
) -> tuple[dict[str, Value], list[str]]:
    """What to compile a train step with.

    Args:
        platform: "cuda", which has `GPU_OPTIONS`, "cpu", which has `CPU_OPTIONS`, or another.
        device_count: devices of the run.
        asked: options that the user asked for; they come first.
        xla_flags: the environment's `XLA_FLAGS`, of which nothing is overruled.
        refusal: `(name, value) -> ""`, or why this version of XLA refuses it: `refusal_by_xla`.
        recomputing: whether a rematerialisation policy is asked for; `CPU_OPTIONS` are for that.

    Returns:
        Options, and a line about each for the user to read.

    Raises:
        XlaOptionError: an option of `asked` that XLA refuses, or that `xla_flags` also sets.
    """
    set_outside = set(re.findall(r"--(xla_\w+)", xla_flags))
    options, lines = {}, []
    for name, value in asked.items():
        if name in set_outside:
            raise XlaOptionError(f"{name} is also set in XLA_FLAGS; set it in one place")
        if refused := refusal(name, value):
            raise XlaOptionError(f"XLA refuses {name}={value}: {refused}")
        options[name] = value
        lines.append(f"{name}={value}: as asked for")
    defaults = {"cuda": GPU_OPTIONS, "cpu": CPU_OPTIONS if recomputing else ()}
    for option in defaults.get(platform, ()):
        if device_count < option.devices or option.name in options or option.name in set_outside:
            continue
        if refused := refusal(option.name, option.value):
            lines.append(f"{option.name} left out: XLA refuses it ({refused})")
            continue
        options[option.name] = option.value
        lines.append(f"{option.name}={option.value}: {option.reason}")
    return options, lines


def refusal_by_xla(name: str, value: Value) -> str:
    """Why the installed XLA does not take an option; empty if it does."""
    try:
        jax.jit(lambda x: x).lower(0).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return ""
