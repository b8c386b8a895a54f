"""What is said in clips: a CSV file, or a file of subtitles beside each clip."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import decode, path_below, read_bytes
from affectgpt_jax.common.tables import csv_rows
from affectgpt_jax.evaluation.label_files import match_names

SIDECARS = (".srt", ".vtt", ".txt")
# Of an SRT or WebVTT file: the line with the times of a cue; the cue's number or name is before it.
_TIMES = re.compile(r"\s*(\d+:)?\d+:\d+[.,]\d+\s*-->")
_TAGS = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


def read_subtitles(place: Path, names: Sequence[str]) -> tuple[dict[str, str], str]:
    """The subtitles of clips, of those that have one.

    Args:
        place: a CSV file with columns name and subtitle, or a folder of NAME.srt, .vtt or .txt.
        names: of the clips.

    Returns:
        Texts by clip, and how the names of the CSV file differ from the clips'; "" if they do not.

    Raises:
        ReadError: neither, a file that cannot be read, or one without any of the clips.
    """
    if place.is_dir():
        found = {}
        for name in names:
            files = [path_below(place, f"{name}{suffix}") for suffix in SIDECARS]
            if path := next((path for path in files if path.is_file()), None):
                found[name] = read_sidecar(path)
        if not found:
            raise ReadError(
                f"{place} has no subtitle of any clip; expected files such as {names[0]}.srt, .vtt "
                "or .txt, or a CSV file instead"
            )
        return found, ""
    texts: dict[str, str] = {}
    for line, row in csv_rows(read_bytes(place), str(place), ("name", "subtitle")):
        if (name := row["name"].strip()) in texts:
            raise ReadError(f"{place}, line {line}: the name {name!r} stands there already")
        texts[name] = row["subtitle"]
    matched, how = match_names(list(names), texts)
    if not matched:
        raise ReadError(f"{place} has no row of any clip; the first is called {names[0]!r}")
    return {name: texts[other] for name, other in matched.items()}, how


def read_sidecar(path: Path) -> str:
    """The words of an SRT, WebVTT or plain text file, without numbers, times, notes and tags.

    Raises:
        ReadError: it cannot be read, or is not UTF-8.
    """
    text = decode(read_bytes(path), str(path))
    if path.suffix.lower() == ".txt":
        return " ".join(text.split())
    words = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.strip().splitlines()
        start = next((i for i, line in enumerate(lines) if _TIMES.match(line)), None)
        if start is not None:  # else a header, a note or a style
            words += _TAGS.sub("", " ".join(lines[start + 1 :])).split()
    return " ".join(words)
