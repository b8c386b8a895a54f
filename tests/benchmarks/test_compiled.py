"""The kept answers of XLA's CUDA compiler, their table, and the cases that are asked."""

import pytest

from affectgpt_jax import plan
from benchmarks import compiled, harness

KEPT = sorted(harness.RESULTS.glob("compiled_*.json"))


@pytest.mark.parametrize(
    "case", compiled.cases(), ids=lambda case: f"{case.workload} {case.device}"
)
def test_every_case_is_a_plan_that_can_be_made(case):
    arguments, config = plan.parse_arguments(case.command.split()[3:])
    assert arguments.compile and arguments.device == case.device
    shares = config.batch_size // arguments.devices
    expected = {"anchor": (2, 4096), "packed": (6, 2048), "paper,": (3, 1024)}
    length = plan.rows_of(config, arguments.length, arguments.targets).length
    assert (shares, length) == expected[case.workload.replace(", fp8", "").split()[0]]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_table_has_a_row_for_every_kept_case(path):
    report = harness.load(path)
    asked = [case.command for case in compiled.cases()]
    assert {made["command"] for made in report["cases"]} <= set(asked)
    text = compiled.table(report)
    assert "not run" in text.splitlines()[0]
    for row, made in zip(text.splitlines()[4:], report["cases"], strict=True):
        assert row.startswith(f"| {made['workload']} | {made['devices']} x {made['device']} |")
        assert f"| {made['floor_ms']:,.0f} | {made['tokens_per_s']:,.0f} |" in row


def test_cases_that_the_file_has_are_not_compiled_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        compiled, "make", lambda case: made.append(case) or {"command": case.command}
    )
    monkeypatch.setattr(harness, "describe", lambda: {})
    words = ["--only", "fp8", "--out", str(tmp_path / "kept.json")]
    report = compiled.run(compiled.COMMAND.parse(words))
    assert [case["command"] for case in report["cases"]] == [case.command for case in made]
    assert len(made) == 2
    assert compiled.run(compiled.COMMAND.parse([*words, "--add"])) == report and len(made) == 2
