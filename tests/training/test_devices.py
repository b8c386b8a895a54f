"""Data sheets by the names that devices give themselves."""

import pytest

from affectgpt_jax.training.devices import DEVICES, KINDS, find, peak_flops


def test_every_device_of_the_table_is_found_by_the_name_that_cuda_gives_it():
    assert sorted(KINDS.values()) == sorted(DEVICES)
    for kind, name in KINDS.items():
        # Drivers before 470 leave the maker out.
        assert find(kind) is find(f"NVIDIA {kind}") is DEVICES[name]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 PCIe", 756e12),  # the same chip at a lower clock
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of it
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_that_of_the_devices_kind_in_bfloat16(kind, peak):
    assert peak_flops(kind, "bfloat16") == peak
    assert peak_flops(kind, "float32") is None
