"""Array scoring against word-by-word scoring: `python -m benchmarks.scoring [--lexicon DIR]`.

Both score the same random label lists on all five wheels, on one core, and must agree. The direct
implementation applies the rules to every word where it stands, with dicts and sets, as one would
write them down.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.evaluation.lexicon import (
    Lexicon,
    Source,
    level1_parents,
    load_lexicon,
    read_source,
)
from affectgpt_jax.evaluation.metrics import score_fine
from benchmarks import harness
from benchmarks.harness import Report

UNKNOWN_SHARE = 0.05


class Direct:
    """The rules by dicts: surface form -> base words -> wheel words -> level-1 label."""

    def __init__(self, source: Source):
        self.bases, self.words = defaultdict(set), defaultdict(set)
        for base, form in source.forms:
            self.bases[form].add(base)
            self.bases[base].add(base)
        for word, base in source.synonyms:
            self.words[base].add(word)
        self.wheels = [level1_parents(rows) for rows in source.wheels]
        for word in {word for parents in self.wheels for word in parents} | {
            word for word, _ in source.synonyms
        }:
            self.bases[word].add(word)
            self.words[word].add(word)
        for base in list(self.words):
            self.bases[base].add(base)

    def label(self, form: str, parents: dict[str, str]) -> str | None:
        """A word's label on the wheel of these parents."""
        words = set()
        for base in self.bases.get(form, ()):
            words |= self.words.get(base, set())
        return next((parents[word] for word in sorted(words) if word in parents), None)

    def score(self, predictions: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> float:
        """Fine-grained F, 0 to 1, as `score_fine` defines it."""
        values = []
        for parents in self.wheels:
            precisions, recalls = [], []
            for predicted, true in zip(predictions, truth, strict=True):
                p = {self.label(form, parents) for form in predicted} - {None}
                t = {self.label(form, parents) for form in true} - {None}
                if t:
                    precisions.append(len(p & t) / len(p) if p else 0)
                    recalls.append(len(p & t) / len(t))
            p, r = np.mean(precisions), np.mean(recalls)
            values.append(2 * p * r / (p + r))
        return float(np.mean(values))


def draw(lexicon: Lexicon, clips: int, labels: int, seed: int) -> list[list[str]]:
    """Random label lists, of known words for the most part."""
    generator = np.random.default_rng(seed)
    words = np.asarray(lexicon.forms)[generator.integers(len(lexicon.forms), size=(clips, labels))]
    words[generator.random(words.shape) < UNKNOWN_SHARE] = "no such word"
    return words.tolist()


def measure(function: Callable[[], Any], repeats: int) -> tuple[dict[str, Any], Any]:
    """Seconds of repeated calls after one that does not count, and what the last one returned."""
    function()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - began)
    return harness.spread(seconds) | {"repeats": repeats}, result


def run(args: argparse.Namespace) -> Report:
    """One measurement; returns the report.

    Raises:
        UserError: the two score differently.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # The first, uncounted load leaves the compiled copy in the cache.
    loading, lexicon = measure(lambda: load_lexicon(args.lexicon), 20)
    predictions = draw(lexicon, args.clips, args.labels, seed=0)
    truth = draw(lexicon, args.clips, args.labels, seed=1)
    arrays, score = measure(lambda: score_fine(predictions, truth, lexicon), 20)
    by_word = Direct(read_source(args.lexicon))
    direct, expected = measure(lambda: by_word.score(predictions, truth), 3)
    if abs(score.primary - expected) > 1e-12:
        raise UserError(f"the scores differ: {score.primary} by arrays, {expected} by words")
    return {
        "lexicon": str(lexicon.identity),
        "clips": args.clips,
        "labels": args.labels,
        "timings": {
            "load from the compiled cache": loading,
            "score by arrays": arrays,
            "score word by word": direct,
        },
        "ratio": direct["median"] / arrays["median"],
    }


def table(report: Report) -> str:
    """A Markdown table of a report."""
    rows = [
        (name, *(f"{found[key]:.4f} s" for key in ("median", "lowest", "highest")))
        for name, found in report["timings"].items()
    ]
    return "\n\n".join(
        [
            f"{report['clips']:,} clips with {report['labels']} labels, five wheels, "
            f"lexicon: {report['lexicon']}",
            harness.markdown(("what", "median", "fastest", "slowest"), rows),
            f"arrays are {report['ratio']:.0f} times as fast",
        ]
    )


def flags(add: Callable[..., Any]) -> None:
    add("--lexicon", type=Path, help="a lexicon's directory; default: shipped")
    add("--clips", type=int, default=20_000)
    add("--labels", type=int, default=5)


COMMAND = harness.Measurement("scoring", run, harness.each(table), lambda args: "scoring", flags)

if __name__ == "__main__":
    COMMAND.main()
