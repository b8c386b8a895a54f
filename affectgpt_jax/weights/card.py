"""The model card of an exported run: README.md of a folder as model hubs show it."""

from __future__ import annotations

import importlib.resources
import json
import string
from collections.abc import Mapping, Sequence

from affectgpt_jax.common.text import one_line
from affectgpt_jax.evaluation.markup import escape_markdown


def model_card(
    name: str,
    base: str,
    training: Sequence[tuple[str, str]],
    results: Sequence[tuple[str, str]],
    version: str,
) -> str:
    """The card, in Markdown with the metadata that hubs read above it.

    What the exporter cannot know (a licence, the base's name on the hub, who made it) is marked as
    to be filled in.

    Args:
        name: of the run.
        base: name of the frozen base.
        training: facts about the training, by what they are called.
        results: scores, by what they are called.
        version: of this package.
    """
    template = importlib.resources.files("affectgpt_jax") / "assets" / "hub" / "card.md"
    missing = "To be filled in: `affectgpt evaluate` writes tables into `evaluate/report.md`."
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        base=escape_markdown(base),
        base_json=json.dumps(one_line(base)),  # JSON is YAML
        name=escape_markdown(name),
        version=version,
        training=_table(training),
        results=_table(results) if results else missing,
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {escape_markdown(name)} | {escape_markdown(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def result_rows(result: Mapping[str, object]) -> list[tuple[str, str]]:
    """The scores in a `result.json`, with what they mean."""
    found = []
    if isinstance(hit := result.get("hit"), float):
        found.append((f"hit rate of the first label, {result.get('clips')} clips", f"{hit:.3f}"))
    if isinstance(f := result.get("f"), float):
        clips = result.get("clips_scored")
        found.append((f"F of the labels on the emotion wheels, {clips} clips", f"{f:.3f}"))
    for metric in ("hit", "f"):
        if isinstance(shuffled := result.get(f"{metric}_features_shuffled"), float):
            found.append(("the same with the features of other clips", f"{shuffled:.3f}"))
    return found
