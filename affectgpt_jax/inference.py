"""Generation: from a model and clips to answers, labels and scores."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jax.sharding import Mesh

from affectgpt_jax.common.files import atomic_write
from affectgpt_jax.common.identity import code_identity
from affectgpt_jax.common.json import ResumableJsonl
from affectgpt_jax.common.tables import write_csv
from affectgpt_jax.common.text import json_line, say
from affectgpt_jax.data.examples import Example
from affectgpt_jax.data.pipeline import PromptProcessor, sequential_batches
from affectgpt_jax.data.prompts import PromptSet, sentiment
from affectgpt_jax.data.records import Records, RecordSubset
from affectgpt_jax.evaluation import metrics
from affectgpt_jax.evaluation.consensus import consensus
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rewards import Wheels
from affectgpt_jax.models.affectgpt import AffectGPT, Batch
from affectgpt_jax.models.attention import grouped_row
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


# One, or several that are asked together.
Question = str | Sequence[str]


def each_question(question: Question) -> tuple[str, ...]:
    return (question,) if isinstance(question, str) else tuple(question)


def joined(prompts: Sequence[Example]) -> tuple[Example, tuple[int, list[int]]]:
    """The prompts about a clip as one row: what they all begin with, and the rest of each.

    Returns:
        The row, and the sizes of these parts as `grouped_row` takes them: one token or more of
        every prompt is the rest. A single prompt is its own row, without any rest.
    """
    if len(prompts) == 1:
        return prompts[0], (len(prompts[0]), [])
    parts = [prompt.tokens for prompt in prompts]
    least = min(map(len, parts)) - 1
    equal = np.all([part[:least] == parts[0][:least] for part in parts], axis=0)
    start = least if equal.all() else int(equal.argmin())
    tokens = np.concatenate([parts[0][:start], *(part[start:] for part in parts)])
    return Example(tokens, len(tokens)), (start, [len(part) - start for part in parts])


def prompt_batches(
    dataset: Records,
    processor: PromptProcessor,
    asked: Sequence[Sequence[Example]],
    rows: int,
    num_buckets: int,
    feature_from: Sequence[int] | None = None,
    length: int | None = None,
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Batches of prompts as `models.generate.Prompts` has them: a row has all prompts of a clip.

    Args:
        asked: for each question the prompt of every clip.
        rows: of a batch.

    The other arguments, and what is yielded, are those of `sequential_batches`.
    """
    rows_of_clips = [joined(clip) for clip in zip(*asked, strict=True)]
    examples = [example for example, _ in rows_of_clips]
    batches = sequential_batches(
        dataset, processor, examples, rows, num_buckets, feature_from, length=length
    )
    for numbers, batch in batches:
        for row, clip in enumerate(numbers if len(asked) > 1 else ()):
            positions, segment_ids = grouped_row(*rows_of_clips[clip][1])
            batch["positions"][row, : len(positions)] = positions
            batch["segment_ids"][row, : len(segment_ids)] = segment_ids
        yield numbers, batch


class Generator:
    """Answers questions about clips, with a few compiled programs for each prompt length.

    Args:
        model: the modules.
        base: frozen weights.
        processor: how clips become prompts.
        mesh: batches are split over it.
        batch_size: answers that are generated at a time, or a few more.
        max_new_tokens: limit of an answer.
        num_buckets: the number of prompt lengths, each of which costs compilation.
        prompt_length: of all rows of prompts instead, which are padded to it.
        sampling: how tokens are chosen; greedy by default.
        group: answers to each prompt, which share its prefill; so do several questions about a clip
            what their prompts begin with.
        seed: of sampling. A sample depends on it, the clip's name, the question and its place in
            the group, not on the other clips.
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
        prompt_length: int | None = None,
        sampling: Sampling = GREEDY,
        group: int = 1,
        seed: int = 0,
        log_probs: bool = False,
        merge_lora: bool = False,
        pulse: Callable[[], None] = lambda: None,
    ):
        self.model, self._base, self.processor, self.mesh = model, base, processor, mesh
        self._num_buckets, self._prompt_length = num_buckets, prompt_length
        self._seed, self._pulse, self.group = seed, pulse, group
        # Without adapters, and beside quantized kernels, there is nothing to merge.
        self._merge_lora = merge_lora and _can_merge(model)
        self._batch_size = batch_size
        tokenizer, end = processor.tokenizer, processor.prompts.end
        stops = {tokenizer.end_id, *tokenizer.ids_holding(end).tolist()}
        self.decoding = Decoding(
            max_new_tokens, tuple(sorted(stops)), tokenizer.end_id, sampling, log_probs
        )

    def answer(
        self,
        trainable: Any,
        dataset: Records,
        question: Question,
        feature_from: Sequence[int] | None = None,
        progress: Progress = silent,
    ) -> Answers:
        """Ask about every clip.

        The answers of a group stand side by side, and those to several questions about a clip:
        answer g to question q about clip i is number (i * questions + q) * group + g.

        Args:
            trainable: adapters and fusion.
            dataset: the clips.
            question: a label type of the prompts, the text of any question, or several of these.
            feature_from: for each clip the number of the one whose features it gets instead of its
                own; a permutation is the control that shows what features are worth.
            progress: called with the answers there are and the number there will be.

        Raises:
            DataError: a clip that cannot be asked; the message names it.
        """
        found, total = {}, len(dataset) * len(each_question(question)) * self.group
        progress(0, total)
        for number, answer in self.answers(trainable, dataset, question, feature_from):
            found[number] = answer
            progress(len(found), total)
        return Answers([found[number] for number in range(total)])

    def answers(
        self,
        trainable: Any,
        dataset: Records,
        question: Question,
        feature_from: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """The answers one by one, in the order of completion, with their numbers."""
        for number, found in self.generated(trainable, dataset, question, feature_from):
            yield number, self.read(found)

    def generated(
        self,
        trainable: Any,
        dataset: Records,
        question: Question,
        feature_from: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Iterator[tuple[int, Generated]]:
        """The same as tokens, NumPy arrays of one row; `seed` may be another one."""
        questions = each_question(question)
        width = len(questions) * self.group
        rows, prefill_batch = rows_and_prefill_batch(
            -(-self._batch_size // width), data_parallel_size(self.mesh)
        )
        return generate_all(
            self.model,
            *self.weights(trainable),
            self._prompts(dataset, questions, prefill_batch, feature_from),
            self.decoding,
            rows * width,
            seed=self._seed if seed is None else seed,
        )

    def sample(
        self, trainable: Any, batch: Batch, names: Sequence[str], question: str, seed: int
    ) -> list[Generated]:
        """Answer a batch of prompts that is on the devices, all rows at a time.

        Args:
            trainable: adapters and fusion.
            batch: P prompts of `question`, one a row, all of them in use.
            names: of their clips.
            question: a label type.
            seed: of sampling.

        Returns:
            `P * group` answers, those to one prompt side by side.
        """
        ids = shard_whole_batch(self.mesh, identities(self._names(names, (question,))))
        size = len(names) * self.group
        prompts = [Prompts(np.arange(size), batch, ids)]
        weights = self.weights(trainable)
        found = dict(generate_all(self.model, *weights, prompts, self.decoding, size, seed=seed))
        return [found[number] for number in range(size)]

    def stream(self, trainable: Any, clip: Records, question: str) -> Iterator[Answer]:
        """Ask about a data set of one clip and yield the answer as it grows.

        Yields:
            The answer after every token. Until it is complete, its text holds only what later
            tokens cannot change: whole characters, and no part of an end mark.

        Raises:
            DataError: the clip cannot be asked.
        """
        [prompts] = self._prompts(clip, (question,), data_parallel_size(self.mesh))
        weights, settings = self.weights(trainable), {"seed": self._seed, "rows": prompts.rows}
        for generated in stream(self.model, *weights, prompts.batch, self.decoding, **settings):
            first = generated.row(0)
            complete = first.ended or first.counts == self.decoding.max_new_tokens
            yield self.read(first) if complete else self.read_unfinished(first)

    def weights(self, trainable: Any) -> tuple[Any, Any]:
        """Base and trainable for generation, with LoRA merged if asked for."""
        if not self._merge_lora:
            return self._base, trainable
        merged = merge(self._base, trainable["lora"], self.model.decoder.lora.scale)
        return merged, {**trainable, "lora": {}}

    def _prompts(
        self,
        dataset: Records,
        questions: Sequence[str],
        rows: int,
        feature_from: Sequence[int] | None = None,
    ) -> Iterator[Prompts]:
        batches = prompt_batches(
            dataset,
            self.processor,
            [self.processor.prompt_examples(dataset, question) for question in questions],
            rows,
            self._num_buckets,
            feature_from,
            self._prompt_length,
        )
        width = len(questions) * self.group
        for numbers, batch in batches:
            self._pulse()
            names = self._names([dataset.index[i].name for i in numbers], questions)
            names += [""] * (rows * width - len(names))
            numbers = (numbers[:, None] * width + np.arange(width)).ravel()
            batch, ids = shard_whole_batch(self.mesh, (batch, identities(names)))
            yield Prompts(numbers, batch, ids, questions=len(questions))

    def _names(self, clips: Sequence[str], questions: Sequence[str]) -> list[str]:
        """What tells the answers about these clips apart, those to a question side by side."""
        places = [f"\n{place}" for place in range(self.group)] if self.group > 1 else [""]
        return [f"{name}\n{q}{place}" for name in clips for q in questions for place in places]

    def read_unfinished(self, generated: Generated) -> Answer:
        """The answer in one row so far, without what later tokens could change."""
        answer = self.read(generated)
        text = _settled(answer.text, self.processor.prompts.end)
        return dataclasses.replace(answer, text=text, cut=False)

    def read(self, generated: Generated) -> Answer:
        """The answer in one row."""
        count = int(generated.counts)
        text = self.processor.tokenizer.decode(generated.tokens[:count])
        text, mark, _ = text.partition(self.processor.prompts.end)
        log_probs = generated.log_probs
        return Answer(
            text=text,
            tokens=count,
            cut=not (generated.ended or mark),
            log_prob=None if log_probs is None else float(log_probs.sum()),
        )


def _can_merge(model: AffectGPT) -> bool:
    return model.decoder.lora is not None and not model.decoder.compute.base_precision


def should_merge(setting: str, model: AffectGPT, base: Any, limit: int | None = None) -> bool:
    """Whether LoRA is merged into a copy of the base's kernels before generation.

    Unmerged, each of the seven projections of a layer needs two narrow matmuls more for every
    token. Merged kernels are rounded to the base's dtype once more.

    Args:
        setting: `config.generate.merge_lora`. "true" and "false" decide; "auto" merges where the
            copy takes at most a quarter of the memory of the device, or of the host where that is
            the device.
        model: the modules. Without LoRA, or with quantized kernels, nothing is merged.
        base: frozen weights, or their shapes with shardings.
        limit: bytes of a device that is not here.
    """
    if setting != "auto" or not _can_merge(model):
        return setting == "true" and _can_merge(model)
    lora = model.decoder.lora
    kernels = [layer[name]["kernel"] for layer in base["layers"] for name in lora.targets]
    copy = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in kernels)
    limit = limit or device_limit() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * copy <= limit


def _settled(text: str, end: str) -> str:
    """The part of an unfinished text that no later token can change."""
    text = text.rstrip("\ufffd")  # stands for the first bytes of a character
    started = (n for n in range(len(end) - 1, 0, -1) if text.endswith(end[:n]))
    return text[: len(text) - next(started, 0)]


class _NamedAnswer(TypedDict):
    """A line of a file of answers: a clip's name, the fields of `Answer`, and which code wrote it
    (the hash of `code_identity`)."""

    name: str
    text: str
    tokens: int
    cut: bool
    log_prob: float | None
    code: str


class _NamedSample(_NamedAnswer):
    """The same for one of several answers about a clip: its place among them."""

    sample: int


def answers_on_disk(
    path: Path,
    generator: Generator,
    trainable: Any,
    dataset: Records,
    question: str,
    progress: Progress = silent,
    say: Callable[[str], None] = say,
) -> Answers:
    """Ask about the clips whose answers a file does not have yet, and append the answers.

    Args:
        path: a JSONL file of `name` (of a group also `sample`), the fields of `Answer` and `code`;
            of one model, question and data set, of which it may hold other clips as well.
        generator, trainable, dataset, question: as for `Generator.answer`.
        progress: called with the answers there are and the number there will be.
        say: told where the file has answers of another version of the code, which are kept.

    Raises:
        DataError: a clip that cannot be asked.
        ReadError: other lines in the file.
    """
    group = generator.group
    line, key = (_NamedAnswer, ("name",)) if group == 1 else (_NamedSample, ("name", "sample"))
    file = ResumableJsonl(path, line, key, advice="delete the file, and all is asked again")

    def keys(entry: Any) -> list[tuple]:
        return [(entry.name,)] if group == 1 else [(entry.name, place) for place in range(group)]

    missing = [n for n, e in enumerate(dataset.index) if not {*keys(e)} <= file.records.keys()]
    total = len(dataset) * group
    done = total - len(missing) * group
    code = code_identity().sha256
    wanted = {found for entry in dataset.index for found in keys(entry)} & file.records.keys()
    if others := sum(file.records[found]["code"] != code for found in wanted):
        say(
            f"note: {path}: {others:,} of {total:,} answers are of another version of the code; to "
            "have them anew, delete the file"
        )
    progress(done, total)
    if missing:
        rest = RecordSubset(dataset, missing)
        with file:
            for number, answer in generator.answers(trainable, rest, question):
                found = keys(rest.index[number // group])[number % group]
                if found not in file.records:  # of a group that was half written
                    told = dataclasses.asdict(answer) | {"code": code}
                    file.append(dict(zip(key, found, strict=True)) | told)
                done += 1
                progress(done, total)
    fields = [field.name for field in dataclasses.fields(Answer)]
    records = (file.records[found] for entry in dataset.index for found in keys(entry))
    return Answers([Answer(**{key: record[key] for key in fields}) for record in records])


def agree(
    prompts: PromptSet,
    question: str,
    texts: Sequence[str],
    labels: Sequence[Sequence[str]],
    wheels: Wheels,
) -> tuple[list[str], str]:
    """The labels that several answers about a clip agree on the most, and an answer with them.

    The answer is the first sampled one that has these labels, or else is written from them. Of
    answers that are no lists of labels, such as descriptions, one that was sampled is taken.

    Args:
        prompts: how answers are written.
        question: a label type.
        texts: the answers.
        labels: of each, without repeats.
        wheels: by which labels are compared.
    """
    found = consensus(labels, wheels, new_sets=question in SCORED)
    if found.sample is None:
        return list(found.labels), prompts.write_labels(found.labels, question)
    return list(found.labels), texts[found.sample]


def agreed_answers(
    generator: Generator,
    processor: PromptProcessor,
    trainable: Any,
    dataset: Records,
    question: Question,
    wheels: Wheels,
) -> Iterator[tuple[int, Answer]]:
    """What the answers of each group agree on, in the order of completion, with their numbers.

    Number i * questions + q is that of question q about clip i. Tokens are those of the whole
    group, which was cut if one of its answers was.
    """
    questions = each_question(question)
    groups: dict[int, dict[int, Answer]] = {}
    for number, answer in generator.answers(trainable, dataset, questions):
        asked, place = divmod(number, generator.group)
        group = groups.setdefault(asked, {})
        group[place] = answer
        if len(group) == generator.group:
            each = [group[place] for place in range(generator.group)]
            texts = [answer.text for answer in each]
            kind = questions[asked % len(questions)]
            labels = read_labels(processor, Answers(each), kind)
            _, text = agree(processor.prompts, kind, texts, labels, wheels)
            tokens, cut = sum(a.tokens for a in each), any(a.cut for a in each)
            yield asked, Answer(text, tokens, cut, None)
            del groups[asked]


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


@dataclasses.dataclass(frozen=True)
class Truth:
    """What the answers about clips are scored against, and how.

    Attributes:
        metric: "hit", the share of clips whose one true word is the first label, or "f", the F
            score of lists of labels on the emotion wheels that ship (`metrics.score_fine`).
        each: the true words of every clip; () where it has none, which "f" leaves out.
    """

    metric: str
    each: Sequence[tuple[str, ...]]

    @property
    def clips(self) -> int:
        """The number of clips that are scored."""
        return sum(map(bool, self.each))

    def score(self, labels: Sequence[Sequence[str]]) -> dict[str, float]:
        """`hit`, or `f`, `p` and `r`; upper and lower case are alike."""
        if self.metric == "hit":
            return {"hit": metrics.hit_rate(labels, [w for (w,) in self.each], max_labels=1)}
        return dict(metrics.score_fine(labels, self.each, load_lexicon()).values)

    def interval(self, labels: Sequence[Sequence[str]]) -> tuple[float, float]:
        """The 95 % bootstrap interval of "f" over the clips."""
        found = metrics.bootstrap(metrics.score_fine(labels, self.each, load_lexicon()))["f"]
        return found.low, found.high


def truth_of(dataset: Records, question: str) -> Truth | str:
    """What the answers to a question out of `SCORED` are scored against, or why they are not.

    Where every clip has the one true word that the question asks for, that is it. Otherwise it is
    lists of labels, where the question asks for them and clips have some.
    """
    if question == "sentiment":
        words = ["" if e.valence is None else sentiment(e.valence) for e in dataset.index]
    else:
        words = [entry.emotion.strip().lower() for entry in dataset.index]
    if all(words):
        return Truth("hit", [(word,) for word in words])
    lists = [e.labels or ((w,) if w else ()) for e, w in zip(dataset.index, words, strict=True)]
    if question == "ovlabel" and any(lists):
        try:
            metrics.score_fine(lists, lists, load_lexicon())
        except metrics.ScoreError as error:
            return f"the labels of the clips: {error}"
        return Truth("f", lists)
    return f"{words.count('')} of {len(dataset)} clips name no true answer"


def write_predictions(
    workdir: Path,
    dataset: Records,
    answers: Answers,
    labels: Sequence[Sequence[str]] | None,
    truth: Truth | None,
) -> None:
    """Write `predictions.jsonl` (name, text, labels if there are any) and `truth.csv`.

    The truth is as `affectgpt score` reads it: name and emotion for --task words, or name and
    openset for --task fine. Without any there is no such file.
    """
    with atomic_write(workdir / "predictions.jsonl", "w") as file:
        for i, entry in enumerate(dataset.index):
            line: dict[str, Any] = {"name": entry.name, "text": answers.texts[i]}
            if labels is not None:
                line["labels"] = list(labels[i])
            file.write(json_line(json.dumps(line, ensure_ascii=False)) + "\n")
    if truth is None:
        (workdir / "truth.csv").unlink(missing_ok=True)  # of an earlier end of this run
        return
    column = "emotion" if truth.metric == "hit" else "openset"
    rows = (
        {"name": e.name, column: ", ".join(words)}
        for e, words in zip(dataset.index, truth.each, strict=True)
        if words
    )
    write_csv(workdir / "truth.csv", ("name", column), rows)
