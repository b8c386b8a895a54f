"""The programs that users run: with XLA's optimisations, which all other tests turn off.

The default run, shortened, is trained, validated and scored by two commands, with the optimisations
and without. Both must compute the same, up to the order in which XLA adds.
"""

import functools
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import SMALL, finish, trace

from affectgpt_jax.configs import demo as demo_config
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records

# Sums of some thousand float32 terms in another order.
FLOAT32 = 1e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a run of two steps: with XLA's optimisations, and without."""
    folder, default = tmp_path_factory.mktemp("optimised"), demo_config.get_config()
    # What `commands` makes small is as large as a user has it.
    keys = [flag.removeprefix("--config.").split("=")[0] for flag in SMALL]
    flags = [f"--config.{key}={functools.reduce(getattr, key.split('.'), default)}" for key in keys]
    for split, size in (("train", 96), ("val", 48)):
        clips = demo.World(0).records(split, size, tuple(demo.SHAPES))
        write_records(folder / split, clips, encoders=dict.fromkeys(demo.SHAPES, "demo"))
        flags.append(f"--config.data.{split}={folder / split}")
    # Validated and scored on the same clips, so that both run the same programs.
    flags.append(f"--config.data.test={folder / 'val'}")
    flags += ["--config.steps=2", "--config.checkpoint_every=2", "--config.lora.dropout=0.1"]
    for name, plain in (("optimised", False), ("plain", True)):
        finish(folder / name, *flags, settings={"jax_disable_most_optimizations": plain})
    return folder / "optimised", folder / "plain"


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_every_gradient_is_that_of_the_plain_program(runs):
    def moments(workdir):
        """Adam's moments: means over the steps of the gradient and of its square."""
        with ocp.PyTreeCheckpointer() as checkpointer:
            state = checkpointer.restore(workdir / "checkpoints" / "2" / "state")
        leaves = jax.tree_util.tree_leaves_with_path(state["opt_state"])
        named = {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}
        return {name: leaf for name, leaf in named.items() if "mu" in name or "nu" in name}

    found, expected = map(moments, runs)
    assert found.keys() == expected.keys() and len(found) > 40
    for name, leaf in expected.items():
        assert np.abs(found[name] - leaf).max() <= FLOAT32 * np.abs(leaf).max(), name
    assert sum(leaf.any() for leaf in expected.values()) > len(expected) / 2


def test_the_losses_are_those_of_the_plain_program(runs):
    found, expected = map(trace, runs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if "hit" not in key[1]:
            assert found[key] == pytest.approx(value, rel=FLOAT32), key
    assert {step for step, _ in expected} == {1, 2}


def test_the_answers_are_those_of_the_plain_program(runs):
    found, expected = (
        [json.loads(line) for line in (workdir / "predictions.jsonl").open()] for workdir in runs
    )
    assert len(found) == len(expected) == 48
    # The order of a sum may decide between two tokens that are as good as equally probable.
    assert sum(a != b for a, b in zip(found, expected)) <= 1
