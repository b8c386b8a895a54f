"""What `affectgpt describe` refuses before any weights are read; test_walk.py has its answers."""

import json
import shutil
from types import SimpleNamespace

import pytest
from needs_torch import torch  # noqa: F401
from onnx_files import write_yunet

from affectgpt_jax import build
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import MemoryRecords, RecordDataset, RecordError, write_records
from data_prep import describe, encoders, extractor, faces
from data_prep.detectors import read_detector

REFUSED = "files can be asked about where a run was trained on records of affectgpt extract"


def sentence(*flags):
    with pytest.raises(SystemExit) as ended:
        describe.main([*map(str, flags)])
    assert ended.value.code not in (None, 0)
    return str(ended.value.code)


@pytest.fixture
def weightless(monkeypatch):
    """Fails a test in which weights are read."""

    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr("affectgpt_jax.restore.Run.with_weights", read)
    monkeypatch.setattr(encoders.Encoder, "__init__", read)


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy of a run, whose config can be changed."""

    def change(**keys):
        place = shutil.copytree(trained_run, tmp_path / "run", dirs_exist_ok=True)
        config = json.loads((place / "config.json").read_text())
        for key, value in keys.items():
            (config["data"] if key in config["data"] else config)[key] = value
        (place / "config.json").write_text(json.dumps(config))
        return f"--workdir={place}"

    return change


def test_records_that_no_encoder_made_are_refused(trained_run, run, weightless):
    message = sentence("a.mp4", f"--workdir={trained_run}")
    assert "whose features (demo) no encoder of data_prep has made" in message
    assert REFUSED in message
    message = sentence("a.mp4", run(train="demo"))
    assert "was trained on the demo world, whose clips are generated" in message
    assert REFUSED in message
    for place in ("", "tfds:/data:train"):
        message = sentence("a.mp4", run(train=place))
        assert (
            "is not named, so nothing" if not place else f"was {place!r}, is not there" in message
        )
        assert "nothing says how features were made; name records" in message
        assert "--trained-on DIR" in message


def test_files_and_subtitles_are_looked_at_first(trained_run, tmp_path, weightless):
    workdir = f"--workdir={trained_run}"
    assert "no file ends in any of .mp4" in sentence(tmp_path, workdir)
    message = sentence("a.mp4", "b.mp4", "--subtitle=well", workdir)
    assert "--subtitle is for one clip, and there are 2" in message
    assert "is named twice" in sentence("a.mp4", "a.mp4", workdir)
    assert "did you mean ovlabel" in sentence("a.mp4", "--question=ovlabels", workdir)


def test_outputs_are_opened_before_weights_are_read(tmp_path):
    (tmp_path / "file").touch()
    out, show = tmp_path / "a.jsonl", tmp_path / "shown"
    for places, message in (
        (
            (None, tmp_path / "file"),
            f"--show={tmp_path}/file cannot be written to (File exists); expected a",
        ),
        ((None, tmp_path / "file" / "x"), f"--show={tmp_path}/file/x cannot be written to (Not a"),
        ((tmp_path / "no" / "a", None), f"--out={tmp_path}/no/a cannot be written to (No such"),
        ((tmp_path, show), f"--out={tmp_path} cannot be written to (File exists); expected a new"),
    ):
        with pytest.raises(describe.DescribeError) as error, describe.open_outputs(*places):
            pass
        assert str(error.value).startswith(message)
    # What nothing was written to would only be in the way.
    with describe.open_outputs(out, None) as file:
        assert out.exists()
    assert not out.exists()
    with describe.open_outputs(out, show) as file:
        file.write("{}\n")
    assert out.read_text() == "{}\n" and not any(show.iterdir())
    torn = tmp_path / "torn.jsonl"
    with pytest.raises(OSError, match="full"), describe.open_outputs(torn, None) as file:
        file.write('{}\n{"na')
        file.flush()
        raise OSError("the disk is full")
    assert torn.read_text() == "{}\n"


def test_encoders_that_are_named_take_the_place_of_records(run, tmp_path, weightless):
    message = sentence("a.mp4", run(train=""), "--video=clip", "--audio=hubert")
    assert "--video clip needs a directory" in message


def test_records_in_memory_are_those_of_a_directory(tmp_path):
    clips = list(demo.World(0).records("test", 6))
    names = dict.fromkeys(demo.DEFAULT_FEATURES, "demo")
    write_records(tmp_path / "a", clips, encoders=names)
    expected = RecordDataset(tmp_path / "a")
    found = MemoryRecords(clips, expected.manifest)
    assert found.index == expected.index and len(found) == 6
    assert found.manifest.features == expected.manifest.features
    for mine, theirs in zip(found, (expected[i] for i in range(6))):
        assert mine.features.keys() == theirs.features.keys()
        for name, values in mine.features.items():
            assert values.tobytes() == theirs.features[name].tobytes()
    narrow = list(demo.World(0).records("train", 2))
    for clip in narrow:
        clip.features.update({name: values[:, :3] for name, values in clip.features.items()})
    with pytest.raises(RecordError, match="before it"):
        MemoryRecords(narrow, expected.manifest)


def settings_like(encoders, **changes):
    found = {
        "version": 2, "features": ["face"], "encoders": encoders, "batch": 8, "device": "cpu",
        "precision": "float32", "faces": {"detector": faces.DETECTOR, "order of arrays": "bgr"},
        "versions": {"torch": "1.0"},
    }  # fmt: skip
    return found | changes


def mixture(tmp_path, monkeypatch, *sets):
    """A run that reads faces, trained on sets with these settings."""
    clip = {"name": "clip:small", "sha256": "a" * 64}
    entries = {}
    for number in range(len(sets)):
        entries[f"set{number}"] = {"source": str(tmp_path / f"set{number}")}
        (tmp_path / f"set{number}").mkdir()
        (tmp_path / f"set{number}" / "manifest.json").touch()
    found = {e["source"]: changes for e, changes in zip(entries.values(), sets)}

    def read(run, place, wanted):
        settings = settings_like({"video": clip}, **found[place])
        return SimpleNamespace(features={"face": {"width": 4}}), settings

    monkeypatch.setattr(extractor.build, "training_sets", lambda config: entries)
    monkeypatch.setattr(extractor.build, "check_features", lambda *_: None)
    monkeypatch.setattr(extractor, "MemoryRecords", lambda *_: None)
    monkeypatch.setattr(extractor, "_read", read)
    monkeypatch.setattr(extractor, "_find", lambda *_: SimpleNamespace(name="clip:small"))
    config = SimpleNamespace(demo_seed=0)
    processor = SimpleNamespace(mode=SimpleNamespace(features=("face",)))
    return SimpleNamespace(workdir=tmp_path, config=config, processor=processor)


def test_of_a_mixture_every_set_is_compared(tmp_path, monkeypatch):
    run = mixture(tmp_path, monkeypatch, {}, {"batch": 2, "face arrays": 12})
    how = extractor.extraction_of(run, device="cpu")
    first, second = (f"{tmp_path}/set{i}" for i in range(2))
    remarks = how.remarks()
    assert any(r.startswith(f"{first} was extracted otherwise: torch 1.0 there") for r in remarks)
    assert f"{second} was extracted otherwise: batch 2 there, 8 here" in remarks
    assert remarks[-1] == f"12 clips of {second} had OpenFace's faces; here they are detected"
    assert how.remarks(with_tracks=True) == remarks[:-1]
    assert how.encoder_names == "video by clip:small"


@pytest.mark.parametrize("key", ["detector", "order of arrays"])
def test_faces_of_a_mixture_that_were_taken_in_several_ways_are_refused(key, tmp_path, monkeypatch):
    other = {"detector": faces.DETECTOR, "order of arrays": "bgr"} | {key: "another"}
    run = mixture(tmp_path, monkeypatch, {}, {"faces": other})
    with pytest.raises(extractor.ExtractionError, match="in several ways: .*another.* in .*set1"):
        extractor.extraction_of(run, device="cpu")


def test_a_run_keeps_the_extraction_that_all_its_faces_share(tmp_path):
    def component(reads, **changes):
        settings = settings_like({"video": {"name": "clip", "sha256": "a"}}, **changes)
        manifest = SimpleNamespace(extra={"extraction": settings}, features={})
        mode = SimpleNamespace(features=reads)
        return SimpleNamespace(
            dataset=SimpleNamespace(manifest=manifest), processor=SimpleNamespace(mode=mode)
        )

    other = {"faces": {"detector": "another", "order of arrays": "bgr"}}
    kept = tmp_path / build.EXTRACTION_FILE
    build.keep_extraction(tmp_path, [component(("face",)), component(("face",), **other)])
    assert not kept.exists()
    build.keep_extraction(tmp_path, [component(("frame",)), component(("frame",), **other)])
    assert kept.exists()


def test_faces_are_found_as_those_of_the_records(tmp_path):
    cascade, yunet = faces.DETECTOR, read_detector(write_yunet(tmp_path / "yunet.onnx"))
    assert extractor.check_detector("records", cascade, None) == []
    assert extractor.check_detector("records", yunet.name, yunet) == []
    for theirs, detector, advice in ((cascade, yunet, "leave out"), (yunet.name, None, "name")):
        with pytest.raises(extractor.ExtractionError, match=f"found by .*{advice}"):
            extractor.check_detector("records", theirs, detector)
    (note,) = extractor.check_detector("records", "boxes", None)
    assert "boxes that somebody had" in note
