"""Mel-frequency cepstral coefficients, as the published networks for active speakers read them.

The numbers are those of the package python_speech_features with its defaults: 16 kHz, windows of
25 ms every 10 ms, 26 mel filters up to 8 kHz, 13 coefficients with lifter 22, and the log of the
window's energy in place of the first.
"""

from __future__ import annotations

import functools

import numpy as np

SAMPLE_RATE = 16_000
WINDOW, STEP = 400, 160  # samples
FFT = 512
FILTERS, COEFFICIENTS, LIFTER = 26, 13, 22
PRE_EMPHASIS = 0.97
PER_FRAME = 4  # windows for each picture, at 25 a second
FULL_SCALE = 32_768  # the networks saw samples of 16 bits


def mfcc(waveform: np.ndarray, frames: int) -> np.ndarray:
    """Coefficients of the first windows.

    Args:
        waveform: float `[N]` at 16 kHz, within -1 to 1; silence follows its end.
        frames: windows, 100 a second.

    Returns:
        float32 `[frames, 13]`.
    """
    length = (frames - 1) * STEP + WINDOW
    signal = np.zeros(length)
    there = min(length, len(waveform))
    # Of 16 bits, which also makes digital silence the same for every decoder.
    signal[:there] = np.round(np.asarray(waveform[:there], np.float64) * FULL_SCALE)
    signal[1:there] -= PRE_EMPHASIS * signal[: there - 1]
    windows = np.lib.stride_tricks.sliding_window_view(signal, WINDOW)[::STEP]
    power = np.abs(np.fft.rfft(windows, FFT)) ** 2 / FFT
    smallest = np.finfo(np.float64).eps
    energy = power.sum(axis=1)
    bands = power @ _filters().T
    energy, bands = (np.where(x == 0, smallest, x) for x in (energy, bands))
    out = np.log(bands) @ _cosines()
    out[:, 0] = np.log(energy)
    return out.astype(np.float32)


@functools.cache
def _filters() -> np.ndarray:
    """Triangles between neighbours that are equally spaced in mel, `[26, 257]`."""
    highest = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, highest, FILTERS + 2) / 2595) - 1)
    corners = np.floor((FFT + 1) * hertz / SAMPLE_RATE)[:, None]
    bins = np.arange(FFT // 2 + 1)
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (bins - left) / np.maximum(middle - left, 1)
    falling = (right - bins) / np.maximum(right - middle, 1)
    # The peak belongs to the side that falls, and the last bin to none.
    inside = (bins >= left) & (bins < right)
    return np.where(inside, np.where(bins < middle, rising, falling), 0)


@functools.cache
def _cosines() -> np.ndarray:
    """The orthonormal DCT-II of 26 values, cut off and liftered, `[26, 13]`."""
    n, k = np.arange(FILTERS)[:, None], np.arange(COEFFICIENTS)
    table = np.cos(np.pi * k * (2 * n + 1) / (2 * FILTERS)) * np.sqrt(2 / FILTERS)
    table[:, 0] /= np.sqrt(2)
    return table * (1 + LIFTER / 2 * np.sin(np.pi * k / LIFTER))
