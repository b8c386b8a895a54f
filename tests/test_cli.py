"""Flags, help and endings are the same for all commands."""

import os
import subprocess
import sys

import jax
import pytest

from affectgpt_jax import cli
from affectgpt_jax.common.errors import UserError

# A command that does what its first argument says.
COMMAND = """
import sys
from affectgpt_jax import cli
from affectgpt_jax.common.errors import UserError
with cli.exit_on_error(interrupted="interrupted; the same command goes on"):
    exec(sys.argv[1])
"""


def run(code, **options):
    command = [sys.executable, "-c", COMMAND, code]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise UserError('x.csv, line 3: no name')", 1, "error: x.csv, line 3: no name"),
        ("raise UserError('a\\nb\\x1b[2J')", 1, r"error: a\nb\x1b[2J"),
        ("open('/nowhere/x')", 1, "error: /nowhere/x: No such file or directory"),
        ("raise OSError('odd')", 1, "error: input or output: odd"),
        ("raise KeyboardInterrupt", 130, "interrupted; the same command goes on"),
        ("bytearray(2**62)", 1, "error: this machine has no memory left; use a smaller batch, or "
         "another machine"),
        ("sys.exit(7)", 7, ""),
        ("print('fine')", 0, ""),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_sentence_and_a_status(code, status, said):
    done = run(code)
    assert (done.returncode, done.stderr.strip()) == (status, said)


def test_a_fault_of_the_program_keeps_its_traceback():
    done = run("{}['key']")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError" in done.stderr


@pytest.mark.parametrize("code", ["print('x' * 10**6)", "print('short')", "print('a'); sys.exit()"])
def test_nothing_is_said_where_the_reader_has_left(code):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, code], stdout=pipe, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_a_terminal_without_a_character_gets_its_number():
    done = run("print('开心')", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "\\u5f00\\u5fc3\n")


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
@pytest.mark.parametrize(
    ("said", "known"), [("RESOURCE_EXHAUSTED: Out of memory", True), ("INTERNAL: x", False)]
)
def test_a_device_without_memory_is_told_from_other_errors_of_xla(said, known, kind):
    with pytest.raises(SystemExit if known else kind) as raised:
        with cli.exit_on_error(out_of_memory="lower --batch-size"):
            raise kind(said)
    if known:
        assert str(raised.value) == "error: the device has no memory left; lower --batch-size"


def test_a_command_may_end_in_its_own_way():
    ends = []

    def leave(status, sentence):
        ends.append((status, sentence))
        raise SystemExit(status)

    for error in (UserError("wrong"), KeyboardInterrupt()):
        with pytest.raises(SystemExit), cli.exit_on_error(leave=leave):
            raise error
    assert ends == [(1, "error: wrong"), (130, "interrupted")]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--batch_size=4", "--batch-size=4"),
        ("--api-key_env=A_B-C", "--api-key-env=A_B-C"),
        ("--config.batch-size=4", "--config.batch_size=4"),
        ("--noconfig.strict-leaks", "--noconfig.strict_leaks"),
        ("--config.generate.merge-lora", "--config.generate.merge_lora"),
        ("--config.data.mixture.my-set.some-key=a-b", "--config.data.mixture.my-set.some_key=a-b"),
        ("some_file-name", None),
        ("--", None),
        ("-a_b", None),
        ("--a_b c", None),
    ],
)
def test_names_of_flags_may_have_hyphens_or_underscores(given, meant):
    assert cli.normal_flags([given]) == [meant or given]


def test_a_parser_takes_both_and_no_abbreviation(capsys):
    parser = cli.make_parser("affectgpt x", "Does x.")
    parser.add_argument("--batch-size", type=int)
    assert parser.parse_args(["--batch_size=3"]).batch_size == 3
    with pytest.raises(SystemExit) as end, cli.exit_on_error():
        parser.parse_args(["--batch=3"])
    refusal = "error: unrecognized arguments: --batch=3; see affectgpt x --help\n"
    assert (end.value.code, capsys.readouterr().err) == (2, refusal)


def test_help_has_80_columns_and_keeps_what_is_indented():
    description = f"Words {'and words ' * 20}\n\n    python -m x \\\n        --flag\n\nThe end."
    parser = cli.make_parser("affectgpt x", description)
    parser.add_argument("--flag", help="a long text " * 20)
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert "\n    python -m x \\\n        --flag\n\nThe end.\n" in text
