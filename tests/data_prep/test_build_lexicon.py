"""The lexicon that ships, and the script that made it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from affectgpt_jax import score
from affectgpt_jax.data import demo
from affectgpt_jax.evaluation.lexicon import load_lexicon
from data_prep import lexicon as builder

FILES = {"lexicon.json", "wheels.csv", "synonyms.csv", "forms.csv", "NOTICE"}
CONTROL, HELD = "unpleasant and in control", "unpleasant and not in control"
GLAD, MOVED = "pleasant and in control", "pleasant and not in control"
# Level 1 by wheel: Plutchik, Willcox, Shaver-Parrott, Geneva, Roberts.
EXPECTED = {
    "happily": ("joy", "joyful", "joy", GLAD, "happy"),
    "happier": ("joy", "joyful", "joy", GLAD, "happy"),
    "happiness": ("joy", "joyful", "joy", GLAD, "happy"),
    "joyful": ("joy", "joyful", "joy", GLAD, "happy"),
    "excitement": ("joy", "joyful", "joy", GLAD, "surprised"),
    "calm": ("joy", "peaceful", "joy", MOVED, "happy"),
    "relieved": ("joy", "peaceful", "joy", MOVED, "happy"),
    "proudly": ("joy", "powerful", "joy", GLAD, "happy"),
    "love": ("joy", "peaceful", "love", MOVED, "happy"),
    "grateful": ("trust", "peaceful", None, None, "happy"),
    "sadness": ("sadness", "sad", "sadness", HELD, "sad"),
    "depressed": ("sadness", "sad", "sadness", HELD, "sad"),
    "lonely": ("sadness", "sad", "sadness", HELD, "sad"),
    "disappointed": ("sadness", "sad", "sadness", CONTROL, "sad"),
    "ashamed": ("fear", "sad", "sadness", HELD, "sad"),
    "angrily": ("anger", "mad", "anger", CONTROL, "angry"),
    "furious": ("anger", "mad", "anger", CONTROL, "angry"),
    "frustrated": ("anger", "mad", "anger", CONTROL, "angry"),
    "disgust": ("disgust", "mad", "anger", CONTROL, "disgusted"),
    "anxiety": ("fear", "scared", "fear", HELD, "fearful"),
    "anxiously": ("fear", "scared", "fear", HELD, "fearful"),
    "worried": ("fear", "scared", "fear", HELD, "fearful"),
    "fear": ("fear", "scared", "fear", HELD, "fearful"),
    "terrified": ("fear", "scared", "fear", HELD, "fearful"),
    # Willcox has "surprised" under "powerful".
    "surprised": ("surprise", "powerful", "surprise", MOVED, "surprised"),
    "amazed": ("surprise", "powerful", "surprise", MOVED, "surprised"),
    "bored": ("disgust", "sad", None, None, "bad"),
    "neutral": (None, None, None, None, None),
}
POSITIVE = (
    {"joy", "trust"},
    {"joyful", "powerful", "peaceful"},
    {"love", "joy"},
    {GLAD, MOVED},
    {"happy"},
)
NEGATIVE = (
    {"fear", "sadness", "disgust", "anger"},
    {"sad", "mad", "scared"},
    {"anger", "sadness", "fear"},
    {CONTROL, HELD},
    {"sad", "bad", "fearful", "angry", "disgusted"},
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(name):
    with (builder.ASSET / name).open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def labels(lexicon, word, level=1):
    return tuple(lexicon.label(word, wheel, level) for wheel in range(1, 6))


def test_it_loads_without_jax(tmp_path):
    code = (
        "import sys; from affectgpt_jax.evaluation.lexicon import load_lexicon; "
        "print(load_lexicon().identity.name, 'jax' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "AffectGPT-JAX default lexicon 1 False"


def test_it_is_small_and_says_where_it_is_from():
    assert {path.name for path in builder.ASSET.iterdir()} == FILES
    assert sum(path.stat().st_size for path in builder.ASSET.iterdir()) < 500_000
    about = json.loads((builder.ASSET / "lexicon.json").read_text(encoding="utf-8"))
    assert [wheel["wheel"] for wheel in about["wheels"]] == [1, 2, 3, 4, 5]
    assert all(wheel["citation"] for wheel in about["wheels"])
    assert all(source["licence"] for source in about["sources"])
    notice = (builder.ASSET / "NOTICE").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice


@pytest.mark.parametrize("name", ["wheels.csv", "synonyms.csv", "forms.csv"])
def test_rows_are_sorted_lower_case_and_there_once(name):
    found = rows(name)
    assert found == sorted(found)
    assert len(found) == len(set(map(tuple, found)))
    for cell in (cell for row in found for cell in row):
        assert cell == cell.strip().lower()
        assert "_" not in cell
    if name != "wheels.csv":
        assert all(cell for row in found for cell in row)


def test_a_form_belongs_to_one_base_word():
    forms = [form for _, form in rows("forms.csv")]
    assert len(forms) == len(set(forms))


@pytest.mark.parametrize("wheel", [1, 2, 3, 4, 5])
def test_every_wheel_word_maps_to_its_own_parent(wheel):
    lexicon = load_lexicon()
    of_wheel = [row[1:] for row in rows("wheels.csv") if row[0] == str(wheel)]
    for level in (1, 2):
        last = {}
        for row in of_wheel:
            # At level 2 the level-1 words have their own rule.
            last |= {word: row[level - 1] for word in row[level - 1 :] if word}
        for word, parent in last.items():
            assert lexicon.label(word, wheel, level) == parent, (word, level)


def test_every_wheel_has_labels_at_both_levels():
    lexicon = load_lexicon()
    assert [len(names) for names in lexicon.labels[0]] == [8, 6, 6, 4, 7]
    assert [len(names) for names in lexicon.labels[1]] == [48, 36, 25, 20, 41]


@pytest.mark.parametrize("word", EXPECTED)
def test_common_words_map_as_a_reader_expects(word):
    lexicon = load_lexicon()
    assert word in lexicon
    assert labels(lexicon, word) == EXPECTED[word]


@pytest.mark.parametrize("word", demo.EMOTIONS)
def test_words_of_the_demo_world_are_known_and_keep_their_valence(word):
    lexicon = load_lexicon()
    found = labels(lexicon, word)
    assert sum(label is not None for label in found) >= 3
    negative = demo.EMOTIONS.index(word) < len(demo.EMOTIONS) // 2
    opposite = POSITIVE if negative else NEGATIVE
    assert not any(label in classes for label, classes in zip(found, opposite, strict=True))


def test_families_keep_their_valence():
    families, _ = builder.read_families()
    lexicon = load_lexicon()
    opposite = {"positive": NEGATIVE, "negative": POSITIVE, "neither": [set()] * 5}
    # Willcox has nurturing as peaceful, and Geneva pity as unpleasant.
    exempt = {"pity"}
    for family in families:
        for word, wheel, classes in zip(family.on, range(1, 6), opposite[family.valence]):
            if word and family.name not in exempt:
                assert lexicon.label(word, wheel) not in classes, (family.name, wheel)


def test_seeds_have_the_places_of_their_families():
    families, _ = builder.read_families()
    places = [builder.parents(wheel["rows"]) for wheel in builder.read_wheels()]
    lexicon = load_lexicon()
    total = other_child = 0
    for family in families:
        for seed in map(builder.spell, family.words):
            for wheel, (word, place) in enumerate(zip(family.on, places, strict=True), start=1):
                one, two = place.get(seed) or place.get(word) or (None, None)
                assert lexicon.label(seed, wheel) == one, (seed, wheel)
                total += 1
                other_child += lexicon.label(seed, wheel, 2) != two
    assert other_child < 0.01 * total


def test_scoring_needs_no_lexicon_option(capsys, tmp_path):
    (tmp_path / "truth.csv").write_text('name,openset\na,"sad, angry"\nb,happiness\n')
    (tmp_path / "predictions.csv").write_text("name,openset\na,sadness\nb,zebra\n")
    arguments = [f"--truth={tmp_path / 'truth.csv'}", f"--json={tmp_path / 'report.json'}"]
    predictions = ["--predictions", str(tmp_path / "predictions.csv")]
    score.main(["--task=fine", "--bootstrap=0", *arguments, *predictions])
    out = capsys.readouterr().out
    assert "lexicon: AffectGPT-JAX default lexicon 1 (sha256 " in out
    assert "unknown predicted words: 'zebra' x 1" in out
    [result] = json.loads((tmp_path / "report.json").read_text())["results"]
    # Of a: P = 1, R = 1/2; of b: nothing. On every wheel sad and angry are of two classes.
    assert [result["values"][name] for name in ("p", "r")] == pytest.approx([0.5, 0.25])
    assert result["lexicon"]["name"] == "AffectGPT-JAX default lexicon 1"


def test_the_script_repeats_byte_by_byte(tmp_path):
    if not (builder.wordnet_directory() / "data.noun").is_file():
        pytest.skip("WordNet is not installed")
    builder.main(["--out", str(tmp_path / "made")])
    for name in FILES:
        assert (tmp_path / "made" / name).read_bytes() == (builder.ASSET / name).read_bytes(), name


@pytest.mark.parametrize(
    ("word", "part", "irregular", "expected"),
    [
        ("worry", "n", [], ["worries"]),
        ("joy", "n", [], ["joys"]),
        ("bliss", "n", [], ["blisses"]),
        ("sadness", "n", [], []),
        ("worry", "v", [], ["worries", "worried", "worrying"]),
        ("enjoy", "v", [], ["enjoys", "enjoyed", "enjoying"]),
        ("amuse", "v", [], ["amuses", "amused", "amusing"]),
        ("grin", "v", [], ["grins", "grinned", "grinning"]),
        ("weep", "v", ["wept"], ["weeps", "wept", "weeping"]),
        ("regret", "v", ["regretted", "regretting"], ["regrets", "regretted", "regretting"]),
        ("calm", "a", [], ["calmer", "calmest"]),
        ("sad", "a", [], ["sadder", "saddest"]),
        ("tense", "a", [], ["tenser", "tensest"]),
        ("gloomy", "a", [], ["gloomier", "gloomiest"]),
        ("bad", "a", ["worse", "worst"], ["worse", "worst"]),
        ("joyful", "a", [], []),
        ("bored", "a", [], []),
        ("happily", "r", [], []),
        ("calm_down", "v", [], []),
    ],
)
def test_inflections(word, part, irregular, expected):
    assert builder.inflections(word, part, {word: irregular}) == expected


# An adjective of feeling (offset 1) with a satellite (2) and the feeling (3); "glad" also is one.
WORDNET = {
    "adj": "1 00 a 01 glad(p) 0 002 & 2 a 0000 + 3 n 0101 | happy\n"
    "2 00 s 02 elate 0 Ed 0 001 + 3 n 0101 | up\n"
    "4 00 s 01 lamplit 0 001 & 1 a 0000 | of light\n",
    "noun": "3 12 n 01 gladness 0 002 + 1 a 0101 + 2 a 0101 | joy\n",
    "verb": "",
    "adv": "5 02 r 01 gladly 0 001 \\ 1 a 0101 | with joy\n",
}
INDEX = {
    "adj": "glad a 1 1 & 1 1 1\nelate a 1 0 1 0 2\ned a 1 0 1 0 2\nlamplit a 1 0 1 0 4\n",
    "noun": "gladness n 1 0 1 0 3\n",
    "verb": "",
    "adv": "gladly r 1 0 1 0 5\n",
}


@pytest.fixture
def wordnet(tmp_path):
    licence = "  1 This software is provided to you\n"
    for name in WORDNET:
        (tmp_path / f"data.{name}").write_text(licence + WORDNET[name])
        (tmp_path / f"index.{name}").write_text(licence + INDEX[name])
        (tmp_path / f"{name}.exc").write_text("gladder glad\n" if name == "adj" else "")
    return builder.read_wordnet(tmp_path)


def test_a_family_is_widened_by_synonyms_and_forms(wordnet):
    family = builder.Family("joy", "positive", ("joy",) * 5, ("glad",))
    owner = builder.widen(wordnet, [family], frozenset())
    # "Ed" is a name, and "lamplit" not of feelings.
    assert {form: base.word for form, base in owner.items()} == {
        "glad": "glad",
        "gladder": "glad",
        "gladness": "glad",
        "gladly": "glad",
        "elate": "elate",
    }
    assert builder.widen(wordnet, [family], frozenset({"elate", "gladly"})).keys() == {
        "glad", "gladder", "gladness",
    }  # fmt: skip


def test_a_word_between_two_valences_is_left_out(wordnet):
    good = builder.Family("joy", "positive", ("joy",) * 5, ("glad",))
    bad = builder.Family("gloom", "negative", ("gloom",) * 5, ("gladness",))
    wordnet.senses["elate"]["n"] = [("n", "3")]
    wordnet.synsets["n", "3"] = wordnet.synsets["n", "3"]._replace(words=("gladness", "elate"))
    assert "elate" not in builder.widen(wordnet, [good, bad], frozenset())
    assert "elate" in builder.widen(wordnet, [good, bad._replace(valence="positive")], frozenset())


def test_a_wheel_word_that_would_shadow_another_is_replaced():
    one = builder.parents([("joy", "cheer", ""), ("joy", "mirth", ""), ("rage", "anger", "")])
    two = builder.parents([("glad", "merry", ""), ("cross", "cheer", "")])
    # "cheer" is meant for the first wheel, and would decide the second too.
    assert builder.stand_for("jolly", ("cheer", "merry"), (one, two)) == ["joy", "merry"]
    # A word chosen later may come first, which puts right what an earlier one shadowed.
    three = builder.parents([("glad", "apt", ""), ("cross", "cheer", "")])
    assert builder.stand_for("jolly", ("cheer", "apt"), (one, three)) == ["apt", "cheer"]
    # A word's own place stays, and "" is no place.
    assert builder.stand_for("mirth", ("cheer", ""), (one, two)) == []
    with pytest.raises(ValueError, match="'jolly': no choice of wheel words gives"):
        builder.stand_for("jolly", ("cheer", ""), (builder.parents([("cheer", "", "")]), two))


@pytest.mark.parametrize(
    ("words", "on", "left_out", "message"),
    [
        (("glad joy", "glad"), "joy", "", "seeds of two families: glad"),
        (("glad joy", "merry"), "joy", "glad", "seeds that are left out: glad"),
        (("glad", "merry"), "joy", "", "wheel words of no family: joy"),
        (("glad joy", "merry"), "bliss", "", "first: no 'bliss' on wheel 1"),
    ],
)
def test_contradictions_of_the_hand_written_files_are_named(words, on, left_out, message):
    families = [
        builder.Family("first", "positive", (on,), tuple(words[0].split())),
        builder.Family("second", "positive", ("",), tuple(words[1].split())),
    ]
    with pytest.raises(ValueError, match=message):
        builder.check(families, left_out.split(), [[("joy", "", "")]])


def test_a_missing_wordnet_is_named(tmp_path):
    with pytest.raises(SystemExit, match="data.noun is missing; expected WordNet 3.0's database"):
        builder.main(["--wordnet", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not Path(tmp_path / "out").exists()
