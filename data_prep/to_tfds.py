"""Write record directories as a TensorFlow-Datasets data set, one split each.

    affectgpt to-tfds --out DIR \\
        --records train=/records/mercaptionplus test=/records/mer2024

A directory without a name before it becomes the split that its manifest names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from affectgpt_jax import cli
from affectgpt_jax.common.text import print_lines
from affectgpt_jax.data.records import RecordError, read_manifest
from affectgpt_jax.data.tfds_source import TfdsDataset, write_tfds


def parse_splits(arguments: Sequence[str]) -> dict[str, Path]:
    """The record directory of each split, from `DIR` and `SPLIT=DIR`.

    Raises:
        RecordError: a split named twice, or a directory without a manifest.
    """
    splits: dict[str, Path] = {}
    for argument in arguments:
        named = re.fullmatch(r"([\w-]+)=(.+)", argument)
        path = Path(named[2] if named else argument).expanduser()
        split = named[1] if named else read_manifest(path).split
        if split in splits:
            raise RecordError(
                f"{splits[split]} and {path} are both the split {split!r}; name them apart, as in "
                f"--records {split}={splits[split]} other={path}"
            )
        splits[split] = path
    return splits


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        parser = cli.make_parser("affectgpt to-tfds", __doc__)
        add = parser.add_argument
        add("--records", nargs="+", required=True, metavar="[SPLIT=]DIR", help="record directories")
        add("--out", type=Path, required=True, metavar="DIR", help="a TFDS data_dir")
        arguments = parser.parse_args(argv)
        out = arguments.out.expanduser()
        splits = parse_splits(arguments.records)
        directory = write_tfds(out, splits)
        lines = [str(directory)]
        for split in splits:
            manifest = TfdsDataset(directory, split).manifest
            shapes = [f"{n} [{f['frames']}, {f['width']}]" for n, f in manifest.features.items()]
            facts = [f"{manifest.count:,} clips", f"{len(manifest.shards)} shards", *shapes]
            lines.append(f"{split}: {', '.join(facts)}")
        lines.append(f"train on it with --config.data.train=tfds:{out}:{next(iter(splits))}")
        print_lines(lines)


if __name__ == "__main__":
    main()
