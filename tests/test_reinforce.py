"""The command that reinforces a run, as a user starts it, on a run that has hardly learned."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from commands import Command, ending, finish, group, trace

from affectgpt_jax import load_run, reinforce
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records
from affectgpt_jax.training.checkpoints import SavedRun
from affectgpt_jax.training.metrics_writer import read_metrics

MODULE = "affectgpt_jax.reinforce"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Records that supervision has not seen."""
    folder = tmp_path_factory.mktemp("clips") / "rl"
    records = demo.World(0).records("rl", 32)
    write_records(folder, records, encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo"))
    return folder


def flags(trained_run, clips, workdir, steps=4, **more):
    """8 devices share 8 prompts with 2 answers each."""
    keys = {
        "steps": steps,
        "checkpoint_every": 2,
        "optimizer.learning_rate": 3e-3,
        "rl.data": clips,
        "rl.prompts": 8,
        "rl.group": 2,
        "rl.val_clips": 8,
        "rl.test_clips": 8,
        "rl.test_samples": 2,
        "rl.consensus": 4,
        "rl.beta": 0.01,
        "rl.wheels": "(1, 2, 3)",
        "rl.drop_flat": False,
        "rl.mask_cut": False,
        # A model that has hardly learned earns nothing, and learns nothing from that.
        "rl.sft_share": 0.5,
    } | more
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    return [f"--workdir={workdir}", f"--from={trained_run}", *overrides]


@pytest.fixture(scope="module")
def finished(trained_run, clips, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reinforced") / "run"
    reinforce.main(flags(trained_run, clips, workdir))
    return workdir


def trainable_of(workdir, step=4):
    return jax.device_get(load_run(workdir, step).trainable)


def test_a_run_goes_on_by_rewards_and_says_what_that_changed(finished, trained_run, clips):
    result = json.loads((finished / "result.json").read_text())
    assert result["steps"] == 4 and result["ended_by"] == "steps" and result["clips"] == 8
    for when in ("before", "after"):
        for key in ("sampled_reward", "greedy_f", "greedy_hit", "consensus_f"):
            assert 0 <= result[when][key] <= 1
        assert result[when]["labels_per_clip"] >= 0
    low, high = result["sampled_reward_gain_interval"]
    gain = result["after"]["sampled_reward"] - result["before"]["sampled_reward"]
    assert result["sampled_reward_gain"] == pytest.approx(gain)
    assert low <= gain <= high
    other = result["other_wheels"]  # by which no answer was rewarded
    assert other["wheels"] == [4, 5] and 0 < other["clips"] <= 8
    gain = other["after"]["sampled_reward"] - other["before"]["sampled_reward"]
    assert other["sampled_reward_gain"] == pytest.approx(gain)
    # Written and trained log-probabilities agree, and the first step starts at the start.
    metrics = read_metrics(finished / "metrics.jsonl")
    by_step = {m["step"]: m for m in metrics if "train/reward" in m}
    assert sorted(by_step) == [1, 2, 3, 4]
    assert all(m["train/mismatch"] < 1e-5 for m in by_step.values())
    assert abs(by_step[1]["train/kl"]) < 1e-6 < by_step[4]["train/kl"]
    assert all(m["train/ratio"] == pytest.approx(1, abs=1e-6) for m in by_step.values())
    # The adapters of a checkpoint are not those of the start.
    old, new = trainable_of(trained_run, None), trainable_of(finished)
    changes = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), old, new)
    assert min(jax.tree.leaves(changes["fusion"])) >= 0 < max(jax.tree.leaves(changes["lora"]))
    config = load_run(finished).config
    assert config.rl.start_sha256 == load_run(trained_run).fingerprint(config.rl.start_step)
    assert config.lora.dropout == 0 and config.rl.data == str(clips)


def test_a_run_that_stops_between_its_steps_goes_on_to_the_same_bytes(
    finished, trained_run, clips, tmp_path
):
    """As a run that is killed behind its checkpoint of step 2 does."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4")
    for file in ("result.json", "answers_before.json"):
        (workdir / file).unlink()
    reinforce.main(flags(trained_run, clips, workdir))
    jax.tree.map(np.testing.assert_array_equal, trainable_of(workdir), trainable_of(finished))
    before, after = (json.loads((d / "result.json").read_text()) for d in (finished, workdir))
    for key in ("before", "after", "sampled_reward_gain", "best_step"):
        assert before[key] == after[key]


def test_a_run_that_is_trained_anew_takes_nothing_of_the_run_before(
    finished, trained_run, clips, tmp_path
):
    """What lies there is about as many clips, but of another run, and would score 0."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    best = json.loads((workdir / "result.json").read_text())["best_step"]
    (workdir / "ended.json").write_text('{"step": 1, "kl": 9.0}')
    for name in ("answers_before.json", f"answers_step_{best}.json"):
        file = workdir / name
        kept = json.loads(file.read_text())
        kept["content"] = {
            "greedy": [None for _ in kept["content"]["greedy"]],
            "samples": [[None for _ in drawn] for drawn in kept["content"]["samples"]],
        }
        file.write_text(json.dumps(kept | {"made_of": "f" * 64}))
    reinforce.main(flags(trained_run, clips, workdir))
    before, after = (json.loads((d / "result.json").read_text()) for d in (finished, workdir))
    for key in ("before", "after", "best_step", "ended_by"):
        assert before[key] == after[key]


def test_a_run_ends_by_itself_where_it_has_gone_too_far(
    finished, trained_run, clips, tmp_path, capsys
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4")
    config = json.loads((workdir / "config.json").read_text())
    config["rl"]["stop_kl"] = 1e-9
    (workdir / "config.json").write_text(json.dumps(config))
    command = flags(trained_run, clips, workdir, **{"rl.stop_kl": 1e-9})
    reinforce.main(command)
    assert "step 3: the KL to the start is" in capsys.readouterr().out
    result = json.loads((workdir / "result.json").read_text())
    assert (result["steps"], result["ended_by"]) == (3, "stop_kl")
    reinforce.main(command)  # has nothing left to do
    assert json.loads((workdir / "result.json").read_text())["steps"] == 3


def test_a_run_whose_answers_are_all_cut_says_once_that_it_learns_nothing(
    trained_run, clips, tmp_path, capsys
):
    keys = {"rl.max_new_tokens": 2, "rl.mask_cut": True, "rl.sft_share": 0.0}
    reinforce.main(flags(trained_run, clips, tmp_path / "run", steps=7, **keys))
    said = capsys.readouterr().out
    assert said.count("no group of the last 5 steps was kept") == 1
    assert "100% of the answers were cut" in said
    old, new = trainable_of(trained_run, None), trainable_of(tmp_path / "run", 7)
    jax.tree.map(np.testing.assert_array_equal, old, new)


# --- as commands ----------------------------------------------------------------------------------


def keys_of(trained_run, clips, **more):
    """Flags of a run whose updates are on one device, without its workdir."""
    first, *others = flags(trained_run, clips, "", **{"mesh": "data:-1", **more})
    return others


@pytest.fixture(scope="module")
def undisturbed(trained_run, clips, tmp_path_factory):
    """The workdir of a command to which nothing has happened, and its flags."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    keys = keys_of(trained_run, clips, steps=6, **{"rl.updates": 2})
    finish(workdir, *keys, module=MODULE)
    return workdir, keys


def learned(workdir):
    """What training alone logs of every step: no times."""
    names = ("reward", "kl", "entropy", "labels", "loss", "groups_kept", "ratio", "answer_tokens")
    found = trace(workdir, ("train/", "val/"))
    return {key: x for key, x in found.items() if key[1].split("/")[1] in names or "val/" in key[1]}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_at_any_step_goes_on_to_the_same_bytes(undisturbed, tmp_path, seed):
    expected, keys = undisturbed
    workdir = tmp_path / "run"
    for step in sorted(np.random.default_rng(seed).choice(range(1, 6), 2, replace=False)):
        with Command(workdir, *keys, module=MODULE) as command:
            assert command.until(command.at_step(int(step))), command.said
    finish(workdir, *keys, module=MODULE)
    jax.tree.map(
        np.testing.assert_array_equal, *(SavedRun(w).trainable(6) for w in (workdir, expected))
    )
    assert learned(workdir) == learned(expected)
    # The KL is that of the model that wrote, also where it is updated twice: first, of the start.
    assert abs(learned(expected)[1, "train/kl"]) < 1e-6
    found, wanted = (json.loads((w / "result.json").read_text()) for w in (workdir, expected))
    for key in ("before", "after", "sampled_reward_gain_interval", "best_step", "ended_by"):
        assert found[key] == wanted[key]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh", "microbatches"),
    [
        (1, 1, "data:-1", 4),
        (2, 1, "data:-1", 1),
        (2, 1, "fsdp:2", 2),
        (2, 2, "data:2,tensor:2", 1),
    ],
)
def test_microbatches_and_several_processes_reinforce_as_one_does(
    undisturbed, tmp_path, count, devices, mesh, microbatches
):
    expected, keys = undisturbed
    workdir, settings = tmp_path / "run", {"jax_num_cpu_devices": devices}
    keys = [key for key in keys if "config.mesh" not in key]
    keys += [f"--config.mesh={mesh}", f"--config.gradient_accumulation_steps={microbatches}"]
    started = group(workdir, count, *keys, settings=settings, module=MODULE)
    with ending(started) as commands:
        for command in commands:
            assert command.wait(timeout_s=900) == 0, command.said
        assert "Before and after" in commands[0].said
        assert not any("Before and after" in command.said for command in commands[1:])
    found, wanted = learned(workdir), learned(expected)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    for x, y in zip(
        *(jax.tree.leaves(SavedRun(w).trainable(6)) for w in (workdir, expected)), strict=True
    ):
        # Adam makes steps of 3e-3 out of gradients that are nothing but rounding.
        np.testing.assert_allclose(x, y, atol=1e-3)
    found, wanted = (json.loads((w / "result.json").read_text()) for w in (workdir, expected))
    assert found["before"] == wanted["before"]


# --- what is refused ------------------------------------------------------------------------------


def refused(*arguments):
    with pytest.raises(SystemExit) as stopped:
        reinforce.main(list(map(str, arguments)))
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_another_run_in_its_workdir_is_refused(finished, trained_run, clips):
    message = refused(*flags(trained_run, clips, finished, **{"rl.group": 4}))
    assert "holds a run with config.rl.group=2, but now it is 4" in message


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rl.reward": "hit", "rl.length_penalty": 0}, "'hit' without a length_penalty"),
        ({"rl.group": 1}, "config.rl.group is 1; expected 2 or more"),
        ({"rl.data": ""}, "config.rl.data names no records"),
        ({"rl.data": "/nowhere"}, "/nowhere/manifest.json is missing"),
        ({"rl.prompts": 12}, "cannot be shared by 8 devices"),
        ({"rl.wheels": "(7,)"}, "wheels (7,)"),
        ({"lora.dropout": 0.1}, "config.lora.dropout and config.qformer.dropout must be 0"),
        ({"rl.epsilon": 2}, "epsilon is 2.0"),
        ({"base_precision": "int8"}, "config.base_precision is 'int8', but '' in the run to start"),
        ({"lora.alpha": 64}, "leave config.lora.alpha out"),
        ({"prompts": "default"}, "config.prompts is 'default', but 'compact' in the run"),
        ({"input": "text"}, "config.input is 'text', but"),
        ({"projectors.fusion_width": 8}, "leave config.projectors.fusion_width out"),
        ({"batch_size": 8}, "config.batch_size cannot be set here: the rows of an update follow"),
        ({"pack_length": 4096}, "config.pack_length cannot be set here"),
        ({"init_from": "elsewhere"}, "config.init_from cannot be set here"),
        ({"rl.test_lexicon": "/nowhere"}, "/nowhere"),
        ({"rl.question": "onehot"}, "ovlabel, but not on config.rl.question=onehot; what it would"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(trained_run, clips, tmp_path, more, said):
    assert said in refused(*flags(trained_run, clips, tmp_path / "run", **more))


@pytest.mark.parametrize("part", ["val", "test"])
def test_clips_that_cannot_be_scored_are_refused_by_their_key(trained_run, clips, tmp_path, part):
    records = [dataclasses.replace(r, labels=("qqq",)) for r in demo.World(0).records(part, 4)]
    write_records(tmp_path / part, records, encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo"))
    command = flags(trained_run, clips, tmp_path / "run", **{f"data.{part}": tmp_path / part})
    message = refused(*command)
    assert f"none of the 4 clips of config.data.{part} has a label on a wheel" in message


def test_a_workdir_without_a_run_is_refused(tmp_path):
    assert "holds no run" in refused(f"--workdir={tmp_path}/a", f"--from={tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workdir=a"], "one of the arguments --from --checkpoint is required"),
        (["--workdir=a", "--from=b", "--checkpoint=c"], "not allowed with argument --from"),
        (["--workdir=a", "--checkpoint=./a"], "--checkpoint are the same run; name a new"),
        (["--workdir=a", "--from=b", "--config=demo"], "--config goes with --checkpoint; a run"),
        (["--workdir=a", "--from=a"], "are the same run; name a new --workdir"),
        (["--workdir=a", "--from=b", "c"], "unknown argument c"),
        (["--workdir=a", "--from=b", "--config.steps"], "unknown argument --config.steps"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        reinforce.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
