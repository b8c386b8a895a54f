"""What commands write is whole or not there: on a disk that is full, and when they are killed."""

import contextlib
import csv
import dataclasses
import functools
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time

import commands
import numpy as np
import pytest
from chat_stub import Stub
from clip_files import write_talking
from needs_torch import torch  # noqa: F401 - an extraction runs encoders
from release_source import SOURCE
from small_encoders import save_encoder

from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records
from data_prep.crowd.votes import Vote, write_votes
from data_prep.speakers.verdicts import write_speakers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# --- commands -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that writes.

    Attributes:
        module: that runs it.
        arguments: `{o}` is the output, `{s}` the sources.
        begun: folders of the sources that the command goes on in.
        much: whether it writes more than a few kilobytes.
        separate: whether it must be a process of its own.
    """

    module: str
    arguments: tuple[str, ...]
    begun: tuple[str, ...] = ()
    much: bool = True
    separate: bool = False


def case(module, *arguments, **more):
    return Case(module, arguments, **more)


few = functools.partial(case, much=False)
SCORED = ("--predictions={s}/predictions.csv", "--truth={s}/truth.csv", "--bootstrap=0")
IMPORT = ("--csv={s}/clips.csv", "--face={s}/face", "--encoder=face=clip", "--allow-missing")
CLIPS = "--clips={s}/talking"
CAPTION = functools.partial(case, "data_prep.caption")
SHORT = functools.partial(few, "data_prep.caption")
SERVER = ("--base-url={url}", "--model=omni")
MEMBERS = ("--folds=2", "--seeds=1", "--hidden=8", "--epochs=3", "--no-text")
COMMANDS = {
    "predict": case("affectgpt_jax.predict", "--workdir={s}/run", "--out={o}/answers.jsonl"),
    "evaluate": case(
        "affectgpt_jax.evaluate", "--workdir={s}/run", "--bootstrap=0", "--out={o}/evaluated"
    ),
    "import_arrays": case("affectgpt_jax.import_arrays", *IMPORT, "--out={o}/records"),
    "labels": few("affectgpt_jax.labels", "--set=meld", "--root={s}/meld", "--out={o}/meld.csv"),
    "datasets": few("data_prep.datasets", "--set=meld", "--root={s}/meld", "--out={o}/meld.csv"),
    "score": few("affectgpt_jax.score", "--task=fine", *SCORED, "--json={o}/report.json"),
    "report": case(
        "affectgpt_jax.report",
        *("--set=mine:fine={s}/predictions.csv,{s}/truth.csv", "--out={o}/report"),
    ),
    "plan": few(
        "affectgpt_jax.plan",
        *("--devices=8", "--shape=1x32", "--config.input=text", "--json={o}/plan.json"),
        separate=True,
    ),
    "statistics": case("data_prep.statistics", "--records={s}/records", "--out={o}/statistics"),
    "to_tfds": case("data_prep.to_tfds", "--records=train={s}/records", "--out={o}/tfds"),
    "export-peft": case("affectgpt_jax.weights", "export-peft", "{s}/run", "{o}/adapter"),
    "merge": case("affectgpt_jax.weights", "merge", "{s}/run", "{o}/merged"),
    "export-release": case("affectgpt_jax.weights", "export-release", "{s}/run", "{o}/run.pth"),
    "release-prompts": few(
        "data_prep.release_prompts", "--source={s}/base_dataset.py", "--out={o}/release.toml"
    ),
    "extract": case(
        "data_prep.extract",
        *(CLIPS, "--out={o}/extracted", "--video=clip={s}/encoders/clip"),
        *("--audio=hubert={s}/encoders/hubert", "--workers=1", "--batch=1"),
    ),
    "speakers": few("data_prep.speakers", "check", CLIPS, "--out={o}/who.csv", "--workers=1"),
    "crowd train": case(
        "data_prep.crowd", "train", "--out={o}/crowd", "--set=a:emotion={s}/labelled", *MEMBERS
    ),
    "crowd vote": few(
        "data_prep.crowd",
        *("vote", "--crowd={o}/crowd", "--records={s}/labelled", "--out={o}/votes.csv"),
        begun=("crowd",),
    ),
    "describe": CAPTION("describe", "audio", CLIPS, "--out={o}/caption", *SERVER),
    "caption merge": SHORT("merge", "--out={o}/caption", *SERVER, begun=("caption/described",)),
    "caption labels": SHORT("labels", "--out={o}/caption", *SERVER, begun=("caption/merged",)),
    "filter": CAPTION("filter", "--out={o}/caption", begun=("caption/labelled",)),
    "card": CAPTION("card", "--out={o}/caption", begun=("caption/filtered",)),
    "compare": SHORT(
        *("compare", "--out={o}/caption", "--against={s}/theirs.csv"), begun=("caption/labelled",)
    ),
    "choose": SHORT(
        *("choose", "--records={s}/labelled", "--replies=x={s}/theirs.csv", "--out={o}/caption")
    ),
}


def describes(body):
    """A server that says the same about all clips."""
    content = body["messages"][0]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    if "list format" in text:
        said = "[joyful, amused]"
    elif "candidates" in text:
        said = "positive"
    else:
        said = "They smile and sound joyful. " * 8
    choice = {"message": {"content": said}, "finish_reason": "stop"}
    return 200, {}, json.dumps({"choices": [choice]})


@pytest.fixture(scope="module")
def server():
    os.environ["no_proxy"] = "*"
    with Stub(good=describes) as stub:
        yield stub.url


@pytest.fixture(scope="module")
def sources(trained_run, server, tmp_path_factory):
    """Inputs of all commands in one folder; a run lies in `run`."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "run").symlink_to(trained_run)
    clips = list(demo.World(0).records("train", 64, ("face",)))
    write_records(folder / "records", clips, encoders={"face": "clip"})
    labelled = demo.World(0).records("train", 48)
    write_records(folder / "labelled", labelled, encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "x"))
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
    (folder / "base_dataset.py").write_text(SOURCE, encoding="utf-8")
    for i in range(6):
        write_talking(folder / "talking" / f"clip{i}.mp4", seed=i)
    for name in ("clip", "hubert"):
        save_encoder(name, folder / "encoders")
    theirs = [*(f"clip{i}" for i in range(6)), *names]
    lines = "".join(f"{name},He is very happy.\n" for name in theirs)
    (folder / "theirs.csv").write_text(f"name,reply\n{lines}")
    made = folder / "made"
    stage = {"describe": "described", "caption merge": "merged", "caption labels": "labelled"}
    stage["filter"] = "filtered"
    for name in ("crowd train", *stage):
        made.mkdir(exist_ok=True)
        run(COMMANDS[name], arguments(name, folder, made, server))
        if name == "caption labels":
            judge([f"clip{i}" for i in range(6)], made / "caption")
        if name in stage:
            shutil.copytree(made / "caption", folder / "caption" / stage[name] / "caption")
    shutil.copytree(made / "crowd", folder / "crowd" / "crowd")
    return folder


def judge(names, out):
    """Verdicts and votes about the clips of a data set; the first one is off screen."""
    verdicts = ["off_screen", *["speaking"] * (len(names) - 1)]
    rows = zip(names, verdicts, strict=True)
    write_speakers(
        out / "speakers.csv", [{"name": n, "verdict": v, "network": "test"} for n, v in rows]
    )
    votes = [Vote(name, "happy", 1, 1, 0.9, "positive", 1, 1, 0.5, 0.1) for name in names]
    write_votes(out / "votes.csv", votes)


def arguments(name, sources, out, url):
    return [text.format(s=sources, o=out, url=url) for text in COMMANDS[name].arguments]


def run(command, given):
    """Run it here, unless it must be a process of its own; ends as the command does."""
    if command.separate:
        with tempfile.NamedTemporaryFile("r") as file:
            process = commands.start(command.module, given, file.name, before=in_a_session)
            process.join()
            if process.exitcode:
                raise SystemExit(file.read().splitlines()[-1])
        return
    module = importlib.import_module(command.module)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{command.module}.__main__")
    module.main(given)


def begin(name, sources, out):
    """Put what a command goes on from where it writes."""
    out.mkdir(exist_ok=True)
    for folder in COMMANDS[name].begun:
        shutil.copytree(sources / folder, out, dirs_exist_ok=True)


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
    """Whether a file grows while its command works."""
    return path.endswith(("answers.jsonl", "ovlabel.jsonl")) or "/answers/" in path


def said(files):
    """The content of files, by path: bytes, and of files of answers what they say."""
    return {path: answers(d) if _has_answers(path) else d for path, d in files.items()}


# --- full disks -----------------------------------------------------------------------------------

FULL = ("No space left", "disk is full", "disk full")


@contextlib.contextmanager
def small_disk(folder, prepare, free):
    """A file system of its own: `prepare()` writes to it, and then so many bytes are left."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        prepare()
        left = os.statvfs(folder)
        (folder / "filler").write_bytes(bytes(left.f_bavail * left.f_frsize - free))
        yield folder
    finally:
        # Lazily: a library may still hold a file open that it could not write.
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    ("name", "free"),
    [(n, 0) for n in COMMANDS] + [(n, 12 * 1024) for n, c in COMMANDS.items() if c.much],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    name, free, sources, server, tmp_path
):
    command, whole = COMMANDS[name], tmp_path / "whole"
    begin(name, sources, whole)
    run(command, arguments(name, sources, whole, server))
    expected, disk = contents(whole), tmp_path / "disk"
    before = contents(sources / folder) if (folder := next(iter(command.begun), "")) else {}
    with small_disk(disk, lambda: begin(name, sources, disk), free):
        with pytest.raises(SystemExit) as stopped:
            run(command, arguments(name, sources, disk, server))
        sentence = str(stopped.value.code)
        assert sentence.startswith("error: ") and "\n" not in sentence
        assert any(word in sentence for word in FULL), sentence
        assert str(disk) in sentence, "it names what could not be written"
        found = contents(disk)
        del found["filler"]
        for path, data in found.items():
            if _has_answers(path):  # they grow, by whole answers
                whole_lines = data[: data.rfind(b"\n") + 1]
                assert set(answers(whole_lines)) <= set(answers(expected[path]))
            else:
                assert data in (expected[path], before.get(path)), path
        # With room, the same command does the rest.
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        (disk / "filler").unlink()
        run(command, arguments(name, sources, disk, server))
        assert said(contents(disk)) == said(expected)


# --- killed ---------------------------------------------------------------------------------------

KILLS = 20
KILLED = (
    *("predict", "evaluate", "import_arrays", "export-peft", "merge", "export-release"),
    *("datasets", "to_tfds", "extract", "crowd train", "speakers"),
    *("describe", "caption merge", "caption labels", "filter", "card"),
)


def in_a_session():
    """For a command: it and all that it starts can be killed together."""
    os.setsid()
    os.environ["no_proxy"] = "*"


class Started:
    """A command that has been started as a process of its own."""

    def __init__(self, name, given, file):
        self._file = file
        self.process = commands.start(COMMANDS[name].module, given, file, before=in_a_session)

    def wait(self, timeout_s=None):
        self.process.join(timeout_s)
        return self.process.exitcode

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()

    @property
    def said(self):
        return self._file.read_text()


@pytest.mark.parametrize("name", KILLED)
def test_a_command_that_is_killed_gives_the_same_bytes_when_it_is_run_again(
    name, sources, server, tmp_path
):
    rng = random.Random(name)
    whole, out, file = tmp_path / "whole", tmp_path / "out", tmp_path / "said"
    file.touch()
    begin(name, sources, whole)
    begin(name, sources, out)
    before = contents(out)
    # Twice: what the first one compiles, the others find.
    for folder in ("first", "whole"):
        begin(name, sources, tmp_path / folder)
        began_s = time.monotonic()
        undisturbed = Started(name, arguments(name, sources, tmp_path / folder, server), file)
        assert undisturbed.wait() == 0, undisturbed.said
        took_s = time.monotonic() - began_s
    expected = contents(whole)
    given = arguments(name, sources, out, server)
    killed = 0
    for _ in range(KILLS):
        command = Started(name, given, file)
        killed += command.wait(took_s * rng.uniform(0.0, 1.0)) is None
        command.kill()
        # What has its final name is whole.
        for path, data in contents(out).items():
            if not _has_answers(path):
                assert data in (expected[path], before.get(path)), path
    assert killed
    last = Started(name, given, file)
    ended = last.wait()
    done_already = "exists already" in last.said or "already holds records" in last.said
    assert ended == 0 or done_already, last.said
    assert said(contents(out)) == said(expected)
