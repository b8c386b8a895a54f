"""The least time that an update can take on given GPUs, and how that changes with their number.

Three terms, as in the roofline model (Williams, Waterman & Patterson 2009): matmuls at the device's
FLOP/s, memory traffic at its bandwidth, and collectives as rings at the bandwidth of the links that
they cross. Bandwidths are the makers' peaks and latency is left out, so a step takes at least as
long as the longest of the three. The expected time is longer: see `StepTime`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from affectgpt_jax.models.decoder import DecoderConfig
from affectgpt_jax.models.flops import Flops
from affectgpt_jax.training.collectives import Collective
from affectgpt_jax.training.devices import FP8_CAPABILITY, GPUS_PER_NODE, Device
from affectgpt_jax.training.hlo_traffic import Launch, Sent


class Shape(NamedTuple):
    """Sizes of a mesh's axes; devices along the last axis are neighbours."""

    data: int
    fsdp: int
    tensor: int


# Share of the peak that large training runs reach: 52 % on 3,072 A100s (Narayanan et al. 2021,
# arXiv 2104.04473). Smaller shares are common, larger ones rare.
EFFICIENCY = 0.5


class StepTime(NamedTuple):
    """Seconds of an update on one of many equal devices.

    Attributes:
        compute: matmuls at the device's peak.
        memory: bytes that cross the memory bus at least once, at its bandwidth.
        network: collectives, one after the other.
        efficiency: the expected share of the peaks.
    """

    compute: float
    memory: float
    network: float
    efficiency: float = EFFICIENCY

    @property
    def floor(self) -> float:
        """All three at their peaks and overlapped: the lower bound."""
        return max(self.compute, self.memory, self.network)

    @property
    def expected(self) -> float:
        """The device at `efficiency`, without overlap of collectives and computation."""
        return max(self.compute, self.memory) / self.efficiency + self.network


def executed_flops(flops: Flops, remat: str) -> float:
    """FLOPs of an update, including those that a rematerialisation policy recomputes.

    Flash kernels and plain XLA's blocks always recompute scores; by convention that is not counted.

    Args:
        flops: of forward and backward pass.
        remat: "none"; "save_attention", which repeats no product; "save_projections", which keeps
            projections and repeats attention; or "full".
    """
    # A frozen weight has one matmul forward and one backward, a trained one two backward.
    again = {
        "none": 0.0,
        "save_attention": 0.0,
        "save_projections": flops.attention / 3,
        "full": flops.frozen / 2 + flops.adapters / 3 + flops.attention / 3,
    }
    return flops.total + again[remat]


# Shares of its peaks that a good step may come near to: what well-tuned matmuls reach of the
# FLOP/s, and passes over memory of the bandwidth.
MATMUL_SHARE, BANDWIDTH_SHARE = 0.7, 0.9


def compiled_floor(
    flops: Flops,
    remat: str,
    moved: float,
    device: Device,
    dtype: str,
    precision: str,
    network: float = 0.0,
) -> float:
    """Seconds below which a compiled update will hardly come, one launch after the other.

    Matmuls and attention at `MATMUL_SHARE` of the device's peak, after them the bytes of everything
    else at `BANDWIDTH_SHARE` of its bandwidth, and the collectives that nothing hides.

    Args:
        flops: of a device's part of an update, forward and backward.
        remat: the policy, as for `executed_flops`.
        moved: bytes of the launches that are neither large matmuls nor attention kernels nor
            collectives.
        device: the GPU.
        dtype: of activations.
        precision: of the base's projections, `config.base_precision`.
        network: seconds of collectives that run alone, see `sent_times`.
    """
    executed = executed_flops(flops, remat)
    projections = executed_flops(Flops(flops.frozen, 0, 0, 0), remat)
    peak = matmul_peak(device, dtype)
    fast = device.flops_8bit if eight_bit_matmuls(device, precision) else peak
    seconds = projections / fast + (executed - projections) / peak
    return seconds / MATMUL_SHARE + moved / (BANDWIDTH_SHARE * device.hbm) + network


def launch_floor(launches: Sequence[Launch], device: Device, dtype: str) -> float:
    """Seconds below which a compiled program will hardly come, one launch after the other.

    Each takes what its matmul takes at `MATMUL_SHARE` of the peak, or its bytes at
    `BANDWIDTH_SHARE` of the bandwidth, whichever is longer. Arithmetic of a library's attention
    kernels is not known, so of those the bytes alone count.

    Args:
        launches: of the program, see `hlo_traffic.launches`.
        device: the GPU.
        dtype: of activations.
    """
    bandwidth = BANDWIDTH_SHARE * device.hbm
    peak = MATMUL_SHARE * matmul_peak(device, dtype)
    return math.fsum(max(x.bytes / bandwidth, x.times * x.flops / peak) for x in launches)


def matmul_peak(device: Device, dtype: str) -> float:
    """FLOP/s of matmuls: those of float32 run as TF32, at half of bfloat16's rate on all of these
    devices."""
    return device.flops / (2 if dtype == "float32" else 1)


def eight_bit_matmuls(device: Device, precision: str) -> bool:
    """Whether the device multiplies kernels of this `config.base_precision` as they are."""
    fp8 = device.compute_capability >= FP8_CAPABILITY
    return precision == "int8" or (precision == "fp8" and fp8)


def memory_traffic(
    config: DecoderConfig,
    *,
    weights: int,
    gathered: bool,
    state: int,
    activations: int,
    targets: int,
    passes: int,
) -> int:
    """Bytes that an update moves between a device and its memory at least.

    Args:
        config: shape of the decoder.
        weights: bytes of the frozen weights that the device multiplies with.
        gathered: whether they come from other devices and are written before they are read.
        state: bytes of what is trained, its optimizer state and gradient, read and written once.
        activations: bytes of them, written once and read by the backward pass.
        targets: supervised positions. Their float32 logits are written and read once, and so is
            their bfloat16 gradient.
        passes: over the weights: forward and backward for every part of a batch.
    """
    logits = targets * config.vocab_size * (2 * 4 + 2 * 2)
    return passes * weights * (2 if gathered else 1) + 2 * state + 2 * activations + logits


def network_time(collectives: Sequence[Collective], shape: Shape, device: Device) -> float:
    """Seconds that collectives take one after the other on a mesh of this shape."""
    return sum(_collective_time(c, shape, device) for c in collectives)


def sent_times(sent: Sent, shape: Shape, device: Device, dtype: str) -> tuple[float, float]:
    """Seconds that equal collectives of a compiled step take, and in which of them they run alone.

    At `BANDWIDTH_SHARE` of the links' bandwidth. The large matmuls that stand between start and end
    of a collective hide as much of it as they take at `MATMUL_SHARE` of the device's peak.

    Args:
        sent: the collectives.
        shape: of the mesh.
        device: the GPU.
        dtype: of activations.
    """
    one = Collective(sent.kind, sent.axes, 1, sent.bytes)
    each = _collective_time(one, shape, device) / BANDWIDTH_SHARE
    beside = sent.overlapped_flops / (MATMUL_SHARE * matmul_peak(device, dtype))
    return sent.count * each, sent.count * max(0.0, each - beside)


def _collective_time(collective: Collective, shape: Shape, device: Device) -> float:
    """A ring inside each node and rings across nodes, both at the same time."""
    near, nodes = spread(collective.axes, shape)
    inside = _ring_share(collective.kind, near) * collective.bytes / device.nvlink
    # Of every byte that a node's members share, each fetches its part.
    across = _ring_share(collective.kind, nodes) * collective.bytes / (near * device.network)
    return max(inside, across)


def spread(axes: Sequence[str], shape: Shape) -> tuple[int, int]:
    """Members of a group in one node, and nodes that it spans."""
    near, nodes, stride = 1, 1, 1
    for axis, size in reversed(shape._asdict().items()):
        if axis in axes:
            inside = min(size, max(1, GPUS_PER_NODE // stride))
            near, nodes = near * inside, nodes * math.ceil(size / inside)
        stride *= size
    return near, nodes


def _ring_share(kind: str, members: int) -> float:
    """How much of an array each member sends: Patarasuk & Yuan 2009 for rings."""
    if members == 1:
        return 0.0
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (members - 1) / members


class Sizes(NamedTuple):
    """Bytes that determine the collectives of a step.

    Attributes:
        layers: frozen weights of all layers that fsdp splits, gathered.
        lm_head: the lm_head.
        adapters: gradients of LoRA, in the dtype in which devices add them up.
        fusion: gradients of projectors and pre-fusion.
        hidden: hidden states of one layer and one microbatch.
        num_layers: of the decoder.
        microbatches: of a batch.
    """

    layers: int
    lm_head: int
    adapters: int
    fusion: int
    hidden: int
    num_layers: int
    microbatches: int


def model_collectives(sizes: Sizes, shape: Shape, remat: str) -> list[Collective]:
    """The collectives of a step by formula, for layouts that have not been compiled.

    data: one all-reduce of the gradients. fsdp: the same, and all-gathers of the layers' weights in
    the forward and in the backward pass, and of the lm_head in the forward pass alone, which
    computes its gradient too. tensor: all-reduces of hidden states, two a layer in the forward pass
    (the outputs of two projections), two in the backward pass (the inputs of the others, those of
    one input added up), one more where the layer is recomputed, and one for the lookup of the
    embeddings.
    """
    found: list[Collective] = []

    def add(kind: str, axes: tuple[str, ...], times: int, size: int) -> None:
        count = sizes.microbatches * times
        found.append(Collective(kind, axes, count, count * size))

    if shape.fsdp > 1:
        split = sizes.layers // shape.tensor
        add("all-gather", ("fsdp",), 1, 2 * split + sizes.lm_head // shape.tensor)
    if shape.tensor > 1:
        times = (5 if remat == "full" else 4) * sizes.num_layers + 1
        add("all-reduce", ("tensor",), times, sizes.hidden)
    axes = tuple(axis for axis in ("data", "fsdp") if getattr(shape, axis) > 1)
    if axes:
        add("all-reduce", axes, 1, sizes.adapters + sizes.fusion)
    return found


def forward_collectives(sizes: Sizes, shape: Shape) -> list[Collective]:
    """The same of a forward pass alone: nothing over data, where rows are apart."""
    found = []
    if shape.fsdp > 1:
        size = (sizes.layers + sizes.lm_head) // shape.tensor
        found.append(Collective("all-gather", ("fsdp",), 1, size))
    if shape.tensor > 1:
        times = 2 * sizes.num_layers + 1
        found.append(Collective("all-reduce", ("tensor",), times, times * sizes.hidden))
    return found
