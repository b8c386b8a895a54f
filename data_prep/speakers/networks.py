"""Light-ASD and LR-ASD: does the face that is seen speak the sound that is heard, frame by frame?

Both are networks for active speaker detection, of about a million parameters each: Light-ASD (Liao
et al., CVPR 2023) and LR-ASD (Liao et al., IJCV 2025). They read 4 MFCC frames of the sound for
each grey face of 112 x 112 at 25 frames/s. `load` reads the files that their authors publish, as
`torch.save` wrote them; here they run in JAX, batch normalisation folded into the convolutions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from affectgpt_jax.common.text import listed
from affectgpt_jax.weights import torch_zip
from affectgpt_jax.weights.streaming import WeightsError

Params = dict[str, Any]

NORM_EPSILON = 1e-3
BRIGHTNESS_MEAN, BRIGHTNESS_STD = 0.4161, 0.1688  # of faces in 0..1, as in training
BLOCKS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network.

    Attributes:
        name: what the command line calls it.
        read: makes parameters out of a file's tensors.
        forward: `(params, mfcc [B, 4T, 13], faces [B, T, 112, 112], lengths [B])` -> `[B, T, 2]`.
    """

    name: str
    read: Callable[[_Tensors], Params]
    forward: Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """An architecture with its weights."""

    architecture: Architecture
    params: Params

    def logits(self, mfcc: np.ndarray, faces: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Logits of "silent" and "speaking"; that of "speaking" is the score.

        Args:
            mfcc: float32 `[B, 4T, 13]`, see `mfcc.mfcc`.
            faces: grey `[B, T, 112, 112]`, 0 to 255.
            lengths: int `[B]`, frames that are there; what follows them changes no logit of theirs.

        Returns:
            float32 `[B, T, 2]`.
        """
        return np.asarray(_jitted(self.architecture.forward)(self.params, mfcc, faces, lengths))


@functools.cache
def _jitted(forward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return jax.jit(forward)


def load(path: Path, name: str) -> Network:
    """Read published weights.

    Args:
        path: a file of `torch.save`.
        name: one of `ARCHITECTURES`.

    Raises:
        WeightsError: a file that cannot be read, or is no such network's: a tensor is missing, has
            another shape, or is too many.
    """
    values = torch_zip.load(path)
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds a {type(values).__name__}; expected a dict of tensors")
    tensors = _Tensors(path, name, values)
    params = ARCHITECTURES[name].read(tensors)
    tensors.check_all_used()
    return Network(ARCHITECTURES[name], params)


class _Tensors:
    """The tensors of a file, which keeps account of what was read."""

    def __init__(self, path: Path, network: str, values: dict[str, Any]):
        self._where, self._network, self._values = path, network, values
        self._used: set[str] = set()

    def __call__(self, key: str, *shape: int) -> np.ndarray:
        """A tensor of this shape, as float64."""
        found = self._values.get(key)
        if not isinstance(found, torch_zip.Tensor):
            raise WeightsError(f"{self._where} lacks {key}: it is no file of {self._network}")
        if found.shape != shape:
            raise WeightsError(
                f"{self._where}: {key} has the shape {list(found.shape)}; {self._network} has "
                f"{list(shape)}"
            )
        self._used.add(key)
        values = found.numpy().astype(np.float64)
        if not np.isfinite(values).all():
            raise WeightsError(f"{self._where}: {key} holds values that are not finite")
        return values

    def check_all_used(self) -> None:
        """Raise WeightsError where the file has more than the network.

        A head for the picture alone is of use in training only, and so are counters of batches.
        """
        others = [
            key
            for key in self._values
            if key not in self._used
            and not str(key).startswith("lossV.")
            and not str(key).endswith(".num_batches_tracked")
        ]
        if others:
            raise WeightsError(
                f"{self._where} has tensors that {self._network} has not: {listed(others)}"
            )

    def convolution(self, key: str, norm: str, out: int, into: int, *kernel: int) -> Params:
        """A convolution without a bias, and the batch normalisation behind it, as one.

        Returns:
            `kernel [*kernel, in, out]` without the axes of length 1 that 3-D kernels have in front
            or at the end, and `bias [out]`.
        """
        weight = self(f"{key}.weight", out, into, *kernel)
        scale, shift = self._norm(norm, out)
        weight = np.moveaxis(weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), (0, 1), (-1, -2))
        return {"kernel": weight.astype(np.float32), "bias": shift.astype(np.float32)}

    def _norm(self, key: str, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift that batch normalisation amounts to."""
        weight, bias = self(f"{key}.weight", size), self(f"{key}.bias", size)
        mean, variance = self(f"{key}.running_mean", size), self(f"{key}.running_var", size)
        scale = weight / np.sqrt(variance + NORM_EPSILON)
        return scale, bias - mean * scale

    def linear(self, key: str, out: int, into: int) -> Params:
        """`kernel [in, out]` and `bias [out]`."""
        kernel, bias = self(f"{key}.weight", out, into).T, self(f"{key}.bias", out)
        return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}

    def gate(self, key: str, size: int) -> Params:
        """A 1x1 convolution over `size` channels and its batch normalisation, as a linear layer."""
        layer = self.convolution(f"{key}.attention", f"{key}.bn", size, size, 1)
        return layer | {"kernel": layer["kernel"][0]}

    def gru(self, key: str, size: int, into: int) -> Params:
        """`input` and `state`: kernels `[in, 3 size]` and biases, gates in PyTorch's order."""
        parts = {"input": ("ih", into), "state": ("hh", size)}
        return {
            part: {
                "kernel": self(f"{key}.weight_{n}_l0", 3 * size, width).T.astype(np.float32),
                "bias": self(f"{key}.bias_{n}_l0", 3 * size).astype(np.float32),
            }
            for part, (n, width) in parts.items()
        }


# --- layers: pictures are [B, T, H, W, C], sound is [B, T, M, 1, C] -------------------------------


def _affine(x: jax.Array, layer: Params) -> jax.Array:
    return jnp.dot(x, layer["kernel"], precision=lax.Precision.HIGHEST) + layer["bias"]


def _within_frames(x: jax.Array, layer: Params, stride: int = 1) -> jax.Array:
    """Convolve each frame over its own axes, then ReLU."""
    batch, time = x.shape[:2]
    y = _convolve(x.reshape(-1, *x.shape[2:]), layer, (stride, stride))
    return jax.nn.relu(y).reshape(batch, time, *y.shape[1:])


def _over_time(x: jax.Array, layer: Params, mask: jax.Array) -> jax.Array:
    """Convolve over time, then ReLU; frames that are not there are zeros, as beyond the edge."""
    batch, time, height, width, channels = x.shape
    x = jnp.where(mask[:, :, None, None, None], x, 0)
    y = _convolve(x.reshape(batch, time, height * width, channels), layer, (1, 1))
    return jax.nn.relu(y).reshape(batch, time, height, width, -1)


def _convolve(x: jax.Array, layer: Params, strides: tuple[int, int]) -> jax.Array:
    """`[N, H, W, C]` with `kernel // 2` zeros around it."""
    kernel = layer["kernel"]
    padding = [(k // 2, k // 2) for k in kernel.shape[:2]]
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimensions, precision=lax.Precision.HIGHEST
    )
    return y + layer["bias"]


def _pool(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Halve axes by the maximum of 3; what is pooled is not negative."""
    window = [3 if axis in axes else 1 for axis in range(x.ndim)]
    strides = [2 if axis in axes else 1 for axis in range(x.ndim)]
    padding = [(1, 1) if axis in axes else (0, 0) for axis in range(x.ndim)]
    return lax.reduce_window(x, 0.0, lax.max, window, strides, padding)


def _gru(x: jax.Array, layer: Params, mask: jax.Array, reverse: bool = False) -> jax.Array:
    """States `[B, T, H]`; frames that are not there leave the state as it is."""
    inputs = _affine(x, layer["input"])
    size = inputs.shape[-1] // 3

    def step(state: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        given, there = now
        own = _affine(state, layer["state"])
        gates = jax.nn.sigmoid(given[:, : 2 * size] + own[:, : 2 * size])
        reset, update = gates[:, :size], gates[:, size:]
        new = jnp.tanh(given[:, 2 * size :] + reset * own[:, 2 * size :])
        state = jnp.where(there[:, None], (1 - update) * new + update * state, state)
        return state, state

    start = jnp.zeros((x.shape[0], size), x.dtype)
    over_time = jnp.moveaxis(inputs, 1, 0), mask.T
    return jnp.moveaxis(lax.scan(step, start, over_time, reverse=reverse)[1], 0, 1)


def _masks(faces: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    """Which of `[B, 4T]`, `[B, 2T]` and `[B, T]` frames are there."""
    time = faces.shape[1]
    return tuple(jnp.arange(n * time)[None] < n * lengths[:, None] for n in (4, 2, 1))


Block = Callable[[jax.Array, Params, jax.Array, int], jax.Array]


def _encode(
    params: Params, block: Block, mfcc: jax.Array, faces: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two encoders, which differ between the networks in their blocks only.

    Returns:
        Of sound and of pictures, `[B, T, 128]` each.
    """
    masks = _masks(faces, lengths)
    heard = mfcc[..., None, None].astype(jnp.float32)
    for number, mask in zip(BLOCKS, masks):
        heard = block(heard, params[f"audio{number}"], mask, 1)
        if number < BLOCKS[-1]:
            heard = _pool(jnp.where(mask[:, :, None, None, None], heard, 0), (1,))
    seen = (faces[..., None].astype(jnp.float32) / 255 - BRIGHTNESS_MEAN) / BRIGHTNESS_STD
    for number in BLOCKS:
        seen = block(seen, params[f"visual{number}"], masks[-1], 2 if number == 1 else 1)
        if number < BLOCKS[-1]:
            seen = _pool(seen, (2, 3))
    return heard.mean(axis=(2, 3)), seen.max(axis=(2, 3))


# --- Light-ASD ------------------------------------------------------------------------------------

WIDTHS = {1: (1, 32), 2: (32, 64), 3: (64, 128)}


def _kernels(stream: str, size: int) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Letter of the convolution within a frame, and shapes of a kernel within and over time."""
    if stream == "visual":
        return "s", (1, size, size), (size, 1, 1)
    return "m", (size, 1), (1, size)


def _within(layer: Params) -> Params:
    """A kernel within frames as `[H, W, in, out]`, of `[1, H, W, ...]` or `[M, 1, ...]`."""
    kernel = layer["kernel"]
    return layer | {"kernel": kernel[0] if kernel.ndim == 5 else kernel}


def _along(layer: Params) -> Params:
    """A kernel over time as `[T, 1, in, out]`, of `[T, 1, 1, ...]` or `[1, T, ...]`."""
    kernel = layer["kernel"]
    return layer | {"kernel": kernel.reshape(-1, 1, *kernel.shape[-2:])}


def _read_light(tensors: _Tensors) -> Params:
    params: Params = {}
    for stream in ("visual", "audio"):
        for number, (into, out) in WIDTHS.items():
            prefix = f"model.{stream}Encoder.block{number}"
            block = params[f"{stream}{number}"] = {}
            for size in (3, 5):
                letter, within, along = _kernels(stream, size)
                block[f"within{size}"] = _within(
                    tensors.convolution(
                        f"{prefix}.{letter}_{size}",
                        f"{prefix}.bn_{letter}_{size}",
                        *(out, into, *within),
                    )
                )
                block[f"along{size}"] = _along(
                    tensors.convolution(
                        f"{prefix}.t_{size}", f"{prefix}.bn_t_{size}", out, out, *along
                    )
                )
            ones = [1] * len(_kernels(stream, 1)[1])
            last = tensors.convolution(f"{prefix}.last", f"{prefix}.bn_last", out, out, *ones)
            block["last"] = last | {"kernel": last["kernel"].reshape(out, out)}
    for name in ("forward", "backward"):
        params[name] = tensors.gru(f"model.GRU.gru_{name}", 128, 128)
    return params | {"head": tensors.linear("lossAV.FC", 2, 128)}


def _light_block(x: jax.Array, block: Params, mask: jax.Array, stride: int) -> jax.Array:
    branches = (
        _over_time(_within_frames(x, block[f"within{size}"], stride), block[f"along{size}"], mask)
        for size in (3, 5)
    )
    return jax.nn.relu(_affine(sum(branches), block["last"]))


def _light(params: Params, mfcc: jax.Array, faces: jax.Array, lengths: jax.Array) -> jax.Array:
    x = sum(_encode(params, _light_block, mfcc, faces, lengths))
    mask = _masks(faces, lengths)[-1]
    x = jax.nn.gelu(_gru(x, params["forward"], mask), approximate=False)
    x = jax.nn.gelu(_gru(x, params["backward"], mask, reverse=True), approximate=False)
    return _affine(x, params["head"])


# --- LR-ASD ---------------------------------------------------------------------------------------


def _read_lr(tensors: _Tensors) -> Params:
    params: Params = {}
    for stream in ("visual", "audio"):
        for number, (into, out) in WIDTHS.items():
            prefix = f"model.{stream}Encoder.block{number}"
            block = params[f"{stream}{number}"] = {}
            for place, size, (a, b) in ((1, 5, (into, out // 2)), (2, 3, (out // 2, out))):
                letter, within, along = _kernels(stream, size)
                block[f"within{place}"] = _within(
                    tensors.convolution(
                        f"{prefix}.{letter}_{place}",
                        f"{prefix}.{letter}_norm_{place}",
                        *(b, a, *within),
                    )
                )
                block[f"along{place}"] = _along(
                    tensors.convolution(
                        f"{prefix}.t_{place}", f"{prefix}.t_norm_{place}", out, out, *along
                    )
                )
    params["fusion"] = tensors.gate("model.fusion", 256)
    for name in ("forward", "backward"):
        params[name] = tensors.gru(f"model.detector.gru_{name}", 64, 256)
    params["gate"] = tensors.gate("model.detector.attention", 128)
    return params | {"head": tensors.linear("lossAV.FC", 2, 128)}


def _lr_block(x: jax.Array, block: Params, mask: jax.Array, stride: int) -> jax.Array:
    x = _within_frames(_within_frames(x, block["within1"], stride), block["within2"])
    return _over_time(_over_time(x, block["along1"], mask), block["along2"], mask)


def _gated(x: jax.Array, gate: Params) -> jax.Array:
    return jax.nn.sigmoid(_affine(x, gate)) * x


def _lr(params: Params, mfcc: jax.Array, faces: jax.Array, lengths: jax.Array) -> jax.Array:
    mask = _masks(faces, lengths)[-1]
    x = jnp.concatenate(_encode(params, _lr_block, mfcc, faces, lengths), axis=-1)
    x = _gated(x, params["fusion"])
    states = [_gru(x, params[n], mask, reverse=n == "backward") for n in ("forward", "backward")]
    return _affine(_gated(jnp.concatenate(states, axis=-1), params["gate"]), params["head"])


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("light-asd", _read_light, _light),
        Architecture("lr-asd", _read_lr, _lr),
    )
}
