"""Results of a system on a data set, with all its checkpoints: the content of every report."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from affectgpt_jax.common.text import shorten
from affectgpt_jax.evaluation import metrics
from affectgpt_jax.evaluation.confusion import Confusion, confusions
from affectgpt_jax.evaluation.datasets import GROUPS, UNIBENCH
from affectgpt_jax.evaluation.lexicon import Lexicon
from affectgpt_jax.evaluation.metrics import Score, ScoreError
from affectgpt_jax.evaluation.readers import Pairs

# Examples drawn of all scored clips, and of those that missed altogether.
EXAMPLES = 8
MEAN = "Mean"
# Tasks whose words become labels of wheels.
NEEDS_LEXICON = ("fine", "basic")
UNKNOWN_SHOWN = 10
# Share of unknown labels over which a score comes with a warning.
UNKNOWN_WARNED = 0.5
# How texts and tables call the metrics.
TITLES = {"f": "F", "p": "P", "r": "R", "hit": "hit rate", "weighted_f1": "weighted F1"}


def percent(share: float) -> str:
    """A share, 0 to 1, in percent with two decimals."""
    return f"{100 * share:.2f}"


def unknown_labels(score: Score, side: str) -> Unknown:
    """The labels of a score that nothing could be made of.

    Args:
        score: of any task.
        side: "predicted" or "true".
    """
    counts = score.counts
    words = counts.get(f"unknown_{side}", {})
    if score.task in NEEDS_LEXICON:
        total = round(counts[f"{side}_labels_per_clip"] * counts["clips"])
    elif score.task == "words":  # of which the first ones alone count
        total = sum(row["predicted"] for row in score.classes) + sum(words.values())
    else:
        total = sum(counts["predicted"].values()) + sum(words.values())
    return Unknown(score.task, side, words, total)


@dataclasses.dataclass(frozen=True)
class Unknown:
    """Labels that no lexicon knows, or that are none of the words of a task.

    Attributes:
        task: that they were scored by.
        side: "predicted" or "true".
        words: how often each occurs, the commonest first.
        total: how many labels there are, known ones included.
    """

    task: str
    side: str
    words: Mapping[str, int]
    total: int

    @property
    def share(self) -> float:
        return sum(self.words.values()) / self.total if self.total else 0.0

    def __str__(self) -> str:
        shown = [f"{shorten(word, 40)} x {times}" for word, times in self.words.items()]
        more = len(shown) - UNKNOWN_SHOWN
        words = ", ".join(shown[:UNKNOWN_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return (
            f"unknown {self.side} words: {words}; {sum(self.words.values()):,} of {self.total:,} "
            f"labels ({self.share:.1%})"
        )

    def warning(self) -> str | None:
        """What must be said before a number where most labels are unknown."""
        if self.share <= UNKNOWN_WARNED:
            return None
        lacks = {
            "words": "most of the {} labels are the true word of no clip",
            "sentiment": "most of the {} sentiments are none of positive, negative and neutral",
            "preference": "most of the {} preferences are none of a1, a2 and same",
        }.get(self.task, "the lexicon does not know most of the {} labels")
        examples = ", ".join(shorten(word, 40) for word in list(self.words)[:3])
        return (
            f"{lacks.format(self.side)} ({self.share:.1%}), such as {examples}: the score says "
            "little; look whether each is one word or phrase, as the lexicon has them"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The score of one prediction file, that is of one checkpoint.

    Attributes:
        predictions: the file, or what the checkpoint is called.
        pairs: prediction and truth of each clip.
        score: of these.
        intervals: bootstrap intervals by metric; empty without resampling.
        against_fixed: how it differs from the fixed checkpoint; None for that one itself.
    """

    predictions: str
    pairs: Pairs
    score: Score
    intervals: dict[str, metrics.Interval]
    against_fixed: metrics.Comparison | None

    @property
    def unknown(self) -> tuple[Unknown, ...]:
        """The unknown labels of either side, where there are some."""
        sides = (unknown_labels(self.score, side) for side in ("predicted", "true"))
        return tuple(side for side in sides if side.words)

    @property
    def interval(self) -> metrics.Interval | None:
        """That of the primary value."""
        return next(iter(self.intervals.values()), None)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: shares from 0 to 1, every name and word."""
        return {
            "predictions": self.predictions,
            **self.score.as_dict(),
            "intervals": {k: dataclasses.asdict(i) for k, i in self.intervals.items()},
            "against_fixed": self.against_fixed and dataclasses.asdict(self.against_fixed),
            "findings": [
                {"what": f.what, "count": len(f.names), "clips": list(f.names)}
                for f in self.pairs.findings
            ],
        }


@dataclasses.dataclass(frozen=True)
class Example:
    """A clip as shown in a report.

    Attributes:
        name: of the clip.
        prediction: labels, or a sentiment.
        truth: labels, a word, or a valence.
        text: what the model wrote, if that is known.
        score: how the clip fared by itself, 0 to 1.
        about: what else is known of it, names and texts, such as its subtitle.
    """

    name: str
    prediction: Any
    truth: Any
    text: str
    score: float
    about: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """The score of some of the clips of a set.

    Attributes:
        name: which clips.
        clips: how many.
        value: the primary value of the fixed checkpoint; None where these clips have none.
        interval: of it; None without resampling.
        why_not: a sentence where there is no value.
    """

    name: str
    clips: int
    value: float | None
    interval: metrics.Interval | None
    why_not: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class SetResult:
    """The results of a system on one data set.

    Attributes:
        name: of the set; one of MER-UniBench counts for its mean.
        task: fine, basic, sentiment, words or preference.
        results: one per checkpoint; the last is the one that was fixed beforehand.
        confusions: of the fixed checkpoint, by wheel.
        examples: clips of the fixed checkpoint drawn at random.
        misses: clips of it drawn at random from those that score 0.
        references: values to set the score beside, shares by name, such as ceilings.
        parts: scores of some of the clips.
    """

    name: str
    task: str
    results: tuple[Result, ...]
    confusions: tuple[Confusion, ...]
    examples: tuple[Example, ...]
    misses: tuple[Example, ...]
    references: Mapping[str, float]
    parts: tuple[Part, ...] = ()

    @property
    def fixed(self) -> Result:
        """The checkpoint that was chosen without the test set."""
        return self.results[-1]

    @property
    def best(self) -> Result:
        """The checkpoint that scores highest on the test set."""
        chosen = self.protocols.best
        return next(result for result in self.results if result.predictions == chosen)

    @property
    def protocols(self) -> metrics.Protocols:
        """Both of these, side by side."""
        return protocols(self.results)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "name": self.name,
            "task": self.task,
            "results": [result.as_dict() for result in self.results],
            "protocols": dataclasses.asdict(self.protocols),
            "references": dict(self.references),
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "confusions": [table.as_dict() for table in self.confusions],
            "examples": [dataclasses.asdict(example) for example in self.examples],
            "misses": [dataclasses.asdict(example) for example in self.misses],
        }


def score_pairs(task: str, pairs: Pairs, lexicon: Lexicon | None, level: int = 1) -> Score:
    """The score of a task; only fine and basic need a lexicon.

    Raises:
        ScoreError: nothing can be scored.
    """
    match task:
        case "sentiment":
            return metrics.score_sentiment(pairs.predictions, pairs.truth)
        case "words":
            return metrics.score_words(pairs.predictions, pairs.truth)
        case "preference":
            return metrics.score_preference(pairs.predictions, pairs.truth)
        case "fine":
            return metrics.score_fine(pairs.predictions, pairs.truth, lexicon, level)
        case _:
            return metrics.score_basic(pairs.predictions, pairs.truth, lexicon, level)


def score_checkpoints(
    task: str,
    pairs: Mapping[str, Pairs],
    lexicon: Lexicon | None,
    level: int = 1,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Result, ...]:
    """Score every checkpoint, with intervals and the difference to the last, the fixed one.

    Args:
        task: fine, basic, sentiment, words or preference.
        pairs: by checkpoint, all over the same clips.
        lexicon: for fine and basic.
        level: of its wheels.
        resamples: of the bootstrap; 0 for no intervals.
        seed: of the resampling.

    Raises:
        ScoreError: nothing can be scored.
    """
    scores = {name: score_pairs(task, p, lexicon, level) for name, p in pairs.items()}
    if not scores:
        raise ScoreError("a score needs the predictions of one checkpoint or more")
    *_, fixed = scores
    results = []
    for name, score in scores.items():
        intervals, comparison = {}, None
        if resamples:
            intervals = metrics.bootstrap(score, resamples, seed=seed)
            if name != fixed:
                comparison = metrics.compare(score, scores[fixed], resamples, seed=seed)
        results.append(Result(name, pairs[name], score, intervals, comparison))
    return tuple(results)


def protocols(results: Sequence[Result]) -> metrics.Protocols:
    """The last checkpoint, which is the fixed one, and the best."""
    values = {result.predictions: result.score.primary for result in results}
    return metrics.protocols(values, results[-1].predictions)


def score_set(
    name: str,
    task: str,
    pairs: Mapping[str, Pairs],
    lexicon: Lexicon | None,
    *,
    level: int = 1,
    resamples: int = 1000,
    seed: int = 0,
    texts: Mapping[str, str] | None = None,
    references: Mapping[str, float] | None = None,
    about: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    parts: Mapping[str, Collection[str]] | None = None,
) -> SetResult:
    """Compute everything that a report shows about one data set.

    Args:
        name: of the set, as Table 2 writes it if it is of MER-UniBench.
        task, pairs, lexicon, level, resamples, seed: see `score_checkpoints`; the seed draws the
            examples as well.
        texts: what the model of the fixed checkpoint wrote, by clip.
        references: shares, 0 to 1, to set the score beside.
        about: names and texts that an example shows, by clip.
        parts: names of clips, by what they have in common, that are scored by themselves, too.

    Raises:
        ScoreError: nothing can be scored.
    """
    results = score_checkpoints(task, pairs, lexicon, level, resamples, seed)
    fixed = results[-1]
    examples, misses = _draw_examples(fixed, texts or {}, about or {}, seed)
    tables = confusions(task, fixed.pairs.predictions, fixed.pairs.truth, lexicon, level)
    beside = dict(references or {})
    some = _score_parts(task, fixed.pairs, parts or {}, lexicon, level, resamples, seed)
    return SetResult(name, task, results, tables, examples, misses, beside, some)


def _score_parts(
    task: str,
    pairs: Pairs,
    parts: Mapping[str, Collection[str]],
    lexicon: Lexicon | None,
    level: int,
    resamples: int,
    seed: int,
) -> tuple[Part, ...]:
    """Parts without a clip are left out, and those that cannot be scored say why."""
    found = []
    for what, names in parts.items():
        chosen = [i for i, name in enumerate(pairs.names) if name in names]
        if not chosen:
            continue
        some = Pairs(
            tuple(pairs.names[i] for i in chosen),
            [pairs.predictions[i] for i in chosen],
            [pairs.truth[i] for i in chosen],
            (),
        )
        try:
            (result,) = score_checkpoints(task, {what: some}, lexicon, level, resamples, seed)
        except ScoreError as error:
            found.append(Part(what, len(chosen), None, None, f"no score: {error}"))
            continue
        found.append(Part(what, len(chosen), result.score.primary, result.interval))
    return tuple(found)


def _draw_examples(
    result: Result,
    texts: Mapping[str, str],
    about: Mapping[str, Sequence[tuple[str, str]]],
    seed: int,
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Random examples of all scored clips and of those that miss, without repeats."""
    scores, pairs = metrics.clip_scores(result.score), result.pairs

    def example(clip: int) -> Example:
        name = pairs.names[clip]
        prediction, truth = pairs.predictions[clip], pairs.truth[clip]
        known = tuple(about.get(name, ()))
        return Example(name, prediction, truth, texts.get(name, ""), float(scores[clip]), known)

    generator = np.random.default_rng([seed, 3])
    order = generator.permutation(np.flatnonzero(np.isfinite(scores)))
    shown = order[:EXAMPLES]
    misses = [clip for clip in order[EXAMPLES:] if scores[clip] == 0][:EXAMPLES]
    return tuple(map(example, sorted(shown))), tuple(map(example, sorted(misses)))


@dataclasses.dataclass(frozen=True)
class GroupMean:
    """Mean of the primary values of a group of sets.

    Attributes:
        fixed: of the fixed checkpoints.
        interval: of that; None without resampling.
        best: of the best checkpoints, chosen set by set on the test sets; None if each set has
            one checkpoint only.
    """

    fixed: float
    interval: metrics.Interval | None
    best: float | None


def group_means(
    sets: Sequence[SetResult], resamples: int = 1000, seed: int = 0
) -> dict[str, GroupMean]:
    """Means of fine-grained, basic and sentiment sets and of all nine, as Table 4 has them.

    A group that lacks one of its sets has no mean and is left out.

    Raises:
        ScoreError: scores of different lexicons or levels, which do not mix.
    """
    check_lexicons(sets)
    by_name = {result.name: result for result in sets}
    groups = {GROUPS[task]: UNIBENCH[task] for task in GROUPS}
    groups[MEAN] = tuple(name for names in UNIBENCH.values() for name in names)
    means = {}
    for group, names in groups.items():
        if not all(name in by_name for name in names):
            continue
        members = [by_name[name] for name in names]
        scores = [member.fixed.score for member in members]
        best = None
        if any(len(member.results) > 1 for member in members):
            best = float(np.mean([member.protocols.best_value for member in members]))
        interval = metrics.mean_interval(scores, resamples, seed=seed) if resamples else None
        fixed = float(np.mean([score.primary for score in scores]))
        means[group] = GroupMean(fixed, interval, best)
    return means


def check_lexicons(sets: Sequence[SetResult]) -> None:
    """Refuse to combine scores of different lexicons or levels.

    Raises:
        ScoreError: two lexicons, two levels, or two results of one set.
    """
    names = [result.name for result in sets]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ScoreError(f"there are two results of the set {repeated[0]!r}; keep one")
    made = {(r.score.lexicon, r.score.level): s.name for s in sets for r in s.results}
    made = {key: name for key, name in made.items() if key[0] is not None}
    if len(made) > 1:
        (first, second), (one, other) = list(made.items())[0:2], list(made.values())[0:2]
        ways = " and ".join(f"{lexicon} level {level}" for (lexicon, level), _ in (first, second))
        raise ScoreError(
            f"{one} and {other} were scored in two ways, which do not mix: {ways}; score all sets "
            "with one lexicon"
        )
