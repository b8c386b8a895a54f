"""Shares of a work for processes that run side by side, as the tasks of `srun` do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from affectgpt_jax import cli

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
    """That of a task of srun; all of the work where there is none."""
    # A batch script has numbers, too, and starts one process only.
    if "SLURM_STEP_ID" not in environment:
        return 0, 1
    return parse_shard(f"{environment['SLURM_PROCID']}/{environment['SLURM_NTASKS']}")
