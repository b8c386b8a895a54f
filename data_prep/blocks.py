"""Store of finished work of an extraction: one file with the features of a block of clips.

The name is a hash of the settings and of the block's clips (names, paths, sizes and times of their
files), so a file is used again exactly where computing it again would give the same. It appears
under its name when it is whole.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.files import atomic_write
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import parse_json

from .clips import Clip


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
            with np.load(self._path(key), allow_pickle=False) as file:
                features = {name: file[name] for name in file.files if name != "rows"}
            self._last = key, Block(self.rows(key), features)
        return self._last[1]

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def _rows(self, key: str) -> list[dict[str, Any]] | None:
        try:
            with np.load(self._path(key), allow_pickle=False) as file:
                rows = file["rows"].tobytes()
                return parse_json(rows, str(self._path(key)), list[dict[str, Any]])
        # A disk that was full or lost power leaves what is no archive: not finished.
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
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
