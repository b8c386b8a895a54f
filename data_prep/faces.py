"""Faces of a clip: OpenCV's frontal cascade, a network, or boxes and faces that a user has.

AffectGPT sees faces as OpenFace crops them, 112 x 112. The cascade's weights come with a package;
a network (`detectors`), boxes, or OpenFace's own arrays, which the public data sets carry, go
before it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from affectgpt_jax.common import npy

from .media import MAX_PIXELS, MediaError, check_file, resized

SIZE = 112
# Sampled from a clip and searched for a face; a multiple of 8, see `media.read_frames`.
SEARCHED = 16
DETECTOR = "haarcascade_frontalface_default"
# The cascade's box ends at brows and chin, OpenFace's shows the whole face.
MARGIN = 1.2
# Larger frames are searched at this height: a face worth reading is still large enough there.
SEARCH_HEIGHT = 360
SMALLEST = 1 / 9  # of the height of the frame
# Boxes of networks and of users end at chin and hairline, or about there.
BOX_MARGIN = 1.1
# A face of an earlier frame is the same person's no farther off than this, in its sides, and as
# many times as large.
NEAR, SIZES = 0.5, (0.7, 1.4)


# Of boxes: a frame has no longer side, and none is a larger square.
MOST_LEFT, MOST_WIDE = MAX_PIXELS, math.isqrt(MAX_PIXELS)


@functools.cache
def _cascade() -> cv2.CascadeClassifier:
    cv2.setNumThreads(1)  # clips are searched side by side, one a process
    return cv2.CascadeClassifier(f"{cv2.data.haarcascades}{DETECTOR}.xml")


Square = tuple[int, int, int]  # left, top and side, in pixels


def find_face(image: np.ndarray, near: Square | None = None) -> Square | None:
    """Find the face in uint8 RGB `[H, W, 3]`: a square with a margin; None without a face.

    The largest face counts, unless there is one about where it was in an earlier frame: so a track
    stays with one person, and most frames are searched in a small part only.

    Args:
        image: a frame.
        near: the square of an earlier frame.

    Returns:
        A square, which may reach over the edge of the image.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = min(1.0, SEARCH_HEIGHT / grey.shape[0])
    grey = shrunk(grey, scale)
    found = _search_near(grey, tuple(value * scale for value in near)) if near else None
    found = found or _search(grey, SMALLEST * grey.shape[0], min(grey.shape))
    if found is None:
        return None
    left, top, side = found
    margin = side * (MARGIN - 1) / 2
    return tuple(round(value / scale) for value in (left - margin, top - margin, side * MARGIN))


def shrunk(image: np.ndarray, scale: float) -> np.ndarray:
    """An image `[H, W, ...]` with sides `scale` as long, 0 to 1, but of a pixel at the least."""
    if scale == 1:
        return image
    across, down = (max(scale, 1 / side) for side in (image.shape[1], image.shape[0]))
    return cv2.resize(image, None, fx=across, fy=down, interpolation=cv2.INTER_AREA)


def square_of(box: Sequence[float]) -> Square:
    """The square around a box of left, top, width and height, with a margin."""
    left, top, width, height = box
    side = max(width, height) * BOX_MARGIN
    return (
        round(left + width / 2 - side / 2),
        round(top + height / 2 - side / 2),
        max(1, round(side)),
    )


def choose(boxes: Sequence[Sequence[float]], near: Square | None = None) -> Square | None:
    """Of the boxes of a frame, the largest first, the one that `find_face` would take."""
    squares = [square_of(box) for box in boxes]
    if near:
        left, top, side = near
        for x, y, other in squares:
            away = max(abs(x + other / 2 - left - side / 2), abs(y + other / 2 - top - side / 2))
            if away <= NEAR * side and SIZES[0] <= other / side <= SIZES[1]:
                return x, y, other
    return next(iter(squares), None)


def find_faces(grey: np.ndarray) -> list[Square]:
    """All faces in grey uint8 `[H, W]`, without a margin, the largest first."""
    scale = min(1.0, SEARCH_HEIGHT / grey.shape[0])
    grey = shrunk(grey, scale)
    found = _all(grey, SMALLEST * grey.shape[0], min(grey.shape))
    return [tuple(round(v / scale) for v in square) for square in found]


def _search_near(grey: np.ndarray, square: tuple[float, ...]) -> Square | None:
    """A face of about the size of a square, no farther from it than half its side."""
    left, top, side = square
    x, y = max(0, round(left - side / 2)), max(0, round(top - side / 2))
    part = grey[y : max(0, round(top + 1.5 * side)), x : max(0, round(left + 1.5 * side))]
    face = side / MARGIN
    found = _search(part, *(size * face for size in SIZES)) if part.size else None
    return found and (found[0] + x, found[1] + y, found[2])


def _search(grey: np.ndarray, smallest: float, largest: float) -> Square | None:
    """The largest face within bounds for its side."""
    return next(iter(_all(grey, smallest, largest)), None)


def _all(grey: np.ndarray, smallest: float, largest: float) -> list[Square]:
    """Faces within bounds for their side, the largest first."""
    sizes = {"minSize": (max(24, round(smallest)),) * 2, "maxSize": (round(largest),) * 2}
    found = _cascade().detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5, **sizes)
    if not len(found):
        return []
    # Of two as large, the leftmost, then the upper: an order that does not depend on the search.
    boxes = sorted(found.tolist(), key=lambda box: (-box[2], box[0], box[1]))
    return [(left, top, side) for left, top, side, _ in boxes]


def crop(image: np.ndarray, square: Square) -> np.ndarray:
    """The pixels of a square, uint8 RGB `[112, 112, 3]`; pixels beyond the edge repeat the edge."""
    left, top, side = square
    rows = np.clip(np.arange(top, top + side), 0, image.shape[0] - 1)
    columns = np.clip(np.arange(left, left + side), 0, image.shape[1] - 1)
    return resized(image[rows[:, None], columns[None]], SIZE)


def read_boxes(path: Path) -> np.ndarray:
    """The boxes of a clip's frames: left, top, width, height in pixels, float64 `[frames, 4]`.

    A frame without a face has a row that is not finite, or of no width or height.

    Raises:
        MediaError: no file, none that NumPy reads without pickle, another shape, or boxes that no
            frame holds.
    """
    boxes = _read_array(path)
    if boxes.dtype.kind not in "fiu" or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise MediaError(
            f"the array is {boxes.dtype} {list(boxes.shape)}, expected numbers [frames, 4]: left, "
            "top, width and height"
        )
    boxes = boxes.astype(np.float64)
    far = np.isfinite(boxes).all(axis=1) & (
        (np.abs(boxes[:, :2]) > MOST_LEFT) | (boxes[:, 2:] > MOST_WIDE)
    ).any(axis=1)
    if far.any():
        number = int(far.argmax())
        shown = ", ".join(f"{value:g}" for value in boxes[number])
        raise MediaError(
            f"the box of frame {number:,} is {shown}; expected left and top of at most "
            f"{MOST_LEFT:,}, width and height of at most {MOST_WIDE:,} pixels"
        )
    return boxes


def _read_array(path: Path) -> np.ndarray:
    check_file(path)
    try:
        return npy.read_file(path)
    except (OSError, ValueError) as error:
        raise MediaError(f"not readable as an array: {npy.reason(error)}") from None


def read_openface(path: Path, order: str = "bgr") -> np.ndarray:
    """A face track of `openface_face/NAME.npy`: uint8 RGB `[T, 112, 112, 3]`.

    Args:
        path: the array.
        order: of the channels in the file, bgr or rgb; OpenCV, which wrote the public sets, has
            blue first.

    Raises:
        MediaError: no file, none that NumPy reads without pickle, or another shape.
    """
    faces = _read_array(path)
    if faces.dtype != np.uint8 or faces.ndim != 4 or faces.shape[1:] != (SIZE, SIZE, 3):
        raise MediaError(
            f"the array is {faces.dtype} {list(faces.shape)}, expected uint8 [T, {SIZE}, {SIZE}, 3]"
        )
    if not len(faces):
        raise MediaError("no face in the array")
    return faces[..., ::-1] if order == "bgr" else faces
