"""What scripts and notebooks call, and the notebook that shows it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import affectgpt_jax
from affectgpt_jax import ask_clips, evaluate_run, get_config, load_run, run_training, score_files
from affectgpt_jax.cli import UsageError
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.config import ConfigError

NOTEBOOK = Path(__file__).parents[1] / "docs" / "demo.ipynb"


@pytest.fixture(scope="module")
def run(trained_run):
    return load_run(str(trained_run))


def test_the_package_offers_what_its_api_does():
    from affectgpt_jax import api

    assert sorted(affectgpt_jax.__all__) == sorted(api.__all__)
    assert set(affectgpt_jax.__all__) <= set(dir(affectgpt_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        affectgpt_jax.nothing  # noqa: B018


def test_a_config_is_that_of_the_command_line():
    config = get_config("affectgpt_qwen25_7b:24", seed=3, **{"optimizer.learning_rate": 1e-3})
    assert (config.batch_size, config.seed, config.optimizer.learning_rate) == (24, 3, 1e-3)
    for wrong in ({"stepz": 1}, {"steps": "many"}, {"steps": 0}, {"optimizer.beta3": 0.5}):
        with pytest.raises(ConfigError, match=f"config.{next(iter(wrong))}"):
            get_config("demo", **wrong)


def test_a_finished_run_is_resumed_and_an_interruption_is_one_of_the_keyboard(
    trained_run, tmp_path, monkeypatch
):
    from affectgpt_jax import train
    from affectgpt_jax.restore import load_config
    from affectgpt_jax.training.stopping import Stopped

    given = []

    def stop(config, workdir, **options):
        given.append((config, workdir, options))
        raise Stopped(130)

    monkeypatch.setattr(train, "train", stop)
    config = load_config(trained_run)
    with pytest.raises(KeyboardInterrupt, match="goes on from there"):
        run_training(config, tmp_path / "run", fallback=True)
    assert given == [(config, tmp_path / "run", {"fallback": True, "allow_other": ()})]
    config.steps = 0
    with pytest.raises(ConfigError, match="config.steps is 0"):
        run_training(config, tmp_path / "run")


def test_answers_are_those_of_the_command(run, trained_run, tmp_path, capsys):
    from affectgpt_jax import predict

    names = ["demo-test-00002", "demo-test-00005"]
    answers = ask_clips(run, "ovlabel", names=names)
    flags = [f"--workdir={trained_run}", "--json", "--question=ovlabel"]
    predict.main([*flags, *(f"--name={name}" for name in names)])
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(said, key=lambda line: line["name"]) == answers
    with pytest.raises(predict.PredictError, match="none of the 12 clips is named 'nobody'"):
        ask_clips(run, "ovlabel", names=["nobody"])
    with pytest.raises(predict.PredictError, match="temperature"):
        ask_clips(run, "ovlabel", temperature=-1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"first": 0}, "first is 0; expected 1 or more"),
        ({"batch_size": -1}, "batch_size is -1; expected 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 or more"),
        ({"seed": -1}, "seed is -1; expected 0 to 4294967295"),
        ({"names": []}, "names is to hold names of clips"),
        ({"names": ["a"], "first": 1}, "first to be None beside it"),
        ({"names": ["a", "a"]}, "names has a clip twice"),
        ({"names": "nobody"}, "is named 'nobody'"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_what_cannot_be_asked_is_refused(run, given, message):
    with pytest.raises(UserError, match=message):
        ask_clips(run, "ovlabel", **given)


def test_a_report_and_scores_come_back(run, tmp_path):
    report = evaluate_run(run, max_clips=4, bootstrap=0, out=tmp_path / "report")
    assert report.sets[0].fixed.score.counts["clips"] == 4
    assert (tmp_path / "report" / "report.html").is_file()
    with pytest.raises(UsageError, match="invalid choice: 'mood'"):
        evaluate_run(run, question="mood")
    (tmp_path / "p.csv").write_text("name,labels\na,happy\nb,sad\n")
    (tmp_path / "t.csv").write_text("name,emotion\na,happy\nb,angry\n")
    [result] = score_files("words", tmp_path / "p.csv", tmp_path / "t.csv", bootstrap=0)
    assert list(result.score.values.values()) == [0.5]


def cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_the_notebook_runs(trained_run, tmp_path, monkeypatch, capsys):
    """With another run in place of its own, which .ci/run trains."""
    monkeypatch.chdir(tmp_path)

    def trained(config, workdir):
        assert config.steps == 150
        shutil.copytree(trained_run, workdir)
        result = json.loads((trained_run / "result.json").read_text())
        return result | {"hit_features_shuffled": 0.0, "ceilings": {"face_text": 0.3}}

    monkeypatch.setattr(affectgpt_jax.api, "run_training", trained)
    space = {}
    for cell in cells():
        exec(compile(cell, str(NOTEBOOK), "exec"), space)
    said = capsys.readouterr().out
    assert "ceiling with face + text" in said
    assert "demo-test-00000 [" in said
    assert len(space["shares"]) == 3  # layers of the tiny base


def test_the_notebook_is_formatted_and_types_are_marked():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", str(NOTEBOOK)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert (Path(affectgpt_jax.__file__).parent / "py.typed").exists()
