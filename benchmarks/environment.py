"""What a measurement was made with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


def describe(*more_packages: str) -> dict[str, Any]:
    """Command, machine and versions, as every result file carries them."""
    device = jax.devices()[0]
    packages = (*PACKAGES, *more_packages)
    return {
        "command": command(_module_name(), sys.argv[1:]),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": f"{jax.device_count()} x {device.device_kind}",
        "platform": device.platform,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
    }


def save(report: Mapping[str, Any], path: Path) -> None:
    """Write a result file; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


# Flags that say where files are, which is nobody else's business.
_PLACES = ("--records", "--out", "--profile", "--tokenizer")


def command(module: str, words: Sequence[str]) -> str:
    """A command as a result file names it: without folders of this machine."""
    kept, skip = [], False
    for word in words:
        place = word.split("=", 1)[0] in _PLACES
        if not place and not skip:
            kept.append(word)
        skip = place and "=" not in word
    return " ".join(["python", "-m", module, *kept])


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else sys.argv[0]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or "unknown"
