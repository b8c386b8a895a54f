"""The base model's tokenizer plus the five placeholders, through `transformers` (no PyTorch)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from affectgpt_jax.data.prompts import PLACEHOLDER_ORDER

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


class TokenizerError(ValueError):
    """A directory whose tokenizer cannot be used."""


class Tokenizer:
    """Text to ids and back, for a Qwen2-style tokenizer in a local directory.

    Attributes:
        start_id, end_id: `<|im_start|>` and `<|im_end|>`; the latter also pads.
        placeholder_ids: id of each placeholder, by its text.
        base_size: ids below this one are the base model's own.

    Raises:
        TokenizerError: no tokenizer.json, or one without the chat tokens.
    """

    def __init__(self, directory: Path):
        # transformers takes seconds to import; commands that fail earlier should fail at once.
        from transformers import PreTrainedTokenizerFast

        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path}: not found; a base model directory holds tokenizer.json")
        try:
            self._fast = PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:  # the tokenizers library raises bare Exception on bad files
            raise TokenizerError(f"{path}: not a tokenizer: {error}") from None
        vocabulary = self._fast.get_vocab()
        self.base_size = max(vocabulary.values()) + 1
        missing = [token for token in CHAT_TOKENS if token not in vocabulary]
        if missing:
            raise TokenizerError(
                f"{path}: no token {' or '.join(missing)}; expected a Qwen2-style chat tokenizer"
            )
        self._fast.add_tokens(list(PLACEHOLDER_ORDER), special_tokens=True)
        self.start_id, self.end_id = self._fast.convert_tokens_to_ids(list(CHAT_TOKENS))
        self.placeholder_ids = {
            text: self._fast.convert_tokens_to_ids(text) for text in PLACEHOLDER_ORDER
        }

    def __len__(self) -> int:
        return len(self._fast)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 `[T]`, without any added start or end token."""
        if not texts:
            return []
        batch = self._fast(list(texts), add_special_tokens=False, return_attention_mask=False)
        return [np.asarray(ids, np.int32) for ids in batch["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._fast.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def ids_holding(self, text: str) -> np.ndarray:
        """Ids of all tokens whose text holds `text`, int32, sorted: where generation may stop."""
        pieces = self._fast.batch_decode(
            [[i] for i in range(len(self._fast))], clean_up_tokenization_spaces=False
        )
        return np.asarray([i for i, piece in enumerate(pieces) if text in piece], np.int32)
