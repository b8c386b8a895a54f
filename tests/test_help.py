"""Every command prints its help, in 80 columns and without a `%` that argparse would format."""

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import affectgpt_jax

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("affectgpt_jax", "data_prep", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
    if re.search(r"^    (COMMAND\.)?main\(\)$", path.read_text(encoding="utf-8"), re.MULTILINE)
)
# What a command cannot even be imported without.
NEEDS_PYTORCH = ("benchmarks.extraction", "benchmarks.parity")


def test_the_commands_are_found():
    assert {
        "affectgpt_jax.train",
        "affectgpt_jax.weights.__main__",
        "data_prep.extract",
        "benchmarks.train_step",
    } <= set(COMMANDS)


def parsers_of(parser):
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers_of(sub)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_its_help(name, monkeypatch, capsys):
    if name in NEEDS_PYTORCH and importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    module = importlib.import_module(name)
    parsers = []
    parse = argparse.ArgumentParser.parse_known_args

    def remember(self, *args, **kwargs):
        parsers.append(self)
        return parse(self, *args, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", remember)
    with pytest.raises(SystemExit) as end:
        getattr(module, "COMMAND", module).main(["--help"])
    shown = capsys.readouterr().out
    assert not end.value.code
    assert "usage: " in shown or "flags:" in shown
    if not name.startswith("benchmarks."):
        assert max(map(len, shown.splitlines())) <= 80
    for parser in (sub for found in parsers for sub in parsers_of(found)):
        for action in parser._actions:
            # `%%` is a sign, `%(default)s` a value; anything else fails or prints nonsense.
            unescaped = re.sub(r"%%|%\(\w+\)s", "", action.help or "")
            assert "%" not in unescaped, f"{parser.prog} {action.dest}: {action.help}"
        parser.format_help()


def test_affectgpt_lists_every_command_but_those_that_make_what_ships():
    from affectgpt_jax.__main__ import COMMANDS as LISTED
    from affectgpt_jax.__main__ import module_of

    names = [name for commands in LISTED.values() for name in commands]
    listed = {module_of(name).removeprefix("affectgpt_jax.") for name in names}
    makers = {"data_prep.tiny_base", "data_prep.lexicon"}
    there = {name.removeprefix("affectgpt_jax.").removesuffix(".__main__") for name in COMMANDS}
    there = {name for name in there if not name.startswith("benchmarks.")} - {"__main__"}
    assert listed == there - makers


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        ([], 0, "usage: affectgpt COMMAND ...\n"),
        (["--version"], 0, f"affectgpt_jax {affectgpt_jax.__version__} (jax {jax.__version__}, "),
        (["trian"], 2, "error: 'trian' is not a command; did you mean train?\n"),
        (["check_cluster", "--help"], 0, "usage: affectgpt check-cluster "),
        (["score"], 2, "error: the following arguments are required: --task, "),
    ],
)
def test_affectgpt_runs_commands_by_their_names(argv, status, said, monkeypatch, capsys):
    from affectgpt_jax.__main__ import main

    monkeypatch.setattr(sys, "argv", ["affectgpt", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code or 0) == status
    shown = capsys.readouterr()
    assert (shown.err if status else shown.out).startswith(said)


def test_a_command_is_found_by_python():
    done = subprocess.run(
        [sys.executable, "-m", "affectgpt_jax.score", "--help"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: affectgpt score ")
