"""Answers of several runs about the same clips, side by side, as the paper's Figure 5 has them.

`affectgpt evaluate` writes what a run answered beside its `report.json`, a file for each data set
and checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes
from affectgpt_jax.common.json import json_lines, read_json

# What a line says of a clip, beside its name and text: one of these.
VALUES = ("labels", "sentiment", "preference")


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """What several runs answered about a clip.

    Attributes:
        set: the data set.
        clip: its name.
        truth: labels, a word or a valence; None where the files do not say.
        answers: by run, what it says as its task counts it, and its text.
    """

    set: str
    clip: str
    truth: Any
    answers: dict[str, tuple[Any, str]]


def file_name(name: str) -> str:
    """How the names of files of a data set or a checkpoint begin."""
    return re.sub(r"[^\w.-]+", "-", name)


def answers_file(folder: Path, dataset: str, predictions: str) -> Path:
    """Where the answers of a checkpoint about a data set are."""
    return folder / f"{file_name(dataset)}-{file_name(predictions)}.jsonl"


def side_by_side(
    runs: Mapping[str, Path], count: int, seed: int = 0
) -> tuple[list[SideBySide], list[str]]:
    """Clips that the runs answer differently, drawn at random from the sets that all have.

    Args:
        runs: by name, their `report.json`.
        count: clips of each set; where fewer differ, others follow.
        seed: of the draw.

    Returns:
        The clips, and a sentence for each set that cannot be shown.

    Raises:
        ReadError: a file that is not as `evaluate` writes it.
    """
    if not count:
        return [], []
    places = {name: _answer_files(path) for name, path in runs.items()}
    shown: list[SideBySide] = []
    remarks = []
    for dataset in dict.fromkeys(name for place in places.values() for name in place):
        untold = f"no answers about {dataset} side by side"
        if others := [repr(name) for name, place in places.items() if dataset not in place]:
            remarks.append(f"{untold}: the report of {', '.join(others)} does not have that set")
            continue
        lacking = [p[dataset] for p in places.values() if not p[dataset].is_file()]
        if lacking:
            remarks.append(f"{untold}: there is no {lacking[0]}")
            continue
        answers = {name: _read(place[dataset]) for name, place in places.items()}
        first, *others = answers.values()
        clips = [clip for clip in first if all(clip in other for other in others)]
        if not clips:
            remarks.append(f"{untold}: no clip is one that all runs were asked about")
        rng = np.random.default_rng([seed, 4])
        order = [clips[i] for i in rng.permutation(len(clips))]
        order.sort(key=lambda clip: len({str(a[clip][1]) for a in answers.values()}) < 2)
        for clip in order[:count]:
            told = {name: (a[clip][1], a[clip][2]) for name, a in answers.items()}
            shown.append(SideBySide(dataset, clip, first[clip][0], told))
    return shown, remarks


def _answer_files(report: Path) -> dict[str, Path]:
    """By data set, the answers of the fixed checkpoint."""
    found = read_json(report, dict[str, Any], advice="expected a report.json")
    try:
        return {
            entry["name"]: answers_file(
                report.parent, entry["name"], entry["results"][-1]["predictions"]
            )
            for entry in found["sets"]
        }
    except (KeyError, TypeError, IndexError):
        raise ReadError(f"{report} is not a report.json of affectgpt evaluate") from None


def _read(path: Path) -> dict[str, tuple[Any, Any, str]]:
    """Truth, value and text of each clip."""
    found = {}
    for line, row in json_lines(read_bytes(path), str(path)):
        key = next((key for key in VALUES if key in row), None)
        if key is None or not isinstance(row.get("name"), str):
            raise ReadError(f"{path}, line {line}: expected a name and one of {', '.join(VALUES)}")
        found[row["name"]] = row.get("truth"), row[key], str(row.get("text", ""))
    return found
