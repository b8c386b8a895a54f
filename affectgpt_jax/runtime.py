"""How a process runs JAX: plugins, where compiled programs are kept, and what is said while it
compiles."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from affectgpt_jax.common.progress import Elapsed

_CACHE_HIT = "/jax/compilation_cache/cache_hits"

# JAX takes their presence for that of a GPU as well.
_NVIDIA_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
_CUDA_PLUGINS = {"jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"}
# A list of collectives for which XLA of jax 0.12 takes kernels of its own. It ends the process
# where it compiles one for a small all-reduce over 64 H100s; with an empty list, NCCL does them.
_OWN_COLLECTIVES = "xla_gpu_experimental_use_collective_kernels"


def has_gpu_compiler_alone() -> bool:
    """Whether JAX's CUDA plugin is here for what it compiles, as the extra `gpu-compile` brings it.

    That is: no NVIDIA GPU, and no plugin for anything else. Told without starting JAX.
    """
    plugins = _plugins()
    return (
        bool(plugins)
        and plugins <= _CUDA_PLUGINS
        and importlib.util.find_spec("libtpu") is None
        and not any(map(os.path.exists, _NVIDIA_FILES))
    )


def prepare_plugins() -> None:
    """Where `has_gpu_compiler_alone`, hide the plugin from JAX, unless it has loaded it already;
    elsewhere `leave_collectives_to_nccl`.

    JAX would use the CPU anyway, but would load 480 MB of compiler, look for CUDA's libraries and
    print what it misses. To be called before the first use of a device.
    """
    if not has_gpu_compiler_alone():
        leave_collectives_to_nccl()
        return
    for name in _plugins() - sys.modules.keys():
        plugin = importlib.util.module_from_spec(importlib.util.find_spec(name))
        plugin.initialize = lambda: None  # by which JAX has a plugin register itself
        sys.modules[name] = plugin


def leave_collectives_to_nccl() -> None:
    """On CUDA devices, keep XLA of jax 0.12 from its own kernels of collectives, unless `XLA_FLAGS`
    says which.

    In the environment, since any program on several GPUs may have a small all-reduce. A version of
    XLA that does not know the flag would end the process.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    known = jax.__version_info__[:2] == (0, 12)
    if known and _plugins() & _CUDA_PLUGINS and _OWN_COLLECTIVES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_OWN_COLLECTIVES}=".lstrip()


def _plugins() -> set[str]:
    return {entry.value for entry in importlib.metadata.entry_points(group="jax_plugins")}


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, unless JAX has been told otherwise.

    JAX's own settings come first: `JAX_COMPILATION_CACHE_DIR` names another directory, and
    `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. A home that cannot be written to costs a
    warning of JAX's for each program, and no more.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory()))


def cache_directory() -> Path:
    """`affectgpt_jax/xla` under `XDG_CACHE_HOME`, by default `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    root = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return root / "affectgpt_jax" / "xla"


@contextlib.contextmanager
def compiling(what: str, **options: Any) -> Iterator[None]:
    """Around a compilation, which says nothing itself: the time that it takes, and what of it the
    cache of compiled programs had.

    Args:
        what: is compiled, such as "2 programs".
        options: of `LiveLine`.
    """
    hits = 0

    def count(event: str, **_: Any) -> None:
        nonlocal hits
        hits += event == _CACHE_HIT

    directory = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
    jax.monitoring.register_event_listener(count)
    try:
        with Elapsed(f"compiling {what}", **options) as elapsed:
            yield
            elapsed.note = (
                f"{hits} from the cache in {directory}"
                if directory
                else "nothing is kept, since JAX's compilation cache is off"
            )
    finally:
        jax.monitoring.unregister_event_listener(count)
