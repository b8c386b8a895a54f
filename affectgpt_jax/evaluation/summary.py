"""The report on a system: its results, their means, and warnings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from affectgpt_jax.common.identity import Identity
from affectgpt_jax.evaluation.datasets import BY_NAME
from affectgpt_jax.evaluation.metrics import ScoreError
from affectgpt_jax.evaluation.readers import NO_PREDICTION
from affectgpt_jax.evaluation.results import GroupMean, SetResult, group_means
from affectgpt_jax.evaluation.tables import (
    FORMAT,
    NINE,
    Table,
    as_dict,
    comparable,
    main_table,
    ov_merd_table,
)

Curves = Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """The report on a system.

    Attributes:
        system: what it is called.
        sets: its results, in the order of the page.
        means: of the groups of MER-UniBench that are complete.
        tables: ours in the shape of Table 2, with published systems if they were asked for; and
            OV-MERD beside published descriptions if both are there.
        lexicon: which one made the scores; None where none was asked.
        label_lexicon: which one found the labels, or chose those that answers agree on, where it
            made no score; None where none did.
        level: of its wheels; None where it does not matter.
        warnings: sentences that a reader must see before any number.
        curves: of the training, if they are known: steps and values by title and name.
    """

    system: str
    sets: tuple[SetResult, ...]
    means: Mapping[str, GroupMean]
    tables: tuple[Table, ...]
    lexicon: Identity | None
    label_lexicon: Identity | None
    level: int | None
    warnings: tuple[str, ...]
    curves: Curves

    def as_dict(self) -> dict[str, Any]:
        """The whole of it, ready for JSON; shares from 0 to 1."""
        return {
            "format": FORMAT,
            "system": self.system,
            "lexicon": self.lexicon and dataclasses.asdict(self.lexicon),
            "label_lexicon": self.label_lexicon and dataclasses.asdict(self.label_lexicon),
            "level": self.level,
            "comparable": all(comparable(result.fixed.score) for result in self.sets),
            "warnings": list(self.warnings),
            "means": {group: dataclasses.asdict(mean) for group, mean in self.means.items()},
            "tables": [as_dict(table) for table in self.tables],
            "sets": [result.as_dict() for result in self.sets],
        }


def make_report(
    system: str,
    sets: Sequence[SetResult],
    *,
    modalities: str = "",
    peers: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    curves: Curves | None = None,
    label_lexicon: Identity | None = None,
    level: int | None = None,
) -> Report:
    """Combine the results of a system into a report.

    Args:
        system: what to call it.
        sets: its results, see `results.score_set`; those of MER-UniBench by their names in Table
            2, and any others, which enter no mean.
        modalities: that the system was given, as A, V and T.
        peers: set the published systems beside, if they have a score on one of the sets.
        resamples: of the bootstrap of the means; 0 for no intervals.
        seed: of it.
        curves: of the training, to show.
        label_lexicon: by which labels were found or chosen; None where no lexicon was.
        level: of its wheels; None where that does not matter.

    Raises:
        ScoreError: no sets, a set twice, a set of MER-UniBench with another task, or scores of
            different lexicons.
    """
    if not sets:
        raise ScoreError("a report needs the results of one data set or more")
    for result in sets:
        if result.name in BY_NAME and BY_NAME[result.name].task != result.task:
            raise ScoreError(
                f"{result.name} is scored as {BY_NAME[result.name].task}, not as {result.task}"
            )
    means = group_means(sets, resamples, seed)
    tables = [main_table(system, modalities, sets, means, peers)]
    shared = peers and any(result.name in NINE for result in sets)
    if peers and (beside := ov_merd_table(system, sets)):
        tables.append(beside)
    scored = next((result.fixed.score for result in sets if result.fixed.score.lexicon), None)
    return Report(
        system,
        tuple(sets),
        means,
        tuple(tables),
        scored and scored.lexicon,
        None if scored else label_lexicon,
        scored.level if scored else level,
        tuple(_warnings(sets, shared)),
        curves or {},
    )


def _warnings(sets: Sequence[SetResult], peers: bool) -> list[str]:
    warnings = []
    unlike = [result for result in sets if not comparable(result.fixed.score)]
    if unlike:
        score = unlike[0].fixed.score
        names = ", ".join(result.name for result in unlike)
        beside = " They stand beside published ones below all the same." if peers else ""
        warnings.append(
            f"Scores of {names} were made with the lexicon {score.lexicon}, level {score.level}, "
            "published ones with the official emotion wheels, level 1: they do not compare."
            + beside
        )
    for result in sets:
        told = filter(None, (unknown.warning() for unknown in result.fixed.unknown))
        warnings += [f"{result.name}: {warning}." for warning in told]
        clips = result.fixed.score.counts["clips"]
        if result.name in BY_NAME and clips != (size := BY_NAME[result.name].size):
            warnings.append(
                f"{result.name} has {clips:,} clips here and {size:,} in the paper: not the same "
                "test set."
            )
        if lacking := _missing(result):
            warnings.append(
                f"{result.name}: {lacking:,} clips have no prediction and count as empty."
            )
    return warnings


def _missing(result: SetResult) -> int:
    findings = result.fixed.pairs.findings
    return sum(len(finding.names) for finding in findings if finding.what == NO_PREDICTION)
