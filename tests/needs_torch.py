"""PyTorch and PEFT; a test that needs them is skipped where they are not installed."""

import pytest


def pytorch(why: str):
    """The package `torch`, or a skip that says why the test needs it."""
    return pytest.importorskip("torch", reason=f"PyTorch is not installed: {why}")


def peft(why: str):
    """The package `peft`, which needs PyTorch, or a skip that says why the test needs it."""
    pytorch(why)
    return pytest.importorskip("peft", reason=f"PEFT is not installed: {why}")


def __getattr__(name: str):
    """`from needs_torch import torch`, before imports that need it: the encoders run in PyTorch."""
    if name != "torch":
        raise AttributeError(name)
    return pytorch("the encoders run in PyTorch")
