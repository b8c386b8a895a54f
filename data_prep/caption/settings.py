"""What models are asked and what is kept: `caption.toml`, which a user edits, and the files' names.

A data set is a folder. All commands of this package read and write in it:

    caption.toml         prompts and thresholds; made with the first command
    audio.jsonl, video.jsonl, descriptions.jsonl       a reply a clip, see `describe`
    labels.csv, labels.json    emotions and sentiment of each description, and who found them
    pairs.csv            emotions of question-answer pairs, see `pairs`
    speakers.csv         who speaks, of data_prep.speakers
    votes.csv            what the crowd says, of data_prep.crowd
    filtered.csv, plus.csv, funnel.json, funnel.png    of `filtering`
    README.md            the card
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.files import read_bytes, write_text
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import check_type
from affectgpt_jax.common.text import shorten
from affectgpt_jax.common.toml import MAX_BYTES, parse_toml

from ..speakers.synchrony import VERDICTS

SETTINGS = "caption.toml"
DESCRIPTIONS, LABELS, SPEAKERS, VOTES = "descriptions", "labels.csv", "speakers.csv", "votes.csv"
REPLIES = ".replies"  # what has been asked so far
# How sound and pictures are sent; the first is what every server takes.
FORMS = {"audio": ("input_audio", "audio_url"), "video": ("frames", "video_url")}
DEFAULT = Path(__file__).with_name(SETTINGS)


class CaptionError(UserError, ValueError):
    """A data set that is not so far, or settings that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    audio: str
    video: str
    merge: str


@dataclasses.dataclass(frozen=True)
class ReplyLimits:
    audio: int
    video: int
    merge: int


@dataclasses.dataclass(frozen=True)
class MediaSettings:
    frames: int
    pixels: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class LengthSettings:
    tails: float


@dataclasses.dataclass(frozen=True)
class SpeakerSettings:
    drop: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CrowdSettings:
    agree: Literal["any", "majority", "all"]
    least_votes: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """The contents of `caption.toml`; its comments say what each value means."""

    prompts: Prompts
    replies: ReplyLimits
    media: MediaSettings
    lengths: LengthSettings
    speakers: SpeakerSettings
    crowd: CrowdSettings

    @property
    def sha256(self) -> str:
        """Of all values."""
        return json_sha256(dataclasses.asdict(self))


def read_settings(out: Path) -> Settings:
    """The settings of a data set, which are the default ones where it has none yet.

    Raises:
        ReadError: a file that cannot be read, is no TOML, or has another key or type.
        OSError: the file cannot be made.
    """
    path = out / SETTINGS
    if not path.exists():
        write_text(path, DEFAULT.read_text(encoding="utf-8"))
    found = parse_toml(read_bytes(path, MAX_BYTES), str(path))
    advice = f"delete {path}, and the next command writes the default ones"
    settings = check_type(found, Settings, str(path), advice=advice)
    for verdict in settings.speakers.drop:
        if verdict not in VERDICTS:
            raise ReadError(
                f"{path}: speakers.drop has {shorten(verdict)}, which is no verdict; expected some "
                f"of {', '.join(VERDICTS)}"
            )
    for what, value in (
        ("media.frames", settings.media.frames),
        ("media.pixels", settings.media.pixels),
        ("media.seconds", settings.media.seconds),
        ("lengths.tails", settings.lengths.tails),
        *((f"replies.{k}", v) for k, v in dataclasses.asdict(settings.replies).items()),
    ):
        if value <= 0:
            raise ReadError(f"{path}: {what} is {value:g}; expected more than 0")
    return settings
