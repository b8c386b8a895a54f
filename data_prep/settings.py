"""The settings of an extraction, which records keep: what decides the values of their features."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from .encoders import BATCH, PRECISIONS, EncoderError, EncoderPlace, has_gpu

# To be raised with every change of this code that changes features.
VERSION = 2
# What may change a bit of the features, beside the weights.
PACKAGES = ("av", "numpy", "pillow", "torch", "transformers")


class UsedEncoder(TypedDict):
    """An encoder as manifests name it, and `EncoderPlace.sha256` of its files."""

    name: str
    sha256: str


# What `faces` of settings names as the detector where boxes were given.
BOXES = "boxes"
DETECTOR_HELP = "YuNet or CenterFace as an ONNX file; default: OpenCV's cascade"


class Settings(TypedDict):
    """What an extraction was made with.

    Attributes:
        version: of this code.
        features: that were asked for.
        encoders: by kind, "video" or "audio".
        batch: clips that an encoder sees at a time.
        device, precision: of PyTorch.
        faces: "detector", and "order of arrays", the channels of OpenFace's.
        versions: of packages.

    Records also say how many of them have OpenFace's faces, as "face arrays": at most so many,
    where the records are a part of those that were extracted.
    """

    version: int
    features: list[str]
    encoders: dict[str, UsedEncoder]
    batch: int
    device: str
    precision: str
    faces: dict[str, str]
    versions: dict[str, str]


def add_encoder_flags(add: Callable[..., Any]) -> None:
    """The flags of what extracts files as a run's records were, see `extractor.extraction_of`."""
    add("--trained-on", metavar="DIR", help="the run's training records, if they are elsewhere now")
    for kind, what in (("video", "faces and frames"), ("audio", "sound")):
        text = f"where the encoder of {what} is; default: where it was, or the hub's cache"
        add(f"--{kind}", metavar="[NAME=]DIR", help=text)
    add("--face-detector", type=Path, metavar="FILE", help=DETECTOR_HELP)
    add("--device", choices=("cpu", "cuda"), help="of the encoders; default: as for the records")


def make_settings(
    features: Sequence[str],
    places: Mapping[str, EncoderPlace],
    batch: int | None,
    device: str,
    precision: str,
    face_order: str,
    faces: str | None = None,
) -> Settings:
    """The settings of an extraction that begins now; `batch` is that of the device if None, and
    `faces`, what finds them, the cascade."""
    from .faces import DETECTOR  # loads OpenCV, which the help does without

    return {
        "version": VERSION,
        "features": list(features),
        "encoders": {k: {"name": p.name, "sha256": p.sha256()} for k, p in places.items()},
        "batch": batch or BATCH[device],
        "device": device,
        "precision": precision,
        "faces": {"detector": faces or DETECTOR, "order of arrays": face_order},
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """The versions of the packages that compute features here."""
    import cv2

    # OpenCV is one module, which several packages bring.
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | {"opencv": cv2.__version__}


def differences(theirs: Settings, mine: Mapping[str, Any]) -> list[str]:
    """What may make features of the same clip another than in records, beside the encoders."""
    lines = [
        f"{key} {theirs[key]} there, {mine[key]} here"
        for key in ("version", "device", "precision", "batch")
        if theirs[key] != mine[key]
    ]
    here = mine["versions"]
    return lines + [
        f"{name} {version} there, {here.get(name, 'none')} here"
        for name, version in theirs["versions"].items()
        if here.get(name) != version
    ]


def placement(device: str | None, precision: str | None) -> tuple[str, str]:
    """Device and precision; by default the fastest that this machine has.

    Raises:
        EncoderError: a GPU that is not here, or a precision that a CPU does not have.
    """
    gpu = has_gpu()
    device = device or ("cuda" if gpu else "cpu")
    if device == "cuda" and not gpu:
        raise EncoderError("--device cuda: PyTorch finds no GPU here; leave the flag out for a CPU")
    precision = precision or PRECISIONS[device][0]
    if precision not in PRECISIONS[device]:
        known = " or ".join(PRECISIONS[device])
        raise EncoderError(f"--precision {precision} is for a GPU; a CPU has {known}")
    return device, precision
