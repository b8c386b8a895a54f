"""Face detectors that are networks: YuNet and CenterFace, from the ONNX file that a user has.

OpenCV runs them on the CPU, a frame at a time, in the processes that decode: there a batch is no
faster than its frames. No weights come with the package; `face_detection_yunet_2023mar.onnx` is in
OpenCV's model zoo, `centerface.onnx` in Star-Clouds/CenterFace.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import cv2
import numpy as np

from affectgpt_jax.common.files import sha256_of

from .clips import ClipError
from .faces import shrunk

# A frame is searched with this longer side, in pixels: YuNet finds faces of 10 pixels and more.
SIDE = 320
STRIDE = 32  # sides are padded to multiples of it
LEAST_SCORE = {"YuNet": 0.7, "CenterFace": 0.5}
OVERLAP = 0.3  # of two boxes of one face, at the least
MOST = 50  # boxes before overlapping ones are left out
_YUNET = {f"{part}_{stride}" for part in ("cls", "obj", "bbox", "kps") for stride in (8, 16, 32)}
# Heat map, scale, offset and landmarks, as the published file calls them.
_CENTERFACE = ("537", "538", "539", "540")

Box = tuple[float, float, float, float]  # left, top, width and height, in pixels


@dataclasses.dataclass(frozen=True)
class DetectorFile:
    """A file of a detector.

    Attributes:
        path: where it is.
        kind: "YuNet" or "CenterFace".
        sha256: of the file, in hex.
    """

    path: Path
    kind: str
    sha256: str

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.kind} (sha256 {self.sha256[:12]})"


def read_detector(path: Path) -> DetectorFile:
    """Which detector a file is, by the names of its outputs.

    Raises:
        ClipError: no file, none that OpenCV reads, or of another network.
    """
    if not path.is_file():
        raise ClipError(f"--face-detector {path}: no such file; expected an ONNX file")
    try:
        outputs = set(cv2.dnn.readNetFromONNX(str(path)).getUnconnectedOutLayersNames())
    except cv2.error as error:
        why = str(error).strip().splitlines()[-1][:200]
        raise ClipError(f"--face-detector {path}: OpenCV cannot read it as ONNX ({why})") from None
    kind = "YuNet" if outputs >= _YUNET else "CenterFace" if outputs >= {*_CENTERFACE} else ""
    if not kind:
        raise ClipError(
            f"--face-detector {path}: its outputs are {', '.join(sorted(outputs))[:200]}; expected "
            "those of YuNet (cls_8, ...) or of CenterFace (537 to 540)"
        )
    return DetectorFile(path, kind, sha256_of(path))


class Detector:
    """A detector that is loaded.

    Args:
        file: see `read_detector`.
    """

    def __init__(self, file: DetectorFile):
        cv2.setNumThreads(1)  # clips are searched side by side, one a process
        self._kind = file.kind
        if file.kind == "YuNet":
            least = LEAST_SCORE["YuNet"]
            self._net = cv2.FaceDetectorYN.create(
                str(file.path), "", (SIDE, SIDE), least, OVERLAP, MOST
            )
        else:
            self._net = cv2.dnn.readNetFromONNX(str(file.path))

    def __call__(self, image: np.ndarray) -> list[Box]:
        """The faces of uint8 RGB `[H, W, 3]`, the largest first."""
        scale = min(1.0, SIDE / max(image.shape[:2]))
        image = shrunk(image, scale)
        found = self._yunet(image) if self._kind == "YuNet" else self._centerface(image)
        # A network may say anything, also that a face is of no size that there is.
        found = found[(np.abs(found) <= 2 * SIDE).all(axis=1)]
        boxes = [tuple(float(value / scale) for value in box) for box in found]
        return sorted(boxes, key=lambda box: (-box[2] * box[3], box[0], box[1]))

    def _yunet(self, image: np.ndarray) -> np.ndarray:
        self._net.setInputSize(image.shape[1::-1])
        _, found = self._net.detect(np.ascontiguousarray(image[..., ::-1]))
        return np.zeros((0, 4)) if found is None else found[:, :4]

    def _centerface(self, image: np.ndarray) -> np.ndarray:
        padding = [(0, -size % STRIDE) for size in image.shape[:2]]
        self._net.setInput(cv2.dnn.blobFromImage(np.pad(image, [*padding, (0, 0)])))
        heat, scale, offset, _ = self._net.forward(_CENTERFACE)
        return centerface_boxes(heat, scale, offset)


def centerface_boxes(heat: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The boxes that CenterFace's outputs mean, without those that overlap a better one.

    Args:
        heat: `[1, 1, h, w]`, the chance of a face's centre in a cell of 4 x 4 pixels.
        scale: `[1, 2, h, w]`, log of height and width in cells.
        offset: `[1, 2, h, w]`, of the centre within the cell, down and to the right.

    Returns:
        Left, top, width and height in pixels, float `[N, 4]`, the best first.
    """
    rows, columns = np.nonzero(heat[0, 0] > LEAST_SCORE["CenterFace"])
    scores = heat[0, 0, rows, columns]
    height, width = 4 * np.exp(scale[0][:, rows, columns])
    down, right = offset[0][:, rows, columns]
    left = 4 * (columns + right + 0.5) - width / 2
    top = 4 * (rows + down + 0.5) - height / 2
    boxes = np.stack([left, top, width, height], axis=1)
    if not len(boxes):
        return boxes
    kept = cv2.dnn.NMSBoxes(
        boxes.tolist(), scores.tolist(), LEAST_SCORE["CenterFace"], OVERLAP, top_k=MOST
    )
    return boxes[np.asarray(kept, int).reshape(-1)]


@functools.cache
def opened(file: DetectorFile) -> Detector:
    """The detector of a file, loaded once a process."""
    return Detector(file)
