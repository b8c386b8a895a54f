"""The crowd: members learn, the best epoch is theirs, votes are counted, shared clips are found."""

import csv
import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.data.records import Record, RecordDataset, write_records
from data_prep.crowd import __main__ as command
from data_prep.crowd import corpora, members, run
from data_prep.crowd.corpora import CrowdError
from data_prep.crowd.members import Corpus, Inputs, Settings
from data_prep.crowd.votes import Ballot, Vote, count, read_votes, sentiment_of, write_votes

SMALL = Settings(
    *(2, 2, (8,)), epochs=12, patience=12, batch_size=8, learning_rate=0.02, dropout=0.1
)
WIDTHS = {"face": 6, "audio": 5}
CLIPS = 48
WORDS = ("angry", "happy", "sad")


# --- votes ----------------------------------------------------------------------------------------


def ballot(words, probabilities, valence=None):
    return Ballot(
        words, np.array([probabilities]), None if valence is None else np.array([valence])
    )


def test_each_corpus_has_one_vote_and_words_that_it_lacks_get_none():
    ballots = [
        ballot(("happy", "sad"), [0.6, 0.4]),
        ballot(("happy", "sad", "worried"), [0.1, 0.2, 0.7]),
        ballot(("happy", "worried"), [0.9, 0.1], valence=0.4),
        ballot((), [], valence=-0.05),
        ballot((), [], valence=0.3),
    ]
    (vote,) = count(["a"], ballots, np.array([True]))
    assert (vote.emotion, vote.emotion_votes, vote.emotion_members) == ("happy", 2, 3)
    assert vote.emotion_prob == pytest.approx((0.6 + 0.1 + 0.9) / 3)
    assert (vote.sentiment, vote.sentiment_votes, vote.sentiment_members) == ("positive", 2, 3)
    assert vote.valence == pytest.approx(0.65 / 3)
    mean = np.array([1.6, 0.6, 0.8]) / 3
    assert vote.dissent == pytest.approx(-(mean * np.log(mean)).sum())
    assert count(["a"], ballots, np.array([False])) == [Vote("a")]


def test_ties_go_to_the_larger_sum_then_to_the_alphabet():
    tie = [ballot(("happy", "sad"), [0.6, 0.4]), ballot(("happy", "sad"), [0.3, 0.7])]
    assert count(["a"], tie, np.array([True]))[0].emotion == "sad"
    even = [ballot(("happy", "sad"), [0.6, 0.4]), ballot(("happy", "sad"), [0.4, 0.6])]
    assert count(["a"], even, np.array([True]))[0].emotion == "happy"
    feelings = [ballot((), [], 0.9), ballot((), [], -0.2)]
    assert count(["a"], feelings, np.array([True]))[0].sentiment == "positive"
    assert [sentiment_of(v) for v in (-0.11, -0.1, 0.1, 0.11)] == [
        *("negative", "neutral", "neutral", "positive")
    ]


def test_votes_are_read_as_they_were_written_and_checked(tmp_path):
    path = tmp_path / "votes.csv"
    votes = [Vote("a", "sad", 2, 3, 0.5, "negative", 1, 1, -0.5, 0.25), Vote("b")]
    write_votes(path, votes)
    found = read_votes(path)
    assert found["a"] == votes[0]
    assert found["b"][:4] == votes[1][:4] and math.isnan(found["b"].dissent)
    text = path.read_text()
    for old, new, message in (
        ("negative", "bad", "line 2: the sentiment 'bad' is none of"),
        ("0.2500", "much", "line 2: expected a number as dissent, found 'much'"),
        ("\nb,", "\na,", "line 3: the clip 'a' has a row already"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ReadError, match=message):
            read_votes(path)


# --- members --------------------------------------------------------------------------------------


def fields(n=CLIPS, seed=0, there=1.0):
    """Arrays and labels of clips whose class and valence are written into the features."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(len(WORDS), size=n)
    arrays = {}
    for name, width in WIDTHS.items():
        centre = np.random.default_rng(len(name)).normal(0, 2, (len(WORDS), width))
        values = centre[truth] + rng.normal(0, 0.5, (n, width))
        arrays[name] = (values * (rng.random((n, 1)) < there)).astype(np.float16)
    return arrays, truth


def test_a_member_is_merbench_attention_without_a_softmax():
    member = members.init_member(np.random.default_rng(0), WIDTHS, 8, 3)
    inputs = {n: a[:4].astype(np.float32) for n, a in fields()[0].items()}
    logits, valence = members.forward(member, inputs, lambda name, x: x)

    def encode(layers, x):
        for layer in layers:
            x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        return x

    codes = [encode(member["encoders"][name], inputs[name]) for name in ("audio", "face")]
    hidden = encode(member["attention"], np.concatenate(codes, axis=1))
    weights = hidden @ member["weights"]["kernel"] + member["weights"]["bias"]
    fused = weights[:, :1] * codes[0] + weights[:, 1:] * codes[1]
    for found, head in ((logits, "emotion"), (valence[:, None], "valence")):
        expected = fused @ member[head]["kernel"] + member[head]["bias"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    bound = WIDTHS["face"] ** -0.5
    kernel = member["encoders"]["face"][0]["kernel"]
    assert 0.9 * bound < np.abs(kernel).max() <= bound


def test_the_validation_score_is_weighted_f1_less_a_quarter_of_the_error():
    truth = np.array([0, 0, 0, 1, 1, 2, -1])
    guess = np.array([0, 0, 1, 1, 2, 2, 0])
    valence = np.array([0.5, np.nan, 0, 0, 0, 0, 0], np.float32)
    predicted = np.full(7, 0.1, np.float32)
    f1 = (3 * 0.8 + 2 * 0.5 + 1 * 2 / 3) / 6
    error = (0.16 + 5 * 0.01) / 6
    arguments = np.eye(3)[guess], predicted, truth, valence
    for has, expected in (
        ((True, False), f1),
        ((True, True), f1 - 0.25 * error),
        ((False, True), -error),
    ):
        score = members.validation_score(*map(jax.numpy.asarray, arguments), has)
        assert float(score) == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def trained():
    """Members of a corpus with emotions, and it."""
    arrays, truth = fields()
    names = [f"clip-{i}" for i in range(CLIPS)]
    corpus = Corpus("a", Inputs(names, arrays), WORDS, truth, np.full(CLIPS, np.nan, np.float32))
    return corpus, members.train_group(corpus, 8, SMALL, lambda *_: None)


def test_members_learn_and_keep_the_epoch_that_was_best_on_their_fold(trained):
    corpus, group = trained
    assert group.folds == [0, 0, 1, 1] and group.seeds == [0, 1, 0, 1]
    assert min(group.scores) > 0.8
    probabilities, _ = members.predict(group.params, corpus.inputs)
    assert probabilities.shape == (4, CLIPS, 3)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-5)
    rng = np.random.default_rng([SMALL.seed, CLIPS, 8])
    fold_of = rng.permutation(CLIPS) % SMALL.folds
    for member, fold in enumerate(group.folds):
        mine = np.flatnonzero(fold_of == fold)
        score = members.validation_score(
            jax.numpy.log(probabilities[member, mine]),
            jax.numpy.zeros(len(mine)),
            jax.numpy.asarray(corpus.emotion[mine]),
            jax.numpy.zeros(len(mine)),
            (True, False),
        )
        assert float(score) == pytest.approx(group.scores[member], abs=1e-5)
    # Seeds and folds make members of their own.
    kernels = group.params["encoders"]["face"][0]["kernel"]
    assert all(np.abs(kernels[0] - kernels[i]).max() > 0.01 for i in (1, 2, 3))


# --- directories of records -----------------------------------------------------------------------


def write(folder, seed, n=CLIPS, prefix="clip", encoder="e", words=WORDS, **labels):
    """A record directory of labelled clips; one has no feature at all."""
    arrays, truth = fields(n, seed)
    records = []
    for i in range(n):
        features = {m: a[i : i + 1].repeat(2, axis=0) for m, a in arrays.items()}
        kept = labels or {"emotion": words[truth[i]]}
        kept = {k: v[truth[i]] if isinstance(v, list) else v for k, v in kept.items()}
        features = {} if i == n - 1 else features
        records.append(Record(name=f"{prefix}-{seed}-{i}", features=features, **kept))
    write_records(folder, records, encoders=dict.fromkeys(WIDTHS, encoder))
    return folder, truth


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A crowd of two corpora that shares ten clips with those that it votes on."""
    root = tmp_path_factory.mktemp("crowd")
    write(root / "a", 1)
    write(root / "b", 2, valence=[-5.0, 4.0, -2.0], valence_range=(-5.0, 5.0))
    _, truth = write(root / "voted", 3)
    with (root / "a" / "extraction.csv").open("w") as file:
        file.writelines(["name,status,sha256\n", *(f"clip-1-{i},ok,h{i}\n" for i in range(10))])
    with (root / "voted" / "extraction.csv").open("w") as file:
        file.writelines(["name,status,sha256\n", *(f"clip-3-{i},ok,h{i}\n" for i in range(5))])
    sets = {"a": root / "a", "b": root / "b"}
    heads = {"a": ("emotion",), "b": ("valence",)}
    settings = {"folds": 2, "seeds": 2, "hidden": (8,), "epochs": 12, "patience": 12}
    settings |= {"batch_size": 8, "learning_rate": 0.02, "dropout": 0.1}
    said = []
    run.train(sets, root / "crowd", heads=heads, text=False, say=said.append, **settings)
    return root, sets, heads, settings, truth, said


def test_a_crowd_votes_as_the_truth_is_and_tells_of_clips_that_it_knows(crowd):
    root, _, _, _, truth, _ = crowd
    said = []
    votes = run.vote(root / "crowd", root / "voted", root / "votes.csv", say=said.append)
    assert votes[-1] == Vote(f"clip-3-{CLIPS - 1}")
    right = [vote.emotion == WORDS[t] for vote, t in zip(votes[:-1], truth)]
    assert np.mean(right) > 0.85
    feelings = ("negative", "positive", "negative")
    right = [vote.sentiment == feelings[t] for vote, t in zip(votes[:-1], truth)]
    assert np.mean(right) > 0.85
    assert [read_votes(root / "votes.csv")[v.name].emotion for v in votes] == [
        v.emotion for v in votes
    ]
    assert "5 clips of a have the same file as one of" in said[0]
    summary = json.loads((root / "crowd" / "members.json").read_text())
    assert [row["clips"] for row in summary["leaks"]["found"]] == [5]
    facts = {f["name"]: f for f in summary["corpora"]}
    assert facts["a"]["classes"] == list(WORDS) and not facts["a"]["valence"]
    assert facts["b"]["valence"] and facts["b"]["members"] == 4
    assert "5 clips of a have the same file" in (root / "crowd" / "report.md").read_text()


def test_finished_corpora_are_kept_and_lost_ones_are_the_same_again(crowd):
    root, sets, heads, settings, _, _ = crowd
    before = {p.name: p.read_bytes() for p in (root / "crowd").iterdir()}
    (root / "crowd" / "b.json").unlink()
    said = []
    run.train(sets, root / "crowd", heads=heads, text=False, say=said.append, **settings)
    assert said[0] == "a: finished before" and said[1].startswith("b: 47 clips")
    after = {p.name: p.read_bytes() for p in (root / "crowd").iterdir()}
    for name in ("a.safetensors", "b.safetensors", "a.json", "b.json"):
        assert before[name] == after[name]


def test_clips_of_a_test_set_are_not_learned(crowd, tmp_path, monkeypatch):
    root, sets, heads, settings, _, _ = crowd
    learned = {}

    def train_group(corpus, *_):
        learned[corpus.name] = corpus.inputs.names
        raise KeyboardInterrupt

    monkeypatch.setattr(members, "train_group", train_group)
    with pytest.raises(KeyboardInterrupt):
        run.train(
            {"a": sets["a"]},
            tmp_path / "crowd",
            heads=heads,
            text=False,
            against=[root / "voted"],
            say=lambda _: None,
            **settings,
        )
    assert set(learned["a"]) == {f"clip-1-{i}" for i in range(5, CLIPS - 1)}


def test_what_two_directories_share_is_told_by_kind():
    a = {
        "name": ["x", "y", "z"],
        "file": ["1", "", "3"],
        "features": {"face of e": ["p", "q", ""], "audio of e": ["s", "t", "u"]},
    }
    b = {"name": ["z", "w"], "file": ["1", ""], "features": {"face of e": ["q", ""]}}
    assert corpora.shared(a, b) == {"file": ["x"], "features": ["y"], "name": ["z"]}
    assert corpora.compared_by(a, b) == ["files", "face of e"]
    # Another encoder says nothing, whatever its numbers; one feature of the same is enough.
    b["features"] = {"face of f": ["q", ""], "audio of e": ["", "u"]}
    assert corpora.shared(a, b)["features"] == ["z"]
    assert corpora.compared_by(a, b) == ["files", "audio of e"]


def same_clips(folder, prefix, features=("face", "audio"), encoder="e", says="hi", labels=True):
    """A record directory of 24 clips, the same ones whatever they are called."""
    rng = np.random.default_rng(9)
    records = []
    for i in range(24):
        found = {n: rng.normal(size=(2, w)).astype(np.float16) for n, w in WIDTHS.items()}
        kept = {n: found[n] for n in features}
        word = {"emotion": WORDS[i % 3]} if labels else {}
        records.append(Record(name=f"{prefix}{i}", features=kept, subtitle=f"{says} {i}", **word))
    write_records(folder, records, encoders=dict.fromkeys(features, encoder))
    return folder


QUICK = {"folds": 2, "seeds": 1, "hidden": (4,), "epochs": 1, "patience": 1, "batch_size": 8}


def test_clips_are_found_by_the_features_that_both_sides_have(tmp_path):
    mine, heads = same_clips(tmp_path / "mine", "a"), {"mine": ("emotion",)}
    half = RecordDataset(same_clips(tmp_path / "whole", "b", features=("face",)))
    write_records(tmp_path / "test", [half[i] for i in range(8)], encoders={"face": "e"})
    voted = RecordDataset(same_clips(tmp_path / "all", "v", labels=False))
    clips = [voted[i] for i in range(12)]
    write_records(tmp_path / "voted", clips, encoders=dict.fromkeys(WIDTHS, "e"))
    other = same_clips(tmp_path / "other", "c", encoder="f")
    against = [tmp_path / "test", tmp_path / "voted", other]
    said = []
    run.train({"mine": mine}, tmp_path / "crowd", heads=heads, text=False, against=against,
              say=said.append, **QUICK)  # fmt: skip
    about = json.loads((tmp_path / "crowd" / "mine.json").read_text())
    assert about["marks"]["name"] == [f"a{i}" for i in range(12, 24)] and about["clips"] == 12
    assert f"mine and {against[0]} were compared by face of e, and names" in said
    assert f"mine and {other} were compared by names alone: they have no encoder in common" in said
    rows = json.loads((tmp_path / "crowd" / "members.json").read_text())["leaks"]["found"]
    # The voted clips are test clips, too.
    assert [(row["in"], row["and"], row["clips"]) for row in rows] == [
        ("mine", str(against[0]), 8),
        ("mine", str(against[1]), 12),
        (str(against[0]), str(against[1]), 8),
    ]
    # What was left out is no leak.
    said.clear()
    run.vote(tmp_path / "crowd", against[1], tmp_path / "votes.csv", say=said.append)
    assert not said
    report = (tmp_path / "crowd" / "report.md").read_text()
    assert "12 clips of mine were left out of training" in report
    assert report.count("have the same features") == 2


def test_what_several_clips_have_in_common_makes_none_of_them_another(tmp_path):
    sets, silence = {}, np.ones((2, WIDTHS["audio"]), np.float16)
    for name in ("mine", "test"):
        drawn = RecordDataset(same_clips(tmp_path / f"{name}-drawn", name))
        clips = [drawn[i] for i in range(4)]
        clips = [
            dataclasses.replace(
                clip,
                features={"face": clip.features["face"] + (name == "mine"), "audio": silence},
            )
            for clip in clips
        ]
        write_records(tmp_path / name, clips, encoders=dict.fromkeys(WIDTHS, "e"))
        sets[name] = corpora.read_clips(tmp_path / name, name).marks
    assert corpora.shared(sets["mine"], sets["test"]) == {}


def test_a_corpus_whose_subtitles_have_changed_is_trained_again(tmp_path):
    heads = {"s": ("emotion",)}
    said = []

    def train(sets, **options):
        said.clear()
        run.train({"s": sets}, tmp_path / "crowd", heads=heads, say=said.append, **options, **QUICK)
        return (tmp_path / "crowd" / "s.safetensors").read_bytes()

    first = same_clips(tmp_path / "first", "a")
    before = train(first)
    assert train(first) == before and said[0] == "s: finished before"
    assert train(same_clips(tmp_path / "second", "a", says="no, not")) != before
    # Members stay where a hash of a file is new; the marks do not.
    assert train(first) == before
    (first / "extraction.csv").write_text("name,status,sha256\na0,ok,h0\n")
    assert train(first) == before and said[0] == "s: finished before"
    about = json.loads((tmp_path / "crowd" / "s.json").read_text())
    assert about["marks"]["file"][0] == "h0"
    # A file of another version is no reason to stop.
    (tmp_path / "crowd" / "s.json").write_text("{}")
    assert train(first) == before and said[0].startswith("s: 24 clips")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": {"a": ("mood",)}}, "the corpus a is to teach mood; expected emotion or valence"),
        ({"heads": {"a": ("valence",)}}, "no clip has the label 'valence'"),
        ({"folds": 1}, "folds is 1; expected 2 or more"),
        ({"folds": 30}, "has 47 clips to learn from; expected 60"),
        ({"sets": {"a/b": "."}}, "'a/b' cannot be a corpus"),
        ({"sets": {"members": "."}}, "'members' cannot be a corpus: members.json is about all"),
    ],
)
def test_what_cannot_be_trained_is_refused(crowd, tmp_path, change, message):
    _, sets, heads, settings, _, _ = crowd
    arguments = {"sets": {"a": sets["a"]}, "heads": heads} | settings | change
    with pytest.raises(CrowdError, match=message):
        run.train(out=tmp_path / "crowd", text=False, say=lambda _: None, **arguments)
    assert not (tmp_path / "crowd").exists()


def test_features_of_other_encoders_and_unknown_classes_are_refused(crowd, tmp_path):
    root, sets, heads, settings, _, _ = crowd
    write(tmp_path / "other", 5, encoder="f")
    with pytest.raises(CrowdError, match="a and c have different features"):
        run.train(
            {"a": sets["a"], "c": tmp_path / "other"},
            tmp_path / "crowd",
            heads=heads | {"c": ("emotion",)},
            text=False,
            **settings,
        )
    with pytest.raises(CrowdError, match="the crowd learned face from .'e', 6.*has .'f', 6"):
        run.vote(root / "crowd", tmp_path / "other", tmp_path / "votes.csv")
    write(tmp_path / "words", 6, words=("qwertz", "happy", "sad"))
    with pytest.raises(CrowdError, match="does not know the classes 'qwertz'"):
        run.train(
            {"w": tmp_path / "words"},
            tmp_path / "crowd",
            heads={"w": ("emotion",)},
            text=False,
            **settings,
        )


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("members.json", lambda s: [], "members.json: expected a JSON object, found"),
        ("members.json", lambda s: s | {"corpora": [{}]}, r"corpora\[0\]: the key 'classes' is mi"),
        ("members.json", lambda s: s | {"leaks": {}}, "leaks: the key 'compared' is missing"),
        (
            "members.json",
            lambda s: s | {"corpora": [s["corpora"][0] | {"name": "../a"}]},
            "'../a' cannot be a corpus",
        ),
        ("a.json", lambda s: s | {"hidden": ["8"]}, r"a.json: hidden\[0\]: expected a whole"),
        ("a.json", lambda s: s | {"marks": {}}, "a.json: marks: the key"),
        ("a.json", lambda s: s | {"hidden": [9]}, "a.safetensors: not the members that a.json"),
        ("a.json", lambda s: s | {"classes": ["x"]}, "answers with 3 classes, and a.json names 1"),
    ],
)
def test_a_crowd_of_another_form_is_refused_by_file_and_key(crowd, tmp_path, file, change, message):
    root, *_ = crowd
    copy = shutil.copytree(root / "crowd", tmp_path / "crowd")
    (copy / file).write_text(json.dumps(change(json.loads((copy / file).read_text()))))
    with pytest.raises(CrowdError, match=message):
        run.vote(copy, root / "voted", tmp_path / "votes.csv", say=lambda _: None)
    assert not (tmp_path / "votes.csv").exists()


def test_spellings_of_public_corpora_are_one_word():
    assert [corpora.canonical(w) for w in (" Joy", "ang", "worried", "neu", "bored")] == [
        *("happy", "angry", "worried", "neutral", "bored")
    ]


def test_the_text_of_a_subtitle_is_the_mean_of_its_states():
    from affectgpt_jax.models.affectgpt import AffectGPT, hidden_states
    from affectgpt_jax.models.decoder import Decoder
    from affectgpt_jax.weights.huggingface import read_config
    from data_prep.crowd.text import TextEncoder

    encoder = TextEncoder(run.shipped_base())
    texts = ["I told you so!", "", "I told you so!", "Where is my blue umbrella?"]
    found = encoder(texts)
    assert found.shape == (4, encoder.width) and not found[1].any()
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[3]).max() > 0.1
    ids = encoder._tokenizer.encode(texts[:1])[0][None]
    model = AffectGPT(Decoder(read_config(run.shipped_base())), None)
    batch = {
        "tokens": ids,
        "positions": np.arange(ids.shape[1])[None],
        "segment_ids": np.ones_like(ids),
    }
    states, _ = hidden_states(model, encoder._base, {"lora": {}, "fusion": {}}, batch)
    np.testing.assert_allclose(found[0], states[0].mean(axis=0), rtol=2e-3, atol=2e-3)


def test_the_command_votes_and_refuses_wrong_flags(crowd, tmp_path, capsys):
    root, *_ = crowd
    out = tmp_path / "votes.csv"
    records = root / "voted"
    command.main(["vote", f"--crowd={root / 'crowd'}", f"--records={records}", f"--out={out}"])
    assert f"{CLIPS} clips" in capsys.readouterr().out
    with out.open() as file:
        assert len(list(csv.DictReader(file))) == CLIPS
    for flags, message in (
        (["train", "--out=x", "--set=a=b"], "expected NAME:emotion,valence=DIR"),
        (["train", "--out=x", "--set=a:emotion=b", "--set=a:emotion=c"], "names 'a' 2 times"),
    ):
        with pytest.raises(SystemExit) as end:
            command.main(flags)
        assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_crowd_of_the_demo_world_comes_near_its_posterior(tmp_path):
    """With 1,500 labelled clips a corpus the vote is within 5 points of the exact posterior."""
    from affectgpt_jax.data import demo, demo_captions

    world, size = demo.World(0), 2048
    enc = dict.fromkeys(("face", "audio"), "demo")
    heads = {f"c{k}": ("emotion",) for k in range(3)}
    for k in range(3):
        clips = demo_captions.corpus(world, k, "emotion", 1500)
        write_records(tmp_path / f"c{k}", clips, encoders=enc)
    sets = {name: tmp_path / name for name in heads}
    run.train(sets, tmp_path / "crowd", heads=heads, folds=3, seeds=1, epochs=15)
    rates = demo_captions.Rates(mismatched=0)
    captions = demo_captions.draw_captions(world, size, rates)
    records = demo_captions.caption_records(world, captions)
    write_records(tmp_path / "voted", records, encoders=enc)
    votes = run.vote(tmp_path / "crowd", tmp_path / "voted", tmp_path / "votes.csv")
    truth = demo_captions.COARSE_OF[captions.clips.emotion]
    there = np.array([bool(vote.emotion) for vote in votes])
    right = np.array(
        [vote.emotion == demo_captions.COARSE_WORDS[t] for vote, t in zip(votes, truth)]
    )[there].mean()
    exact = demo.posterior(demo.word_evidence(captions.clips), tuple(demo.CUES))
    classes = np.eye(len(demo_captions.COARSE_WORDS))[demo_captions.COARSE_OF]
    best = ((exact @ classes).argmax(axis=1) == truth)[there].mean()
    # benchmarks.crowd has the distance by the number of labelled clips.
    error = math.sqrt(right * (1 - right) / there.sum())
    assert best - 0.05 - 2 * error < right < best + 2 * error
