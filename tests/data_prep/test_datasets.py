"""Public data sets in the plain layout, from files as their authors lay them out."""

import csv
import json

import numpy as np
import pytest
from clip_files import write_talking
from published_sets import publish, write_rows
from small_encoders import save_encoder

from affectgpt_jax.data.arrays import records_from_csv
from affectgpt_jax.data.records import RecordDataset
from affectgpt_jax.evaluation.datasets import BY_KEY, DATASETS
from data_prep import datasets, extract

MEDIA = ("video", "audio", "face")


def plain(path):
    """The records that a file in the plain layout describes, without features."""
    return list(records_from_csv(path, {}, ignore=MEDIA))


def captioned(root, key="mercaptionplus"):
    """A set with descriptions: one clip has no description, one no labels, one no subtitle."""
    folder = root / "mer2025-dataset"
    folder.mkdir(parents=True)
    labels = [("a", "[Happy, calm]"), ("b", "[]"), ("c", "['sad']")]
    write_rows(folder / f"track2_train_{key}.csv", ["name", "openset"], labels)
    reasons = [("a", "She laughs, twice."), ("b", "He waits."), ("d", "Nobody speaks.")]
    write_rows(folder / f"track3_train_{key}.csv", ["name", "reason"], reasons)
    subtitles = [("a", "x", "hello"), ("b", "x", ""), ("c", "x", "no")]
    write_rows(folder / "subtitle_chieng.csv", ["name", "chinese", "english"], subtitles)
    return folder


@pytest.mark.parametrize("key", ["mercaptionplus", "ovmerd"])
def test_labels_descriptions_and_subtitles_come_together(key, tmp_path, capsys):
    captioned(tmp_path, key)
    out = tmp_path / "csv" / f"{key}.csv"
    datasets.main(["--set", key, f"--root={tmp_path}", f"--out={out}"])
    a, b, c, d = plain(out)
    assert (a.name, a.labels, a.subtitle) == ("a", ("happy", "calm"), "hello")
    assert a.description == "She laughs, twice."
    assert (b.labels, b.description, b.subtitle) == ((), "He waits.", "")
    assert (c.labels, c.description) == (("sad",), "")
    assert (d.labels, d.description) == ((), "Nobody speaks.")
    assert {r.source for r in (a, b, c, d)} == {datasets.CAPTIONED[key].name}
    said = capsys.readouterr().out
    for line in (
        f"size: 4 clips, published {datasets.CAPTIONED[key].size:,}",
        "1 clip without a description: 'c'",
        "1 clip without labels: 'd'",
        "1 clip without a subtitle: 'd'",
        "no folder",
    ):
        assert line in said


def test_files_of_mer_caption_are_named(tmp_path):
    folder = captioned(tmp_path)
    out = tmp_path / "out.csv"
    command = ["--set=mercaption", f"--root={tmp_path}", f"--out={out}"]
    with pytest.raises(SystemExit, match="MER-Caption has no published files; name --labels and"):
        datasets.main(command)
    files = [f"--labels={folder / 'track2_train_mercaptionplus.csv'}"]
    files += [f"--descriptions={folder / 'track3_train_mercaptionplus.csv'}"]
    datasets.main([*command, *files])
    assert [record.source for record in plain(out)] == ["MER-Caption"] * 4


@pytest.mark.parametrize("key", [d.key for d in DATASETS if d.key != "ovmerd"])
def test_test_sets_are_as_the_truth_command_reads_them(key, tmp_path):
    truth = publish(tmp_path, key)
    out = tmp_path / "out.csv"
    datasets.main(["--set", key, f"--root={tmp_path}", f"--out={out}", "--allow-pickle"])
    records = plain(out)
    dataset = BY_KEY[key]
    assert [record.name for record in records] == list(truth)
    for record in records:
        value = truth[record.name]
        assert record.source == dataset.name
        assert record.subtitle.endswith(f"{record.name}") or record.name in record.subtitle
        if dataset.truth == "openset":
            assert record.labels == tuple(value)
        elif dataset.truth == "emotion":
            assert record.emotion == value
            assert record.candidates == tuple(sorted(set(truth.values())))
        else:
            assert record.valence == pytest.approx(value, abs=1e-6)
            assert record.valence_range == dataset.valence


def test_all_sets_below_a_root_are_found_and_none_is_an_error(tmp_path, capsys):
    keys = ("meld", "sims", "ovmerdplus")
    for key in keys:
        publish(tmp_path / "sets", key)
    captioned(tmp_path / "sets")
    datasets.main(["--all", f"--root={tmp_path / 'sets'}", f"--out={tmp_path}", "--allow-pickle"])
    assert {path.stem for path in tmp_path.glob("*.csv")} == {*keys, "mercaptionplus"}
    with pytest.raises(SystemExit, match="--allow-pickle"):
        datasets.main(["--set=meld", f"--root={tmp_path / 'sets'}", f"--out={tmp_path / 'm.csv'}"])
    (tmp_path / "none").mkdir()
    for which in ("--all", "--set=meld", "--set=mercaptionplus"):
        with pytest.raises(SystemExit, match="error: --root=.*none: found no label file there"):
            datasets.main([which, f"--root={tmp_path / 'none'}", f"--out={tmp_path / 'x'}"])


def test_labels_alone_are_a_set(tmp_path, capsys):
    folder = tmp_path / "mer2026-dataset"
    folder.mkdir()
    labels = [("sample_1", "[Happy]"), ("sample_2", "[sad]")]
    write_rows(folder / "track2_train_human.csv", ["name", "openset"], labels)
    out = tmp_path / "out.csv"
    datasets.main(["--set=mer2026human", f"--root={tmp_path}", f"--out={out}"])
    assert [record.labels for record in plain(out)] == [("happy",), ("sad",)]
    assert "published 1,532" in capsys.readouterr().out


def test_human_labels_of_mer2026_need_no_brackets(tmp_path):
    folder = tmp_path / "mer2026-dataset"
    folder.mkdir()
    rows = [("sample_1", "shocked,care,serious"), ("sample_2", "[sad]")]
    write_rows(folder / "track2_train_human.csv", ["name", "openset"], rows)
    out = tmp_path / "out.csv"
    datasets.main(["--set=mer2026human", f"--root={tmp_path}", f"--out={out}"])
    assert [r.labels for r in plain(out)] == [("shocked", "care", "serious"), ("sad",)]


PAIRS = [
    ("sample_1", "She smiles,\nthen laughs.", "He waits.", "a2"),
    ("sample_2", "One.", "Two.", "same"),
    ("sample_1", "A third.", "A fourth.", "a1"),
]


def test_pairs_of_mer_prefer_are_records_with_alternatives(tmp_path, capsys):
    folder = tmp_path / "mer2026-dataset"
    folder.mkdir()
    path = folder / "track3_emoprefer.csv"
    write_rows(path, ["name", "a1", "a2", "preference"], PAIRS)
    (folder / "audio").mkdir()
    (folder / "audio" / "sample_1.wav").touch()
    out = tmp_path / "out.csv"
    command = ["--set=emoprefer", f"--root={tmp_path}", f"--out={out}"]
    datasets.main(command)
    one, two, again = plain(out)
    assert (one.alternatives, one.preferred) == (("She smiles, then laughs.", "He waits."), "a2")
    assert (two.name, two.preferred) == ("sample_2", "same")
    assert (again.name, again.alternatives) == ("sample_1#2", ("A third.", "A fourth."))
    rows = list(csv.DictReader(out.open(encoding="utf-8", newline="")))
    sound = str(folder / "audio" / "sample_1.wav")
    assert [row["audio"] for row in rows] == [sound, "", sound]
    said = capsys.readouterr().out
    assert "size: 3 clips, published 574" in said and "preferred: a1 1, a2 1, same 1" in said
    assert "1 rows of a clip that stands there already are called NAME#2" in said
    write_rows(path, ["name", "a1", "a2", "preference"], [("s", "One.", "Two.", "both")])
    with pytest.raises(SystemExit, match="emoprefer.csv, line 2: expected two descriptions and a"):
        datasets.main(command)


def test_candidates_are_names_alone_and_leftovers_of_both_sides_are_told(tmp_path, capsys):
    folder = tmp_path / "mer2026-dataset"
    names = ["samplenew4_1", "samplenew3_1", "samplenew3_2"]
    (folder / "openface_face").mkdir(parents=True)
    for name in ("samplenew4_1", "samplenew4_8", "samplenew4_9"):
        (folder / "openface_face" / f"{name}.npy").touch()
    write_rows(folder / "track1_track2_candidate.csv", ["name"], [(name,) for name in names])
    write_rows(folder / "subtitle_chieng.csv", ["name", "english"], [("samplenew4_1", "Oh!")])
    out = tmp_path / "out.csv"
    datasets.main(["--set=mer2026candidates", f"--root={tmp_path}", f"--out={out}"])
    assert [(r.name, r.subtitle) for r in plain(out)] == list(zip(names, ["Oh!", "", ""]))
    said = capsys.readouterr().out
    assert "2 clips without face in" in said and "2 files in" in said
    expected = "clips without face: samplenew3_... 2; files: samplenew4_... 2"
    assert f"by how names begin: {expected}" in said


@pytest.mark.parametrize("kind", ["coarse", "fine"])
def test_merrs_json_is_read_by_clip(kind, tmp_path, capsys):
    folder = tmp_path / "MER2023"
    folder.mkdir()
    text = {"coarse": "caption", "fine": "smp_reason_caption"}[kind]
    clips = {
        "sample_1": {"pseu_emotion": "Happy", text: "She beams.", "AU_list": [1, 2]},
        "sample_2": {"pseu_emotion": "", text: "He waits."},
    }
    path = folder / f"MERR_{kind}_grained.json"
    path.write_text(json.dumps(clips))
    rows = [("sample_1", "x", "Oh!"), ("sample_2", "x", "")]
    columns = ["name", "sentence", "sentence_en"]
    write_rows(folder / "transcription_en_all.csv", columns, rows)
    out = tmp_path / "out.csv"
    command = [f"--set=merr{kind}", f"--root={tmp_path}", f"--out={out}"]
    datasets.main(command)
    one, two = plain(out)
    assert (one.labels, one.description, one.subtitle) == (("happy",), "She beams.", "Oh!")
    assert (two.labels, two.description) == ((), "He waits.")
    assert "1 clip without labels: 'sample_2'" in capsys.readouterr().out
    for change, told in (
        ({text: 3}, f"sample_2.{text}: expected text, found 3"),
        ({text: ""}, "no clip has a description"),
    ):
        path.write_text(json.dumps({"sample_2": change}))
        with pytest.raises(SystemExit, match=told):
            datasets.main(command)


def test_a_clip_described_twice_is_refused(tmp_path):
    folder = captioned(tmp_path)
    rows = [("a", "x"), ("a", "y")]
    write_rows(folder / "track3_train_mercaptionplus.csv", ["name", "reason"], rows)
    with pytest.raises(SystemExit, match="mercaptionplus.csv, line 3: 'a' stands there twice"):
        datasets.main(["--set=mercaptionplus", f"--root={tmp_path}", f"--out={tmp_path / 'x.csv'}"])


def test_media_of_the_published_folders_become_records(tmp_path):
    folder = captioned(tmp_path)
    (folder / "openface_face" / "a").mkdir(parents=True)
    track = np.random.default_rng(0).integers(0, 256, (9, 112, 112, 3), np.uint8)
    np.save(folder / "openface_face" / "a" / "a.npy", track)
    np.save(folder / "openface_face" / "c.npy", track[:4])
    for seed, name in enumerate("ac"):
        (folder / "video").mkdir(exist_ok=True)
        write_talking(folder / "video" / f"{name}.mp4", seed=seed)
    table, out = tmp_path / "plain.csv", tmp_path / "records"
    datasets.main(["--set=mercaptionplus", f"--root={tmp_path}", f"--out={table}"])
    flags = [f"--video=clip={save_encoder('clip', tmp_path)}"]
    flags += [f"--audio=hubert={save_encoder('hubert', tmp_path)}", "--workers=0"]
    extract.main([f"--csv={table}", f"--out={out}", *flags])
    a, c = RecordDataset(out)
    assert (a.name, a.description, c.labels) == ("a", "She laughs, twice.", ("sad",))
    assert len(np.unique(c.features["face"], axis=0)) == 4
    with open(out / "extraction.csv", newline="", encoding="utf-8") as file:
        reasons = {row["name"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons["b"] == "face, frame: no video file; audio: no audio file"
