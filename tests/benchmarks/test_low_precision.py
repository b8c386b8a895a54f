"""The benchmark of low precision: both bases run the same updates, and memory goes by shapes."""

import pytest

from benchmarks import low_precision


def test_the_update_with_a_small_base_is_measured_beside_the_plain_one(sides_here, monkeypatch):
    monkeypatch.setitem(low_precision.SHAPES, "small", ("tiny", (2, 16), "none"))
    found = low_precision.speed("small", "int8", updates=2)
    plain, low = sides_here
    assert (plain.workload.config.base_precision, low.workload.config.base_precision) == (
        "",
        "int8",
    )
    assert [side.feed.batch(0)["tokens"].shape for side in sides_here] == [(2, 16)] * 2
    assert len(found["plain_s"]) == len(found["seconds"]) == 2
    ratios = sorted(a / b for a, b in zip(found["plain_s"], found["seconds"]))
    assert found["speed_up"]["lowest"] == pytest.approx(ratios[0])
    assert found["bytes"]["base"] < found["plain_bytes"]["base"]


def test_published_bases_take_what_their_shapes_say():
    held = low_precision.memory()["Qwen2.5-7B-Instruct"]
    assert held["bfloat16"] == 2 * 7_615_616_512  # parameters of the model card's 7.61B
    assert held["int8"] / 2**30 == pytest.approx(8.11, abs=0.01)
    assert held["nf4"] / 2**30 == pytest.approx(5.26, abs=0.01)
