"""Tables and pictures of what record directories hold."""

import csv

import numpy as np
import pytest
from PIL import Image

from affectgpt_jax.common import drawing
from affectgpt_jax.data.records import Record, write_records
from data_prep import statistics

FEATURE = np.ones((8, 4), np.float16)


@pytest.fixture
def directories(tmp_path):
    train = [
        Record(name="a", labels=("sad", "calm"), description="one two three", features={}),
        Record(name="b", labels=("sad",), subtitle="hi", features={"face": FEATURE}),
        Record(name="c", description=" ".join(["word"] * 45), features={"face": FEATURE}),
    ]
    test = [Record(name="d", emotion="happy", features={"audio": FEATURE})]
    encoders = {"face": "x", "audio": "y"}
    write_records(tmp_path / "train", train, encoders=encoders)
    write_records(tmp_path / "test", test, encoders=encoders)
    (tmp_path / "train" / "extraction.csv").write_text(
        "name,seconds\na,2.5\nb,3.5\nlost,90\nc,\n", encoding="utf-8"
    )
    return tmp_path


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_counts_clips_labels_words_and_seconds(directories):
    places = [f"{directories / 'train'}", f"eval={directories / 'test'}"]
    statistics.main(["--records", *places, f"--out={directories / 'out'}"])
    train, test = read(directories / "out" / "statistics.csv")
    expected = {
        "set": "train",
        "clips": "3",
        "hours": "0.0017",
        "labelled clips": "2",
        "label vocabulary": "2",
        "described clips": "2",
        "clips with a subtitle": "1",
        "labels per clip, mean": "1.5",
        "words per description, mean": "24.0",
        "words per description, largest": "45",
        "seconds per clip, median": "3.0",
        "clips with face": "2",
        "clips with audio": "0",
    }
    assert {key: train[key] for key in expected} == expected
    assert (test["set"], test["label vocabulary"], test["seconds per clip, mean"]) == (
        "eval",
        "1",
        "",
    )


def test_distributions_add_up_to_the_clips(directories):
    statistics.main(["--records", f"{directories / 'train'}", f"--out={directories / 'out'}"])
    rows = read(directories / "out" / "distributions.csv")
    counts = {}
    for row in rows:
        counts.setdefault(row["quantity"], {})[row["value"]] = int(row["clips"])
    assert counts["clips with label"] == {"sad": 2, "calm": 1}
    assert counts["labels per clip"] == {"1": 1, "2": 1}
    assert counts["words per description"] == {"0": 1, "20": 0, "40": 1}
    assert counts["seconds per clip"] == {"2": 1, "3": 1}
    with Image.open(directories / "out" / "distributions.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_labels_that_are_formulas_escape_sequences_or_endless_are_drawn_as_text(tmp_path):
    labels = (r"$\frac$", "$", "a$b$", "\x1b[31m", "x" * 100_000)
    records = [Record(name="a", labels=labels, features={"face": FEATURE})]
    write_records(tmp_path / "$x$", records, encoders={"face": "x"})
    statistics.main(["--records", f"{tmp_path / '$x$'}", f"--out={tmp_path / 'out'}"])
    with Image.open(tmp_path / "out" / "distributions.png") as picture:
        assert picture.size == (12 * drawing.DPI, 8 * drawing.DPI)


def test_a_single_bin_is_seen_and_shares_begin_at_zero(directories, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    places = [f"{directories / 'train'}", f"{directories / 'test'}"]
    statistics.main(["--records", *places, f"--out={directories / 'out'}"])
    panels = {panel.get_xlabel() or "words": panel for panel in drawn[0].axes}
    steps = panels["labels per clip"].patches
    assert [patch.get_label() for patch in steps] == ["train", "test"]
    values, edges, _ = steps[1].get_data()
    assert (values.tolist(), edges.tolist()) == ([1.0], [0.5, 1.5])
    assert panels["labels per clip"].get_ylim()[0] == 0
    assert [patch.get_label() for patch in panels["seconds per clip"].patches] == ["train"]
    # Labels stand beside their bars, each on a line of its own, the most frequent one on top.
    labels = panels["clips"]
    assert [text.get_text() for text in labels.get_yticklabels()] == ["sad", "calm"]
    assert [bar.get_width() for bar in labels.patches] == [2, 1]
    assert labels.yaxis_inverted()


def test_what_a_user_gets_wrong_is_one_sentence(directories):
    train = directories / "train"
    with pytest.raises(SystemExit, match="manifest.json is missing"):
        statistics.main(["--records", f"{directories}", f"--out={directories / 'o'}"])
    with pytest.raises(SystemExit, match="two directories are called 'train'; name them apart"):
        statistics.main(["--records", f"{train}", f"{train}", f"--out={directories / 'o'}"])
    (train / "extraction.csv").write_text("name,seconds\na,long\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="extraction.csv, line 2: expected seconds, found 'long'"):
        statistics.main(["--records", f"{train}", f"--out={directories / 'o'}"])
