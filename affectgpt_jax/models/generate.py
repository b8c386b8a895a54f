"""Answers with a key-value cache: greedy or sampled, whole or a few tokens at a time.

    state = prefill(model, base, trainable, batch, decoding, room)   # prompts in, first token out
    state = decode(model, base, trainable, state, decoding, steps)   # up to `steps` tokens more
    state = grow(state, decoding, room)                              # where they stand in the way

are three compiled functions of static shapes; the device runs through `steps` tokens without the
host. `stream` drives them, `generate` runs them to the end.

A row's answer depends on its own prompt, seed and identity only, not on the batch that it stands
in, nor on the order or the padding of that batch. (Up to rounding: programs of other shapes may add
in another order, which tells where two tokens are as good as equally probable.)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from affectgpt_jax.models.affectgpt import (
    AffectGPT,
    Batch,
    hidden_states,
    target_states,
    token_log_probs,
    with_execution,
)
from affectgpt_jax.models.qwen2 import DecodeStep, KVCache, unembedding

# New tokens that the cache has slots for at first, and the factor by which it grows when they are
# used up. A list of labels has a dozen tokens, a description hundreds, and every token reads the
# whole cache, used or not; each size costs one compilation.
FIRST_ROOM = 64
GROWTH = 4


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen, in this order, as Hugging Face's logits processors do it.

    Attributes:
        repetition_penalty: logits of tokens that stand in the prompt or the answer are divided by
            it where positive and multiplied where negative (Keskar et al. 2019).
        temperature: divides the logits; 0 takes the most probable token.
        top_p: draws from the smallest set of most probable tokens whose probabilities sum to this
            or more (Holtzman et al. 2020).

    Raises:
        ValueError: a value out of its range, or a `top_p` that temperature 0 would not look at.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected 0 or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a share in (0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; expected a positive number"
            )
        if self.top_p < 1 and not self.temperature:
            raise ValueError(
                f"top_p is {self.top_p}, but temperature 0 takes the most probable token whatever "
                "top_p says; give a temperature, e.g. 1"
            )


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is fixed when a decoder is compiled.

    Attributes:
        max_new_tokens: an answer is cut off there.
        stop_ids: a row ends with the first of these that it writes.
        pad_id: stands after a row's end.
        sampling: how tokens are chosen.
        log_probs: whether the probability of every token is kept.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: Sampling = GREEDY
    log_probs: bool = False


class Generated(NamedTuple):
    """What a batch of B rows has written.

    Attributes:
        tokens: `[B, N]` int32, `pad_id` from a row's end on.
        counts: `[B]` int32, tokens that each row has written, its stop id included.
        ended: `[B]` bool, whether it has written a stop id.
        log_probs: `[B, N]` float32, of each token under the model's own distribution, which
            sampling options do not change; 0 from a row's end on. None unless asked for.
    """

    tokens: jax.Array
    counts: jax.Array
    ended: jax.Array
    log_probs: jax.Array | None


class DecodeState(NamedTuple):
    """Where decoding stands, between two calls.

    Attributes:
        generated: what is written; N is the room for new tokens.
        step: int32 scalar, tokens that rows which go on have written.
        lengths: `[B]` int32, tokens of each prompt; 0 for a filler row, which writes nothing.
        cache: of T + N - 1 slots: the last token is never fed.
        seen: `[B, V]` bool, tokens to penalise; None without a penalty.
        keys: `[B]` random keys; None at temperature 0.
    """

    generated: Generated
    step: jax.Array
    lengths: jax.Array
    cache: KVCache
    seen: jax.Array | None
    keys: jax.Array | None

    @property
    def done(self) -> jax.Array:
        """`[B]` bool, rows that write no more."""
        return self.generated.ended | (self.lengths == 0)


# --- from logits to a token ---------------------------------------------------------------------


def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Lower the logits `[B, V]` of the tokens that `seen` `[B, V]` marks, for a penalty over 1."""
    lowered = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, lowered, logits)


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """The logits `[B, V]` float32 of the most probable tokens, -inf for all others.

    A token goes if it and those less probable sum to at most `1 - top_p`; the most probable one
    stays. Equally probable tokens stay or go together.

    The least probability that stays is found by bisection over the bit patterns of floats from 0 to
    1, which are ordered as they are: 30 sums, exact, and for a vocabulary of 152,064 on a CPU ten
    times faster than sorting it. Where the vocabulary is split over devices, nothing moves.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # [B, 1]; `high` stays
        middle = low + (high - low) // 2
        tail = jnp.where(bits <= middle, probs, 0).sum(axis=-1, keepdims=True)
        stays = tail > 1 - top_p
        return jnp.where(stays, low, middle + 1), jnp.where(stays, middle, high)

    high = bits.max(axis=-1, keepdims=True)
    _, high = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(high), high))
    return jnp.where(bits >= high, logits, -jnp.inf)


def adjust_logits(logits: jax.Array, sampling: Sampling, seen: jax.Array | None) -> jax.Array:
    """What tokens are chosen from: logits `[B, V]` float32 after penalty, temperature and top-p.

    `seen`, `[B, V]` bool, is read where there is a penalty.
    """
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature:
        logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return logits


def choose_tokens(logits: jax.Array, keys: jax.Array | None, position: jax.Array) -> jax.Array:
    """The next token of every row, `[B]` int32, from adjusted logits `[B, V]`.

    Drawn with the rows' keys `[B]` and the number of tokens before this one, an int32 scalar; the
    most probable one where there are no keys.
    """
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def identities(names: Sequence[str]) -> np.ndarray:
    """What stands for rows of these names in random keys: `[B, 2]` uint32.

    Drawn from the name, so that a row's samples are its own in any batch, at any place.
    """
    digests = [hashlib.sha256(name.encode("utf-8")).digest()[:8] for name in names]
    return np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2)


def _row_keys(seed: jax.Array, rows: jax.Array) -> jax.Array:
    # Named, since a batch changes what rbg, which a user may have made the default, draws in a row.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row[0]), row[1]))(rows)


# --- compiled parts -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "decoding", "room"))
def prefill(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    batch: Batch,
    decoding: Decoding,
    room: int,
    seed: jax.Array | int = 0,
    rows: jax.Array | None = None,
) -> DecodeState:
    """Run the prompts and write the first token of every answer.

    Args:
        model: the modules.
        base: frozen weights.
        trainable: adapters and fusion.
        batch: prompts, right-padded, one sample a row; targets are not read.
        decoding: how to write.
        room: N, new tokens that the state has slots for.
        seed: uint32, of sampling.
        rows: `[B, 2]` uint32, `identities` of the rows; needed with a temperature.

    Raises:
        ValueError: a temperature without `rows`.
    """
    # Layers in a row gain only where there is a backward pass; a token takes 1.2 times as long.
    model, sampling = with_execution(model, unroll=False), decoding.sampling
    if sampling.temperature and rows is None:
        raise ValueError("sampling needs the identities of the rows, which its keys derive from")
    size = len(batch["tokens"])
    lengths = (batch["segment_ids"] > 0).sum(axis=1, dtype=jnp.int32)
    states, cache = hidden_states(model, base, trainable, batch, keep_cache=True)
    slots = [(0, 0), (0, 0), (0, 0), (0, room - 1), (0, 0)]
    state = DecodeState(
        generated=Generated(
            tokens=jnp.full((size, room), decoding.pad_id, jnp.int32),
            counts=jnp.zeros(size, jnp.int32),
            ended=jnp.zeros(size, bool),
            log_probs=jnp.zeros((size, room), jnp.float32) if decoding.log_probs else None,
        ),
        step=jnp.int32(0),
        lengths=lengths,
        cache=KVCache(*(jnp.pad(x, slots) for x in cache)),
        seen=_prompt_tokens(model, batch) if sampling.repetition_penalty != 1 else None,
        keys=_row_keys(seed, rows) if sampling.temperature else None,
    )
    # A filler row has no last token; position 0 stands in, and nobody reads what follows.
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return _write(state, jnp.take_along_axis(states, last, axis=1)[:, 0], base, decoding)


@functools.partial(jax.jit, static_argnames=("model", "decoding"), donate_argnames="state")
def decode(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    state: DecodeState,
    decoding: Decoding,
    steps: jax.Array | int,
) -> DecodeState:
    """Write up to `steps` tokens more to every answer that has not ended.

    Stops where all have ended, or the state's room is used up. The state that comes in is consumed.
    """
    model = with_execution(model, unroll=False)  # as in `prefill`
    room = state.generated.tokens.shape[1]
    slots = jnp.arange(state.cache.key.shape[3])
    length = len(slots) - (room - 1)  # of the prompts' rows
    in_prompt = slots < state.lengths[:, None]
    end = jnp.minimum(state.step + steps, room)

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < end) & ~state.done.all()

    def write(state: DecodeState) -> DecodeState:
        """Feed token i - 1 and write token i."""
        fed = state.step - 1
        # All rows share a slot, whatever their prompt's length; the rotary position continues each
        # row's own count, and the gap between stays masked.
        slot = length + fed
        mask = in_prompt | ((slots >= length) & (slots <= slot))
        token = jax.lax.dynamic_slice_in_dim(state.generated.tokens, fed, 1, axis=1)
        states, cache = model.qwen2.apply(
            {"params": base, "lora": trainable["lora"]},
            model.qwen2.apply({"params": base}, token, method="embed"),
            (state.lengths + fed)[:, None],
            cache=state.cache,
            step=DecodeStep(slot, mask),
        )
        return _write(state._replace(cache=cache), states[:, 0], base, decoding)

    return jax.lax.while_loop(unfinished, write, state)


@functools.partial(jax.jit, static_argnames=("decoding", "room"))
def grow(state: DecodeState, decoding: Decoding, room: int) -> DecodeState:
    """The same state with room for more new tokens."""
    generated = state.generated
    more = room - generated.tokens.shape[1]
    columns, slots = [(0, 0), (0, more)], [(0, 0), (0, 0), (0, 0), (0, more), (0, 0)]
    log_probs = generated.log_probs
    return state._replace(
        generated=generated._replace(
            tokens=jnp.pad(generated.tokens, columns, constant_values=decoding.pad_id),
            log_probs=None if log_probs is None else jnp.pad(log_probs, columns),
        ),
        cache=KVCache(*(jnp.pad(x, slots) for x in state.cache)),
    )


def _write(state: DecodeState, states: jax.Array, base: Any, decoding: Decoding) -> DecodeState:
    """Choose and write token `state.step` of every row from its hidden state `[B, D]`."""
    vocabulary = unembedding(base).astype(states.dtype)
    logits = jnp.einsum("bd,dv->bv", states, vocabulary, preferred_element_type=jnp.float32)
    adjusted = adjust_logits(logits, decoding.sampling, state.seen)
    token = choose_tokens(adjusted, state.keys, state.step)
    done, generated, seen = state.done, state.generated, state.seen
    log_probs = generated.log_probs
    if log_probs is not None:
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        value = jnp.where(done, 0, chosen - jax.nn.logsumexp(logits, axis=-1))
        log_probs = log_probs.at[:, state.step].set(value)
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    token = jnp.where(done, decoding.pad_id, token)
    stops = jnp.isin(token, jnp.asarray(decoding.stop_ids, jnp.int32))
    return state._replace(
        generated=Generated(
            tokens=generated.tokens.at[:, state.step].set(token),
            counts=generated.counts + ~done,
            ended=generated.ended | (stops & ~done),
            log_probs=log_probs,
        ),
        step=state.step + 1,
        seen=seen,
    )


def _prompt_tokens(model: AffectGPT, batch: Batch) -> jax.Array:
    """Which tokens a prompt holds, `[B, V]` bool; soft tokens are none."""
    size = model.qwen2.config.vocab_size
    text = (batch["segment_ids"] > 0) & (batch["soft_index"] == 0)
    ids = jnp.where(text, batch["tokens"], size)
    at = jnp.arange(len(ids))[:, None]
    return jnp.zeros((len(ids), size), bool).at[at, ids].set(True, mode="drop")


# --- whole answers ------------------------------------------------------------------------------


def stream(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    batch: Batch,
    decoding: Decoding,
    *,
    seed: int = 0,
    rows: Any = None,
    every: int = 1,
) -> Iterator[Generated]:
    """Write answers and show them as they come.

    Args:
        model, base, trainable, batch, decoding, rows: as for `prefill`.
        seed: of sampling, 0 to 2^32 - 1.
        every: tokens between two items, after which the host is waited for.

    Yields:
        NumPy arrays of what is written so far: the first token, then up to `every` more each time,
        until every row has ended or has `max_new_tokens`. N grows, up to `max_new_tokens`.
    """
    room, limit = min(FIRST_ROOM, decoding.max_new_tokens), decoding.max_new_tokens
    state = prefill(model, base, trainable, batch, decoding, room, np.uint32(seed), rows)
    while True:
        generated, step, done = jax.tree.map(_on_host, (state.generated, state.step, state.done))
        yield generated
        if step == limit or done.all():
            return
        if step == room:
            room = min(GROWTH * room, limit)
            state = grow(state, decoding, room)
        state = decode(model, base, trainable, state, decoding, every)


def _on_host(array: jax.Array) -> np.ndarray:
    """A copy, since the array itself is consumed by the next call; of all processes' rows."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.array(array)


def generate(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    batch: Batch,
    decoding: Decoding,
    *,
    seed: int = 0,
    rows: Any = None,
) -> Generated:
    """Write whole answers, as NumPy arrays; arguments as for `stream`."""
    settings = {"seed": seed, "rows": rows, "every": decoding.max_new_tokens}
    *_, generated = stream(model, base, trainable, batch, decoding, **settings)
    return generated


def score_answers(
    model: AffectGPT, base: Any, trainable: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """How probable the model finds given answers.

    Args:
        model: the modules.
        base: frozen weights.
        trainable: adapters and fusion.
        batch: prompts with answers, one sample a row, as for training.

    Returns:
        Of every row the sum of the log-probabilities of its supervised tokens, end marks included,
        and their number; `[B]` float32 each, 0 for a filler row.
    """
    states = target_states(model, base, trainable, batch)
    weights = batch["target_weights"].astype(jnp.float32)
    log_probs = token_log_probs(states, unembedding(base), batch["targets"])
    return (log_probs * weights).sum(axis=1), weights.sum(axis=1)
