"""Files and directories of weights that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from affectgpt_jax.weights.huggingface import WeightsError


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends without an error.

    Raises:
        WeightsError: something stands there already, or its folder cannot be written.
    """
    yield from _new(Path(path), lambda partial: partial.unlink(missing_ok=True))


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `path` when the block ends without an error.

    Raises:
        WeightsError: something stands there already, or its folder cannot be written.
    """

    def discard(partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)

    yield from _new(Path(path), discard, Path.mkdir)


def _new(path, discard, create=lambda partial: None) -> Iterator[Path]:
    if path.exists():
        raise WeightsError(f"{path} exists already; name another place, or remove it")
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        create(partial)
        yield partial
        partial.rename(path)
    except OSError as error:
        discard(partial)
        raise WeightsError(f"{path} cannot be written: {error}") from None
    except BaseException:
        discard(partial)
        raise
