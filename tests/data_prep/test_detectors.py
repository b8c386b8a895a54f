"""Face detectors that are networks, from small files that see brightness; and boxes of a user.

Published weights were not at hand: whether they find faces is not tested here, but that their files
are told apart, what their outputs mean, and what becomes of the boxes.
"""

import json

import needs_torch  # noqa: F401
import numpy as np
import pytest
from clip_files import tone, write_clip
from onnx_files import write_centerface, write_other, write_yunet
from small_encoders import save_encoder

from affectgpt_jax.data.records import RecordDataset
from data_prep import extract, faces, media
from data_prep.clips import Clip, ClipError, find_clips
from data_prep.decoding import Job, decode_clip
from data_prep.detectors import Detector, centerface_boxes, read_detector

MAKERS = {"YuNet": write_yunet, "CenterFace": write_centerface}


def scene(*bright, size=(320, 192), cell=32):
    """A black frame with bright cells at these places (column, row)."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    for column, row in bright:
        image[cell * row : cell * (row + 1), cell * column : cell * (column + 1)] = 255
    return image


def test_yunet_finds_what_its_network_says(tmp_path):
    file = read_detector(write_yunet(tmp_path / "a.onnx"))
    assert file.kind == "YuNet" and file.name.startswith("YuNet (sha256 ")
    detect = Detector(file)
    (box,) = detect(scene((3, 2)))
    # The cell's centre is (112, 80), and the network's boxes are 64 wide.
    np.testing.assert_allclose(box, (80, 48, 64, 64), atol=1)
    assert len(detect(scene((1, 1), (7, 4)))) == 2 and not detect(scene())
    # A larger frame is searched small, and the box is given in its own pixels.
    (box,) = detect(scene((3, 2), size=(1280, 768), cell=128))
    np.testing.assert_allclose(box, (320, 192, 256, 256), atol=4)


def test_centerface_finds_what_its_network_says(tmp_path):
    file = read_detector(write_centerface(tmp_path / "a.onnx"))
    assert file.kind == "CenterFace"
    (box,) = Detector(file)(scene((10, 8), cell=4))
    # The cell's centre is (42, 34); it is 40 high and 32 wide.
    np.testing.assert_allclose(box, (26, 14, 32, 40), atol=1)
    # A size that is no multiple of 32 is padded, and the box is where it was.
    (same,) = Detector(file)(scene((10, 8), size=(300, 170), cell=4))
    np.testing.assert_allclose(same, box, atol=1)


def test_of_boxes_that_overlap_the_best_is_kept():
    heat = np.zeros((1, 1, 8, 8), np.float32)
    heat[0, 0, 2, 2], heat[0, 0, 2, 3], heat[0, 0, 7, 7] = 0.8, 0.9, 0.6
    scale = np.full((1, 2, 8, 8), np.log(3.0), np.float32)
    offset = np.zeros((1, 2, 8, 8), np.float32)
    offset[0, 0, 7, 7], offset[0, 1, 7, 7] = 0.25, -0.25
    found = centerface_boxes(heat, scale, offset)
    # 12 pixels wide around 4 * (3 + 0.5); the last one is a pixel lower, and one to the left.
    np.testing.assert_allclose(found, [(8, 4, 12, 12), (23, 25, 12, 12)], atol=1e-4)


def test_files_of_other_networks_are_refused_by_name(tmp_path):
    (tmp_path / "text.onnx").write_text("no network")
    for path, message in (
        (tmp_path / "none.onnx", "no such file"),
        (tmp_path / "text.onnx", "OpenCV cannot read it as ONNX"),
        (write_other(tmp_path / "other.onnx"), "its outputs are scores; expected those of YuNet"),
    ):
        with pytest.raises(ClipError, match=message):
            read_detector(path)


def test_a_track_stays_with_its_person_until_that_one_is_gone():
    small, large = (40, 40, 30, 30), (200, 60, 90, 80)
    first = faces.choose([small])
    assert faces.choose([large, small], near=first) == first
    assert faces.choose([large], near=first) == faces.square_of(large) != first
    assert faces.choose([]) is None
    # A square as wide as the larger side, with a margin.
    assert faces.square_of((200, 60, 90, 80)) == (196, 50, 99)


@pytest.mark.parametrize("kind", MAKERS)
def test_clips_are_searched_by_the_network_that_is_given(kind, tmp_path):
    file = read_detector(MAKERS[kind](tmp_path / "a.onnx"))
    frames = np.stack([scene((4, 2))] * 16)
    frames[8:] = scene((5, 3))
    path = write_clip(tmp_path / "a.mp4", frames)
    found = decode_clip(Job(Clip("a", path), ("face",), 64, detector=file))
    assert not found.problems and found.facts["faces"] == 16
    # The bright cell is in the middle of what is cut out.
    shown = found.arrays["face"].mean(axis=(0, 3))
    assert shown[28:36, 28:36].mean() > 150 and shown[0].mean() < 60
    dark = write_clip(tmp_path / "b.mp4", np.zeros_like(frames))
    missing = decode_clip(Job(Clip("b", dark), ("face",), 64, detector=file))
    assert missing.problems["face"] == "no face in 16 frames"


def test_boxes_of_a_user_say_where_faces_are(tmp_path):
    frames = np.stack([scene((1 + i % 8, 2)) for i in range(20)])
    path = write_clip(tmp_path / "clips" / "a.mp4", frames, tone(0.8))
    boxes = np.array([(32 * (1 + i % 8), 64, 32, 32) for i in range(20)], float)
    boxes[10:] = np.nan
    (tmp_path / "boxes").mkdir()
    np.save(tmp_path / "boxes" / "a.npy", boxes)
    (clip,) = find_clips([tmp_path / "clips"], boxes=tmp_path / "boxes").clips
    found = decode_clip(Job(clip, ("face",), 64))
    sampled = [i for i in np.arange(16) * 20 // 16 if i < 10]
    assert found.facts["faces"] == len(sampled) and not found.problems
    assert found.arrays["face"].mean() > 180  # nearly all of each square is bright
    np.save(tmp_path / "boxes" / "a.npy", boxes[:7])
    wrong = decode_clip(Job(clip, ("face", "frame"), 64))
    assert wrong.problems == {"face": "boxes of 7 frames, but the video has 20"}
    assert wrong.arrays["frame"].shape == (8, 64, 64, 3)
    np.save(tmp_path / "boxes" / "a.npy", boxes[:, :3])
    assert "expected numbers [frames, 4]" in decode_clip(Job(clip, ("face",), 64)).problems["face"]
    with pytest.raises(media.MediaError, match="no such file"):
        faces.read_boxes(tmp_path / "nothing.npy")
    assert path.is_file()


@pytest.mark.parametrize(
    "box", [(0, 0, 1e13, 1e13), (0, 0, 9000, 5), (1e19, 0, 5, 5), (0, -1e300, 5, 5)]
)
def test_a_box_that_no_frame_holds_costs_the_face_alone(box, tmp_path):
    path = write_clip(tmp_path / "a.mp4", np.stack([scene((4, 2))] * 16))
    boxes = np.full((16, 4), np.nan)
    boxes[3] = box
    np.save(tmp_path / "a.npy", boxes)
    clip = Clip("a", path, boxes=tmp_path / "a.npy")
    found = decode_clip(Job(clip, ("face", "frame"), 64))
    assert found.problems["face"].startswith("the box of frame 3 is ")
    assert "expected left and top of at most 67,108,864" in found.problems["face"]
    assert found.arrays["frame"].shape == (8, 64, 64, 3) and "frame" not in found.problems


def test_boxes_of_a_network_that_no_frame_holds_are_no_faces(tmp_path, monkeypatch):
    detect = Detector(read_detector(write_yunet(tmp_path / "a.onnx")))
    said = [(3, 3, 50, 50), (0, 0, 1e30, 5), (np.nan, 0, 5, 5), (0, -np.inf, 5, 5)]
    monkeypatch.setattr(detect, "_yunet", lambda image: np.array(said))
    assert detect(scene()) == [(3, 3, 50, 50)]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("size", [(2000, 2), (2, 2000), (1, 1)])
def test_frames_that_are_too_thin_for_a_face_have_none(kind, size, tmp_path):
    detect = Detector(read_detector(MAKERS[kind](tmp_path / "a.onnx")))
    assert detect(np.zeros((*size, 3), np.uint8)) == []


def test_an_extraction_says_which_detector_it_had(tmp_path, capsys):
    write_clip(tmp_path / "clips" / "a.mp4", np.stack([scene((4, 2))] * 16), tone(0.7))
    detector = write_yunet(tmp_path / "faces.onnx")
    command = [f"--clips={tmp_path / 'clips'}", f"--out={tmp_path / 'out'}", "--features", "face"]
    command += ["--workers=0", f"--video=clip={save_encoder('clip', tmp_path)}"]
    extract.main([*command, f"--face-detector={detector}"])
    (record,) = RecordDataset(tmp_path / "out")
    assert record.features["face"].shape[0] == 8
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["extra"]["extraction"]["faces"]["detector"] == read_detector(detector).name
    # Another detector is another extraction.
    with pytest.raises(SystemExit, match="holds the records of other clips or settings"):
        extract.main(command)
    with pytest.raises(SystemExit):
        extract.main([*command, f"--face-detector={detector}", f"--boxes={tmp_path}"])
    assert "--boxes and --face-detector both say where faces are" in capsys.readouterr().err
