"""The frozen base as the chat model that it was before: the decoder without its adapters.

It extracts labels (`evaluation.extract`) with the weights that are loaded anyway.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from affectgpt_jax.common.identity import Identity
from affectgpt_jax.data.pipeline import choose_lengths
from affectgpt_jax.data.tokenizer import Tokenizer
from affectgpt_jax.evaluation.chat_server import ChatRefusal, Message, Reply, words_of
from affectgpt_jax.evaluation.extract import NoWords
from affectgpt_jax.models.affectgpt import AffectGPT
from affectgpt_jax.models.decoder import Decoder
from affectgpt_jax.models.generate import Decoding, Prompts, generate_all, rows_and_prefill_batch
from affectgpt_jax.training.sharding import data_parallel_size, shard_whole_batch

# Tokens that end a reply; Qwen2.5's generation_config.json names these two.
STOPS = ("<|im_end|>", "<|endoftext|>")


class BaseChat:
    """Greedy replies of the base, in a few compiled programs for each prompt length.

    Args:
        decoder: the decoder that was trained; its adapters are left out here.
        base: frozen weights.
        identity: of these.
        tokenizer: of the base.
        mesh: batches are split over it.
        batch_size: messages at a time.
        max_new_tokens: a reply is cut off there.
        num_buckets: the number of prompt lengths, each of which costs compilation.
    """

    def __init__(
        self,
        decoder: Decoder,
        base: Any,
        identity: Identity,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        batch_size: int,
        max_new_tokens: int = 512,
        num_buckets: int = 4,
    ):
        # Without the collection `lora` and the modules that read it, a decoder is the plain base.
        self._model = AffectGPT(Decoder(decoder.config, None, decoder.compute), None)
        self._base, self._tokenizer, self._mesh = base, tokenizer, mesh
        self._batch_size, self._num_buckets = batch_size, num_buckets
        stops = tuple(sorted(tokenizer.ids_of_tokens(STOPS)))
        self._decoding = Decoding(max_new_tokens, stops, tokenizer.end_id)
        dtype = np.dtype(decoder.compute.dtype).name
        template = hashlib.sha256(tokenizer.chat_prompt("").encode()).hexdigest()
        self.identity = (
            f"{identity.name} (sha256 {identity.sha256[:12]}, chat template {template[:12]}), "
            f"{dtype}, greedy, {max_new_tokens} tokens"
        )

    def answer(self, messages: Sequence[str]) -> Iterator[tuple[int, str | NoWords]]:
        """Yield the number and the reply of each message, a few at a time as they are complete.

        Raises:
            TokenizerError: the base's chat template cannot be used.
        """
        return words_of(self.replies(messages))

    def replies(self, messages: Sequence[Message]) -> Iterator[tuple[int, Reply | ChatRefusal]]:
        """As `answer`, with how each reply ended, as `ChatServer.replies`; messages are text.

        Raises:
            TokenizerError: as `answer`.
        """
        texts: dict[int, str] = {}
        for number, message in enumerate(messages):
            try:
                texts[number] = message() if callable(message) else message
            except ChatRefusal as refusal:
                yield number, refusal
        if texts:
            numbers = list(texts)
            for place, reply in self._generate(list(texts.values())):
                yield numbers[place], reply

    def _generate(self, messages: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        prompts = self._tokenizer.encode([self._tokenizer.chat_prompt(m) for m in messages])
        nothing = {"lora": {}, "fusion": {}}
        # No more rows than messages: empty ones cost as much as others.
        wanted = min(self._batch_size, len(messages))
        size, prefill_batch = rows_and_prefill_batch(wanted, data_parallel_size(self._mesh))
        asked = self._prompts(prompts, prefill_batch)
        found = generate_all(self._model, self._base, nothing, asked, self._decoding, size)
        for number, generated in found:
            count = int(generated.counts)
            text = self._tokenizer.decode(generated.tokens[:count]).strip()
            finish = "stop" if generated.ended else "length"
            yield number, Reply(text, finish, len(prompts[number]) + count)

    def _prompts(self, prompts: Sequence[np.ndarray], size: int) -> Iterator[Prompts]:
        """All of them, `size` at a time, in rows of a few lengths, the longest ones first."""
        lengths = np.array([len(ids) for ids in prompts])
        ends = choose_lengths(lengths, self._num_buckets)
        which = np.searchsorted(ends, lengths)
        for bucket in reversed(range(len(ends))):
            members = np.flatnonzero(which == bucket)
            for first in range(0, len(members), size):
                numbers = members[first : first + size]
                batch = self._batch([prompts[n] for n in numbers], size, ends[bucket])
                yield Prompts(numbers, shard_whole_batch(self._mesh, batch))

    def _batch(self, prompts: Sequence[np.ndarray], size: int, length: int) -> dict[str, Any]:
        """Right-padded rows, empty ones after the last prompt; what `models.generate` reads."""
        shape = (size, length)
        batch: dict[str, Any] = {
            "tokens": np.full(shape, self._tokenizer.end_id, np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
            "segment_ids": np.zeros(shape, np.int32),
            "soft_token_index": np.zeros(shape, np.int32),
            "features": {},
            "present": {},
        }
        for row, ids in enumerate(prompts):
            batch["tokens"][row, : len(ids)] = ids
            batch["segment_ids"][row, : len(ids)] = 1
        return batch
