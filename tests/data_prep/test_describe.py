"""What `affectgpt describe` refuses before any weights are read; test_walk.py has its answers."""

import json
import shutil

import pytest
from needs_torch import torch  # noqa: F401
from onnx_files import write_yunet

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
        assert "--records DIR" in message


def test_files_and_subtitles_are_looked_at_first(trained_run, tmp_path, weightless):
    workdir = f"--workdir={trained_run}"
    assert "no file ends in any of .mp4" in sentence(tmp_path, workdir)
    message = sentence("a.mp4", "b.mp4", "--subtitle=well", workdir)
    assert "--subtitle is for one clip, and there are 2" in message
    assert "is named twice" in sentence("a.mp4", "a.mp4", workdir)
    assert "did you mean ovlabel" in sentence("a.mp4", "--question=ovlabels", workdir)


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


def test_faces_are_found_as_those_of_the_records(tmp_path):
    cascade, yunet = faces.DETECTOR, read_detector(write_yunet(tmp_path / "yunet.onnx"))
    assert extractor.check_detector("records", cascade, None) == []
    assert extractor.check_detector("records", yunet.name, yunet) == []
    for theirs, detector, advice in ((cascade, yunet, "leave out"), (yunet.name, None, "name")):
        with pytest.raises(extractor.ExtractionError, match=f"found by .*{advice}"):
            extractor.check_detector("records", theirs, detector)
    (note,) = extractor.check_detector("records", "boxes", None)
    assert "boxes that somebody had" in note
