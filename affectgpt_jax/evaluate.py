"""From a model and clips to answers, labels and scores."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from affectgpt_jax.data.pipeline import View, sequential_batches
from affectgpt_jax.data.prompts import sentiment
from affectgpt_jax.data.records import Records
from affectgpt_jax.evaluation import metrics
from affectgpt_jax.models.affectgpt import AffectGPT
from affectgpt_jax.models.generate import greedy
from affectgpt_jax.training.sharding import shard_batch


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model wrote about every clip of a data set.

    Attributes:
        texts: by record number.
        cut: how many reached the limit of new tokens before they ended.
    """

    texts: list[str]
    cut: int


class Generator:
    """Greedy answers, one compiled program per prompt length bucket.

    Args:
        model: the modules.
        base: frozen weights.
        view: how clips become prompts.
        mesh: batches are split over it.
        batch_size: prompts at a time.
        max_new_tokens: an answer is cut off there.
        num_buckets: the number of prompt lengths, each of which costs one compilation.
    """

    def __init__(
        self,
        model: AffectGPT,
        base: Any,
        view: View,
        mesh: Mesh,
        *,
        batch_size: int,
        max_new_tokens: int,
        num_buckets: int = 1,
    ):
        self._view, self._mesh, self._base = view, mesh, base
        self._num_buckets = num_buckets
        # The batch axis must divide over the devices that share it.
        shares = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch_size = -(-batch_size // shares) * shares
        stops = {view.tokenizer.end_id, *view.tokenizer.ids_holding(view.prompts.end)}
        self._stop_ids = np.asarray(sorted(stops), np.int32)
        self._generate = jax.jit(
            functools.partial(
                greedy,
                model,
                stop_ids=jnp.asarray(self._stop_ids),
                pad_id=view.tokenizer.end_id,
                max_new_tokens=max_new_tokens,
            )
        )

    def answer(
        self,
        trainable: Any,
        dataset: Records,
        question: str,
        feature_from: Sequence[int] | None = None,
    ) -> Answers:
        """Ask one question about every clip.

        Args:
            trainable: adapters and fusion.
            dataset: the clips.
            question: a label type of the prompts.
            feature_from: for each clip the number of the one whose features it gets instead of its
                own; a permutation is the control that shows what features are worth.
        """
        examples = self._view.prompt_examples(dataset, question)
        texts, cut = [""] * len(dataset), 0
        batches = sequential_batches(
            dataset, self._view, examples, self._batch_size, self._num_buckets, feature_from
        )
        for numbers, batch in batches:
            tokens = np.asarray(
                self._generate(self._base, trainable, shard_batch(self._mesh, batch))
            )
            for number, row in zip(numbers, tokens[: len(numbers)], strict=True):
                cut += not np.isin(row, self._stop_ids).any()
                texts[number] = self._view.tokenizer.decode(row).split(self._view.prompts.end)[0]
        return Answers(texts, cut)


# Label types whose answers name the clip's one true word, best first.
SCORED = ("ovlabel", "onehot", "onehot_candidates", "sentiment")


def scored_question(label_types: Sequence[str]) -> str | None:
    """The label type by which a model trained on these is scored; None where there is none."""
    return next((kind for kind in SCORED if kind in label_types), None)


def read_labels(view: View, answers: Answers, question: str = "ovlabel") -> list[list[str]]:
    """The label list of every answer to a question out of `SCORED`."""
    return [view.prompts.read_labels(text, question) for text in answers.texts]


def _truth(dataset: Records, question: str) -> list[str]:
    """The one true word of every clip; empty where it has none."""
    if question == "sentiment":
        return ["" if e.valence is None else sentiment(e.valence) for e in dataset.index]
    return [entry.emotion.strip().lower() for entry in dataset.index]


def score_labels(
    dataset: Records, labels: Sequence[Sequence[str]], question: str = "ovlabel"
) -> dict[str, float]:
    """Hit rate of the first label (`hit`), upper and lower case alike, and `labels_per_clip`."""
    return {
        "hit": metrics.hit_rate(labels, _truth(dataset, question), max_labels=1),
        "labels_per_clip": metrics.labels_per_clip(labels),
    }


def without_truth(dataset: Records, question: str = "ovlabel") -> int:
    """How many clips lack the one true word that answers to a question are scored against."""
    return sum(not word for word in _truth(dataset, question))


def write_predictions(
    workdir: Path, dataset: Records, answers: Answers, labels: Sequence[Sequence[str]] | None
) -> None:
    """Write `predictions.jsonl` (name, text, labels if there are any) and `truth.csv`
    (name, emotion)."""
    with (workdir / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for i, entry in enumerate(dataset.index):
            line: dict[str, Any] = {"name": entry.name, "text": answers.texts[i]}
            if labels is not None:
                line["labels"] = list(labels[i])
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with (workdir / "truth.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "emotion"])
        writer.writerows([entry.name, entry.emotion] for entry in dataset.index)
