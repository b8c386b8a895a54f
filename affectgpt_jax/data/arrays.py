"""Your own clips as records: a CSV file with a row per clip, and arrays of features.

    from affectgpt_jax.data.arrays import records_from_csv
    from affectgpt_jax.data.records import write_records

    arrays = {"face": "features/clip", "audio": "features/hubert"}
    encoders = {"face": "clip-vit-l-14", "audio": "hubert-large"}
    write_records("/records/mine", records_from_csv("clips.csv", arrays), encoders=encoders)

The CSV file has a column `name` and any other field of `Annotations`. Lists are written as
`[happy, worried]` or `happy, worried`; alternatives, which may hold commas, as JSON.

The arrays `[T, d]` of a feature are a folder of `NAME.npy`, an `.npz` archive with an array per
clip (`np.savez(path, **{name: array})`), or one with two arrays: `names` `[N]` and, under any other
key, all clips `[N, T, d]`. In Python, they may also be a dict. Nothing pickled is read.
"""

from __future__ import annotations

import difflib
import math
import os
import shlex
import typing
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common import npy
from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import path_below, read_bytes
from affectgpt_jax.common.json import parse_json
from affectgpt_jax.common.labels import read_labels
from affectgpt_jax.common.tables import CsvTable
from affectgpt_jax.common.text import listed
from affectgpt_jax.data.modalities import feature_names
from affectgpt_jax.data.records import Annotations, Record, RecordError

_PLAIN = "save it as an array of plain numbers, with np.save or np.savez"


def records_from_csv(
    path: str | os.PathLike[str],
    arrays: Mapping[str, str | os.PathLike[str] | Mapping[str, np.ndarray]],
    *,
    ignore: Sequence[str] = (),
    allow_missing: bool = False,
    frames: int | None = None,
    encoding: str = "utf-8",
) -> Iterator[Record]:
    """The clips of a CSV file with their features, in the order of its rows.

    The whole file is checked, and an array found for every clip, before the first record comes;
    arrays are read one clip at a time.

    Args:
        path: the CSV file.
        arrays: by feature, a name of `modalities.feature_names()`, a folder, an archive or a dict
            of arrays.
        ignore: columns to leave out.
        allow_missing: whether a clip without an array lacks that modality; else it is an error.
        frames: the number T of rows that every array is to have: they are sampled uniformly, the
            last one repeated where there are fewer. None takes arrays as they are.
        encoding: of the CSV file; a byte order mark may be there.

    Raises:
        RecordError: a file that cannot be read, a column or a value that is not understood, a name
            that is empty or comes twice, a clip without an array, or an array that is not `[T, d]`
            or of another shape than those before it.
    """
    if unknown := sorted(set(arrays) - set(feature_names())):
        raise RecordError(f"features {unknown} are unknown; use {feature_names()}")
    if frames is not None and frames < 1:
        raise RecordError(f"frames is {frames}; expected 1 or more")
    rows = _read_rows(Path(path), ignore, encoding)
    opened = {feature: _as_arrays(feature, source) for feature, source in arrays.items()}
    names = [row["name"] for row in rows]
    for feature, source in opened.items():
        _check_complete(feature, source, names, allow_missing, str(path))
    return _records(rows, opened, frames)


def open_arrays(path: str | os.PathLike[str]) -> Arrays:
    """The arrays of a folder or an `.npz` archive; each is read when it is asked for.

    Raises:
        RecordError: neither, or an archive that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _Folder(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        found = "is not an .npz archive" if path.is_file() else "does not exist"
        raise RecordError(
            f"{path} {found}; expected a folder with an array NAME.npy per clip, or an .npz archive"
        )
    archive = _Archive(path)
    return _unstacked(archive) if len(archive) == 2 and "names" in archive else archive


def parse_list(text: str) -> tuple[str, ...]:
    """The words of a list that is written as text: `[a, b]`, `["a", 'b']` and `a,b` are the same.

    One leading `[` and one trailing `]` go, every quote and comma separates, empty words are
    dropped, the others stripped.
    """
    text = text.strip().removeprefix("[").removesuffix("]")
    for separator in ("'", '"'):
        text = text.replace(separator, ",")
    return tuple(stripped for word in text.split(",") if (stripped := word.strip()))


def parse_labels(text: str) -> tuple[str, ...]:
    """The words of a list in lower case, as the evaluation reads labels."""
    return tuple(read_labels(text))


def sample_rows(count: int, frames: int) -> np.ndarray:
    """The indices that sample `count` rows to `frames` rows: int `[frames]`.

    Uniform, `floor(i * count / n)` with n the smaller of both, then the last one repeated, as
    AffectGPT samples the frames of a video.
    """
    n = min(count, frames)
    index = np.arange(n) * count // n
    return np.concatenate([index, np.full(frames - n, index[-1])])


class Arrays(Mapping[str, np.ndarray]):
    """Arrays by clip name."""

    def place(self, name: str) -> str:
        """The location of a clip's array, for messages; the array need not exist."""
        raise NotImplementedError


class _Folder(Arrays):
    """A folder of `NAME.npy`; a name may lead into a folder below."""

    def __init__(self, path: Path):
        self._path = path

    def place(self, name: str) -> str:
        return str(path_below(self._path, f"{name}.npy", RecordError))

    def __contains__(self, name: object) -> bool:
        return Path(self.place(str(name))).is_file()

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return npy.read_file(self.place(name))
        except FileNotFoundError:
            raise KeyError(name) from None
        except (OSError, ValueError) as error:
            raise _unreadable(self.place(name), error) from None

    def __iter__(self) -> Iterator[str]:
        files = sorted(self._path.rglob("*.npy"))
        return (file.relative_to(self._path).as_posix().removesuffix(".npy") for file in files)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Archive(Arrays):
    """An `.npz` archive with an array per clip."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = zipfile.ZipFile(path)
        except Exception as error:
            raise _unreadable(str(path), error) from None
        self._names = dict.fromkeys(
            name.removesuffix(".npy") for name in self._file.namelist() if name.endswith(".npy")
        )

    def place(self, name: str) -> str:
        return f"{self.path}, array {name!r}"

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        try:
            return npy.read_npz(self._file, name)
        # A damaged file may raise errors of zipfile or of zlib.
        except Exception as error:
            raise _unreadable(self.place(name), error) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Loaded(Arrays):
    """Arrays that are in memory."""

    def __init__(self, where: str, arrays: Mapping[str, np.ndarray]):
        self._where, self._arrays = where, arrays

    def place(self, name: str) -> str:
        return f"{self._where}, clip {name!r}"

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _unstacked(archive: _Archive) -> _Loaded:
    """The clips of an archive of `names` `[N]` and one other array, `[N, T, d]`."""
    names = archive["names"]
    (key,) = (key for key in archive if key != "names")
    values, where = archive[key], f"{archive.path}, {key}"
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) != len(values):
        raise RecordError(
            f"{archive.path}: names is {names.dtype} {list(names.shape)} and {key} "
            f"{list(values.shape)}; expected as many names, of text, as clips"
        )
    clips = dict(zip(names.tolist(), values, strict=True))
    if len(clips) < len(names):
        twice = Counter(names.tolist()).most_common(1)[0][0]
        raise RecordError(f"{archive.path}: names has {twice!r} more than once; keep one")
    return _Loaded(where, clips)


def _as_arrays(feature: str, source: Any) -> Arrays:
    if isinstance(source, Arrays):
        return source
    if isinstance(source, Mapping):
        return _Loaded(f"the {feature} arrays", source)
    return open_arrays(source)


def _unreadable(place: str, error: Exception) -> RecordError:
    reason = npy.reason(error).removesuffix(".")
    return RecordError(f"{place} cannot be read: {reason}; {_PLAIN}")


def _check_complete(
    feature: str, source: Arrays, names: Sequence[str], allow_missing: bool, where: str
) -> None:
    missing = [name for name in names if name not in source]
    if not missing or (allow_missing and len(missing) < len(names)):
        return
    found = f"{len(missing)} of the {len(names)} clips of {where} have no {feature} array"
    first = f"the first would be {source.place(missing[0])}"
    if len(missing) == len(names):
        others = f", but there is one of {other!r}" if (other := next(iter(source), "")) else ""
        raise RecordError(f"{found}: {first}{others}; use the same names")
    raise RecordError(
        f"{found}: {listed(missing)} ({first}); add them, or pass --allow-missing "
        "(allow_missing=True) to go without"
    )


def _records(
    rows: Sequence[Mapping[str, Any]], arrays: Mapping[str, Arrays], frames: int | None
) -> Iterator[Record]:
    first: dict[str, tuple[str, tuple[int, int]]] = {}
    for row in rows:
        features = {}
        for feature, source in arrays.items():
            if row["name"] not in source:
                continue
            place = source.place(row["name"])
            values = features[feature] = _sampled(np.asarray(source[row["name"]]), frames, place)
            before, shape = first.setdefault(feature, (place, values.shape))
            if values.shape != shape:
                hint = (
                    "--frames N samples each to N rows"
                    if values.shape[1] == shape[1]
                    else "extract all clips with the same encoder"
                )
                raise RecordError(
                    f"{place} is {list(values.shape)}, but {before} is {list(shape)}; {hint}"
                )
        yield Record(features=features, **row)


def _sampled(values: np.ndarray, frames: int | None, place: str) -> np.ndarray:
    if values.ndim != 2:
        hint = "; a single vector is one row, values[None]" if values.ndim == 1 else ""
        raise RecordError(
            f"{place} has the shape {list(values.shape)}; expected [T, d], a row per frame{hint}"
        )
    if frames is None or not len(values):
        return values
    return values[sample_rows(len(values), frames)]


# --- the CSV file -------------------------------------------------------------------------------


def _number(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a number, found {text!r}")
    return number


def _bounds(text: str) -> tuple[float, ...]:
    bounds = tuple(map(_number, text.strip(" []()").split(",")))
    if bounds == (None,):
        return ()
    if len(bounds) != 2 or None in bounds:
        raise ValueError(f"expected two numbers, the lowest and the highest, found {text!r}")
    return bounds


def _json_texts(text: str) -> tuple[str, ...]:
    if not text.strip():
        return ()
    try:
        return parse_json(text, "the cell", tuple[str, ...])
    except ReadError:
        raise ValueError(f'expected JSON, as in ["one text", "another"], found {text!r}') from None


_PARSERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    tuple[str, ...]: parse_list,
    float | None: _number,
    tuple[float, ...]: _bounds,
}
# Texts keep the space around them; words lose it.
_SPECIAL: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("name", "emotion", "preferred", "source", "conflict"), str.strip),
    "labels": parse_labels,
    "alternatives": _json_texts,
}
COLUMNS = {
    name: _SPECIAL.get(name, _PARSERS[hint])
    for name, hint in typing.get_type_hints(Annotations).items()
}


def _read_rows(path: Path, ignore: Sequence[str], encoding: str) -> list[dict[str, Any]]:
    """The fields of every clip, parsed."""
    rows: list[dict[str, Any]] = []
    lines: dict[str, int] = {}
    for line, cells in _read_table(path, ignore, encoding):
        row = {}
        for column, text in cells.items():
            try:
                row[column] = COLUMNS[column](text)
            except ValueError as error:
                raise RecordError(f"{path}, line {line}, column {column!r}: {error}") from None
        name = row["name"]
        if not name:
            raise RecordError(f"{path}, line {line}: the name is empty; give each clip one")
        if name in lines:
            raise RecordError(
                f"{path}, line {line}: the name {name!r} stands in line {lines[name]} already; "
                "names must be unique"
            )
        lines[name] = line
        rows.append(row)
    if not rows:
        raise RecordError(f"{path} has no clips; expected a row for each below the header")
    return rows


def _read_table(path: Path, ignore: Sequence[str], encoding: str) -> CsvTable:
    data = read_bytes(path, error=RecordError)
    table = CsvTable(
        data,
        str(path),
        ("name",),
        ignore=ignore,
        encoding=encoding,
        advice="save the file as UTF-8, or name its encoding, as in --encoding gb18030",
        error=RecordError,
    )
    for column in table.header:
        if column not in COLUMNS:
            close = difflib.get_close_matches(column.lower(), COLUMNS, 1)
            known = f"did you mean {close[0]!r}" if close else f"known are {', '.join(COLUMNS)}"
            raise RecordError(
                f"{path}: the column {column!r} is unknown ({known}); rename it, or leave it out "
                f"with --ignore {shlex.quote(column)}"
            )
    return table
