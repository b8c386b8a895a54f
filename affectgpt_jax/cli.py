"""What all commands share: flags, help in 80 columns, and how a command ends on an error."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.files import write_text
from affectgpt_jax.common.text import brief

COLUMNS = 80
# Of what a command says at its end; what is longer repeats a file.
MAX_SENTENCE = 4000


def wrap_help(text: str) -> str:
    """A description in `COLUMNS` columns: paragraphs are filled, indented blocks stay."""
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(
        block if any(line.startswith(" ") for line in block.splitlines()) else _fill(block)
        for block in blocks
    )


def wrap_line(line: str) -> list[str]:
    """A line in lines of `COLUMNS` columns, of which the later ones are indented."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    wrapped = textwrap.wrap(
        line,
        COLUMNS,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
        drop_whitespace=True,
        replace_whitespace=False,
    )
    return [line] if len(line) <= COLUMNS else wrapped


def _fill(paragraph: str) -> str:
    # Flags and paths are not torn at their hyphens, so that they can be copied.
    return textwrap.fill(paragraph, COLUMNS, break_on_hyphens=False, break_long_words=False)


class UsageError(UserError, ValueError):
    """A wrong command line."""


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, width=COLUMNS)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent(wrap_help(text), indent)


class Parser(argparse.ArgumentParser):
    """`argparse` as all commands use it.

    Flags are written out in full, and `_` is as good as `-` in their names. The description keeps
    its indented blocks, and the help has 80 columns. A wrong command line is a `UsageError`.
    """

    def __init__(self, **options) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter, "allow_abbrev": False} | options)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args(normal_flags(args), namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def make_parser(command: str, description: str) -> Parser:
    """The parser of a command, such as "affectgpt score"."""
    return Parser(prog=command, description=description)


def add_chat_server_flags(add: Callable[..., Any]) -> None:
    """The flags that name a server of chat completions, of every command that asks one.

    Args:
        add: `add_argument` of the parser.
    """
    add(
        "--base-url",
        "--server",
        metavar="URL",
        help="of the server, as http://localhost:8000/v1",
    )
    add("--model", metavar="NAME", help="that the server knows its model by")
    add(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="the environment variable with the server's key, if it wants one",
    )
    add("--concurrency", type=int, default=8, metavar="N", help="requests at a time; default: 8")


def add_download_flag(add: Callable[..., Any]) -> None:
    """The flag without which nothing is downloaded, of every command that takes models of the hub.

    Args:
        add: `add_argument` of the parser.
    """
    add(
        "--download",
        action="store_true",
        help="get models of the hub that are not in the hub's cache",
    )


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a parser, and the `--config.KEY=VALUE` beside them.

    Raises:
        UsageError: an unknown flag, or one that is missing.
        SystemExit: after printing the help.
    """
    own, overrides = parser.parse_known_args(argv)
    for arg in overrides:
        if not (arg.startswith("--config.") and "=" in arg):
            parser.error(f"unknown argument {arg}; keys are set by --config.KEY=VALUE")
    return own, overrides


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A `type=` of `argparse` that shows the message of a `ValueError` of `parse`."""

    def parse_or_refuse(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_or_refuse


def normal_flags(argv: Sequence[str]) -> list[str]:
    """A command line whose flags have `-` in their names, and its keys of the config `_`, however
    they were written; names of a mixture's data sets stay as they are."""
    return [_normal_flag(arg) for arg in argv]


def _normal_flag(arg: str) -> str:
    if not (found := re.match(r"--(\w[\w.-]*)(?=$|=)", arg)):
        return arg
    name = found[1]
    if "." in name:
        mixture, key = re.match(r"((?:no)?config\.data\.mixture\.[^.]*)?(.*)", name).groups("")
        name = mixture + key.replace("-", "_")
    else:
        name = name.replace("_", "-")
    return f"--{name}{arg[found.end() :]}"


def escape_what_cannot_be_shown() -> None:
    r"""Print `\uXXXX` for a character that the terminal lacks, instead of failing.

    Names, words and answers come from files and models. For commands to call: it changes the
    process's standard streams.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def leave(status: int, sentence: str = "") -> NoReturn:
    """End the command with a status and a sentence on standard error.

    Raises:
        SystemExit: always; with the sentence where the status is 1, for which Python prints it.
    """
    if status == 1 and sentence:
        raise SystemExit(sentence)
    if sentence:
        print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(status)


def describe_os_error(error: OSError, output: Any = None) -> str:
    """The file, or the output of the command where the error names no file, and the reason."""
    return f"{error.filename or output or 'input or output'}: {error.strerror or error}"


@contextlib.contextmanager
def writing(output: str) -> Iterator[None]:
    """Around what writes an output, such as `--out=x.csv`, which errors then name.

    Raises:
        UserError: instead of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from None


STDOUT = "-"


def write_output(place: str, text: str, flag: str) -> bool:
    """Write what a user wants to have at a place: a file, whole or not at all, or into a pipe.

    Args:
        place: a path. `STDOUT` and /dev/stdout are standard output.
        text: what to write.
        flag: as in `--json`, for messages.

    Returns:
        Whether it went to standard output, which is then for nothing else.

    Raises:
        UserError: it cannot be written.
    """
    if place in (STDOUT, "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        sys.stdout.write(text)
        sys.stdout.flush()
        return True
    with writing(f"{flag}={place}"):
        # A pipe of the shell or a device cannot be replaced; a link to a file is not followed.
        if os.path.exists(place) and not (os.path.isfile(place) or os.path.isdir(place)):
            with open(place, "w", encoding="utf-8") as file:
                file.write(text)
        else:
            write_text(place, text)
    return False


@contextlib.contextmanager
def exit_on_error(
    *,
    interrupted: str = "interrupted",
    out_of_memory: str = "use a smaller batch, or another machine",
    os_error: Callable[[OSError], str] = describe_os_error,
    leave: Callable[[int, str], NoReturn] = leave,
) -> Iterator[None]:
    """Around the whole work of a command: ends on an error as every command does.

    An error that a user can mend (`UserError`, `OSError`, no memory) becomes `error: one sentence`
    and status 1, or 2 for a wrong command line; Ctrl-C becomes `interrupted` and status 130. Where
    the reader of standard output has left, the command ends with status 1 and says nothing. All
    others keep their traceback.

    Args:
        interrupted: what to say on Ctrl-C, such as that the same command goes on.
        out_of_memory: what to do where a device or this machine has no memory left.
        os_error: the sentence for an error of the operating system.
        leave: ends the process with a status and a sentence, "" for none.
    """
    escape_what_cannot_be_shown()
    try:
        try:
            yield
        except SystemExit:  # after the help, or one of our own
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except UserError as error:
        leave(2 if isinstance(error, UsageError) else 1, _sentence(error))
    except BrokenPipeError:
        # Python flushes the stream once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(1, "")
    except OSError as error:
        leave(1, _sentence(os_error(error)))
    except KeyboardInterrupt:
        leave(128 + signal.SIGINT, interrupted)
    except Exception as error:
        where = _without_memory(error)
        if where is None:
            raise
        leave(1, _sentence(f"{where} has no memory left; {out_of_memory}"))


def _sentence(error: Exception | str) -> str:
    return f"error: {brief(str(error), MAX_SENTENCE)}"


def _without_memory(error: Exception) -> str | None:
    """What an error says has no memory left, if it says so."""
    if isinstance(error, MemoryError):
        return "this machine"
    # Commands load JAX or PyTorch only if they run a model.
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    # XLA's error has no type of its own: it is a `JaxRuntimeError`, or for some calls a
    # `ValueError`, whose text names the status.
    kinds = (jax.errors.JaxRuntimeError, ValueError) if jax else ()
    if isinstance(error, kinds) and "RESOURCE_EXHAUSTED" in str(error):
        return "the device"
    if isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return "the device"
    return None
