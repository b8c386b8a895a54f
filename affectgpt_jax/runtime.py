"""How a process is set up before JAX starts its devices: where compiled programs are kept."""

from __future__ import annotations

import os
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
