"""Which module may import what: the house has floors, and nothing imports upward."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import affectgpt_jax

PACKAGE = Path(affectgpt_jax.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))
COMMANDS = (
    *(f"affectgpt_jax.{path.stem}" for path in PACKAGE.glob("*.py") if path.stem != "__init__"),
    *(f"affectgpt_jax.{path.parent.stem}.__main__" for path in PACKAGE.glob("*/__main__.py")),
)
ACCELERATOR = ("jax", "jaxlib", "flax", "optax", "orbax")
FILES_AND_FLAGS = (
    "os",
    "pathlib",
    "io",
    "shutil",
    "tempfile",
    "argparse",
    "absl",
    "ml_collections",
)
BANNED = {
    ".": ("torch", "tensorflow", "pickle", "cloudpickle", "dill", "marshal", "shelve"),
    "data": (
        *COMMANDS,
        *ACCELERATOR,
        "affectgpt_jax.models",
        "affectgpt_jax.weights",
        "affectgpt_jax.training",
        "affectgpt_jax.evaluation",
        "affectgpt_jax.configs",
    ),
    "models": (
        *COMMANDS,
        *FILES_AND_FLAGS,
        "affectgpt_jax.data",
        "affectgpt_jax.weights",
        "affectgpt_jax.training",
        "affectgpt_jax.evaluation",
        "affectgpt_jax.configs",
        "jax.sharding",
    ),
    "weights": (*COMMANDS, "affectgpt_jax.training", "affectgpt_jax.data", "affectgpt_jax.configs"),
    "training": (*COMMANDS, "affectgpt_jax.data", "affectgpt_jax.weights", "affectgpt_jax.configs"),
}


def imports(source: str) -> set[str]:
    """Every module, and every name out of one, that a source imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the floor they come from"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# `models` and `weights` know the registry of modalities, and nothing else of the data.
REGISTRY = "affectgpt_jax.data.modalities"


def within(name: str, roots) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


# A folder's `__main__.py` is a command: it stands above all floors.
@pytest.mark.parametrize(
    "module", [path for path in MODULES if path.name != "__main__.py"], ids=str
)
def test_nothing_imports_upward(module):
    found = imports((PACKAGE.parent / module).read_text(encoding="utf-8"))
    for folder, banned in BANNED.items():
        if PACKAGE.name / Path(folder) in module.parents:
            found = {name for name in found if not within(name, [REGISTRY])}
            assert not {name for name in found if within(name, banned)}


@pytest.mark.parametrize(
    ("module", "floors"),
    [
        *((path, ("common",)) for path in MODULES if path.parts[1] == "common"),
        *((path, ("common", "evaluation")) for path in MODULES if path.parts[1] == "evaluation"),
    ],
    ids=str,
)
def test_the_ground_floor_and_evaluation_need_numpy_alone(module, floors):
    found = imports((PACKAGE.parent / module).read_text(encoding="utf-8"))
    # Trees are those of JAX; the page is a template; a chat server has a client, loaded when asked.
    libraries = {"trees.py": "jax", "page.py": "jinja2", "chat_server.py": "openai"}
    extra = [name for file, name in libraries.items() if file == module.name]
    own = (f"affectgpt_jax.{floor}" for floor in floors)
    allowed = (*sys.stdlib_module_names, "numpy", *extra, *own)
    assert not {name for name in found if not within(name, allowed)}


def test_the_check_sees_every_form_of_import():
    source = """
import torch.nn as nn
from jax import sharding
def late():
    import pickle, numpy
"""
    assert imports(source) == {"torch.nn", "jax", "jax.sharding", "pickle", "numpy"}
    assert within("torch.nn", ("torch",))
    assert not within("torchvision", ("torch",))


def loaded_by(statement: str) -> set[str]:
    code = f"""
import json, sys
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_imports_nothing():
    assert loaded_by("import affectgpt_jax") == {"affectgpt_jax"}


def test_scoring_and_reading_a_command_line_load_no_accelerator():
    loaded = loaded_by("import affectgpt_jax.config, affectgpt_jax.evaluation.metrics")
    assert not {name for name in loaded if within(name, (*ACCELERATOR, "torch", "transformers"))}
