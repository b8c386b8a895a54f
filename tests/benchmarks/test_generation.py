"""The generation benchmark: what it compares, what it refuses, and a run of both sides."""

import json

import needs_torch
import pytest

from affectgpt_jax.cli import UsageError
from benchmarks import generation, tables
from benchmarks.generation import measure, same, table
from benchmarks.turns import TurnError


def test_answers_are_compared_one_by_one():
    assert same([[1, 2], [1, 3, 4]], [[1, 2], [1, 3]]) == {"first": 1.0, "all": 0.5}


class Generator:
    """A side that answers this many clips a second."""

    def __init__(self, rate, tokens=(1, 2)):
        self.rate, self.tokens, self.asked = rate, list(tokens), []

    def call(self, method, *, kind, rows, clips):
        self.asked.append((rows, clips))
        return {"s": clips / self.rate, "tokens": [self.tokens] * (clips - 1) + [[1]]}


def measured(sides):
    return measure(sides, "labels", rows=4, turns=2, clips=8, singles=3, dtype="float32")


def test_rates_are_of_the_turns_after_the_first():
    sides = {"jax": Generator(8.0), "transformers": Generator(2.0)}
    found = measured(sides)
    assert found["equal"] == {"first": 1.0, "all": 1.0}
    rates = [case["clips_per_s"] for case in found["cases"].values()]
    assert rates == [8.0, 2.0, 8.0, 2.0]
    assert sides["jax"].asked == [(4, 8), (1, 3), (1, 3), (4, 8), (4, 8), (1, 3)]
    batch, *_, alone = found["cases"].values()
    assert (batch["clips"], batch["tokens"], batch["longest"]) == (8, 15 / 8, 2)
    assert (alone["clips"], alone["tokens"]) == (3, 5 / 3)


def test_different_answers_are_refused():
    sides = {"jax": Generator(8.0), "transformers": Generator(2.0, tokens=(1, 3))}
    with pytest.raises(
        TurnError, match=r"labels: of the answers .* 100% start .* and 12% are equal"
    ):
        measured(sides)


def test_a_table_compares_what_there_is():
    """Cases are found by their names: a run without the peer has the same columns."""
    settings = {"scale": "small", "dtype": "float32", "batch": 4}
    both = measured({"jax": Generator(8.0), "transformers": Generator(2.0)})
    one = measured({"jax": Generator(8.0)})

    def ends(found):
        lines = table([{"settings": settings, "kinds": {"labels": found}}]).splitlines()
        return [[cell.strip() for cell in line.split("|")[-3:-1]] for line in lines[2:]]

    assert ends(both) == [["", ""], ["4.0", "100%"], ["1.0", ""], ["4.0", ""]]
    assert ends(one) == [["", ""], ["1.0", ""]]
    both["cases"] = dict(reversed(both["cases"].items()))
    assert ends(both) == [["4.0", ""], ["1.0", ""], ["4.0", "100%"], ["", ""]]


def test_only_what_runs_by_default_has_the_file_that_an_aim_reads():
    names = {
        generation.name_of(generation.COMMAND.parse(["--scale=small", *flags]))
        for flags in (
            [],
            ["--turns=2"],
            ["--no-peer"],
            ["--kind", "first token"],
            ["--batch=8"],
            ["--dtype=bfloat16"],
        )
    }
    assert names == {
        "generation_small",
        "generation_jax_small",
        "generation_first_token_small",
        "generation_8_rows_small",
        "generation_bfloat16_small",
    }


@pytest.mark.parametrize(
    "flags", [["--batch=1"], ["--batch=-2"], ["--turns=0"], ["--batches=0"], ["--singles=0"]]
)
def test_counts_of_which_nothing_comes_are_refused(flags):
    with pytest.raises(UsageError, match=r"expected \d or more"):
        generation.COMMAND.parse(flags)


def test_answers_are_as_long_as_those_of_the_clips(tmp_path):
    """Those of the record set, end marks included, in whatever order they are generated."""
    ours = generation.Jax({"name": "decode", "scale": "tiny"}, str(tmp_path))
    [(_, limits)] = ours.asked("labels")
    assert len(set(limits.tolist())) > 2
    found = ours.generate("labels", 4, 10)["tokens"]
    assert [len(tokens) for tokens in found] == [limits[i % 8] for i in range(10)]
    assert found[:2] == found[8:], "the same clips, asked again"
    both = ours.generate("both", 4, 8)["tokens"]
    assert both[8:] == found[:8]
    assert both[:8] == ours.generate("description", 4, 8)["tokens"]


def test_both_sides_generate_the_same_answers(tmp_path, capsys, monkeypatch):
    needs_torch.pytorch("the peer runs in PyTorch")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # compilation takes longest
    out = tmp_path / "out.json"
    flags = [
        "--scale=tiny",
        "--kind=labels",
        "--turns=1",
        "--batches=2",
        "--singles=1",
        f"--records={tmp_path}",
    ]
    generation.COMMAND.main([*flags, f"--out={out}"])
    report = json.loads(out.read_text())
    assert report["kinds"]["labels"]["equal"]["all"] == 1.0
    assert len(report["kinds"]["labels"]["cases"]) == 4
    assert report["settings"]["merged"] is True
    aim = tables.generation_over(tables.EQUAL_BATCH, 2.0)
    assert aim(report) == tables.Measured(
        "measured without description of JAX, 4 at a time, description of transformers, 4 at a "
        "time, description of JAX, one at a time, description of transformers, one at a time",
        None,
    )
    assert capsys.readouterr().out.strip() == table([report])
