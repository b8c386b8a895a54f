"""Pairs of answers, and the command that trains on them, on a run that has hardly learned."""

import dataclasses
import json
import shutil
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from commands import Command, ending, finish, group, losses, trace

from affectgpt_jax import build, load_run, prefer
from affectgpt_jax.config import SECTIONS, ConfigError
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.configs import demo as demo_config
from affectgpt_jax.data import demo
from affectgpt_jax.data.pipeline import DataError
from affectgpt_jax.data.records import (
    RecordDataset,
    RecordSubset,
    hold_out,
    subsample,
    write_records,
)
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rewards import Reward, Wheels
from affectgpt_jax.inference import Answer
from affectgpt_jax.models.attention import GROUP
from affectgpt_jax.models.generate import Generated
from affectgpt_jax.pairs import PairData, annotated_pairs, sampled_pairs
from affectgpt_jax.post_training import open_clips
from affectgpt_jax.training.checkpoints import SavedRun
from affectgpt_jax.training.metrics_writer import read_metrics

MODULE = "affectgpt_jax.prefer"
KILLS = 6  # a run takes some ten seconds


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "records"
    clips = demo.World(0).records("rl", 40)
    write_records(folder, clips, encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo"))
    return folder


@pytest.fixture(scope="module")
def clips(records):
    return RecordDataset(records)


@pytest.fixture(scope="module")
def config():
    config = demo_config.get_config()
    config.dpo = affectgpt_qwen25_7b.preference()
    config.dpo.pairs = 8
    return config


@pytest.fixture(scope="module")
def processor(config):
    directory = build.base_directory("tiny")
    return build.prompt_processor(config, build.tokenizer(directory, build.base_config("tiny")))


def text_of(processor, tokens):
    text = processor.tokenizer.decode(tokens)
    assert text.endswith(processor.prompts.end)
    return text.removesuffix(processor.prompts.end)


def test_the_preferred_one_of_two_descriptions_is_the_better_answer(clips, processor):
    few = RecordSubset(clips, range(12))
    few.index = [SimpleNamespace(**vars(e)) for e in few.index]
    for entry, preferred in zip(few.index, ("a1", "a2", "same")):
        entry.preferred = preferred
    few.index = [type(clips.index[0])(**vars(entry)) for entry in few.index]
    pairs, same = annotated_pairs(few, processor)
    assert same >= 1 and len(pairs) + same == 12 and 2 not in {p.number for p in pairs}
    for pair in pairs:
        entry = few.index[pair.number]
        texts = [text_of(processor, tokens) for tokens in (pair.better, pair.worse)]
        assert texts == list(entry.alternatives)[:: 1 if entry.preferred == "a1" else -1]
    assert {few.index[p.number].preferred for p in pairs} == {"a1", "a2"}
    few.index[4] = type(clips.index[0])(**{**vars(few.index[4]), "preferred": ""})
    with pytest.raises(DataError, match=f"{few.index[4].name!r} has no preferred one"):
        annotated_pairs(few, processor)


class Said:
    """A generator whose answers are texts, four a clip."""

    group = 4

    def __init__(self, processor, texts):
        self.texts, self._processor = texts, processor

    def generated(self, trainable, dataset, question, *, seed):
        self.seed = seed
        for number, text in enumerate(self.texts):
            ids = self._processor.tokenizer.encode([text + self._processor.prompts.end])[0]
            tokens = np.asarray(ids, np.int32)
            yield number, Generated(tokens, np.int32(len(ids)), np.bool_(True), None)

    def read(self, generated):
        text = self._processor.tokenizer.decode(generated.tokens)
        return Answer(text.removesuffix(self._processor.prompts.end), 1, False, None)


def test_best_and_worst_of_a_models_own_samples_make_a_pair(clips, processor):
    few = RecordSubset(clips, range(3))
    right = [f"They feel {', '.join(entry.labels)}." for entry in few.index]
    texts = ["They feel qqq.", right[0], "They feel rrr.", "They feel sss."]
    texts += [right[1]] * 4  # all alike
    texts += ["They feel qqq.", "They feel rrr.", "They feel qqq.", right[2]]
    reward = Reward("wheel_f", Wheels(load_lexicon()))
    said = Said(processor, texts)
    pairs, none = sampled_pairs(few, processor, "ovlabel", said, None, reward, 0.2, 7)
    assert none == 1 and said.seed == 7
    found = [(p.number, text_of(processor, p.better), text_of(processor, p.worse)) for p in pairs]
    assert found == [(0, right[0], "They feel qqq."), (2, right[2], "They feel qqq.")]


def test_a_row_holds_a_pair_that_shares_its_prompt(clips, config, processor):
    pairs, _ = annotated_pairs(clips, processor)
    data = PairData(config, clips, processor, pairs)
    numbers = data.numbers(1)
    batch = data.batch(1)
    assert sorted(batch) == sorted(data.collate([], 8))
    for row, number in enumerate(numbers):
        pair = pairs[number]
        first, second = len(pair.better), len(pair.worse)
        signs = [1] * first + [-1] * second
        assert batch["signs"][row, : len(signs)].tolist() == signs
        assert not batch["signs"][row, len(signs) :].any()
        targets = np.concatenate([pair.better, pair.worse])
        np.testing.assert_array_equal(batch["targets"][row, : len(signs)], targets)
        start = len(pair.prompt)
        ids = [GROUP] * start + [GROUP + 1] * first + [GROUP + 2] * second
        assert batch["segment_ids"][row, : len(ids)].tolist() == ids
        # Both are predicted from the end of the prompt.
        at = batch["target_positions"][row]
        assert at[0] == at[first] == start - 1
    data.reference = [np.full(len(p) - len(p.prompt), i, np.float32) for i, p in enumerate(pairs)]
    known = data.batch(1)["reference_log_probs"]
    assert known[:, 0].tolist() == numbers.tolist()
    epoch = np.concatenate([data.numbers(step) for step in range(len(pairs))])
    assert sorted(epoch) == sorted(list(range(len(pairs))) * 8)
    halves = [PairData(config, clips, processor, pairs, (i, 2)).batch(1) for i in (0, 1)]
    both = np.concatenate([half["tokens"] for half in halves])
    np.testing.assert_array_equal(both, batch["tokens"])
    short = config.copy_and_resolve_references()
    short.max_tokens = 20
    with pytest.raises(DataError, match="over config.max_tokens=20"):
        PairData(short, clips, processor, pairs)


# --- the command ----------------------------------------------------------------------------------


def flags(trained_run, records, workdir, **more):
    keys = {
        "steps": 4,
        "checkpoint_every": 2,
        "optimizer.learning_rate": 3e-3,
        "dpo.data": records,
        "dpo.pairs": 8,
        "dpo.prompts": 8,
        "dpo.group": 2,
        "dpo.val_share": 0.2,
        "dpo.test_clips": 8,
        "dpo.test_samples": 2,
        "dpo.consensus": 4,
    } | more
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    return [f"--workdir={workdir}", f"--from={trained_run}", *overrides]


@pytest.fixture(scope="module")
def finished(trained_run, records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("preferred") / "run"
    prefer.main(flags(trained_run, records, workdir))
    return workdir


def test_a_run_goes_on_by_preferences_and_to_the_same_bytes_when_it_is_stopped(
    finished, trained_run, records, tmp_path
):
    result = json.loads((finished / "result.json").read_text())
    pairs = result["pairs"]
    assert pairs["train"] + pairs["held_out"] <= 40 and 0 <= pairs["accuracy"] <= 1
    metrics = [m for m in read_metrics(finished / "metrics.jsonl") if "train/loss" in m]
    # No pair is told apart at the start; what is beyond a coin's is the preferred answers' NLL.
    assert abs(metrics[0]["train/margin"]) < 1e-4
    assert np.log(2) + 0.01 < metrics[0]["train/loss"] < np.log(2) + 2
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4")
    prefer.main(flags(trained_run, records, workdir))
    ends = [jax.device_get(load_run(run, 4).trainable) for run in (finished, workdir)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_samples_are_asked_for_by_prompts_that_are_longer_than_those_of_the_test_clips(
    trained_run, tmp_path, monkeypatch
):
    long = list(demo.World(0).records("rl", 16))
    long[3] = dataclasses.replace(long[3], subtitle="they said it again " * 4)
    write_records(tmp_path / "long", long, encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo"))
    asked = []

    def sampled(dataset, processor, question, generator, trainable, reward, gap, seed):
        found = dict(generator.generated(trainable, dataset, question, seed=seed))
        asked.append((len(dataset), len(found), seed))
        return [], 0

    monkeypatch.setattr(prefer, "sampled_pairs", sampled)
    keys = {"dpo.source": "samples", "dpo.val_share": 0.3, "seed": 3}
    with pytest.raises(SystemExit, match="no pair to train"):
        prefer.main(flags(trained_run, tmp_path / "long", tmp_path / "run", **keys))
    assert asked == [(14, 28, 3)]


@pytest.mark.parametrize(("key", "held_out"), [("dpo", False), ("rl", True)])
def test_preferences_are_held_out_by_their_own_share_alone(
    trained_run, records, tmp_path, key, held_out
):
    run = load_run(trained_run)
    config = run.config.copy_and_resolve_references()
    config[key] = SECTIONS[key]()
    config[key].data, config.data.val, config.data.val_share = str(records), "", 0.5
    found = open_clips(config, key, tmp_path, run, print)
    assert sorted(found) == (["rl", "test", "val"] if held_out else ["rl", "test"])
    assert len(found["rl"]) == 40 - len(found.get("val", ()))


@pytest.mark.parametrize("key", ["dpo", "rl"])
def test_clips_that_the_start_was_trained_on_are_said_or_refused(trained_run, tmp_path, key):
    run = load_run(trained_run)
    seen = run.config.data.train
    config = run.config.copy_and_resolve_references()
    config[key] = SECTIONS[key]()
    config[key].data = seen
    said = []
    open_clips(config, key, tmp_path, run, said.append)
    [warning] = said
    assert warning.startswith(f"warning: 24 clips of config.{key}.data are among those that ")
    config.strict_leaks = True
    with pytest.raises(ConfigError, match=f"24 clips of config.{key}.data are among those that"):
        open_clips(config, key, tmp_path, run, said.append)
    # Of a part of a set, held out by the run itself, only the others were trained on.
    mixed = run.config.copy_and_resolve_references()
    mixed.data.train, mixed.data.val, mixed.data.val_share = "", "", 0.5
    mixed.data.mixture.some = affectgpt_qwen25_7b.data_set(seen, share=0.7)
    mixed.data.mixture.gone = affectgpt_qwen25_7b.data_set(str(tmp_path / "gone"))
    mixed.data.mixture.world = affectgpt_qwen25_7b.data_set("demo:3")
    config.strict_leaks, said[:] = False, []
    open_clips(config, key, tmp_path, dataclasses.replace(run, config=mixed), said.append)
    trained, _ = hold_out(subsample(RecordDataset(seen), 0.7), 0.5)
    assert 0 < len(trained) < 17 and f"warning: {len(trained)} clips of" in said[0]
    assert said[1].endswith(f"since these records are not here: {tmp_path}/gone, demo:3")
    assert not (trained_run / "data").exists()  # nothing is generated to be compared


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"dpo.beta": 0.0}, "beta is 0.0; expected over 0"),
        ({"dpo.source": "people"}, "config.dpo.source is 'people'"),
        ({"dpo.pairs": 12}, "config.dpo.pairs=12 cannot be shared by 8 devices"),
        ({"dpo.val_share": 1.0}, "config.dpo.val_share is 1.0"),
        ({"dpo.data": ""}, "config.dpo.data names no records"),
        ({"batch_size": 8}, "the rows of an update follow from config.dpo.pairs; set those"),
        ({"dtype": "bfloat16"}, "config.dtype is 'bfloat16', but 'float32' in the run to start"),
        ({"dpo.test_lexicon": "/nowhere"}, "/nowhere"),
        (
            {"dpo.source": "samples", "dpo.question": "onehot"},
            "ovlabel, but not on config.dpo.question=onehot; what it",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(trained_run, records, tmp_path, more, said):
    with pytest.raises(SystemExit) as stopped:
        prefer.main(flags(trained_run, records, tmp_path / "run", **more))
    assert said in str(stopped.value)


# --- as commands ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_prefer_as_one_does_and_find_what_they_made(trained_run, records, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    _, *keys = flags(trained_run, records, "", mesh="data:-1")
    finish(one, *keys, module=MODULE)

    def together():
        started = group(two, 2, *keys, settings={"jax_num_cpu_devices": 1}, module=MODULE)
        with ending(started) as commands:
            for command in commands:
                assert command.wait(timeout_s=900) == 0, command.said
            return [command.said for command in commands]

    first, second = together()
    assert "Before and after" in first and "Before and after" not in second
    found, wanted = (trace(run) for run in (two, one))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    for x, y in zip(
        *(jax.tree.leaves(SavedRun(run).trainable(4)) for run in (two, one)), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-3)
    made = {file: file.read_bytes() for file in two.glob("*_*.json")}
    times = {file: file.stat().st_mtime_ns for file in made}
    assert {"reference_train.json", "reference_val.json"} < {file.name for file in made}
    result = json.loads((two / "result.json").read_text())
    together()
    assert {file: file.stat().st_mtime_ns for file in made} == times
    again = json.loads((two / "result.json").read_text())
    assert (again["before"], again["after"]) == (result["before"], result["after"])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["records", "samples"])
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(
    source, trained_run, records, tmp_path
):
    """Most of its time it samples, compiles and asks, so moments are drawn, and not steps."""
    _, *keys = flags(trained_run, records, "", mesh="data:-1", **{"dpo.source": source})
    # The start has hardly learned: what it says differs by its length alone.
    keys += ["--config.dpo.gap=0.01"]
    expected, workdir = tmp_path / "undisturbed", tmp_path / "run"
    # What the first one compiles, the others find.
    for run in (tmp_path / "first", expected):
        began_s = time.monotonic()
        finish(run, *keys, module=MODULE)
        took_s = time.monotonic() - began_s
    killed = 0
    for share in np.random.default_rng(0).uniform(0.2, 1.0, KILLS):
        with Command(workdir, *keys, module=MODULE) as command:
            command.process.join(took_s * share)
            killed += not command.ended
    assert killed
    finish(workdir, *keys, module=MODULE)
    ends = [SavedRun(run).trainable(4) for run in (workdir, expected)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert losses(workdir) == losses(expected)
    found, wanted = (json.loads((w / "result.json").read_text()) for w in (workdir, expected))
    for key in ("before", "after", "sampled_reward_gain_interval", "best_step", "pairs"):
        assert found[key] == wanted[key]
    if source == "samples":
        files = [run / "pairs_train.json" for run in (workdir, expected)]
        assert files[0].read_bytes() == files[1].read_bytes()
