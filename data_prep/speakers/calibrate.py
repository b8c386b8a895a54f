"""How right a speaker check is: its verdicts beside labels that people gave.

A file of truth has a row per clip, `name,speaking`, with 1 where the visible person is the one who
is heard. With 200 clips the share that is right is known to about 7 points.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes
from affectgpt_jax.common.tables import csv_rows
from affectgpt_jax.common.text import listed

from .synchrony import DETECTOR, SPEAKING, UNSURE

# What the paper reports of TalkNet on clips of its authors' choice.
PAPER = 0.9


def read_truth(path: Path) -> dict[str, bool]:
    """Labels by clip name.

    Raises:
        ReadError: no such file, a repeated name, or a label that is neither 0 nor 1.
    """
    truth: dict[str, bool] = {}
    for line, row in csv_rows(read_bytes(path), str(path), ("name", "speaking")):
        name, label = row["name"], row["speaking"].strip()
        if label not in ("0", "1"):
            raise ReadError(f"{path}, line {line}: expected 0 or 1 as speaking, found {label!r}")
        if name in truth:
            raise ReadError(f"{path}, line {line}: the clip {name!r} has a label already")
        truth[name] = label == "1"
    if not truth:
        raise ReadError(f"{path} has no row")
    return truth


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Verdicts against labels.

    Attributes:
        network: the detector.
        clips, decided: with a label and a row, and those of them that are not `unsure`.
        right: of the decided ones, those with the right verdict.
        kept, dropped_right: shares of the clips whose person speaks that pass, and of the others
            that are dropped; `unsure` passes.
        auc: chance that a clip with its own voice has the higher score; NaN for labels of one kind.
        threshold, error: the score at which both kinds are mistaken equally often, and how often.
        without: labelled clips that have no verdict.
    """

    network: str
    clips: int
    decided: int
    right: int
    kept: float
    dropped_right: float
    auc: float
    threshold: float
    error: float
    without: list[str]


def calibrate(rows: Mapping[str, Mapping[str, Any]], truth: Mapping[str, bool]) -> Calibration:
    """Compare verdicts with labels.

    Args:
        rows: of `read_speakers`.
        truth: of `read_truth`.

    Raises:
        ReadError: no labelled clip has a verdict.
    """
    names = [name for name in truth if name in rows]
    if not names:
        raise ReadError(
            f"none of the labelled clips {listed(list(truth))} has a verdict; see that the names "
            "are those of the check"
        )
    speaks = np.array([truth[name] for name in names])
    verdicts = np.array([rows[name]["verdict"] for name in names])
    decided = verdicts != UNSURE
    passed = (verdicts == SPEAKING) | ~decided
    scored = [(float(rows[n]["score"]), truth[n]) for n in names if rows[n]["score"]]
    auc, threshold, error = _curve(scored)
    return Calibration(
        network=", ".join(sorted({rows[name]["network"] for name in names})),
        clips=len(names),
        decided=int(decided.sum()),
        right=int(np.sum(decided & ((verdicts == SPEAKING) == speaks))),
        kept=_share(passed[speaks]),
        dropped_right=_share(~passed[~speaks]),
        auc=auc,
        threshold=threshold,
        error=error,
        without=[name for name in truth if name not in rows],
    )


def _share(of: np.ndarray) -> float:
    return float(of.mean()) if len(of) else math.nan


def _curve(scored: list[tuple[float, bool]]) -> tuple[float, float, float]:
    """Area under the ROC curve, and threshold and rate of equal error."""
    own = np.array([score for score, speaks in scored if speaks])
    other = np.array([score for score, speaks in scored if not speaks])
    if not len(own) or not len(other):
        return math.nan, math.nan, math.nan
    above = (own[:, None] > other).mean() + 0.5 * (own[:, None] == other).mean()
    candidates = np.unique(np.concatenate([own, other]))
    candidates = np.append((candidates[:-1] + candidates[1:]) / 2, candidates[[0, -1]])
    missed = (own < candidates[:, None]).mean(axis=1)
    false = (other >= candidates[:, None]).mean(axis=1)
    best = int(np.argmin(np.maximum(missed, false)))
    return float(above), float(candidates[best]), float(max(missed[best], false[best]))


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share, 95 % by default."""
    if not total:
        return 0.0, 1.0
    share, rest = right / total, z * z / total
    middle = (share + rest / 2) / (1 + rest)
    half = z / (1 + rest) * math.sqrt(share * (1 - share) / total + rest / (4 * total))
    return middle - half, middle + half


def lines(found: Calibration) -> list[str]:
    """The calibration in words."""
    low, high = wilson(found.right, found.decided)
    verdict = "reaches" if low >= PAPER else "may reach" if high >= PAPER else "does not reach"
    return [
        f"{found.network} on {found.clips:,} labelled clips",
        f"decided: {found.decided:,} ({100 * found.decided / found.clips:.1f} %)",
        f"right of those: {found.right:,} ({100 * found.right / max(found.decided, 1):.1f} %, "
        f"95 % interval {100 * low:.1f} to {100 * high:.1f}); it {verdict} the paper's "
        f"{100 * PAPER:.0f} %",
        f"kept of those that speak: {100 * found.kept:.1f} %; dropped of the others: "
        f"{100 * found.dropped_right:.1f} %",
        f"scores: area under the ROC curve {found.auc:.3f}; equal error {100 * found.error:.1f} % "
        f"at {found.threshold:.3f}, for information: "
        + ("nothing is to be set" if found.network == DETECTOR else "what can be set is --share"),
        *([f"without a verdict: {listed(found.without)}"] if found.without else []),
    ]
