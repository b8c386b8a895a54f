"""The base model's tokenizer plus the five placeholders, through `transformers` (no PyTorch)."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.hub import model_name
from affectgpt_jax.common.identity import Identity, json_sha256
from affectgpt_jax.common.json import read_json
from affectgpt_jax.common.text import brief
from affectgpt_jax.data.modalities import placeholders

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# What Qwen2.5's own template, of which this is one turn, says where nobody sets the scene.
SYSTEM_MESSAGE = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


class TokenizerError(UserError, ValueError):
    """A directory whose tokenizer cannot be used."""


def _fast_tokenizer_class() -> type:
    """transformers' tokenizer, imported without its advice to install PyTorch.

    The import takes seconds, and stands here so that commands which fail earlier fail at once.
    """
    said_before = os.environ.get(_NO_ADVICE)
    os.environ.setdefault(_NO_ADVICE, "1")
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        if said_before is None:
            del os.environ[_NO_ADVICE]
    return PreTrainedTokenizerFast


def read_chat_template(directory: Path) -> str | None:
    """The Jinja template of a base's directory; None if it has none.

    Raises:
        TokenizerError: it cannot be read.
    """
    path = directory / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text("utf-8")
        path = directory / "tokenizer_config.json"
        found = read_json(path, dict).get("chat_template") if path.is_file() else None
        if isinstance(found, list):  # several by name, of which one is for everything else
            found = {entry["name"]: entry["template"] for entry in found}["default"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TokenizerError(f"{path}: no chat template can be read: {error}") from None
    if found is not None and not isinstance(found, str):
        raise TokenizerError(f"{path}: chat_template is {type(found).__name__}; expected text")
    return found


# Of a tokenizer.json, what `Tokenizer` sets itself, or does not use.
_NO_MATTER = ("version", "truncation", "padding")


def _canonical(tokenizer: Any) -> Any:
    """A tokenizer.json as one value, however the libraries that saved it write the same.

    Keys stand in any order, and null where there is nothing; merges are pairs, or were text with a
    space between.
    """
    if not isinstance(tokenizer, dict):
        return tokenizer
    found = {k: v for k, v in tokenizer.items() if v is not None and k not in _NO_MATTER}
    model = found.get("model")
    if isinstance(model, dict):
        model = {key: value for key, value in model.items() if value is not None}
        merges = model.get("merges")
        if isinstance(merges, list):
            model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in merges]
        found["model"] = model
    return found


def tokenizer_identities(directory: Path) -> dict[str, Identity]:
    """Which tokenizer and which chat template a base's directory has, by content.

    A tokenizer that was saved again and does the same is the same. A template that cannot be read
    is one of its own: only who asks for a prompt needs it.

    Raises:
        TokenizerError: no tokenizer.json, or one that cannot be read.
    """
    tokenizer = json_sha256(
        _canonical(read_json(directory / "tokenizer.json", error=TokenizerError))
    )
    try:
        template = read_chat_template(directory)
    except TokenizerError as error:
        template = str(error).removeprefix(str(directory))
    return {
        "tokenizer": Identity(model_name(directory), tokenizer),
        "chat template": Identity(model_name(directory), json_sha256(template)),
    }


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
        self._directory = Path(directory)
        path = self._directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path}: not found; a base model directory holds tokenizer.json")
        try:
            self._fast = _fast_tokenizer_class()(tokenizer_file=str(path))
        except Exception as error:  # the tokenizers library raises bare Exception on bad files
            raise TokenizerError(f"{path}: not a tokenizer: {brief(error)}") from None
        vocabulary = self._fast.get_vocab()
        missing = [token for token in CHAT_TOKENS if token not in vocabulary]
        if missing:
            raise TokenizerError(
                f"{path}: no token {' or '.join(missing)}; expected a Qwen2-style chat tokenizer"
            )
        self.base_size = max(vocabulary.values()) + 1
        self._fast.add_tokens(list(placeholders()), special_tokens=True)
        self.start_id, self.end_id = self._fast.convert_tokens_to_ids(list(CHAT_TOKENS))
        self.placeholder_ids = {
            text: self._fast.convert_tokens_to_ids(text) for text in placeholders()
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

    def ids_of_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Ids of whole tokens, those that it does not have left out."""
        vocabulary = self._fast.get_vocab()
        return [vocabulary[token] for token in tokens if token in vocabulary]

    def chat_prompt(self, message: str) -> str:
        """A message in the chat format of the base, up to the start of the reply.

        By the template of the base's directory (`chat_template.jinja`, or `chat_template` in
        `tokenizer_config.json`) if there is one, else as Qwen2.5 has it. Marks of turns and soft
        tokens inside the message would be taken for real ones; a space takes that from them.

        Raises:
            TokenizerError: a template that cannot be read or rendered.
        """
        for mark in self._fast.get_added_vocab():
            message = message.replace(mark, f"{mark[0]} {mark[1:]}")
        if self._chat_template is None:
            turns = [("system", SYSTEM_MESSAGE), ("user", message)]
            rendered = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns]
            return "".join([*rendered, "<|im_start|>assistant\n"])
        try:
            return self._fast.apply_chat_template(
                [{"role": "user", "content": message}],
                chat_template=self._chat_template,
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,  # Qwen3 reads this; other templates do not
            )
        except Exception as error:  # a template is a program, and may fail in any way
            reason = brief(str(error) or type(error).__name__)
            raise TokenizerError(f"{self._directory}: its chat template fails: {reason}") from None

    @functools.cached_property
    def _chat_template(self) -> str | None:
        return read_chat_template(self._directory)
