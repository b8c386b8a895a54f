"""The generation benchmark: what it compares, what it refuses, and a run of both sides."""

import json

import pytest

from benchmarks import generation
from benchmarks.generation import measure, same, table
from benchmarks.turns import TurnError


def test_answers_are_compared_row_by_row():
    assert same([[1, 2], [1, 3]], [[1, 2], [1, 4]]) == {"first": 1.0, "all": 0.5}


class Writer:
    """A side that writes answers of this many clips a second."""

    def __init__(self, rate, tokens=(1, 2)):
        self.rate, self.tokens, self.asked = rate, list(tokens), []

    def call(self, method, *, kind, rows, numbers, tokens):
        self.asked.append((rows, tuple(numbers), tokens))
        return {"s": rows * len(numbers) / self.rate, "tokens": [self.tokens] * rows}


def test_rates_are_of_the_turns_after_the_first_and_clips_go_on():
    sides = {"jax": Writer(8.0), "transformers": Writer(2.0)}
    found = measure(sides, "labels", rows=4, turns=2, singles=3, dtype="float32")
    assert found["equal"] == {"first": 1.0, "all": 1.0}
    rates = [case["clips_per_s"] for case in found["cases"].values()]
    assert rates == [8.0, 2.0, 8.0, 2.0]
    in_batch = [asked for asked in sides["jax"].asked if asked[0] == 4]
    assert in_batch == [(4, (turn,), 24) for turn in range(3)]
    alone = [asked for asked in sides["jax"].asked if asked[0] == 1]
    assert alone == [(1, (3 * turn, 3 * turn + 1, 3 * turn + 2), 15) for turn in range(3)]


def test_different_answers_are_refused():
    sides = {"jax": Writer(8.0), "transformers": Writer(2.0, tokens=(1, 3))}
    with pytest.raises(
        TurnError, match=r"labels: of the answers .* 100% start .* and 0% are equal"
    ):
        measure(sides, "labels", rows=2, turns=1, singles=1, dtype="float32")


def test_both_sides_write_the_same_answers(tmp_path, capsys):
    pytest.importorskip("torch", reason="the peer runs in PyTorch")
    out = tmp_path / "out.json"
    flags = ["--scale=tiny", "--kind=labels", "--turns=1", "--singles=1", f"--records={tmp_path}"]
    generation.main([*flags, f"--out={out}"])
    report = json.loads(out.read_text())
    assert report["kinds"]["labels"]["equal"]["all"] == 1.0
    assert len(report["kinds"]["labels"]["cases"]) == 4
    assert capsys.readouterr().out.strip() == table([report])
