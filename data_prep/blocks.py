"""Store of finished work of an extraction: one file with the features of a block of clips.

The name is a hash of the settings and of the block's clips (names, paths, sizes and times of their
files), so a file is used again exactly where computing it again would give the same. It appears
under its name when it is whole.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.files import atomic_write
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import parse_json
from affectgpt_jax.common.npy import read_npz, reason

from .clips import Clip, ClipError

# What `zipfile` and NumPy raise on an archive that is none, or has other bytes than it had.
_DAMAGED = (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)

# The store's folder in the directory of the records, and beside the blocks: where the weights of
# the encoders are, by kind.
BLOCKS = ".blocks"
PLACES = "encoders.json"


def block_key(settings: Mapping[str, Any], clips: Sequence[Clip]) -> str:
    """Name of the block file for these settings and clips."""
    described = [
        [
            clip.name,
            *(_stamp(path) for path in (clip.video, clip.audio, clip.faces)),
            *([_stamp(clip.boxes)] if clip.boxes else []),
        ]
        for clip in clips
    ]
    return json_sha256([settings, described])[:32]


def _stamp(path: Path | None) -> list[Any] | None:
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """The features of finished clips.

    Attributes:
        rows: of each clip: name, problems by feature, facts.
        features: by feature float16 `[clips, 8, d]`; zeros where a clip has a problem with it.
    """

    rows: list[dict[str, Any]]
    features: dict[str, np.ndarray]


class BlockStore:
    """A folder of blocks; a missing folder counts as empty."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._last: tuple[str, Block] | None = None

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file() and self._rows(key) is not None

    def write(self, key: str, block: Block) -> None:
        """Add a block, atomically."""
        rows = np.frombuffer(json.dumps(block.rows, ensure_ascii=True).encode(), np.uint8)
        with atomic_write(self._path(key)) as file:
            np.savez(file, rows=rows, **block.features)

    def rows(self, key: str) -> list[dict[str, Any]]:
        """The rows of a block of the store."""
        return self._rows(key)

    def read(self, key: str) -> Block:
        """A block of the store; the one read last is cached."""
        if self._last is None or self._last[0] != key:
            path = self._path(key)
            try:
                with zipfile.ZipFile(path) as archive:
                    names = [name.removesuffix(".npy") for name in archive.namelist()]
                    features = {n: read_npz(archive, n) for n in names if n != "rows"}
            except (OSError, *_DAMAGED) as error:
                raise ClipError(
                    f"{path} is damaged ({reason(error)}); delete it, and the same command makes "
                    "it anew"
                ) from None
            self._last = key, Block(self.rows(key), features)
        return self._last[1]

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def _rows(self, key: str) -> list[dict[str, Any]] | None:
        try:
            with zipfile.ZipFile(self._path(key)) as archive:
                rows = read_npz(archive, "rows").tobytes()
                return parse_json(rows, str(self._path(key)), list[dict[str, Any]])
        # A disk that was full or lost power leaves what is no archive: not finished.
        except (OSError, *_DAMAGED):
            return None


class FeatureOf(Mapping[str, np.ndarray]):
    """One feature of all clips that have it, by clip name, read from the store on access."""

    def __init__(self, store: BlockStore, feature: str, places: Mapping[str, tuple[str, int]]):
        self._store, self._feature, self._places = store, feature, places

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> np.ndarray:
        key, number = self._places[name]
        return self._store.read(key).features[self._feature][number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
