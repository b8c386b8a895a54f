"""What a run is measured by while it trains: validation, and the held-out test set at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from affectgpt_jax import inference
from affectgpt_jax.data.modalities import InputMode
from affectgpt_jax.data.pipeline import (
    DataError,
    MixtureComponent,
    sequential_batches,
    too_long_message,
)
from affectgpt_jax.data.prompts import parse_label
from affectgpt_jax.evaluation.metrics import labels_per_clip
from affectgpt_jax.program import Program
from affectgpt_jax.training.loop import Validation
from affectgpt_jax.training.metrics_writer import SAMPLES, Sample
from affectgpt_jax.training.sharding import shard_whole_batch


def question_for_test_set(config: ConfigDict) -> str:
    """What the test clips are asked: the question that can be scored, or else the first one."""
    types = parse_label(config.label)
    return inference.scored_question(types) or types[0]


def make_generators(
    program: Program,
    base: Any,
    components: Sequence[MixtureComponent],
    *,
    merge_lora: bool,
    pulse: Callable[[], None],
) -> dict[InputMode, inference.Generator]:
    """A generator for every input mode of these components.

    Args:
        program: of the run.
        base: frozen weights.
        components: of validation and test.
        merge_lora: whether LoRA is merged into a copy of the base first.
        pulse: called before every batch of prompts.
    """
    config = program.config
    return {
        component.processor.mode: inference.Generator(
            program.model,
            base,
            component.processor,
            program.mesh,
            num_buckets=config.num_buckets,
            batch_size=config.generate.batch_size,
            max_new_tokens=config.generate.max_new_tokens,
            merge_lora=merge_lora,
            pulse=pulse,
        )
        for component in components
    }


def make_validation(
    program: Program,
    base: Any,
    components: Sequence[MixtureComponent],
    generators: Mapping[InputMode, inference.Generator],
    pulse: Callable[[], None],
    progress: inference.Progress = inference.silent,
) -> Validation:
    """Scores `val/loss` and `val/hit` or `val/f`, and a few answers; these two where clips name a
    true answer, see `inference.Truth`.

    Of several components, the loss is that of all tokens together, and every component has its own
    beside it, `val/loss/NAME` and `val/hit/NAME`.

    Args:
        program: of the run; its loss is what is validated.
        base: frozen weights.
        components: validation sets.
        generators: for their input modes.
        pulse: called before every batch.
        progress: called with the answers of a component that there are, and how many there will be.

    Raises:
        DataError: a validation clip is over `config.max_tokens`, or all are.
    """
    parts = {c.name: _validation_set(program.config, c, generators, progress) for c in components}

    def validate(trainable: Any) -> tuple[dict[str, float], list[Sample]]:
        sums, scores, samples = {}, {}, []
        for name, (batches, score) in parts.items():
            device_sums = []
            for batch in batches():
                pulse()
                batch = shard_whole_batch(program.mesh, batch)
                device_sums.append(program.eval_step(trainable, base, batch))
            sums[name] = np.sum(jax.device_get(device_sums), axis=0)
            suffix = f"/{name}" if len(parts) > 1 else ""
            if score is not None:
                metric, value, found = score(trainable)
                scores[f"val/{metric}{suffix}"] = value
                samples += found
            if suffix:
                total, tokens = sums[name]
                scores[f"val/loss{suffix}"] = float(total / tokens)
        total, tokens = np.sum(list(sums.values()), axis=0)
        return {"val/loss": float(total / tokens), **scores}, samples

    return validate


def _validation_set(
    config: ConfigDict,
    component: MixtureComponent,
    generators: Mapping[InputMode, inference.Generator],
    progress: inference.Progress,
) -> tuple[Callable[[], Iterator[Any]], Callable[[Any], tuple[str, float, list[Sample]]] | None]:
    """The batches of a validation set, and its score (metric and value) and first answers, if its
    clips name a true answer.

    Clips alternate between the label types, the same ones every time.
    """
    dataset, processor = component.dataset, component.processor
    types = parse_label(component.label)
    by_type = [processor.training_examples(dataset, kind) for kind in types]
    examples = [by_type[i % len(types)][i] for i in range(len(dataset))]
    lengths = np.array([[len(example) for example in kind] for kind in by_type])
    if lengths.max() > config.max_tokens and config.too_long != "drop":
        raise DataError(too_long_message(dataset, types, lengths, config.max_tokens))
    kept = [i for i, example in enumerate(examples) if len(example) <= config.max_tokens]
    if not kept:
        raise DataError(
            f"data set {component.name!r} has no validation example of at most "
            f"{config.max_tokens} tokens; raise config.max_tokens"
        )

    def batches() -> Iterator[Any]:
        found = sequential_batches(
            dataset, processor, examples, config.batch_size, config.num_buckets, numbers=kept
        )
        return (batch for _, batch in found)

    question = inference.scored_question(types)
    truth = "no question" if question is None else inference.truth_of(dataset, question)
    if isinstance(truth, str):
        return batches, None

    def score(trainable: Any) -> tuple[str, float, list[Sample]]:
        generator = generators[processor.mode]
        answers = generator.answer(trainable, dataset, question, progress=progress)
        labels = inference.read_labels(processor, answers, question)
        value = truth.score(labels)[truth.metric]
        shown = zip(dataset.index[:SAMPLES], answers.texts, truth.each)
        samples = [Sample(entry.name, text, ", ".join(words)) for entry, text, words in shown]
        return truth.metric, value, samples

    return batches, score


def score_test_set(
    config: ConfigDict,
    workdir: Path,
    trainable: Any,
    generator: inference.Generator,
    test: MixtureComponent,
    *,
    write: bool = True,
    progress: inference.Progress = inference.silent,
) -> dict[str, Any]:
    """Answers for held-out clips; their score, the control with shuffled features, ceilings.

    The score is a hit rate or an F score, see `inference.Truth`. Where clips name no true answer,
    or no label type of the model has one, the answers are written without a score, and `not_scored`
    says why. All processes compute the answers, which takes all
    devices.

    Args:
        config: of the run.
        workdir: where `predictions.jsonl` and `truth.csv` go.
        trainable: adapters and fusion of the checkpoint that is scored.
        generator: for the input mode of the test set.
        test: the held-out clips.
        write: whether this process writes the answers.
        progress: called with the answers there are and the number there will be.
    """
    dataset, processor = test.dataset, test.processor
    question = question_for_test_set(config)
    scored = question in inference.SCORED
    truth = f"config.label={config.label} has no answer to score"
    if scored:
        truth = inference.truth_of(dataset, question)
    answers = generator.answer(trainable, dataset, question, progress=progress)
    labels = inference.read_labels(processor, answers, question) if scored else None
    result: dict[str, Any] = {"clips": len(dataset), "answers_cut": answers.cut}
    known = None if isinstance(truth, str) else truth
    if write:
        inference.write_predictions(workdir, dataset, answers, labels, known)
    if known is None:
        return result | {"not_scored": truth}
    result |= known.score(labels) | {"labels_per_clip": labels_per_clip(labels)}
    if known.metric == "f":
        result |= {"clips_scored": known.clips, "f_interval": known.interval(labels)}
    if processor.features:
        order = np.random.default_rng(config.seed).permutation(len(dataset))
        answers = generator.answer(trainable, dataset, question, order, progress)
        shuffled = known.score(inference.read_labels(processor, answers, question))
        result[f"{known.metric}_features_shuffled"] = shuffled[known.metric]
    if question != "sentiment" and (ceilings := dataset.ceilings(processor.mode.name)):
        result["ceilings"] = ceilings
    return result
