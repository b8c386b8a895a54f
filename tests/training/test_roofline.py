"""Times by hand: what crosses which link, and how often weights and activations move."""

import pytest

from affectgpt_jax.models.decoder import PUBLISHED
from affectgpt_jax.models.flops import Flops
from affectgpt_jax.training import roofline
from affectgpt_jax.training.collectives import Collective
from affectgpt_jax.training.devices import DEVICES
from affectgpt_jax.training.hlo_traffic import Sent
from affectgpt_jax.training.roofline import Shape, Sizes, StepTime

A100 = DEVICES["a100-80g"]  # 300 GB/s inside a node, 25 GB/s a GPU outside


def seconds(kind, axes, shape, size=1e9):
    return roofline.network_time([Collective(kind, axes, 1, int(size))], shape, A100)


@pytest.mark.parametrize(
    ("shape", "axes", "near", "nodes"),
    [
        (Shape(8, 1, 1), ("data",), 8, 1),
        (Shape(64, 1, 1), ("data",), 8, 8),
        (Shape(8, 8, 1), ("fsdp",), 8, 1),
        (Shape(8, 8, 1), ("data",), 1, 8),
        (Shape(8, 4, 2), ("data", "fsdp"), 4, 8),
        (Shape(4, 1, 4), ("data",), 2, 2),
        (Shape(1, 16, 1), ("fsdp",), 8, 2),
    ],
)
def test_neighbours_on_the_last_axes_share_a_node_of_eight(shape, axes, near, nodes):
    assert roofline.spread(axes, shape) == (near, nodes)


def test_rings_move_what_their_members_lack():
    node = Shape(1, 8, 1)
    assert seconds("all-gather", ("fsdp",), node) == pytest.approx(7 / 8 / 300)
    assert seconds("reduce-scatter", ("fsdp",), node) == pytest.approx(7 / 8 / 300)
    assert seconds("all-reduce", ("fsdp",), node) == pytest.approx(2 * 7 / 8 / 300)
    assert seconds("collective-permute", ("fsdp",), node) == pytest.approx(1 / 300)


def test_across_nodes_the_adapters_of_a_node_work_together():
    # Eight nodes of eight: each lacks 7/8 of the array, twice, and has eight adapters.
    assert seconds("all-reduce", ("data",), Shape(64, 1, 1)) == pytest.approx(2 * 7 / 8 / (8 * 25))
    # Between two nodes less crosses than inside each.
    assert seconds("all-reduce", ("data",), Shape(16, 1, 1)) == pytest.approx(2 * 7 / 8 / 300)
    # One member a node has one adapter.
    assert seconds("all-reduce", ("data",), Shape(2, 8, 1)) == pytest.approx(1 / 25)


def test_collectives_follow_one_another():
    two = [Collective("all-gather", ("fsdp",), 1, 10**9)] * 2
    one = seconds("all-gather", ("fsdp",), Shape(1, 8, 1))
    assert roofline.network_time(two, Shape(1, 8, 1), A100) == pytest.approx(2 * one)


def test_what_large_matmuls_hide_of_a_collective_costs_no_time():
    shape, size = Shape(64, 1, 1), 10**9
    links = 2 * 7 / 8 * size / (8 * 25e9) / roofline.BANDWIDTH_SHARE

    def found(flops):
        sent = Sent("all-reduce", ("data",), 3, size, False, 1, flops)
        return roofline.sent_times(sent, shape, A100, "bfloat16")

    assert found(0) == pytest.approx((3 * links, 3 * links))
    half = int(links / 2 * roofline.MATMUL_SHARE * A100.flops)
    assert found(half) == pytest.approx((3 * links, 3 * links / 2))
    assert found(3 * half) == pytest.approx((3 * links, 0))


def test_rematerialisation_adds_what_it_computes_again():
    flops = Flops(frozen=400, adapters=60, attention=120, lm_head=40)
    assert roofline.executed_flops(flops, "none") == 620
    assert roofline.executed_flops(flops, "save_projections") == 620 + 40
    # Everything forward but the lm_head: half of 400, a third of 60 and of 120.
    assert roofline.executed_flops(flops, "full") == 620 + 200 + 20 + 40


def test_memory_traffic_counts_every_pass_once():
    llm = PUBLISHED["Qwen2.5-7B-Instruct"]
    sizes = dict(weights=1000, state=10, activations=100, targets=0, passes=2)
    assert roofline.memory_traffic(llm, gathered=False, **sizes) == 2000 + 20 + 200
    assert roofline.memory_traffic(llm, gathered=True, **sizes) == 4000 + 20 + 200
    sizes["targets"] = 3
    more = roofline.memory_traffic(llm, gathered=False, **sizes) - 2220
    assert more == 3 * 152_064 * 12  # float32 there and back, the gradient in bfloat16 as well


def test_the_floor_hides_everything_behind_the_longest_and_the_expectation_nothing():
    time = StepTime(compute=4.0, memory=3.0, network=1.0, efficiency=0.5)
    assert time.floor == 4.0
    assert time.expected == 9.0


def test_layouts_send_what_their_axes_split():
    sizes = Sizes(
        layers=700, lm_head=50, adapters=8, fusion=3, hidden=20, num_layers=4, microbatches=2
    )

    def found(*shape, remat="none"):
        sent = roofline.model_collectives(sizes, Shape(*shape), remat)
        return {(c.kind, c.axes): c.bytes for c in sent}

    assert found(1, 1, 1) == {}
    assert found(4, 1, 1) == {("all-reduce", ("data",)): 2 * 11}
    assert found(2, 4, 1) == {
        ("all-gather", ("fsdp",)): 2 * (2 * 700 + 50),
        ("all-reduce", ("data", "fsdp")): 2 * 11,
    }
    assert found(1, 1, 2) == {("all-reduce", ("tensor",)): 2 * (4 * 4 + 1) * 20}
    assert found(1, 1, 2, remat="full") == {("all-reduce", ("tensor",)): 2 * (5 * 4 + 1) * 20}
