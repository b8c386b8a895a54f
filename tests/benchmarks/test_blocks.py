"""Blocks of steps: the order in which sides run them, and the arithmetic of times and rates."""

import pytest

from affectgpt_jax.models.flops import train_flops
from affectgpt_jax.models.lora import LoraConfig
from benchmarks import blocks, workloads
from benchmarks.blocks import ratios, summarise, take_turns
from benchmarks.turns import TurnError

WORKLOAD = workloads.make("small", "tiny")


def block(seconds, clips, places=100, wait_s=0.0):
    """Steps of these seconds, each with `clips` clips of 10 tokens, 4 of them supervised."""
    return {
        "seconds": seconds,
        "wait_s": wait_s,
        "losses": [1.0] * len(seconds),
        "places": [places] * len(seconds),
        "samples": [[[10, 4]] * clips] * len(seconds),
    }


def test_times_are_medians_of_steps_and_rates_of_blocks():
    found = summarise([block([1, 1], 4), block([1, 4], 4), block([2, 2], 4)], WORKLOAD, peak=1e12)
    assert found["steps"] == 6 and found["median_s"] == 1.5
    assert found["samples_per_s"] == 2 and found["samples_per_s_range"] == [1.6, 4]
    assert found["tokens_per_s"] == 20 and found["places_per_s"] == 50 and found["fill"] == 0.4
    lora = LoraConfig(16, 32.0, 0.0, tuple(WORKLOAD.config.lora.targets))
    flops = train_flops(WORKLOAD.llm, lora, 10, 4).total
    assert found["model_flop_per_s"] == pytest.approx(2 * flops)
    assert found["mfu"] == pytest.approx(2 * flops / 1e12)
    assert summarise([block([1.0], 1, wait_s=0.25)], WORKLOAD, None)["data_wait"] == 0.25


def test_ratios_are_of_the_same_turn():
    ours, theirs = [block([1, 1], 4), block([2, 2], 4)], [block([2, 2], 4), block([6, 6], 4)]
    assert ratios(ours, theirs) == {"median": 2.5, "lowest": 2, "highest": 3}


class Worker:
    """A side that records what it is asked."""

    def __init__(self, name, log, loss=1.0):
        self.name, self.log, self.loss = name, log, loss

    def call(self, method, **arguments):
        if method == "facts":
            return {"compile_s": 1.0}
        if method == "peak_bytes":
            return 7
        self.log.append((self.name, method, arguments.get("first", 0)))
        return block([1.0] * arguments["steps"], 1) | {"losses": [self.loss]}

    def leave(self):
        self.log.append((self.name, "leave", 0))


def test_sides_alternate_who_goes_first_and_run_the_same_steps():
    log = []
    sides = {name: Worker(name, log) for name in "ab"}
    kept, facts = take_turns(sides, steps=5, block=2, warmup=3, leave=False)
    blocks = [(name, first) for name, method, first in log if method == "block"]
    assert blocks == [("a", 3), ("b", 3), ("b", 5), ("a", 5), ("a", 7), ("b", 7)]
    assert [name for name, method, _ in log if method == "warm_up"] == ["a", "b"]
    assert len(kept["a"]) == len(kept["b"]) == 3 and facts["a"]["peak_bytes"] == 7


def test_a_side_that_leaves_warms_up_again():
    log = []
    _, facts = take_turns({"a": Worker("a", log)}, steps=2, block=1, warmup=3, leave=True)
    assert [method for _, method, _ in log] == ["warm_up", "block", "leave"] * 2
    assert facts["a"]["compile_again_s"] == [1.0]


def test_a_loss_that_is_not_finite_ends_the_measurement():
    with pytest.raises(TurnError, match=r"a: a loss is not finite: \[nan\]"):
        take_turns({"a": Worker("a", [], float("nan"))}, steps=1, block=1, warmup=0, leave=False)


@pytest.mark.parametrize(("names", "leave", "share"), [("a", False, "0.9"), ("ab", True, "0.9")])
def test_a_side_has_the_whole_gpu_unless_another_one_is_there(names, leave, share, monkeypatch):
    shares = []

    class Starting:
        def __init__(self, name, target, arguments, environment):
            shares.append(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(blocks, "Side", Starting)
    targets = {name: ("benchmarks.sides:Jax", {}) for name in names}
    with blocks.workers(targets, gpu=True, leave=leave):
        assert shares == [share] * len(names)
    with blocks.workers(dict.fromkeys("ab", targets["a"]), gpu=True):
        assert shares[len(names) :] == ["0.45"] * 2
