"""The stages of an extraction: decoding in processes, ahead of the encoders in this one.

The features of a batch of clips are a block, and what is finished of an extraction is its blocks.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectgpt_jax.common.progress import Counter
from affectgpt_jax.common.text import listed

from .blocks import Block, BlockStore, block_key
from .clips import Clip, ClipError
from .decoding import Decoded, Job, decode_clip, died_because, in_order
from .detectors import DetectorFile
from .encoders import FEATURES, Encoder


def in_blocks(clips: Sequence[Clip], settings: Mapping[str, Any]) -> dict[str, Sequence[Clip]]:
    """Clips in blocks of a batch, in their order, by `block_key`."""
    size = settings["batch"]
    parts = (clips[i : i + size] for i in range(0, len(clips), size))
    return {block_key(settings, part): part for part in parts}


class Stages:
    """Seconds that each stage was busy, and that encoders waited for clips."""

    def __init__(self, workers: int):
        self.workers, self.clips = workers, 0
        self.busy: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()

    def add(self, stage: str, seconds: float) -> None:
        self.busy[stage] += seconds

    def lines(self) -> list[str]:
        """Speed, each stage's share of the time, and the bottleneck."""
        wall = time.perf_counter() - self._began
        parallel = max(self.workers, 1)
        per_stage = {
            stage: seconds / (parallel if stage in ("decoding", "faces") else 1)
            for stage, seconds in self.busy.items()
            if stage != "waiting"
        }
        slowest = max(per_stage, key=per_stage.get)
        shares = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in per_stage.items())
        hint = {
            "decoding": "more --workers or cores would help",
            "faces": "more --workers or cores, --face-detector, or faces or boxes that you have, "
            "would help",
        }.get(slowest, "a faster --device or a smaller encoder would help")
        return [
            f"{self.clips / wall:.1f} clips/s; busy: {shares}; the encoders waited "
            f"{self.busy['waiting']:.1f} of {wall:.1f} s",
            f"the bottleneck is {slowest}: {hint}",
        ]


def run(
    missing: Mapping[str, Sequence[Clip]],
    store: BlockStore,
    encoders: Mapping[str, Encoder],
    settings: Mapping[str, Any],
    workers: int,
    detector: DetectorFile | None = None,
) -> Stages:
    """Compute blocks and store them, in order; worker processes decode ahead.

    Args:
        missing: the blocks, see `in_blocks`.
        store: where they go.
        encoders: by kind, "video" or "audio".
        settings: with "features", "batch" and "faces", by which the blocks are named too.
        workers: processes that decode ahead; 0 for one that decodes when it is asked to.
        detector: of faces, if not the cascade.

    Raises:
        ClipError: a file that changed while it was read, after all other blocks.
    """
    size = encoders["video"].image_size if "video" in encoders else 0
    features, face_order = settings["features"], settings["faces"]["order of arrays"]
    jobs = [
        Job(clip, features, size, face_order, detector=detector)
        for part in missing.values()
        for clip in part
    ]
    stages, batch = Stages(workers), settings["batch"]

    def died() -> Decoded:
        return Decoded(problems=dict.fromkeys(features, died_because()))

    # With no workers nothing is decoded ahead, but still in a process of its own.
    ahead = 2 * batch + workers if workers else 1
    results = in_order(decode_clip, jobs, max(workers, 1), ahead, died)
    changed: list[Clip] = []
    with Counter("clips", stream=sys.stderr) as count:
        count(0, len(jobs))
        for key, part in missing.items():
            start = time.perf_counter()
            decoded = [next(results) for _ in part]
            stages.add("waiting", time.perf_counter() - start)
            for result in decoded:
                for stage, seconds in result.seconds.items():
                    stages.add(stage, seconds)
            # A folder that is copied to, or a drive that went away, must not be remembered as it
            # was.
            if block_key(settings, part) == key:
                store.write(key, encode(part, decoded, encoders, features, batch, stages))
            else:
                changed += part
            stages.clips += len(part)
            count(stages.clips, len(jobs))
    results.close()
    refuse_changed(changed)
    return stages


def refuse_changed(clips: Sequence[Clip]) -> None:
    """End a command that has finished all blocks but those of these clips.

    Raises:
        ClipError: there are such clips.
    """
    if clips:
        raise ClipError(
            f"files of the clips {listed([clip.name for clip in clips])} changed while they were "
            "read; run the command again when nobody writes to them"
        )


def encode(
    clips: Sequence[Clip],
    decoded: Sequence[Decoded],
    encoders: Mapping[str, Encoder],
    features: Sequence[str],
    batch: int,
    stages: Stages,
) -> Block:
    """The features of a block, as one batch of `batch` clips per feature."""
    found = {}
    for feature in features:
        kind = next(kind for kind, names in FEATURES.items() if feature in names)
        encoder = encoders[kind]
        start = time.perf_counter()
        inputs = encoder.empty(batch)
        present = [i for i, result in enumerate(decoded) if feature in result.arrays]
        for i in present:
            inputs[i] = decoded[i].arrays[feature]
        values = np.zeros((len(clips), *inputs.shape[1:2], encoder.width), np.float32)
        if present:
            values[present] = encoder(inputs)[present]
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        for i in np.flatnonzero(~np.isfinite(half).all(axis=(1, 2))):
            decoded[i].problems[feature] = "the encoder's values are not finite in float16"
            half[i] = 0
        found[feature] = half
        stages.add(f"{kind} encoder", time.perf_counter() - start)
    rows = [
        {"name": clip.name, "problems": result.problems, "facts": result.facts}
        for clip, result in zip(clips, decoded, strict=True)
    ]
    return Block(rows, found)
