"""Emotions and sentiment of each description, as `labels.csv`."""

from __future__ import annotations

from pathlib import Path

from affectgpt_jax.common.tables import write_csv
from affectgpt_jax.evaluation.extract import Extractor

from .describe import read_described
from .settings import DESCRIPTIONS, LABELS, CaptionError

COLUMNS = ("name", "labels", "sentiment", "unparsed")


def label_descriptions(out: Path, extractor: Extractor) -> list[str]:
    """Find the emotions that each description names, and their sentiment; returns a summary.

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
    unparsed = [str(extractor.unparsed.get(text, "")) for text in texts]
    sentiments = extractor.sentiments(labels)
    rows = [
        {"name": name, "labels": f"[{', '.join(words)}]", "sentiment": mood, "unparsed": reply}
        for name, words, mood, reply in zip(described, labels, sentiments, unparsed, strict=True)
    ]
    write_csv(out / LABELS, COLUMNS, rows)
    vocabulary = {word for words in labels for word in words}
    without = sum(1 for words in labels if not words)
    unread = sum(1 for reply in unparsed if reply)
    return [
        f"{len(rows):,} descriptions, {len(vocabulary):,} labels, by {extractor.identity}",
        f"without a label: {without:,}; replies that no labels could be read from: {unread:,}",
    ]
