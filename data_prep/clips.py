"""Find clips and their files in a folder, a CSV file, or both.

A name is a path below the folder without its suffix. The video is NAME with a suffix of `VIDEO`,
the sound is NAME with one of `AUDIO`, or else what the video file holds. In a CSV file, the columns
`video`, `audio` and `face` may name files instead, relative to the CSV file.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.files import path_below, read_bytes
from affectgpt_jax.common.tables import CsvTable
from affectgpt_jax.common.text import listed
from affectgpt_jax.evaluation.label_files import match_names

VIDEO = tuple(".mp4 .avi .mkv .mov .webm .flv .m4v .mpg .mpeg .ts .wmv .3gp".split())
AUDIO = tuple(".wav .mp3 .flac .m4a .ogg .opus .aac .wma".split())
MEDIA_COLUMNS = ("video", "audio", "face")


class ClipError(UserError, ValueError):
    """A folder or CSV file whose clips cannot be determined."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """The files of a clip; None for a kind that it lacks.

    Attributes:
        name: unique among the clips.
        video: a file with pictures, and with sound if `audio` is None.
        audio: a file with sound alone.
        faces: an array of faces, as OpenFace crops them.
        boxes: an array of the boxes of faces in the video's frames.
    """

    name: str
    video: Path | None = None
    audio: Path | None = None
    faces: Path | None = None
    boxes: Path | None = None

    @property
    def sound(self) -> Path | None:
        """The file whose sound is used."""
        return self.audio or self.video


@dataclasses.dataclass(frozen=True)
class Found:
    """The clips that were found, and remarks on them.

    Attributes:
        clips: in order.
        unnamed: names in the folders that the CSV file has no row for.
        other: files in the folders that are no media by their suffix.
        lacking: names of the CSV file without a file, where there are files without a name.
        renamed: how the names of files differ from those of the CSV file; "" if they do not.
    """

    clips: list[Clip]
    unnamed: list[str]
    other: list[str]
    lacking: list[str] = dataclasses.field(default_factory=list)
    renamed: str = ""

    def remarks(self) -> list[str]:
        """A line for each kind of file that is not used."""
        lines = []
        if self.renamed:
            lines.append(f"files of the clips: {self.renamed}")
        if self.lacking:
            lines.append(f"rows of the CSV file without a file: {_counted(self.lacking)}")
        if self.unnamed:
            lines.append(f"files without a row in the CSV file, left out: {_counted(self.unnamed)}")
        if self.other:
            lines.append(f"files that are no media by their suffix: {_counted(self.other)}")
        return lines


def find_clips(
    folders: Sequence[Path],
    table: Path | None = None,
    faces: Path | None = None,
    boxes: Path | None = None,
) -> Found:
    """The clips of a folder, of a CSV file, or those of the folder that the CSV file names.

    Args:
        folders: searched with all that is below them; a name may have its video in one and its
            sound in another.
        table: a CSV file with a column `name`; it decides which clips there are, in its order.
            Without one, it is all names of the folders, sorted.
        faces, boxes: hold NAME.npy, or NAME/NAME.npy.

    Raises:
        ClipError: a folder that is not there, no clips, two files where one is expected.
        ReadError: a CSV file that cannot be used.
    """
    videos: dict[str, Path] = {}
    sounds: dict[str, Path] = {}
    other = []
    for folder in folders:
        for path in _files(folder):
            suffix = path.suffix.lower()
            kind = videos if suffix in VIDEO else sounds if suffix in AUDIO else None
            if kind is None:
                other.append(path.relative_to(folder).as_posix())
            else:
                _add(kind, _name(path, folder), path)
    for place in (faces, boxes):
        if place is not None and not place.is_dir():
            raise ClipError(
                f"{place} is not a folder; expected one with an array NAME.npy per clip"
            )
    found = videos.keys() | sounds.keys()
    matched, how = {name: name for name in found}, ""
    if table is None:
        if not found:
            places = ", ".join(map(str, folders))
            raise ClipError(f"{places}: no file ends in any of {' '.join(VIDEO + AUDIO)}")
        rows = [{"name": name} for name in sorted(found)]
    else:
        by_name = read_clip_rows(table)
        rows = [row | {"name": name} for name, row in by_name.items()]
        matched, how = match_names(list(by_name), found)
    clips = []
    for row in rows:
        name = row["name"]
        files = {c: table.parent / row[c].strip() for c in MEDIA_COLUMNS if row.get(c, "").strip()}
        if "video" not in row and "audio" not in row:
            file = matched.get(name)
            files |= {k: f[file] for k, f in (("video", videos), ("audio", sounds)) if file in f}
        if "face" not in row and faces is not None:
            files["face"] = _face_file(faces, name)
        clips.append(
            Clip(
                name,
                files.get("video"),
                files.get("audio"),
                files.get("face"),
                None if boxes is None else _face_file(boxes, name),
            )
        )
    if not any(clip.sound for clip in clips):
        raise ClipError(
            f"{table} has no clip with a file: expected columns video or audio with paths, or "
            "--clips DIR where the clip NAME is a file NAME.mp4 or the like"
        )
    unnamed = sorted(found - {matched.get(clip.name) for clip in clips})
    lacking = [clip.name for clip in clips if not clip.sound]
    return Found(clips, unnamed, other, lacking if unnamed else [], how)


def read_clip_rows(path: Path) -> dict[str, dict[str, str]]:
    """The rows of the clips' CSV file by name, in order.

    Raises:
        ReadError: a file that cannot be read, an empty name, or one that comes twice.
    """
    rows: dict[str, dict[str, str]] = {}
    for line, row in CsvTable(read_bytes(path), str(path), ("name",)):
        name = row["name"].strip()
        if not name or name in rows:
            what = f"{name!r} has a row already" if name else "the name is empty"
            raise ReadError(f"{path}, line {line}: {what}")
        rows[name] = row
    if not rows:
        raise ReadError(f"{path} has a header, but no clips")
    return rows


def named_clips(paths: Sequence[Path], faces: Path | None = None) -> Found:
    """The clips of files and folders that somebody names, in their order.

    Files of one folder that differ in the suffix alone are a clip's video and sound. A file need
    not be there, or be a medium: that shows when it is decoded. Clips are called by the stem of
    their file. Where two have the same, both go by their path below the folder that all such clips
    have in common.

    Args:
        paths: files, and folders, of which all media below count.
        faces: as for `find_clips`.

    Raises:
        ClipError: a folder without a medium, the same file twice, or two clips of one name.
    """
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    named_by: dict[Path, int] = {}  # files, and the place among `paths` that names each
    other: list[str] = []

    def add(key: tuple[Path, str], files: dict[str, Path], number: int) -> None:
        for file in files.values():
            if named_by.setdefault(file.resolve(), number) != number:
                raise ClipError(f"{file} is named twice, by itself or as a part of a folder")
        groups[key] = groups.get(key, {}) | files

    for number, path in enumerate(paths):
        if path.is_dir():
            found = find_clips([path])
            other += [f"{path.resolve().name}/{name}" for name in found.other]
            for clip in found.clips:
                files = {"video": clip.video, "audio": clip.audio}
                there = {kind: file for kind, file in files.items() if file}
                add((path.resolve(), clip.name), there, number)
            continue
        kind = "audio" if path.suffix.lower() in AUDIO else "video"
        key = path.parent.resolve(), _name(path, path.parent)
        if kind in groups.get(key, {}):  # another container: a clip of its own
            key = key[0], path.name
        add(key, {kind: path}, number)
    taken = Counter(name for _, name in groups)
    alike = [folder for folder, name in groups if taken[name] > 1]
    common = Path(os.path.commonpath(alike)) if alike else Path()
    clips: dict[str, Clip] = {}
    for (folder, name), files in groups.items():
        if taken[name] > 1:
            name = (folder / name).relative_to(common).as_posix()
        if name in clips:
            first, second = clips[name].sound, next(iter(files.values()))
            raise ClipError(
                f"{first} and {second} would both be the clip {name!r}; ask about them in two "
                "commands"
            )
        clips[name] = Clip(name, **files, faces=faces and _face_file(faces, name))
    return Found(list(clips.values()), [], other)


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, linked folders included, hidden files excluded."""
    if not folder.is_dir():
        raise ClipError(f"{folder} is not a folder; expected one with a file per clip")

    def refuse(error: OSError) -> None:
        raise ClipError(
            f"{error.filename} cannot be searched for clips ({error.strerror}); make it readable, "
            "or move it elsewhere"
        )

    seen = set()
    for place, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        # A link may lead back to where it is.
        if (real := os.path.realpath(place)) in seen:
            below.clear()
            continue
        seen.add(real)
        # What a system or an extraction hides is not a clip.
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield from (Path(place, file) for file in sorted(files) if not file.startswith("."))


def _name(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).with_suffix("").as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ClipError(f"{ascii(str(path))}: the name is not UTF-8; rename the file") from None
    return name


def _add(found: dict[str, Path], name: str, path: Path) -> None:
    if name in found:
        raise ClipError(
            f"{found[name]} and {path} would both be the clip {name!r}; keep one, or name the "
            "files in a CSV file with columns name, video and audio"
        )
    found[name] = path


def _face_file(folder: Path, name: str) -> Path:
    nested = path_below(folder, f"{name}/{Path(name).name}.npy", ClipError)
    return nested if nested.is_file() else path_below(folder, f"{name}.npy", ClipError)


def _counted(names: Sequence[str]) -> str:
    return f"{len(names):,}: {listed(names)}"
