"""Packing: which of an epoch's draws share a row.

Padding short and long examples to the longest of a batch wastes about half of it. A packed row
holds as many whole examples as fit, `segment_ids` keep them apart, and all rows have one shape. The
plan is a pure function of the draws' sizes in their order: the same on every process and after a
restart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# Sizes are rounded up to multiples of this, so that matmuls are aligned.
LENGTH_MULTIPLE = 4

# Draws that a row may choose from. Its last two are chosen to fill it: of the 2,000 pairs among so
# many, one nearly always does. They are few enough for the order to stay random.
LOOKAHEAD = 64
# How many of a row's first choices are replaced by a pair, in the order of trial: two for two
# leaves the most to choose from. None is tried once less than this share of the row is empty.
SWAPS, EMPTY = (2, 1, 3, 4), 1 / 512

# Room for clips in a row, relative to the average row. Unused room costs memory for features and
# little else.
CLIP_ROOM = 1.5


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The static shape of a batch's rows.

    Attributes:
        length: tokens.
        targets: those of them that may be supervised.
        clips: examples that may share a row.
    """

    length: int
    targets: int
    clips: int = 1


def round_up(n):
    """Round a number or an array up to a multiple of `LENGTH_MULTIPLE`."""
    return -(-n // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def packed_bucket(
    length: int, lengths: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> Bucket:
    """The shape of packed rows of `length` tokens.

    Every target costs logits, used or not. There is room for the mean number of targets of a row of
    random examples plus one standard deviation: with less, rows with many long answers could not be
    filled. Any single example fits.

    Args:
        length: tokens of a row.
        lengths: tokens of every example that an epoch may draw, `[N]`.
        targets: their supervised tokens, `[N]`.
        weights: how often epochs draw them, `[N]`, in any unit.
    """
    clips = length / np.average(lengths, weights=weights)
    share = np.average(targets, weights=weights) / np.average(lengths, weights=weights)
    deviation = np.sqrt(clips * np.average((targets - share * lengths) ** 2, weights=weights))
    room = max(int(targets.max()), int(share * length + deviation))
    return Bucket(
        length,
        int(round_up(min(length, room))),
        max(1, min(length // int(lengths.min()), int(np.ceil(CLIP_ROOM * clips)))),
    )


def pack(lengths: np.ndarray, targets: np.ndarray, bucket: Bucket) -> list[np.ndarray]:
    """Share out draws over rows, each draw whole and once.

    A row takes the draws that come next and fit, of those that wait the oldest one for certain.
    Then the last few of these give way to two out of the next `LOOKAHEAD` that fill the row best.
    So rows stay random samples: sorting by length, as best-fit-decreasing does, would fill rows as
    well, but with descriptions first and label answers last, and a batch must hold both (see
    `TrainPipeline`). Only the last rows, when draws run out, stay partly empty.

    Args:
        lengths: tokens of every draw, `[N]`, in random order.
        targets: their supervised tokens, `[N]`.
        bucket: what a row has room for.

    Returns:
        For every row the draws in it, in ascending order.

    Raises:
        ValueError: a draw that no row has room for, or a bucket without room for any clip.
    """
    too_large = np.flatnonzero((lengths > bucket.length) | (targets > bucket.targets))
    if too_large.size:
        first = too_large[0]
        raise ValueError(
            f"draw {first} has {lengths[first]} tokens, {targets[first]} of them supervised; "
            f"rows have room for {bucket.length} and {bucket.targets}"
        )
    rows, waiting, following = [], np.arange(min(LOOKAHEAD, len(lengths))), LOOKAHEAD
    while waiting.size:
        chosen = _fill_row(lengths[waiting], targets[waiting], bucket)
        if 0 not in chosen:  # every row takes the oldest draw, or this loop would never end
            first = waiting[0]
            raise ValueError(
                f"draw {first} ({lengths[first]} tokens, {targets[first]} of them supervised) was "
                f"not placed in an empty row of {bucket}; expected room for 1 clip or more"
            )
        rows.append(waiting[chosen])
        more = np.arange(following, min(following + len(chosen), len(lengths)))
        waiting, following = np.append(np.delete(waiting, chosen), more), following + len(chosen)
    return rows


def _fill_row(lengths: np.ndarray, targets: np.ndarray, bucket: Bucket) -> list[int]:
    """Which of the waiting draws go into the next row, the first one among them."""
    taken, room = [], [(bucket.length, bucket.targets)]  # room before each choice, and at the end
    for i, (length, supervised) in enumerate(zip(lengths.tolist(), targets.tolist())):
        tokens_left, targets_left = room[-1]
        if length <= tokens_left and supervised <= targets_left and len(taken) < bucket.clips:
            taken.append(i)
            room.append((tokens_left - length, targets_left - supervised))
    best, empty = taken, room[-1][0]
    for swapped in SWAPS:
        kept = len(taken) - swapped
        if kept < 1 or empty <= EMPTY * bucket.length:
            continue
        head, (tokens_left, targets_left) = taken[:kept], room[kept]
        pair, filled = _best_pair(
            lengths, targets, head, tokens_left, targets_left, bucket.clips - kept
        )
        if tokens_left - filled < empty:
            best, empty = [*head, *pair], tokens_left - filled
    return sorted(best)


def _best_pair(
    lengths: np.ndarray,
    targets: np.ndarray,
    taken: Sequence[int],
    tokens_left: int,
    targets_left: int,
    clips_left: int,
) -> tuple[list[int], int]:
    """One or two draws that are not taken yet and fill the room that is left best, and their sum;
    the sum is 0 where none fits."""
    size = len(lengths)
    # Behind them stands a draw without tokens: who is paired with it, comes alone.
    lengths, targets = np.append(lengths, 0), np.append(targets, 0)
    lengths[taken] = tokens_left + 1
    sums = lengths[:, None] + lengths
    fits = (sums <= tokens_left) & (targets[:, None] + targets <= targets_left)
    fits &= _PAIRS[-size - 1 :, -size - 1 :]
    if clips_left < 2:
        fits[:, :-1] = False
    sums *= fits
    i, j = divmod(int(sums.argmax()), size + 1)
    return [k for k in (i, j) if k < size], int(sums[i, j])


_PAIRS = np.triu(np.ones((LOOKAHEAD + 1, LOOKAHEAD + 1), bool), 1)
