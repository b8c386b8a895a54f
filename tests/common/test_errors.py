"""Every error that a user can mend is a `UserError`."""

import ast
from pathlib import Path

import pytest

import affectgpt_jax

PACKAGE = Path(affectgpt_jax.__file__).parent
FOLDERS = (PACKAGE, PACKAGE.parent / "data_prep")
# Caught by the callers that know which file it is about.
INTERNAL = {"PickleError", "UserError"}


def error_classes():
    for folder in FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and node.name not in INTERNAL:
                    if node.name.startswith("_"):
                        continue
                    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                    if any(base.endswith(("Error", "Exception")) for base in bases):
                        yield pytest.param(bases, id=f"{path.stem}.{node.name}")


@pytest.mark.parametrize("bases", list(error_classes()))
def test_commands_catch_every_error_of_the_package_as_one_class(bases):
    assert bases & {"UserError", "ReadError", "ChatError"}
