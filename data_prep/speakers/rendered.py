"""Clips of a face that talks, made on the spot, of which it is known whether the voice is its own.

A photograph that comes with Matplotlib opens its mouth with the syllables of a synthetic voice, or,
in half of the clips, with those of another: what the speaker check is tried on, without any film.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

from .mfcc import SAMPLE_RATE
from .synchrony import RATE

WIDTH, HEIGHT = 640, 360
# Part of the photograph, and in it the mouth: centre and half axes, in pixels.
PART = 100, 0, 468, 432
MOUTH = 167, 278, 34, 26
SCALE = 0.6
LEVEL = 0.25  # of the voice, of full scale


def rendered(folder: Path, seed: int = 0, count: int = 40) -> dict[str, bool]:
    """Write clips `talking-000.mp4` and so on.

    Args:
        folder: where to; it is made.
        seed: of all that is random.
        count: clips.

    Returns:
        By name, whether the face speaks what is heard: half of them do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    truth = {}
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        name, own = f"talking-{number:03d}", number % 2 == 0
        frames = round(RATE * rng.uniform(2.4, 4))
        heard = _syllables(rng, frames)
        # Of those that do not speak, every other one keeps its mouth shut.
        shown = heard if own else _syllables(rng, frames) * (number % 4 == 1)
        write_clip(folder / f"{name}.mp4", _pictures(rng, shown), _voice(rng, heard))
        truth[name] = own
    return truth


def _syllables(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Loudness of speech, 0 to 1, at ten times the rate of frames: four or five bumps a second."""
    level = np.zeros(frames * 10)
    at = rng.integers(0, 40)
    while at < len(level):
        length = int(rng.integers(35, 65))
        bump = np.sin(np.linspace(0, np.pi, length)) ** 2 * rng.uniform(0.5, 1)
        level[at : at + length] = bump[: len(level) - at]
        at += length + (int(rng.integers(40, 110)) if rng.random() < 0.2 else 0)
    return level


def _voice(rng: np.random.Generator, level: np.ndarray) -> np.ndarray:
    """float32 `[N]` at 16 kHz: harmonics of a pitch that glides, and some noise."""
    samples = len(level) * SAMPLE_RATE // (10 * RATE)
    loud = np.interp(np.arange(samples), np.linspace(0, samples, len(level)), level)
    pitch = rng.uniform(100, 220) * (1 + 0.1 * loud)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, 9))
    sound = LEVEL * loud * voice + 0.003 * rng.standard_normal(samples)
    return np.clip(sound, -1, 1).astype(np.float32)


def _pictures(rng: np.random.Generator, level: np.ndarray) -> np.ndarray:
    """uint8 RGB `[T, 360, 640, 3]`: the head sways, the mouth opens, pixels are noisy."""
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = np.asarray(Image.open(file).convert("RGB").crop(PART))
    opened = level.reshape(-1, 10).mean(axis=1)
    sway = np.cumsum(rng.normal(0, 0.4, (len(opened), 2)), axis=0)
    left, top = rng.uniform(60, 300), rng.uniform(20, 80)
    wall = np.full((HEIGHT, WIDTH, 3), rng.integers(70, 190, 3), np.uint8)
    noise = rng.uniform(2, 6)
    out = []
    for amount, (dx, dy) in zip(opened, sway):
        head = photograph.copy()
        x, y, half, most = MOUTH
        cv2.ellipse(head, (x, y), (half, 2 + round(most * amount)), 0, 0, 360, (45, 15, 15), -1)
        move = np.array([[SCALE, 0, left + dx], [0, SCALE, top + dy]])
        picture = cv2.warpAffine(
            head, move, (WIDTH, HEIGHT), wall.copy(), cv2.INTER_LINEAR, cv2.BORDER_TRANSPARENT
        )
        grain = rng.standard_normal(picture.shape[:2], np.float32)[..., None]
        noisy = picture + np.float32(noise) * grain
        out.append(np.clip(noisy, 0, 255).astype(np.uint8))
    return np.stack(out)


def write_clip(path: Path, pictures: np.ndarray, sound: np.ndarray) -> None:
    """A file with pictures uint8 RGB `[T, H, W, 3]` at 25 frames/s, and sound `[N]` at 16 kHz."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=RATE)
        video.height, video.width = pictures.shape[1:3]
        video.pix_fmt, video.bit_rate = "yuv420p", 2_000_000
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        for start in range(0, len(sound), 1024):
            frame = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], "fltp", "mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, start
            frame.time_base = Fraction(1, SAMPLE_RATE)
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
