"""The command that turns a CSV file and arrays into records, and training on what it wrote."""

import csv
import json

import numpy as np
import pytest

from affectgpt_jax import import_arrays, train
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import RecordDataset
from data_prep import to_tfds

CLIPS = 40


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Clips of the demo world as people have them: a table, a folder and an archive of arrays."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "face").mkdir()
    audio = {}
    with open(folder / "clips.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "subtitle", "labels", "description", "emotion", "valence", "note"])
        for i, r in enumerate(demo.World(0).records("train", CLIPS)):
            labels = f"[{', '.join(r.labels)}]"
            writer.writerow([r.name, r.subtitle, labels, r.description, r.emotion, r.valence, i])
            if "face" in r.features:
                np.save(folder / "face" / f"{r.name}.npy", r.features["face"])
            if "audio" in r.features:
                audio[r.name] = r.features["audio"]
    np.save(folder / "face" / "of nobody.npy", np.zeros((8, 768), np.float16))
    np.savez(folder / "audio.npz", **audio)
    return folder


def run(sources, out, *flags):
    import_arrays.main(
        [
            f"--csv={sources / 'clips.csv'}",
            f"--face={sources / 'face'}",
            f"--audio={sources / 'audio.npz'}",
            f"--out={out}",
            *flags,
        ]
    )


COMPLETE = (
    "--encoder=face=clip-vit-l-14",
    "--encoder=audio=hubert-large",
    "--ignore=note",
    "--allow-missing",
)


@pytest.fixture(scope="module")
def imported(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "mine"
    run(sources, out, *COMPLETE)
    return out


def test_the_records_are_those_that_the_arrays_came_from(imported):
    dataset = RecordDataset(imported)
    dataset.verify()
    assert dataset.manifest.split == "mine"
    assert dataset.manifest.features["audio"]["encoder"] == "hubert-large"
    for found, expected in zip(dataset, demo.World(0).records("train", CLIPS), strict=True):
        for field in ("name", "subtitle", "labels", "description", "emotion", "valence"):
            assert getattr(found, field) == getattr(expected, field)
        assert found.features.keys() == expected.features.keys()
        for feature, values in expected.features.items():
            np.testing.assert_array_equal(found.features[feature], values)


def test_the_command_tells_what_it_wrote(sources, tmp_path, capsys):
    run(sources, tmp_path / "out", *COMPLETE, "--split=train")
    said = capsys.readouterr().out
    index = RecordDataset(tmp_path / "out").index
    faceless = [entry.name for entry in index if "face" not in entry.present]
    lines = said.splitlines()
    assert lines[:2] == [f"{tmp_path / 'out'}:", f"{CLIPS} clips, split 'train'"]
    assert f"face [8, 768] of clip-vit-l-14: {CLIPS - len(faceless)} clips" in lines
    assert f"  clips without: {len(faceless)}: {', '.join(map(repr, faceless))}" in lines
    assert "  arrays without a row, left out: 1: 'of nobody'" in lines
    labels = [label for entry in index for label in entry.labels]
    (about_labels,) = (line for line in lines if line.startswith("labels:"))
    assert f"{CLIPS} clips, {len(labels) / CLIPS:.2f} each, {len(set(labels))} diff" in about_labels
    most = max(set(labels), key=labels.count)
    assert f"({labels.count(most)})" in about_labels.split("most often")[1].split(",")[0]
    assert f"valence: {CLIPS} clips, -1 to 1" in lines
    assert not any(line.startswith(("caption", "name", "note")) for line in lines)


def test_rows_of_zeros_are_told(tmp_path, capsys):
    (tmp_path / "clips.csv").write_text("name\na\nb\nc\n")
    (tmp_path / "face").mkdir()
    for name, values in {"a": np.ones((2, 3)), "b": np.zeros((2, 3)), "c": np.eye(2, 3)}.items():
        values[1, 0] = 0
        np.save(tmp_path / "face" / f"{name}.npy", values * (values[:, :1] if name == "c" else 1))
    files = [f"--csv={tmp_path / 'clips.csv'}", f"--face={tmp_path / 'face'}"]
    import_arrays.main([*files, f"--out={tmp_path / 'out'}", "--encoder=face=clip"])
    said = capsys.readouterr().out
    assert "rows that are all zero, as others store a missing face: 2: 'b', 'c'; the model" in said


def test_it_trains_and_trains_alike_as_a_tfds_data_set(imported, tmp_path):
    to_tfds.main([f"--out={tmp_path / 'tfds'}", "--records", f"train={imported}"])
    results = {}
    for kind, source in (("records", imported), ("tfds", f"tfds:{tmp_path / 'tfds'}:train[:100%]")):
        workdir = tmp_path / kind
        train.main(
            [
                f"--workdir={workdir}",
                f"--config.data.train={source}",
                "--config.data.test=",
                "--config.data.val=",
                "--config.data.val_share=0.2",
                "--config.steps=1",
                "--config.batch_size=8",
                "--config.num_buckets=1",
                "--config.label=description",  # which validation does not have to generate
            ]
        )
        results[kind] = json.loads((workdir / "result.json").read_text())
    assert np.isfinite(results["records"]["loss_last"])
    assert results["tfds"]["loss_last"] == results["records"]["loss_last"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (COMPLETE[1:], "--face needs the name of its encoder, as in --encoder face=NAME"),
        ((*COMPLETE, "--encoder=frame=clip"), "--encoder frame=clip: there is no --frame"),
        ((*COMPLETE, "--encoder=face"), "--encoder face is not FEATURE=NAME; as in"),
        ((*COMPLETE, "--encoder=face=dino"), "--encoder face=dino names 'face' twice"),
        (COMPLETE[:2], "the column 'note' is unknown .*--ignore note"),
        (COMPLETE[:3], "clips of .*clips.csv have no face array: .*--allow-missing"),
        ((*COMPLETE, "--frames=0"), "frames is 0"),
        ((*COMPLETE, "--frame=/nowhere", "--encoder=frame=clip"), "/nowhere does not exist; expe"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(flags, message, sources, tmp_path):
    with pytest.raises(SystemExit, match=message) as stopped:
        run(sources, tmp_path / "out", *flags)
    assert str(stopped.value).startswith("error: ")
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(sources, imported, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file/out cannot be written: Not a directory"):
        run(sources, tmp_path / "file" / "out", *COMPLETE)
    with pytest.raises(SystemExit, match="mine already holds records; delete it or write elsewhe"):
        run(sources, imported, *COMPLETE)


def test_frames_are_sampled_on_request(sources, tmp_path):
    run(sources, tmp_path / "out", *COMPLETE, "--frames=2")
    dataset = RecordDataset(tmp_path / "out")
    assert dataset.manifest.features["audio"]["frames"] == 2
    whole = next(demo.World(0).records("train", 1)).features["audio"]
    np.testing.assert_array_equal(dataset[0].features["audio"], whole[[0, 4]])
