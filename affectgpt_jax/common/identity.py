"""Identities of what results depend on: a base model, a lexicon, settings, files.

An identity is a name for people and a hash of the content for programs. Two that have the same hash
are the same thing, wherever their files lie.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from affectgpt_jax.common.files import sha256_of


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which one of several things of a kind this is.

    Attributes:
        name: what people call it.
        sha256: of its content, in hexadecimal.
    """

    name: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:12]})"


def json_sha256(value: Any) -> str:
    """The hash of a value that JSON has; the order of an object's keys does not matter.

    Raises:
        TypeError: a value that JSON does not have.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def files_sha256(paths: Iterable[str | os.PathLike[str]], about: Any = None) -> str:
    """The hash of files, in their order; their names do not matter.

    Args:
        paths: the files, which are read side by side.
        about: a value that JSON has, which counts as well; None counts nothing.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    if about is not None:
        digest.update(json.dumps(about, sort_keys=True).encode())
    with ThreadPoolExecutor() as pool:
        for file_sha256 in pool.map(sha256_of, paths):
            digest.update(bytes.fromhex(file_sha256))
    return digest.hexdigest()


@functools.cache
def code_identity(package: Path = Path(__file__).parent.parent) -> Identity:
    """Which code this is: a hash of the sources of a package, this one, as they are on disk.

    What a wheel adds to the package, configs and `data_prep`, is left out: a checkout and a wheel
    of the same version are the same code.
    """
    paths = (path.relative_to(package) for path in package.rglob("*.py"))
    sources = sorted(path for path in paths if path.parts[0] not in ("configs", "data_prep"))
    lines = [f"{path.as_posix()} {sha256_of(package / path)}" for path in sources]
    return Identity(package.name, hashlib.sha256("\n".join(lines).encode()).hexdigest())


def named_files_sha256(paths: Iterable[Path]) -> str:
    """The hash of files and their names, in their order; the folders do not matter.

    Raises:
        OSError: one cannot be read.
    """
    lines = [f"{path.name} {sha256_of(path)}" for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
