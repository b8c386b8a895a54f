"""A worker process that answers calls: values, errors, its end."""

import os
from pathlib import Path

import pytest

from benchmarks.turns import Side, TurnError, alternate


class Counter:
    """Served by the worker."""

    def __init__(self, start):
        self.count = start

    def add(self, by):
        print("what is printed does not mix with answers")
        self.count += by
        return self.count

    def fail(self):
        raise ValueError("no\nsecond line")

    def end(self):
        raise SystemExit(3)


@pytest.fixture
def side(monkeypatch):
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parents[1]))))
    with Side("ours", "test_turns:Counter", {"start": 5}) as found:
        yield found


def test_a_worker_keeps_its_state_until_it_leaves(side):
    assert side.call("add", by=2) == 7 and side.call("add", by=2) == 9
    side.leave()
    assert side.call("add", by=1) == 6


def test_an_error_is_one_sentence_and_the_worker_lives_on(side):
    with pytest.raises(TurnError, match=r"^ours: ValueError: no$"):
        side.call("fail")
    assert side.call("add", by=0) == 5


def test_a_worker_that_ends_is_told_with_its_status(side):
    with pytest.raises(TurnError, match="ours: its process ended with status 3"):
        side.call("end")


def test_what_cannot_be_built_is_an_error():
    with (
        Side("theirs", "benchmarks.turns:NoSuchClass", {}) as found,
        pytest.raises(TurnError, match="theirs: AttributeError"),
    ):
        found.call("anything")


def test_every_other_turn_goes_from_last_to_first():
    assert list(alternate("ab", 3)) == [
        (0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b"),
    ]  # fmt: skip


def test_two_workers_run_a_call_at_the_same_time(side):
    """Each waits for what the other one does."""
    with Side("other", "test_turns:Counter", {"start": 7}) as other:
        for one in (side, other):
            one.send("add", by=1)
        assert [other.receive(), side.receive()] == [8, 6]
