"""The kept plans of reinforcement, their table, and what is asked."""

import pytest

from affectgpt_jax import plan
from benchmarks import harness, rl_plans

COMMANDS = [" ".join((rl_plans.PLAN, *flags)) for flags in rl_plans.PLANS]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_plan_can_be_made(command):
    arguments, config = plan.parse_arguments(command.split()[3:])
    assert arguments.rl and arguments.compile and arguments.devices == 1
    assert config.rl.prompts * config.rl.group == 256


def test_the_kept_plans_fit_and_stand_in_the_table():
    kept = harness.load(harness.RESULTS / "rl_plans.json")
    assert [made["command"] for made in kept["plans"]] == COMMANDS[: len(kept["plans"])]
    rows = rl_plans.table(kept).splitlines()[2:]
    for row, made in zip(rows, kept["plans"], strict=True):
        found = made["plan"]
        assert found["fits"] and found["compiled"]["peak_gib"] * 2**30 < found["usable"]
        assert row.startswith(f"| {found['device']['name']} | {found['config']['rl']['prompts']} x")
        assert f"| {found['compiled']['step_s']:.1f} s |" in row


def test_plans_that_the_file_has_are_not_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        rl_plans, "make", lambda command: made.append(command) or {"command": command}
    )
    monkeypatch.setattr(harness, "describe", lambda: {})
    words = ["--out", str(tmp_path / "kept.json")]
    rl_plans.run(rl_plans.COMMAND.parse([*words, "--first", "1"]))
    assert made == COMMANDS[:1]
    report = rl_plans.run(rl_plans.COMMAND.parse([*words, "--add"]))
    assert made == COMMANDS == [plan["command"] for plan in report["plans"]]
