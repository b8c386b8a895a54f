"""Frames and sound of a clip, sampled as AffectGPT does (arXiv 2501.16566).

Frames are sampled uniformly over all frames of the video stream, `floor(i * n / min(k, n))`, and
turned and mirrored as the container says. Audio is brought to 16 kHz, its channels averaged, and
cut into 8 windows of two seconds, of which the i-th starts at `i * (duration - 2) / 7` s; they
overlap in short clips, and what is shorter than two seconds is padded with zeros.

Decoding is FFmpeg's, through PyAV. What cannot be decoded whole is not used in part: it is a
`MediaError`, whose text is the reason that a manifest gives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from PIL import Image

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.data.arrays import sample_rows

from .encoders import RATE, WINDOW, WINDOWS

FRAMES = 8
# Headers count a little more than there is; what a cut-off file lacks is more than this share, and
# more than so many seconds.
WHOLE = 0.95
TOLERANCE_S = 0.1
# Formats whose header names the duration of the file.
DECLARED = {"avi", "flac", "matroska", "mov"}
# What a wav file names as its length whose writer did not know it, or more: a pipe's.
UNKNOWN_LENGTH = 0x7FFF_F000
# A frame of more pixels, or sound of more seconds, would fill the memory; no clip has them.
MAX_PIXELS = 2**26
MAX_SECONDS = 4 * 3600

Converted = TypeVar("Converted")

# FFmpeg prints to the standard error what its return codes say as well.
av.logging.set_level(None)


class MediaError(UserError, ValueError):
    """A clip, or one of its streams, cannot be used; the text is the reason, for a manifest."""


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """Size and length of a video stream.

    Attributes:
        frames: how many it has.
        width, height: of a frame, upright, in pixels.
        seconds: it lasts, by its average frame rate; 0 where it names none.
    """

    frames: int
    width: int
    height: int
    seconds: float


def check_whole(path: Path) -> None:
    """Read a file to its end without decoding it.

    Ogg, MP3 and MPEG streams name no length, so that a part of one is as whole as all of it.

    Raises:
        MediaError: no media file, or one that ends before the time that its header names.
    """
    with _open(path) as container:
        if container.format.name == "wav":
            _check_wav(path)
        declared = (container.duration or 0) / av.time_base
        # In other formats a duration is an estimate, from the bit rate or from what is there.
        if not DECLARED & set(container.format.name.split(",")):
            return
        start = end = (container.start_time or 0) / av.time_base
        for packet in _guarded(container.demux()):
            if (time := packet.dts if packet.pts is None else packet.pts) is not None:
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
    if _breaks_off(end - start, declared):
        raise MediaError(f"damaged: the file ends at {end - start:.2f} of {declared:.2f} s")


def check_length(path: Path, most_s: float) -> None:
    """Read as much of a file, without decoding it, as shows that it is no longer than `most_s`.

    Raises:
        MediaError: no media file, or a longer one.
    """
    with _open(path) as container:
        first = None
        for packet in _guarded(container.demux()):
            if (time := packet.dts if packet.pts is None else packet.pts) is not None:
                time = float(time * packet.time_base)
                first = time if first is None else min(first, time)
                if time - first > most_s:
                    raise MediaError(f"longer than {most_s:g} s, which is the limit")


def _breaks_off(seconds: float, declared: float) -> bool:
    return seconds < WHOLE * declared and declared - seconds > TOLERANCE_S


def _check_wav(path: Path) -> None:
    """Raise MediaError where samples are missing, which FFmpeg does not report."""
    with reading(), open(path, "rb") as file:
        file.seek(12)  # behind RIFF, size and WAVE
        rate = 0
        while len(header := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            if name == b"fmt ":
                # Format, channels and samples per second stand before the bytes per second.
                rate = struct.unpack("<8xI", file.read(12).ljust(12, b"\0"))[0]
                file.seek(-12, os.SEEK_CUR)
            if name == b"data":
                there = path.stat().st_size - file.tell()
                rate = rate or 1
                if size < UNKNOWN_LENGTH and _breaks_off(there / rate, size / rate):
                    raise MediaError(f"damaged: {there:,} of {size:,} bytes of sound are there")
                return
            file.seek(size + size % 2, os.SEEK_CUR)


def read_frames(
    path: Path, count: int, convert: Callable[..., Converted], numbered: bool = False
) -> tuple[list[Converted], VideoFacts]:
    """The frames that are sampled from a video, at most `count`.

    With `count` a multiple of 8, `sample_rows(len(frames), 8)` of what is returned are the same
    frames as `sample_rows(n, 8)` of all `n` are.

    Args:
        path: a file with a video stream.
        count: frames to sample; all, where there are fewer.
        convert: applied to each of them, uint8 RGB `[H, W, 3]`, so that not all are held at once.
        numbered: whether it takes the number of the frame, too.

    Raises:
        MediaError: no video stream, no frames in it, or a damaged file.
    """
    with _open(path) as container:
        stream = _stream(container, "video")
        expected, rate = stream.frames, stream.average_rate or stream.guessed_rate
        seconds = (container.duration or 0) / av.time_base
        declared = 0.0
        if DECLARED & set(container.format.name.split(",")) and stream.duration:
            declared = min(seconds, float(stream.duration * stream.time_base))
    # How many frames there are is known for sure when they are decoded. Most containers say so
    # beforehand; where they do not, or err, a second pass takes the frames of the true number.
    known = max(expected or round(seconds * float(rate or 25)), 1)
    while True:
        wanted = set(sample_rows(known, min(count, known)).tolist())
        taken, n, size, first_s, last_s = [], 0, (0, 0), None, None
        for frame in _decoded(path, "video"):
            if n in wanted:
                image = _upright(frame)
                size = image.shape[1], image.shape[0]
                taken.append(convert(image, n) if numbered else convert(image))
            n += 1
            last_s = frame.time
            first_s = last_s if first_s is None else first_s
        if not n:
            raise MediaError("the video stream has no frames")
        # By time, and not by the number of frames: a clip that was cut without decoding it still
        # counts those before the cut, which are there to decode the others and are not shown.
        shown = (last_s - first_s) + float(1 / rate) if last_s is not None and rate else declared
        if _breaks_off(shown, declared):
            raise MediaError(f"damaged: the pictures end at {shown:.2f} of {declared:.2f} s")
        if n == known:
            return taken, VideoFacts(n, *size, float(n / rate) if rate else 0.0)
        known = n


def frames_at(
    path: Path, rate: int, convert: Callable[[np.ndarray], Converted], most: int
) -> list[Converted]:
    """A video's pictures at even times, `rate` a second, by the timestamps of its frames.

    Args:
        path: a file with a video stream.
        rate: pictures per second of the result; a frame is repeated or left out for it.
        convert: applied to each of them, uint8 RGB `[H, W, 3]`.
        most: pictures, of which all are held at once.

    Raises:
        MediaError: no video stream, no frames in it, a damaged file, or more than `most`.
    """
    taken: list[Converted] = []
    first = None
    for number, frame in enumerate(_decoded(path, "video")):
        time = number / rate if frame.time is None else frame.time
        first = time if first is None else first
        due = round((time - first) * rate)
        if due >= most:
            raise MediaError(f"longer than {most / rate:g} s, which is more than an utterance")
        # The picture before this one is shown until it is due.
        taken += taken[-1:] * (due - len(taken))
        if due == len(taken):
            taken.append(convert(_upright(frame)))
    if not taken:
        raise MediaError("the video stream has no frames")
    return taken


def read_waveform(path: Path) -> np.ndarray:
    """All sound of a file, float32 `[N]` at 16 kHz, the mean of its channels.

    Raises:
        MediaError: no audio stream, nothing in it, or a damaged file.
    """
    with _open(path) as container:
        _stream(container, "audio")
    # Samples of all channels side by side: of channels in planes of their own, PyAV reads only the
    # first eight, and ends the process at the next.
    resampler = av.AudioResampler(format="flt", rate=RATE)
    parts: list[np.ndarray] = []
    samples = 0
    try:
        for frame in _with_end(_decoded(path, "audio")):
            for out in resampler.resample(frame) if frame is not None or parts else ():
                # Averaged here, since FFmpeg's own mix of channels depends on the sample format.
                mixed = out.to_ndarray().reshape(-1, out.layout.nb_channels).mean(1, np.float64)
                parts.append(mixed.astype(np.float32))
                samples += len(mixed)
            if samples > MAX_SECONDS * RATE:
                raise MediaError(f"more than {MAX_SECONDS // 3600} hours of sound")
    except MediaError:
        raise
    except ValueError as error:  # layout or rate change on the way
        raise MediaError(f"damaged: {_reason(error)}") from None
    if not samples:
        raise MediaError("the audio stream has no samples")
    waveform = np.concatenate(parts)
    if not np.isfinite(waveform).all():
        raise MediaError("damaged: samples that are not finite")
    return waveform


def window_starts(samples: int) -> np.ndarray:
    """Where each window starts, int `[8]`: `floor(i * (samples - 32000) / 7)`, 0 in short clips."""
    return np.arange(WINDOWS) * max(samples - WINDOW, 0) // (WINDOWS - 1)


def windows(waveform: np.ndarray) -> np.ndarray:
    """The windows `[8, 32000]` of a waveform `[N]`; below two seconds, zeros follow it."""
    padded = np.pad(waveform, (0, max(WINDOW - len(waveform), 0)))
    return np.stack([padded[start : start + WINDOW] for start in window_starts(len(waveform))])


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 `[size, size, 3]`, bilinear, of uint8 `[H, W, 3]`; the aspect ratio is not kept.

    What shrinks is averaged over its area (Pillow's filter widens), so that nothing aliases.
    """
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def check_file(path: Path) -> None:
    """Raises MediaError where there is no file, or an empty one."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise MediaError("no such file") from None
    except OSError as error:
        raise MediaError(error.strerror or str(error)) from None
    if not path.is_file():
        raise MediaError("not a file")
    if not size:
        raise MediaError("empty file")


# Metadata that is not UTF-8 is no reason to refuse a file. From version 19 on, PyAV keeps such
# bytes by itself, and the argument is gone.
_FOREIGN_METADATA = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


def _open(path: Path) -> av.container.InputContainer:
    check_file(path)
    try:
        return av.open(str(path), **_FOREIGN_METADATA)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"not readable as media: {_reason(error)}") from None


def _stream(
    container: av.container.InputContainer, kind: str
) -> av.video.stream.VideoStream | av.audio.stream.AudioStream:
    """The stream of a kind that players show: the first that is on; no cover art."""
    disposition = av.stream.Disposition
    streams = [
        stream
        for stream in getattr(container.streams, kind)
        if not stream.disposition & disposition.attached_pic
    ]
    if not streams:
        raise MediaError(f"no {kind} stream")
    return next((s for s in streams if s.disposition & disposition.default), streams[0])


def _decoded(path: Path, kind: str) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """The frames of the first stream of a kind, in order of presentation."""
    with _open(path) as container:
        stream = _stream(container, kind)
        # Clips are decoded side by side, one a process.
        stream.codec_context.thread_count = 1
        if kind == "video":
            _check_size(stream.codec_context)
        yield from _guarded(container.decode(stream))


def _check_size(picture: av.VideoCodecContext | av.VideoFrame) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise MediaError(f"frames of {picture.width} x {picture.height} pixels are too large")


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns errors of FFmpeg, and of the disk below it, into MediaError."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"damaged: {_reason(error)}") from None


def _guarded(items: Iterable[Any]) -> Iterator[Any]:
    with reading():
        yield from items


def _with_end(items: Iterator[Any]) -> Iterator[Any]:
    """The items and then None, with which FFmpeg's filters are emptied."""
    yield from items
    yield None


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB, turned and mirrored as the container's display matrix says, to quarters of a turn.

    A phone's portrait clip needs it, and one that its front camera has mirrored.
    """
    _check_size(frame)
    image = frame.to_ndarray(format="rgb24")
    if (data := frame.side_data.get("DISPLAYMATRIX")) is None:
        return image
    # Of libavutil/display.h: a pixel (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), "=i4").tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):  # columns become rows
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__
