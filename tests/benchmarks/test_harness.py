"""What all commands share: flags, result files, errors, tables."""

import importlib
import json
from pathlib import Path

import needs_torch
import pytest

from affectgpt_jax.cli import UsageError
from affectgpt_jax.common.errors import UserError
from benchmarks import harness

COMMANDS = {
    module.stem
    for module in Path(harness.__file__).parent.glob("*.py")
    if "COMMAND = harness.Measurement(" in module.read_text(encoding="utf-8")
}


def measurement(run, **more):
    table = harness.each(lambda report: f"a table of {report['value']}")
    return harness.Measurement("trial", run, table, lambda args: "trial", **more)


def test_a_report_is_written_printed_and_shown_again(tmp_path, capsys):
    finished, out = [], tmp_path / "new" / "trial.json"
    command = measurement(
        lambda args: {"value": args.steps},
        shared=("steps", "records"),
        finish=lambda args, report, path: finished.append((args.steps, path)),
    )
    command.main(["--steps=7", f"--out={out}", "--records", str(tmp_path)])
    report = json.loads(out.read_text())
    assert report["value"] == 7 and finished == [(7, out)]
    assert report["environment"]["command"] == "python -m benchmarks.trial --steps=7"
    assert report["environment"]["versions"].keys() >= {"jax", "numpy"}
    assert capsys.readouterr().out == "a table of 7\n"
    command.main(["--show", str(out), str(out)])
    assert capsys.readouterr().out == "a table of 7\n\na table of 7\n"


def test_trouble_is_one_sentence_and_leaves_no_result(tmp_path):
    def run(args):
        raise UserError("the disk is full")

    with pytest.raises(SystemExit, match="^error: the disk is full$"):
        measurement(run).main([f"--out={tmp_path / 'trial.json'}"])
    assert list(tmp_path.iterdir()) == []


def test_flags_of_the_config_are_taken_only_where_they_go_somewhere():
    words = ["--config.steps=3"]
    assert measurement(dict, overrides=True).parse(words).overrides == words
    for command, unknown in ((measurement(dict), words), (measurement(dict), ["--typo"])):
        with pytest.raises(UsageError, match=f"unrecognized arguments: {unknown[0]}"):
            command.parse(unknown)


def test_a_result_names_no_folder_of_the_machine():
    words = ["--records", "/a/b", "--batch", "12", "--out=/c", "--pack", "--profile", "/d"]
    found = harness.command("train_step", words)
    assert found == "python -m benchmarks.train_step --batch 12 --pack"
    found = harness.command("parity", ["--llm", "/models/x", "--lexicon=/y", "--seed=1"])
    assert found == "python -m benchmarks.parity --llm DIR --lexicon=DIR --seed=1"


def test_a_table_has_a_column_for_every_heading():
    table = harness.columns({"n": str, "twice": lambda n: f"{2 * n}"}, [1, 2])
    assert table == "| n | twice |\n|---|---|\n| 1 | 2 |\n| 2 | 4 |"


def test_a_spread_is_the_median_and_the_range():
    found = harness.spread([3.0, 1.0, 2.5])
    assert found == {"median": 2.5, "lowest": 1.0, "highest": 3.0}
    assert harness.spread_in_words(found, ".1f", " ms") == "2.5 ms (1.0 to 3.0)"


@pytest.mark.parametrize("name", sorted(COMMANDS | {"ablation", "all", "tables"}))
def test_every_command_has_help(name, capsys):
    if name in ("parity", "extraction"):
        needs_torch.pytorch("it runs in PyTorch")
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as end:
        getattr(module, "COMMAND", module).main(["--help"])
    assert end.value.code in (0, None)
    assert f"usage: python -m benchmarks.{name} " in capsys.readouterr().out
