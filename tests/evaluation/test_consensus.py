import itertools

import numpy as np
import pytest

from affectgpt_jax.evaluation.consensus import consensus
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rewards import Wheels, overlap

WHEELS = Wheels(load_lexicon())
# Each has a place of its own on some wheel.
WORDS = ("joyful", "sad", "angry", "calm", "worried", "amazed")


def expected_f(labels, samples):
    """Mean over the samples of the F against each, as a reward would have it."""
    found = overlap([labels] * len(samples), samples, WHEELS)
    return found.mean(found.f).mean()


@pytest.mark.parametrize("seed", range(10))
def test_no_set_of_sampled_labels_agrees_more(seed):
    rng = np.random.default_rng(seed)
    samples = [tuple(rng.choice(WORDS, rng.integers(1, 4), replace=False)) for _ in range(8)]
    found = consensus(samples, WHEELS)
    largest = max(map(len, samples))
    sets = [s for n in range(1, largest + 1) for s in itertools.combinations(WORDS, n)]
    best = max(expected_f(labels, samples) for labels in sets)
    assert found.expected_f == pytest.approx(best)
    assert expected_f(found.labels, samples) == pytest.approx(best)
    listed = consensus(samples, WHEELS, new_sets=False)
    assert listed.expected_f == pytest.approx(max(expected_f(s, samples) for s in samples))
    assert {*samples[listed.sample]} == {*listed.labels}


def test_two_answers_that_are_half_right_make_a_set_that_nobody_wrote():
    samples = [("joyful",), ("angry",)] * 4 + [("joyful", "calm", "qqq")]
    found = consensus(samples, WHEELS)
    assert found.labels == ("joyful", "angry") and found.sample is None


def test_labels_stand_in_the_order_of_their_frequency_and_ties_go_to_the_shortest():
    assert consensus([("sad", "joyful"), ("joyful",), ("joyful", "sad")], WHEELS).labels == (
        "joyful",
        "sad",
    )
    # A synonym adds nothing on the wheels.
    assert consensus([("joyful", "happy"), ("joyful",)], WHEELS).labels == ("joyful",)
    assert consensus([("joyful",), ("sad",)], WHEELS, new_sets=False).labels == ("joyful",)


def test_no_set_is_larger_than_what_was_sampled():
    samples = [(word,) for word in WORDS]
    assert len(consensus(samples, WHEELS).labels) == 1


def test_samples_that_no_wheel_knows_do_not_count():
    found = consensus([("qqq",), ("qqq",), ("sad",), ()], WHEELS)
    assert found.labels == ("sad",) and found.sample == 2 and found.expected_f == 1
    unknown = consensus([("zzz",), ("qqq", "rrr"), ("qqq", "rrr")], WHEELS)
    assert unknown.labels == ("qqq", "rrr") and unknown.sample == 1
    assert np.isnan(unknown.expected_f)
    assert consensus([()], WHEELS).labels == ()
    with pytest.raises(ValueError, match="one sampled list"):
        consensus([], WHEELS)
