"""Where the launch scripts are that come with the package.

    affectgpt launch
    sbatch --nodes=8 "$(affectgpt launch slurm)" \\
        --config=affectgpt_qwen25_7b:192 ...
    "$(affectgpt launch ssh)" node1,node2 affectgpt train ...

Without a name all of them are listed. Copy and change them as you need; each begins with how it is
used.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from affectgpt_jax import cli
from affectgpt_jax.common.text import print_lines


def scripts() -> dict[str, Path]:
    """The scripts by their names."""
    folder = Path(str(importlib.resources.files("affectgpt_jax.configs") / "launch"))
    return {path.stem: path for path in sorted(folder.glob("*.sh"))}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        parser = cli.make_parser("affectgpt launch", __doc__)
        found = scripts()
        parser.add_argument("name", nargs="?", choices=found, help="of the script whose path it is")
        name = parser.parse_args(argv).name
        print_lines([str(found[name])] if name else [f"{n:<8}{p}" for n, p in found.items()])


if __name__ == "__main__":
    main()
