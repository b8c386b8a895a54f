"""Does a mouth move with the sound? Judged from two traces, without any weights.

An open mouth is dark, and it opens with the syllables that are heard: the brightness of the mouth,
less that of the upper face (which light and head change alike), falls where the sound is loud. Both
are stripped of what changes slowly and correlated, at the delays that are plausible.

On film this cue is weak: beards, profiles, cuts and low resolution hide it. So the judgement is
asymmetric. A clip is dropped on strong evidence only: silence, or a correlation that is no higher
than chance gives in this very clip although its length would have shown one. What is in between is
`unsure`, and so is a steady sound, such as music or noise, under which no voice stands out.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from affectgpt_jax.common.errors import UserError

RATE = 25  # frames/s of traces
DETECTOR = "synchrony"

SPEAKING, UNSURE = "speaking", "unsure"
OTHER_SPEAKS, OFF_SCREEN, SILENT = "other_speaks", "off_screen", "silent"
NO_FACE, UNREADABLE = "no_face", "unreadable"
VERDICTS = (SPEAKING, OTHER_SPEAKS, OFF_SCREEN, SILENT, NO_FACE, UNSURE, UNREADABLE)

# A frame is voiced that is this much louder than the clip's quiet ones.
QUIET_PERCENTILE, ABOVE_QUIET_DB = 20, 10
CLOSING = 5  # frames: a shorter pause is one word's
LEAST_VOICED_S = 0.3
# A sound without voiced frames is silence below this mean square, in dB of full scale. A quiet room
# is at -60 to -70, and speech that is to be understood above -50; music and noise are louder.
SILENCE_DBFS = -55
# What changes more slowly than this many frames is no syllable.
SYLLABLE_FRAMES = 13
# Frames that the mouth may follow the sound by: it leads by 80 ms at most, and a recording lags by
# 160 ms at most.
DELAYS = range(-2, 5)
# Delays of chance: beyond any plausible one, and beyond a syllable.
FAR = 13
# Correlations: from `MATCH` on the mouth speaks. Below `NONE` it does not, if chance gives as much
# in this clip, and if there are `LEAST_DECIDED` frames: in fewer, noise may hide a match.
MATCH, NONE = 0.45, 0.3
LEAST_DECIDED = 40


class TraceError(UserError, ValueError):
    """Traces that cannot be compared."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What was found about a face and a sound.

    Attributes:
        verdict: one of `VERDICTS`.
        score: how well they go together: a correlation for `synchrony`, a logit for a network; NaN
            where there was nothing to compare.
        active_share: share of the voiced frames in which the face speaks; NaN where the detector
            judges clips as a whole.
        voiced_share: share of the frames that are voiced.
    """

    verdict: str
    score: float = math.nan
    active_share: float = math.nan
    voiced_share: float = math.nan


def judge_traces(
    mouth: np.ndarray,
    energy: np.ndarray,
    *,
    upper: np.ndarray | None = None,
    voiced: np.ndarray | None = None,
    silent: bool | None = None,
    rate: float = RATE,
) -> Judgement:
    """Judge a face by the brightness of its mouth.

    Args:
        mouth: mean brightness of the mouth, `[T]`, on any linear scale.
        energy: of the sound, `[T]`, in dB.
        upper: mean brightness of the upper face, `[T]`, on the scale of `mouth`.
        voiced: bool `[T]`; by default `voiced_frames(energy)`.
        silent: whether the whole clip is; by default `is_silent(energy)`.
        rate: values of the traces per second.

    Returns:
        speaking, off_screen, silent or unsure, with the correlation as the score.

    Raises:
        TraceError: traces of different lengths, of another rate, or not finite.
    """
    mouth, energy = np.asarray(mouth, np.float64), np.asarray(energy, np.float64)
    others = [np.asarray(a) for a in (upper, voiced) if a is not None]
    if mouth.ndim != 1 or not len(mouth) or any(a.shape != mouth.shape for a in (energy, *others)):
        shapes = [list(a.shape) for a in (mouth, energy, *others)]
        raise TraceError(f"traces of the shapes {shapes}; expected one value per frame in each")
    if rate != RATE:
        raise TraceError(f"traces of {rate:g} values per second; expected {RATE}")
    if not all(np.isfinite(a).all() for a in (mouth, energy, *others)):
        raise TraceError("traces with values that are not finite")
    if voiced is None:
        voiced = voiced_frames(energy)
    share = float(np.mean(voiced))
    if is_silent(energy) if silent is None else silent:
        return Judgement(SILENT, voiced_share=share)
    if not suffice(voiced):
        return Judgement(UNSURE, voiced_share=share)
    dark = -mouth if upper is None else np.asarray(upper, np.float64) - mouth
    score = _best_correlation(_syllables(dark), _syllables(energy))
    if len(mouth) <= 2 * FAR or math.isnan(score):
        return Judgement(UNSURE, score, voiced_share=share)
    chance = _chance(_syllables(dark), _syllables(energy))
    if score >= MATCH and score > chance:
        return Judgement(SPEAKING, score, voiced_share=share)
    strong = score < min(NONE, chance) and len(mouth) >= LEAST_DECIDED
    return Judgement(OFF_SCREEN if strong else UNSURE, score, voiced_share=share)


def suffice(frames: np.ndarray) -> bool:
    """Whether these frames, bool `[T]`, are enough for a word."""
    return int(np.sum(frames)) >= LEAST_VOICED_S * RATE


def audible_frames(energy: np.ndarray) -> np.ndarray:
    """Frames that are no silence, bool `[T]`, however steady the sound is."""
    return np.asarray(energy) > SILENCE_DBFS


def is_silent(energy: np.ndarray) -> bool:
    """Whether nothing is heard in a clip: no voice stands out, and nothing else is audible."""
    return not suffice(voiced_frames(energy)) and not suffice(audible_frames(energy))


def voiced_frames(energy: np.ndarray) -> np.ndarray:
    """Frames that are louder than the clip's quiet ones, bool `[T]`; short pauses are closed."""
    energy = np.asarray(energy, np.float64)
    loud = energy > np.percentile(energy, QUIET_PERCENTILE) + ABOVE_QUIET_DB
    half = CLOSING // 2
    grown = np.convolve(np.pad(loud, half), np.ones(CLOSING), "valid") > 0
    # Beyond the ends nothing is known, so they do not shrink.
    return np.convolve(np.pad(grown, half, constant_values=True), np.ones(CLOSING), "valid") > (
        CLOSING - 0.5
    )


def energy_trace(waveform: np.ndarray, frames: int, sample_rate: int) -> np.ndarray:
    """Energy of the sound in each frame in dB, float64 `[frames]`; silence beyond its end."""
    step = sample_rate // RATE
    padded = np.zeros(frames * step)
    there = min(len(waveform), len(padded))
    padded[:there] = waveform[:there]
    return 10 * np.log10((padded.reshape(frames, step) ** 2).mean(axis=1) + 1e-9)


def _syllables(trace: np.ndarray) -> np.ndarray:
    """A trace without what changes slowly: the mean over `SYLLABLE_FRAMES` is taken off."""
    half = SYLLABLE_FRAMES // 2
    padded = np.pad(trace, half, mode="edge")
    return trace - np.convolve(padded, np.full(SYLLABLE_FRAMES, 1 / SYLLABLE_FRAMES), "valid")


def _correlation(dark: np.ndarray, energy: np.ndarray, delay: int) -> float:
    """Of the mouth `delay` frames later with the sound."""
    if delay < 0:
        return _correlation(energy, dark, -delay)
    a, b = dark[delay:], energy[: len(energy) - delay]
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan


def _best_correlation(dark: np.ndarray, energy: np.ndarray) -> float:
    """The highest at a plausible delay; NaN where a trace does not change at all."""
    if len(dark) <= 2 * FAR:
        return math.nan
    return max(_correlation(dark, energy, delay) for delay in DELAYS)


def _chance(dark: np.ndarray, energy: np.ndarray) -> float:
    """The 95th percentile of the correlations at delays that no recording has."""
    delays = [d for d in range(-len(dark) + FAR, len(dark) - FAR) if abs(d) > FAR]
    return (
        float(np.percentile([_correlation(dark, energy, d) for d in delays], 95)) if delays else 0
    )
