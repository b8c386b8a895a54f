"""Turn a clip's texts into token ids, and find the positions of its soft tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from affectgpt_jax.data.modalities import MODALITIES
from affectgpt_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """Tokens of `<|im_start|> prompt answer end <|im_end|>`.

    Attributes:
        tokens: `[T]` int32.
        answer_start: index of the first supervised token; all from there on are supervised. Equals
            T for a prompt without an answer.
    """

    tokens: np.ndarray
    answer_start: int

    def __len__(self) -> int:
        return len(self.tokens)


def build_examples(
    tokenizer: Tokenizer, prompts: Sequence[str], answers: Sequence[str] | None
) -> list[Example]:
    """Tokenise prompts, and answers if given, separately, and join their ids.

    Separately, because the prompt's last space would otherwise merge into the answer's first word,
    and a generated answer starts from the prompt's own ids.
    """
    start = np.asarray([tokenizer.start_id], np.int32)
    end = np.asarray([tokenizer.end_id], np.int32)
    heads = [np.concatenate([start, ids]) for ids in tokenizer.encode(prompts)]
    if answers is None:
        return [Example(ids, len(ids)) for ids in heads]
    tails = tokenizer.encode(answers)
    return [
        Example(np.concatenate([head, tail, end]), len(head))
        for head, tail in zip(heads, tails, strict=True)
    ]


def soft_token_index(
    tokens: np.ndarray,
    tokenizer: Tokenizer,
    token_counts: Mapping[str, int],
    slots: Sequence[str],
) -> np.ndarray:
    """The soft token at each position of a row: int32 `[T]`, 0 for none.

    Args:
        tokens: ids of a row, `[T]`; where it holds several prompts about a clip, each may have its
            soft tokens.
        tokenizer: knows the placeholders.
        token_counts: all soft tokens of the model, which are concatenated in this order; entry
            j > 0 of the result names row j - 1 of them.
        slots: those that the row's input mode has.
    """
    index = np.zeros(len(tokens), np.int32)
    first = 1
    for slot, count in token_counts.items():
        if slot in slots:
            at = tokens == tokenizer.placeholder_ids[MODALITIES[slot].placeholder]
            index[at] = np.tile(np.arange(first, first + count), max(1, at.sum() // count))
        first += count
    return index
