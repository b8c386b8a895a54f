"""Clips made on the spot by PyAV: a face that moves, a tone or a voice, every kind of damage."""

import functools
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from matplotlib import cbook
from PIL import Image

RATE = 25


@functools.cache
def portrait() -> np.ndarray:
    """Head and shoulders, uint8 RGB `[216, 184, 3]`: a photograph that comes with Matplotlib."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB")
    return np.asarray(image.crop((100, 0, 468, 432)).resize((184, 216)))


def face_frames(count: int, size: tuple[int, int] = (320, 240), seed: int = 0) -> np.ndarray:
    """uint8 RGB `[count, H, W, 3]`: the portrait drifts over a plain wall."""
    width, height = size
    rng = np.random.default_rng(seed)
    frames = np.full((count, height, width, 3), rng.integers(60, 200, 3), np.uint8)
    face = portrait()[:height, :width]
    room = width - face.shape[1]
    for i, frame in enumerate(frames):
        left = (seed * 7 + i) % (room + 1)
        frame[height - face.shape[0] :, left : left + face.shape[1]] = face
    return frames


def grey_frames(count: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """uint8 RGB `[count, H, W, 3]`: frame i is as bright as `brightness(i)`, to be told apart."""
    levels = brightness(np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, size[1], size[0], 3))


def brightness(i: np.ndarray) -> np.ndarray:
    """Of frame i; neighbours differ by more than a codec errs."""
    return 20 + 8 * (np.asarray(i) % 27)


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    """float32 `[1, N]`, half of full scale."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)[None]


def spoken(text: str, folder: Path) -> Path:
    """A wav file with a voice; needs espeak-ng."""
    path = folder / "speech.wav"
    subprocess.run(["espeak-ng", "-w", str(path), text], check=True)
    return path


HAS_VOICE = shutil.which("espeak-ng") is not None


def write_clip(
    path: Path,
    frames: np.ndarray | None = None,
    sound: np.ndarray | None = None,
    *,
    fps: int = RATE,
    rate: int = 16_000,
    video_codec: str = "mpeg4",
    audio_codec: str = "aac",
    options: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A file with the streams that are given.

    Args:
        path: its suffix names the container.
        frames: uint8 RGB `[T, H, W, 3]`.
        sound: float32 `[channels, N]` at `rate`.
        fps, rate, video_codec, audio_codec: of the streams.
        options, metadata: of the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        container.metadata.update(metadata or {})
        pictures = voices = None
        if frames is not None:
            pictures = container.add_stream(video_codec, rate=fps)
            pictures.height, pictures.width = frames.shape[1:3]
            pictures.pix_fmt = "yuvj420p" if video_codec == "mjpeg" else "yuv420p"
            # Sharp enough that brightness tells frames apart.
            pictures.bit_rate = 2_000_000
        if sound is not None:
            layout = {1: "mono", 2: "stereo"}[len(sound)]
            voices = container.add_stream(audio_codec, rate=rate, layout=layout)
        if pictures is not None:
            for image in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(pictures.encode(frame))
            container.mux(pictures.encode())
        if voices is not None:
            planar = audio_codec in ("aac", "libopus")
            for start in range(0, sound.shape[1], 1024):
                part = sound[:, start : start + 1024]
                if planar:
                    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), "fltp", layout)
                else:
                    packed = (part.T * 32767).round().astype(np.int16).reshape(1, -1)
                    frame = av.AudioFrame.from_ndarray(packed, "s16", layout)
                frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
                container.mux(voices.encode(frame))
            container.mux(voices.encode())
    return path


def write_talking(path: Path, seed: int = 0, seconds: float = 1.0, **options) -> Path:
    """A whole clip: a face, and a tone whose pitch follows from the seed."""
    frames = face_frames(round(seconds * RATE), seed=seed)
    return write_clip(path, frames, tone(seconds, hertz=200 + 10 * seed), **options)


def cut(path: Path, share: float) -> Path:
    """Keep the first part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def rotate(path: Path, quarters: int, mirrored: bool = False) -> Path:
    """Say in an mp4's first track header how players must show it.

    Args:
        path: the file.
        quarters: of a turn, clockwise.
        mirrored: left and right are exchanged before.
    """
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters % 4]
    side = -1 if mirrored else 1
    matrix = np.array([side * cos, side * sin, 0, -sin, cos, 0, 0, 0, 1], dtype=">i4")
    matrix *= np.array([1 << 16] * 2 + [1 << 30], dtype=">i4")[[0, 1, 2, 0, 1, 2, 0, 1, 2]]
    data = bytearray(path.read_bytes())
    # ISO/IEC 14496-12: version 0 of `tkhd` has its matrix 40 bytes behind version and flags.
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = matrix.tobytes()
    path.write_bytes(data)
    return path


def cut_without_decoding(source: Path, path: Path, start_s: float, end_s: float) -> Path:
    """A part of a clip with the packets as they are, as `ffmpeg -ss -c copy` makes it.

    It begins at a key frame before the start; an mp4 hides what comes before by an edit list.
    """
    with av.open(str(source)) as inside, av.open(str(path), "w") as outside:
        streams = {s.index: outside.add_stream_from_template(s) for s in inside.streams}
        inside.seek(round(start_s * av.time_base))
        for packet in inside.demux():
            if packet.dts is None or packet.pts * packet.time_base >= end_s:
                continue
            shift = round(start_s / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = streams[packet.stream.index]
            outside.mux(packet)
    return path


def _without(frames=True, sound=True):
    def make(path: Path, seed: int) -> None:
        pictures = face_frames(RATE, seed=seed) if frames else None
        write_clip(path, pictures, tone(1.0, hertz=300 + seed) if sound else None)

    return make


def _faceless(path: Path, seed: int) -> None:
    write_clip(path, grey_frames(RATE, (320, 240)), tone(1.0, hertz=300 + seed))


def _text(path: Path, seed: int) -> None:
    path.write_text("no film, but words\n" * (50 + seed), encoding="utf-8")


def _cut_off(path: Path, seed: int) -> None:
    write_talking(path, seed)
    cut(path, 0.6)


def _cut_behind_header(path: Path, seed: int) -> None:
    write_talking(path, seed, options={"movflags": "faststart"})
    cut(path, 0.5)


def _frameless(path: Path, seed: int) -> None:
    # Matroska's header names streams that never come; players go by content, not by the suffix.
    none = np.zeros((0, 240, 320, 3), np.uint8)
    write_clip(path.with_suffix(".mkv"), none, tone(1.0, hertz=300 + seed)).rename(path)


# The eight ways in which a clip is broken: the reason that is given, and what makes such a file.
BROKEN = {
    "no audio stream": ("audio: no audio stream", _without(sound=False)),
    "no video stream": ("face, frame: no video stream", _without(frames=False)),
    "no face": ("face: no face in 16 frames", _faceless),
    "empty file": ("empty file", lambda path, seed: path.write_bytes(b"")),
    "text": ("not readable as media: Invalid data found when processing input", _text),
    "cut off": ("not readable as media: Invalid data found when processing input", _cut_off),
    "cut behind its header": ("damaged: the file ends at ", _cut_behind_header),
    "zero length": ("face, frame: the video stream has no frames", _frameless),
}
