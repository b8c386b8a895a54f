import re

import numpy as np
import pytest

from affectgpt_jax.evaluation.lexicon import WHEELS, load_lexicon
from affectgpt_jax.evaluation.metrics import (
    ScoreError,
    score_basic,
    score_fine,
    score_sentiment,
)
from affectgpt_jax.evaluation.rewards import (
    Answered,
    Overlap,
    Reward,
    RewardError,
    Wheels,
    corpus_f_gradient,
    overlap,
)

LEXICON = load_lexicon()
WORDS = ("joyful", "sad", "angry", "calm", "worried", "amazed", "grateful", "lonely", "qqq", "Xyz")


def random_lists(count, seed=0, least=0):
    rng = np.random.default_rng(seed)
    forms = [*WORDS, *rng.choice(LEXICON.forms, 200)]
    return [tuple(rng.choice(forms, rng.integers(least, 5))) for _ in range(count)]


def answered(labels, complete=True, framed=True):
    return Answered(labels, np.full(len(labels), complete), np.full(len(labels), framed))


@pytest.mark.parametrize("level", [1, 2])
def test_rewards_are_the_scores_of_single_clips(level):
    answers, truth = random_lists(1000), random_lists(1000, seed=1)
    wheels = Wheels(LEXICON, level=level)
    found = overlap(answers, truth, wheels)
    f, hit = found.mean(found.f), found.mean(found.hit)
    compared = 0
    for i in range(1000):
        try:
            score = score_fine([answers[i]], [truth[i]], LEXICON, level)
        except ScoreError:  # the benchmark wants a truth on every wheel
            assert found.scored[i].sum() < WHEELS
            continue
        compared += 1
        assert f[i] == pytest.approx(score.values["f"], abs=1e-12)
        if len(truth[i]) == 1:
            single = score_basic([answers[i]], truth[i], LEXICON, level)
            assert hit[i] == pytest.approx(single.values["hit"], abs=1e-12)
    assert compared > 300


def test_wheels_without_a_truth_are_left_out_of_a_clips_mean():
    answers, truth = random_lists(300), random_lists(300, seed=1, least=1)
    wheels = Wheels(LEXICON, (2, 5))
    found = overlap(answers, truth, wheels)
    value = found.mean(found.f)
    for i in range(300):
        each = []
        for wheel in (2, 5):
            p = {LEXICON.label(word, wheel) for word in answers[i]} - {None}
            t = {LEXICON.label(word, wheel) for word in truth[i]} - {None}
            if t:
                each.append(2 * len(p & t) / (len(p) + len(t)))
        assert (value[i] == pytest.approx(np.mean(each))) if each else np.isnan(value[i])


def test_the_corpus_reward_is_the_gradient_of_the_benchmarks_f():
    answers, truth = random_lists(60), random_lists(60, seed=1, least=1)
    found = overlap(answers, truth, Wheels(LEXICON))
    assert not found.scored.all()

    def f(precision, recall):
        clips = found.scored.sum(axis=0)
        p = (precision * found.scored).sum(axis=0) / clips
        r = (recall * found.scored).sum(axis=0) / clips
        return (2 * p * r / (p + r)).mean()

    score = score_fine(answers, truth, LEXICON)
    assert f(found.precision, found.recall) == pytest.approx(score.values["f"])
    reward, step = corpus_f_gradient(found), 1e-6
    for i in range(60):
        # The reward is linear in p and r of a clip, so it is the change when these change to 0.
        one = np.zeros((60, 1))
        one[i] = step
        change = f(found.precision * (1 + one), found.recall * (1 + one)) - f(
            found.precision * (1 - one), found.recall * (1 - one)
        )
        assert reward[i] / 60 == pytest.approx(change / (2 * step), abs=1e-8)


def test_a_clip_without_a_single_right_answer_has_a_corpus_reward_of_zero():
    nothing = np.zeros((3, WHEELS))
    found = Overlap(np.ones((3, WHEELS), bool), nothing, nothing, nothing, nothing)
    assert corpus_f_gradient(found).tolist() == [0, 0, 0]


def test_truth_earns_one_and_junk_and_synonyms_cost():
    truth = [("joyful", "worried")]
    reward = Reward("wheel_f", Wheels(LEXICON), format_weight=0.1, length_penalty=0.05)

    def total(*labels):
        return reward(answered([labels]), truth).total[0]

    assert total("joyful", "worried") == pytest.approx(1.1)
    assert reward(answered([("joyful", "worried")], framed=False), truth).total[0] == 1
    assert reward(answered([("joyful", "worried")], complete=False), truth).total[0] == 0
    # Each is free for the benchmark's F: a synonym, an unknown word, a repeat.
    for free in ("happy", "qqq", "joyful"):
        assert overlap([("joyful", "worried", free)], truth, Wheels(LEXICON)).f.mean() == 1
        assert total("joyful", "worried", free) == pytest.approx(1.05)
    lenient = Reward("wheel_f", Wheels(LEXICON), length_penalty=0.05, length_free=1)
    assert lenient(answered([("joyful", "worried", "qqq")]), truth).total[0] == 1
    assert total("sad") < total("joyful") < total("joyful", "worried")


def test_sentiment_is_rewarded_as_the_benchmark_counts_it():
    words = ["positive", "negative", "neutral", ""]
    reward = Reward("sentiment", Wheels(LEXICON))
    answers = [(word,) if word else () for word in words for _ in range(2)]
    truth = [0.4, -1.0] * 4
    score = reward(answered(answers), truth).score
    for i, value in enumerate(truth):
        single = score_sentiment([words[i // 2]], [value])
        assert score[i] == single.values["accuracy"]
    assert reward.scorable([0, None, 0.1]).tolist() == [False, False, True]


def test_rewards_that_make_no_sense_are_refused():
    wheels = Wheels(LEXICON)
    with pytest.raises(RewardError, match="'hit' without a length_penalty"):
        Reward("hit", wheels)
    Reward("hit", wheels, length_penalty=0.1)
    Reward("hit", wheels, allow_hacking=True)
    with pytest.raises(RewardError, match="'bleu'; expected one of wheel_f"):
        Reward("bleu", wheels)
    with pytest.raises(RewardError, match="length_penalty is -1"):
        Reward("wheel_f", wheels, length_penalty=-1)
    for numbers in ((6,), (0, 1), (), (1.0,), (True,), (1, 1, 2)):
        with pytest.raises(RewardError, match=re.escape(f"wheels {numbers}; expected some of")):
            Wheels(LEXICON, numbers)
    with pytest.raises(RewardError, match="nothing to score"):
        Reward("wheel_f", wheels)(answered([("sad",)]), [("qqq",)])
