"""The least time that an update can take on given GPUs, and how that changes with their number.

Three terms, as in the roofline model (Williams, Waterman & Patterson 2009): products at the
device's FLOP/s, memory traffic at its bandwidth, and collectives as rings at the bandwidth of the
links that they cross. Bandwidths are the makers' peaks, and latency is left out, so a step takes at
least as long as the longest of the three. What is to be expected is longer: see `StepTime`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from affectgpt_jax.models.decoder import DecoderConfig
from affectgpt_jax.models.flops import Flops
from affectgpt_jax.training.collectives import Collective
from affectgpt_jax.training.devices import GPUS_PER_NODE, Device


class Shape(NamedTuple):
    """Sizes of a mesh's axes, of which the last are neighbours."""

    data: int
    fsdp: int
    tensor: int


# Share of the peak that training reaches where nothing else holds it up: 52 % on A100s, 3,072 of
# them (Narayanan et al. 2021, arXiv 2104.04473). Smaller shares are common, larger ones are rare.
EFFICIENCY = 0.5


class StepTime(NamedTuple):
    """Seconds of an update on one of many equal devices.

    Attributes:
        compute: products, at the device's peak.
        memory: bytes that have to cross the memory bus at least once.
        network: collectives, one after the other.
        efficiency: share of the device's peaks that is expected.
    """

    compute: float
    memory: float
    network: float
    efficiency: float = EFFICIENCY

    @property
    def floor(self) -> float:
        """All at its peak and at the same time: nothing is faster."""
        return max(self.compute, self.memory, self.network)

    @property
    def expected(self) -> float:
        """The device at `efficiency`, and no collective hidden behind its work."""
        return max(self.compute, self.memory) / self.efficiency + self.network


def executed_flops(flops: Flops, remat: str) -> float:
    """FLOPs that run, those included that a rematerialisation policy computes twice.

    Flash kernels and plain XLA's blocks always compute scores again; the kernels' makers do not
    count that, nor is it counted here.

    Args:
        flops: of forward and backward pass.
        remat: "none"; "save_projections", which keeps projections and repeats attention; or "full".
    """
    # A frozen weight has a forward product and one backward, a trained one two.
    again = {
        "none": 0.0,
        "save_projections": flops.attention / 3,
        "full": flops.frozen / 2 + flops.adapters / 3 + flops.attention / 3,
    }
    return flops.total + again[remat]


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
    """What the collectives of a step follow from, in bytes.

    Attributes:
        layers: frozen weights of all layers that fsdp splits, whole.
        vocabulary: of the projection onto the vocabulary.
        adapters: LoRA's gradients, in the dtype in which devices add them up.
        fusion: gradients of heads and pre-fusion.
        hidden: hidden states of the rows that run at a time, of one layer.
        num_layers: of the decoder.
        parts: of a batch that run one after the other.
    """

    layers: int
    vocabulary: int
    adapters: int
    fusion: int
    hidden: int
    num_layers: int
    parts: int


def model_collectives(sizes: Sizes, shape: Shape, remat: str) -> list[Collective]:
    """The collectives of a step by formula, for layouts that have not been compiled.

    data: one all-reduce of the gradients. fsdp: the same, and the weights of the layers brought
    together by the forward and by the backward pass, those of the vocabulary by the forward pass
    alone, which computes its gradient. tensor: the output of two projections of a layer is added up
    in the forward pass, what goes back through five others in the backward pass, and one more where
    it is computed again; the lookup in the embeddings is one more.
    """
    found = []
    split = sizes.layers // shape.tensor
    if shape.fsdp > 1:
        whole = 2 * split + sizes.vocabulary // shape.tensor
        found.append(Collective("all-gather", ("fsdp",), sizes.parts, sizes.parts * whole))
    if shape.tensor > 1:
        times = (8 if remat == "full" else 7) * sizes.num_layers + 1
        found.append(
            Collective(
                "all-reduce", ("tensor",), sizes.parts * times, sizes.parts * times * sizes.hidden
            )
        )
    axes = tuple(axis for axis in ("data", "fsdp") if getattr(shape, axis) > 1)
    if axes:
        gradients = sizes.adapters + sizes.fusion
        found.append(Collective("all-reduce", axes, sizes.parts, sizes.parts * gradients))
    return found
