"""Emotions and sentiment of each description, as `labels.csv`."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from affectgpt_jax.common.files import sha256_of
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.common.tables import write_csv
from affectgpt_jax.evaluation.extract import (
    LABEL_PROMPT,
    SENTIMENT_PROMPT,
    ChatExtractor,
    Extractor,
)

from .describe import read_described
from .settings import DESCRIPTIONS, LABELS, CaptionError

ABOUT = "labels.json"
COLUMNS = ("name", "labels", "sentiment", "unparsed", "description_sha256")


class About(TypedDict):
    """`labels.json`: who found the labels, by which prompts ("" for rules), and of which file."""

    extractor: str
    prompts_sha256: str
    labels_sha256: str


def description_sha256(text: str) -> str:
    """By which a row of `labels.csv` tells the description that it is of."""
    return json_sha256(text)


def read_about(out: Path) -> About | None:
    """Who found the labels; None where that is not known, as of a `labels.csv` from elsewhere.

    Raises:
        ReadError: a file that cannot be read.
    """
    if not (out / ABOUT).exists():
        return None
    about = read_json(out / ABOUT, About, advice="run `affectgpt caption labels` again")
    return about if about["labels_sha256"] == sha256_of(out / LABELS) else None


def label_descriptions(out: Path, extractor: Extractor) -> list[str]:
    """Find the emotions that each description names, and their sentiment; returns a summary.

    Writes `labels.csv`, and `labels.json` about who found them.

    Args:
        out: folder of the data set.
        extractor: who finds them: a language model or rules.

    Raises:
        ChatError: a server that does not answer.
        CaptionError: no descriptions.
    """
    path = out / f"{DESCRIPTIONS}.jsonl"
    if not path.exists():
        raise CaptionError(f"{path} is missing; run `affectgpt caption merge` first")
    described = read_described(path)
    texts = [line["reply"] for line in described.values()]
    labels = extractor.labels(texts)
    sentiments = extractor.sentiments(labels)
    unread = extractor.unparsed
    # A description whose own labels could not be read is asked for no sentiment.
    unparsed = [
        str(unread.get(text) or unread.get(", ".join(words)) or "")
        for text, words in zip(texts, labels, strict=True)
    ]
    rows = [
        {
            "name": name,
            "labels": f"[{', '.join(words)}]",
            "sentiment": mood,
            "unparsed": reply,
            "description_sha256": description_sha256(text),
        }
        for name, text, words, mood, reply in zip(
            described, texts, labels, sentiments, unparsed, strict=True
        )
    ]
    write_csv(out / LABELS, COLUMNS, rows)
    asked = isinstance(extractor, ChatExtractor)
    about = About(
        extractor=extractor.identity,
        prompts_sha256=json_sha256([LABEL_PROMPT, SENTIMENT_PROMPT]) if asked else "",
        labels_sha256=sha256_of(out / LABELS),
    )
    write_json(out / ABOUT, about)
    vocabulary = {word for words in labels for word in words}
    without = sum(1 for words in labels if not words)
    of_labels = sum(1 for words, reply in zip(labels, unparsed) if reply and not words)
    of_sentiment = sum(1 for words, reply in zip(labels, unparsed) if reply and words)
    return [
        f"{len(rows):,} descriptions, {len(vocabulary):,} labels, by {extractor.identity}",
        f"without a label: {without:,}; replies that no labels could be read from: {of_labels:,}, "
        f"and no sentiment: {of_sentiment:,}",
    ]
