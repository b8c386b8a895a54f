"""Answers with a key-value cache: greedy or sampled, whole or a few tokens at a time.

    fresh = prefill(model, base, trainable, batch, decoding)         # prompts in, first token out
    state = init_decode_state(fresh, size, decoding)                 # rows, and room for answers
    state = insert(model, state, fresh, decoding, rows)              # which go into some rows
    state = decode(model, base, trainable, state, decoding, steps)   # up to `steps` tokens more
    state = resize(model, state, slots)                              # a longer or shorter cache

are of static shapes and, but for `init_decode_state`, compiled; the device runs through `steps`
tokens without the host, and every token reads the whole cache. `stream` drives them for one batch.
`generate_all` does for a data set, in which a row whose answer has ended takes the next prompt
while the others go on (continuous batching, Yu et al. 2022, "Orca"): no row waits for the longest
answer.

Several answers to one prompt share its prefill: where there are G times as many identities as
prompts, `prefill` returns P caches and the beginnings of P * G answers, those of a prompt side by
side, and `insert` copies each cache into G rows. So do prompts with the same beginning, such as Q
questions about one clip: they stand in one row (`attention.grouped`), in which each sees the
beginning and itself, and `prefill` returns a cache for each.

A row's answer depends on its own prompt, seed and identity only, not on the batch that it stands
in, nor on the order or the padding of that batch. (Up to rounding: programs of other shapes may add
in another order, which tells where two tokens are as good as equally probable.)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from affectgpt_jax.models import attention
from affectgpt_jax.models.affectgpt import (
    AffectGPT,
    Batch,
    hidden_states,
    with_compute,
)
from affectgpt_jax.models.decoder import DecodeStep, KVCache, lm_head
from affectgpt_jax.models.lora import SEPARATE_MATMULS

# Slots of the cache at the least; when they are used up, twice as many. A list of labels has a
# dozen tokens, a description hundreds, and a GPU reads slots whether they are used or not. (The
# first slots of a longer cache cannot be read where they are: XLA would copy them out of it for
# every token.) Each number of slots costs one compilation.
KV_BUCKET = 256

# Rows that take their next prompts together are one in so many: more wait longer for the slowest of
# them, fewer make narrower products of prompts.
PREFILL_BATCHES = 8

_COMPILER_OPTIONS = dict([SEPARATE_MATMULS])

# Named, since a batch changes what rbg, which a user may have made the default, draws in a row.
GENERATOR = "threefry2x32"


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
    """What B rows have written.

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

    def row(self, number: int) -> Generated:
        """What one row has written: the same without the axis B."""
        return jax.tree.map(lambda x: x[number], self)


class DecodeState(NamedTuple):
    """Where decoding stands, between two calls.

    Attributes:
        generated: what is written; N is the room for new tokens.
        lengths: `[B]` int32, tokens of each prompt; 0 for a row without one, which writes nothing.
        limits: `[B]` int32, tokens that each row may write.
        cache: of every layer, of at most T + N - 1 slots: the last token is never fed. A row's
            tokens lie side by side, each in the slot of its position.
        seen: `[B, V]` bool, tokens to penalise; None without a penalty.
        keys: `[B, 2]` uint32, the data of random keys; None at temperature 0.
    """

    generated: Generated
    lengths: jax.Array
    limits: jax.Array
    cache: tuple[KVCache, ...]
    seen: jax.Array | None
    keys: jax.Array | None

    @property
    def done(self) -> jax.Array:
        """`[B]` bool, rows that write no more."""
        written = self.generated.counts >= self.limits
        return self.generated.ended | written | (self.lengths == 0)

    @property
    def slots(self) -> int:
        """Of the cache."""
        return self.cache[0].key.shape[2]


class Prompts(NamedTuple):
    """Prompts that go into rows together.

    Attributes:
        numbers: of the answers, by which they are known; `[n * Q * G]`, for the first n of P rows.
        batch: P rows of prompts, right-padded; targets are not read. A row is one prompt, or
            several with the same beginning, laid out by `attention.grouped_row`.
        rows: `[P * Q * G, 2]` uint32, `identities` of the answers; needed with a temperature. Of
            one prompt they stand side by side.
        limits: `[P * Q * G]` int32, tokens that each may have; None is `max_new_tokens`.
        questions: Q, prompts in a row.
    """

    numbers: np.ndarray
    batch: Batch
    rows: Any = None
    limits: Any = None
    questions: int = 1

    @property
    def answers(self) -> int:
        """Of all rows, in use or not: P * Q * G."""
        if self.rows is None:
            return len(self.batch["tokens"]) * self.questions
        return len(self.rows)


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

    Drawn with the rows' keys `[B, 2]` and the numbers of their tokens before this one, `[B]` int32;
    the most probable one where there are no keys.
    """
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys, impl=GENERATOR), position)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def identities(names: Sequence[str]) -> np.ndarray:
    """What stands for rows of these names in random keys: `[B, 2]` uint32.

    Drawn from the name, so that a row's samples are its own in any batch, at any place.
    """
    digests = [hashlib.sha256(name.encode("utf-8")).digest()[:8] for name in names]
    return np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2)


def _row_keys(seed: jax.Array, rows: jax.Array) -> jax.Array:
    key = jax.random.key(seed, impl=GENERATOR)
    fold = jax.random.fold_in
    return jax.vmap(lambda row: jax.random.key_data(fold(fold(key, row[0]), row[1])))(rows)


# --- compiled parts -----------------------------------------------------------------------------


@functools.partial(
    jax.jit,
    static_argnames=("model", "decoding", "questions"),
    compiler_options=_COMPILER_OPTIONS,
)
def prefill(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    batch: Batch,
    decoding: Decoding,
    seed: jax.Array | int = 0,
    rows: jax.Array | None = None,
    limits: jax.Array | None = None,
    questions: int = 1,
) -> DecodeState:
    """Run the prompts and write the first token of every answer, for which alone there is room.

    Args:
        model: the modules.
        base: frozen weights.
        trainable: adapters and fusion.
        batch, rows, limits, questions: see `Prompts`.
        decoding: how to write.
        seed: uint32, of sampling.

    Raises:
        ValueError: a temperature without `rows`.
    """
    sampling = decoding.sampling
    if sampling.temperature and rows is None:
        raise ValueError("sampling needs the identities of the rows, which its keys derive from")
    prompts = len(batch["tokens"]) * questions
    size = prompts if rows is None else len(rows)
    group = size // prompts
    visible = _tokens_of_prompts(batch["segment_ids"], questions)
    lengths = visible.sum(axis=2, dtype=jnp.int32)
    # A row without a prompt has no last token; position 0 stands in, and nobody reads what follows.
    last = jnp.maximum(lengths - 1, 0)
    if questions == 1:
        states, cache = hidden_states(model, base, trainable, batch, keep_cache=True)
    else:
        together = with_compute(model, attend=attention.grouped)
        states, cache = hidden_states(together, base, trainable, batch, keep_cache=True)
        places = jnp.argsort(~visible, axis=2, stable=True)
        cache = jax.tree.map(lambda x: _gathered(x, places), cache)
        last = jnp.take_along_axis(places, last[..., None], axis=2)[..., 0]
    states = jnp.take_along_axis(states, last[..., None], axis=1).reshape(prompts, -1)
    lengths, states = (_fanned_out(x, group) for x in (lengths.reshape(-1), states))
    state = DecodeState(
        generated=Generated(
            tokens=jnp.full((size, 1), decoding.pad_id, jnp.int32),
            counts=jnp.zeros(size, jnp.int32),
            ended=jnp.zeros(size, bool),
            log_probs=jnp.zeros((size, 1), jnp.float32) if decoding.log_probs else None,
        ),
        lengths=lengths,
        limits=jnp.full(size, decoding.max_new_tokens, jnp.int32) if limits is None else limits,
        cache=cache,
        seen=(
            _fanned_out(_words_of_prompts(model, batch, visible), group)
            if sampling.repetition_penalty != 1
            else None
        ),
        keys=_row_keys(seed, rows) if sampling.temperature else None,
    )
    return _laid_out(model, _write(model, state, states, base, decoding))


def _tokens_of_prompts(segment_ids: jax.Array, questions: int) -> jax.Array:
    """Which tokens of a row each of its prompts has, `[P, Q, T]` bool."""
    if questions == 1:
        return (segment_ids > 0)[:, None]
    first = attention.GROUP
    own = first + 1 + jnp.arange(questions, dtype=segment_ids.dtype)[:, None]
    return (segment_ids == first)[:, None] | (segment_ids[:, None] == own)


def _gathered(x: jax.Array, places: jax.Array) -> jax.Array:
    """The cache `[P * Q, K, T, d]` of every prompt, side by side, out of `[P, K, T, d]`; its tokens
    stand first of `places` `[P, Q, T]`."""
    found = jnp.take_along_axis(x[:, None], places[:, :, None, :, None], axis=3)
    return found.reshape(-1, *x.shape[1:])


def _fanned_out(x: jax.Array, group: int) -> jax.Array:
    """Every row `group` times, side by side."""
    return x if group == 1 else jnp.repeat(x, group, axis=0)


@functools.partial(
    jax.jit,
    static_argnames=("model", "decoding"),
    donate_argnames="state",
    compiler_options=_COMPILER_OPTIONS,
)
def decode(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    state: DecodeState,
    decoding: Decoding,
    steps: jax.Array | int,
    enough: jax.Array | int | None = None,
) -> DecodeState:
    """Write up to `steps` tokens more to every answer that is not complete.

    Stops where `enough` rows write no more (None: all of them), or where one of the others has used
    up the slots of its cache. The state that comes in is consumed.
    """
    slots = jnp.arange(state.slots)
    enough = len(state.lengths) if enough is None else enough

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        step, state = carry
        full = ~state.done & (state.lengths + state.generated.counts > len(slots))
        return (step < steps) & (state.done.sum() < enough) & ~full.any()

    def write(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        """Feed the last token of every answer and write the next one."""
        step, state = carry
        last = jnp.maximum(state.generated.counts - 1, 0)
        token = jnp.take_along_axis(state.generated.tokens, last[:, None], axis=1)
        # A row that is done reads one slot, and overwrites what is of no use any more.
        position = jnp.where(state.done, 0, state.lengths + last)
        states, cache = model.decoder.apply(
            {"params": base, "lora": trainable["lora"]},
            model.decoder.apply({"params": base}, token, method="embed"),
            position[:, None],
            cache=state.cache,
            step=DecodeStep(position, slots <= position[:, None]),
        )
        state = state._replace(cache=cache)
        return step + 1, _write(model, state, states[:, 0], base, decoding)

    return _laid_out(model, jax.lax.while_loop(unfinished, write, (jnp.int32(0), state))[1])


def init_decode_state(
    fresh: DecodeState, size: int, decoding: Decoding, slots: int | None = None
) -> DecodeState:
    """Rows without prompts, laid out over devices as those of `fresh` are.

    Args:
        fresh: as `prefill` returns it, of prompts that are no shorter than any other.
        size: B.
        decoding: how to write.
        slots: of the cache; None is room for whole answers, see `most_slots`.
    """

    def zeros(x: jax.Array, sizes: Mapping[int, int]) -> jax.Array:
        shape = [sizes.get(axis, size) for axis, size in enumerate(x.shape)]
        return jnp.zeros(shape, x.dtype, device=x.sharding)

    room = decoding.max_new_tokens
    rest = fresh._replace(generated=None, cache=None)
    slots = slots or most_slots(fresh, decoding)
    return jax.tree.map(lambda x: zeros(x, {0: size}), rest)._replace(
        generated=jax.tree.map(lambda x: zeros(x, {0: size, 1: room}), fresh.generated),
        cache=jax.tree.map(lambda x: zeros(x, {0: size, 2: slots}), fresh.cache),
    )


def most_slots(fresh: DecodeState, decoding: Decoding) -> int:
    """Slots that whole answers to prompts as long as those of `fresh` need."""
    return fresh.slots + decoding.max_new_tokens - 1


def resize(model: AffectGPT, state: DecodeState, slots: int) -> DecodeState:
    """The same state with a cache of so many slots, no fewer than its rows have used up; consumed.

    One layer after another, so that both caches never exist at the same time.
    """
    if slots == state.slots:
        return state
    cache = []
    for layer in state.cache:
        cache.append(_resized(model, layer, slots))
        jax.tree.map(lambda x: x.delete(), layer)
    return state._replace(cache=tuple(cache))


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def _resized(model: AffectGPT, cache: KVCache, slots: int) -> KVCache:
    added = [(0, 0), (0, 0), (0, max(0, slots - cache.key.shape[2])), (0, 0)]
    cache = jax.tree.map(lambda x: jnp.pad(x[:, :, :slots], added), cache)
    return _laid_out_cache(model, cache)


@functools.partial(jax.jit, static_argnames=("model", "decoding"), donate_argnames="state")
def insert(
    model: AffectGPT,
    state: DecodeState,
    fresh: DecodeState,
    decoding: Decoding,
    rows: jax.Array,
) -> DecodeState:
    """The same state with other prompts and the beginnings of their answers in some of its rows.

    Args:
        model: the modules.
        state: of B rows; consumed.
        fresh: P * G rows as `prefill` returns them, of prompts no longer than those that `state`
            was made for, or than its cache.
        decoding: how to write.
        rows: `[P * G]` int32, all different, where they go; nowhere, from row B on.
    """
    room = state.generated.tokens.shape[1]
    group = len(fresh.lengths) // len(fresh.cache[0].key)
    fresh = fresh._replace(generated=_with_room(fresh.generated, room, decoding.pad_id))

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
        return x.at[rows].set(new, mode="drop", unique_indices=True)

    def put_slots(x: jax.Array, new: jax.Array) -> jax.Array:
        # What a row's cache holds behind its prompt is written before it is read.
        new = _fanned_out(new, group)
        return x.at[rows, :, : new.shape[2]].set(new, mode="drop", unique_indices=True)

    cache = jax.tree.map(put_slots, state.cache, fresh.cache)
    placed = jax.tree.map(put, state._replace(cache=None), fresh._replace(cache=None))
    return _laid_out(model, placed._replace(cache=cache))


def _laid_out(model: AffectGPT, state: DecodeState) -> DecodeState:
    """The same state, its rows and key heads split over devices as those of activations are.

    Left to itself, the partitioner chooses for every program anew, and those that read the result
    are compiled for each choice.
    """
    shard = model.decoder.compute.shard
    rest = state._replace(cache=None)
    rest = jax.tree.map(lambda x: shard(x, ("batch",) + (None,) * (x.ndim - 1)), rest)
    return rest._replace(cache=_laid_out_cache(model, state.cache))


def _laid_out_cache(model: AffectGPT, cache: Any) -> Any:
    shard = model.decoder.compute.shard
    return jax.tree.map(lambda x: shard(x, ("batch", "heads", None, None)), cache)


def _with_room(generated: Generated, room: int, pad_id: int) -> Generated:
    columns = [(0, 0), (0, room - generated.tokens.shape[1])]
    log_probs = generated.log_probs
    return generated._replace(
        tokens=jnp.pad(generated.tokens, columns, constant_values=pad_id),
        log_probs=None if log_probs is None else jnp.pad(log_probs, columns),
    )


def _write(
    model: AffectGPT, state: DecodeState, states: jax.Array, base: Any, decoding: Decoding
) -> DecodeState:
    """Choose and write the next token of every row from its hidden state `[B, D]`."""
    logits = model.decoder.compute.logits(states, lm_head(base).astype(states.dtype))
    adjusted = adjust_logits(logits, decoding.sampling, state.seen)
    generated, done, seen = state.generated, state.done, state.seen
    token = choose_tokens(adjusted, state.keys, generated.counts)
    rows, room = jnp.arange(len(token)), generated.tokens.shape[1]
    # What a row that is done would write falls out of range.
    at = rows, jnp.where(done, room, generated.counts)
    log_probs = generated.log_probs
    if log_probs is not None:
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        value = chosen - jax.nn.logsumexp(logits, axis=-1)
        log_probs = log_probs.at[at].set(value, mode="drop")
    stops = jnp.isin(token, jnp.asarray(decoding.stop_ids, jnp.int32))
    return state._replace(
        generated=Generated(
            tokens=generated.tokens.at[at].set(token, mode="drop"),
            counts=generated.counts + ~done,
            ended=generated.ended | (stops & ~done),
            log_probs=log_probs,
        ),
        seen=None if seen is None else seen.at[rows, token].set(True),
    )


def _words_of_prompts(model: AffectGPT, batch: Batch, visible: jax.Array) -> jax.Array:
    """Which words each prompt holds, `[P * Q, V]` bool, by its tokens `[P, Q, T]`; soft tokens are
    none."""
    size = model.decoder.config.vocab_size
    text = visible & (batch["soft_token_index"] == 0)[:, None]
    ids = jnp.where(text, batch["tokens"][:, None], size).reshape(-1, text.shape[2])
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
        every: tokens between two items.

    Yields:
        NumPy arrays of what is written so far: the first token, then up to `every` more each time,
        until every row has ended or has `max_new_tokens`, which is N.
    """
    fresh = prefill(model, base, trainable, batch, decoding, np.uint32(seed), rows)
    size = len(fresh.lengths)
    most, needed = most_slots(fresh, decoding), fresh.slots
    state = init_decode_state(fresh, size, decoding, _kv_bucket(needed, most))
    state = insert(model, state, fresh, decoding, np.arange(size, dtype=np.int32))
    while True:
        # The device writes the next tokens while the host looks at these. So the host does not know
        # of the last ones yet, which may be `every` more.
        before = jax.tree.map(jnp.copy, state._replace(cache=()))
        state = resize(model, state, _kv_bucket(needed + 2 * every, most))
        state = decode(model, base, trainable, state, decoding, every)
        generated, done, needed = _progress(before)
        yield generated
        if done.all():
            return


def _progress(state: DecodeState) -> tuple[Generated, np.ndarray, int]:
    """What is written, which rows are done, and how many slots the next token of the others needs;
    on the host."""
    generated, lengths, done = jax.tree.map(_on_host, (state.generated, state.lengths, state.done))
    return generated, done, int((lengths + generated.counts)[~done].max(initial=0))


def _kv_bucket(needed: int, most: int) -> int:
    """The least number of slots, of those that `decode` is compiled for, that is enough."""
    kv_bucket = KV_BUCKET
    while kv_bucket < needed:
        kv_bucket *= 2
    return min(kv_bucket, most)


def _on_host(array: jax.Array) -> np.ndarray:
    """A copy, since the array itself is consumed by the next call; of all processes' rows."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.array(array)


def rows_and_prefill_batch(wanted: int, shares: int) -> tuple[int, int]:
    """Rows that write at a time, and how many of them take their next prompts together.

    Args:
        wanted: rows that the caller asked for; there may be a few more.
        shares: devices over which both numbers must divide.
    """
    prefill_batch = -(-wanted // (PREFILL_BATCHES * shares)) * shares
    return -(-wanted // prefill_batch) * prefill_batch, prefill_batch


def generate_all(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    prompts: Iterable[Prompts],
    decoding: Decoding,
    size: int,
    *,
    seed: int = 0,
) -> Iterator[tuple[int, Generated]]:
    """Answer all prompts, in rows that take the next ones as soon as their answers are complete.

    Args:
        model, base, trainable, decoding: as for `prefill`.
        prompts: P rows at a time with Q prompts of G answers each, all three being the same
            throughout. None may be longer than the first ones. They are asked for while the device
            is at work.
        size: rows that write at a time, P * Q * G or more; when so many of them are free, they are
            filled anew. `rows_and_prefill_batch` chooses both.
        seed: of sampling, 0 to 2^32 - 1.

    Yields:
        An answer's number and the answer, a row of NumPy arrays, when P * Q * G more are complete
        and the rows that they leave write the next ones.

    Raises:
        ValueError: a batch of more than `size` answers, or of longer prompts than the first.
    """
    owners = np.full(size, -1)  # whose answer each row writes
    limit = decoding.max_new_tokens
    longest, needed = 0, 0  # tokens of a prompt; slots, for the next token
    complete: list[tuple[int, Generated]] = []  # not told yet
    state, fresh, prompts = None, None, iter(prompts)
    upcoming = next(prompts, None)

    def begin(asked: Prompts) -> DecodeState:
        length = asked.batch["tokens"].shape[1]
        if asked.answers > size or length > (longest or length):
            raise ValueError(
                f"a batch of {asked.answers} answers to prompts of {length} tokens; expected at "
                f"most {size}, and no longer prompts than the {longest} tokens of the first"
            )
        _, batch, rows, limits, questions = asked
        return prefill(
            model, base, trainable, batch, decoding, np.uint32(seed), rows, limits, questions
        )

    while upcoming is not None or (owners >= 0).any():
        free = np.flatnonzero(owners < 0)
        while upcoming is not None and (state is None or upcoming.answers <= len(free)):
            fresh = begin(upcoming) if fresh is None else fresh
            prefill_batch, length = upcoming.answers, fresh.slots
            needed = max(needed, length + 1)
            if state is None:
                longest, most = length, most_slots(fresh, decoding)
                state = init_decode_state(fresh, size, decoding, _kv_bucket(needed, most))
            state = resize(model, state, _kv_bucket(needed, most))
            taken, free = np.split(free, [len(upcoming.numbers)])
            places = size + np.arange(prefill_batch, dtype=np.int32)  # nowhere, for filler
            places[: len(taken)] = taken
            state = insert(model, state, fresh, decoding, places)
            owners[taken] = upcoming.numbers
            fresh, upcoming = None, next(prompts, None)
        enough = min(size, prefill_batch + (len(free) if upcoming is None else 0))
        state = resize(model, state, _kv_bucket(needed, most))
        state = decode(model, base, trainable, state, decoding, limit, enough)
        # Dispatched before anyone waits: the device goes on while the host looks at answers.
        if upcoming is not None and fresh is None:
            fresh = begin(upcoming)
        yield from complete
        generated, done, needed = _progress(state)
        rows = np.flatnonzero(done & (owners >= 0))
        complete = [(int(owners[row]), generated.row(row)) for row in rows]
        owners[rows] = -1
    yield from complete


class LiveRows:
    """Rows that take prompts at any time, and write a few tokens at a time: for a server.

    What `generate_all` does for prompts that are known, for those that are yet to come. The cache
    has room for whole answers from the start, so that each program is compiled once for every
    length of prompts (see `put`), and never again.

    Attributes:
        steps: tokens that have been written one after another, by all rows together, but for the
            first of every answer.

    Args:
        model, base, trainable, decoding: as for `prefill`.
        size: rows.
    """

    def __init__(
        self, model: AffectGPT, base: Any, trainable: Any, decoding: Decoding, size: int
    ) -> None:
        self._model, self._weights, self._decoding = model, (base, trainable), decoding
        self._owners = np.full(size, -1)  # whose answer each row writes
        self._counts = np.zeros(size, np.int32)  # tokens that each has, as far as the host knows
        self._state: DecodeState | None = None
        self._longest = self.steps = 0

    @property
    def is_new(self) -> bool:
        """Whether no prompts were put, of which the first decide how long others may be."""
        return self._state is None

    @property
    def free(self) -> int:
        """Rows without an answer."""
        return int((self._owners < 0).sum())

    def put(self, prompts: Prompts, seed: int = 0) -> None:
        """Give prompts to free rows, which writes their first tokens.

        Args:
            prompts: P at a time, always as many; those in use have rows, no more than are free.
                The first ones are the longest.
            seed: of sampling, 0 to 2^32 - 1.

        Raises:
            ValueError: more prompts than free rows, or longer ones than the first.
        """
        size, length = len(self._owners), prompts.batch["tokens"].shape[1]
        self._longest = self._longest or length
        if len(prompts.numbers) > self.free or length > self._longest:
            raise ValueError(
                f"{len(prompts.numbers)} prompts of {length} tokens; expected at most {self.free}, "
                f"and no longer ones than the {self._longest} tokens of the first"
            )
        model, decoding = self._model, self._decoding
        fresh = prefill(
            *(model, *self._weights, prompts.batch, decoding),
            *(np.uint32(seed), prompts.rows, prompts.limits),
        )
        if self._state is None:
            self._state = init_decode_state(fresh, size, decoding)
        taken = np.flatnonzero(self._owners < 0)[: len(prompts.numbers)]
        places = size + np.arange(len(fresh.lengths), dtype=np.int32)  # nowhere, for filler
        places[: len(taken)] = taken
        self._state = insert(model, self._state, fresh, decoding, places)
        self._owners[taken], self._counts[taken] = prompts.numbers, 1

    def drop(self, numbers: Iterable[int]) -> None:
        """Have the rows of these answers write no more, and free them."""
        rows = np.isin(self._owners, list(numbers))
        self._state = _stopped(self._model, self._state, rows)
        self._owners[rows] = -1

    def write(self, steps: int) -> list[tuple[int, Generated, bool]]:
        """Write up to `steps` tokens more to every answer; rows of complete ones become free.

        Returns:
            Of every answer its number, what is written (a row of NumPy arrays), and whether it is
            complete.
        """
        self._state = decode(
            self._model, *self._weights, self._state, self._decoding, np.int32(steps)
        )
        generated, done, _ = _progress(self._state)
        used = np.flatnonzero(self._owners >= 0)
        self.steps += int((generated.counts - self._counts)[used].max(initial=0))
        self._counts = generated.counts
        found = [(int(self._owners[i]), generated.row(i), bool(done[i])) for i in used]
        self._owners[used[done[used]]] = -1
        return found


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _stopped(model: AffectGPT, state: DecodeState, rows: jax.Array) -> DecodeState:
    """The same state, in which the rows that `rows` `[B]` bool marks write no more."""
    return _laid_out(model, state._replace(limits=jnp.where(rows, 0, state.limits)))
