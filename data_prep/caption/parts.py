"""Sound and pictures of a clip as parts of a message, in the forms that servers take.

Media are sent as data and not as links, which servers fetch with short timeouts, if at all.
"""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..media import RATE, MediaError, check_whole, read_frames, read_waveform, reading
from .settings import MediaSettings

QUALITY = 85  # of JPEG
# Of a file that is sent as it is.
MAX_VIDEO_BYTES = 64 * 2**20


def media_parts(
    kind: str, path: Path | None, form: str, settings: MediaSettings
) -> list[dict[str, Any]]:
    """The parts that show a clip to a model.

    Args:
        kind: "audio" or "video".
        path: the file; None where the clip has none.
        form: one of `settings.FORMS[kind]`.
        settings: how much of it is shown.

    Raises:
        MediaError: no such stream, or a damaged file.
    """
    if path is None:
        raise MediaError(f"no {kind} file")
    check_whole(path)
    if kind == "audio":
        samples = read_waveform(path)[: round(settings.seconds * RATE)]
        return [_sound(_wav(samples), form)]
    if form == "video_url":
        with reading():
            if path.stat().st_size > MAX_VIDEO_BYTES:
                raise MediaError(f"larger than {MAX_VIDEO_BYTES:,} bytes; send frames instead")
            return [_link("video_url", "video/mp4", path.read_bytes())]
    shown, _ = read_frames(path, settings.frames, lambda image: _jpeg(image, settings.pixels))
    return [_link("image_url", "image/jpeg", picture) for picture in shown]


def _sound(data: bytes, form: str) -> dict[str, Any]:
    if form == "audio_url":
        return _link("audio_url", "audio/wav", data)
    return {"type": "input_audio", "input_audio": {"data": _base64(data), "format": "wav"}}


def _link(kind: str, mime: str, data: bytes) -> dict[str, Any]:
    return {"type": kind, kind: {"url": f"data:{mime};base64,{_base64(data)}"}}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _wav(samples: np.ndarray) -> bytes:
    """float32 `[N]` at 16 kHz as a mono wav file of 16 bits."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return stream.getvalue()


def _jpeg(image: np.ndarray, pixels: int) -> bytes:
    """uint8 RGB `[H, W, 3]`, made smaller until its longer side has so many pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((pixels, pixels), Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    picture.save(stream, "jpeg", quality=QUALITY)
    return stream.getvalue()
