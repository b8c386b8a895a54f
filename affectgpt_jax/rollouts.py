"""On-policy steps: prompts in, answers, rewards, one or more updates out.

    step s:  prompts    P clips, a pure function of (seed, s)
             answers    G to each, from one prefill a prompt; their keys follow from (seed, s, name)
             rewards    on the host, for all answers at once; advantages within each group
             batch      the tokens that were written, never their text
             update     `training.policy`, on the step set-up of `program`

`training.loop.run_steps` runs it as it runs supervised steps: `RolloutData` gives it the prompts,
`RolloutStep` is its compiled update. All follows from (seed, step) and the state, so a run that is
killed continues to the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from affectgpt_jax.config import ConfigError
from affectgpt_jax.data.examples import Example
from affectgpt_jax.data.packing import Bucket, round_up
from affectgpt_jax.data.pipeline import (
    AHEAD,
    THREADS,
    DataError,
    MixtureComponent,
    PromptProcessor,
    collate,
    empty_batch,
    feature_shapes,
)
from affectgpt_jax.data.prompts import parse_label
from affectgpt_jax.data.records import Records, RecordSubset
from affectgpt_jax.evaluation.rewards import Answered, Reward, Rewarded
from affectgpt_jax.inference import Generator
from affectgpt_jax.models.attention import grouped_row
from affectgpt_jax.models.generate import Generated
from affectgpt_jax.program import Program
from affectgpt_jax.training import policy
from affectgpt_jax.training.sharding import data_parallel_rank, shard_batch
from affectgpt_jax.training.step import State

# Arrays of an update's batch beside those of `models.affectgpt`, by token.
BY_TOKEN = ("advantages", "loss_weights", "count_weights", "sampled", "rollout_log_probs")
# A mean difference of log-probabilities that says that answers were written by another policy.
MISMATCH = 0.05
# Steps in a row without any group to learn from, after which the run says so.
NOTHING_KEPT = 5


def truths(dataset: Records, question: str, where: str) -> list[Any]:
    """What is true of every clip, as the reward of a question reads it.

    Args:
        dataset: the clips.
        question: a label type.
        where: key of the config that names them, for errors.

    Raises:
        DataError: a record lacks it; the message names it.
    """
    field = {"ovlabel": "labels", "sentiment": "valence"}.get(question, "emotion")
    found = []
    for entry in dataset.index:
        value = getattr(entry, field)
        if value in (None, "", ()):
            raise DataError(
                f"record {entry.name!r} has no {field}, which answers to {question!r} are rewarded "
                f"by; give it one, or name other records in {where}"
            )
        if field == "valence":
            found.append(value)
        else:
            labels = (value,) if isinstance(value, str) else value
            found.append([label.strip().lower() for label in labels])
    return found


def scorable(dataset: Records, reward: Reward, question: str, most: int, where: str) -> Records:
    """The first clips, `most` at the most, that a reward can score.

    Args:
        dataset: the clips.
        reward: of answers about them.
        question: a label type.
        most: how many.
        where: key of the config that names them, for errors.

    Raises:
        DataError: there is none, or a record lacks its truth.
    """
    known = np.flatnonzero(reward.scorable(truths(dataset, question, where)))
    if not len(known):
        lacks = "a valence other than 0"
        if reward.kind != "sentiment":
            lacks = f"a label on a wheel of {reward.wheels.lexicon.identity}"
        raise DataError(
            f"none of the {len(dataset)} clips of {where} has {lacks}, so no answer about them can "
            "be scored; name other records there"
        )
    return RecordSubset(dataset, known[:most].tolist())


def seed_of(seed: int, *place: int) -> int:
    """A seed of sampling, 0 to 2^32 - 1, for a place in a run."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class Written:
    """Tokens behind a prompt, and what the update is told of them.

    Attributes:
        tokens: `[n]` int32.
        advantage: of each.
        weights: `loss_weights` and `count_weights` of each.
        log_probs: `[n]`, when they were sampled; None for supervised ones.
    """

    tokens: np.ndarray
    advantage: float
    weights: tuple[float, float]
    log_probs: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of an update: a prompt, and answers that each see it and themselves."""

    dataset: Records
    processor: PromptProcessor
    number: int
    prompt: np.ndarray
    written: Sequence[Written]

    @property
    def size(self) -> tuple[int, int]:
        """Tokens, and supervised ones."""
        answers = sum(len(answer.tokens) for answer in self.written)
        return len(self.prompt) + answers, answers


def collate_rows(
    rows: Sequence[Row],
    count: int,
    bucket: Bucket,
    common: PromptProcessor,
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """A batch of `count` rows for `training.policy`, the last ones padding.

    Where answers share a prompt, positions of each start behind it, and segment ids are those of
    `attention.grouped`.
    """
    examples = []
    for row in rows:
        tokens = np.concatenate([row.prompt, *(answer.tokens for answer in row.written)])
        example = Example(tokens, len(row.prompt))
        examples.append([(row.dataset, row.processor, row.number, example)])
    batch = collate(examples + [[]] * (count - len(rows)), common, shapes, bucket)
    batch |= {name: np.zeros((count, bucket.targets), np.float32) for name in BY_TOKEN}
    for i, row in enumerate(rows):
        start, target = len(row.prompt), 0
        shared = len(row.written) > 1
        if shared:
            positions, ids = grouped_row(start, [len(answer.tokens) for answer in row.written])
            batch["positions"][i, : len(ids)] = positions
            batch["segment_ids"][i, : len(ids)] = ids
        for answer in row.written:
            size = len(answer.tokens)
            there = slice(target, target + size)
            if shared:
                batch["target_positions"][i, target] = start - 1
            batch["advantages"][i, there] = answer.advantage
            batch["loss_weights"][i, there], batch["count_weights"][i, there] = answer.weights
            if answer.log_probs is not None:
                batch["sampled"][i, there] = 1
                batch["rollout_log_probs"][i, there] = answer.log_probs
            target = there.stop
    return batch


class SupervisedRows:
    """Examples that the run was trained on, drawn for each step: they keep its descriptions alive.

    Args:
        components: of the run's own mixture.
        max_tokens: longer examples are not drawn.
        seed: of the draw.

    Raises:
        DataError: no example is short enough.
    """

    def __init__(self, components: Sequence[MixtureComponent], max_tokens: int, seed: int):
        self._seed, self._examples = seed, []
        self.datasets = [component.dataset for component in components]
        for component in components:
            for kind in parse_label(component.label):
                found = component.processor.training_examples(component.dataset, kind)
                self._examples += [
                    (component.dataset, component.processor, number, example)
                    for number, example in enumerate(found)
                    if len(example) <= max_tokens
                ]
        if not self._examples:
            raise DataError(f"config.rl.sft_share: no example of at most {max_tokens} tokens")

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """Tokens and supervised tokens that an example may have."""
        examples = [example for *_, example in self._examples]
        return max(map(len, examples)), max(len(e) - e.answer_start for e in examples)

    def draw(self, step: int, count: int) -> list[tuple[Records, PromptProcessor, int, Example]]:
        """`count` examples of a step."""
        rng = np.random.default_rng([self._seed, step, 1])
        return [self._examples[i] for i in rng.integers(len(self._examples), size=count)]


def row_counts(config: ConfigDict, shares: int) -> tuple[int, int, int]:
    """Rows of an update, over all processes: of answers, of supervised examples, and padding.

    What is learned from does not depend on the devices; padding lets them share it.

    Args:
        config: of the run.
        shares: devices that share the rows.
    """
    rl = config.rl
    answers = rl.prompts * (1 if rl.share_prompt else rl.group)
    supervised = math.ceil(rl.sft_share * answers)
    unit = shares * config.gradient_accumulation_steps
    return answers, supervised, -(answers + supervised) % unit


def check_prompts(config: ConfigDict, shares: int) -> None:
    """Refuse a step whose prompts so many devices cannot share.

    Raises:
        ConfigError: they are no multiple of the devices and the microbatches.
    """
    prompts, unit = config.rl.prompts, shares * config.gradient_accumulation_steps
    if prompts % unit:
        raise ConfigError(
            f"config.rl.prompts={prompts} in config.gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} microbatches cannot be shared by {shares} "
            f"devices (mesh {config.mesh!r}); use a multiple of {unit}"
        )


def later_arrays(rl: ConfigDict) -> list[str]:
    """What log-probabilities an update's batch has beside `BY_TOKEN`."""
    more = ["reference_log_probs"] if rl.beta or rl.stop_kl else []
    return more + (["old_log_probs"] if rl.updates > 1 else [])


def update_bucket(rl: ConfigDict, prompt: int, supervised: tuple[int, int] = (0, 0)) -> Bucket:
    """The shape of an update's rows.

    Args:
        rl: section of the config.
        prompt: tokens of the longest one.
        supervised: tokens, and supervised ones, of the longest example beside the answers.
    """
    answers = (rl.group if rl.share_prompt else 1) * rl.max_new_tokens
    room = map(max, (prompt + answers, answers), supervised)
    return Bucket(*(int(round_up(size)) for size in room))


class RolloutData:
    """The prompts of every step; a `loop.TrainingData`.

    Args:
        config: of the run.
        dataset: clips to ask about.
        processor: how they become prompts.
        reward: leaves out clips that it cannot score.
        process: this process's rank and the number of ranks, `sharding.data_parallel_rank`.
        shares: devices that share the rows, `sharding.data_parallel_size`.
        supervised: examples that stand beside the answers, where `rl.sft_share` is not 0.

    Attributes:
        left_out: clips that the reward cannot score, and clips whose prompt is too long.
        prompt_length: tokens of a row of prompts.
        answer_rows, supervised_rows, rows: of an update, over all processes: of answers, of
            supervised examples, and both with padding.
        bucket: their shape.

    Raises:
        DataError: a record without a truth, a clip that cannot be asked, or too few clips.
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: Records,
        processor: PromptProcessor,
        reward: Reward,
        process: tuple[int, int] = (0, 1),
        shares: int = 1,
        supervised: SupervisedRows | None = None,
    ):
        rl = config.rl
        self._rl, self._seed, self._process = rl, config.seed, process
        self.dataset, self.processor, self.supervised = dataset, processor, supervised
        self.examples = processor.prompt_examples(dataset, rl.question)
        self.truth = truths(dataset, rl.question, "config.rl.data")
        if rl.shuffle_rewards:
            order = np.random.default_rng([config.seed, 2]).permutation(len(dataset))
            self.truth = [self.truth[i] for i in order]
        lengths = np.array([len(example) for example in self.examples])
        fits = lengths + rl.max_new_tokens <= config.max_tokens
        scorable = reward.scorable(self.truth)
        self._kept = np.flatnonzero(fits & scorable)
        self.left_out = int((~scorable).sum()), int((scorable & ~fits).sum())
        if len(self._kept) < rl.prompts:
            raise DataError(
                f"a step asks about config.rl.prompts={rl.prompts} clips, but only "
                f"{len(self._kept)} of {len(dataset)} can be asked and scored: {self.left_out[0]} "
                f"are on no wheel, and {self.left_out[1]} prompts leave less than "
                f"config.rl.max_new_tokens={rl.max_new_tokens} of config.max_tokens="
                f"{config.max_tokens}"
            )
        longest = int(lengths[self._kept].max())
        self.prompt_length = int(round_up(longest))
        self.answer_rows, self.supervised_rows, padding = row_counts(config, shares)
        self.rows = self.answer_rows + self.supervised_rows + padding
        beside = supervised.longest if self.supervised_rows else (0, 0)
        self.bucket = update_bucket(rl, longest, beside)
        self.shapes = feature_shapes(
            processor.features,
            [
                dataset,
                *({id(e[0]): e[0] for e in supervised._examples}.values() if supervised else []),
            ],
        )
        self._sizes: dict[int, np.ndarray] = {}

    @functools.lru_cache(maxsize=4)  # noqa: B019 - it lives as long as the run
    def _order(self, epoch: int) -> np.ndarray:
        return self._kept[
            np.random.default_rng([self._seed, epoch, 0]).permutation(len(self._kept))
        ]

    def numbers(self, step: int) -> np.ndarray:
        """Which clips a step asks about, `[P]`: an epoch asks about every clip once."""
        places = np.arange(step * self._rl.prompts, (step + 1) * self._rl.prompts)
        epochs, places = np.divmod(places, len(self._kept))
        return np.array([self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)])

    def batch(self, step: int) -> dict[str, Any]:
        """This process's rows of a step's prompts."""
        index, count = self._process
        share = self._rl.prompts // count
        mine = self.numbers(step)[index * share : (index + 1) * share]
        rows = [(int(number), self.examples[number]) for number in mine]
        return self.processor.collate(self.dataset, rows, Bucket(self.prompt_length, 0))

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        steps = grain.MapDataset.range(start, stop).map(self.batch)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        return iter(steps.to_iter_dataset(options))

    def remember(self, step: int, sizes: np.ndarray) -> None:
        """Keep the sizes of a step's rows, `[N, 2]`, until the loop asks for them."""
        self._sizes = {step: sizes}

    def samples(self, step: int) -> np.ndarray:
        return self._sizes[step]

    def component_counts(self, step: int) -> dict[str, int]:
        return {"rl": self._rl.prompts}

    def filler_batch(self, more: Sequence[str] = ()) -> dict[str, Any]:
        """A global batch of an update without any answer, with `more` arrays by token."""
        end_id = self.processor.tokenizer.end_id
        batch = empty_batch(self.rows, self.bucket, self.shapes, end_id)
        shape = (self.rows, self.bucket.targets)
        return batch | {name: np.zeros(shape, np.float32) for name in (*BY_TOKEN, *more)}

    def describe(self) -> list[str]:
        """What a step asks and what its update is made of, in lines for people."""
        rl, bucket = self._rl, self.bucket
        unscored, long = self.left_out
        lines = [
            f"{len(self._kept):,} clips to ask about, {rl.prompts} a step with {rl.group} answers "
            f"each; {unscored} left out that no wheel knows, {long} whose prompts are too long"
        ]
        what = f"{self.answer_rows} of answers"
        if self.supervised_rows:
            what += f" and {self.supervised_rows} supervised"
        if padding := self.rows - self.answer_rows - self.supervised_rows:
            what += f", and {padding} of padding for the devices to share"
        lines.append(f"an update has {self.rows} rows of {bucket.length} tokens: {what}")
        return lines


def update_rows(
    rl: ConfigDict,
    data: RolloutData,
    step: int,
    numbers: np.ndarray,
    answers: Sequence[Generated],
    totals: np.ndarray,
) -> tuple[list[Row], float]:
    """The rows of a step's update, and the share of groups that are in it.

    Args:
        rl: section of the config.
        data: of the run.
        step: number of the step, by which supervised examples are drawn.
        numbers: clips that were asked about, `[P]`.
        answers: `P * G` of them.
        totals: their rewards, `[P, G]`.
    """
    advantages = policy.group_advantages(totals, rl.scale)
    flat = policy.flat_groups(totals) & rl.drop_flat
    rows, kept = [], 0
    for group, number in enumerate(numbers):
        if rl.method == "best":
            chosen = {int(totals[group].argmax()): 1.0}
        else:
            chosen = {} if flat[group] else dict(enumerate(advantages[group].tolist()))
        written = []
        for place, advantage in chosen.items():
            answer = answers[group * rl.group + place]
            if rl.mask_cut and not answer.ended:
                continue
            size = int(answer.counts)
            weights = policy.token_weights(size, rl.loss, rl.max_new_tokens)
            tokens, log_probs = answer.tokens[:size], answer.log_probs[:size]
            written.append(Written(tokens, advantage, weights, log_probs))
        kept += bool(written)
        prompt = data.examples[number].tokens
        parts = [written] if rl.share_prompt else [[one] for one in written]
        rows += [
            Row(data.dataset, data.processor, int(number), prompt, part) for part in parts if part
        ]
    if data.supervised_rows:
        drawn = data.supervised.draw(step, data.supervised_rows)
        for dataset, processor, number, example in drawn:
            prompt, answer = np.split(example.tokens, [example.answer_start])
            weights = policy.token_weights(len(answer), rl.loss, rl.max_new_tokens)
            one = Written(answer, 1.0, weights, None)
            rows.append(Row(dataset, processor, number, prompt, [one]))
    return rows, kept / len(numbers)


class RolloutStep:
    """`(state, base, prompts) -> (state, metrics)`, one on-policy step.

    Args:
        config: of the run.
        program: its loss is `policy.policy_loss`.
        update: the compiled step of the program.
        data: the prompts.
        generator: writes `rl.group` answers to each prompt.
        reward: of answers.
        start: `trainable` of the start, which the KL is taken to; None takes none.
        say: told once if answers are not those of the policy that is trained, and once if several
            steps in a row had none to learn from.

    Attributes:
        number: of the last step, from 1.
    """

    def __init__(
        self,
        config: ConfigDict,
        program: Program,
        update: Callable[[State, Any, Any], tuple[State, dict[str, jax.Array]]],
        data: RolloutData,
        generator: Generator,
        reward: Reward,
        start: Any,
        say: Callable[[str], None],
    ):
        self._rl, self._seed, self._mesh = config.rl, config.seed, program.mesh
        self._update, self._data, self._generator = update, data, generator
        self._reward, self._start, self._say = reward, start, say
        self._log_probs = jax.jit(functools.partial(policy.answer_log_probs, program.model))
        self.number, self._warned = 0, False
        self._nothing_kept, self._said_so = 0, False

    def __call__(self, state: State, base: Any, prompts: Any) -> tuple[State, dict[str, float]]:
        with jax.transfer_guard("allow"):  # answers and rewards are the host's
            return self._run(state, base, prompts)

    def _run(self, state: State, base: Any, prompts: Any) -> tuple[State, dict[str, float]]:
        rl, step = self._rl, int(state["step"])
        began = time.perf_counter()
        numbers = self._data.numbers(step)
        names = [self._data.dataset.index[i].name for i in numbers]
        answers = self._generator.sample(
            state["trainable"], prompts, names, rl.question, seed_of(self._seed, step)
        )
        wrote = time.perf_counter()
        rewarded, about = self._rewards(numbers, answers)
        totals = rewarded.total.reshape(-1, rl.group)
        rows, kept = update_rows(rl, self._data, step, numbers, answers, totals)
        self._data.remember(step, np.array([row.size for row in rows] or [(0, 0)]))
        index, count = data_parallel_rank(self._mesh)
        share = self._data.rows // count
        batch = collate_rows(
            rows[index * share : (index + 1) * share],
            share,
            self._data.bucket,
            self._data.processor,
            self._data.shapes,
        )
        batch = shard_batch(self._mesh, batch)
        inputs = {name: x for name, x in batch.items() if name not in BY_TOKEN}
        if self._start is not None:
            batch["reference_log_probs"] = self._log_probs(base, self._start, inputs)
        if rl.updates > 1:
            batch["old_log_probs"] = self._log_probs(base, state["trainable"], inputs)
        state, metrics = self._update(state, base, batch)
        # Of the model that wrote the answers: on what a later one would hardly write, the estimate
        # has no bound.
        kl = metrics["kl"]
        for _ in range(rl.updates - 1):
            state, metrics = self._update(state, base, batch)
        metrics["kl"] = kl
        if rl.updates > 1:  # a step of the run is one rollout
            state["step"] = state["step"] - (rl.updates - 1)
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
        ended = time.perf_counter()
        sampled = found.pop("sampled")
        for name in ("kl", "clipped", "ratio", "mismatch", "capped"):
            found[name] = found[name] / sampled if sampled else 0.0
        if self._start is None:
            del found["kl"]  # to nothing
        self.number = step + 1
        if found["mismatch"] > MISMATCH and not self._warned:
            self._warned = True
            self._say(
                f"warning: log-probabilities of step {step + 1} differ by {found['mismatch']:.3f} "
                "on average between writing and training; config.rl.merge_lora=false writes with "
                "the weights that are trained"
            )
        self._notice(kept, about)
        tokens = sum(int(answer.counts) for answer in answers)
        trained = sum(size for row in rows for size in row.size[:1])
        return state, found | about | {
            "groups_kept": kept,
            "rollout_tokens_per_s": tokens / (wrote - began),
            "update_tokens_per_s": trained * rl.updates / (ended - wrote),
            "rollout_s": wrote - began,
            "update_s": ended - wrote,
        }

    def _notice(self, kept: float, about: Mapping[str, float]) -> None:
        """Say it when, for the first time, several steps in a row had no group to learn from."""
        self._nothing_kept = 0 if kept else self._nothing_kept + 1
        if self._nothing_kept == NOTHING_KEPT and not self._said_so:
            self._said_so = True
            self._say(
                f"warning: no group of the last {NOTHING_KEPT} steps was kept, so nothing was "
                f"learned from answers: in step {self.number} the rewards of "
                f"{about['flat_groups']:.0%} of the groups were all alike and {about['cut']:.0%} "
                "of the answers were cut; a larger config.rl.group has more to compare, and a "
                "larger config.rl.max_new_tokens cuts fewer"
            )

    def _rewards(
        self, numbers: np.ndarray, answers: Sequence[Generated]
    ) -> tuple[Rewarded, dict[str, float]]:
        """Rewards of all answers, `[P * G]`, and what is to be said of them."""
        rl, prompts = self._rl, self._data.processor.prompts
        read = [self._generator.read(answer) for answer in answers]
        labels = [prompts.written_labels(answer.text, rl.question) for answer in read]
        complete = np.array([not answer.cut for answer in read])
        framed = np.array([prompts.is_framed(answer.text, rl.question) for answer in read])
        truth = [self._data.truth[i] for i in np.repeat(numbers, rl.group)]
        rewarded = self._reward(Answered(labels, complete, framed), truth)
        lexicon = self._reward.wheels.lexicon
        unknown = [sum(word not in lexicon for word in words) for words in labels]
        groups = rewarded.total.reshape(-1, rl.group)
        log_probs = np.concatenate([answer.log_probs[: answer.counts] for answer in answers])
        return rewarded, {
            "reward": float(rewarded.total.mean()),
            "reward_score": float(rewarded.score.mean()),
            "reward_format": float(rewarded.format.mean()),
            "reward_penalty": float(rewarded.penalty.mean()),
            "reward_std": float(groups.std(axis=1).mean()),
            "flat_groups": float(policy.flat_groups(groups).mean()),
            "labels": float(np.mean([len(words) for words in labels])),
            "unknown_labels": float(np.mean(unknown)),
            "answer_tokens": float(np.mean([answer.counts for answer in answers])),
            "cut": float(1 - complete.mean()),
            # By the sampled tokens: the mean of -log p has the entropy as its expectation.
            "entropy": float(-log_probs.mean()),
        }
