"""Trained weights outside a run: a `.pth` of the PyTorch release, or a PEFT adapter's directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from affectgpt_jax.common.identity import files_sha256
from affectgpt_jax.models.lora import LoraConfig
from affectgpt_jax.weights import peft, release
from affectgpt_jax.weights.streaming import WeightsError


class CheckpointFile:
    """Weights of a model, whose shapes have been compared with it; values are read when needed.

    Args:
        path: a file, or a directory with `adapter_config.json`.
        abstract: the `trainable` tree of `jax.ShapeDtypeStruct`s that it is to fill.
        lora: config of its adapters; None without any.

    Attributes:
        path: of it.
        parts: of the tree that it has: "lora", "fusion" or both.
        unused: names of tensors that the model has no place for: show them to the user.

    Raises:
        WeightsError: neither of both, or one that does not fit; the message names what differs.
    """

    def __init__(self, path: Path, abstract: Any, lora: LoraConfig | None):
        self.path, self.unused = path, []
        if path.is_dir() and (path / peft.CONFIG).is_file():
            self._files = [path / peft.CONFIG, path / peft.TENSORS]
            self._readers = {"lora": peft.open_adapter(path, abstract["lora"], lora)}
            if fusion := peft.open_fusion(path, abstract["fusion"]):
                self._files.append(path / peft.FUSION)
                self._readers["fusion"] = fusion
        elif path.is_file():
            self._files = [path]
            read, self.unused = release.open_release(path, abstract, lora)
            self._readers = {"": read}
        else:
            raise WeightsError(
                f"{path} holds no trained weights; expected a .pth of the PyTorch release, or a "
                f"directory with {peft.CONFIG} and {peft.TENSORS}"
            )
        self.parts = tuple(self._readers) if path.is_dir() else tuple(abstract)

    def load(self, abstract: Any) -> dict[str, Any]:
        """The parts that it has, cast to the dtypes of `abstract` and placed by its shardings."""
        if whole := self._readers.get(""):
            return whole(abstract)
        return {part: read(abstract[part]) for part, read in self._readers.items()}

    def fingerprint(self) -> str:
        """Sha256, in hex, over its files, whatever they are called."""
        return files_sha256(self._files)
