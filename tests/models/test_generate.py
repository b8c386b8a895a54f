"""Decoding against full passes without a cache, against Hugging Face, and against probabilities."""

import dataclasses
import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import needs_torch
import numpy as np
import pytest
import scipy.special
import scipy.stats
from tiny_model import LLM, make_batch, make_model, random_base, random_trainable

from affectgpt_jax.models import generate as module
from affectgpt_jax.models.affectgpt import hidden_states, with_compute
from affectgpt_jax.models.attention import grouped_row
from affectgpt_jax.models.generate import (
    Decoding,
    Prompts,
    Sampling,
    adjust_logits,
    decode,
    generate_all,
    identities,
    init_decode_state,
    insert,
    keep_top_p,
    penalize_repetition,
    prefill,
    rows_and_prefill_batch,
    stream,
)
from affectgpt_jax.training import sharding
from affectgpt_jax.weights.huggingface import save_base

MODEL = make_model()
BASE = random_base(MODEL)
TRAINABLE = random_trainable(MODEL)
LENGTHS = [5, 12, 8]
BATCH = make_batch(LENGTHS, width=12)
PAD, NEVER, NEW = 63, -1, 10
PLAIN = Decoding(NEW, (NEVER,), PAD, log_probs=True)
NAMES = ("a", "b", "c")
# Everything at once, at values that change what is drawn.
SAMPLED = dataclasses.replace(PLAIN, sampling=Sampling(1.5, 0.9, 1.2))


def generate(model, base, trainable, batch, decoding, **settings):
    """Whole answers to one batch."""
    settings = {"every": decoding.max_new_tokens, **settings}
    *_, generated = stream(model, base, trainable, batch, decoding, **settings)
    return generated


def run(decoding=PLAIN, batch=BATCH, names=NAMES, **settings):
    return generate(MODEL, BASE, TRAINABLE, batch, decoding, rows=identities(names), **settings)


def begun(batch, decoding, seed=0, rows=None):
    """Rows with these prompts, as long as the batch, and room for their answers."""
    fresh = prefill(MODEL, BASE, TRAINABLE, batch, decoding, seed, rows)
    size = len(batch["tokens"])
    return insert(MODEL, init_decode_state(fresh, size, decoding), fresh, decoding, np.arange(size))


@pytest.fixture(scope="module")
def answers():
    return run()


@pytest.fixture(scope="module")
def samples():
    return run(SAMPLED)


@jax.jit
def full_pass(batch):
    """Logits of the next token at every position, `[B, T, V]`, without a cache."""
    return hidden_states(MODEL, BASE, TRAINABLE, batch)[0] @ BASE["lm_head"]


def all_log_probs(batch):
    return scipy.special.log_softmax(np.asarray(full_pass(batch), np.float64), axis=-1)


def record_slots(monkeypatch, least):
    """Let caches have so few slots at first; returns where each call's number is written."""
    slots, plain = [], module.decode

    def recording(model, base, trainable, state, *others):
        slots.append(state.slots)
        return plain(model, base, trainable, state, *others)

    monkeypatch.setattr(module, "KV_BUCKET", least)
    monkeypatch.setattr(module, "decode", recording)
    return slots


def record_events(monkeypatch):
    """Returns where it is written in which order the parts are called, and the host waits."""
    events = []

    def recorded(name, function):
        def call(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("prefill", "insert", "decode"):
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    monkeypatch.setattr(module, "_progress", recorded("waited", module._progress))
    return events


def with_answers(tokens, batch=BATCH):
    """The batch with these tokens `[B, N]` behind its prompts, and where they start, `[B]`."""
    rows, new = tokens.shape
    starts = batch["segment_ids"].sum(axis=1)
    width = batch["tokens"].shape[1] + new
    longer = {name: batch[name] for name in ("features", "present")}
    for name in ("tokens", "segment_ids", "soft_token_index"):
        longer[name] = np.pad(batch[name], [(0, 0), (0, new)])
    longer["positions"] = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
    at = starts[:, None] + np.arange(new)
    np.put_along_axis(longer["tokens"], at, tokens, axis=1)
    np.put_along_axis(longer["segment_ids"], at, 1, axis=1)
    return longer, starts


# --- The cache ------------------------------------------------------------------------------------


def test_greedy_equals_full_passes_without_a_cache(answers):
    # Causal: one pass over the finished answers shows what each of their prefixes predicts.
    batch, starts = with_answers(answers.tokens)
    log_probs = all_log_probs(batch)
    for row, start in enumerate(starts):
        expected = log_probs[row, start - 1 : start - 1 + NEW]
        np.testing.assert_array_equal(answers.tokens[row], expected.argmax(-1))
        # Float32, products of another shape.
        np.testing.assert_allclose(answers.log_probs[row], expected.max(-1), atol=2e-5)
    assert len(np.unique(answers.tokens)) > NEW, "answers that repeat themselves prove little"


def test_sampled_tokens_have_the_log_probs_of_the_unmodified_model(samples):
    batch, starts = with_answers(samples.tokens)
    log_probs = all_log_probs(batch)
    for row, start in enumerate(starts):
        expected = log_probs[row, start - 1 + np.arange(NEW), samples.tokens[row]]
        np.testing.assert_allclose(samples.log_probs[row], expected, atol=2e-5)


@pytest.mark.parametrize("decoding", [PLAIN, SAMPLED], ids=["greedy", "sampled"])
def test_a_cache_that_grows_when_needed_changes_nothing(decoding, monkeypatch):
    expected = run(decoding)
    slots = record_slots(monkeypatch, 4)
    found = run(decoding, every=1)
    assert sorted(set(slots)) == [16, 21]  # prompts of 12, and 9 tokens that are fed
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    # Float32, sums of another length.
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=2e-5)


@pytest.mark.parametrize("every", [1, 3, NEW])
def test_a_stream_shows_prefixes_of_the_whole_answer(samples, every):
    rows = identities(NAMES)
    items = list(stream(MODEL, BASE, TRAINABLE, BATCH, SAMPLED, rows=rows, every=every))
    shown = [1, *range(1 + every, NEW, every), NEW]
    assert [item.counts.tolist() for item in items] == [[n] * 3 for n in shown]
    for n, item in zip(shown, items):
        np.testing.assert_array_equal(item.tokens[:, :n], samples.tokens[:, :n])
        assert (item.tokens[:, n:] == PAD).all()


def test_a_stream_writes_on_while_its_reader_looks(monkeypatch):
    events = record_events(monkeypatch)
    for _ in stream(MODEL, BASE, TRAINABLE, BATCH, PLAIN):
        events.append("told")
    assert events == ["prefill", "insert", *["decode", "waited", "told"] * NEW]


def test_decoding_needs_no_host_between_tokens():
    """Moving anything to or from the device implicitly, or by `print`, would raise."""
    rows, batch, seed, steps = jax.device_put((identities(NAMES), BATCH, np.uint32(0), NEW))
    places = jax.device_put(np.arange(len(NAMES)))
    fresh = prefill(MODEL, BASE, TRAINABLE, batch, SAMPLED, seed, rows)
    state = init_decode_state(fresh, len(NAMES), SAMPLED)
    with jax.transfer_guard("disallow"):
        fresh = prefill(MODEL, BASE, TRAINABLE, batch, SAMPLED, seed, rows)
        state = insert(MODEL, state, fresh, SAMPLED, places)
        state = decode(MODEL, BASE, TRAINABLE, state, SAMPLED, steps)
    assert state.generated.counts.tolist() == [NEW] * 3


def test_decoding_updates_the_cache_where_it_lies():
    prompts = make_batch([16] * 64)
    settings = dataclasses.replace(PLAIN, max_new_tokens=512)
    state = begun(prompts, settings)
    held = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    compiled = decode.lower(MODEL, BASE, TRAINABLE, state, settings, 9).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held, "the cache that comes in is not reused"
    # One layer is read at a time; beside it there are scores and logits of a token.
    assert memory.temp_size_in_bytes < 1.2 * held / len(state.cache)
    before = jax.tree.leaves(state.cache)
    decode(MODEL, BASE, TRAINABLE, state, settings, 9)
    assert all(x.is_deleted() for x in before)


# --- Rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", [PLAIN, SAMPLED], ids=["greedy", "sampled"])
class TestRow:
    def test_does_not_depend_on_the_other_rows(self, decoding):
        expected = run(decoding)
        other = make_batch([12, 3, 8], width=12, seed=9)
        mixed = jax.tree.map(lambda x, y: np.concatenate([x[:1], y[1:2], x[2:]]), BATCH, other)
        found = run(decoding, mixed, ("a", "d", "c"))
        np.testing.assert_array_equal(found.tokens[[0, 2]], expected.tokens[[0, 2]])
        assert (found.tokens[1] != expected.tokens[1]).any()

    def test_does_not_depend_on_its_place(self, decoding):
        expected = run(decoding)
        order = [2, 0, 1]
        found = run(decoding, jax.tree.map(lambda x: x[order], BATCH), "cab")
        np.testing.assert_array_equal(found.tokens, expected.tokens[order])

    def test_does_not_depend_on_the_size_of_the_batch_nor_on_padding(self, decoding):
        expected = run(decoding)
        alone = jax.tree.map(lambda x: x[:1], BATCH)
        for name in ("tokens", "positions", "segment_ids", "soft_token_index"):
            alone[name] = alone[name][:, : LENGTHS[0]]
        np.testing.assert_array_equal(run(decoding, alone, "a").tokens[0], expected.tokens[0])

    def test_of_filler_stays_empty_beside_real_ones(self, decoding):
        expected = run(decoding)
        empty = BATCH | {"segment_ids": BATCH["segment_ids"] * np.array([[1], [0], [1]])}
        found = run(decoding, empty)
        assert (found.tokens[1] == PAD).all()
        assert found.counts.tolist() == [NEW, 0, NEW]
        assert not found.log_probs[1].any() and not found.ended.any()
        np.testing.assert_array_equal(found.tokens[[0, 2]], expected.tokens[[0, 2]])

    def test_ends_with_a_stop_id_and_stays_ended(self, decoding):
        expected = run(decoding)
        # In the midst of a row, and not in every row.
        stop = next(
            int(t)
            for t in expected.tokens[:, 1:-1].ravel()
            if (expected.tokens != t).all(axis=1).any()
        )
        tokens, log_probs, counts = expected.tokens.copy(), expected.log_probs.copy(), []
        for row in range(len(tokens)):
            ends = np.flatnonzero(tokens[row] == stop)
            counts.append(int(ends[0]) + 1 if len(ends) else NEW)
            tokens[row, counts[-1] :], log_probs[row, counts[-1] :] = PAD, 0
        assert min(counts) < max(counts) == NEW
        found = run(dataclasses.replace(decoding, stop_ids=(NEVER, stop)))
        np.testing.assert_array_equal(found.tokens, tokens)
        np.testing.assert_array_equal(found.log_probs, log_probs)
        assert found.counts.tolist() == counts
        assert found.ended.tolist() == [(row == stop).any() for row in tokens]

    def test_on_a_device_of_its_own_equals_one_among_others(self, decoding):
        expected = run(decoding)
        repeated = jax.tree.map(lambda x: np.concatenate([x, x, x])[:8], BATCH)
        mesh = sharding.make_mesh("data:8")
        batch, rows = sharding.shard_batch(mesh, (repeated, identities("abcabcab")))
        found = generate(MODEL, BASE, TRAINABLE, batch, decoding, rows=rows)
        np.testing.assert_array_equal(found.tokens, np.tile(expected.tokens, (3, 1))[:8])


@pytest.mark.parametrize("new", [1, 4])
def test_an_answer_is_cut_at_max_new_tokens(answers, new):
    found = run(dataclasses.replace(PLAIN, max_new_tokens=new))
    np.testing.assert_array_equal(found.tokens, answers.tokens[:, :new])
    assert not found.ended.any()


def test_decoding_stops_early_when_every_row_has_ended(answers):
    stops = tuple(answers.tokens[:, 1].tolist())  # every row ends at its second token, or before
    settings = dataclasses.replace(PLAIN, stop_ids=stops)
    state = begun(BATCH, settings)
    state = decode(MODEL, BASE, TRAINABLE, state, settings, NEW)
    assert state.generated.counts.max() == 2


# --- Many prompts ---------------------------------------------------------------------------------

MANY = 13
MANY_NAMES = [f"clip {i}" for i in range(MANY)]


def many_prompts():
    """As many prompts, the longest ones first, as one batch."""
    lengths = np.random.default_rng(5).integers(4, 13, size=MANY)
    return make_batch(sorted(lengths.tolist(), reverse=True), width=12, seed=3)


def in_turns(turn, limits=None, place=lambda x: x):
    """The prompts `turn` at a time, the rows of the last ones filled up, without needless padding.

    Numbers are no places, so that one for the other would show.
    """
    batch = many_prompts()
    for start in range(0, MANY, turn):
        count = min(turn, MANY - start)
        at = np.minimum(start + np.arange(turn), MANY - 1)
        part = jax.tree.map(operator.itemgetter(at), batch)
        part["segment_ids"] = part["segment_ids"] * (np.arange(turn) < count)[:, None]
        longest = 4 * -(-int(part["segment_ids"].sum(axis=1).max()) // 4)
        for name in ("tokens", "positions", "segment_ids", "soft_token_index"):
            part[name] = part[name][:, :longest]
        rows = identities([MANY_NAMES[i] for i in at])
        some = None if limits is None else np.asarray(limits, np.int32)[at]
        yield Prompts(100 + np.arange(start, start + count), *place((part, rows, some)))


def run_all(decoding, size, turn, limits=None):
    prompts = in_turns(turn, limits)
    found = list(generate_all(MODEL, BASE, TRAINABLE, prompts, decoding, size))
    assert sorted(number for number, _ in found) == [100 + i for i in range(MANY)]
    return found


def assert_same(found, expected):
    """Answers by number against those of one batch."""
    for number, answer in found:
        row = expected.row(number - 100)
        written = len(answer.tokens)
        np.testing.assert_array_equal(answer.tokens, row.tokens[:written])
        assert (row.tokens[written:] == PAD).all()
        assert (answer.counts, answer.ended) == (row.counts, row.ended)
        # Float32, sums of another length.
        np.testing.assert_allclose(answer.log_probs, row.log_probs[:written], atol=2e-5)


@pytest.fixture(scope="module")
def ending():
    """Options by which answers end at different tokens, as a stop id of a random model does."""
    tokens = run(SAMPLED, many_prompts(), MANY_NAMES).tokens
    stop = np.bincount(tokens.ravel()).argmax()
    return {
        "greedy": dataclasses.replace(PLAIN, stop_ids=(int(stop),)),
        "sampled": dataclasses.replace(SAMPLED, stop_ids=(int(stop),)),
    }


def rows_of_questions(soft_first):
    """A row of three prompts for each of three clips, and a filler row; and each in its own row."""
    starts = [7, 9, 5] if soft_first else [1, 1, 1]
    sizes = [(3, 5, 4), (2, 4, 1), (6, 4, 5)] if soft_first else [(6, 8, 9), (10, 5, 8), (7, 9, 6)]
    batch = make_batch([10] * 4, width=28, seed=4)
    alone = jax.tree.map(lambda x: np.repeat(x[:3], 3, axis=0), batch)
    for name in ("positions", "segment_ids", "soft_token_index"):
        batch[name] = np.zeros_like(batch[name])
    for clip, (start, parts) in enumerate(zip(starts, sizes, strict=True)):
        positions, ids = grouped_row(start, parts)
        batch["positions"][clip, : len(ids)], batch["segment_ids"][clip, : len(ids)] = (
            positions,
            ids,
        )
        soft = alone["soft_token_index"][3 * clip]
        place = start
        for q, size in enumerate(parts):
            row, here = 3 * clip + q, slice(place, place + size)
            batch["soft_token_index"][clip, :start] = soft[:start]
            batch["soft_token_index"][clip, here] = soft[start : start + size]
            alone["tokens"][row, :start] = batch["tokens"][clip, :start]
            alone["tokens"][row, start : start + size] = batch["tokens"][clip, here]
            alone["segment_ids"][row] = np.arange(28) < start + size
            place += size
    batch["present"] = {
        name: x & (np.arange(4) < 3)[:, None] for name, x in batch["present"].items()
    }
    return batch, alone


class TestAll:
    @pytest.mark.parametrize(("size", "turn"), [(1, 1), (5, 2), (16, 4)])
    @pytest.mark.parametrize("how", ["greedy", "sampled"])
    def test_rows_that_are_refilled_write_what_they_write_in_one_batch(
        self, how, size, turn, ending
    ):
        decoding = ending[how]
        expected = run(decoding, many_prompts(), MANY_NAMES)
        assert how == "greedy" or len(np.unique(expected.counts)) > 3
        assert_same(run_all(decoding, size, turn), expected)

    def test_a_cache_of_as_many_slots_as_needed_changes_no_answer(self, ending, monkeypatch):
        expected = run(ending["sampled"], many_prompts(), MANY_NAMES)
        slots = record_slots(monkeypatch, 1)
        assert_same(run_all(ending["sampled"], 4, 2), expected)
        falls = [a > b for a, b in itertools.pairwise(slots)]
        assert set(slots) == {8, 16, 21} and any(falls), "fewer again after a long answer"

    def test_each_answer_has_its_limit(self):
        limits = np.arange(MANY) % NEW + 1
        expected = run(SAMPLED, many_prompts(), MANY_NAMES)
        for number, answer in run_all(SAMPLED, 4, 2, limits):
            row, limit = number - 100, limits[number - 100]
            assert (answer.counts, answer.ended) == (limit, False)
            np.testing.assert_array_equal(answer.tokens[:limit], expected.tokens[row, :limit])
            assert (answer.tokens[limit:] == PAD).all()

    def test_short_answers_do_not_wait_for_a_long_one(self):
        limits = [NEW] + [1] * (MANY - 1)
        numbers = [number for number, _ in run_all(PLAIN, 2, 1, limits)]
        # The last one finds no successor; the long one is complete when the next ones are told.
        assert numbers[:-2] == [*range(101, 99 + MANY)]

    def test_prompts_are_read_ahead_but_not_all_at_once(self):
        read = []

        def reading():
            for prompts in in_turns(2):
                read.append(len(prompts.numbers))
                yield prompts

        next(generate_all(MODEL, BASE, TRAINABLE, reading(), PLAIN, 4))
        assert sum(read) == 10  # of four rows, the next in them, and two that wait

    def test_rows_write_on_before_anyone_looks_at_answers(self, monkeypatch):
        """The next prompts and tokens are dispatched first, so no device waits for the host."""
        events = record_events(monkeypatch)
        for _ in generate_all(MODEL, BASE, TRAINABLE, in_turns(2), PLAIN, 4):
            events.append("told")
        first = events.index("told")
        assert events[:first] == [
            *["prefill", "insert"] * 2,
            *["decode", "prefill", "waited"],
            *["insert", "prefill", "insert", "decode", "prefill"],
        ]
        assert events[first : first + 5] == ["told"] * 4 + ["waited"]

    def test_rows_on_eight_devices_write_what_one_device_does(self, ending):
        expected = run(ending["sampled"], many_prompts(), MANY_NAMES)
        mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
        model = with_compute(MODEL, shard=sharding.ActivationConstraint(mesh))
        trees = (jax.device_put(x, sharding.tree_shardings(mesh, x)) for x in (BASE, TRAINABLE))
        prompts = in_turns(4, place=functools.partial(sharding.shard_batch, mesh))
        found = list(generate_all(model, *trees, prompts, ending["sampled"], 8))
        assert len(found) == MANY
        assert_same(found, expected)

    @pytest.mark.parametrize("mesh", [None, "data:3"], ids=["one", "three devices"])
    def test_a_group_shares_its_prompt_and_is_answered_as_if_it_did_not(self, mesh):
        """Two answers a prompt, of which the last fills rows that others have left."""
        names = [f"{name}{place}" for name in NAMES for place in (0, 1)]
        twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), BATCH)
        expected = generate(MODEL, BASE, TRAINABLE, twice, SAMPLED, rows=identities(names))
        model, trees, place, size = MODEL, (BASE, TRAINABLE), lambda batch: batch, 1
        if mesh:
            size = 3
            devices = sharding.make_mesh(mesh, jax.devices()[:3])
            model = with_compute(MODEL, shard=sharding.ActivationConstraint(devices))
            trees = (jax.device_put(x, sharding.tree_shardings(devices, x)) for x in trees)
            place = functools.partial(sharding.shard_batch, devices)

        def prompts_from(first):
            batch = jax.tree.map(lambda x: x[first : first + size], BATCH)
            mine = slice(2 * first, 2 * (first + size))
            return Prompts(np.arange(6)[mine], place(batch), place(identities(names[mine])))

        prompts = [prompts_from(first) for first in range(0, 3, size)]
        # The longest prompt first.
        prompts = prompts if mesh else [prompts[1], prompts[0], prompts[2]]
        found = dict(generate_all(model, *trees, prompts, SAMPLED, max(4, 2 * size)))
        assert sorted(found) == list(range(6))
        for number, answer in found.items():
            np.testing.assert_array_equal(answer.tokens, expected.tokens[number])
            np.testing.assert_allclose(answer.log_probs, expected.log_probs[number], atol=2e-5)
        assert len({tuple(answer.tokens) for answer in found.values()}) == 6

    @pytest.mark.parametrize("soft", [True, False], ids=["first", "last"])
    @pytest.mark.parametrize(("decoding", "group"), [(PLAIN, 1), (SAMPLED, 2)])
    def test_questions_in_one_row_are_answered_as_in_rows_of_their_own(self, decoding, group, soft):
        """Of three questions; a clip's soft tokens come before they differ, or after."""
        rows, alone = rows_of_questions(soft)
        names = [f"{name}{q}{g}" for name in NAMES for q in range(3) for g in range(group)]
        apart = jax.tree.map(lambda x: np.repeat(x, group, axis=0), alone)
        expected = run(decoding, apart, names)
        ids = np.concatenate([identities(names), np.zeros((3 * group, 2), np.uint32)])
        turns = [
            Prompts(
                np.arange(3 * group * first, 3 * group * min(first + 2, 3)),
                jax.tree.map(lambda x: x[first : first + 2], rows),  # noqa: B023
                ids[3 * group * first : 3 * group * (first + 2)],
                questions=3,
            )
            for first in (0, 2)
        ]
        found = dict(generate_all(MODEL, BASE, TRAINABLE, turns, decoding, 7 * group))
        assert sorted(found) == list(range(9 * group))
        for number, answer in found.items():
            np.testing.assert_array_equal(answer.tokens, expected.tokens[number])
            np.testing.assert_allclose(answer.log_probs, expected.log_probs[number], atol=1e-5)
        assert len({tuple(answer.tokens) for answer in found.values()}) >= 9

    def test_no_prompts_have_no_answers(self):
        assert list(generate_all(MODEL, BASE, TRAINABLE, [], PLAIN, 4)) == []

    @pytest.mark.parametrize(("size", "reverse"), [(3, False), (8, True)])
    def test_prompts_that_do_not_fit_are_refused(self, size, reverse):
        prompts = list(in_turns(4))[:: -1 if reverse else 1]
        with pytest.raises(ValueError, match="a batch of 4 answers to .* expected at most"):
            list(generate_all(MODEL, BASE, TRAINABLE, prompts, PLAIN, size))


@pytest.mark.parametrize(
    ("wanted", "shares", "expected"),
    [(256, 1, (256, 32)), (1, 1, (1, 1)), (9, 1, (10, 2)), (16, 8, (16, 8)), (3, 8, (8, 8))],
)
def test_rows_and_those_of_a_turn_divide_over_devices(wanted, shares, expected):
    assert rows_and_prefill_batch(wanted, shares) == expected


# --- Choosing a token -----------------------------------------------------------------------------


def test_the_seed_and_the_identity_of_a_row_decide_its_samples(samples):
    again, other_seed, other_names = run(SAMPLED), run(SAMPLED, seed=1), run(SAMPLED, names="abz")
    np.testing.assert_array_equal(again.tokens, samples.tokens)
    assert (other_seed.tokens != samples.tokens).any(axis=1).all()
    changed = (other_names.tokens != samples.tokens).any(axis=1)
    assert changed.tolist() == [False, False, True]


def test_sampling_without_identities_is_refused():
    with pytest.raises(ValueError, match="identities"):
        generate(MODEL, BASE, TRAINABLE, BATCH, SAMPLED)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": 0.9}, "temperature 0 takes the most probable token"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_sampling_options_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**settings)


def goodness_of_fit(counts, probs):
    """The p-value of a chi-square test; cells that expect under 5 are taken together."""
    expected = probs * counts.sum()
    rare = expected < 5
    if rare.any():
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    assert not counts[expected == 0].any(), "something impossible was drawn"
    counts, expected = counts[expected > 0], expected[expected > 0]
    return scipy.stats.chisquare(counts, expected).pvalue


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7), Sampling(2.0, 0.8), Sampling(1.0, 0.95, 1.3)],
    ids=str,
)
def test_pairs_of_tokens_are_drawn_with_their_exact_probabilities(sampling):
    """Pairs, so that a key used twice, or a state of one row read by another, shows."""
    draws = 4096
    prompt = jax.tree.map(lambda x: x[:1], BATCH)
    decoding = Decoding(2, (NEVER,), PAD, sampling)
    many = jax.tree.map(lambda x: np.repeat(x, draws, axis=0), prompt)
    found = run(decoding, many, [f"draw {i}" for i in range(draws)]).tokens

    # The same prompt, followed by each possible first token.
    firsts = np.arange(LLM.vocab_size)[:, None]
    whole = jax.tree.map(lambda x: np.repeat(x, len(firsts), axis=0), prompt)
    batch, starts = with_answers(firsts, whole)
    logits = np.asarray(full_pass(batch), np.float64)
    text = (prompt["segment_ids"] > 0) & (prompt["soft_token_index"] == 0)
    seen = set(prompt["tokens"][text].tolist())

    def adjusted(logits, seen):
        """By the definitions, in float64, one distribution at a time."""
        logits = logits.copy()
        for token in seen:
            penalty = sampling.repetition_penalty
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        probs = scipy.special.softmax(logits / sampling.temperature)
        kept, total = np.zeros_like(probs), 0.0
        for token in probs.argsort()[::-1]:
            if total < sampling.top_p:
                kept[token] = probs[token]
            total += probs[token]
        return kept / kept.sum()

    start = starts[0]
    first = adjusted(logits[0, start - 1], seen)
    joint = np.stack(
        [first[a] * adjusted(logits[a, start], seen | {a}) for a in range(LLM.vocab_size)]
    )
    counts = np.zeros_like(joint)
    np.add.at(counts, (found[:, 0], found[:, 1]), 1)
    # A wrong distribution gives p-values below 1e-10 at this many draws.
    assert goodness_of_fit(counts.sum(axis=1), first) > 1e-3
    # Single pairs are too rare to count: pairs of groups of eight tokens.
    groups = [x.reshape(8, 8, 8, 8).sum(axis=(1, 3)).ravel() for x in (counts, joint)]
    assert goodness_of_fit(*groups) > 1e-3


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    torch = needs_torch.pytorch("the reference runs in PyTorch")
    import transformers

    directory = tmp_path_factory.mktemp("base")
    save_base(directory, LLM, BASE)
    return torch, transformers, transformers.Qwen2ForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_text_prompt_is_continued_as_hugging_face_does(hugging_face, penalty):
    torch, _, reference = hugging_face
    model = make_model(fusion=None)
    trainable = jax.tree.map(jnp.zeros_like, random_trainable(model))
    batch = make_batch([9], width=12)
    batch["soft_token_index"][:] = 0
    decoding = Decoding(16, (NEVER,), PAD, Sampling(repetition_penalty=penalty), log_probs=True)
    found = generate(model, BASE, trainable, batch, decoding)

    prompt = torch.tensor(batch["tokens"][:, :9], dtype=torch.long)
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        repetition_penalty=penalty,
        max_new_tokens=16,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    np.testing.assert_array_equal(found.tokens[0], expected[0, 9:].numpy())
    with torch.no_grad():
        logits = reference(expected).logits[0, 8:-1].log_softmax(-1)
    log_probs = logits.gather(1, expected[0, 9:, None])[:, 0].numpy()
    np.testing.assert_allclose(found.log_probs[0], log_probs, atol=2e-5)  # float32 on both sides


def random_logits(rows=16, vocabulary=1000):
    return np.random.default_rng(0).normal(0, 4, size=(rows, vocabulary)).astype(np.float32)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_hugging_face_keeps(hugging_face, top_p):
    torch, transformers, _ = hugging_face
    logits = random_logits()
    warper = transformers.TopPLogitsWarper(top_p)
    expected = warper(None, torch.tensor(logits)).numpy()
    found = np.asarray(jax.jit(keep_top_p, static_argnums=1)(logits, top_p))
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).any(axis=1).all()


@pytest.mark.parametrize("penalty", [0.7, 1.5])
def test_the_repetition_penalty_is_that_of_hugging_face(hugging_face, penalty):
    torch, transformers, _ = hugging_face
    logits = random_logits()
    ids = np.random.default_rng(1).integers(1000, size=(16, 50))
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor(ids), torch.tensor(logits)).numpy()
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    np.testing.assert_allclose(penalize_repetition(logits, seen, penalty), expected, rtol=1e-6)


def test_options_are_applied_in_the_order_of_hugging_face(hugging_face):
    torch, transformers, reference = hugging_face
    sampling = Sampling(temperature=1.7, top_p=0.8, repetition_penalty=1.4)
    logits, ids = random_logits(), np.random.default_rng(1).integers(1000, size=(16, 50))
    processors = reference._get_logits_processor(
        transformers.GenerationConfig(do_sample=True, top_k=0, **dataclasses.asdict(sampling)),
        input_ids_seq_length=ids.shape[1],
    )
    assert len(processors) == 3
    expected = processors(torch.tensor(ids), torch.tensor(logits)).numpy()
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    found = jax.jit(adjust_logits, static_argnums=1)(logits, sampling, seen)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
