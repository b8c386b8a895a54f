"""A blinded comparison of two sets of descriptions, as the paper's Table 7 has it.

`write_page` puts pairs of descriptions of the same clips into one page of HTML that needs nothing
else. Which of both is whose is drawn by a seed, and in a file beside the page that raters do not
see. `count_answers` reads what raters saved.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes, write_text
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.common.tables import csv_rows
from affectgpt_jax.common.text import listed, shorten
from affectgpt_jax.evaluation.markup import printable

from .settings import CaptionError

PAGE, KEY = "compare.html", "compare-key.json"
Z = 1.959964  # of a 95 % interval
_SCRIPT = """
"use strict";
const sets = [...document.querySelectorAll("fieldset")];
const chosen = (set) => (set.querySelector("input:checked") || {}).value;
const quoted = (text) => '"' + text.replaceAll('"', '""') + '"';
function answers() {
  const rater = quoted(document.getElementById("rater").value.trim());
  const page = document.body.dataset.page;
  const rows = sets.filter(chosen).map(
    (set) => [page, rater, quoted(set.dataset.clip), chosen(set)].join(","));
  return ["page,rater,clip,answer", ...rows].join("\\n") + "\\n";
}
function count() {
  for (const set of sets) set.classList.toggle("done", Boolean(chosen(set)));
  const left = sets.filter((set) => !chosen(set)).length;
  document.getElementById("left").textContent = left ? left + " pairs left" : "all pairs answered";
}
document.addEventListener("change", count);
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([answers()], { type: "text/csv" }));
  link.download = "answers.csv";
  link.click();
});
count();
"""


class Side(TypedDict):
    """Whose the descriptions of a pair are: which side is ours."""

    clip: str
    ours: Literal["a", "b"]


class Key(TypedDict):
    """The key of a page, which has a hash of its pairs and sides as its id."""

    page: str
    pairs: list[Side]


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of all answers, and the ends of its 95 % interval (Wilson's)."""

    count: int
    share: float
    low: float
    high: float


def wilson(count: int, total: int) -> Share:
    """The share of `count` in `total` answers, at least one."""
    share = count / total
    middle = (share + Z**2 / (2 * total)) / (1 + Z**2 / total)
    spread = share * (1 - share) / total + Z**2 / (4 * total**2)
    half = Z * math.sqrt(spread) / (1 + Z**2 / total)
    return Share(count, share, max(middle - half, 0.0), min(middle + half, 1.0))


def write_page(
    out: Path,
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    subtitles: Mapping[str, str],
    *,
    pairs: int,
    seed: int,
    title: str,
) -> int:
    """Write the page and its key; returns how many pairs there are.

    Args:
        out: the folder.
        ours, theirs, subtitles: texts by clip; compared are clips that both describe.
        pairs: to draw, at most.
        seed: of the clips and their sides.
        title: of the page, which must not say whose descriptions these are.

    Raises:
        CaptionError: no clip that both describe, or the folder has the key of another page.
        OSError: a file cannot be written.
    """
    import jinja2

    both = [name for name, text in ours.items() if text and theirs.get(name)]
    if not both:
        raise CaptionError(
            f"no clip is described by both: ours are called {listed(list(ours))}, the others "
            f"{listed(list(theirs))}"
        )
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(len(both), size=min(pairs, len(both)), replace=False).tolist())
    shown, key = [], []
    for number, place in enumerate(chosen):
        clip = both[place]
        texts = [ours[clip], theirs[clip]]
        side = "ab"[rng.integers(2)]
        a, b = texts if side == "a" else texts[::-1]
        subtitle = subtitles.get(clip, "")
        shown.append({"number": number, "clip": clip, "subtitle": subtitle, "a": a, "b": b})
        key.append(Side(clip=printable(clip), ours=side))  # as the page sends it back
    page_id = json_sha256([shown, key])[:16]
    if (out / KEY).exists() and _read_key(out)["page"] != page_id:
        raise CaptionError(
            f"{out / KEY} is the key of another page, whose answers could not be counted without "
            f"it; move {PAGE} and {KEY} elsewhere first"
        )
    digest = hashlib.sha256(_SCRIPT.encode()).digest()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: printable(v) if type(v) is str else v,
    )
    page = environment.get_template("compare.html.jinja").render(
        title=title,
        page_id=page_id,
        pairs=shown,
        script=jinja2.utils.markupsafe.Markup(_SCRIPT),
        script_sha256=base64.b64encode(digest).decode("ascii"),
    )
    write_json(out / KEY, Key(page=page_id, pairs=key))
    write_text(out / PAGE, page)
    return len(shown)


def _read_key(out: Path) -> Key:
    return read_json(out / KEY, Key, advice="make the page again with --against FILE")


def count_answers(out: Path, files: Sequence[Path]) -> tuple[dict[str, Share], int]:
    """Wins, losses and ties of our descriptions, and the number of raters.

    Args:
        out: the folder with the key of the page.
        files: that raters saved: columns page, rater, clip, answer (a, b or tie).

    Raises:
        ReadError: a file that cannot be read, an answer about another page or a clip that is not
            in the key, one that is none, or one that comes twice.
        CaptionError: no answer at all.
    """
    its_key = _read_key(out)
    key = {pair["clip"]: pair["ours"] for pair in its_key["pairs"]}
    counts = dict.fromkeys(("win", "loss", "tie"), 0)
    seen: set[tuple[str, str]] = set()
    for file in files:
        columns = ("page", "rater", "clip", "answer")
        for line, row in csv_rows(read_bytes(file), str(file), columns):
            where, clip, answer = f"{file}, line {line}", row["clip"], row["answer"]
            if row["page"] != its_key["page"]:
                raise ReadError(
                    f"{where}: the answer is about the page {shorten(row['page'], 40)}, and "
                    f"{out / KEY} is the key of {its_key['page']!r}; name the --out of that page"
                )
            if clip not in key:
                raise ReadError(f"{where}: the clip {clip!r} is not in {out / KEY}")
            if answer not in ("a", "b", "tie"):
                raise ReadError(f"{where}: the answer is {answer!r}; expected a, b or tie")
            rater = row["rater"] or str(file)
            if (rater, clip) in seen:
                raise ReadError(f"{where}: {rater!r} has answered about {clip!r} already")
            seen.add((rater, clip))
            counts["tie" if answer == "tie" else "win" if answer == key[clip] else "loss"] += 1
    if not seen:
        raise CaptionError("there are no answers yet")
    raters = len({rater for rater, _ in seen})
    return {name: wilson(count, len(seen)) for name, count in counts.items()}, raters
