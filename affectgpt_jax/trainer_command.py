"""What the commands that train share: flags, how they end, and the processes of a run."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
from ml_collections import ConfigDict

from affectgpt_jax import cli, restore
from affectgpt_jax.common.identity import code_identity
from affectgpt_jax.common.text import print_lines
from affectgpt_jax.config import described
from affectgpt_jax.program import COMPILING
from affectgpt_jax.training import distributed
from affectgpt_jax.training.checkpoints import ALLOWED_OTHERS, CheckpointWriteError, check_path
from affectgpt_jax.training.stopping import lock_workdir


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every trainer, beside its config and workdir."""
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="where the newest checkpoint is damaged, set it aside and resume from one that is "
        "whole",
    )
    restore.add_allow_other(parser, ALLOWED_OTHERS)
    cli.add_download_flag(parser.add_argument)
    distributed.add_flags(parser)


class TrainerCommand:
    """A command that trains, from its command line to its end: `cli.exit_on_error` of a trainer.

    Args:
        out_of_memory: what to do where a device or this machine has no memory left.
    """

    def __init__(self, out_of_memory: str):
        self._out_of_memory = out_of_memory
        self._workdir: Path | None = None
        self._launch: distributed.Launch | None = None

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Around the whole work, see `cli.exit_on_error`."""
        with cli.exit_on_error(
            interrupted="interrupted; the same command resumes from the newest checkpoint",
            out_of_memory=self._out_of_memory,
            os_error=lambda error: (
                f"{error.filename or self._workdir}: {error.strerror or error}; the run "
                "needs a --workdir that it can write to, with room"
            ),
            leave=self._leave,
        ):
            yield

    @contextlib.contextmanager
    def joined(
        self, config: ConfigDict, own: argparse.Namespace
    ) -> Iterator[distributed.ProcessGroup]:
        """Around the work of a run: its processes, of which the first has locked the workdir.

        Args:
            config: of the run.
            own: its `workdir`, and the flags of `add_flags`.

        Raises:
            CheckpointError: a workdir whose path the libraries misread.
            LaunchError: processes that do not come, or have something else in mind.
            FileInUse: another run holds the workdir.
        """
        self._workdir = own.workdir
        check_path(own.workdir)
        if own.download:  # before the others are waited for
            restore.download_models(config)
        self._launch = distributed.find_launch(own)
        restore.set_up_process()
        facts = {"workdir": str(own.workdir), "jax": jax.__version__, "code": str(code_identity())}
        facts |= described(config)
        with distributed.join(self._launch, facts, own.join_timeout, print) as group:
            with lock_workdir(own.workdir) if group.is_main_process else contextlib.nullcontext():
                try:
                    yield group
                except CheckpointWriteError as error:
                    # Orbax's threads still hold half of the checkpoint and would fill the terminal
                    # at exit.
                    group.fail(str(error))
                    print_lines([f"error: {error}"], sys.stderr)
                    os._exit(1)

    def _leave(self, status: int, sentence: str) -> NoReturn:
        if self._launch:
            distributed.leave(self._launch, status, sentence)
        compiling = any(thread.name.startswith(COMPILING) for thread in threading.enumerate())
        if compiling and status == 128 + signal.SIGINT:
            # Python would wait for it, for minutes where the model is large.
            print(sentence, file=sys.stderr, flush=True)
            os._exit(status)
        cli.leave(status, sentence)
