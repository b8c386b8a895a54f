"""What a GPU can do at most, from its maker's data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """Peaks of one GPU in a node of eight, as it is sold for training.

    Attributes:
        name: for people.
        compute_capability: as CUDA counts them.
        memory: bytes that CUDA reports, a little under the data sheet's for the driver's share.
        flops: dense bfloat16 FLOP/s with float32 sums.
        flops_8bit: dense operations/s of 8-bit matmuls: int8, and fp8 where the device has it.
        hbm: bytes/s from and to its memory.
        nvlink: bytes/s to the other GPUs of its node, in one direction.
        network: bytes/s to other nodes, in one direction: its share of the node's adapters.
    """

    name: str
    compute_capability: tuple[int, int]
    memory: int
    flops: float
    flops_8bit: float
    hbm: float
    nvlink: float
    network: float


_GIB = 2**30
# A100: NVIDIA's A100 data sheet (nvidia-1758950-r4), SXM: 312 TFLOPS, in int8 624 TOPS, 1,555 and
# 2,039 GB/s, NVLink 600 GB/s in both directions together. DGX A100 data sheet: eight 200 Gb/s
# InfiniBand adapters.
# H100: H100 data sheet, SXM: 1,979 TFLOPS with sparsity, so 989 without, and twice that in 8 bits;
# 3.35 TB/s, NVLink 900.
# H200: H200 data sheet: the same, with 4.8 TB/s. DGX H100 and H200: eight 400 Gb/s adapters.
# B200: DGX B200 data sheet, for eight GPUs: 64 TB/s, NVLink 14.4 TB/s, eight 400 Gb/s adapters; HGX
# B200: 4.5 PFLOPS a GPU with sparsity, so 2.25 without, and twice that in 8 bits.
DEVICES = {
    "a100-40g": Device(
        "A100-SXM4-40GB", (8, 0), int(39.4 * _GIB), 312e12, 624e12, 1.555e12, 300e9, 25e9
    ),
    "a100-80g": Device(
        "A100-SXM4-80GB", (8, 0), int(79.1 * _GIB), 312e12, 624e12, 2.039e12, 300e9, 25e9
    ),
    "h100-80g": Device(
        "H100-SXM5-80GB", (9, 0), int(79.1 * _GIB), 989e12, 1979e12, 3.35e12, 450e9, 50e9
    ),
    "h200-141g": Device(
        "H200-SXM-141GB", (9, 0), int(139.8 * _GIB), 989e12, 1979e12, 4.8e12, 450e9, 50e9
    ),
    "b200-180g": Device(
        "B200-SXM-180GB", (10, 0), int(178.3 * _GIB), 2250e12, 4500e12, 8e12, 900e9, 50e9
    ),
}
GPUS_PER_NODE = 8
