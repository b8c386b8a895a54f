"""The keys of the config with their defaults and meanings, read from the comments of its source.

The meaning of a key is the comment behind its assignment, with the comment lines that follow it; a
key without one behind has the comment lines above it. The source is `configs/affectgpt_qwen25_7b`.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from affectgpt_jax.configs import affectgpt_qwen25_7b


class Key(NamedTuple):
    """A key of the config.

    Attributes:
        name: with its sections, as in "optimizer.learning_rate".
        default: in the paper's recipe; a `ConfigDict` for a section.
        meaning: one or several sentences, in one line; "" where the source has no comment.
    """

    name: str
    default: Any
    meaning: str


def config_keys() -> list[Key]:
    """All keys, sections included, in the order of the source."""
    return keys_of(inspect.getsource(affectgpt_qwen25_7b), affectgpt_qwen25_7b.get_config())


def keys_of(source: str, config: ConfigDict) -> list[Key]:
    """The keys that a source assigns to `c`, with what its comments say.

    Args:
        source: of a module whose `get_config` assigns `c.KEY = VALUE`, each key once.
        config: what it returns.
    """
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "get_config"
    )
    assigned = [node for node in function.body if isinstance(node, ast.Assign)]
    behind, alone = _comments(source)
    # Comment lines between two assignments continue the first one's comment, unless the second has
    # no other. The first entry is what stands above the first assignment.
    meanings: list[list[str]] = [[]]
    last = function.lineno
    for node in assigned:
        between = [alone[line] for line in range(last, node.lineno) if line in alone]
        lines = range(node.lineno, node.end_lineno + 1)
        own = [behind[line] for line in lines if line in behind]
        if own:
            meanings[-1] += between
        meanings.append(own or between)
        last = node.end_lineno + 1
    found, names = [], [_target(node) for node in assigned]
    for name, meaning in zip(names, meanings[1:], strict=True):
        if not name:
            continue
        value = config
        for part in name.split("."):
            value = value[part]
        found.append(Key(name, value, " ".join(meaning)))
        if isinstance(value, ConfigDict):  # filled before anything is assigned to its keys
            inner = ((f"{name}.{key}", default) for key, default in value.items())
            found += [Key(key, default, "") for key, default in inner if key not in names]
    return found


def _target(node: ast.Assign) -> str:
    """The key that is assigned to; "" for a variable."""
    _, _, key = ast.unparse(node.targets[0]).partition("c.")
    return key


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those behind code, and those that have the line for themselves."""
    behind, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kind = behind if token.line[: token.start[1]].strip() else alone
            kind[token.start[0]] = token.string.lstrip("# ")
    return behind, alone
