"""What is seen and heard of a clip at 25 frames/s: faces that are followed, and the sound.

Every fifth frame is searched for faces by the cascade. Boxes that overlap are one track, and are
interpolated and smoothed by a median between them. Up to four tracks are kept, the largest first.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from .. import faces, media
from ..clips import Clip
from ..media import MediaError
from .mfcc import PER_FRAME, mfcc
from .synchrony import RATE, energy_trace

SEARCH_EVERY = 5
KEPT_HEIGHT = 540  # pixels: pictures of a clip are held at this height
LONGEST_S = 120
OVERLAP = 0.5  # intersection over union of neighbouring boxes of a track
BRIDGED = 15  # frames: as long may the search fail
SHORTEST = 10  # frames of a track
MEDIAN = 13  # frames
MOST_TRACKS = 4
# In a square of the cascade, which ends at brows and chin: top, bottom, left and right.
MOUTH = 0.66, 0.96, 0.27, 0.73
UPPER = 0.05, 0.45, 0.15, 0.85
# What the networks see around the centre of a box, in halves of its side: up, down, and sideways.
# Their authors crop so from another detector's boxes, which the cascade's stand for here.
UP, DOWN, SIDEWAYS = 0.3, 1.1, 0.7


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """A face that is followed over neighbouring frames.

    Attributes:
        start: its first frame.
        area: of its boxes, summed, in pixels.
        mouth, upper: mean brightness of these regions, float32 `[T]`.
        crops: for a network, grey uint8 `[T, 112, 112]`; None where nobody asked.
    """

    start: int
    area: float
    mouth: np.ndarray
    upper: np.ndarray
    crops: np.ndarray | None

    def __len__(self) -> int:
        return len(self.mouth)


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """A clip as the speaker check sees it.

    Attributes:
        problem: why it cannot be judged; "" if it can.
        frames, faces: pictures at 25 frames/s, and in how many of the searched ones a face was.
        energy: of the sound in dB, `[frames]`.
        mfcc: `[4 * frames, 13]` for a network, else None.
        tracks: the largest first.
    """

    problem: str = ""
    frames: int = 0
    faces: int = 0
    energy: np.ndarray | None = None
    mfcc: np.ndarray | None = None
    tracks: list[Track] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Look:
    """A clip to look at, and whether a network will judge it."""

    clip: Clip
    network: bool = False


def look(job: Look) -> Seen:
    """Decode a clip and follow its faces."""
    try:
        return _look(job.clip, job.network)
    except MediaError as error:
        return Seen(str(error))


def _look(clip: Clip, network: bool) -> Seen:
    if clip.video is None:
        raise MediaError("no video file")
    if clip.sound is None:
        raise MediaError("no audio file")
    for path in {clip.video, clip.sound}:
        media.check_whole(path)
    pictures = media.frames_at(clip.video, RATE, _grey, LONGEST_S * RATE)
    waveform = media.read_waveform(clip.sound)
    found = [faces.find_faces(image) for image in pictures[::SEARCH_EVERY]]
    tracks = [
        _track(pictures, start, boxes, network) for start, boxes in follow(found, len(pictures))
    ]
    tracks.sort(key=lambda track: (-track.area, track.start))
    return Seen(
        frames=len(pictures),
        faces=sum(map(bool, found)),
        energy=energy_trace(waveform, len(pictures), media.RATE).astype(np.float32),
        mfcc=mfcc(waveform, PER_FRAME * len(pictures)) if network else None,
        tracks=tracks[:MOST_TRACKS],
    )


def _grey(image: np.ndarray) -> np.ndarray:
    """Grey uint8 `[H, W]` of RGB, at most `KEPT_HEIGHT` high."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = min(1.0, KEPT_HEIGHT / grey.shape[0])
    if scale == 1:
        return grey
    return cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def follow(
    found: list[list[faces.Square]], frames: int, every: int = SEARCH_EVERY
) -> list[tuple[int, np.ndarray]]:
    """Link boxes of searched frames.

    Args:
        found: of each searched frame the squares `(left, top, side)`.
        frames: of the clip.
        every: from one searched frame to the next.

    Returns:
        Of each track its first frame, and a square for each of its frames, float64 `[T, 3]`: centre
        and side.
    """
    open_tracks: list[dict[int, faces.Square]] = []
    for number, squares in enumerate(found):
        now, taken = number * every, set()
        for square in squares:
            best, most = None, OVERLAP
            for i, track in enumerate(open_tracks):
                last = max(track)
                overlap = _overlap(track[last], square)
                if i not in taken and now - last <= BRIDGED and overlap > most:
                    best, most = i, overlap
            if best is None:
                best = len(open_tracks)
                open_tracks.append({})
            taken.add(best)
            open_tracks[best][now] = square
    out = []
    for track in open_tracks:
        # What lies between two searched frames is seen in neither.
        start = max(0, min(track) - every + 1)
        stop = min(frames, max(track) + every)
        if stop - start >= SHORTEST and len(track) > 1:
            known = np.array([(x + s / 2, y + s / 2, s) for x, y, s in track.values()])
            at = np.arange(start, stop)
            values = [np.interp(at, list(track), column) for column in known.T]
            out.append((start, np.stack([_median(v) for v in values], axis=1)))
    return out


def _overlap(a: faces.Square, b: faces.Square) -> float:
    """Intersection over union."""
    sides = [max(0, min(a[i] + a[2], b[i] + b[2]) - max(a[i], b[i])) for i in (0, 1)]
    common = sides[0] * sides[1]
    return common / (a[2] ** 2 + b[2] ** 2 - common)


def _median(values: np.ndarray) -> np.ndarray:
    half = MEDIAN // 2
    padded = np.pad(values, half, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, MEDIAN), axis=1)


def _track(pictures: list[np.ndarray], start: int, boxes: np.ndarray, network: bool) -> Track:
    mouth, upper, crops = [], [], []
    for image, (x, y, side) in zip(pictures[start:], boxes):
        left, top = x - side / 2, y - side / 2
        mouth.append(_brightness(image, left, top, side, MOUTH))
        upper.append(_brightness(image, left, top, side, UPPER))
        if network:
            crops.append(_crop(image, x, y, side / 2))
    return Track(
        start,
        float(np.sum(boxes[:, 2] ** 2)),
        np.array(mouth, np.float32),
        np.array(upper, np.float32),
        np.stack(crops) if network else None,
    )


def _brightness(image: np.ndarray, left: float, top: float, side: float, part: tuple) -> float:
    """Mean of a part of a square, as far as the picture shows it; 0 where it shows nothing."""
    rows, columns = (
        slice(*(max(0, round(corner + side * share)) for share in shares))
        for corner, shares in ((top, part[:2]), (left, part[2:]))
    )
    region = image[rows, columns]
    return float(region.mean()) if region.size else 0.0


def _crop(image: np.ndarray, x: float, y: float, half: float) -> np.ndarray:
    """What the networks see of a face, `[112, 112]`; beyond the edge the picture is repeated."""
    rows = np.arange(round(y - UP * half), round(y + DOWN * half))
    columns = np.arange(round(x - SIDEWAYS * half), round(x + SIDEWAYS * half))
    rows, columns = (np.clip(i, 0, n - 1) for i, n in zip((rows, columns), image.shape))
    return cv2.resize(
        image[rows[:, None], columns], (faces.SIZE, faces.SIZE), interpolation=cv2.INTER_LINEAR
    )
