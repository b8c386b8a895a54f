"""The README's tables: what was met, missed and is open."""

import json

import pytest

from benchmarks import environment, tables
from benchmarks.tables import AIMS, Measured

SIDES = {"jax": {"mfu": 0.56, "tokens_per_s": 17_900.0, "data_wait": 0.002}, "tuned": {"mfu": 0.39}}


def trained(ratio):
    of = {"median": ratio, "lowest": ratio - 0.1, "highest": ratio + 0.1}
    return {"ratios": {"tuned": of}, "sides": SIDES}


ANSWERED = {
    "kinds": {
        kind: {"cases": {n: {"clips_per_s": r} for n, r in zip("abcd", rates)}}
        for kind, rates in {"first token": (1, 1, 1, 1), "labels": (9, 4.5, 3, 2)}.items()
    }
}


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
            tables.generation_over({"": (0, 1)}, 2.0),
            ANSWERED,
            Measured("2.0 times (labels)", True),
        ),
        (
            tables.generation_over(tables.EQUAL_BATCH, 2.0),
            ANSWERED,
            Measured(
                "2.0 times (labels, many at a time), 1.5 times (labels, one at a time)", False
            ),
        ),
        (
            tables.compiled,
            {"seconds": {"cold": {"together": [61, 62]}, "from the cache": {"together": [1, 2]}}},
            Measured("61.5 s cold, 1.5 s from the cache", False),
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


def test_the_kept_results_make_the_tables(capsys):
    tables.main([])
    printed = capsys.readouterr().out
    assert "| what | aim | measured | |" in printed
    assert (tables.RESULTS.parent / "RESULTS.md").read_text(encoding="utf-8") == printed


def test_a_result_names_no_folder_of_the_machine():
    words = ["--records", "/a/b", "--batch", "12", "--out=/c", "--pack", "--profile", "/d"]
    found = environment.command("benchmarks.train_step", words)
    assert found == "python -m benchmarks.train_step --batch 12 --pack"
