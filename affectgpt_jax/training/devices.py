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
# The first compute capability whose tensor cores multiply fp8 (Ada): NVIDIA's Ada and Hopper tuning
# guides.
FP8_CAPABILITY = (8, 9)

# `device_kind` of a JAX device, CUDA's name of the card without its maker -> name in `DEVICES`.
KINDS = {
    "A100-SXM4-40GB": "a100-40g",
    "A100-SXM4-80GB": "a100-80g",
    "H100 80GB HBM3": "h100-80g",
    "H200": "h200-141g",
    "B200": "b200-180g",
}
# The same chips on other boards, of which only the FLOP/s matter here: data sheets of the A100 and
# H100 (PCIe: 1,513 TFLOPS with sparsity), and of H100 NVL and H200 NVL (1,671). GH200 is an H100.
_FLOPS = {
    "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "GH200 480GB": 989e12,
    "GH200 120GB": 989e12,
}


def find(kind: str) -> Device | None:
    """The entry of `DEVICES` for `jax.Device.device_kind`; None for a device that is not there."""
    name = KINDS.get(kind.removeprefix("NVIDIA "))
    return DEVICES[name] if name else None


def peak_flops(kind: str, dtype: str) -> float | None:
    """Dense FLOP/s of a device in a dtype, of which MFU is the share; None where it is not known.

    A base in 8 or 4 bits is measured by bfloat16's peak as well, so that its MFU can be compared.

    Args:
        kind: `jax.Device.device_kind`. A slice of a GPU (MIG) has a name of its own and no peak.
        dtype: of activations, by name; of float32, which runs as TF32 or not, no peak is given.
    """
    if dtype not in ("bfloat16", "float16"):
        return None
    device = find(kind)
    return device.flops if device else _FLOPS.get(kind.removeprefix("NVIDIA "))
