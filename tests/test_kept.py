"""What a run makes once, and finds again where it is made of the same things."""

import json
from types import SimpleNamespace

import pytest

from affectgpt_jax import build
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.identity import Identity
from affectgpt_jax.configs import demo
from affectgpt_jax.post_training import kept, model_and_clips
from affectgpt_jax.training.distributed import LaunchError, ProcessGroup


@pytest.fixture
def made(tmp_path):
    calls = []

    def make_of(facts, content):
        def make():
            calls.append(facts)
            return content

        return kept(tmp_path / "kept.json", list[int], ProcessGroup(), lambda: facts, make)

    return make_of, calls, tmp_path / "kept.json"


def test_what_was_made_of_the_same_is_found_and_of_other_things_made_anew(made):
    make_of, calls, path = made
    assert make_of(["a", 1], [1, 2]) == [1, 2]
    assert make_of(["a", 1], [9]) == [1, 2] and calls == [["a", 1]]
    assert make_of(["a", 2], [3]) == [3] and calls == [["a", 1], ["a", 2]]
    assert make_of(["a", 2], [9]) == [3]
    assert make_of(["a", 1], [4]) == [4], "nothing of the first is left"
    assert json.loads(path.read_text())["content"] == [4]


def test_a_file_of_another_form_is_refused_by_key(made):
    make_of, calls, path = made
    make_of([], [1])
    whole = json.loads(path.read_text())
    for damaged, message in (
        ([1], "expected a JSON object"),
        (whole | {"content": ["x"]}, r"kept.json: \[0\]: expected a whole number"),
        ({"content": [1]}, "the key 'made_of' is missing; delete it"),
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=message):
            make_of([], [1])
    assert calls == [[]]


class Second(ProcessGroup):
    """Process 1 of 2, which process 0 tells that a file is there."""

    def __init__(self):
        super().__init__(1, 2)

    def from_main_process(self, compute, timeout_s=None):
        return True


def test_every_process_reads_the_file_which_no_message_has_to_hold(made):
    make_of, calls, path = made
    make_of(["a"], [1, 2])
    assert kept(path, list[int], Second(), lambda: ["a"], lambda: [9]) == [1, 2]
    path.unlink()
    with pytest.raises(LaunchError, match="not the directory that process 0 writes to"):
        kept(path, list[int], Second(), lambda: ["a"], lambda: [9])
    assert calls == [["a"]]


@pytest.mark.parametrize(
    ("key", "value"), [("lora.alpha", 64.0), ("base_precision", "int8"), ("dtype", "bfloat16")]
)
def test_answers_depend_on_the_settings_of_the_model(monkeypatch, key, value):
    identity = Identity("x", "0" * 64)
    monkeypatch.setattr(build, "records_identity", lambda dataset: identity)
    clips = SimpleNamespace(index=[])

    def facts(**changes):
        config = demo.get_config()
        config.update_from_flattened_dict(changes)
        run = SimpleNamespace(identity=identity, inputs={}, config=config)
        return model_and_clips(run, clips)

    assert facts(**{key: value}) != facts()
    assert facts(**{"lora.dropout": 0.5, "mesh": "fsdp:2", "steps": 7}) == facts()
