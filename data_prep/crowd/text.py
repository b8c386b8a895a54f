"""A vector for each subtitle: what the project's own base makes of its words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from affectgpt_jax.common.identity import Identity
from affectgpt_jax.data.tokenizer import Tokenizer
from affectgpt_jax.models.affectgpt import AffectGPT, hidden_states, init_random_base
from affectgpt_jax.models.decoder import ComputeConfig, Decoder
from affectgpt_jax.weights.huggingface import base_identity, load_base, read_config

ROWS = 64  # texts at a time
SHORTEST = 16  # tokens; longer texts are padded to the next power of two


class TextEncoder:
    """Mean of a base's last hidden states over the tokens of a text.

    Args:
        directory: a model in Hugging Face layout.

    Attributes:
        width: of a vector.
        identity: of the base.

    Raises:
        WeightsError, TokenizerError: a directory that is no such model.
    """

    def __init__(self, directory: Path):
        config = read_config(directory)
        self.width, self.identity = config.hidden_size, _identity(directory)
        self._tokenizer = Tokenizer(directory)
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        model = AffectGPT(Decoder(config, compute=ComputeConfig(dtype, dtype)), None)
        shapes = jax.eval_shape(lambda key: init_random_base(model, key), jax.random.key(0))
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        self._base = load_base(directory, shapes, jax.tree.map(lambda _: one, shapes))
        self._encode = jax.jit(functools.partial(_mean_states, model))

    def __call__(
        self, texts: Sequence[str], progress: Callable[[int, int], None] = lambda *_: None
    ) -> np.ndarray:
        """float16 `[N, width]`; zeros for an empty text. The same text is read once."""
        unique = sorted({text for text in texts if text.strip()})
        tokens = self._tokenizer.encode(unique)
        lengths = [max(SHORTEST, 1 << (len(ids) - 1).bit_length()) for ids in tokens]
        vectors = {}
        for length in sorted(set(lengths)):
            mine = [i for i, own in enumerate(lengths) if own == length]
            for start in range(0, len(mine), ROWS):
                part = mine[start : start + ROWS]
                rows = np.zeros((ROWS, length), np.int32)
                there = np.zeros((ROWS, length), np.int32)
                for row, i in enumerate(part):
                    rows[row, : len(tokens[i])], there[row, : len(tokens[i])] = tokens[i], 1
                found = np.asarray(self._encode(self._base, rows, there)).astype(np.float16)
                vectors |= {unique[i]: found[row] for row, i in enumerate(part)}
                progress(len(vectors), len(unique))
        nothing = np.zeros(self.width, np.float16)
        return np.stack([vectors.get(text, nothing) for text in texts])


@functools.cache
def _identity(directory: Path) -> Identity:
    return base_identity(directory)


def _mean_states(model: AffectGPT, base, tokens: jax.Array, there: jax.Array) -> jax.Array:
    """float32 `[B, D]` of token ids `[B, T]`; `there` is 0 for padding."""
    batch = {
        "tokens": tokens,
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        "segment_ids": there,
    }
    states, _ = hidden_states(model, base, {"lora": {}, "fusion": {}}, batch)
    total = jnp.einsum("btd,bt->bd", states.astype(jnp.float32), there.astype(jnp.float32))
    return total / there.sum(axis=1, keepdims=True).clip(1)
