"""Question-answer pairs whose text names an emotion, as the rows NAME-emotion of Table 3 have."""

from __future__ import annotations

from pathlib import Path

from affectgpt_jax.common.tables import write_csv
from affectgpt_jax.data.records import RecordDataset
from affectgpt_jax.evaluation.extract import Extractor

from .filtering import are_written, copy_records, made_of
from .settings import CaptionError

PAIRS = "pairs.csv"
COLUMNS = ("name", "labels", "unparsed")


def write_emotional_pairs(source: Path, out: Path, to: Path, extractor: Extractor) -> list[str]:
    """Write the records whose question or answer names an emotion, and `pairs.csv` about all.

    Args:
        source: records of question-answer pairs.
        out: folder of `pairs.csv`.
        to: the record directory to write.
        extractor: who finds the emotions.

    Returns:
        A summary.

    Raises:
        ChatError: a server that does not answer.
        CaptionError: a record that is no such pair, or no pair that names an emotion.
        RecordError: a directory that cannot be used.
    """
    made = made_of(source)
    are_written(to, made)  # or others are, which shows before the work
    index = RecordDataset(source).index
    for entry in index:
        if not entry.answer.strip():
            raise CaptionError(
                f"the record {entry.name!r} of {source} has no answer; expected question-answer "
                "pairs"
            )
    texts = [f"{entry.question}\n{entry.answer}".strip() for entry in index]
    labels = extractor.labels(texts)
    unread = [str(extractor.unparsed.get(text) or "") for text in texts]
    rows = [
        {"name": entry.name, "labels": f"[{', '.join(words)}]", "unparsed": reply}
        for entry, words, reply in zip(index, labels, unread, strict=True)
    ]
    kept = [entry.name for entry, words in zip(index, labels, strict=True) if words]
    made = made_of(source, kept=kept)
    there = are_written(to, made)
    write_csv(out / PAIRS, COLUMNS, rows)
    if not kept:
        raise CaptionError(
            f"none of the {len(index):,} pairs of {source} names an emotion by "
            f"{extractor.identity}; see {out / PAIRS}"
        )
    copy_records(source, to, kept, made)
    return [
        f"{to}: {len(kept):,} of {len(index):,} pairs name an emotion, by {extractor.identity}"
        f"{', and were there' if there else ''}; {out / PAIRS} has the labels of each",
        f"replies that no labels could be read from, left out: {sum(map(bool, unread)):,}",
    ]
