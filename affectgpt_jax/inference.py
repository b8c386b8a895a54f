"""Generation: from a model and clips to answers, labels and scores."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from jax.sharding import Mesh

from affectgpt_jax.common.files import atomic_write
from affectgpt_jax.common.json import ResumableJsonl
from affectgpt_jax.common.text import json_line
from affectgpt_jax.data.pipeline import PromptProcessor, sequential_batches
from affectgpt_jax.data.prompts import sentiment
from affectgpt_jax.data.records import Records, RecordSubset
from affectgpt_jax.evaluation import metrics
from affectgpt_jax.models.affectgpt import AffectGPT
from affectgpt_jax.models.generate import (
    GREEDY,
    Decoding,
    Generated,
    Prompts,
    Sampling,
    generate_all,
    identities,
    rows_and_prefill_batch,
    stream,
)
from affectgpt_jax.models.lora import merge
from affectgpt_jax.training.memory import device_limit
from affectgpt_jax.training.sharding import data_parallel_size, shard_whole_batch

# Called with the answers there are and the number there will be.
Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """A `Progress` that says nothing."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer of a model about one clip.

    Attributes:
        text: without the end mark.
        tokens: number of tokens, the end mark included.
        cut: whether it reached the limit of new tokens before its end mark.
        log_prob: sum over all tokens, under the model's own distribution; None unless asked for.
    """

    text: str
    tokens: int
    cut: bool
    log_prob: float | None


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of a model about every clip of a data set, by record number."""

    each: list[Answer]

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.each]

    @property
    def cut(self) -> int:
        """The number of answers that reached the limit of new tokens."""
        return sum(answer.cut for answer in self.each)


class Generator:
    """Answers questions about clips, with a few compiled programs for each prompt length.

    Args:
        model: the modules.
        base: frozen weights.
        processor: how clips become prompts.
        mesh: batches are split over it.
        batch_size: answers that are generated at a time.
        max_new_tokens: limit of an answer.
        num_buckets: the number of prompt lengths, each of which costs compilation.
        sampling: how tokens are chosen; greedy by default.
        seed: of sampling. A sample depends on it, the clip's name and the question, not on the
            other clips.
        log_probs: whether answers have a log-probability.
        merge_lora: whether LoRA is merged into a copy of the base first, see `should_merge`.
        pulse: called before prompts are read; an error that it raises ends generation.
    """

    def __init__(
        self,
        model: AffectGPT,
        base: Any,
        processor: PromptProcessor,
        mesh: Mesh,
        *,
        batch_size: int,
        max_new_tokens: int,
        num_buckets: int = 1,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        log_probs: bool = False,
        merge_lora: bool = False,
        pulse: Callable[[], None] = lambda: None,
    ):
        self._model, self._base, self._processor, self._mesh = model, base, processor, mesh
        self._num_buckets, self._seed, self._pulse = num_buckets, seed, pulse
        # Without adapters, and beside quantized kernels, there is nothing to merge.
        self._merge_lora = merge_lora and _can_merge(model)
        self._rows, self._prefill_batch = rows_and_prefill_batch(
            batch_size, data_parallel_size(mesh)
        )
        tokenizer, end = processor.tokenizer, processor.prompts.end
        stops = {tokenizer.end_id, *tokenizer.ids_holding(end).tolist()}
        self._decoding = Decoding(
            max_new_tokens, tuple(sorted(stops)), tokenizer.end_id, sampling, log_probs
        )

    def answer(
        self,
        trainable: Any,
        dataset: Records,
        question: str,
        feature_from: Sequence[int] | None = None,
        progress: Progress = silent,
    ) -> Answers:
        """Ask one question about every clip.

        Args:
            trainable: adapters and fusion.
            dataset: the clips.
            question: a label type of the prompts, or the text of any question.
            feature_from: for each clip the number of the one whose features it gets instead of its
                own; a permutation is the control that shows what features are worth.
            progress: called with the answers there are and the number there will be.

        Raises:
            DataError: a clip that cannot be asked; the message names it.
        """
        found, total = {}, len(dataset)
        progress(0, total)
        for number, answer in self.answers(trainable, dataset, question, feature_from):
            found[number] = answer
            progress(len(found), total)
        return Answers([found[number] for number in range(len(dataset))])

    def answers(
        self,
        trainable: Any,
        dataset: Records,
        question: str,
        feature_from: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """The answers one by one, in the order of completion, with their record numbers."""
        found = generate_all(
            self._model,
            *self._weights(trainable),
            self._prompts(dataset, question, feature_from),
            self._decoding,
            self._rows,
            seed=self._seed,
        )
        for number, generated in found:
            yield number, self._read(generated)

    def stream(self, trainable: Any, clip: Records, question: str) -> Iterator[Answer]:
        """Ask about a data set of one clip and yield the answer as it grows.

        Yields:
            The answer after every token. Until it is complete, its text holds only what later
            tokens cannot change: whole characters, and no part of an end mark.

        Raises:
            DataError: the clip cannot be asked.
        """
        [(_, batch, rows, _)] = self._prompts(clip, question)
        weights, settings = self._weights(trainable), {"seed": self._seed, "rows": rows}
        for generated in stream(self._model, *weights, batch, self._decoding, **settings):
            first = generated.row(0)
            answer = self._read(first)
            complete = first.ended or answer.tokens == self._decoding.max_new_tokens
            settled = _settled(answer.text, self._processor.prompts.end)
            yield answer if complete else dataclasses.replace(answer, text=settled, cut=False)

    def _weights(self, trainable: Any) -> tuple[Any, Any]:
        """Base and trainable for generation, with LoRA merged if asked for."""
        if not self._merge_lora:
            return self._base, trainable
        merged = merge(self._base, trainable["lora"], self._model.decoder.lora.scale)
        return merged, {**trainable, "lora": {}}

    def _prompts(
        self, dataset: Records, question: str, feature_from: Sequence[int] | None = None
    ) -> Iterator[Prompts]:
        examples = self._processor.prompt_examples(dataset, question)
        batches = sequential_batches(
            dataset, self._processor, examples, self._prefill_batch, self._num_buckets, feature_from
        )
        for numbers, batch in batches:
            self._pulse()
            names = [f"{dataset.index[i].name}\n{question}" for i in numbers]
            names += [""] * (self._prefill_batch - len(names))
            yield Prompts(numbers, *shard_whole_batch(self._mesh, (batch, identities(names))))

    def _read(self, generated: Generated) -> Answer:
        """The answer in one row."""
        count = int(generated.counts)
        text = self._processor.tokenizer.decode(generated.tokens[:count])
        text, mark, _ = text.partition(self._processor.prompts.end)
        log_probs = generated.log_probs
        return Answer(
            text=text,
            tokens=count,
            cut=not (generated.ended or mark),
            log_prob=None if log_probs is None else float(log_probs.sum()),
        )


def _can_merge(model: AffectGPT) -> bool:
    return model.decoder.lora is not None and not model.decoder.compute.base_precision


def should_merge(setting: str, model: AffectGPT, base: Any) -> bool:
    """Whether LoRA is merged into a copy of the base's kernels before generation.

    Unmerged, each of the seven projections of a layer needs two narrow matmuls more for every
    token. Merged kernels are rounded to the base's dtype once more.

    Args:
        setting: `config.generate.merge_lora`. "true" and "false" decide; "auto" merges where the
            copy takes at most a quarter of the memory of the device, or of the host where that is
            the device.
        model: the modules. Without LoRA, or with quantized kernels, nothing is merged.
        base: frozen weights.
    """
    if setting != "auto" or not _can_merge(model):
        return setting == "true" and _can_merge(model)
    lora = model.decoder.lora
    kernels = [layer[name]["kernel"] for layer in base["layers"] for name in lora.targets]
    copy = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in kernels)
    limit = device_limit() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * copy <= limit


def _settled(text: str, end: str) -> str:
    """The part of an unfinished text that no later token can change."""
    text = text.rstrip("\ufffd")  # stands for the first bytes of a character
    started = (n for n in range(len(end) - 1, 0, -1) if text.endswith(end[:n]))
    return text[: len(text) - next(started, 0)]


class _NamedAnswer(TypedDict):
    """A line of a file of answers: a clip's name, and the fields of `Answer`."""

    name: str
    text: str
    tokens: int
    cut: bool
    log_prob: float | None


def answers_on_disk(
    path: Path,
    generator: Generator,
    trainable: Any,
    dataset: Records,
    question: str,
    progress: Progress = silent,
) -> Answers:
    """Ask about the clips whose answers a file does not have yet, and append the answers.

    Args:
        path: a JSONL file of `name` and the fields of `Answer`; of one model, question and data
            set, of which it may hold other clips as well.
        generator, trainable, dataset, question: as for `Generator.answer`.
        progress: called with the answers there are and the number there will be.

    Raises:
        DataError: a clip that cannot be asked.
        ReadError: other lines in the file.
    """
    file = ResumableJsonl(
        path, _NamedAnswer, ("name",), advice="delete the file, and all is asked again"
    )
    missing = [n for n, entry in enumerate(dataset.index) if (entry.name,) not in file.records]
    total = len(dataset)
    progress(total - len(missing), total)
    if missing:
        rest = RecordSubset(dataset, missing)
        with file:
            asked = enumerate(generator.answers(trainable, rest, question), start=1)
            for done, (number, answer) in asked:
                file.append({"name": rest.index[number].name} | dataclasses.asdict(answer))
                progress(total - len(missing) + done, total)
    fields = [field.name for field in dataclasses.fields(Answer)]
    records = (file.records[(entry.name,)] for entry in dataset.index)
    return Answers([Answer(**{key: record[key] for key in fields}) for record in records])


# Label types whose answers name the clip's one true word, best first.
SCORED = ("ovlabel", "onehot", "onehot_candidates", "sentiment")


def scored_question(label_types: Sequence[str]) -> str | None:
    """The label type by which a model trained on these is scored; None where there is none."""
    return next((kind for kind in SCORED if kind in label_types), None)


def read_labels(
    processor: PromptProcessor, answers: Answers, question: str = "ovlabel"
) -> list[list[str]]:
    """The label list of every answer to a question out of `SCORED`."""
    return [processor.prompts.read_labels(text, question) for text in answers.texts]


def _truth(dataset: Records, question: str) -> list[str]:
    """The true label of every clip; empty where it has none."""
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
    """The number of clips without the true label that a question is scored against."""
    return sum(not word for word in _truth(dataset, question))


def write_predictions(
    workdir: Path, dataset: Records, answers: Answers, labels: Sequence[Sequence[str]] | None
) -> None:
    """Write `predictions.jsonl` (name, text, labels if there are any) and `truth.csv`
    (name, emotion)."""
    with atomic_write(workdir / "predictions.jsonl", "w") as file:
        for i, entry in enumerate(dataset.index):
            line: dict[str, Any] = {"name": entry.name, "text": answers.texts[i]}
            if labels is not None:
                line["labels"] = list(labels[i])
            file.write(json_line(json.dumps(line, ensure_ascii=False)) + "\n")
    with atomic_write(workdir / "truth.csv", "w") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "emotion"])
        writer.writerows([entry.name, entry.emotion] for entry in dataset.index)
