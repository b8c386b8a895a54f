"""What commands write is whole or not there: on a disk that is full, and when they are killed."""

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from affectgpt_jax import evaluate, import_arrays, labels, predict, report, score
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records
from affectgpt_jax.weights import __main__ as weights
from data_prep import datasets, statistics, to_tfds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# --- sources --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(trained_run, tmp_path_factory):
    """Inputs of all commands in one folder; a run lies in `run`."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "run").symlink_to(trained_run)
    clips = list(demo.World(0).records("train", 64, ("face",)))
    write_records(folder / "records", clips, encoders={"face": "clip"})
    (folder / "face").mkdir()
    for clip in clips:
        if "face" in clip.features:
            np.save(folder / "face" / f"{clip.name}.npy", clip.features["face"])
    with (folder / "clips.csv").open("w", newline="") as file:
        rows = [(clip.name, "[happy]", clip.subtitle) for clip in clips if clip.features]
        csv.writer(file).writerows([("name", "labels", "subtitle"), *rows])
    names = [clip.name for clip in clips]
    for name, column in (("truth", "openset"), ("predictions", "labels")):
        lines = "".join(f'{clip},"[happy, sad]"\n' for clip in names)
        (folder / f"{name}.csv").write_text(f"name,{column}\n{lines}")
    meld = folder / "meld"
    meld.mkdir()
    lines = "".join(f"Oh,joy,{n},0\n" for n in range(200))
    (meld / "test_sent_emo.csv").write_text(f"Utterance,Emotion,Dialogue_ID,Utterance_ID\n{lines}")
    return folder


SCORED = ["--predictions={s}/predictions.csv", "--truth={s}/truth.csv", "--bootstrap=0"]
IMPORT = ["--csv={s}/clips.csv", "--face={s}/face", "--encoder=face=clip"]
# Of each command: what runs it, what it is given, and where it writes, {o} being the output.
COMMANDS = {
    "predict": (predict.main, ["--workdir={s}/run", "--out={o}/answers.jsonl"]),
    "evaluate": (evaluate.main, ["--workdir={s}/run", "--bootstrap=0", "--out={o}/evaluated"]),
    "import_arrays": (import_arrays.main, [*IMPORT, "--allow-missing", "--out={o}/records"]),
    "labels": (labels.main, ["--set=meld", "--root={s}/meld", "--out={o}/meld.csv"]),
    "datasets": (datasets.main, ["--set=meld", "--root={s}/meld", "--out={o}/meld.csv"]),
    "score": (score.main, ["--task=fine", *SCORED, "--json={o}/report.json"]),
    "report": (
        report.main,
        ["--set=mine:fine={s}/predictions.csv,{s}/truth.csv", "--out={o}/report"],
    ),
    "statistics": (statistics.main, ["--records={s}/records", "--out={o}/statistics"]),
    "to_tfds": (to_tfds.main, ["--records=train={s}/records", "--out={o}/tfds"]),
    "export-peft": (weights.main, ["export-peft", "{s}/run", "{o}/adapter"]),
    "merge": (weights.main, ["merge", "{s}/run", "{o}/merged"]),
    "export-release": (weights.main, ["export-release", "{s}/run", "{o}/run.pth"]),
}
WRITES_MUCH = [name for name in COMMANDS if name not in ("labels", "datasets", "score")]


def arguments(name, sources, out):
    return [text.format(s=sources, o=out) for text in COMMANDS[name][1]]


def contents(folder):
    """All files below a folder, but locks and those that a killed command may leave behind."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != ".lock"
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def answers(data):
    """What a file of answers says. Other clips in a batch may change their order and the last
    digits of their probabilities."""
    lines = map(json.loads, data.splitlines())
    return sorted((line["name"], line.get("question"), line["text"]) for line in lines)


def _has_answers(path):
    return path.endswith(".jsonl") and not path.endswith("index.jsonl")


def said(files):
    """The content of files, by path: bytes, and of files of answers what they say."""
    return {path: answers(d) if _has_answers(path) else d for path, d in files.items()}


# --- full disks -----------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, free):
    """A file system of its own with so many bytes left."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        (folder / "filler").write_bytes(bytes(256 * 1024 - free))
        yield folder
    finally:
        # Lazily: a library may still hold a file open that it could not write.
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    ("name", "free"), [(n, 0) for n in COMMANDS] + [(n, 12 * 1024) for n in WRITES_MUCH]
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(name, free, sources, tmp_path):
    run, _ = COMMANDS[name]
    whole = tmp_path / "whole"
    whole.mkdir()
    run(arguments(name, sources, whole))
    expected = contents(whole)
    with small_disk(tmp_path / "disk", free) as disk:
        with pytest.raises(SystemExit) as stopped:
            run(arguments(name, sources, disk))
        sentence = str(stopped.value.code)
        assert sentence.startswith("error: ") and "\n" not in sentence
        assert any(word in sentence for word in ("No space left", "disk is full", "disk full")), (
            sentence
        )
        found = contents(disk)
        del found["filler"]
        for path, data in found.items():
            if _has_answers(path):  # they grow, by whole answers
                whole_lines = data[: data.rfind(b"\n") + 1]
                assert set(answers(whole_lines)) <= set(answers(expected[path]))
            else:
                assert data == expected[path], path


# --- killed ---------------------------------------------------------------------------------------

KILLS = 20
# Each is a process of its own, which is killed at any time between its start and its end.
KILLED = {
    "predict": "affectgpt_jax.predict",
    "evaluate": "affectgpt_jax.evaluate",
    "import_arrays": "affectgpt_jax.import_arrays",
    "export-peft": "affectgpt_jax.weights",
    "merge": "affectgpt_jax.weights",
    "datasets": "data_prep.datasets",
}


def start(name, sources, out):
    command = [sys.executable, "-m", KILLED[name], *arguments(name, sources, out)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", KILLED)
def test_a_command_that_is_killed_gives_the_same_bytes_when_it_is_run_again(
    name, sources, tmp_path
):
    rng = random.Random(name)
    whole, out = tmp_path / "whole", tmp_path / "out"
    whole.mkdir()
    out.mkdir()
    began_s = time.monotonic()
    process = start(name, sources, whole)
    told, _ = process.communicate()
    assert process.returncode == 0, told
    took_s = time.monotonic() - began_s
    expected = contents(whole)
    for _ in range(KILLS):
        process = start(name, sources, out)
        # Most of the time is the start, in which nothing is written.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(took_s * rng.uniform(0.4, 1.0))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        # What has its final name is whole.
        for path, data in contents(out).items():
            if not _has_answers(path):
                assert data == expected[path], path
    process = start(name, sources, out)
    told, _ = process.communicate()
    done_already = "exists already" in told or "already holds records" in told
    assert process.returncode == 0 or done_already, told
    assert said(contents(out)) == said(expected)
