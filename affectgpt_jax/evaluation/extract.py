"""Extract emotion labels from descriptions: messages to a language model, and readers of replies.

A description ("He frowns, so he may be worried ...") is scored by the emotions that it names. Who
finds them is an `Extractor`: the rules of `evaluation.rules`, or a `ChatExtractor`, which asks a
language model, be it behind `evaluation.chat_server` or the very one that wrote the description.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import ResumableJsonl
from affectgpt_jax.common.labels import labels_of_object, read_labels, split_labels
from affectgpt_jax.evaluation.lexicon import normalise
from affectgpt_jax.evaluation.metrics import SENTIMENTS

# Verbatim from appendix E of the AffectGPT paper (arXiv 2501.16566).
LABEL_PROMPT = (
    "Please assume the role of an expert in the field of emotions. We provide clues that may be "
    "related to the emotions of the characters. Based on the provided clues, please identify the "
    "emotional states of the main character. Please separate different emotional categories with "
    "commas and output only the clearly identifiable emotional categories in a list format. If "
    "none are identified, please output an empty list."
)
SENTIMENT_PROMPT = (
    "Please act as an expert in the field of emotions. We provide a few words to describe the "
    "emotions of a character. Please choose the most likely sentiment from the given candidates: "
    "[positive, negative, neutral]."
)
# Refusals before any reply after which a server is taken to refuse everything.
REFUSALS = 3
# Words of the longest item that is read as an emotion ("ill at ease"); longer ones are prose.
LONGEST_LABEL = 4


class ChatError(UserError, RuntimeError):
    """A model or server that gives no reply: one sentence that says what it did instead."""


@dataclasses.dataclass(frozen=True)
class NoWords:
    """A reply that has no words, as of a model that thinks until its limit.

    Attributes:
        finish_reason: why the model stopped, as servers call it; "" where it is not known.
        refusal: why a server refused the message, of which there is no reply at all.
    """

    finish_reason: str = ""
    refusal: str = ""

    def __str__(self) -> str:
        if self.refusal:
            return f"that the server refuses to read ({self.refusal})"
        advice = {
            "length": "; the model thought up to the limit: turn its thinking off, or raise the "
            "limit on its tokens",
            "content_filter": "; the server's filter took them",
        }
        reason = f" (finish_reason {self.finish_reason})" if self.finish_reason else ""
        return f"whose reply had no words{reason}{advice.get(self.finish_reason, '')}"


class Extractor(Protocol):
    """Turns descriptions into labels.

    Attributes:
        identity: for reports: what it is, and all that its results depend on.
        unparsed: a reply by each text (or label list, as text) of which it could make nothing, or
            `NoWords`.
    """

    identity: str
    unparsed: dict[str, str | NoWords]

    def labels(self, texts: Sequence[str]) -> list[list[str]]:
        """The emotions that each text names, in lower case, in order, without repeats."""
        ...

    def sentiments(self, label_lists: Sequence[Sequence[str]]) -> list[str]:
        """One of `SENTIMENTS` for each label list."""
        ...


class Chat(Protocol):
    """A language model that answers one message at a time.

    Attributes:
        identity: of the model and of all settings that its replies depend on.
    """

    identity: str

    def answer(self, messages: Sequence[str]) -> Iterator[tuple[int, str | NoWords]]:
        """Yield the number and the reply of each message, in the order in which they come.

        Raises:
            ChatError: there is no reply, and others will get none either.
        """
        ...


def label_message(text: str) -> str:
    """The message about a description; how the text is appended is ours, the paper does not say."""
    return f"{LABEL_PROMPT}\nClues: {text.strip()}"


def sentiment_message(labels: Sequence[str]) -> str:
    """The message about a label list."""
    return f"{SENTIMENT_PROMPT}\nWords: [{', '.join(labels)}]"


class _Reply(TypedDict):
    """A line of a `ReplyCache`: what a reply depends on, as a hash, and the reply."""

    key: str
    reply: str


class ReplyCache:
    """Replies by what they depend on, in a file that grows as they come.

    A line of the file is a `_Reply`. One that a killed run left unfinished is asked again.

    Args:
        path: the file; it and its folder are made with the first reply.

    Raises:
        ReadError: a file that cannot be read, or other lines in it.
    """

    def __init__(self, path: Path):
        self._file = ResumableJsonl(
            path, _Reply, ("key",), advice="delete the file, and all is asked again"
        )

    def get(self, identity: str, message: str) -> str | None:
        """The reply of a model to a message; None if it has not been asked."""
        found = self._file.records.get((json_sha256([identity, message]),))
        return found and found["reply"]

    def put(self, identity: str, message: str, reply: str) -> None:
        """Remember a reply, on disk when this returns."""
        self._file.append({"key": json_sha256([identity, message]), "reply": reply})

    def writing(self) -> contextlib.AbstractContextManager[Any]:
        """Around asking: the file can be written, and by nobody else.

        Raises:
            FileInUse, ReadError: another process writes it, or has written it.
            OSError: it cannot be written.
        """
        return self._file


class ChatExtractor:
    """Asks a language model, each distinct message once.

    Args:
        chat: the model.
        cache: what it has said before.
        in_prose: finds labels in a reply that is neither a list nor a refusal, but sentences.
        progress: called with the replies there are and the number there will be.
    """

    def __init__(
        self,
        chat: Chat,
        cache: ReplyCache,
        in_prose: Callable[[str], list[str]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.identity, self.unparsed = chat.identity, {}
        self._chat, self._cache, self._in_prose = chat, cache, in_prose
        self._progress, self._answered = progress, False

    def labels(self, texts: Sequence[str]) -> list[list[str]]:
        """As `Extractor` says; an empty text has no labels, and one whose reply cannot be read is
        kept in `unparsed` and has none either."""
        asked = [text if text.strip() else None for text in texts]
        replies = self._ask([text and label_message(text) for text in asked])
        return [
            [] if reply is None else self._read_labels(text, reply)
            for text, reply in zip(texts, replies, strict=True)
        ]

    def _read_labels(self, text: str, reply: str | NoWords) -> list[str]:
        if isinstance(reply, NoWords):
            self.unparsed[text] = reply
            return []
        labels = read_label_reply(reply)
        if labels is None:
            reply = spoken(reply)
            labels = self._in_prose(reply)
            if not labels and not is_refusal(reply):
                self.unparsed[text] = reply
        return labels

    def sentiments(self, label_lists: Sequence[Sequence[str]]) -> list[str]:
        """As `Extractor` says; without labels, and where the reply cannot be read, it is neutral,
        the latter kept in `unparsed`."""
        replies = self._ask([sentiment_message(ls) if ls else None for ls in label_lists])
        found = []
        for labels, reply in zip(label_lists, replies, strict=True):
            known = isinstance(reply, str)
            word = read_sentiment_reply(reply) if known else None if reply else "neutral"
            if word is None:
                self.unparsed[", ".join(labels)] = reply
            found.append(word or "neutral")
        return found

    def _ask(self, messages: Sequence[str | None]) -> list[str | NoWords | None]:
        """The reply to each message, None to None.

        One without words is not kept: the next run, with other settings of the server, asks again.

        Raises:
            ChatError: no reply; or all messages are refused, and none was answered before.
        """
        wanted = list(dict.fromkeys(m for m in messages if m is not None))
        replies = {m: self._cache.get(self.identity, m) for m in wanted}
        missing = [m for m in wanted if replies[m] is None]
        done = len(wanted) - len(missing)
        answered, refused = self._answered or done > 0, []
        if missing:
            self._progress(done, len(wanted))
            with self._cache.writing():
                for number, reply in self._chat.answer(missing):
                    if isinstance(reply, str) and not spoken(reply):
                        cut = "<think>" in reply and "</think>" not in reply
                        reply = NoWords("length" if cut else "")
                    if isinstance(reply, str):
                        self._cache.put(self.identity, missing[number], reply)
                    if isinstance(reply, NoWords) and reply.refusal:
                        refused.append(reply.refusal)
                    else:
                        answered = True
                    if not answered and len(refused) >= min(REFUSALS, len(missing)):
                        raise ChatError(refused[0])
                    replies[missing[number]] = reply
                    done += 1
                    self._progress(done, len(wanted))
        self._answered = answered
        return [None if m is None else replies[m] for m in messages]


# What stands before the items of a list: "-", "*", "1.", "(2)", "a)".
_BULLET = re.compile(r"\s*(?:[-*\u2022\u2013\u2014\u00b7]\s+|\(?(?:\d{1,2}|[a-z])[.)]\s+)")
_FENCE = re.compile(r"```\w*")
_AROUND = " \t\r\n.,;:!'\"`*_[](){}\u201c\u201d\u2018\u2019"
_REFUSAL = re.compile(
    r"\b(?:no|not any|none of the|cannot|can't|could not|unable to|impossible to|not possible to)\b"
    r"(?:\W+\w+){0,6}?\W+(?:emotion\w*|emotional|identif\w*|identified|determine\w*|recogni\w+)\b"
)
_NOTHING = {
    "",
    "none",
    "null",
    "nil",
    "n/a",
    "na",
    "empty",
    "empty list",
    "an empty list",
    "nothing",
}


def read_label_reply(reply: str) -> list[str] | None:
    """The labels of a reply to `LABEL_PROMPT`; what a model thinks is no part (`spoken`).

    Read are an object of JSON, else a bracketed list anywhere in the reply (the first one), else
    bullets or numbers, one item a line, with explanations after a colon or dash left out, else
    words between commas, after a colon if there is one. `common.labels` says in which forms.

    Returns:
        Lower-case labels, in order, without repeats, or without any where the reply says so in a
        word; None for a reply in prose, or without words.
    """
    text = _FENCE.sub("", spoken(reply)).strip()
    if not text:
        return None
    if (found := labels_of_object(text)) is not None:
        return _tidy(found)
    if match := re.search(r"[\[\uff3b\u3010]([^][\uff3b\uff3d\u3010\u3011]*)[]\uff3d\u3011]", text):
        return _tidy(read_labels(f"[{match[1]}]"))
    lines = [line for line in text.splitlines() if line.strip()]
    if bullets := [_BULLET.sub("", line, count=1) for line in lines if _BULLET.match(line)]:
        items = [re.split(r":|\s[-\u2013\u2014]\s|\s\(", item, maxsplit=1)[0] for item in bullets]
        return _if_short(items)
    if text.strip(_AROUND).lower() in _NOTHING:
        return []
    found = _if_short(_split(text))
    if found is None and ":" in text:
        found = _if_short(_split(text.rsplit(":", 1)[1]))
    return found


def is_refusal(text: str) -> bool:
    """Whether a text says somewhere that no emotion can be identified."""
    return bool(_REFUSAL.search(text.lower()))


def read_sentiment_reply(reply: str) -> str | None:
    """The one of `SENTIMENTS` that a reply to `SENTIMENT_PROMPT` names; None for none or several.

    A reply that repeats the candidates and then chooses is read by what follows the last colon,
    or by its last line.
    """
    text = spoken(reply).lower()
    lines = [line for line in text.splitlines() if line.strip()]
    for part in (text, text.rsplit(":", 1)[-1], lines[-1] if lines else ""):
        named = {word for word in SENTIMENTS if re.search(rf"\b{word}\b", part)}
        if len(named) == 1:
            return named.pop()
    return None


def spoken(reply: str) -> str:
    """A reply without what the model thinks; empty where it has not thought to an end."""
    text = reply.rsplit("</think>", 1)[-1]
    return text.partition("<think>")[0].strip()


def _split(text: str) -> list[str]:
    return [item for part in split_labels(text) for item in re.split(r"\band\b", part)]


def _if_short(items: Sequence[str]) -> list[str] | None:
    """The items as labels, if each is as short as one."""
    if any(len(item.split()) > LONGEST_LABEL or re.search(r"[.!?]\s", item) for item in items):
        return None
    return _tidy(items)


def _tidy(items: Sequence[str]) -> list[str]:
    labels = (normalise(item).strip(_AROUND) for item in items)
    labels = (label.removeprefix("and ").strip() for label in labels)
    labels = (x for x in labels if x not in _NOTHING and not _REFUSAL.search(x))
    return list(dict.fromkeys(labels))
