"""Judge clips: is the person who is seen the one who is heard?

Clips are looked at by worker processes and judged here, a block at a time. Finished blocks are
stored, so that a run that was stopped goes on, and so that several can share the work.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import jax
import numpy as np

from affectgpt_jax.common.files import sha256_of
from affectgpt_jax.common.progress import Counter

from .. import faces
from ..blocks import Block, BlockStore, block_key
from ..clips import Clip, ClipError
from ..decoding import available_cores, died_because, in_order
from ..stages import in_blocks, refuse_changed
from . import networks
from .mfcc import COEFFICIENTS, PER_FRAME
from .networks import Network
from .synchrony import (
    DETECTOR,
    NO_FACE,
    OFF_SCREEN,
    OTHER_SPEAKS,
    RATE,
    SILENT,
    SPEAKING,
    UNREADABLE,
    Judgement,
    audible_frames,
    is_silent,
    judge_traces,
    suffice,
    voiced_frames,
)
from .tracks import Look, Seen, look
from .verdicts import write_speakers

BLOCK = 32  # clips
BLOCKS = ".speakers"  # beside the file of verdicts
# To be raised with every change of this code that changes verdicts.
VERSION = 2
VERSIONS = ("av", "jax", "numpy")
# Of the voiced frames, to count as the speaker.
LEAST_SHARE = 0.5
# Seconds of the pieces that a network sees a track in; their scores are averaged.
PASSES = (6, 5, 4, 3, 2, 1)
SMOOTHING = 5  # frames


class Detector(Protocol):
    """What judges clips.

    Attributes:
        name: in every row of a report.
        needs_crops: whether it reads faces and MFCC, or traces alone.
        identity: all that its judgement depends on, a value that JSON has.
    """

    name: str
    needs_crops: bool
    identity: Any

    def judge(self, clips: Sequence[Seen]) -> list[list[Judgement]]:
        """Of each clip a judgement for each track."""
        ...


@dataclasses.dataclass(frozen=True)
class Synchrony:
    """`synchrony.judge_traces` on each track."""

    name: str = DETECTOR
    needs_crops: bool = False
    identity: Any = VERSION

    def judge(self, clips: Sequence[Seen]) -> list[list[Judgement]]:
        """Of each clip a judgement for each track."""
        return [[self._judge(seen, track) for track in seen.tracks] for seen in clips]

    def _judge(self, seen: Seen, track) -> Judgement:
        there = slice(track.start, track.start + len(track))
        voiced = voiced_frames(seen.energy)
        found = judge_traces(
            track.mouth,
            seen.energy[there],
            upper=track.upper,
            voiced=voiced[there],
            silent=is_silent(seen.energy),
        )
        return dataclasses.replace(found, voiced_share=float(voiced.mean()))


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkDetector:
    """A network for active speakers.

    Attributes:
        network: with its weights.
        identity: the hash of its file, passes and threshold.
        passes: how many of `PASSES` are averaged, the longest first.
        least_share: of the voiced frames, to count as the speaker.
    """

    network: Network
    identity: Any
    passes: int
    least_share: float = LEAST_SHARE
    needs_crops: bool = True

    @property
    def name(self) -> str:
        """The network's."""
        return self.network.architecture.name

    def judge(self, clips: Sequence[Seen]) -> list[list[Judgement]]:
        """Of each clip a judgement for each track."""
        tracks = [
            (seen.mfcc[PER_FRAME * t.start : PER_FRAME * (t.start + len(t))], t.crops)
            for seen in clips
            for t in seen.tracks
        ]
        scores = iter(score_tracks(self.network, tracks, PASSES[: self.passes]))
        return [[self._judge(seen, t, next(scores)) for t in seen.tracks] for seen in clips]

    def _judge(self, seen: Seen, track, scores: np.ndarray) -> Judgement:
        voiced = voiced_frames(seen.energy)
        share = float(voiced.mean())
        if is_silent(seen.energy):
            return Judgement(SILENT, voiced_share=share)
        if not suffice(voiced):  # a steady sound, in which the network may hear a voice
            voiced = audible_frames(seen.energy)
        # A voice while this face is not to be seen is not its own.
        mine = voiced[track.start : track.start + len(track)]
        active = float(np.sum(scores[mine] > 0) / voiced.sum())
        score = float(scores[mine].mean()) if mine.any() else math.nan
        verdict = SPEAKING if active >= self.least_share else OFF_SCREEN
        return Judgement(verdict, score, active, share)


def load_detector(
    text: str, passes: int | None = None, least_share: float = LEAST_SHARE
) -> Detector:
    """The detector that a command line names: `synchrony`, or `NETWORK=FILE`.

    Args:
        text: what was given.
        passes: over each track, 1 to 6; by default one on a CPU and six elsewhere.
        least_share: of the voiced frames, to count as the speaker, for a network.

    Raises:
        ClipError: another name, or a number out of range.
        WeightsError: a file that is not this network's.
    """
    if text == DETECTOR:
        return Synchrony()
    name, equals, path = text.partition("=")
    if name not in networks.ARCHITECTURES or not path:
        known = ", ".join(f"{n}=FILE" for n in networks.ARCHITECTURES)
        raise ClipError(f"--network {text}: expected {DETECTOR}, or one of {known}")
    if passes is None:
        passes = 1 if jax.default_backend() == "cpu" else len(PASSES)
    if not 1 <= passes <= len(PASSES):
        raise ClipError(f"--passes {passes}: expected 1 to {len(PASSES)}")
    if not 0 < least_share <= 1:
        raise ClipError(f"--share {least_share:g}: expected more than 0, and 1 at most")
    place = Path(path).expanduser()
    network = networks.load(place, name)
    identity = [VERSION, sha256_of(place), passes, least_share]
    return NetworkDetector(network, identity, passes, least_share)


def score_tracks(
    network: Network,
    tracks: Sequence[tuple[np.ndarray, np.ndarray]],
    seconds: Sequence[int],
) -> list[np.ndarray]:
    """Scores of every frame; above 0 the face speaks.

    Args:
        network: the network.
        tracks: MFCC `[4T, 13]` and faces `[T, 112, 112]` of each.
        seconds: lengths of the pieces that tracks are cut into; the mean over these counts.

    Returns:
        float32 `[T]` each, smoothed over `SMOOTHING` frames.
    """
    totals = [np.zeros(len(crops)) for _, crops in tracks]
    pieces: dict[int, list[tuple[int, int, int]]] = {}
    for number, total in enumerate(totals):
        for length in seconds:
            for start in range(0, len(total), length * RATE):
                stop = min(start + length * RATE, len(total))
                # Padded to whole seconds, so that a handful of programs serves all lengths.
                padded = -(-(stop - start) // RATE) * RATE
                pieces.setdefault(padded, []).append((number, start, stop))
    rows = 1 if jax.default_backend() == "cpu" else 16
    for padded, parts in sorted(pieces.items()):
        for begin in range(0, len(parts), rows):
            batch = parts[begin : begin + rows]
            mfcc = np.zeros((rows, PER_FRAME * padded, COEFFICIENTS), np.float32)
            crops = np.zeros((rows, padded, faces.SIZE, faces.SIZE), np.uint8)
            lengths = np.zeros(rows, np.int32)
            for row, (number, start, stop) in enumerate(batch):
                heard, seen = tracks[number]
                lengths[row] = stop - start
                mfcc[row, : PER_FRAME * (stop - start)] = heard[
                    PER_FRAME * start : PER_FRAME * stop
                ]
                crops[row, : stop - start] = seen[start:stop]
            logits = network.logits(mfcc, crops, lengths)
            for row, (number, start, stop) in enumerate(batch):
                totals[number][start:stop] += logits[row, : stop - start, 1] / len(seconds)
    return [_smooth(total).astype(np.float32) for total in totals]


def _smooth(scores: np.ndarray) -> np.ndarray:
    half = SMOOTHING // 2
    there = np.convolve(np.ones(len(scores)), np.ones(SMOOTHING), "full")[half : -half or None]
    total = np.convolve(scores, np.ones(SMOOTHING), "full")[half : -half or None]
    return total / there


def check_clips(
    clips: Sequence[Clip],
    out: Path,
    detector: Detector | None = None,
    *,
    workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> list[dict[str, Any]] | None:
    """Judge clips and write a row for each.

    Args:
        clips: in order.
        out: the file of verdicts; finished blocks lie beside it in `.speakers`.
        detector: what judges; `Synchrony` by default.
        workers: processes that decode; by default one a core.
        shard: I and N: judge every N-th block only, from the I-th on. Whoever finds all blocks
            finished writes the file, whose bytes do not depend on how the work was shared.

    Returns:
        The rows; None while other shards are not finished.

    Raises:
        ClipError: files that change while they are read.
        OSError: the file cannot be written.
    """
    detector = detector or Synchrony()
    settings = {
        "version": VERSION,
        "detector": [detector.name, detector.identity],
        "faces": faces.DETECTOR,
        "batch": BLOCK,
        # OpenCV, which finds faces and scales them, is one module, which several packages bring.
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS}
        | {"opencv": cv2.__version__},
    }
    blocks = in_blocks(clips, settings)
    store = BlockStore(out.parent / BLOCKS)
    store.folder.mkdir(parents=True, exist_ok=True)
    mine = list(blocks)[shard[0] :: shard[1]]
    missing = {key: blocks[key] for key in mine if key not in store}
    jobs = [Look(clip, detector.needs_crops) for part in missing.values() for clip in part]
    workers = max(1, available_cores() if workers is None else workers)
    results = in_order(
        look, jobs, workers, ahead=BLOCK + workers, died=lambda: Seen(died_because())
    )
    changed: list[Clip] = []
    with Counter("clips", stream=sys.stderr) as count:
        done = 0
        count(0, len(jobs))
        for key, part in missing.items():
            seen = [next(results) for _ in part]
            if block_key(settings, part) == key:
                judged = detector.judge(seen)
                names = [clip.name for clip in part]
                rows = [row_of(*each, detector.name) for each in zip(names, seen, judged)]
                store.write(key, Block(rows, {}))
            else:
                changed += part
            done += len(part)
            count(done, len(jobs))
    results.close()
    refuse_changed(changed)
    if any(key not in store for key in blocks):
        return None
    rows = [row for key in blocks for row in store.rows(key)]
    write_speakers(out, rows)
    return rows


def row_of(name: str, seen: Seen, judgements: Sequence[Judgement], detector: str) -> dict[str, Any]:
    """A clip's row: the verdict on its largest face, the visible person."""
    row: dict[str, Any] = {"name": name, "network": detector}
    if seen.problem:
        return row | {"verdict": UNREADABLE, "reason": seen.problem}
    row |= {"faces": seen.faces, "tracks": len(seen.tracks), "frames": seen.frames}
    if not judgements:
        share = float(voiced_frames(seen.energy).mean())
        return row | {"verdict": NO_FACE, "voiced_share": share}
    first, *others = judgements
    verdict = first.verdict
    if verdict == OFF_SCREEN and any(other.verdict == SPEAKING for other in others):
        verdict = OTHER_SPEAKS
    numbers = {
        name: value
        for name in ("score", "active_share", "voiced_share")
        if math.isfinite(value := getattr(first, name))
    }
    return row | {"verdict": verdict} | numbers


def told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The verdicts in a few lines, and the detector's name."""
    total = len(rows)
    verdicts = [row["verdict"] for row in rows]
    lines = [
        f"{verdict:>12}  {verdicts.count(verdict):,} of {total:,} clips "
        f"({100 * verdicts.count(verdict) / total:.1f} %)"
        for verdict in dict.fromkeys(verdicts)
    ]
    return [f"judged by {rows[0]['network']}", *sorted(lines)]
