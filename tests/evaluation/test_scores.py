import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.identity import Identity
from affectgpt_jax.evaluation import metrics
from affectgpt_jax.evaluation.lexicon import Source, compile_lexicon, load_lexicon
from affectgpt_jax.evaluation.metrics import (
    ScoreError,
    bootstrap,
    clip_scores,
    compare,
    mean_interval,
    protocols,
    score_basic,
    score_fine,
    score_preference,
    score_sentiment,
    score_words,
)
from affectgpt_jax.evaluation.readers import pair, read_predictions, read_truth

SHARED = Path(__file__).parents[2].parent / "shared"
WHEEL = (("sad", "lonely", "left"), ("sad", "blue", "low"), ("glad", "proud", "merry"))
SMALL = compile_lexicon(Identity("small", "0"), Source((WHEEL,) * 4 + (WHEEL[:2],), (), ()))
WORDS = ("sad", "lonely", "left", "blue", "low", "glad", "proud", "merry", "zebra", "")

label_lists = st.lists(st.sampled_from(WORDS), max_size=4)
clips = st.lists(st.tuples(label_lists, label_lists), min_size=1, max_size=12)


def brute_fine(predictions, truth, lexicon, level):
    """P, R and F by wheel, with sets and loops."""
    rows = []
    for wheel in range(1, 6):
        precisions, recalls = [], []
        for predicted, true in zip(predictions, truth, strict=True):
            p = {lexicon.label(w, wheel, level) for w in predicted} - {None}
            t = {lexicon.label(w, wheel, level) for w in true} - {None}
            if t:
                precisions.append(len(p & t) / len(p) if p else 0)
                recalls.append(len(p & t) / len(t))
        if not precisions:
            return None
        p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
        rows.append((2 * p * r / (p + r) if p + r else 0.0, p, r, len(precisions)))
    return rows


@given(clips, st.sampled_from([1, 2]))
def test_fine_equals_sets_and_loops(data, level):
    predictions, truth = zip(*data, strict=True)
    expected = brute_fine(predictions, truth, SMALL, level)
    if expected is None:
        with pytest.raises(ScoreError, match="stands on wheel"):
            score_fine(predictions, truth, SMALL, level)
        return
    score = score_fine(predictions, truth, SMALL, level)
    assert [w["clips"] for w in score.wheels] == [row[3] for row in expected]
    for n, name in enumerate("fpr"):
        np.testing.assert_allclose([w[name] for w in score.wheels], [row[n] for row in expected])
        assert math.isclose(score.values[name], np.mean([row[n] for row in expected]))


@given(st.lists(st.tuples(label_lists, st.sampled_from(WORDS)), min_size=1, max_size=12))
def test_basic_equals_sets_and_loops(data):
    predictions, truth = zip(*data, strict=True)
    rates = []
    for wheel in range(1, 6):
        hits = [
            SMALL.label(true, wheel) in {SMALL.label(w, wheel) for w in predicted}
            for predicted, true in zip(predictions, truth, strict=True)
            if SMALL.label(true, wheel)
        ]
        rates.append(sum(hits) / len(hits) if hits else None)
    if None in rates:
        with pytest.raises(ScoreError, match="stands on wheel"):
            score_basic(predictions, truth, SMALL)
        return
    score = score_basic(predictions, truth, SMALL)
    np.testing.assert_allclose([w["hit"] for w in score.wheels], rates)
    assert math.isclose(score.primary, np.mean(rates))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["positive", "negative", "neutral", "", "Positive ", "mixed"]),
            st.sampled_from([-3.0, -0.5, 0.0, 0.5, 3.0]),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_sentiment_equals_counting(data):
    code = {"positive": 1, "negative": -1}
    kept = [(code.get(p.strip().lower(), 0) > 0, t > 0) for p, t in data if t]
    assume(kept)
    weighted = 0
    for cls in (False, True):
        tp = sum(p == t == cls for p, t in kept)
        wrong = sum(p != t for p, t in kept)
        support = sum(t == cls for _, t in kept)
        weighted += support / len(kept) * (2 * tp / (2 * tp + wrong) if tp else 0)
    score = score_sentiment(*zip(*data, strict=True))
    assert math.isclose(score.values["weighted_f1"], weighted)
    assert math.isclose(score.values["accuracy"], sum(p == t for p, t in kept) / len(kept))
    assert score.primary == score.values["weighted_f1"]
    assert score.counts["scored"] == len(kept)


@functools.cache
def official():
    if not (SHARED / "emotion_wheel").is_dir():
        pytest.skip("the official lexicon is not here")
    return load_lexicon(SHARED / "emotion_wheel")


def golden_pairs():
    truth = SHARED / "reference" / "ov_merd_truth.csv"
    baseline = SHARED / "reference" / "ov_merd_baseline.csv"
    return pair(read_predictions(baseline, "fine"), read_truth(truth, "fine"))


def test_the_published_score_comes_out():
    lexicon, pairs = official(), golden_pairs()
    score = score_fine(pairs.predictions, pairs.truth, lexicon)
    assert {k: f"{100 * v:.2f}" for k, v in score.values.items()} == {
        "f": "55.37",
        "p": "55.94",
        "r": "54.85",
    }
    assert [wheel["clips"] for wheel in score.wheels] == [327, 328, 324, 327, 316]


@settings(max_examples=40)
@given(st.randoms(use_true_random=False), st.integers(1, 30), st.sampled_from([1, 2]))
def test_random_official_words_score_as_sets_and_loops_say(random, size, level):
    lexicon = official()
    vocabulary = [*random.sample(lexicon.forms, 60), "happy", "no such word"]

    def draw():
        return [random.sample(vocabulary, random.randrange(7)) for _ in range(size)]

    predictions, truth = draw(), [[*labels, "sad"] for labels in draw()]
    expected = brute_fine(predictions, truth, lexicon, level)
    score = score_fine(predictions, truth, lexicon, level)
    for n, name in enumerate("fpr"):
        np.testing.assert_allclose([w[name] for w in score.wheels], [row[n] for row in expected])


def test_tables_by_class():
    score = score_fine([["sad", "glad"], ["glad"], []], [["sad"], ["blue"], ["glad"]], SMALL)
    [glad, sad] = [row for row in score.classes if row["wheel"] == 1]
    assert glad == {"wheel": 1, "label": "glad", "clips": 1, "predicted": 2, "p": 0, "r": 0, "f": 0}
    assert (sad["clips"], sad["predicted"], sad["p"], sad["r"]) == (2, 1, 1, 0.5)
    assert math.isclose(sad["f"], 2 / 3)
    score = score_basic([["sad"], ["glad"], ["low"]], ["sad", "sad", "glad"], SMALL)
    assert [(row["label"], row["clips"], row["hit"]) for row in score.classes[:2]] == [
        ("glad", 1, 0),
        ("sad", 2, 0.5),
    ]
    score = score_sentiment(["positive", "neutral", "positive"], [1, -1, -2])
    assert [(row["label"], row["clips"], row["predicted"]) for row in score.classes] == [
        ("negative", 2, 1),
        ("positive", 1, 2),
    ]


def test_a_class_s_figures_are_over_scored_clips_alone():
    # The second clip has no true label: what is predicted for it is neither right nor wrong.
    score = score_fine([["sad"], ["sad", "glad"]], [["sad"], ["zebra"]], SMALL)
    rows = {row["label"]: row for row in score.classes if row["wheel"] == 1}
    assert (rows["sad"]["clips"], rows["sad"]["predicted"], rows["sad"]["p"]) == (1, 1, 1)
    assert (rows["glad"]["clips"], rows["glad"]["predicted"], rows["glad"]["p"]) == (0, 0, None)


def test_unknown_and_unmapped_words_are_counted():
    score = score_fine(
        [["Zebra", "sad", "zebra "], ["glad", "lynx"], [" "]], [["sad", "ox"], ["low"], []], SMALL
    )
    assert score.counts["unknown_predicted"] == {"zebra": 2, "lynx": 1, "": 1}
    assert score.counts["unknown_true"] == {"ox": 1}
    assert score.counts["empty_predictions"] == 1
    assert score.counts["predicted_labels_per_clip"] == 2
    assert score.counts["true_labels_per_clip"] == 1
    # Of six predicted labels two are mapped on the first wheel; the fifth wheel lacks "glad".
    assert math.isclose(score.wheels[0]["unmapped_predicted"], 4 / 6)
    assert math.isclose(score.wheels[4]["unmapped_predicted"], 5 / 6)
    assert math.isclose(score.wheels[0]["unmapped_true"], 1 / 3)
    counts = score_sentiment(["positive", "happy", "", "Neutral"], [1, 1, -1, 0]).counts
    assert counts["predicted"] == {"negative": 0, "neutral": 1, "positive": 1}
    assert counts["unknown_predicted"] == {"happy": 1}
    assert counts["empty_predictions"] == 1


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda: score_fine([], [], SMALL), r"predictions \(0\)"),
        (lambda: score_fine([["sad"]], [["sad"], ["low"]], SMALL), r"predictions \(1\)"),
        (lambda: score_fine([["sad"]], [["sad"]], SMALL, 3), "level is 3"),
        (lambda: score_fine([["sad"]], [["glad"]], SMALL), "1 clips stands on wheel 5 of small"),
        (lambda: score_basic([["sad"]], ["zebra"], SMALL), "stands on wheel 1"),
        (lambda: score_sentiment(["positive"], [0]), "all 1 true values are 0"),
        (lambda: score_sentiment(["positive", ""], [1, math.nan]), "clip 1 is nan"),
    ],
)
def test_what_cannot_be_scored_is_said(score, message):
    with pytest.raises(ScoreError, match=message):
        score()


def binary(outcomes):
    """A basic score whose clips are hit or not."""
    return score_basic(
        [["sad"] if o else ["glad"] for o in outcomes], ["sad"] * len(outcomes), SMALL
    )


def test_the_bootstrap_is_the_binomial_of_a_hit_rate():
    # Resampling n clips of which a share h is hit draws Binomial(n, h) / n.
    n, h = 400, 0.3
    interval = bootstrap(binary(np.arange(n) < n * h), resamples=20_000, seed=3)["hit"]
    half = 1.959964 * math.sqrt(h * (1 - h) / n)
    assert interval.low == pytest.approx(h - half, abs=0.004)
    assert interval.high == pytest.approx(h + half, abs=0.004)
    assert interval.resamples == 20_000


def test_the_mean_of_several_sets_is_resampled_set_by_set():
    # Sets of equal size, which draws from one state would move together: the standard error of a
    # mean of k independent hit rates is that of one, over sqrt(k).
    n, h, k = 400, 0.3, 4
    scores = [binary(np.arange(n) < n * h)] * k
    interval = mean_interval(scores, resamples=20_000, seed=3)
    half = 1.959964 * math.sqrt(h * (1 - h) / n / k)
    assert interval.low == pytest.approx(h - half, abs=0.002)
    assert interval.high == pytest.approx(h + half, abs=0.002)
    assert interval == mean_interval(scores, resamples=20_000, seed=3)
    assert interval != mean_interval(scores, resamples=20_000, seed=4)
    with pytest.raises(ScoreError, match="one score or more"):
        mean_interval([])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        interval = bootstrap(binary(generator.random(200) < 0.4), 400, seed=trial)["hit"]
        held += interval.low <= 0.4 <= interval.high
    # Mean 285, standard deviation 3.8.
    assert 270 <= held <= 297


def test_a_seed_decides_and_slices_do_not_matter(monkeypatch):
    score = binary(np.arange(50) % 3 == 0)
    assert bootstrap(score, 100, seed=1) == bootstrap(score, 100, seed=1)
    assert bootstrap(score, 100, seed=1) != bootstrap(score, 100, seed=2)
    wide = bootstrap(score, 2000, seed=1)["hit"]
    monkeypatch.setattr(metrics, "CHUNK", 170)
    narrow = bootstrap(score, 2000, seed=1)["hit"]
    assert narrow.resamples == 2000
    assert narrow.low == pytest.approx(wide.low, abs=0.03)


def test_every_resampled_value_is_the_score_of_the_drawn_clips():
    predictions = [["sad"], ["glad", "low"], ["merry"], [], ["low"]]
    truth = [["sad"], ["low"], ["merry", "sad"], ["sad"], ["glad", "blue"]]
    score = score_fine(predictions, truth, SMALL)
    drawn = [0, 1, 1, 4, 4]
    again = score_fine([predictions[n] for n in drawn], [truth[n] for n in drawn], SMALL)
    weights = np.bincount(drawn, minlength=5).astype(float)
    values = metrics.METRICS["fine"][1](np.tensordot(weights, score.statistics, 1))
    np.testing.assert_allclose(values, list(again.values.values()))


def test_resamples_without_a_scored_clip_are_counted_out():
    # Only one of two clips has a truth on the fifth wheel: a quarter of the draws miss it.
    score = score_basic([["sad"], ["glad"]], ["sad", "glad"], SMALL)
    interval = bootstrap(score, resamples=1000)["hit"]
    assert 700 < interval.resamples < 800
    assert (interval.low, interval.high) == (1, 1)


def test_identical_systems_do_not_differ():
    score = binary(np.arange(60) % 2 == 0)
    found = compare(score, score)
    assert (found.difference, found.p_value) == (0, 1)
    assert (found.interval.low, found.interval.high) == (0, 0)


def test_a_clear_gain_is_significant_and_a_slight_one_is_not():
    half = np.arange(200) % 2 == 0
    more, less = binary(half | (np.arange(200) % 5 == 0)), binary(half)
    found = compare(more, less)
    assert found.difference == pytest.approx(0.1)
    assert found.p_value == 1 / 1001
    assert 0 < found.interval.low < 0.1 < found.interval.high
    assert compare(less, more).difference == pytest.approx(-0.1)
    slight = binary(half | (np.arange(200) == 1))
    # One clip differs: every permutation moves the score as far.
    assert compare(slight, less).p_value == 1


def test_p_values_of_equal_systems_are_uniform():
    generator = np.random.default_rng(1)
    p = [
        compare(*(binary(generator.random(80) < 0.5) for _ in "ab"), 200, seed=trial).p_value
        for trial in range(200)
    ]
    # Hits are whole numbers, so that ties make the test a little cautious.
    assert 0.01 <= np.mean(np.asarray(p) <= 0.1) <= 0.16


def test_the_permutation_test_equals_all_permutations():
    a = np.asarray([1, 1, 1, 1, 0, 1, 0, 1], bool)
    b = np.asarray([0, 0, 1, 0, 0, 1, 1, 0], bool)
    gap = a.astype(int) - b
    signs = 1 - 2 * (np.arange(2**8)[:, None] >> np.arange(8) & 1)
    exact = np.mean(np.abs(signs @ gap) >= abs(gap.sum()))
    assert compare(binary(a), binary(b), 20_000).p_value == pytest.approx(exact, abs=0.01)


def test_other_tasks_compare_too():
    fine = score_fine([["sad"], ["low"]] * 30, [["sad"], ["low"]] * 30, SMALL)
    worse = score_fine([["glad"], ["low"]] * 30, [["sad"], ["low"]] * 30, SMALL)
    assert compare(fine, worse, 200).p_value == 1 / 201
    good = score_sentiment(["positive", "negative"] * 30, [1, -1] * 30)
    bad = score_sentiment(["negative", "negative"] * 30, [1, -1] * 30)
    assert compare(good, bad, 200).p_value == 1 / 201
    with pytest.raises(ScoreError, match="different task"):
        compare(fine, good)


def test_only_scores_of_one_lexicon_and_truth_compare():
    score = binary([True, False])
    other = dataclasses.replace(score, lexicon=Identity("other", "1"))
    with pytest.raises(ScoreError, match="different lexicon"):
        compare(score, other)
    with pytest.raises(ScoreError, match="different clips"):
        compare(score, binary([True, False, True]))
    with pytest.raises(ScoreError, match="1 or more resamples"):
        bootstrap(score, 0)
    with pytest.raises(ScoreError, match="between 0 and 1"):
        bootstrap(score, 10, confidence=95)


def test_both_protocols():
    found = protocols({"30": 0.5, "40": 0.7, "50": 0.7, "60": 0.6}, fixed="60")
    assert (found.fixed, found.fixed_value) == ("60", 0.6)
    assert (found.best, found.best_value, found.checkpoints) == ("40", 0.7, 4)
    assert found.chosen_on_test
    assert not protocols({"60": 0.6}, fixed="60").chosen_on_test
    with pytest.raises(ScoreError, match="'70' is none of"):
        protocols({"60": 0.6}, fixed="70")


@given(st.lists(st.tuples(label_lists, st.sampled_from(WORDS)), min_size=1, max_size=12))
def test_words_equal_the_hit_rate_of_the_first_label(data):
    predictions, truth = zip(*data, strict=True)
    if not any(truth):
        with pytest.raises(ScoreError, match="has a true word"):
            score_words(predictions, truth)
        return
    kept = [(p, t) for p, t in data if t]
    score = score_words(predictions, truth)
    assert score.primary == pytest.approx(metrics.hit_rate(*zip(*kept, strict=True), max_labels=1))
    assert score.counts["scored"] == len(kept) == sum(row["clips"] for row in score.classes)
    assert score.lexicon is score.level is None
    right = sum(row["clips"] * row["r"] for row in score.classes)
    assert right / len(kept) == pytest.approx(score.primary)


def test_words_count_the_labels_that_they_are_told_to_and_forgive_case():
    predictions, truth = [["Sad ", "glad"], ["glad", "SAD"], ["x"]], ["sad", " Sad", "glad"]
    assert score_words(predictions, truth).primary == pytest.approx(1 / 3)
    both = score_words(predictions, truth, max_labels=2)
    assert both.primary == pytest.approx(2 / 3)
    assert both.counts["unknown_predicted"] == {"x": 1}
    low, high = bootstrap(both)["hit"].low, bootstrap(both)["hit"].high
    assert low <= 2 / 3 <= high


@given(st.lists(st.tuples(label_lists, label_lists), min_size=1, max_size=8))
def test_a_clip_s_own_score_is_the_score_of_a_set_of_that_clip(data):
    predictions, truth = zip(*data, strict=True)
    # A wheel without a scored clip has no score, so one clip alone must stand on all five.
    truth = [[*labels, "sad"] for labels in truth]
    own = clip_scores(score_fine(predictions, truth, SMALL))
    for clip, (predicted, true) in enumerate(zip(predictions, truth)):
        alone = score_fine([predicted], [true], SMALL).values
        mean = 2 * alone["p"] * alone["r"] / (alone["p"] + alone["r"]) if alone["f"] else 0.0
        assert own[clip] == pytest.approx(mean)


def test_clips_that_are_not_scored_have_no_score_of_their_own():
    assert np.isnan(clip_scores(score_words([["a"], ["a"]], ["a", ""]))).tolist() == [False, True]
    assert np.isnan(clip_scores(score_sentiment(["", ""], [1.0, 0.0]))).tolist() == [False, True]
    basic = clip_scores(score_basic([["low"], ["low"]], ["sad", "zebra"], SMALL))
    assert basic[0] == 1 and np.isnan(basic[1])


def test_preferences_count_as_in_mer_prefer():
    """Against scikit-learn's definitions, by hand: same is left out of the truth and is a1."""
    truth = ["a1", "a1", "a2", "same", "a2", "a1"]
    said = ["a1", "same", "a2", "a2", "I cannot say", "a2"]
    score = score_preference(said, truth)
    # a1: 2 of 3 found, 3 claimed; a2: 1 of 2 found, 2 claimed.
    f1 = {"a1": 2 * 2 / (3 + 3), "a2": 2 * 1 / (2 + 2)}
    assert score.values["weighted_f1"] == pytest.approx((3 * f1["a1"] + 2 * f1["a2"]) / 5)
    assert score.values["accuracy"] == pytest.approx(3 / 5)
    assert score.counts["scored"] == 5 and score.counts["unknown_predicted"] == {"i cannot say": 1}
    assert np.isnan(clip_scores(score)[3]) and clip_scores(score)[1] == 1
    assert bootstrap(score, 20)["weighted_f1"].low <= score.primary
    with pytest.raises(ScoreError, match="none of 1 clips has a preference"):
        score_preference(["a1"], ["same"])


def test_preferences_are_read_as_mer2026_writes_them(tmp_path):
    truth = tmp_path / "track3_emoprefer.csv"
    truth.write_text("name,a1,a2,preference\nx,One.,Two.,a2\ny,Three.,Four.,same\n")
    said = tmp_path / "said.csv"
    said.write_text("name,preference\nx,A2\ny,a1\n")
    pairs = pair(read_predictions(said, "preference"), read_truth(truth, "preference"))
    assert score_preference(pairs.predictions, pairs.truth).values["accuracy"] == 1
    truth.write_text("name,preference\nx,both\n")
    with pytest.raises(ReadError, match="expected one of a1, a2, same, found 'both'"):
        read_truth(truth, "preference")
