"""Frames and samples out of real files: the formulas, the formats, and what is damaged."""

import wave
from fractions import Fraction
from math import floor

import av
import needs_torch
import numpy as np
import pytest
from clip_files import (
    brightness,
    cut,
    cut_without_decoding,
    grey_frames,
    rotate,
    tone,
    write_clip,
)

from affectgpt_jax.data.arrays import sample_rows
from data_prep import faces, media
from data_prep.media import MediaError


def levels(path, count):
    """Brightness of the frames that stand for a video."""
    taken, _ = media.read_frames(path, count, lambda image: image.mean())
    return np.array(taken)


def test_frames_of_every_length_are_those_of_the_formula():
    for n in range(1, 2001):
        k = min(n, media.FRAMES)
        expected = [floor(Fraction(i * n, k)) for i in range(k)]
        expected += [expected[-1]] * (media.FRAMES - k)
        assert sample_rows(n, media.FRAMES).tolist() == expected
        # What is searched for faces holds the frames themselves.
        searched = sample_rows(n, min(n, faces.SEARCHED))
        assert searched[sample_rows(len(searched), media.FRAMES)].tolist() == expected


def test_windows_of_every_duration_are_those_of_the_formula():
    for tenths in range(1, 601):
        n = tenths * 1600 + tenths % 7  # lengths that 7 does not divide, too
        waveform = np.arange(1, n + 1, dtype=np.float32)
        found = media.windows(waveform)
        assert found.shape == (8, 32_000)
        for i, window in enumerate(found):
            start = floor(i * (Fraction(n, 16_000) - 2) / 7 * 16_000) if n > 32_000 else 0
            part = waveform[start : start + 32_000]
            np.testing.assert_array_equal(window[: len(part)], part)
            assert not window[len(part) :].any()


@pytest.mark.parametrize(
    ("suffix", "video_codec", "fps", "size"),
    [
        ("mp4", "mpeg4", 25, (64, 48)),
        ("mp4", "libx264", 30, (128, 72)),
        ("avi", "mjpeg", 12, (64, 48)),
        ("mkv", "libx264", 50, (72, 128)),
        ("webm", "libvpx", 24, (64, 64)),
        ("mov", "mpeg4", 15, (176, 144)),
    ],
)
@pytest.mark.parametrize("count", [1, 7, 26])
def test_the_frames_that_are_taken_are_the_right_ones(
    suffix, video_codec, fps, size, count, tmp_path
):
    clip = tmp_path / f"clip.{suffix}"
    write_clip(clip, grey_frames(count, size), fps=fps, video_codec=video_codec)
    taken, facts = media.read_frames(clip, media.FRAMES, lambda image: image)
    assert (facts.frames, facts.width, facts.height) == (count, *size)
    assert facts.seconds == pytest.approx(count / fps)
    rows = sample_rows(count, min(count, media.FRAMES))
    # Half of what lies between two frames.
    np.testing.assert_allclose([i.mean() for i in taken], brightness(rows), atol=3.9)


@pytest.mark.parametrize(
    ("suffix", "audio_codec", "rate", "channels"),
    [
        ("wav", "pcm_s16le", 8_000, 1),
        ("wav", "pcm_s16le", 16_000, 2),
        ("wav", "pcm_s16le", 48_000, 1),
        ("mp4", "aac", 44_100, 2),
        ("flac", "flac", 22_050, 2),
        ("webm", "libopus", 48_000, 1),
    ],
)
def test_sound_of_every_kind_is_16_khz_and_one_channel(
    suffix, audio_codec, rate, channels, tmp_path
):
    left = tone(1.5, rate)
    sound = np.concatenate([left, 0.2 * left]) if channels == 2 else left
    path = tmp_path / f"clip.{suffix}"
    write_clip(path, None, sound, rate=rate, audio_codec=audio_codec)
    waveform = media.read_waveform(path)
    assert waveform.dtype == np.float32
    # A codec's delay adds up to two of its frames of 1,024 samples.
    assert 1.5 * 16_000 - 64 <= len(waveform) <= 1.5 * 16_000 + 2100
    middle = waveform[4_000:20_000]
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() * 16_000 / len(middle) == pytest.approx(440, abs=1.5)
    amplitude = 0.5 * (0.6 if channels == 2 else 1)
    assert np.sqrt(2 * (middle**2).mean()) == pytest.approx(amplitude, rel=0.03)


def test_channels_are_averaged_and_opposite_ones_cancel(tmp_path):
    left = tone(1.0)
    path = write_clip(
        tmp_path / "clip.wav", None, np.concatenate([left, -left]), audio_codec="pcm_s16le"
    )
    assert np.abs(media.read_waveform(path)).max() < 1e-4  # a step of 16 bits is 3e-5


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_rotated_or_mirrored_video_is_shown_as_players_do(quarters, mirrored, tmp_path):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32] = 255  # the upper left quarter
    path = rotate(write_clip(tmp_path / "clip.mp4", np.stack([image] * 3)), quarters, mirrored)
    (first, *_), facts = media.read_frames(path, 8, lambda image: image)
    shown = image[:, ::-1] if mirrored else image
    expected = np.rot90(shown, -quarters)  # players turn it clockwise
    assert first.shape == expected.shape
    assert (facts.width, facts.height) == expected.shape[1::-1]
    assert np.abs(first.astype(int) - expected).mean() < 12  # blurred at the edges


def test_a_file_that_does_not_say_how_long_it_is_is_sampled_alike(tmp_path):
    frames = grey_frames(20)
    told = write_clip(tmp_path / "told.mkv", frames)
    untold = write_clip(tmp_path / "untold.mkv", frames, options={"live": "1"})
    np.testing.assert_array_equal(levels(untold, 8), levels(told, 8))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.8])
def test_a_cut_file_is_damaged_wherever_it_is_cut(suffix, share, tmp_path):
    codecs = {"video_codec": "libvpx", "audio_codec": "libopus"} if suffix == "webm" else {}
    rate = 48_000 if suffix == "webm" else 16_000
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = tmp_path / f"clip.{suffix}"
    write_clip(path, grey_frames(50), tone(2.0, rate), rate=rate, options=options, **codecs)
    media.check_whole(path)
    cut(path, share)
    with pytest.raises(MediaError, match="damaged|not readable|no frames"):
        media.check_whole(path)
        media.read_frames(path, 8, lambda image: None)


@pytest.mark.parametrize(
    ("suffix", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("m4a", "aac")]
)
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_cut_sound_is_damaged_wherever_it_is_cut(suffix, codec, share, tmp_path):
    path = write_clip(tmp_path / f"sound.{suffix}", None, tone(4.0), audio_codec=codec)
    media.check_whole(path)
    cut(path, share)
    with pytest.raises(MediaError, match="damaged|not readable"):
        media.check_whole(path)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("start_s", [0.3, 1.1, 2.0])
def test_a_clip_that_was_cut_without_decoding_it_is_whole(start_s, suffix, tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", grey_frames(100), tone(4.0))
    path = cut_without_decoding(whole, tmp_path / f"cut.{suffix}", start_s, start_s + 1.5)
    media.check_whole(path)
    frames, facts = media.read_frames(path, 1000, lambda image: image.mean())
    first = round(start_s * 25)
    if suffix != "mkv":  # Matroska has no edit lists: what players need to begin is shown
        np.testing.assert_allclose(frames[:30], brightness(first + np.arange(30)), atol=3)
    assert 1.4 < facts.seconds < 2.2
    assert len(media.read_waveform(path)) > 1.4 * 16_000


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (lambda size: size + 2, 3.0),
        (lambda size: size + 36, 3.0),  # the size of the file, where that of the sound belongs
        (lambda size: size + 3000, 3.0),
        (lambda size: size - 2, 3.0),
        (lambda size: 2 * size, None),
        (lambda size: size + 12_000, None),
    ],
)
def test_a_wav_header_may_err_by_a_little(header, seconds, tmp_path):
    path = write_clip(tmp_path / "sound.wav", None, tone(3.0), audio_codec="pcm_s16le")
    data = bytearray(path.read_bytes())
    start = data.index(b"data") + 4
    data[start : start + 4] = header(96_000).to_bytes(4, "little")
    path.write_bytes(data)
    if seconds is None:
        with pytest.raises(MediaError, match="damaged: 96,000 of 1"):
            media.check_whole(path)
    else:
        media.check_whole(path)
        assert len(media.read_waveform(path)) / 16_000 == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 16, 64])
def test_sound_of_any_number_of_channels_is_averaged(channels, tmp_path):
    path = tmp_path / "sound.wav"
    sound = np.random.default_rng(0).normal(0, 2000, (16_000, channels)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(sound.tobytes())
    media.check_whole(path)
    np.testing.assert_allclose(
        media.read_waveform(path), sound.mean(axis=1) / 32768, atol=1e-4, rtol=0
    )


def test_sound_and_pictures_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", grey_frames(5), tone(1.0))
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(MediaError, match="frames of 64 x 48 pixels are too large"):
        media.read_frames(path, 8, lambda image: image)
    monkeypatch.setattr(media, "MAX_SECONDS", 0)
    with pytest.raises(MediaError, match="more than 0 hours of sound"):
        media.read_waveform(path)


def test_the_track_that_is_on_is_taken(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        for level in (40, 200):
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            if level == 200:
                stream.disposition = av.stream.Disposition.default
        for level, stream in zip((40, 200), container.streams.video, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8))
            container.mux([*stream.encode(frame), *stream.encode()])
    frames, _ = media.read_frames(path, 8, lambda image: image.mean())
    np.testing.assert_allclose(frames, 200, atol=4)


@pytest.mark.parametrize("size", [0xFFFF_FFFF, 0x7FFF_F000, 0])
def test_a_wav_file_out_of_a_pipe_is_whole(size, tmp_path):
    path = write_clip(tmp_path / "sound.wav", None, tone(1.0), audio_codec="pcm_s16le")
    data = bytearray(path.read_bytes())
    start = data.index(b"data") + 4
    data[start : start + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)
    media.check_whole(path)
    assert len(media.read_waveform(path)) == 16_000


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.mp4", None, "no such file"),
        ("empty.mp4", b"", "empty file"),
        ("text.mp4", b"words\n" * 99, "not readable as media: Invalid data"),
        ("folder", "folder", "not a file"),
    ],
)
def test_what_is_no_media_file_has_a_reason(name, content, reason, tmp_path):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    for read in (media.check_whole, media.read_waveform, lambda p: media.read_frames(p, 8, id)):
        with pytest.raises(MediaError, match=reason):
            read(path)


def test_a_stream_that_is_not_there_has_a_reason(tmp_path):
    silent = write_clip(tmp_path / "silent.mp4", grey_frames(5))
    blind = write_clip(tmp_path / "blind.mp4", None, tone(0.5))
    with pytest.raises(MediaError, match="no audio stream"):
        media.read_waveform(silent)
    with pytest.raises(MediaError, match="no video stream"):
        media.read_frames(blind, 8, id)


def test_the_picture_on_a_cover_is_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        voices = container.add_stream("libmp3lame", rate=16_000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(grey_frames(1)[0], format="rgb24")))
        container.mux(cover.encode())
        samples = av.AudioFrame.from_ndarray(tone(1.0), "fltp", "mono")
        samples.sample_rate = 16_000
        container.mux(voices.encode(samples))
        container.mux(voices.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(MediaError, match="no video stream"):
        media.read_frames(path, 8, id)
    assert len(media.read_waveform(path)) == pytest.approx(16_000, abs=2100)


def test_resizing_is_bilinear_and_does_not_keep_the_aspect_ratio():
    torch = needs_torch.pytorch("the reference runs in PyTorch")

    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(planes, size=(224, 224), mode="bilinear")
    found = media.resized(image, 224).astype(np.float32)
    # Pillow rounds to integers twice, after each axis.
    assert np.abs(found - expected[0].permute(1, 2, 0).numpy()).max() <= 1.01
    assert media.resized(image[:, :50], 224).shape == (224, 224, 3)


def test_a_title_that_is_no_utf8_is_no_reason_to_refuse_a_file(tmp_path):
    path = write_clip(tmp_path / "a.mkv", grey_frames(10), metadata={"title": "a cafe, long ago"})
    path.write_bytes(path.read_bytes().replace(b"a cafe, ", b"a caf\xe9, "))
    assert b"caf\xe9" in path.read_bytes()
    assert media.read_frames(path, 4, id)
