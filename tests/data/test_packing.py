"""The plan of packed rows: nothing is lost, cut or too large, rows are full, order stays random."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.data import packing
from affectgpt_jax.data.packing import LOOKAHEAD, Bucket, pack, packed_bucket

CLIPS = 31_327  # of MER-Caption+


def paper_mix(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and supervised tokens of an epoch of `hybrid` answers with Qwen2.5's tokenizer.

    Quantiles are those of published label answers and human-written descriptions; half of each.
    """
    rng = np.random.default_rng(seed)

    def draw(shares, values):
        return np.round(np.interp(rng.random(CLIPS), shares, values)).astype(int)

    labels = draw([0, 0.5, 0.99, 1], [5, 12, 22, 28])
    descriptions = draw([0, 0.1, 0.5, 0.9, 0.99, 1], [80, 172, 262, 340, 431, 595])
    label = rng.random(CLIPS) < 0.5
    targets = np.where(label, labels, descriptions) + 2  # the end mark and the end token
    subtitles = rng.integers(5, 41, CLIPS)
    return 1 + np.where(label, 95, 98) + subtitles + targets, targets


def bucket_of(length, lengths, targets) -> Bucket:
    return packed_bucket(length, lengths, targets, np.ones(len(lengths)))


def totals(rows, *sizes):
    """Sums over every row: `[len(sizes), rows]`."""
    return np.array([[size[row].sum() for row in rows] for size in sizes])


# Examples of any length up to a row, and of any share of supervised tokens.
EXAMPLES = st.lists(
    st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    min_size=1,
    max_size=200,
)


@given(EXAMPLES, st.integers(64, 200))
def test_every_visit_stands_in_one_row_and_no_row_holds_more_than_it_has_room_for(examples, length):
    lengths, targets = np.array(examples).T
    bucket = bucket_of(length, lengths, targets)
    rows = pack(lengths, targets, bucket)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(examples)))
    tokens, supervised = totals(rows, lengths, targets)
    assert tokens.max() <= bucket.length == length
    assert supervised.max() <= bucket.targets <= length + 3  # rounded up to a multiple of 4
    assert max(map(len, rows)) <= bucket.clips
    assert all(row.tolist() == sorted(row) for row in rows)


@given(EXAMPLES, st.integers(1, 5), st.integers(64, 100))
def test_room_for_clips_and_for_targets_is_kept_even_where_it_is_scarce(examples, clips, targets):
    lengths, supervised = np.array(examples).T
    rows = pack(lengths, supervised, Bucket(200, targets, clips))
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(examples)))
    assert max(map(len, rows)) <= clips
    assert totals(rows, supervised).max() <= targets


@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_rows_of_the_papers_lengths_are_97_percent_full(length):
    lengths, targets = paper_mix(length)
    bucket = bucket_of(length, lengths, targets)
    rows = pack(lengths, targets, bucket)
    assert lengths.sum() >= 0.97 * len(rows) * length
    # Logits are computed for every place of a target, used or not.
    assert targets.sum() >= 0.8 * len(rows) * bucket.targets


def test_every_part_of_an_epoch_holds_labels_and_descriptions_in_their_shares():
    lengths, targets = paper_mix(0)
    rows = pack(lengths, targets, bucket_of(2048, lengths, targets))
    draws = np.concatenate(rows)
    label = targets[draws] < 35
    parts = label[: CLIPS // 500 * 500].reshape(-1, 500).mean(axis=1)
    # A random order would differ by less than 4 standard errors in all of the 62 parts.
    assert abs(parts - label.mean()).max() < 4 * 0.5 / np.sqrt(500)
    # Both kinds meet in nearly every row.
    shares = np.array([(targets[row] < 35).mean() for row in rows])
    assert ((shares > 0) & (shares < 1)).mean() > 0.99


def test_a_visit_stays_near_its_place_in_the_order():
    lengths, targets = paper_mix(1)
    rows = pack(lengths, targets, bucket_of(2048, lengths, targets))
    place = np.empty(CLIPS, int)
    place[np.concatenate(rows)] = np.arange(CLIPS)
    # It waits at most until it is the oldest of those that wait, and most go at once.
    assert np.abs(place - np.arange(CLIPS)).max() < 8 * LOOKAHEAD
    assert np.median(np.abs(place - np.arange(CLIPS))) < LOOKAHEAD


def test_the_plan_follows_from_the_sizes_alone():
    lengths, targets = (x[:2000] for x in paper_mix(2))
    bucket = bucket_of(2048, lengths, targets)
    plans = [[row.tolist() for row in pack(lengths, targets, bucket)] for _ in range(2)]
    assert plans[0] == plans[1]


def test_fewer_visits_than_a_row_holds_are_one_row_and_none_is_no_row():
    bucket = Bucket(100, 50, 8)
    assert [row.tolist() for row in pack(np.array([30, 40]), np.array([9, 9]), bucket)] == [[0, 1]]
    assert pack(np.zeros(0, int), np.zeros(0, int), bucket) == []


def test_the_best_pair_is_found_where_taking_what_comes_next_leaves_a_gap():
    lengths = np.array([50, 20, 20, 20, 33, 17])
    rows = pack(lengths, np.ones(6, int), Bucket(100, 50, 8))
    assert [lengths[row].sum() for row in rows] == [100, 60]


@pytest.mark.parametrize(("length", "target"), [(101, 1), (60, 51)])
def test_a_visit_that_no_row_has_room_for_is_an_error(length, target):
    with pytest.raises(ValueError, match=f"draw 1 has {length} tokens, {target} of them superv"):
        pack(np.array([10, length]), np.array([1, target]), Bucket(100, 50, 8))


def test_a_bucket_without_room_for_a_clip_is_an_error():
    with pytest.raises(ValueError, match=r"draw 0 \(10 tokens, 1 of them supervised\) was not pl"):
        pack(np.array([10, 20]), np.array([1, 2]), Bucket(100, 50, 0))


@pytest.mark.parametrize("chosen", [[], [1]])
def test_packing_stops_where_a_row_does_not_take_the_oldest_draw(chosen, monkeypatch):
    monkeypatch.setattr(packing, "_fill_row", lambda *_: chosen)
    with pytest.raises(ValueError, match="draw 0 .* was not placed in an empty row"):
        pack(np.array([10, 20, 30]), np.array([1, 2, 3]), Bucket(100, 50, 8))


def test_a_draw_that_fills_a_row_exactly_has_a_row_of_its_own():
    lengths, targets = np.array([100, 60, 40]), np.array([9, 50, 1])
    rows = pack(lengths, targets, Bucket(100, 50, 8))
    assert [row.tolist() for row in rows] == [[0], [1], [2]]  # 51 targets have no room


def test_rarely_visited_examples_count_for_little_in_the_room_of_a_row():
    lengths, targets = np.array([100, 100]), np.array([10, 80])
    rare = packed_bucket(1000, lengths, targets, np.array([99.0, 1.0]))
    often = packed_bucket(1000, lengths, targets, np.array([1.0, 1.0]))
    assert 100 <= rare.targets < 150
    assert 450 <= often.targets < 600
