"""The whole pipeline on demo worlds, against the truth that it never sees."""

import json

import numpy as np
import pytest

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.data import demo as worlds
from affectgpt_jax.data import demo_captions
from affectgpt_jax.data.demo_captions import COARSE, COARSE_OF, COARSE_WORDS, KINDS, Rates
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rules import RuleExtractor
from data_prep.caption import demo
from data_prep.caption.filtering import (
    PASSED,
    Labelled,
    agreement,
    judge_emotion,
    judge_sentiment,
)
from data_prep.caption.settings import CrowdSettings, Settings
from data_prep.crowd.votes import Vote, sentiment_of

SMALL = {
    "clips": 192,
    "corpora": {"emotion-1": 160, "valence-1": 160},
    "crowd_options": {"epochs": 8, "folds": 2, "seeds": 1, "hidden": (32,)},
}


@pytest.fixture(scope="module")
def world():
    return worlds.World(0)


@pytest.fixture(scope="module")
def captions(world):
    return demo_captions.draw_captions(world, 400)


def test_what_is_said_goes_wrong_as_often_as_the_rates_say(captions):
    rates = Rates()
    shares = np.bincount(captions.kind, minlength=len(KINDS)) / len(captions)
    expected = {
        "right": 1 - rates.wrong - rates.failed - rates.rambling,
        "wrong": rates.wrong / 2,
        "mirrored": rates.wrong / 2,
        "failed": rates.failed,
        "rambling": rates.rambling,
    }
    for kind, share in zip(KINDS, shares, strict=True):
        assert abs(share - expected[kind]) < 0.07, kind
    assert 0.4 < captions.pure.mean() < 0.57


def test_descriptions_name_what_they_are_to_name(captions):
    found = RuleExtractor(load_lexicon()).labels(captions.descriptions[:120])
    for i, labels in enumerate(found):
        assert labels == list(captions.labels[i]), captions.descriptions[i]
    emotions = [worlds.EMOTIONS[e] for e in captions.clips.emotion]
    for i, labels in enumerate(captions.labels):
        kind = KINDS[captions.kind[i]]
        if kind in ("right", "rambling"):
            assert labels[0] == emotions[i]
        elif kind != "failed":
            assert labels[0] != emotions[i]
        if kind == "mirrored":
            row, told = (worlds.EMOTIONS.index(w) // 4 for w in (emotions[i], labels[0]))
            assert row + told == 5


def test_a_mismatched_face_is_another_persons(world, captions):
    clips = world.clips("captions", 400)
    same = captions.clips.cues["face"] == clips.cues["face"]
    assert same[~captions.mismatched].all() and same[captions.mismatched].mean() < 0.4
    both = clips.present["face"] & clips.present["audio"]
    assert not captions.mismatched[~both].any()
    for cue in ("audio", "text"):
        assert (captions.clips.cues[cue] == clips.cues[cue]).all()


def test_coarse_words_agree_with_the_emotions_that_they_stand_for():
    lexicon = load_lexicon()
    assert sorted(e for words in COARSE.values() for e in words) == sorted(worlds.EMOTIONS)
    disagreeing = []
    for e, word in enumerate(worlds.EMOTIONS):
        agreeing, known = agreement([word], COARSE_WORDS[COARSE_OF[e]], lexicon)
        if 2 * agreeing <= known:
            disagreeing.append(word)
    # Coarse labels lose what they have no word for.
    assert disagreeing == ["bored", "alarmed"]


def test_corpora_are_fresh_clips_with_coarse_labels(world):
    one, two = (list(demo_captions.corpus(world, k, "emotion", 60)) for k in (1, 2))
    assert {r.emotion for r in one} <= set(COARSE_WORDS)
    shared = next(
        i for i, r in enumerate(one) if "face" in r.features and "face" in two[i].features
    )
    assert not np.array_equal(one[shared].features["face"], two[shared].features["face"])
    valence = list(demo_captions.corpus(world, 3, "valence", 60))
    assert all(-1 <= r.valence <= 1 and not r.emotion for r in valence)


def test_a_small_demo_ends_in_a_table_and_is_not_made_twice(tmp_path):
    result = demo.build(tmp_path, 0, say=lambda text: None, **SMALL)
    filters = json.loads((tmp_path / demo.FILTERS_FILE).read_text())
    assert filters == result.filters and list(filters) == list(demo.FILTERS)
    assert filters["none"]["kept"] == 192
    assert all(row.keys() >= {"kept", "precision", "recall", "purity"} for row in filters.values())
    purity = {name: row["purity"] for name, row in filters.items()}
    assert purity["none"] + 0.05 < purity["low"] < purity["low+emotion+sentiment"]
    assert result.facts["length: failed and rambling dropped"] == 1
    said = list(demo.table(result, 1.0))
    assert said[0].split() == "filter kept precision recall purity right kept".split()
    facts = result.facts
    assert facts["crowd: mean single member"] <= facts["crowd: best single member"] <= 1
    assert 0.02 < facts["crowd: its standard error"] < 0.05
    assert len(said) > 6
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]
    before = {p: p.read_bytes() for p in files}
    assert {"README.md", "funnel.png", "plus.csv", "filtered.csv"} <= {p.name for p in files}
    assert demo.build(tmp_path, 0, say=lambda text: None, **SMALL).filters == filters
    assert {p: p.read_bytes() for p in files} == before
    with pytest.raises(UserError, match="holds the demo of another seed"):
        demo.build(tmp_path, 1, say=lambda text: None, **SMALL)


@pytest.mark.parametrize("seed", range(3))
def test_an_ideal_crowd_makes_the_set_purer_level_by_level(seed):
    """The real tests of the filter, with the exact posterior as the crowd."""
    lexicon = load_lexicon()
    captions = demo_captions.draw_captions(worlds.World(seed), 1500)
    of_emotion = worlds.posterior(worlds.word_evidence(captions.clips), ("face", "audio", "text"))
    valence = of_emotion @ demo_captions.VALENCE
    words = np.stack([of_emotion[:, c == COARSE_OF].sum(axis=1) for c in range(6)]).argmax(axis=0)
    polarity = RuleExtractor(lexicon).sentiments(captions.labels)
    settings = Settings(
        None, None, None, None, None, CrowdSettings(agree="majority", least_votes=1)
    )  # only these are read
    both = captions.clips.present["face"] & captions.clips.present["audio"]
    low = (captions.kind < 3) & ~captions.mismatched & both
    passed = {"emotion": low.copy(), "sentiment": low.copy()}
    for i in np.flatnonzero(low):
        said = Labelled(captions.labels[i], polarity[i], "")
        vote = Vote("", COARSE_WORDS[words[i]], 3, 3, 0.9, sentiment_of(valence[i]), 1, 1)
        emotion = judge_emotion(said, vote, settings, lexicon)
        sentiment = judge_sentiment(said, vote, settings)
        passed["emotion"][i] = emotion.outcome == PASSED
        passed["sentiment"][i] = sentiment.outcome == PASSED
    every = np.ones_like(low)
    sets = {"none": every, "low": low, **passed, "all": passed["emotion"] & passed["sentiment"]}
    purity = {name: captions.pure[chosen].mean() for name, chosen in sets.items()}
    assert 0.42 < purity["none"] < purity["low"] - 0.08
    for one in passed:
        assert purity["low"] + 0.15 < purity[one] < purity["all"] - 0.01
    assert purity["all"] > 0.87


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(3))
def test_every_level_of_the_filter_makes_the_set_purer(seed, tmp_path):
    result = demo.build(tmp_path, seed, say=lambda text: None)
    purity = {name: row["purity"] for name, row in result.filters.items()}
    assert 0.42 < purity["none"] < 0.55
    assert purity["none"] + 0.05 < purity["low"]
    for one in ("low+emotion", "low+sentiment"):
        assert purity["low"] + 0.05 < purity[one] < purity["low+emotion+sentiment"] - 0.01
    assert purity["low+emotion+sentiment"] >= 0.85
    facts = result.facts
    assert facts["length: failed and rambling dropped"] == 1
    assert facts["length: others dropped"] < 0.03
    assert facts["speaker check: right where decided"] >= 0.95
    assert facts["speaker check: unsure"] <= 0.2
    # The vote is at least as good as the best member, which only the truth tells, within its error.
    error = 2 * facts["crowd: its standard error"]
    assert facts["crowd: right"] >= facts["crowd: best single member"] - error
    # With 1,536 labelled clips a corpus, these crowds are 0.05 below what can be known: 0.033 to
    # 0.058 over worlds and draws of 2,048 clips, which differ by the error of such a share.
    assert facts["crowd: right"] >= facts["crowd: exact posterior"] - 0.05 - error
