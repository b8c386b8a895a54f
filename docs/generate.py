"""What README and docs take from sources and results: `python docs/generate.py` writes it anew.

A part that is written here stands between `<!-- begin NAME -->` and `<!-- end -->`. With `--check`
nothing is written, and the command ends with status 1 where something is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are not installed

from affectgpt_jax.config_keys import config_keys  # noqa: E402
from benchmarks import (  # noqa: E402
    beyond,
    compiled,
    crowd,
    harness,
    plans,
    profile_table,
    rl_plans,
    settings,
    tables,
)
from benchmarks.harness import RESULTS  # noqa: E402


def keys() -> str:
    """Tables of all keys of the config, one for each section."""
    sections: dict[str, list[str]] = {}
    for name, default, meaning in config_keys():
        if isinstance(default, ConfigDict) and default:
            sections[name] = [f"## {name}", *([meaning] if meaning else [])]
            sections[name] += ["| key | default | meaning |\n|---|---|---|"]
            continue
        section, _, _ = name.rpartition(".")
        if not sections:
            sections[""] = ["| key | default | meaning |\n|---|---|---|"]
        cells = (f"`{name}`", _cell(default), meaning.replace("|", r"\|"))
        sections[section][-1] += f"\n| {' | '.join(cells)} |"
    return "\n\n".join(part for parts in sections.values() for part in parts)


def _cell(value: Any) -> str:
    if isinstance(value, ConfigDict):  # filled by the user
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"`{entry}`" for entry in value)
    return f"`{value!r}`" if value != "" else '`""`'


def ablations() -> str:
    """The tables of the ablations, without the words around them."""
    found = []
    for path in sorted(RESULTS.glob("ablation_table*.md")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found.append("\n".join(line for line in lines if line.startswith("|")))
    return "\n\n".join(found)


def _kept(pattern: str, table: Callable[[list[harness.Report]], str]) -> Callable[[], str]:
    return lambda: table([harness.load(path) for path in sorted(RESULTS.glob(pattern))])


def parity() -> str:
    """The table of parity; its module needs PyTorch."""
    from benchmarks import parity

    return parity.COMMAND.tables([harness.load(RESULTS / "parity.json")])


PARTS = {
    "keys": keys,
    "ablations": ablations,
    "results": lambda: tables.summary(RESULTS),
    "plans": _kept("plans.json", lambda found: plans.COMMAND.tables(found).partition("\n\n")[0]),
    "compiled": _kept("compiled_*.json", compiled.overview),
    "rl_plans": _kept("rl_plans.json", rl_plans.COMMAND.tables),
    "beyond": _kept("beyond.json", beyond.COMMAND.tables),
    "settings": _kept("settings.json", settings.COMMAND.tables),
    "crowd": _kept("crowd.json", crowd.COMMAND.tables),
    "profiles": _kept("profile_*.json", profile_table.overview),
    "parity": parity,
}
PART = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def rewritten(text: str) -> str:
    """A page with its parts as they are now; one that needs PyTorch stays where there is none."""

    def made(part: re.Match[str]) -> str:
        try:
            return f"<!-- begin {part[1]} -->\n{PARTS[part[1]]()}\n<!-- end -->"
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            return part[0]

    return PART.sub(made, text)


def pages() -> list[Path]:
    """The files that may have such parts."""
    readmes = (ROOT / "README.md", ROOT / "data_prep" / "README.md")
    return [*readmes, *sorted((ROOT / "docs").glob("*.md"))]


def main(argv: list[str]) -> int:
    stale = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            stale.append(path.relative_to(ROOT))
            if argv != ["--check"]:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path} was out of date" if argv != ["--check"] else f"{path} is out of date")
    return int(bool(stale) and argv == ["--check"])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
