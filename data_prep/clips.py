"""Which clips there are, and in which files: a folder, a CSV file, or both.

A name is a path below the folder without its suffix. The video is NAME with a suffix of `VIDEO`,
the sound is NAME with one of `AUDIO`, or else what the video file holds. In a CSV file, the columns
`video`, `audio` and `face` may name files instead, relative to the CSV file.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from affectgpt_jax.data.arrays import listed
from affectgpt_jax.evaluation.files import csv_rows, read_bytes

VIDEO = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".flv", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv")
AUDIO = (".wav", ".mp3", ".flac", ".m4a", ".ogg", ".opus", ".aac")
MEDIA_COLUMNS = ("video", "audio", "face")


class ClipError(ValueError):
    """Clips that cannot be told from the folder or the CSV file."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip's files; None where it has none of a kind.

    Attributes:
        name: unique among the clips.
        video: a file with pictures, and with sound if `audio` is None.
        audio: a file with sound alone.
        faces: an array of faces, as OpenFace crops them.
    """

    name: str
    video: Path | None = None
    audio: Path | None = None
    faces: Path | None = None

    @property
    def sound(self) -> Path | None:
        """The file that is listened to."""
        return self.audio or self.video


def find_clips(
    folders: Sequence[Path], table: Path | None = None, faces: Path | None = None
) -> tuple[list[Clip], list[str]]:
    """The clips of folders, of a CSV file, or those of the one that the other names.

    Args:
        folders: searched with all that is below them; a name may have its video in one and its
            sound in another.
        table: a CSV file with a column `name`; it decides which clips there are, in its order.
            Without one, it is all names of the folders, sorted.
        faces: holds NAME.npy, or NAME/NAME.npy.

    Returns:
        The clips, and the names in the folders that the table leaves out.

    Raises:
        ClipError: a folder that is not there, no clips, two files where one is expected.
        ReadError: a CSV file that cannot be used.
    """
    videos, sounds = _files(folders, VIDEO), _files(folders, AUDIO)
    if faces is not None and not faces.is_dir():
        raise ClipError(f"{faces} is not a folder; expected one with an array NAME.npy per clip")
    found = videos.keys() | sounds.keys()
    if table is None:
        if not found:
            places = ", ".join(map(str, folders))
            raise ClipError(f"{places}: no file ends in any of {' '.join(VIDEO + AUDIO)}")
        rows = [{"name": name} for name in sorted(found)]
    else:
        rows = [row for _, row in csv_rows(read_bytes(table), str(table), ("name",))]
    clips = []
    for row in rows:
        name = row["name"].strip()
        files = {c: table.parent / row[c].strip() for c in MEDIA_COLUMNS if row.get(c, "").strip()}
        if "video" not in row and "audio" not in row:
            files |= {k: f[name] for k, f in (("video", videos), ("audio", sounds)) if name in f}
        if "face" not in row and faces is not None:
            files["face"] = _face_file(faces, name)
        clips.append(Clip(name, files.get("video"), files.get("audio"), files.get("face")))
    if not any(clip.sound for clip in clips):
        raise ClipError(
            f"{table} has no clip with a file: expected columns video or audio with paths, or "
            "--clips DIR with files that are called as the clips are"
        )
    return clips, sorted(found - {clip.name for clip in clips})


def _files(folders: Sequence[Path], suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The file of each name."""
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ClipError(f"{folder} is not a folder; expected one with a file per clip")
        for place, below, files in os.walk(folder):
            # What a system or an extraction hides is not a clip.
            below[:] = sorted(name for name in below if not name.startswith("."))
            for file in sorted(files):
                path = Path(place, file)
                if file.startswith(".") or path.suffix.lower() not in suffixes:
                    continue
                name = path.relative_to(folder).with_suffix("").as_posix()
                if name in found:
                    raise ClipError(
                        f"{found[name]} and {path} would both be the clip {name!r}; keep one, or "
                        "name the files in a CSV file with columns name, video and audio"
                    )
                found[name] = path
    return found


def _face_file(folder: Path, name: str) -> Path:
    nested = folder / name / f"{Path(name).name}.npy"
    return nested if nested.is_file() else folder / f"{name}.npy"


def left_out(names: Sequence[str]) -> str:
    """A line about files that the CSV file has no row for."""
    return f"files without a row in the CSV file, left out: {len(names):,}: {listed(names)}"
