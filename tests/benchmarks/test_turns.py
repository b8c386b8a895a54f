"""A worker process that answers calls: values, errors, its end."""

import os
from pathlib import Path

import pytest

from benchmarks.turns import Side, TurnError


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
