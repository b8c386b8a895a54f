"""Which module may import what: the house has floors, and nothing imports upward."""

import ast
import json
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("affectgpt_jax", "data_prep", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# From the ground up. A module of the package that is in none of the folders is on the floor of
# `program`, and one that runs as a command is above all of them, wherever it lies. Above commands
# is what a script imports.
FLOORS = (
    ("affectgpt_jax.common",),
    ("affectgpt_jax.evaluation", "affectgpt_jax.data"),
    ("affectgpt_jax.models",),
    ("affectgpt_jax.weights", "affectgpt_jax.training"),
    ("affectgpt_jax",),
    ("data_prep",),
)
COMMAND_FLOOR = len(FLOORS)
API = ("affectgpt_jax", "affectgpt_jax.api")

ACCELERATOR = ("jax", "jaxlib", "flax", "optax", "orbax")
UNSAFE = ("pickle", "cloudpickle", "dill", "marshal", "shelve")
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
# What models and weights know of data.
REGISTRY = "affectgpt_jax.data.modalities"
# Beyond the floors, by folder.
BANNED = {
    "affectgpt_jax": ("torch", "tensorflow", *UNSAFE),
    "affectgpt_jax.data": ACCELERATOR,
    "affectgpt_jax.models": (
        *FILES_AND_FLAGS,
        "affectgpt_jax.data",
        "affectgpt_jax.evaluation",
        "jax.sharding",
    ),
    "affectgpt_jax.training": ("affectgpt_jax.data", "affectgpt_jax.evaluation"),
    "affectgpt_jax.weights": ("affectgpt_jax.data",),
    "data_prep": ("tensorflow", *UNSAFE),
}
# The ground floor and scoring need NumPy alone. Beyond it: trees are those of JAX, the page is a
# template, and the client of a server is an extra, imported where it is used.
NEED_NUMPY_ALONE = ("affectgpt_jax.common", "affectgpt_jax.evaluation")
BEYOND_NUMPY = {
    "affectgpt_jax.common.trees": ("jax",),
    "affectgpt_jax.common.hub": ("huggingface_hub",),
    "affectgpt_jax.common.drawing": ("matplotlib",),
    "affectgpt_jax.evaluation.page": ("jinja2",),
    "affectgpt_jax.evaluation.chat_server": ("openai",),
}
PYTORCH = ("data_prep.encoders",)


def imports(source: str, package: str = "") -> set[str]:
    """Every module, and every name out of one, that a source of a package imports anywhere.

    Only `data_prep`, which has two names, may import relatively.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = within(package, ("data_prep",))
            assert not node.level or inside, "it hides the floor it comes from"
            module = resolve_name("." * node.level + (node.module or ""), package)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, roots) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def is_command(module: str) -> bool:
    """Whether the module is run with `python -m`."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    guards = (node.test for node in tree.body if isinstance(node, ast.If))
    return module.endswith(".__main__") or any(
        ast.unparse(test) == "__name__ == '__main__'" for test in guards
    )


COMMANDS = frozenset(filter(is_command, SOURCES))


def floor(module: str) -> tuple[int, str]:
    """Number of the floor from the ground, and the folder on it."""
    if module in API:
        return COMMAND_FLOOR + 1, "the API"
    if module in COMMANDS:
        return COMMAND_FLOOR, module
    for number, folders in enumerate(FLOORS):
        for folder in folders:
            if within(module, (folder,)) and folder != "affectgpt_jax":
                return number, folder
    return FLOORS.index(("affectgpt_jax",)), "affectgpt_jax"


def imports_of(module: str) -> set[str]:
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return imports(path.read_text(encoding="utf-8"), package)


HOUSE = [module for module in SOURCES if not within(module, ("benchmarks",))]


@pytest.mark.parametrize("module", HOUSE)
def test_nothing_imports_upward_or_from_the_other_folder_of_its_floor(module):
    number, folder = floor(module)
    for name in imports_of(module) & SOURCES.keys() - {"affectgpt_jax", "data_prep", module}:
        other_number, other_folder = floor(name)
        assert other_number < number or other_folder == folder, f"{module} imports {name}"
    if number < FLOORS.index(("affectgpt_jax",)):
        assert not {name for name in imports_of(module) if within(name, ["affectgpt_jax.configs"])}


@pytest.mark.parametrize("module", [module for module in SOURCES if module not in API])
def test_no_module_imports_a_command(module):
    """Of the package or of data_prep: what two commands need lies below them."""
    commands = {name for name in COMMANDS if not within(name, ("benchmarks",))}
    assert not imports_of(module) & commands - {module}


@pytest.mark.parametrize("module", HOUSE)
def test_a_folder_is_free_of_what_it_has_to_do_without(module):
    found = imports_of(module)
    found = {name for name in found if not within(name, (REGISTRY,))}
    for folder, banned in BANNED.items():
        if within(module, (folder,)):
            assert not {name for name in found if within(name, banned)}
    if module not in PYTORCH:
        assert not {name for name in found if within(name, ("torch",))}


@pytest.mark.parametrize("module", [m for m in HOUSE if within(m, NEED_NUMPY_ALONE)])
def test_the_ground_floor_and_evaluation_need_numpy_alone(module):
    allowed = (*sys.stdlib_module_names, "numpy", "affectgpt_jax", *BEYOND_NUMPY.get(module, ()))
    assert not {name for name in imports_of(module) if not within(name, allowed)}


def test_the_check_sees_every_form_of_import():
    source = """
import torch.nn as nn
from jax import sharding
def late():
    import pickle, numpy
"""
    assert imports(source) == {"torch.nn", "jax", "jax.sharding", "pickle", "numpy"}
    beside = "from .faces import x\nfrom . import y"
    found = {"data_prep", "data_prep.faces", "data_prep.faces.x", "data_prep.y"}
    assert imports(beside, "data_prep") == found
    assert imports("from ..faces import x", "data_prep.speakers") == found - {
        "data_prep.y",
        "data_prep",
    }
    with pytest.raises(AssertionError):
        imports(beside, "affectgpt_jax")
    assert within("torch.nn", ("torch",))
    assert not within("torchvision", ("torch",))


def test_the_check_knows_commands_and_floors():
    assert {"affectgpt_jax.train", "affectgpt_jax.weights.__main__", "data_prep.extract"} < COMMANDS
    assert floor("affectgpt_jax.weights.__main__")[0] == COMMAND_FLOOR
    order = ["common.files", "data.records", "models.lora", "training.step", "inference", "train"]
    order.append("api")
    numbers = [floor(f"affectgpt_jax.{name}")[0] for name in order]
    assert numbers == sorted(set(numbers))


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
    loaded = loaded_by("from affectgpt_jax import score_files")
    assert not {name for name in loaded if within(name, ACCELERATOR)}


def test_scoring_and_reading_a_command_line_load_no_accelerator():
    loaded = loaded_by("import affectgpt_jax.config, affectgpt_jax.score, affectgpt_jax.report")
    assert not {name for name in loaded if within(name, (*ACCELERATOR, "torch", "transformers"))}
