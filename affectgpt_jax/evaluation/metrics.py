"""Scores of MER-UniBench: labels on emotion wheels, hits, sentiment; intervals and comparisons.

Every score is a function of sums over clips of a few numbers per clip, its *statistics*. So a
bootstrap resample is a weighted sum, swapping two systems on some clips is another, and thousands
of them are one matrix product.

The rules are those of the AffectGPT release (arXiv 2501.16566, section 5.1 and appendix), with one
gap closed: where precision and recall are both 0, F is 0.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.identity import Identity
from affectgpt_jax.evaluation.lexicon import WHEELS, Lexicon, normalise

SENTIMENTS = ("negative", "neutral", "positive")
# Elements of the largest temporary array of a resampling: 32 MiB of float64.
CHUNK = 4_194_304

Labels = Sequence[Sequence[str]]


class ScoreError(UserError, ValueError):
    """Predictions and truth without a score, or scores that are not comparable."""


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """The score of one system on one data set.

    Attributes:
        task: fine, basic, sentiment, words or preference.
        level: of the wheels; None where no lexicon is asked.
        lexicon: which one made the score; None for sentiment, words and preference.
        values: shares, 0 to 1, by metric; the first is the primary one.
        wheels: a row per wheel: the same metrics, the clips scored, shares of unmapped labels.
        classes: a row per class (and wheel): how many clips have it, and how they fared.
        counts: clips, labels per clip, empty predictions, and the words that no rule knows.
        statistics: float64 [clips, ...], what `values` follow from when summed over clips.
    """

    task: str
    level: int | None
    lexicon: Identity | None
    values: dict[str, float]
    wheels: list[dict[str, Any]]
    classes: list[dict[str, Any]]
    counts: dict[str, Any]
    statistics: np.ndarray = dataclasses.field(repr=False)

    @property
    def primary(self) -> float:
        """The primary value in MER-UniBench: F, hit rate, or weighted F1."""
        return next(iter(self.values.values()))

    def as_dict(self) -> dict[str, Any]:
        """Everything but the statistics, ready for JSON."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "statistics"]
        entry = {name: getattr(self, name) for name in fields}
        return entry | {"lexicon": dataclasses.asdict(self.lexicon) if self.lexicon else None}


def hit_rate(
    predictions: Sequence[Sequence[str]], truth: Sequence[str], max_labels: int | None = None
) -> float:
    """Share of clips, 0 to 1, whose true word is among the first `max_labels` predicted ones.

    A budget of labels matters: listing every emotion hits always. No lexicon is asked; for words
    that mean the same, see `score_basic`.

    Args:
        predictions: label list of each clip, the likeliest first.
        truth: the true word of each clip.
        max_labels: labels that count; None counts all.

    Raises:
        ValueError: no clips, or lists of different lengths.
    """
    if not truth or len(predictions) != len(truth):
        raise ValueError(f"expected as many predictions ({len(predictions)}) as truths, 1 or more")
    return float(
        np.mean([word in list(p)[:max_labels] for p, word in zip(predictions, truth, strict=True)])
    )


def labels_per_clip(predictions: Sequence[Sequence[str]]) -> float:
    """Mean length of the label lists."""
    return float(np.mean([len(labels) for labels in predictions]))


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedLabels:
    """Label lists as arrays.

    Attributes:
        clips: how many lists.
        clip: int [labels], the list that each label is of.
        form: int [labels], its surface form; -1 if unknown.
        unknown: the unknown words and how often they occur, the commonest first.
    """

    clips: int
    clip: np.ndarray
    form: np.ndarray
    unknown: dict[str, int]

    @classmethod
    def of(cls, labels: Labels, lexicon: Lexicon) -> EncodedLabels:
        words = [word for clip in labels for word in clip]
        clip = np.repeat(np.arange(len(labels)), [len(clip) for clip in labels])
        form = lexicon.form_ids(words)
        unknown = Counter(normalise(words[n]) for n in np.flatnonzero(form < 0))
        return cls(len(labels), clip, form, dict(unknown.most_common()))

    def on_wheel(self, lexicon: Lexicon, level: int, wheel: int) -> tuple[np.ndarray, float]:
        """Labels of a wheel by clip, bool [clips, labels], and the share of unmapped labels."""
        label = lexicon.table[level - 1, wheel, self.form]
        mapped = label >= 0
        present = np.zeros((self.clips, len(lexicon.labels[level - 1][wheel])), bool)
        present[self.clip[mapped], label[mapped]] = True
        return present, float(1 - mapped.mean()) if mapped.size else 0.0


def _wheel_pairs(
    predicted: EncodedLabels, true: EncodedLabels, lexicon: Lexicon, level: int
) -> Iterator[tuple[dict[str, Any], tuple[str, ...], np.ndarray, np.ndarray]]:
    """Row of figures, label names, predicted and true labels (bool [clips, labels]) by wheel.

    Raises:
        ScoreError: no clip has a true label on a wheel.
    """
    for wheel in range(WHEELS):
        p, unmapped_predicted = predicted.on_wheel(lexicon, level, wheel)
        t, unmapped_true = true.on_wheel(lexicon, level, wheel)
        clips = int(t.any(axis=1).sum())
        if not clips:
            raise ScoreError(
                f"none of the true words of {true.clips} clips stands on wheel {wheel + 1} of "
                f"{lexicon.identity}, so there is nothing to score"
            )
        row = {
            "wheel": wheel + 1,
            "clips": clips,
            "unmapped_predicted": unmapped_predicted,
            "unmapped_true": unmapped_true,
        }
        yield row, lexicon.labels[level - 1][wheel], p, t


def _check(predictions: Sequence[Any], truth: Sequence[Any], level: int = 1) -> None:
    if not truth or len(predictions) != len(truth):
        raise ScoreError(f"expected as many predictions ({len(predictions)}) as truths, 1 or more")
    if level not in (1, 2):
        raise ScoreError(f"level is {level!r}; the labels of a wheel are its level 1 or 2")


def _word_counts(
    predictions: Labels, predicted: EncodedLabels, true: EncodedLabels
) -> dict[str, Any]:
    return {
        "clips": predicted.clips,
        "predicted_labels_per_clip": len(predicted.clip) / predicted.clips,
        "true_labels_per_clip": len(true.clip) / true.clips,
        "empty_predictions": sum(not any(map(normalise, labels)) for labels in predictions),
        "unknown_predicted": predicted.unknown,
        "unknown_true": true.unknown,
    }


def score_fine(predictions: Labels, truth: Labels, lexicon: Lexicon, level: int = 1) -> Score:
    """Set precision, recall and F of open-vocabulary labels (OV-MERD+).

    Per wheel, both lists become sets of labels; a clip without a true label is left out, one
    without a predicted label has precision and recall 0. Precision and recall are means over
    clips, F is 2PR / (P + R) of the means, and each is averaged over the five wheels.

    Args:
        predictions: label list of each clip.
        truth: label list of each clip, in the same order.
        lexicon: what maps words to labels.
        level: of the wheels, 1 or 2.

    Raises:
        ScoreError: no clips, lists of different lengths, or a wheel on which no truth stands.
    """
    _check(predictions, truth, level)
    predicted, true = EncodedLabels.of(predictions, lexicon), EncodedLabels.of(truth, lexicon)
    statistics = np.zeros((len(truth), WHEELS, 3))
    wheels, classes = [], []
    for row, names, p, t in _wheel_pairs(predicted, true, lexicon, level):
        scored = t.any(axis=1)
        hits = np.count_nonzero(p & t, axis=1) * scored
        statistics[:, row["wheel"] - 1] = np.stack(
            [
                scored,
                hits / np.maximum(np.count_nonzero(p, axis=1), 1),
                hits / np.maximum(np.count_nonzero(t, axis=1), 1),
            ],
            axis=1,
        )
        wheels.append(row)
        support, claimed, right = t.sum(0), p[scored].sum(0), (p & t).sum(0)
        classes += [
            {"wheel": row["wheel"], "label": name, **_rates(*map(int, numbers))}
            for name, *numbers in zip(names, support, claimed, right)
        ]
    means = _wheel_means(statistics.sum(0))
    for row, (precision, recall) in zip(wheels, means):
        row |= {"f": float(_harmonic(precision, recall)), "p": float(precision), "r": float(recall)}
    return Score(
        "fine",
        level,
        lexicon.identity,
        _name_values("fine", statistics),
        wheels,
        classes,
        _word_counts(predictions, predicted, true),
        statistics,
    )


def score_basic(
    predictions: Labels, truth: Sequence[str], lexicon: Lexicon, level: int = 1
) -> Score:
    """Hit rate of one true emotion (MER2023, MER2024, MELD, IEMOCAP).

    Per wheel, a clip whose true word has no label is left out; a hit is a clip whose true label
    is among the predicted ones. The mean over clips is averaged over the five wheels.

    Args:
        predictions: label list of each clip.
        truth: true word of each clip, in the same order.
        lexicon: what maps words to labels.
        level: of the wheels, 1 or 2.

    Raises:
        ScoreError: no clips, lists of different lengths, or a wheel on which no truth stands.
    """
    _check(predictions, truth, level)
    predicted = EncodedLabels.of(predictions, lexicon)
    true = EncodedLabels.of([(word,) for word in truth], lexicon)
    statistics = np.zeros((len(truth), WHEELS, 2))
    wheels, classes = [], []
    for row, names, p, t in _wheel_pairs(predicted, true, lexicon, level):
        hit = (p & t).any(axis=1)
        statistics[:, row["wheel"] - 1] = np.stack([t.any(axis=1), hit], axis=1)
        wheels.append(row | {"hit": float(hit.sum() / row["clips"])})
        classes += [
            {
                "wheel": row["wheel"],
                "label": name,
                "clips": int(support),
                "hit": float(right / support) if support else None,
            }
            for name, support, right in zip(names, t.sum(0), (p & t).sum(0))
        ]
    return Score(
        "basic",
        level,
        lexicon.identity,
        _name_values("basic", statistics),
        wheels,
        classes,
        _word_counts(predictions, predicted, true),
        statistics,
    )


def score_sentiment(predictions: Sequence[str], truth: Sequence[float]) -> Score:
    """Weighted F1 and accuracy of positive against negative (CMU-MOSI, CMU-MOSEI, CH-SIMS, v2).

    Clips whose true value is 0 are left out; of the others, those above 0 are positive. A
    prediction other than "positive" counts as negative: the release compares 1, 0 or -1 with 0.

    Args:
        predictions: positive, negative, or anything else, of each clip.
        truth: true valence of each clip, in the same order.

    Raises:
        ScoreError: no clips, lists of different lengths, a value that is not finite, or none
            other than 0.
    """
    _check(predictions, truth)
    value = np.asarray(truth, float)
    if not np.isfinite(value).all():
        place = int(np.flatnonzero(~np.isfinite(value))[0])
        raise ScoreError(f"the true value of clip {place} is {value[place]}; expected a number")
    if not value.any():
        raise ScoreError(f"all {len(value)} true values are 0, and such clips are not scored")
    true = np.where(value == 0, -1, value > 0)
    return _score_two_classes("sentiment", ("negative", "positive"), SENTIMENTS, predictions, true)


def score_preference(predictions: Sequence[str], truth: Sequence[str]) -> Score:
    """Which of two descriptions people prefer: weighted F1 over a1 and a2, and accuracy.

    As MER-Prefer of MER2026 counts: clips whose truth is "same" are left out, and a prediction that
    is not a2 counts as a1. Predictions that are none of a1, a2 and same are listed as unknown.

    Args:
        predictions: of each clip.
        truth: a1, a2 or same of each clip, in the same order.

    Raises:
        ScoreError: no clips, lists of different lengths, or no clip with a preference.
    """
    _check(predictions, truth)
    classes = ("a1", "a2")
    true = np.asarray([classes.index(word) if word in classes else -1 for word in truth])
    if (true < 0).all():
        raise ScoreError(f"none of {len(truth)} clips has a preference that is not same")
    return _score_two_classes("preference", classes, (*classes, "same"), predictions, true)


def _score_two_classes(
    task: str,
    classes: tuple[str, str],
    known: Sequence[str],
    predictions: Sequence[str],
    true: np.ndarray,
) -> Score:
    """The score of predictions that count as the second class where they are its name, and else as
    the first.

    Args:
        task: that is scored.
        classes: their names.
        known: words that a prediction may be; others are listed.
        predictions: of each clip.
        true: int [clips], the number of the true class; -1 leaves a clip out.
    """
    words = [normalise(word) for word in predictions]
    claim = np.asarray([word == classes[1] for word in words]).astype(int)
    scored = np.flatnonzero(true >= 0)
    # [clip, is it of the second class, is it called so]
    statistics = np.zeros((len(true), 2, 2))
    statistics[scored, true[scored], claim[scored]] = 1
    confusion = statistics.sum(0).astype(int)
    rows = [
        {"label": name, **_rates(confusion[c].sum(), confusion[:, c].sum(), confusion[c, c])}
        for c, name in enumerate(classes)
    ]
    counts = {
        "clips": len(true),
        "scored": int(scored.size),
        "empty_predictions": sum(not word for word in words),
        "predicted": {name: words.count(name) for name in known},
        "unknown_predicted": dict(
            Counter(word for word in words if word and word not in known).most_common()
        ),
    }
    return Score(task, None, None, _name_values(task, statistics), [], rows, counts, statistics)


def score_words(predictions: Labels, truth: Sequence[str], max_labels: int = 1) -> Score:
    """Hit rate of one true word among the first labels, compared as words, without a lexicon.

    For sets whose words are closed, such as the demo world. Clips without a true word are left
    out. A class's precision is over all labels that count.

    Args:
        predictions: label list of each clip, the likeliest first.
        truth: true word of each clip, in the same order.
        max_labels: labels that count: naming every word would hit always.

    Raises:
        ScoreError: no clips, lists of different lengths, or no true word.
    """
    _check(predictions, truth)
    true = [normalise(word) for word in truth]
    counted = [
        list(dict.fromkeys(filter(None, map(normalise, labels[:max_labels]))))
        for labels in predictions
    ]
    scored = np.asarray([bool(word) for word in true])
    if not scored.any():
        raise ScoreError(f"none of {len(true)} clips has a true word, so there is nothing to score")
    hit = np.asarray([word in labels for word, labels in zip(true, counted)]) & scored
    statistics = np.stack([scored, hit], axis=1).astype(float)
    support = Counter(word for word in true if word)
    claimed = Counter(w for labels, counts in zip(counted, scored) if counts for w in labels)
    right = Counter(word for word, found in zip(true, hit) if found)
    classes = [
        {"label": word, **_rates(clips, claimed[word], right[word])}
        for word, clips in support.most_common()
    ]
    counts = {
        "clips": len(true),
        "scored": int(scored.sum()),
        "predicted_labels_per_clip": labels_per_clip(predictions),
        "true_labels_per_clip": float(scored.mean()),
        "empty_predictions": sum(not any(map(normalise, labels)) for labels in predictions),
        "unknown_predicted": dict(
            Counter({word: n for word, n in claimed.items() if word not in support}).most_common()
        ),
    }
    values = _name_values("words", statistics)
    return Score("words", None, None, values, [], classes, counts, statistics)


def _rates(support: int, claimed: int, right: int) -> dict[str, Any]:
    """Figures of one class; a share of nothing is None."""
    return {
        "clips": int(support),
        "predicted": int(claimed),
        "p": float(right / claimed) if claimed else None,
        "r": float(right / support) if support else None,
        "f": float(2 * right / (support + claimed)) if support + claimed else None,
    }


def _harmonic(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """F of precision and recall; 0 where both are."""
    total = precision + recall
    return 2 * precision * recall / np.where(total == 0, 1, total)


def _wheel_means(sums: np.ndarray) -> np.ndarray:
    """Means over the scored clips, [..., 5, n], from sums [..., 5, 1 + n]; nan without clips."""
    with np.errstate(invalid="ignore"):
        return sums[..., 1:] / sums[..., :1]


def _fine_values(sums: np.ndarray) -> np.ndarray:
    """F, P and R, [..., 3], from sums [..., 5, (scored, precision, recall)]."""
    precision, recall = np.moveaxis(_wheel_means(sums), -1, 0)
    return np.stack([_harmonic(precision, recall), precision, recall], axis=-1).mean(axis=-2)


def _basic_values(sums: np.ndarray) -> np.ndarray:
    """Hit rate, [..., 1], from sums [..., 5, (scored, hits)]."""
    return _wheel_means(sums).mean(axis=-2)


def _sentiment_values(sums: np.ndarray) -> np.ndarray:
    """Weighted F1 and accuracy, [..., 2], from confusions [..., true class, predicted class]."""
    support, claimed = sums.sum(axis=-1), sums.sum(axis=-2)
    right = np.diagonal(sums, axis1=-2, axis2=-1)
    f1 = 2 * right / np.maximum(support + claimed, 1)
    with np.errstate(invalid="ignore"):
        share = support / support.sum(axis=-1, keepdims=True)
        accuracy = right.sum(axis=-1) / support.sum(axis=-1)
    return np.stack([(share * f1).sum(axis=-1), accuracy], axis=-1)


def _words_values(sums: np.ndarray) -> np.ndarray:
    """Hit rate, [..., 1], from sums [..., (scored, hits)]."""
    with np.errstate(invalid="ignore"):
        return sums[..., 1:] / sums[..., :1]


# Metrics of each task, the primary one first, and how they follow from sums of the statistics.
METRICS: dict[str, tuple[tuple[str, ...], Callable[[np.ndarray], np.ndarray]]] = {
    "fine": (("f", "p", "r"), _fine_values),
    "basic": (("hit",), _basic_values),
    "sentiment": (("weighted_f1", "accuracy"), _sentiment_values),
    "words": (("hit",), _words_values),
    "preference": (("weighted_f1", "accuracy"), _sentiment_values),
}


def _name_values(task: str, statistics: np.ndarray) -> dict[str, float]:
    names, values = METRICS[task]
    return dict(zip(names, values(statistics.sum(axis=0)).tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval.

    Attributes:
        low, high: its ends, in the unit of the value.
        confidence: share of resamples between them.
        resamples: how many gave a value; one without a scored clip on some wheel gives none.
    """

    low: float
    high: float
    confidence: float
    resamples: int


def clip_scores(score: Score) -> np.ndarray:
    """The score of each clip alone, float64 [clips], 0 to 1; nan where it is not scored.

    Hits, as a mean over the wheels that score the clip; F of the clip's mean precision and recall
    for fine. Means of these are not the score.
    """
    statistics = score.statistics
    with np.errstate(invalid="ignore"):
        match score.task:
            case "fine":
                sums = statistics.sum(axis=1)
                return _harmonic(*np.moveaxis(sums[:, 1:] / sums[:, :1], -1, 0))
            case "basic":
                sums = statistics.sum(axis=1)
                return sums[:, 1] / sums[:, 0]
            case "sentiment" | "preference":
                return np.trace(statistics, axis1=1, axis2=2) / statistics.sum(axis=(1, 2))
            case _:
                return statistics[:, 1] / statistics[:, 0]


def bootstrap(
    score: Score, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Intervals of a score's values, by drawing its clips with replacement (Efron 1979).

    They tell how far the choice of test clips moves the score, not how far another training run
    or another label extraction would.

    Raises:
        ScoreError: no resamples, or a confidence that is not between 0 and 1.
    """
    values = _resampled([score], resamples, np.random.default_rng([seed, 0]))[0]
    names, _ = METRICS[score.task]
    return {name: _interval(values[:, n], confidence) for n, name in enumerate(names)}


def mean_interval(
    scores: Sequence[Score], resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the mean of primary values over data sets, each resampled by itself.

    Raises:
        ScoreError: no scores, no resamples, or a confidence that is not between 0 and 1.
    """
    if not scores:
        raise ScoreError("a mean needs one score or more")
    # A generator per set: draws from one state would move sets of equal size together.
    generators = np.random.default_rng([seed, 2]).spawn(len(scores))
    values = [
        _resampled([score], resamples, generator)[0][:, 0]
        for score, generator in zip(scores, generators)
    ]
    return _interval(np.mean(values, axis=0), confidence)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The difference of two systems on the same clips.

    Attributes:
        difference: of the primary values, first minus second.
        interval: of the difference; both systems are resampled together.
        p_value: two-sided, of the hypothesis that the systems are exchangeable clip by clip.
        permutations: how many gave it; it is at least 1 / (1 + permutations).
    """

    difference: float
    interval: Interval
    p_value: float
    permutations: int


def compare(
    first: Score, second: Score, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Paired bootstrap interval and paired permutation test of the primary value.

    The test swaps the systems on a random half of the clips, many times, and counts how often
    the difference is at least as large as the one found (Noreen 1989).

    Args:
        first: score of one system.
        second: of another, over the same clips in the same order.
        resamples: of the bootstrap, and permutations of the test.
        confidence: of the interval.
        seed: of both.

    Raises:
        ScoreError: scores of different tasks, levels, lexicons or truths.
    """
    _check_comparable(first, second)
    _, values_of = METRICS[first.task]
    a, b = _resampled([first, second], resamples, np.random.default_rng([seed, 0]))
    interval = _interval(a[:, 0] - b[:, 0], confidence)

    observed = first.primary - second.primary
    shape = first.statistics.shape[1:]
    gap = (second.statistics - first.statistics).reshape(len(first.statistics), -1)
    totals = first.statistics.sum(axis=0), second.statistics.sum(axis=0)
    generator = np.random.default_rng([seed, 1])
    extreme = 0
    for size in _chunks(resamples, len(gap)):
        swap = generator.integers(2, size=(size, len(gap)), dtype=np.int8).astype(float)
        moved = (swap @ gap).reshape(size, *shape)
        difference = values_of(totals[0] + moved)[:, 0] - values_of(totals[1] - moved)[:, 0]
        # Rounding must not decide whether a permutation equals what was observed.
        extreme += int((np.abs(difference) >= abs(observed) - 1e-12).sum())
    return Comparison(observed, interval, (1 + extreme) / (1 + resamples), resamples)


def _check_comparable(first: Score, second: Score) -> None:
    for what in ("task", "level", "lexicon"):
        mine, theirs = getattr(first, what), getattr(second, what)
        if mine != theirs:
            raise ScoreError(f"scores of different {what} do not compare: {mine} and {theirs}")

    def true_side(score: Score) -> np.ndarray:
        statistics = score.statistics
        square = score.task in ("sentiment", "preference")
        return statistics.sum(axis=-1) if square else statistics[..., 0]

    if not np.array_equal(true_side(first), true_side(second)):
        raise ScoreError("scores over different clips do not compare; score both on one truth file")


def _resampled(
    scores: Sequence[Score], resamples: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Values [resamples, metrics] of each score, all over the same draws of clips."""
    if resamples < 1:
        raise ScoreError(f"expected 1 or more resamples, found {resamples}")
    clips = len(scores[0].statistics)
    values: list[list[np.ndarray]] = [[] for _ in scores]
    for size in _chunks(resamples, clips):
        draws = generator.integers(clips, size=(size, clips)) + clips * np.arange(size)[:, None]
        weights = np.bincount(draws.ravel(), minlength=size * clips).reshape(size, clips)
        for score, found in zip(scores, values, strict=True):
            sums = weights.astype(float) @ score.statistics.reshape(clips, -1)
            sums = sums.reshape(size, *score.statistics.shape[1:])
            found.append(METRICS[score.task][1](sums))
    return [np.concatenate(found) for found in values]


def _chunks(total: int, width: int) -> Iterator[int]:
    """Heights of the slices in which a [total, width] array is worked through."""
    height = max(1, CHUNK // width)
    for start in range(0, total, height):
        yield min(height, total - start)


def _interval(values: np.ndarray, confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise ScoreError(f"expected a confidence between 0 and 1, found {confidence}")
    values = values[np.isfinite(values)]
    if not values.size:
        raise ScoreError("no resample has a scored clip on every wheel; there are too few clips")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), confidence, len(values))


@dataclasses.dataclass(frozen=True)
class Protocols:
    """Scores of several checkpoints of a run under both protocols.

    Attributes:
        fixed: the checkpoint that was named before the test set was looked at.
        fixed_value: its score, the honest one.
        best: the checkpoint with the highest score.
        best_value: its score, which flatters; published MER-UniBench figures are of this kind.
        checkpoints: how many there were to choose from.
        chosen_on_test: whether `best` was chosen on the test set, as with more than one it is.
    """

    fixed: str
    fixed_value: float
    best: str
    best_value: float
    checkpoints: int
    chosen_on_test: bool


def protocols(values: Mapping[str, float], fixed: str) -> Protocols:
    """The fixed checkpoint and the best of several; of equal scores, the first is best.

    Raises:
        ScoreError: the fixed checkpoint is not among them.
    """
    if fixed not in values:
        raise ScoreError(f"the fixed checkpoint {fixed!r} is none of {list(values)}")
    best = max(values, key=values.__getitem__)
    return Protocols(fixed, values[fixed], best, values[best], len(values), len(values) > 1)
