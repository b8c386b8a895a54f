"""Statistics of record directories: tables and plots.

    affectgpt statistics --out statistics \\
        --records train=records/mercaptionplus test=records/mer2024

Writes `statistics.csv`, a row per directory in the shape of the paper's Table 1, and, in that of
its Figures 7 and 8, `distributions.csv` (set, quantity, value or bin, clips) and
`distributions.png`: most frequent labels, labels per clip, length of descriptions, and durations,
as extraction.csv has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from affectgpt_jax import cli
from affectgpt_jax.common.text import print_lines
from affectgpt_jax.data.records import RecordError

from .contents import read_contents, write_statistics


def named_places(arguments: Sequence[str]) -> dict[str, Path]:
    """The record directories by name, from `DIR` and `NAME=DIR`.

    Raises:
        RecordError: two of the same name.
    """
    places: dict[str, Path] = {}
    for text in arguments:
        name, equals, place = text.partition("=")
        directory = Path(place if equals else text).expanduser()
        name = name if equals else directory.absolute().name
        if name in places:
            raise RecordError(
                f"two directories are called {name!r}; name them apart, as in b={text}"
            )
        places[name] = directory
    return places


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        parser = cli.make_parser("affectgpt statistics", __doc__)
        add = parser.add_argument
        add("--records", nargs="+", required=True, metavar="[NAME=]DIR", help="record directories")
        add("--out", type=Path, required=True, metavar="DIR", help="where to write")
        arguments = parser.parse_args(argv)
        places = named_places(arguments.records)
        contents = [read_contents(name, place) for name, place in places.items()]
        with cli.writing(str(arguments.out)):
            rows = write_statistics(contents, arguments.out)
        for row in rows:
            print_lines(f"{name:>32}  {value}" for name, value in row.items() if value != "")


if __name__ == "__main__":
    main()
