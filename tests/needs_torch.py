"""PyTorch, for whoever imports it from here; what needs it is skipped where it is not installed."""

import pytest

torch = pytest.importorskip("torch", reason="the encoders run in PyTorch")
