"""Shares of a work for processes that run side by side, as the tasks of `srun` do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from affectgpt_jax import cli
from affectgpt_jax.common.text import shorten

Shard = tuple[int, int]  # number, from 0, and count


def add_shard_flag(add: Callable[..., Any]) -> None:
    """The flag of every command that does a share of the work.

    Args:
        add: `add_argument` of the parser.
    """
    add(
        "--shard",
        type=cli.argument_type(parse_shard),
        metavar="I/N",
        help="a share of the work, I from 0 to N - 1; default: that of srun's task, or all of it",
    )


def parse_shard(text: str) -> Shard:
    """Number and count of "I/N".

    Raises:
        ValueError: another form, or a number that is not below the count.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"{text!r} is not I/N with I from 0 to N - 1, as in 0/4")
    return int(found[1]), int(found[2])


def shard_of_task(environment: Mapping[str, str] = os.environ) -> Shard:
    """That of a task of srun; all of the work where there is none.

    Raises:
        UsageError: variables of srun that are missing, or name no share.
    """
    # A batch script has numbers, too, and starts one process only.
    if "SLURM_STEP_ID" not in environment:
        return 0, 1
    task = "/".join(environment.get(name, "") for name in ("SLURM_PROCID", "SLURM_NTASKS"))
    try:
        return parse_shard(task)
    except ValueError:
        raise cli.UsageError(
            f"SLURM_PROCID/SLURM_NTASKS is {shorten(task)}, which is no share of a step of srun; "
            "name one with --shard I/N, or unset SLURM_STEP_ID"
        ) from None
