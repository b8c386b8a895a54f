"""Look for bytes that a reader neither reads nor refuses, guided by the lines that they reach.

    pip install atheris
    python tests/fuzz_readers.py pth -max_total_time=600
    python tests/fuzz_readers.py npz -max_total_time=600

Targets: pth (a file of torch.save), pickle (the pickle inside of one, whose checksums fit), npz
(labels, with pickled objects). What is given behind a target goes to libFuzzer, among it a folder
in which finds are kept for the next night. The command ends with status 0 if nothing was found; a
find is written to `crash-*`, `timeout-*` or `oom-*` in the working directory.
"""

from __future__ import annotations

import io
import pickle
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["affectgpt_jax", "pickletools", "zipfile"]):
    import numpy as np

    from affectgpt_jax.common.errors import UserError
    from affectgpt_jax.evaluation.npz import npz_values
    from affectgpt_jax.weights import torch_zip
    from affectgpt_jax.weights.release import read_release

SECONDS_FOR_A_CASE = 10
MIB_FOR_A_CASE = 2048
VALUES = {"model": {"w": np.ones((2, 3), np.float32), "b": np.arange(4)}, "epoch": 1, "x": [None]}


def read_pth(path: Path) -> None:
    """Read a checkpoint of the release with all its tensors."""
    for tensor in read_release(path).tensors.values():
        tensor.numpy()


def archive(program: bytes) -> bytes:
    """A file of `torch.save` with this pickle and a storage."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a/data.pkl", program)
        file.writestr("a/data/0", bytes(range(32)))
    return stream.getvalue()


def seeds(target: str, folder: Path) -> list[bytes]:
    """Intact cases to begin with."""
    torch_zip.save(folder / "seed.pth", VALUES)
    whole = (folder / "seed.pth").read_bytes()
    if target == "pth":
        return [whole]
    if target == "pickle":
        own = zipfile.ZipFile(io.BytesIO(whole)).read("archive/data.pkl")
        return [own, *(pickle.dumps(["a", {"b": (1, 2.0)}, {3}], n) for n in range(6))]
    stream = io.BytesIO()
    labels = np.asarray({"a": {"emo": 1, "val": np.float32(0.5)}}, object)
    np.savez(stream, test_corpus=labels, filenames=["a"], fileitems=["[x]"])
    return [stream.getvalue()]


def main() -> None:
    """Entry point."""
    target, *options = sys.argv[1:] or [""]
    if target not in ("pth", "pickle", "npz"):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as place:
        path, corpus = Path(place, "case.pth"), Path(place, "corpus")
        corpus.mkdir()
        for number, seed in enumerate(seeds(target, Path(place))):
            (corpus / str(number)).write_bytes(seed)

        def one_case(data: bytes) -> None:
            try:
                if target == "npz":
                    npz_values(data, "f", ("test_corpus", "filenames", "fileitems"), True)
                else:
                    path.write_bytes(archive(data) if target == "pickle" else data)
                    read_pth(path)
            except UserError:
                pass

        limits = [f"-timeout={SECONDS_FOR_A_CASE}", f"-rss_limit_mb={MIB_FOR_A_CASE}"]
        folders = [option for option in options if not option.startswith("-")]
        flags = [option for option in options if option.startswith("-")]
        atheris.Setup([sys.argv[0], *limits, *flags, *folders, str(corpus)], one_case)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
