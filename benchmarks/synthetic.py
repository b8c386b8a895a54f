"""Records whose texts have given numbers of tokens, under whatever tokenizer the base has.

Lengths are what makes a workload; the words are drawn from those that are one token each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from affectgpt_jax.data.pipeline import PromptProcessor
from affectgpt_jax.data.records import MANIFEST_FILE, Annotations, Record, write_records
from affectgpt_jax.data.tokenizer import Tokenizer

VOCABULARY = 64  # words that texts are made of
END_TOKENS = 2  # what the published recipe closes an answer with: a mark, and the end of the turn
FRAMES = 8  # of every feature

# Points of an inverse distribution function: (share of texts, tokens), linear in between.
Quantiles = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of a clip's texts.

    Attributes:
        prompt: of the prompt without a subtitle.
        subtitle: added to the prompt by the subtitle.
        labels, description: of the two kinds of answers, without what closes them.
    """

    prompt: int
    subtitle: Quantiles
    labels: Quantiles
    description: Quantiles


# Label answers: 4,876 released predictions, mean 13. Descriptions: 332 written by people, mean 259.
# The lowest points are not published; they are set so that the means come out.
AFFECTGPT = Lengths(
    prompt=98,
    subtitle=((0, 5), (1, 40)),
    labels=((0, 6), (0.5, 12), (0.99, 22), (1, 28)),
    description=((0, 68), (0.1, 172), (0.5, 262), (0.9, 340), (0.99, 431), (1, 595)),
)
# Every row has 256 tokens, of which 128 are supervised.
EQUAL = Lengths(98, ((0, 30), (1, 30)), ((0, 126), (1, 126)), ((0, 126), (1, 126)))


def draw(quantiles: Quantiles, share: float) -> int:
    """The number of tokens at a share of a distribution."""
    shares, tokens = zip(*quantiles, strict=True)
    return round(float(np.interp(share, shares, tokens)))


class Texts:
    """Writes texts of given numbers of tokens.

    Args:
        processor: tokenizer, prompts and input mode.

    Raises:
        ValueError: a tokenizer without enough words of one token each.
    """

    def __init__(self, processor: PromptProcessor):
        self._processor = processor
        self._words = words_of_one_token(processor.tokenizer, VOCABULARY)
        self._prompt_overhead = self._overhead(lambda n: self._prompt(self._plain(n)))
        self._description_overhead = self._overhead(
            lambda n: self._answer("description", description=self._plain(n))
        )
        self._labels_overhead = self._answer("ovlabel", labels=(self._words[0],)) - 1

    def subtitle(self, rng: np.random.Generator, prompt: int) -> str:
        """One with which the prompt of a description takes this many tokens."""
        return self._text(rng, prompt - self._prompt_overhead)

    def description(self, rng: np.random.Generator, answer: int) -> str:
        """One whose answer takes this many tokens, what closes it included."""
        return self._text(rng, answer - self._description_overhead)

    def labels(self, rng: np.random.Generator, answer: int) -> tuple[str, ...]:
        """Labels of a word each, the last of two where the number asks for it; as `description`.

        A label more is two tokens more, since a comma goes before it.
        """
        tokens = max(1, answer - self._labels_overhead)
        words = self._draw(rng, tokens // 2 + 1)
        return (*words[:-2], " ".join(words[-2:])) if tokens % 2 == 0 else tuple(words)

    def _text(self, rng: np.random.Generator, words: int) -> str:
        return " ".join(self._draw(rng, max(1, words)))

    def _draw(self, rng: np.random.Generator, count: int) -> list[str]:
        # The first word stands behind no space, where it may be several tokens: always the same.
        chosen = rng.integers(len(self._words), size=count - 1)
        return [self._words[0], *(self._words[i] for i in chosen)]

    def _plain(self, count: int) -> str:
        return " ".join([self._words[0]] * count)

    def _overhead(self, tokens: Callable[[int], int]) -> int:
        """Tokens beside those of the words, one each."""
        overheads = {tokens(n) - n for n in (1, 2, 9)}
        if len(overheads) > 1:
            raise ValueError(f"words of one token each take {sorted(overheads)} more in a text")
        return overheads.pop()

    def _prompt(self, subtitle: str) -> int:
        clip, processor = Annotations(name="clip", subtitle=subtitle), self._processor
        text = processor.prompts.prompt(processor.mode, processor.token_counts, clip, "description")
        return 1 + len(processor.tokenizer.encode([text])[0])

    def _answer(self, kind: str, **texts: object) -> int:
        text = self._processor.prompts.answer(kind, Annotations(name="clip", **texts))
        return len(self._processor.tokenizer.encode([text])[0]) + 1


def words_of_one_token(tokenizer: Tokenizer, count: int) -> list[str]:
    """Words of letters that are one token behind a space, in the order of their ids.

    Raises:
        ValueError: there are fewer.
    """
    words = []
    for i in range(tokenizer.base_size):
        piece = tokenizer.decode([i])
        word = piece[1:]
        if piece[:1] == " " and len(word) > 1 and word.isascii() and word.isalpha():
            words.append(word)
        if len(words) == count:
            return words
    raise ValueError(f"the tokenizer has {len(words)} words of one token; expected {count}")


def records(
    count: int, lengths: Lengths, processor: PromptProcessor, seed: int
) -> Iterator[Record]:
    """Clips with random features in the shapes that the processor's model reads."""
    rng, texts = np.random.default_rng(seed), Texts(processor)
    for number in range(count):
        prompt, labels, description = (
            draw(quantiles, rng.random())
            for quantiles in (lengths.subtitle, lengths.labels, lengths.description)
        )
        yield Record(
            name=f"synthetic-{number:06}",
            subtitle=texts.subtitle(rng, lengths.prompt + prompt),
            labels=texts.labels(rng, labels + END_TOKENS),
            description=texts.description(rng, description + END_TOKENS),
            features={
                name: rng.standard_normal((FRAMES, width), np.float32).astype(np.float16)
                for name, width in processor.features.items()
            },
        )


def write(
    directory: Path, count: int, lengths: Lengths, processor: PromptProcessor, seed: int = 0
) -> None:
    """Write a record directory, unless it is there already."""
    if not (directory / MANIFEST_FILE).exists():
        encoders = dict.fromkeys(processor.features, "random numbers")
        write_records(directory, records(count, lengths, processor, seed), encoders=encoders)
