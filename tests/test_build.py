"""What a config leaves to the machine: layers in a row or in a loop, and attention."""

import dataclasses

import jax
import pytest

from affectgpt_jax import build
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.models import xla_packed
from affectgpt_jax.models.decoder import PUBLISHED

SMALL = dataclasses.replace(PUBLISHED["Qwen2.5-0.5B-Instruct"], num_hidden_layers=12)
DEEP = dataclasses.replace(SMALL, num_hidden_layers=13)


def machine(monkeypatch, platform, devices):
    monkeypatch.setattr(build, "device_platform", lambda: platform)
    monkeypatch.setattr(build, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(jax, "device_count", lambda: devices)


def config(**changes):
    found = affectgpt_qwen25_7b.get_config()
    found.update(changes)
    return found


@pytest.mark.parametrize(
    ("platform", "devices", "llm", "changes", "unrolled"),
    [
        ("cpu", 1, SMALL, {}, True),
        ("cpu", 1, DEEP, {}, False),
        ("cpu", 1, SMALL, {"base_precision": "nf4"}, False),
        ("cpu", 1, SMALL, {"unroll_layers": "false"}, False),
        ("cpu", 8, SMALL, {}, False),
        ("cuda", 1, SMALL, {}, False),
        ("cuda", 1, DEEP, {"unroll_layers": "true"}, True),
    ],
)
def test_layers_stand_in_a_row_where_that_is_fast_to_run_and_to_compile(
    monkeypatch, platform, devices, llm, changes, unrolled
):
    machine(monkeypatch, platform, devices)
    # Attention of a GPU that is not there cannot be chosen.
    model = build.model(config(**changes), llm, attend=xla_packed.attend)
    assert model.decoder.compute.unroll is unrolled


@pytest.mark.parametrize(("devices", "name"), [(1, "xla_packed"), (8, "xla")])
def test_packed_rows_on_one_cpu_are_attended_block_by_block(monkeypatch, devices, name):
    machine(monkeypatch, "cpu", devices)
    assert build.attention(config(pack_length=2048), SMALL).name == name
