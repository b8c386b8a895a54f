"""Parameters of the JAX model under the names, and in the layout, of the PyTorch one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from affectgpt_jax.weights import layout
from affectgpt_jax.weights.huggingface import base_tensors
from affectgpt_jax.weights.release import release_layout


def by_torch_name(trainable: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A `trainable` tree, or one of its shape such as its gradient, as PyTorch names it.

    Returns:
        Parameter name of `AffectGPT` -> array in PyTorch's layout, `[out, in]` for matrices.
    """
    return layout.to_tensors(trainable, _layout)


def load_trainable(model: torch.nn.Module, trainable: Mapping[str, Any]) -> None:
    """Copy a `trainable` tree, or its `fusion` part, into a model.

    Raises:
        ValueError: its names or shapes are not those of the trained parameters; the message names
            one.
    """
    load_named(model, by_torch_name(trainable))


def move_base(causal_lm: torch.nn.Module, base: dict[str, Any]) -> None:
    """Copy frozen parameters into a model of `transformers` on the same device, without the host.

    Args:
        causal_lm: without adapters.
        base: a tree of JAX arrays. Each is deleted once it is copied, so that two copies of a large
            base never exist whole.

    Raises:
        ValueError: a parameter that the tree does not fill.
    """
    unfilled = dict(causal_lm.named_parameters())
    if causal_lm.config.tie_word_embeddings:
        unfilled.pop("lm_head.weight", None)

    for name, (value, transposed) in base_tensors(base).items():
        part = torch.from_dlpack(value)
        unfilled.pop(name).data.copy_(part.T if transposed else part)
        value.delete()
    if unfilled:
        raise ValueError(f"the base has no {min(unfilled)}, nor {len(unfilled) - 1} more")


def load_named(model: torch.nn.Module, values: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into the trained parameters of a model, by name.

    Raises:
        ValueError: as for `load_trainable`.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if different := sorted(trained.keys() ^ values.keys()):
        raise ValueError(
            f"{different[0]} is trained on one side only, as are {len(different) - 1} more; both "
            "models must be built from one config"
        )
    for name, parameter in trained.items():
        if (expected := tuple(parameter.shape)) != values[name].shape:
            raise ValueError(f"{name} is {values[name].shape}; expected {expected}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(torch.tensor(values[name]))


def _layout(path: layout.Path) -> layout.Stored:
    """The release's, and that of Q-Formers for images, which it lacks, after those for videos."""
    if path[:2] != ("fusion", "image") or path[2] == "projection":
        return release_layout(path)
    stored = release_layout(("fusion", "video", *path[2:]))
    name = stored.name.replace("video_frame", "image").replace("video", "image")
    return dataclasses.replace(stored, name=name)
