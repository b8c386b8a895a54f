"""A picture of what a model is given of a clip: frames, faces, and windows of its sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from affectgpt_jax.common import drawing

from .clips import Clip
from .encoders import RATE, WINDOW
from .media import FRAMES, MediaError, read_frames, read_waveform, window_starts

HEIGHT = 180  # of a frame, in pixels
POINTS = 1200  # of the waveform


def draw_clip(
    path: Path,
    clip: Clip,
    inputs: Mapping[str, np.ndarray],
    problems: Mapping[str, str],
    lines: Sequence[str] = (),
) -> None:
    """Write a PNG file with a row for each thing that there is.

    Args:
        path: of the file, whose folder is made.
        clip: decoded once more, for whole frames and all of its sound.
        inputs: what its encoders were given, as `extractor.Extracted` has it.
        problems: by feature, why it is missing; stands where the row would be.
        lines: below the picture, such as subtitle and answers.
    """
    rows = []
    if clip.video and (frames := _frames(clip.video)):
        rows.append(("frames", frames))
    for feature in ("face", "audio"):
        if feature in inputs or feature in problems:
            rows.append((feature, inputs.get(feature)))
    figure = drawing.new_figure(12, 1.75 * len(rows) + 0.25 * len(lines) + 0.6)
    figure.suptitle(clip.name, fontsize=12, parse_math=False)
    figure.supxlabel("\n".join(lines), fontsize=9, parse_math=False, x=0.01, ha="left")
    parts = figure.subfigures(max(len(rows), 1), 1, squeeze=False)[:, 0]
    for part, (what, found) in zip(parts, rows):
        if found is None:
            panel = part.subplots()
            panel.axis("off")
            text = f"no {what}: {problems[what]}"
            panel.text(0.5, 0.5, text, ha="center", va="center", parse_math=False)
        elif what == "audio":
            _draw_sound(part.subplots(), clip)
        else:
            part.suptitle(what, fontsize=9, x=0.01, ha="left")
            panels = part.subplots(1, FRAMES)
            for panel, image in zip(panels, found, strict=False):
                panel.imshow(image)
            for panel in panels:
                panel.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.save_png(figure, path)


def _frames(path: Path) -> list[np.ndarray]:
    def small(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        size = max(1, round(width * HEIGHT / height)), HEIGHT
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))

    try:
        return read_frames(path, FRAMES, small)[0]
    except MediaError:  # the picture is about the features, which have their own problems
        return []


def _draw_sound(panel, clip: Clip) -> None:
    waveform = read_waveform(clip.sound)
    size = -(-len(waveform) // POINTS)
    padded = np.pad(waveform, (0, -len(waveform) % size)).reshape(-1, size)
    time = np.arange(len(padded)) * size / RATE
    panel.fill_between(time, padded.min(axis=1), padded.max(axis=1), color="tab:blue", linewidth=0)
    top = max(float(np.abs(waveform).max()), 1e-3)
    # Windows overlap in short clips: each has a bar of its own below the wave.
    for number, start in enumerate(window_starts(len(waveform))):
        end = min(start + WINDOW, len(waveform))
        y = -top * (1.15 + 0.08 * number)
        panel.plot([start / RATE, end / RATE], [y, y], color="tab:orange", linewidth=2)
    panel.set_title("sound, and the windows that the encoder hears", fontsize=9, loc="left")
    panel.set_xlim(0, len(waveform) / RATE)
    panel.set_xlabel("s", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.set_yticks([-top, 0, top], [f"{-top:.2g}", "0", f"{top:.2g}"])
