"""How a process is set up before JAX starts its devices: compiled programs and freed memory."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import jax


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


# glibc's numbers of the settings of `mallopt(3)`.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """On a CPU, have malloc keep freed memory for the next step instead of giving it back.

    XLA allocates the temporaries of a program in one block at every call. By default glibc maps
    such a block anew each time, and the kernel clears it page by page: a sixth of a training step.
    The end of the heap is never given back either, however large (a threshold of -1).
    The price is that the process keeps the most that it ever held, and, as threads allocate between
    the blocks, up to a few blocks more. For a process of one's own, before JAX starts its threads,
    which otherwise bring heaps of their own that cannot grow to such a size.

    Returns:
        Whether it was done: not where there may be an accelerator, whose host works for many
        threads on many cores and holds no temporaries, nor without glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if _may_have_accelerator() or not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    return all([libc.mallopt(name, value) for name, value in settings])


def out_of_memory(error: Exception) -> bool:
    """Whether an error of XLA's says that a device has no memory left.

    It has no type of its own: a `jax.errors.JaxRuntimeError` whose text names the status.
    """
    return "RESOURCE_EXHAUSTED" in str(error)


def _may_have_accelerator() -> bool:
    """Whether JAX could find one, told without starting it."""
    if platforms := jax.config.jax_platforms:
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
