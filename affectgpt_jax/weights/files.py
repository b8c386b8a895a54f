"""Files and directories of weights that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from affectgpt_jax.weights.streaming import WeightsError


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file becomes `path` when the block ends without an error.

    Raises:
        WeightsError: something stands there already, or the disk refuses.
    """
    path = Path(path)
    if path.exists():
        raise WeightsError(f"{path} exists already; name another place, or remove it")
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.rename(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise WeightsError(f"{path} cannot be written: {error}") from None
        raise


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill; it becomes `path` when the block ends without an error.

    Raises:
        WeightsError: as for `new_file`.
    """
    with new_file(path) as partial:
        partial.mkdir()
        yield partial
