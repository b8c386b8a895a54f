import pytest

from affectgpt_jax.evaluation.metrics import hit_rate, labels_per_clip

PREDICTIONS = [["happy", "calm"], ["sad"], [], ["angry", "worried", "happy"]]
TRUTH = ["calm", "sad", "happy", "happy"]


@pytest.mark.parametrize(
    ("budget", "expected"), [(None, 3 / 4), (0, 0), (1, 1 / 4), (2, 2 / 4), (3, 3 / 4)]
)
def test_only_labels_within_the_budget_count(budget, expected):
    assert hit_rate(PREDICTIONS, TRUTH, budget) == expected


def test_a_hit_is_the_whole_word():
    assert hit_rate([["unhappy"], ["happy"]], ["happy", "unhappy"]) == 0


def test_a_repeated_hit_counts_once():
    assert hit_rate([["sad", "sad"], ["calm"]], ["sad", "sad"]) == 0.5


def test_labels_per_clip_is_the_mean_length():
    assert labels_per_clip(PREDICTIONS) == 6 / 4
    assert labels_per_clip([[], []]) == 0


@pytest.mark.parametrize(
    ("predictions", "truth"), [([], []), ([["sad"]], []), ([["sad"]], ["sad", "calm"])]
)
def test_no_clips_or_unequal_lengths_are_refused(predictions, truth):
    counts = rf"predictions \({len(predictions)}\)"
    with pytest.raises(ValueError, match=counts):
        hit_rate(predictions, truth)
