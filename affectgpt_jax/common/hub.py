"""Models of the Hugging Face hub: from the hub's local cache, downloaded only where that is asked.

A place is written `owner/name`, as the hub writes it, or `hf:owner/name`, which can also name a
revision and a file: `hf:owner/name@REVISION/FILE`. What is a path on this machine stays one.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.text import brief

PREFIX = "hf:"
_NAME = r"[A-Za-z0-9][\w.-]*"
_PLACE = re.compile(
    rf"(?P<prefix>{PREFIX})?(?P<repository>{_NAME}/{_NAME})(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?"
)
_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/[^/]+")


class HubError(UserError, ValueError):
    """A model of the hub that is not in its cache, or cannot be had."""


@dataclasses.dataclass(frozen=True)
class HubPlace:
    """A model of the hub, or one of its files.

    Attributes:
        repository: `owner/name`.
        revision: a branch, a tag or a commit; None is the newest.
        file: path of a file in it; "" is all of it.
    """

    repository: str
    revision: str | None = None
    file: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{'/' if self.file else ''}{self.file}"


def parse_place(text: str) -> HubPlace | None:
    """What a text names on the hub; None where it is a path, or can only be one.

    Raises:
        HubError: it begins with `hf:` and names no model.
    """
    found = _PLACE.fullmatch(text)
    marked = text.startswith(PREFIX)
    if not marked and (found is None or found["revision"] or found["file"] or os.path.exists(text)):
        return None
    if found is None or (found["file"] and ".." in Path(found["file"]).parts):
        raise HubError(
            f"{text!r} names no model of the hub; expected hf:OWNER/NAME, hf:OWNER/NAME@REVISION "
            "or hf:OWNER/NAME/FILE"
        )
    return HubPlace(found["repository"], found["revision"], found["file"] or "")


def find(
    place: HubPlace,
    what: str,
    patterns: Sequence[str],
    missing: Callable[[Path], str | None],
    download: bool = False,
    otherwise: str = "name a path",
) -> Path:
    """The directory of a model, or its file, in the hub's cache (`HF_HOME`).

    Args:
        place: of it.
        what: needs it, such as "config.llm"; errors begin so.
        patterns: of the files that are needed; others are not downloaded.
        missing: says what a directory lacks, or None; the cache may hold a part of a model only.
        download: get what is not there, whatever `missing` can tell: the hub alone knows all files
            of a model, and sends none again that is whole. Without it, nothing is asked of any
            server.
        otherwise: what to do where it is not to be downloaded.

    Raises:
        HubError: it is not there, or cannot be had; one sentence that names it and the cache.
    """
    # Takes a third of a second, and is needed by none who names directories.
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    options = {"revision": place.revision}

    def get(local: bool) -> Path:
        if place.file:
            return Path(
                hf_hub_download(place.repository, place.file, local_files_only=local, **options)
            )
        return Path(
            snapshot_download(
                place.repository, local_files_only=local, allow_patterns=[*patterns], **options
            )
        )

    def look() -> tuple[Path | None, str]:
        try:
            path = get(local=True)
        except FileNotFoundError:
            return None, "it is not whole in the hub's cache"
        except (OSError, ValueError) as error:  # a cache that cannot be read, a name that cannot be
            return None, brief(str(error))
        lacks = None if place.file else missing(path)
        return (None, f"the hub's cache has a part of it: {lacks}") if lacks else (path, "")

    cache = constants.HF_HUB_CACHE
    if download:
        try:
            get(local=False)
        # The client's own errors, and those of what it reaches servers with.
        except Exception as error:
            there = "; what the cache has is used without --download" if look()[0] else ""
            raise HubError(
                f"{what}: {place} cannot be downloaded into {cache}: "
                f"{brief(str(error) or type(error).__name__)}{there}"
            ) from None
    found, reason = look()
    if found is None and download:
        raise HubError(f"{what}: {place} was downloaded, but cannot be used: {reason}")
    if found is None:
        raise HubError(
            f"{what}: {place} is no path here, and {reason} ({cache}); pass --download to get it "
            f"from the hub, or {otherwise}"
        )
    return found


def is_cached(path: Path) -> bool:
    """Whether a directory is one of the hub's cache, which the hub's tools alone write to."""
    return _SNAPSHOT.fullmatch(str(path)) is not None


def model_name(directory: Path) -> str:
    """What people call the model in a directory: of one in the hub's cache, its name on the hub."""
    found = _SNAPSHOT.fullmatch(str(directory))
    return found[1].replace("--", "/", 1) if found else Path(directory).name
