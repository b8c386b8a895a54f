"""Which describer to take: descriptions scored by the labels that people gave, as in Table 10."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from affectgpt_jax.common.text import listed
from affectgpt_jax.data.records import INDEX_FILE, read_index, read_manifest
from affectgpt_jax.evaluation.extract import Extractor
from affectgpt_jax.evaluation.lexicon import Lexicon
from affectgpt_jax.evaluation.metrics import score_fine

from .describe import given_replies
from .settings import CaptionError


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Scores of a describer, 0 to 1: mean and spread (half the range) over the extractions.

    Attributes:
        name: of the describer.
        clips: that have a reply, of all that are scored.
        values: mean and spread of f, p and r.
        unread: replies about labels that could not be read, of all extractions.
    """

    name: str
    clips: int
    values: dict[str, tuple[float, float]]
    unread: int = 0


def read_truth(records: Path) -> dict[str, tuple[str, ...]]:
    """Label lists of the clips that people labelled, by name.

    Raises:
        RecordError: no records.
        CaptionError: none has labels.
    """
    entries = read_index(records / INDEX_FILE, read_manifest(records))
    truth = {entry.name: entry.labels for entry in entries if entry.labels}
    if not truth:
        raise CaptionError(f"{records}: no record has labels, by which describers are compared")
    return truth


def choose(
    truth: Mapping[str, Sequence[str]],
    replies: Mapping[str, Path],
    extractors: Sequence[Callable[[], Extractor]],
    lexicon: Lexicon,
) -> list[Candidate]:
    """Score the replies of each describer, the best first.

    Args:
        truth: labels by clip.
        replies: a file of replies by the name of the describer, see `describe.given_replies`.
        extractors: each makes one that finds labels in descriptions, anew.
        lexicon: of the emotion wheels.

    Raises:
        ReadError, CaptionError: a file that does not fit.
    """
    names = list(truth)
    found = []
    for name, path in replies.items():
        lines, _ = given_replies(path, names)
        texts = [line["reply"] for line in lines]
        scores: dict[str, list[float]] = {}
        unread = 0
        for make in extractors:
            extractor = make()
            labels = extractor.labels(texts)
            unread += sum(1 for text in texts if text in extractor.unparsed)
            for metric, value in score_fine(labels, list(truth.values()), lexicon).values.items():
                scores.setdefault(metric, []).append(value)
        values = {
            metric: (statistics.fmean(each), (max(each) - min(each)) / 2)
            for metric, each in scores.items()
        }
        found.append(Candidate(name, sum(map(bool, texts)), values, unread))
    return sorted(found, key=lambda c: -next(iter(c.values.values()))[0])


def table(candidates: Sequence[Candidate], clips: int) -> list[str]:
    """A line for each describer."""
    metrics = list(candidates[0].values)
    lines = [f"{'describer':<28}" + "".join(f"{m.upper():>16}" for m in metrics) + f"{'clips':>12}"]
    for candidate in candidates:
        cells = (f"{100 * m:>9.2f} +-{100 * s:>5.2f}" for m, s in candidate.values.values())
        lines.append(f"{candidate.name:<28}{''.join(cells)}{candidate.clips:>7,} of {clips:,}")
    without = [c.name for c in candidates if c.clips < clips]
    if without:
        lines.append(f"clips without a reply count as without labels: {listed(without)}")
    lines += [
        f"{c.name}: {c.unread:,} replies about labels could not be read, and count as none"
        for c in candidates
        if c.unread
    ]
    return lines
