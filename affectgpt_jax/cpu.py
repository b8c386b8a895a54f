"""What pays on a CPU alone: kept memory, and two parts of a decode step.

Models do not know of it. Commands call `keep_freed_memory`, and `build.model` puts what
`decoding` returns into the `ComputeConfig`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp

from affectgpt_jax import runtime
from affectgpt_jax.models import attention

# glibc's numbers of the settings of `mallopt(3)`.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """On a CPU, have malloc keep freed memory for the next step instead of giving it back.

    XLA allocates the temporaries of a program in one block at every call. By default glibc maps
    such a block anew each time, and the kernel clears it page by page: a quarter of a training
    step. The end of the heap is never given back either, however large (a threshold of -1). The
    price is that the process keeps the most that it ever held, and, as threads allocate between the
    blocks, up to a few blocks more. Call it in a process of its own, before JAX starts its threads,
    which otherwise bring heaps of their own that cannot grow to such a size.

    Returns:
        False, and nothing is done, where there may be an accelerator, whose host works for many
        threads on many cores and holds no temporaries, and where libc is not glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if _may_have_accelerator() or not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    return all([libc.mallopt(name, value) for name, value in settings])


def _may_have_accelerator() -> bool:
    """Whether JAX could find one, told without starting it."""
    if platforms := jax.config.jax_platforms:
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    found = bool(plugins) or importlib.util.find_spec("libtpu") is not None
    return found and not runtime.has_gpu_compiler_alone()


def decoding() -> dict[str, Any]:
    """Fields of `ComputeConfig` for decode steps on one CPU device; none elsewhere."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return {}
    return {"attend_cached": attend_by_row, "logits": logits_by_word}


def attend_by_row(
    query: jax.Array, key_cache: jax.Array, value_cache: jax.Array, key_mask: jax.Array
) -> jax.Array:
    """`attention.cached`, one row after another.

    XLA's CPU backend copies what a matmul reads out of the cache. The copy of one row is still in a
    core's cache when the matmul reads it.
    """

    def attend(row: tuple[jax.Array, ...]) -> jax.Array:
        return attention.cached(*(x[None] for x in row))[0]

    return jax.lax.map(attend, (query, key_cache, value_cache, key_mask))


def logits_by_word(states: jax.Array, lm_head: jax.Array) -> jax.Array:
    """`decoder.float32_logits` as a matmul of `[V, D]` and `[D, B]`, then transposed.

    XLA's CPU backend is a third slower where the right operand is transposed, as a tied `lm_head`
    is. The barrier keeps it from swapping the operands back.
    """
    logits = jnp.einsum("dv,bd->vb", lm_head, states, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(logits).T
