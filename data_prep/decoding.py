"""Decode clips in parallel worker processes, and return them in order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.identity import files_sha256
from affectgpt_jax.data.arrays import sample_rows

from . import faces, media
from .clips import Clip
from .detectors import DetectorFile, opened
from .media import FRAMES, MediaError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Of decoding one clip; the processes that decode are ended after it.
LIMIT_S = 1800
# Between two looks whether results are still wanted.
POLL_S = 0.1


class Abandoned(UserError, RuntimeError):
    """Results that nobody wants any more."""


def died_because(limit_s: float = LIMIT_S) -> str:
    """Why there is nothing of a clip whose decoding ends the process, as a reason in a manifest."""
    return (
        "its decoding ends the process, as a crash or a lack of memory does, or takes longer than "
        f"{limit_s:,g} s"
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """What to take from a clip: face, frame and audio, and the side of pixels for the encoder.

    Faces are found by `detector`, or by the cascade where there is none.
    """

    clip: Clip
    features: tuple[str, ...]
    image_size: int
    face_order: str = "bgr"
    max_seconds: float = math.inf  # of a file; a longer one is not decoded
    detector: DetectorFile | None = None


@dataclasses.dataclass(eq=False)
class Decoded:
    """The decoded input of the encoders for one clip.

    Attributes:
        arrays: by feature: pixels uint8 `[8, S, S, 3]`, or samples float32 `[8, 32000]`.
        problems: by feature, why there is no array.
        facts: of the clip, for the manifest.
        seconds: spent, by stage.
    """

    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def decode_clip(job: Job) -> Decoded:
    """Decode a clip: the usable parts, and a reason for each part that is not usable."""
    out = Decoded()
    clip = job.clip
    start = time.perf_counter()
    damage = {path: _trouble(path, job.max_seconds) for path in (clip.video, clip.audio) if path}
    # By what can be used, the same clip is known again under another name.
    if whole := [path for path, trouble in damage.items() if not trouble]:
        try:
            with media.reading():
                out.facts["sha256"] = files_sha256(whole)
        except MediaError as error:
            damage |= dict.fromkeys(whole, str(error))
    visual = [feature for feature in ("face", "frame") if feature in job.features]
    if visual:
        _attempt(out, visual, lambda: _look(job, out, damage))
    if "audio" in job.features:
        _attempt(out, ["audio"], lambda: _listen(clip, out, damage))
    # A file that breaks off in one stream is not trusted in the other.
    if clip.sound == clip.video and "audio" in out.arrays:
        broken = [text for text in out.problems.values() if text.startswith("damaged")]
        if broken:
            del out.arrays["audio"]
            out.problems["audio"] = broken[0]
    out.seconds["decoding"] = time.perf_counter() - start - out.seconds.get("faces", 0)
    return out


def _trouble(path: Path, max_seconds: float) -> str | None:
    try:
        media.check_whole(path)
        if max_seconds < math.inf:
            media.check_length(path, max_seconds)
    except MediaError as error:
        return str(error)
    return None


def _attempt(out: Decoded, features: list[str], take: Callable[[], None]) -> None:
    """Record the error as the reason why these features are missing."""
    try:
        take()
    except MediaError as error:
        lacking = (f for f in features if f not in out.arrays and f not in out.problems)
        out.problems |= dict.fromkeys(lacking, str(error))


def _look(job: Job, out: Decoded, damage: dict[Path, str | None]) -> None:
    """Add face and frame where the job asks for them.

    Raises:
        MediaError: why those that are not there are missing.
    """
    clip, size = job.clip, job.image_size
    search = "face" in job.features and clip.faces is None
    if "face" in job.features and clip.faces is not None:
        # The track needs no video, which may be there for the frames only.
        _attempt(out, ["face"], lambda: _take_track(job, out))
    boxes = None
    if search and clip.boxes:
        try:
            boxes = faces.read_boxes(clip.boxes)
        except MediaError as error:  # of which the frames know nothing
            out.problems["face"], search = str(error), False
    if not search and "frame" not in job.features:
        return

    last: faces.Square | None = None

    def find(image: np.ndarray, number: int) -> faces.Square | None:
        if boxes is not None:
            box = boxes[number] if number < len(boxes) else [np.nan]
            there = np.isfinite(box).all() and min(box[2:]) > 0
            return faces.square_of(box) if there else None
        if job.detector:
            return faces.choose(opened(job.detector)(image), last)
        return faces.find_face(image, last)

    def convert(image: np.ndarray, number: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        nonlocal last
        start = time.perf_counter()
        square = find(image, number) if search else None
        last = square or last
        face = faces.crop(image, square) if square else None
        out.seconds["faces"] = out.seconds.get("faces", 0) + time.perf_counter() - start
        return face, media.resized(image, size) if "frame" in job.features else None

    if clip.video is None:
        raise MediaError("no video file")
    if damage[clip.video]:
        raise MediaError(damage[clip.video])
    count = faces.SEARCHED if search else FRAMES
    taken, facts = media.read_frames(clip.video, count, convert, numbered=True)
    out.facts |= dataclasses.asdict(facts)
    if boxes is not None and len(boxes) != facts.frames:
        why = f"boxes of {len(boxes):,} frames, but the video has {facts.frames:,}"
        out.problems["face"], search = why, False
    if "frame" in job.features:
        rows = sample_rows(len(taken), FRAMES)
        out.arrays["frame"] = np.stack([taken[row][1] for row in rows])
    if search:
        track = [face for face, _ in taken if face is not None]
        if not track:
            raise MediaError(f"no face in {len(taken)} frames")
        _add_faces(out, track, size)


def _take_track(job: Job, out: Decoded) -> None:
    _add_faces(out, faces.read_openface(job.clip.faces, job.face_order), job.image_size)


def _add_faces(out: Decoded, track: Any, size: int) -> None:
    out.facts["faces"] = len(track)
    rows = sample_rows(len(track), FRAMES)
    out.arrays["face"] = np.stack(
        [media.resized(np.ascontiguousarray(track[r]), size) for r in rows]
    )


def _listen(clip: Clip, out: Decoded, damage: dict[Path, str | None]) -> None:
    if clip.sound is None:
        raise MediaError("no audio file")
    if damage[clip.sound]:
        raise MediaError(damage[clip.sound])
    waveform = media.read_waveform(clip.sound)
    out.facts.setdefault("seconds", len(waveform) / media.RATE)
    out.arrays["audio"] = media.windows(waveform)


def available_cores() -> int:
    """The number of cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int,
    died: Callable[[], Result],
    limit_s: float = LIMIT_S,
    stop: threading.Event | None = None,
) -> Iterator[Result]:
    """`map(function, items)` in worker processes that survive the death of one of them.

    What is under way when the iterator is closed, or an error ends it, is ended at once.

    Args:
        function: of a module, since the processes start anew.
        items: what it is applied to.
        workers: processes, at least one: what decodes a file may end with it.
        ahead: results that may wait for the one that is next.
        died: the result of an item that ends its process even when it is alone in it, or does not
            end.
        limit_s: for one item.
        stop: ends it when somebody sets it.

    Raises:
        Abandoned: `stop` is set.
    """
    function = functools.partial(_in_time, function, limit_s)
    source = iter(items)
    pool = _Pool(workers)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        while True:
            for item in source:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) >= ahead:
                    break
            if not waiting:
                return
            item, future = waiting.popleft()
            try:
                result = _result(future, stop)
            except BrokenProcessPool:
                # Somebody ended a process, and all that were under way are lost with it.
                pool.close()
                result = _alone(function, item, died, stop) if waiting else died()
                pool = _Pool(workers)
                waiting = deque(
                    (i, f if _succeeded(f) else pool.submit(function, i)) for i, f in waiting
                )
            yield result
    finally:
        pool.close()


class _Pool:
    """Worker processes that can be ended in the middle of their work.

    Args:
        workers: at the most.
    """

    def __init__(self, workers: int) -> None:
        # Not forked: a copy of a process with PyTorch's threads in it may hang.
        context = multiprocessing.get_context("spawn")
        theirs, self._mine = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start, initargs=(theirs,)
        )

    def submit(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        try:
            return self._pool.submit(function, item)
        except BrokenProcessPool as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            return failed

    def close(self) -> None:
        """End the processes and what they do."""
        self._mine.close()
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Work:
    """What a worker is at. One that waits or sends a result must not be ended then: it may have
    locks of the pool's queues, or have sent half of a message."""

    lock = threading.Lock()
    busy = ended = False


def _start(pool: Connection) -> None:
    """Start of a worker: it ends with its pool or its parent, even if that is killed, and ignores
    Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes

    def follow() -> None:
        pool.poll(None)  # until the other end is closed
        with _Work.lock:
            _Work.ended = True
            if _Work.busy:
                os._exit(1)
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _in_time(function: Callable[[Item], Result], limit_s: float, item: Item) -> Result:
    """`function(item)`, or the end of this process after `limit_s`, or with its pool."""
    with _Work.lock:
        if _Work.ended:
            os._exit(1)
        _Work.busy = True
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return function(item)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with _Work.lock:
            _Work.busy = False


def _result(future: Future[Result], stop: threading.Event | None) -> Result:
    while stop is not None and not wait([future], POLL_S).done:
        if stop.is_set():
            raise Abandoned
    return future.result()


def _succeeded(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _alone(
    function: Callable[[Item], Result],
    item: Item,
    died: Callable[[], Result],
    stop: threading.Event | None,
) -> Result:
    with contextlib.closing(_Pool(1)) as pool:
        try:
            return _result(pool.submit(function, item), stop)
        except BrokenProcessPool:
            return died()
