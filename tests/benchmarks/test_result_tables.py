"""The tables of results: what was met, missed and is open."""

import json
import shutil

import pytest

from benchmarks import tables
from benchmarks.tables import AIMS, Measured

SIDES = {"jax": {"mfu": 0.56, "tokens_per_s": 17_900.0, "data_wait": 0.002}, "tuned": {"mfu": 0.39}}


def trained(ratio):
    of = {"median": ratio, "lowest": ratio - 0.1, "highest": ratio + 0.1}
    return {"ratios": {"tuned": of}, "sides": SIDES}


# As `benchmarks.generation` calls them, in another order.
CASES = (
    "transformers, one at a time",
    "JAX, one at a time",
    "transformers, 32 at a time",
    "JAX, 32 at a time",
)
RATES = {"first token": (1, 1, 1, 1), "labels": (2, 3, 4.5, 9), "description": (1, 2, 3, 9)}


def answered(kinds=tuple(RATES), cases=CASES):
    return {
        "settings": {"batch": 32},
        "kinds": {
            kind: {
                "cases": {n: {"clips_per_s": r} for n, r in zip(CASES, RATES[kind]) if n in cases}
            }
            for kind in kinds
        },
    }


OURS = CASES[1::2]


@pytest.mark.parametrize(
    ("read", "report", "expected"),
    [
        (tables.over("tuned", 1.2), trained(1.3), Measured("1.30 times (1.20 to 1.40)", True)),
        (tables.over("tuned", 1.2), trained(1.1), Measured("1.10 times (1.00 to 1.20)", False)),
        (
            # A slow twin is no opponent.
            tables.over("tuned", 1.2, twin_mfu=0.4),
            trained(1.3),
            Measured("1.30 times (1.20 to 1.40), the twin at 39% MFU", False),
        ),
        (tables.tokens(17_600), trained(1.0), Measured("17,900 tokens/s, 56.0% MFU", True)),
        (tables.data_wait, trained(1.0), Measured("0.20% of a step", True)),
        (
            tables.input_rate,
            {"layouts": {"padded": {"samples_per_s": 4_999}, "packed": {"samples_per_s": 7_000}}},
            Measured("4,999 padded, 7,000 packed samples/s", False),
        ),
        (
            tables.generation_over(tables.BATCHED, 3.0),
            answered(),
            Measured("3.0 times (labels), 4.5 times (description)", True),
        ),
        (
            tables.generation_over(tables.EQUAL_BATCH, 2.0),
            answered(),
            Measured(
                "2.0 times (labels, many at a time), 3.0 times (description, many at a time), "
                "1.5 times (labels, one at a time), 2.0 times (description, one at a time)",
                False,
            ),
        ),
        (  # without the peer
            tables.generation_over(tables.BATCHED, 3.0),
            answered(cases=OURS),
            Measured("3.0 times (labels), 4.5 times (description)", True),
        ),
        (
            tables.generation_over(tables.EQUAL_BATCH, 2.0),
            answered(cases=OURS),
            Measured(
                "measured without labels of transformers, 32 at a time, description of "
                "transformers, 32 at a time, labels of transformers, one at a time, description "
                "of transformers, one at a time",
                None,
            ),
        ),
        (
            tables.generation_over(tables.BATCHED, 3.0),
            answered(kinds=("first token", "labels")),
            Measured(
                "measured without description of JAX, 32 at a time, description of JAX, one at a "
                "time",
                None,
            ),
        ),
        (
            tables.over("packed", 1.1),
            trained(1.3),
            Measured("measured without the packed twin", None),
        ),
        (
            tables.compiled,
            {
                "environment": {"device": "1 x cpu"},
                "seconds": {"cold": {"together": [61, 62]}, "from the cache": {"together": [1, 2]}},
            },
            Measured("61.5 s cold, 1.5 s from the cache (1 x cpu)", False),
        ),
    ],
)
def test_a_measurement_is_compared_with_its_aim(read, report, expected):
    assert read(report) == expected


def test_what_has_no_file_is_open_with_its_reason(tmp_path):
    (tmp_path / f"{AIMS[0].result}.json").write_text(json.dumps(trained(1.0)))
    first, *others = tables.targets(tmp_path).splitlines()[2:]
    assert first.endswith("| 17,900 tokens/s, 56.0% MFU | met |")
    assert len(others) == len(AIMS) - 1
    assert all(line.endswith("| open |") for line in others)
    assert all(aim.why in line for aim, line in zip(AIMS[1:], others, strict=True))


def test_a_file_that_does_not_answer_leaves_its_aim_open(tmp_path):
    for name in ("full", "small"):
        report = answered(cases=OURS)
        (tmp_path / f"generation_{name}.json").write_text(json.dumps(report))
    lines = [line for line in tables.targets(tmp_path).splitlines() if "decode" in line]
    assert lines[0].endswith("| 3.0 times (labels), 4.5 times (description) | **missed** |")
    for line in lines[1:]:
        assert "measured without labels of transformers" in line and line.endswith("| open |")
    assert "; expected: 3 times or more | open |" in lines[1]


def test_what_is_measured_alike_everywhere_may_have_either_name(tmp_path):
    def host(median):
        found = {"median": median, "lowest": median, "highest": median}
        return json.dumps({"milliseconds": {"host": found}})

    def line():
        (found,) = (line for line in tables.targets(tmp_path).splitlines() if "host time" in line)
        return found

    (tmp_path / "loop_overhead_full.json").write_text(host(1.0))
    assert "| 1.0 ms (1.0 to 1.0) | met |" in line()
    (tmp_path / "loop_overhead_small.json").write_text(host(3.0))
    assert "| 3.0 ms (3.0 to 3.0) | **missed** |" in line()


def test_terms_come_before_the_tables(tmp_path):
    report = json.loads((tables.RESULTS / "generation_small.json").read_text(encoding="utf-8"))
    (tmp_path / "generation_jax_small.json").write_text(json.dumps(report))
    printed = tables.all_tables(tmp_path)
    at = [
        printed.index(part)
        for part in ('"affectgpt N"', "| what | aim |", "## Generation", "2,610 clips, by arithm")
    ]
    assert at == sorted(at)
    assert "## Input" not in printed


def test_the_summary_says_how_each_result_is_known(tmp_path):
    for name in ("parity", "plans", "compiled_jax_0.10"):
        shutil.copy(tables.RESULTS / f"{name}.json", tmp_path)
    assert tables.summary(tmp_path).count("| open |") == 2
    report = json.dumps(trained(1.3) | {"environment": {}})
    (tmp_path / "train_step_anchor_full.json").write_text(report)
    *_, gpu = tables.summary(tmp_path).splitlines()
    assert gpu == "| the same, measured | 17,900 tokens/s, 56.0% MFU | measured on a GPU |"


def test_the_kept_results_make_the_tables(capsys):
    tables.main([])
    printed = capsys.readouterr().out
    assert "| what | aim | measured |  |" in printed
    assert (tables.RESULTS.parent / "RESULTS.md").read_text(encoding="utf-8") == printed
