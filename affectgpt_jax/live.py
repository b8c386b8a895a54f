"""Answers to questions that come at any time, and share a batch: what a server needs of inference.

The model runs on one thread, `Engine`, which has a queue. Between any two steps of the decoder a
question may join those that are being answered, or leave them.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.data.examples import Example
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.data.pipeline import DataError, collate
from affectgpt_jax.data.records import Record
from affectgpt_jax.inference import Answer, Generator
from affectgpt_jax.models.generate import (
    LiveRows,
    Prompts,
    identities,
    rows_and_prefill_batch,
)
from affectgpt_jax.training.sharding import data_parallel_size, shard_whole_batch

# Tokens between two looks at the queue, after which the host waits for the device. What a reader
# sees comes in pieces of so many.
STEPS = 4


class Busy(UserError, RuntimeError):
    """More questions than a queue takes."""


class Stopped(UserError, RuntimeError):
    """A question that is not answered, since the server ends."""


class OutOfTime(UserError, RuntimeError):
    """An answer that was not complete in time."""


class Failed(UserError, RuntimeError):
    """An answer that an error of the model has ended, which the engine has printed."""


class _Clips(list):
    """Clips in memory, as far as prompts and batches read data sets."""

    @property
    def index(self) -> _Clips:
        return self


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question about a clip that is ready to be asked.

    Attributes:
        record: the clip.
        question: a label type, or the text of any question.
        example: both as tokens.
        max_new_tokens: that the answer may have.
        seed: of sampling. What is drawn depends on it, the clip's name and the question.
    """

    record: Record
    question: str
    example: Example
    max_new_tokens: int
    seed: int


class LiveAnswers:
    """Answers of a model in rows that prompts join at any time.

    For one thread, but for `prompt`, which may be called from one other. All programs are compiled
    by `warm_up`, none afterwards.

    Attributes:
        rows: answers at a time.
        lengths: that prompts are padded to, ascending.

    Args:
        generator: makes single answers; of it come model, sampling and limits.
        trainable: adapters and fusion.
        rows: answers at a time, or a few more.
        lengths: of prompts, each of which costs compilation; the last is the limit.
        shapes: `(frames, width)` of every feature that the model reads.
    """

    def __init__(
        self,
        generator: Generator,
        trainable: Any,
        *,
        rows: int,
        lengths: Collection[int],
        shapes: Mapping[str, tuple[int, int]],
    ) -> None:
        self._generator, self._shapes = generator, shapes
        self.lengths = tuple(sorted(lengths))
        self.rows, self._together = rows_and_prefill_batch(rows, data_parallel_size(generator.mesh))
        self._weights = generator.weights(trainable)
        self.reset()

    def reset(self) -> None:
        """Forget all answers, as after an error in the middle of a step."""
        generator = self._generator
        self._rows = LiveRows(generator.model, *self._weights, generator.decoding, self.rows)

    @property
    def free(self) -> int:
        """The number of prompts that `put` takes now."""
        return min(self._rows.free, self._together)

    @property
    def steps(self) -> int:
        """Steps of the decoder, see `LiveRows`."""
        return self._rows.steps

    @property
    def max_new_tokens(self) -> int:
        """Limit of an answer."""
        return self._generator.decoding.max_new_tokens

    def prompt(
        self, record: Record, question: str, max_new_tokens: int | None = None, seed: int = 0
    ) -> Prompt:
        """A question about a clip, checked.

        Args:
            record: the clip.
            question: a label type, or the text of any question.
            max_new_tokens: that the answer may have; None is `max_new_tokens` of all.
            seed: of sampling.

        Raises:
            DataError: the clip has not what the question needs, the prompt is too long, or features
                have other shapes than those of the run.
        """
        [example] = self._generator.processor.prompt_examples(_Clips([record]), question)
        if len(example) > self.lengths[-1]:
            raise DataError(
                f"the prompt about {record.name!r} has {len(example)} tokens, over the limit of "
                f"{self.lengths[-1]}; shorten the question or the subtitle"
            )
        for name, shape in self._shapes.items():
            found = record.features.get(name)
            if found is not None and found.shape != shape:
                raise DataError(
                    f"{record.name!r} has the feature {name} in the shape {list(found.shape)}; "
                    f"this run reads {list(shape)}"
                )
        limit = min(max_new_tokens or self.max_new_tokens, self.max_new_tokens)
        return Prompt(record, question, example, limit, seed)

    def warm_up(self) -> None:
        """Compile all programs."""
        # The first rows are laid out otherwise than those that a program returns.
        for length in (self.lengths[-1], *reversed(self.lengths)):
            self._rows.put(self._prompts((), (), length))
        for _ in range(2):
            self._rows.write(STEPS)
            self._rows.drop(())

    def put(self, numbers: Sequence[int], prompts: Sequence[Prompt]) -> None:
        """Begin answers to at most `free` prompts of one seed; they are known by their numbers."""
        needed = max(len(prompt.example) for prompt in prompts)
        length = next(length for length in self.lengths if length >= needed)
        if self._rows.is_new:  # after an error; the programs are those of `warm_up`
            self._rows.put(self._prompts((), (), self.lengths[-1]))
        self._rows.put(self._prompts(numbers, prompts, length), prompts[0].seed)

    def drop(self, numbers: Sequence[int]) -> None:
        """Write no more of some answers, and free their rows."""
        self._rows.drop(numbers)

    def write(self) -> list[tuple[int, Answer, bool]]:
        """Write up to `STEPS` tokens more to every answer.

        Returns:
            Of every answer its number, what of it will not change, and whether it is complete.
        """
        read = (self._generator.read_unfinished, self._generator.read)
        found = self._rows.write(STEPS)
        return [(number, read[complete](row), complete) for number, row, complete in found]

    def _prompts(self, numbers: Sequence[int], prompts: Sequence[Prompt], length: int) -> Prompts:
        processor, filler = self._generator.processor, self._together - len(prompts)
        clips = _Clips(prompt.record for prompt in prompts)
        rows = [[(clips, processor, i, prompt.example)] for i, prompt in enumerate(prompts)]
        batch = collate([*rows, *[[]] * filler], processor, self._shapes, Bucket(length, 0))
        # As `Generator` names them, whose samples these are.
        names = [f"{prompt.record.name}\n{prompt.question}" for prompt in prompts]
        limits = np.array([prompt.max_new_tokens for prompt in prompts] + [0] * filler, np.int32)
        placed = (batch, identities(names + [""] * filler), limits)
        return Prompts(np.asarray(numbers, int), *shard_whole_batch(self._generator.mesh, placed))


@dataclasses.dataclass(frozen=True)
class Update:
    """What is new about an answer: the answer so far, and whether it is complete."""

    answer: Answer
    complete: bool


# Called on the thread of the model with every update, or with what ended the answer.
Tell = Callable[[Update | Exception], None]


@dataclasses.dataclass(eq=False)
class Ticket:
    """An answer that somebody waits for.

    Attributes:
        prompt: what was asked.
        tell: hears of the answer, and last of all that it is complete, or an error.
        deadline: of `time.monotonic`.
        dropped: whether nobody waits any more; `Engine.drop` sets it.
    """

    prompt: Prompt
    tell: Tell
    deadline: float
    dropped: bool = False

    @property
    def is_over(self) -> bool:
        """Whether it must not be answered any longer."""
        return self.dropped or time.monotonic() > self.deadline


class Engine:
    """The thread that runs the model, and its queue.

    Args:
        live: what writes the answers; no other thread may use it from now on, but for `prompt`.
        queue: questions that may wait for a row.
        timeout_s: that an answer may take, the wait included.
    """

    def __init__(self, live: LiveAnswers, *, queue: int, timeout_s: float) -> None:
        self.live, self._limit, self._timeout_s = live, queue, timeout_s
        self._waiting: deque[Ticket] = deque()
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, prompt: Prompt, tell: Tell, left_s: float = math.inf) -> Ticket:
        """Ask a question.

        Args:
            prompt: the question.
            tell: hears of the answer.
            left_s: of the time that the answer may take, what is left by now.

        Raises:
            Busy: too many wait.
            Stopped: the engine ends.
        """
        ticket = Ticket(prompt, tell, time.monotonic() + min(left_s, self._timeout_s))
        with self._changed:
            if self._stopping:
                raise _stopped()
            if len(self._waiting) >= self._limit:
                raise Busy(f"{self._limit} questions wait already, which is the limit; ask later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Nobody waits for this answer any more; its `tell` may be called once more."""
        ticket.dropped = True

    def stop(self) -> None:
        """End all answers, whose `tell` hears `Stopped`, and wait for the thread."""
        self.begin_stop()
        self._thread.join()

    def begin_stop(self) -> None:
        """The same without waiting."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def _work(self) -> None:
        active: dict[int, Ticket] = {}
        number = 0
        while self._wait(active):
            try:
                self._leave(active)
                joining = self._joining()
                if joining:
                    active |= enumerate(joining, start=number)
                    numbers = range(number, number := number + len(joining))
                    self.live.put(numbers, [ticket.prompt for ticket in joining])
                for key, answer, complete in self.live.write() if active else ():
                    active[key].tell(Update(answer, complete))
                    if complete:
                        del active[key]
            except Exception:  # whatever it is, the server goes on with what comes next
                traceback.print_exc(file=sys.stderr)
                why = "the model failed in this answer; the server has printed why"
                self._end(active.values(), Failed(why))
                active.clear()
                self.live.reset()
        self._end([*active.values(), *self._waiting], _stopped())

    def _wait(self, active: Mapping[int, Ticket]) -> bool:
        """Wait for work; whether there is any to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or active)
            return not self._stopping

    def _leave(self, active: dict[int, Ticket]) -> None:
        """Free the rows of answers that are over before they are complete."""
        if over := [key for key, ticket in active.items() if ticket.is_over]:
            self.live.drop(over)
            self._end([active.pop(key) for key in over], self._out_of_time())

    def _joining(self) -> list[Ticket]:
        """What leaves the queue for a row, of one seed."""
        joining: list[Ticket] = []
        with self._changed:
            over = [ticket for ticket in self._waiting if ticket.is_over]
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in over)
            while self._waiting and len(joining) < self.live.free:
                seeds = {ticket.prompt.seed for ticket in (*joining, self._waiting[0])}
                if len(seeds) > 1:
                    break
                joining.append(self._waiting.popleft())
        self._end(over, self._out_of_time())
        return joining

    def _out_of_time(self) -> OutOfTime:
        return OutOfTime(
            f"the answer was not complete after {self._timeout_s:g} s, which is the limit"
        )

    @staticmethod
    def _end(tickets: Iterable[Ticket], error: Exception) -> None:
        for ticket in tickets:
            if not ticket.dropped:
                ticket.tell(error)


def _stopped() -> Stopped:
    return Stopped("the server is ending; ask it again when it is back")
