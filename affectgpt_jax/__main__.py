"""The command `affectgpt`: its name, then that of what to do, as in `affectgpt train --help`.

`affectgpt NAME ...` is `python -m MODULE ...`. No module is imported but the one that runs.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import platform
import runpy
import sys
from collections.abc import Sequence

import affectgpt_jax
from affectgpt_jax import cli

COMMANDS = {
    "Train and ask": {
        "train": "train a model; without arguments the demo, on a CPU",
        "reinforce": "go on from a run by the score of what it writes",
        "prefer": "go on from a run by preferences between two answers",
        "predict": "ask a trained run about clips",
        "describe": "ask a trained run about videos and sounds",
        "serve": "a web page and an API that ask a trained run",
        "evaluate": "answers, labels, scores and a report of a trained run",
        "weights": "inspect weights; export them to PEFT, PyTorch or the hub",
    },
    "Score prediction files, without a model": {
        "score": "the scores of MER-UniBench",
        "report": "a page of scores and confusions, beside published ones",
        "labels": "the truth of the public data sets as plain files",
    },
    "Before and on a cluster": {
        "plan": "memory, FLOPs, traffic and time of a run",
        "check-cluster": "do processes reach each other, and how fast",
        "launch": "where the scripts for SLURM and ssh are",
    },
    "Make records to train on": {
        "extract": "from videos: decode, find faces, run the encoders",
        "import-arrays": "from a CSV file and arrays of features",
        "caption": "descriptions of unlabelled clips by models, filtered",
        "crowd": "small networks that vote on emotions of unlabelled clips",
        "speakers": "is the person who is seen the one who is heard",
        "datasets": "the public data sets in the layout that extract reads",
        "statistics": "tables and plots of records",
        "to-tfds": "records as a TensorFlow data set",
        "release-prompts": "the PyTorch release's prompts as a prompt file",
    },
}
DATA_PREP = (
    *("describe", "serve", "extract", "caption", "crowd", "speakers"),
    *("datasets", "statistics", "to-tfds", "release-prompts"),
)


def module_of(command: str) -> str:
    """The module that a command runs."""
    name = command.replace("-", "_")
    if command not in DATA_PREP:
        return f"affectgpt_jax.{name}"
    # A checkout that is not installed has the folder beside the package.
    packages = ("affectgpt_jax.data_prep", "data_prep")
    return f"{next(filter(importlib.util.find_spec, packages), packages[0])}.{name}"


def overview() -> str:
    """The list of commands."""
    names = [name for commands in COMMANDS.values() for name in commands]
    width = max(map(len, names)) + 2
    lines = ["usage: affectgpt COMMAND ...", "       affectgpt COMMAND --help | --version", ""]
    for title, commands in COMMANDS.items():
        lines += [f"{title}:", *(f"  {n:<{width}}{what}" for n, what in commands.items()), ""]
    lines += ["What to begin with: affectgpt train"]
    return "\n".join(lines)


def version() -> str:
    """The version, and those of what decides most about a run."""
    jax, python = importlib.metadata.version("jax"), platform.python_version()
    return f"affectgpt_jax {affectgpt_jax.__version__} (jax {jax}, Python {python})"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: run a command as `python -m` does."""
    with cli.exit_on_error():
        name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
        if name in ("--help", "-h", "help"):
            print(overview())
            raise SystemExit(0)
        if name == "--version":
            print(version())
            raise SystemExit(0)
        command = name.replace("_", "-")
        known = [known for commands in COMMANDS.values() for known in commands]
        if command not in known:
            close = difflib.get_close_matches(command, known, 1)
            hint = f"did you mean {close[0]}?" if close else "affectgpt alone lists them"
            raise cli.UsageError(f"{name!r} is not a command; {hint}")
        sys.argv = [f"affectgpt {command}", *rest]
        runpy.run_module(module_of(command), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
