import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.common.identity import Identity
from affectgpt_jax.evaluation.confusion import MAX_ROWS, NOTHING, OTHERS, confusions
from affectgpt_jax.evaluation.lexicon import Source, compile_lexicon
from affectgpt_jax.evaluation.metrics import score_basic, score_sentiment, score_words

WHEEL = (("sad", "lonely", "left"), ("sad", "blue", "low"), ("glad", "proud", "merry"))
LEXICON = compile_lexicon(Identity("small", "0"), Source((WHEEL,) * 5, (), ()))
WORDS = ("sad", "lonely", "left", "blue", "glad", "merry", "zebra")

clips = st.lists(
    st.tuples(st.lists(st.sampled_from(WORDS), max_size=4), st.sampled_from(WORDS)),
    min_size=1,
    max_size=15,
)


def cells(table):
    return {
        (row, column): int(count)
        for row, counts in zip(table.rows, table.counts)
        for column, count in zip(table.columns, counts)
        if count
    }


def test_basic_truths_stand_beside_the_labels_they_were_given():
    predictions = [["merry", "blue"], ["glad"], ["zebra"], [], ["sad"]]
    truth = ["left", "merry", "left", "merry", "zebra"]
    table, *others = confusions("basic", predictions, truth, LEXICON)
    assert cells(table) == {
        ("left", "glad"): 1,
        ("left", "sad"): 1,
        ("left", NOTHING): 1,
        ("merry", "glad"): 1,
        ("merry", NOTHING): 1,
    }
    assert dict(zip(table.rows, table.clips)) == {"left": 2, "merry": 2}
    right = {r: [table.columns[c] for c in cs] for r, cs in zip(table.rows, table.right)}
    assert right == {"left": ["sad"], "merry": ["glad"]}
    assert [other.wheel for other in others] == [2, 3, 4, 5]


@given(clips)
def test_what_is_right_in_a_confusion_is_the_hit_rate(data):
    predictions, truth = zip(*data, strict=True)
    if set(truth) == {"zebra"}:
        return
    table = confusions("basic", predictions, truth, LEXICON)[0]
    hits = sum(table.counts[row, list(columns)].sum() for row, columns in enumerate(table.right))
    score = score_basic(predictions, truth, LEXICON)
    assert table.clips.sum() == score.wheels[0]["clips"]
    assert hits / table.clips.sum() == pytest.approx(score.wheels[0]["hit"])
    words = confusions("words", predictions, truth)[0]
    hits = sum(words.counts[row, list(columns)].sum() for row, columns in enumerate(words.right))
    assert hits / len(truth) == pytest.approx(score_words(predictions, truth).primary)
    assert (words.counts.sum(axis=1) == words.clips).all()


def test_fine_truths_are_labels_of_the_wheel():
    table = confusions("fine", [["merry"], []], [["left", "proud"], ["zebra", "low"]], LEXICON)[0]
    assert cells(table) == {("sad", "glad"): 1, ("glad", "glad"): 1, ("sad", NOTHING): 1}
    assert [table.columns[c] for (c,) in table.right] == list(table.rows)


def test_sentiment_is_three_by_two_and_agrees_with_the_score():
    predictions = ["positive", "negative", "neutral", "mixed", "", "positive"]
    truth = [1.0, -2.0, -0.5, 3.0, 0.0, -1.0]
    [table] = confusions("sentiment", predictions, truth)
    assert table.counts.tolist() == [[1, 1, 1], [0, 1, 1]]
    right = sum(table.counts[row, list(columns)].sum() for row, columns in enumerate(table.right))
    assert right / table.clips.sum() == score_sentiment(predictions, truth).values["accuracy"]


def test_thousands_of_words_share_the_last_row():
    words = [f"w{n}" for n in range(3000)]
    truth = ["common"] * 5 + words
    [table] = confusions("words", [[word] for word in truth], truth)
    assert table.counts.shape == (MAX_ROWS, MAX_ROWS + 1)
    assert table.rows[0] == "common" and table.rows[-1] == OTHERS
    assert table.clips.sum() == len(truth) == np.asarray(table.counts).sum()
    # Two rare words in one cell need not be the same.
    assert table.right[-1] == ()
