import csv
import functools
import shutil
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.evaluation import lexicon as lexicon_module
from affectgpt_jax.evaluation.lexicon import load_lexicon

OFFICIAL = Path(__file__).parents[2].parent / "shared" / "emotion_wheel"
needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="the official lexicon is not here"
)

WHEELS_CSV = """wheel,level1,level2,level3
1,bad,hurt,ashamed
1,sad,lonely,left
1,sad,blue,Ashamed
1,glad,proud,merry
1,glad,calm,
2,joy,delight,merry
3,joy,delight,merry
4,joy,delight,merry
5,gloom,,
"""
SYNONYMS_CSV = """word,synonym
merry,jolly
left,abandoned
ashamed,guilty
gloom,guilty
"""
FORMS_CSV = """name,form
jolly,jollier
jolly,jolly
abandoned,ABANDON
abandon,abandon
guilty,guilt
blank,blanks
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def neutral(tmp_path):
    return write_neutral(tmp_path / "lexicon")


def write_neutral(directory, **changes):
    files = {
        "lexicon.json": '{"name": "by hand", "version": "1", "sources": ["none"]}',
        "wheels.csv": WHEELS_CSV,
        "synonyms.csv": SYNONYMS_CSV,
        "forms.csv": FORMS_CSV,
    }
    directory.mkdir(exist_ok=True)
    for name, text in (files | {k.replace("_", "."): v for k, v in changes.items()}).items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def sheet(path):
    """Rows of a workbook as dicts; independent of the reader of the package."""
    space = {"m": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    with zipfile.ZipFile(path) as archive:
        root = ET.fromstring(archive.read("xl/sharedStrings.xml"))
        strings = ["".join(t.text for t in si.findall("m:t", space)) for si in root]
        tree = ET.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    rows = [
        {c.get("r").rstrip("0123456789"): strings[int(c.find("m:v", space).text)] for c in row}
        for row in (
            [c for c in row if c.find("m:v", space) is not None]
            for row in tree.find("m:sheetData", space)
        )
    ]
    header = rows[0]
    return [{header[column]: row.get(column) for column in header} for row in rows[1:]]


class Direct:
    """The rules of the reference, word by word, over dicts and loops."""

    def __init__(self, directory):
        self.format = {}
        with (directory / "format.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                self.format[row["name"]] = row["format"].split(",")
        self.synonyms = {}
        for row in sheet(directory / "synonym.xlsx"):
            for n in range(1, 9):
                word = row[f"word_run{n}"].lower().strip()
                found = [s.lower().strip() for s in row[f"synonym_run{n}"].split(",")]
                self.synonyms.setdefault(word, []).extend(found)
        self.wheels = []
        for k in range(1, 6):
            tree = {}
            one = two = None
            for row in sheet(directory / f"wheel{k}.xlsx"):
                if row["level1"]:
                    one = row["level1"].lower().strip()
                if row["level2"]:
                    two = row["level2"].lower().strip()
                tree.setdefault(one, {}).setdefault(two, []).append(row["level3"].lower().strip())
            self.wheels.append(tree)
        self.bases = {}
        for name, forms in self.format.items():
            for form in [name, *forms]:
                if form:
                    self.bases.setdefault(form, []).append(name)

    @functools.cache  # noqa: B019
    def parents(self, wheel, level):
        found = {}
        for one, children in self.wheels[wheel - 1].items():
            if level == 2:
                found[one] = sorted(children)[0]
        for one, children in self.wheels[wheel - 1].items():
            for two, leaves in children.items():
                for word in ([one] if level == 1 else []) + [two, *leaves]:
                    found[word] = one if level == 1 else two
        return found

    @functools.cache  # noqa: B019
    def wheel_words(self, form):
        found = []
        for base in self.bases.get(form, []):
            for word, synonyms in self.synonyms.items():
                if base == word or base in synonyms:
                    found.append(word)
        return sorted(found)

    def label(self, form, wheel, level=1):
        parents = self.parents(wheel, level)
        for word in self.wheel_words(form):
            if word in parents:
                return parents[word]
        return None


@functools.cache
def direct():
    return Direct(OFFICIAL)


@needs_official
def test_sizes_of_the_official_lexicon():
    lexicon = load_lexicon(OFFICIAL)
    assert len(lexicon.forms) == 7386
    assert len(direct().synonyms) == 253
    assert len(direct().format) == 1255
    assert [len(labels) for labels in lexicon.labels[0]] == [6, 7, 6, 6, 6]


@needs_official
@pytest.mark.parametrize("level", [1, 2])
def test_every_surface_form_maps_as_the_rules_say(level):
    lexicon = load_lexicon(OFFICIAL)
    assert set(lexicon.forms) == set(direct().bases)
    for wheel in range(1, 6):
        for form in lexicon.forms:
            assert lexicon.label(form, wheel, level) == direct().label(form, wheel, level)


@needs_official
@given(st.text(max_size=12), st.integers(1, 5), st.integers(1, 2))
def test_other_words_have_no_label(word, wheel, level):
    lexicon = official()
    if word not in lexicon:
        assert lexicon.label(word, wheel, level) is None


@functools.cache
def official():
    return load_lexicon(OFFICIAL)


@needs_official
@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ("neutral", [None] * 5),
        ("fear", ["scared", "happy", "joyful", "genius", "joyful"]),
        ("surprise", ["surprised", "surprised", "powerful", "fear", None]),
        ("happy joy", ["happy", "happy", "joyful", "joy", "powerful"]),
        ("frustrated", ["sad", "sad", "mad", "sad", "mad"]),
        ("disgust", ["disgusted", "disgusted", None, "disgust", None]),
        ("worried", ["scared", "fearful", "scared", "fear", "scared"]),
    ],
)
def test_consequences_that_published_numbers_rest_on(words, labels):
    lexicon = load_lexicon(OFFICIAL)
    for word in words.split():
        assert [lexicon.label(word, wheel) for wheel in range(1, 6)] == labels


def test_neutral_files_by_hand(neutral):
    lexicon = load_lexicon(neutral)
    assert lexicon.identity.name == "by hand 1"
    # Through a form, a base word and a synonym; in any case, with space around it.
    assert lexicon.label(" Jollier ", 1) == "glad"
    assert lexicon.label("jollier", 1, 2) == "proud"
    assert lexicon.label("jollier", 2) == "joy"
    assert lexicon.label("jollier", 5) is None
    # A word under two parents takes the last.
    assert lexicon.label("ashamed", 1) == "sad"
    assert lexicon.label("ashamed", 1, 2) == "blue"
    # "guilt" is of "ashamed" and "gloom": the first that stands on the wheel.
    assert lexicon.label("guilt", 1) == "sad"
    assert lexicon.label("guilt", 5) == "gloom"
    # A level-1 word is, at level 2, its alphabetically first child; without children nothing.
    assert lexicon.label("glad", 1, 2) == "calm"
    assert lexicon.label("gloom", 5, 2) is None
    # Known, but on no wheel; and unknown.
    assert "blanks" in lexicon
    assert lexicon.label("blanks", 1) is None
    assert "zebra" not in lexicon
    assert lexicon.form_ids(["zebra", " BLANKS"]).tolist() == [-1, lexicon.forms.index("blanks")]


def test_a_compiled_lexicon_cannot_be_changed(neutral):
    for lexicon in (load_lexicon(neutral), load_lexicon(neutral)):
        with pytest.raises(ValueError, match="read-only"):
            lexicon.table[0] = 0
        with pytest.raises(AttributeError):
            lexicon.forms = ()


def equal(a, b):
    return (a.identity, a.forms, a.labels) == (b.identity, b.forms, b.labels) and np.array_equal(
        a.table, b.table
    )


def test_the_cache_is_used_and_says_the_same(neutral, own_cache, monkeypatch):
    compiled = load_lexicon(neutral)
    assert len(list(own_cache.rglob("*.npz"))) == 1
    monkeypatch.setattr(lexicon_module, "compile_lexicon", None)
    assert equal(load_lexicon(neutral), compiled)


def test_a_changed_source_is_another_lexicon(neutral):
    before = load_lexicon(neutral)
    write_neutral(neutral, forms_csv=FORMS_CSV.replace("blanks", "blanker"))
    after = load_lexicon(neutral)
    assert after.identity.sha256 != before.identity.sha256
    assert "blanker" in after and "blanks" not in after


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_a_damaged_cache_is_made_again(neutral, own_cache, keep):
    compiled = load_lexicon(neutral)
    [path] = own_cache.rglob("*.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert equal(load_lexicon(neutral), compiled)
    assert path.read_bytes() == whole


def test_a_cache_that_points_outside_is_made_again(neutral, own_cache):
    compiled = load_lexicon(neutral)
    [path] = own_cache.rglob("*.npz")
    with np.load(path) as arrays:
        words, table = arrays["words"], arrays["table"].copy()
    table[0, 0, 0] = 99
    np.savez(path, words=words, table=table)
    assert equal(load_lexicon(neutral), compiled)


def test_a_home_that_cannot_be_written_does_no_harm(neutral, own_cache):
    own_cache.write_text("a file, where a directory should be")
    assert load_lexicon(neutral).label("jolly", 1) == "glad"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wheels_csv": WHEELS_CSV + "6,a,b,c\n"}, r"line 11: wheel is '6'; expected 1 to 5"),
        ({"wheels_csv": WHEELS_CSV.replace("5,gloom,,\n", "")}, r"no rows of wheel 5"),
        ({"wheels_csv": WHEELS_CSV + "5,,b,c\n"}, r"line 11: level1 is empty"),
        ({"wheels_csv": "a,b\n"}, r"wheels.csv: no column 'wheel'"),
        ({"synonyms_csv": SYNONYMS_CSV + "merry,\n"}, r"line 6: expected a word in word and in"),
        ({"forms_csv": FORMS_CSV + "a,b,c\n"}, r"line 8: expected 2 cells.*found 3"),
        ({"lexicon_json": "{}"}, r"lexicon.json: the key 'name' is missing"),
        ({"lexicon_json": "["}, r"lexicon.json: not JSON"),
        (
            {"lexicon_json": '{"name": "a", "version": []}'},
            "json: version: expected a whole number",
        ),
        ({"wheel1_xlsx": "x"}, r"two lexicons"),
    ],
)
def test_trouble_with_neutral_files_is_named(tmp_path, changes, message):
    with pytest.raises(ReadError, match=message):
        load_lexicon(write_neutral(tmp_path / "lexicon", **changes))


def test_trouble_with_directories_is_named(tmp_path, neutral):
    with pytest.raises(ReadError, match="is not a directory"):
        load_lexicon(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReadError, match="holds no lexicon; expected either wheel1.xlsx"):
        load_lexicon(tmp_path / "empty")
    (neutral / "forms.csv").unlink()
    with pytest.raises(ReadError, match=r"without forms\.csv"):
        load_lexicon(neutral)


@needs_official
@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_workbook_is_named(tmp_path, damage):
    directory = tmp_path / "official"
    shutil.copytree(OFFICIAL, directory)
    path = directory / "wheel3.xlsx"
    path.chmod(0o644)
    data = path.read_bytes()
    path.unlink()
    if damage == "other":
        shutil.copy(directory / "synonym.xlsx", path)
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"level1,level2,level3")
    with pytest.raises(ReadError, match=r"wheel3\.xlsx"):
        load_lexicon(directory)
