"""Map a word to an emotion of a wheel: surface form -> base words -> wheel words -> label.

MER-UniBench scores free words. A word's surface form ("crying") belongs to base words ("cry"),
these are synonyms of words that stand on an emotion wheel ("sad"), and each of the five wheels has
three levels, of which the innermost (1) or the middle one (2) are the labels that are compared.
The rules are those of the AffectGPT release (arXiv 2501.16566, section 5.1); they are applied once
to every surface form, so that a score is array look-ups.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import atomic_write, read_bytes
from affectgpt_jax.common.identity import Identity
from affectgpt_jax.common.json import parse_json
from affectgpt_jax.common.tables import csv_rows, xlsx_rows

WHEELS = 5
LEVELS = (1, 2)
DEFAULT = Path(__file__).parent.parent / "assets" / "lexicon"
OFFICIAL_FILES = (*(f"wheel{k}.xlsx" for k in range(1, WHEELS + 1)), "synonym.xlsx", "format.csv")
NEUTRAL_FILES = ("lexicon.json", "wheels.csv", "synonyms.csv", "forms.csv")
# Of the files with which the published scores were made, as their `Identity` has it.
OFFICIAL_SHA256 = "1aef686d372e21426047b2681ea6250f8c41ae7fbf178aa1739c608dd24cad7f"
SYNONYM_RUNS = 8
# Part of a cache file's name: another number makes every older file stale.
COMPILER = 1


def is_official(identity: Identity) -> bool:
    """Whether a lexicon is byte for byte the one behind the published scores."""
    return identity.sha256 == OFFICIAL_SHA256


@dataclasses.dataclass(frozen=True)
class Source:
    """The contents of a lexicon's files, lower-cased and stripped.

    Attributes:
        wheels: rows (level 1, level 2, level 3) of each wheel, in the order of the file; "" where
            a row has no word of that level.
        synonyms: pairs (wheel word, base word).
        forms: pairs (base word, surface form).
    """

    wheels: tuple[tuple[tuple[str, str, str], ...], ...]
    synonyms: tuple[tuple[str, str], ...]
    forms: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Lexicon:
    """A compiled lexicon.

    Attributes:
        identity: name and hash.
        forms: every surface form, sorted; its place is its id.
        labels: names of the labels of level 1 and 2 under each wheel: `labels[level - 1][wheel -
            1][id]`.
        table: int16 [2, 5, len(forms) + 1], read-only: label id by level, wheel and form id; -1
            where a form has none. The last column is -1, so that an unknown form may be -1 too.
    """

    identity: Identity
    forms: tuple[str, ...]
    labels: tuple[tuple[tuple[str, ...], ...], ...]
    table: np.ndarray

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {form: number for number, form in enumerate(self.forms)}

    def __contains__(self, word: str) -> bool:
        return normalise(word) in self._ids

    def form_ids(self, words: Iterable[str]) -> np.ndarray:
        """Ids of words in any case, int32 [words]; -1 for unknown ones."""
        get = self._ids.get
        return np.fromiter((get(word.strip().lower(), -1) for word in words), np.int32)

    def label(self, word: str, wheel: int, level: int = 1) -> str | None:
        """The label of a word under a wheel (1 to 5) at a level (1 or 2); None if it has none."""
        number = self.table[level - 1, wheel - 1, self._ids.get(normalise(word), -1)]
        return None if number < 0 else self.labels[level - 1][wheel - 1][number]


def normalise(word: str) -> str:
    """The form in which words are compared: stripped and lower-cased."""
    return word.strip().lower()


def load_lexicon(directory: str | Path | None = None) -> Lexicon:
    """Read a lexicon, or its compiled copy in the user's cache directory.

    Args:
        directory: one of the official files (`wheel1.xlsx` to `wheel5.xlsx`, `synonym.xlsx`,
            `format.csv`), or one of the neutral ones (`lexicon.json` with a name; CSVs `wheels`:
            wheel,level1,level2,level3; `synonyms`: word,synonym; `forms`: name,form). None is the
            lexicon that comes with the package.

    Raises:
        ReadError: neither kind of directory, or a file of it that is not as it should be.
    """
    directory = DEFAULT if directory is None else Path(directory)
    content = _read_files(directory)
    identity = _identify(directory, content)
    cache = _cache_directory() / f"lexicon-{COMPILER}-{identity.sha256}.npz"
    lexicon = _read_cache(cache, identity)
    if lexicon is None:
        lexicon = compile_lexicon(identity, _parse(directory, content))
        _write_cache(cache, lexicon)
    return lexicon


def lexicon_identity(directory: str | Path | None = None) -> Identity:
    """Which lexicon this is; arguments and errors are those of `load_lexicon`."""
    directory = DEFAULT if directory is None else Path(directory)
    return _identify(directory, _read_files(directory))


def read_source(directory: str | Path | None = None) -> Source:
    """Read a lexicon's files; arguments and errors are those of `load_lexicon`."""
    directory = DEFAULT if directory is None else Path(directory)
    return _parse(directory, _read_files(directory))


def _read_files(directory: Path) -> dict[str, bytes]:
    return {name: read_bytes(directory / name) for name in _source_files(directory)}


def _identify(directory: Path, content: dict[str, bytes]) -> Identity:
    digest = hashlib.sha256()
    for name, data in sorted(content.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    official = content.keys() == set(OFFICIAL_FILES)
    name = "official emotion wheels" if official else _read_name(directory, content)
    return Identity(name, digest.hexdigest())


def _parse(directory: Path, content: dict[str, bytes]) -> Source:
    official = content.keys() == set(OFFICIAL_FILES)
    return (read_official if official else read_neutral)(directory, content)


def _source_files(directory: Path) -> tuple[str, ...]:
    """The files by which a directory is recognised as an official or a neutral lexicon."""
    if not directory.is_dir():
        raise ReadError(f"{directory} is not a directory; expected that of a lexicon")
    present = {path.name for path in directory.iterdir()}
    kinds = [files for files in (OFFICIAL_FILES, NEUTRAL_FILES) if present & set(files)]
    if len(kinds) != 1:
        raise ReadError(
            f"{directory} holds {'two lexicons' if kinds else 'no lexicon'}; expected either "
            f"{', '.join(OFFICIAL_FILES)} or {', '.join(NEUTRAL_FILES)}"
        )
    if missing := [name for name in kinds[0] if name not in present]:
        raise ReadError(f"{directory} holds a lexicon without {', '.join(missing)}")
    return kinds[0]


def read_official(directory: Path, content: dict[str, bytes]) -> Source:
    """The files of the AffectGPT release.

    `wheelK.xlsx` has columns level1 to level3, where an empty cell repeats the one above;
    `synonym.xlsx` word_run1 to 8 and, as comma lists, synonym_run1 to 8; `format.csv` name and, as
    a comma list, format.

    Raises:
        ReadError: a missing column, or no rows.
    """
    wheels = []
    for k in range(1, WHEELS + 1):
        name = f"wheel{k}.xlsx"
        rows, above = [], {"level1": "", "level2": "", "level3": ""}
        for row in _checked_xlsx(directory / name, content[name], above):
            above |= {level: normalise(row[level]) for level in above if level in row}
            rows.append(tuple(above.values()))
        wheels.append(tuple(rows))
    runs = [(f"word_run{n}", f"synonym_run{n}") for n in range(1, SYNONYM_RUNS + 1)]
    columns = [column for run in runs for column in run]
    path = directory / "synonym.xlsx"
    synonyms = [
        (normalise(row[word]), synonym)
        for row in _checked_xlsx(path, content[path.name], columns)
        for word, synonym_list in runs
        if word in row
        for synonym in _comma_list(row.get(synonym_list, ""))
    ]
    path = directory / "format.csv"
    forms = [
        (normalise(row["name"]), form)
        for _, row in csv_rows(content[path.name], str(path), ("name", "format"))
        # A base word is a form of itself, which also keeps the ones with an empty list.
        for form in [normalise(row["name"]), *_comma_list(row["format"])]
    ]
    return Source(tuple(wheels), tuple(synonyms), tuple(forms))


def _checked_xlsx(path: Path, data: bytes, columns: Iterable[str]) -> list[dict[str, str]]:
    rows = list(xlsx_rows(data, str(path)))
    for column in columns:
        if not any(column in row for row in rows):
            raise ReadError(f"{path}: no column {column!r} with words in it")
    return rows


def _comma_list(text: str) -> list[str]:
    return [word for word in map(normalise, text.split(",")) if word]


class _About(TypedDict):
    """What `lexicon.json` must have."""

    name: str
    version: str | int


def _read_name(directory: Path, content: dict[str, bytes]) -> str:
    path = directory / "lexicon.json"
    about = parse_json(content[path.name], str(path), _About)
    return f"{about['name']} {about['version']}"


def read_neutral(directory: Path, content: dict[str, bytes]) -> Source:
    """Three CSVs of plain pairs and rows.

    Raises:
        ReadError: a missing column, a wheel that is none of 1 to 5 or has no rows, an empty word.
    """
    wheels: list[list[tuple[str, str, str]]] = [[] for _ in range(WHEELS)]
    path = directory / "wheels.csv"
    levels = ("level1", "level2", "level3")
    for line, row in csv_rows(content[path.name], str(path), ("wheel", *levels)):
        wheel = row["wheel"].strip()
        if wheel not in map(str, range(1, WHEELS + 1)):
            raise ReadError(f"{path}, line {line}: wheel is {wheel!r}; expected 1 to {WHEELS}")
        words = tuple(normalise(row[level]) for level in levels)
        if not words[0]:
            raise ReadError(f"{path}, line {line}: level1 is empty; expected a word")
        wheels[int(wheel) - 1].append(words)
    for number, rows in enumerate(wheels, start=1):
        if not rows:
            raise ReadError(f"{path}: no rows of wheel {number}")
    return Source(
        tuple(map(tuple, wheels)),
        tuple(_read_pairs(directory / "synonyms.csv", content, "word", "synonym")),
        tuple(_read_pairs(directory / "forms.csv", content, "name", "form")),
    )


def _read_pairs(
    path: Path, content: dict[str, bytes], first: str, second: str
) -> Iterator[tuple[str, str]]:
    for line, row in csv_rows(content[path.name], str(path), (first, second)):
        pair = normalise(row[first]), normalise(row[second])
        if not all(pair):
            raise ReadError(f"{path}, line {line}: expected a word in {first} and in {second}")
        yield pair


def compile_lexicon(identity: Identity, source: Source) -> Lexicon:
    """Apply the rules to every surface form.

    A form belongs to every base word that lists it and to the base word it is; a base word to
    every wheel word it is a synonym of and to the wheel word it is. Of all wheel words found, the
    alphabetically first one that stands on the wheel decides.
    """
    stands_for: defaultdict[str, set[str]] = defaultdict(set)  # base word -> wheel words
    for word, base in source.synonyms:
        stands_for[base].add(word)
        stands_for[word].add(word)
    for word in {word for rows in source.wheels for row in rows for word in row if word}:
        stands_for[word].add(word)
    belongs_to: defaultdict[str, set[str]] = defaultdict(set)  # surface form -> base words
    for base, form in source.forms:
        belongs_to[form].add(base)
    for base in stands_for.keys() | {base for base, _ in source.forms}:
        belongs_to[base].add(base)

    forms = tuple(sorted(belongs_to))
    candidates = [
        sorted(set().union(*(stands_for.get(base, ()) for base in belongs_to[form])))
        for form in forms
    ]
    table = np.full((len(LEVELS), WHEELS, len(forms) + 1), -1, np.int16)
    labels: list[list[tuple[str, ...]]] = [[] for _ in LEVELS]
    for wheel, rows in enumerate(source.wheels):
        for level, parents in enumerate((level1_parents(rows), level2_parents(rows))):
            names = tuple(sorted(set(parents.values())))
            number = {name: n for n, name in enumerate(names)}
            for form, words in enumerate(candidates):
                word = next((word for word in words if word in parents), None)
                if word is not None:
                    table[level, wheel, form] = number[parents[word]]
            labels[level].append(names)
    return _lexicon(identity, forms, tuple(map(tuple, labels)), table)


def _lexicon(identity: Identity, forms: tuple[str, ...], labels, table: np.ndarray) -> Lexicon:
    table.setflags(write=False)
    return Lexicon(identity, forms, labels, table)


def level1_parents(rows: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """Level-1 label of each word of a wheel.

    A word that stands under two parents takes the last in row order: the published scores do.
    """
    return {word: row[0] for row in rows for word in row if word}


def level2_parents(rows: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """Level-2 label of each word of a wheel; a level-1 word takes its alphabetically first child.

    As in `level1_parents`, the last row decides; a row without a level-2 word says nothing here.
    """
    rows = [row for row in rows if row[1]]
    children: dict[str, str] = {}
    for level1, level2, _ in rows:
        children[level1] = min(level2, children.get(level1, level2))
    return children | {word: row[1] for row in rows for word in row[1:] if word}


def _cache_directory() -> Path:
    """The cache directory of the XDG base directory specification."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # It says that a relative path must be ignored.
    return (Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()) / "affectgpt_jax"


def _read_cache(path: Path, identity: Identity) -> Lexicon | None:
    """The cached compiled lexicon; None if it is missing or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            forms, *names = parse_json(arrays["words"].tobytes(), str(path), list[list])
            table = arrays["table"]
        labels = tuple(tuple(map(tuple, names[level])) for level in range(len(LEVELS)))
        if table.dtype != np.int16 or table.shape != (len(LEVELS), WHEELS, len(forms) + 1):
            return None
        bounds = np.asarray([[len(wheel) for wheel in level] for level in labels])
        if (table < -1).any() or (table.max(axis=2) >= bounds).any() or (table[..., -1] >= 0).any():
            return None
        return _lexicon(identity, tuple(forms), labels, table)
    # Whatever is wrong with a cache, the source is at hand.
    except Exception:
        return None


def _write_cache(path: Path, lexicon: Lexicon) -> None:
    """Best effort: a home that cannot be written costs the next start a fraction of a second."""
    words = json.dumps([lexicon.forms, *lexicon.labels]).encode()
    # Another process may read at any time.
    with contextlib.suppress(OSError), atomic_write(path) as file:
        np.savez(file, words=np.frombuffer(words, np.uint8), table=lexicon.table)
