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
from collections.abc import Callable

import commands
import jax
import numpy as np
import pytest
from chat_stub import Stub
from clip_files import write_talking
from needs_torch import torch  # noqa: F401 - an extraction runs encoders
from release_source import SOURCE
from small_encoders import save_encoder

from affectgpt_jax import train
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records
from affectgpt_jax.training.checkpoints import SavedRun
from data_prep.crowd.votes import Vote, write_votes
from data_prep.speakers.verdicts import write_speakers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# --- what commands write --------------------------------------------------------------------------


def contents(folder):
    """All files below a folder, but locks and those that a killed command may leave behind."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != ".lock"
        and path.name != FILLER
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def learned(folder):
    """What a trainer has made in `run` that holds no time of day and no name by chance."""
    run, found = folder / "run", {}
    if any((run / "checkpoints").glob("[0-9]*")):
        saved = SavedRun(run)
        for step in saved.steps:
            arrays = jax.tree.leaves(saved.trainable(step))
            found[f"checkpoints/{step}"] = b"".join(array.tobytes() for array in arrays)
    for step, loss in commands.losses(run).items():
        found[f"loss of step {step}"] = loss
    for file in (*run.glob("reference_*.json"), *run.glob("pairs_*.json"), *run.glob("answers_*")):
        # Checkpoints are told apart by their bytes, which Orbax makes otherwise each time.
        found[file.name] = json.loads(file.read_text())["content"]
    if (run / "result.json").exists():
        result = json.loads((run / "result.json").read_text())
        found["result.json"] = {
            key: result[key] for key in ("steps", "best_step", "clips", "before", "after")
        }
    return found


# --- commands -------------------------------------------------------------------------------------

FILLER = "filler"


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that writes.

    Attributes:
        module: that runs it.
        arguments: `{o}` is the output, `{s}` the sources.
        begun: folders of the sources that the command goes on in.
        free: bytes that full disks have left. Where little is written, a disk with a few kilobytes
            is not full.
        separate: whether it must be a process of its own.
        found: what it has written, by name.
    """

    module: str
    arguments: tuple[str, ...]
    begun: tuple[str, ...] = ()
    free: tuple[int, ...] = (0, 12 * 1024)
    separate: bool = False
    found: Callable = contents


def case(module, *arguments, **more):
    return Case(module, arguments, **more)


few = functools.partial(case, free=(0,))
SCORED = ("--predictions={s}/predictions.csv", "--truth={s}/truth.csv", "--bootstrap=0")
IMPORT = ("--csv={s}/clips.csv", "--face={s}/face", "--encoder=face=clip", "--allow-missing")
CLIPS = "--clips={s}/talking"
CAPTION = functools.partial(case, "data_prep.caption")
SHORT = functools.partial(few, "data_prep.caption")
SERVER = ("--base-url={url}", "--model=omni")
MEMBERS = ("--folds=2", "--seeds=1", "--hidden=8", "--epochs=3", "--no-text")
# Room for one checkpoint of a trainer, but not for two.
CHECKPOINT = 10 * 2**20
ASKED = (
    *("data_prep.describe", "{s}/talking/clip0.mp4", "{s}/talking/clip1.mp4"),
    *("--workdir={s}/heard", "--question=ovlabel", "--workers=1"),
)


def trainer(command, section, *more):
    """A run of two steps that goes on from another one."""
    keys = {"data": "{s}/labelled", "prompts": 8, "group": 2, "max_new_tokens": 8}
    keys |= {"test_clips": 8, "test_samples": 2, "consensus": 4}
    return case(
        f"affectgpt_jax.{command}",
        *("--workdir={o}/run", "--from={s}/run", "--config.steps=2", "--config.checkpoint_every=1"),
        *(f"--config.{section}.{key}={value}" for key, value in keys.items()),
        *(f"--config.{section}.{key}" for key in more),
        free=(0, CHECKPOINT),
        separate=True,
        found=learned,
    )


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
    "export-hub": case("affectgpt_jax.weights", "export-hub", "{s}/run", "{o}/hub"),
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
    "reinforce": trainer("reinforce", "rl", "val_clips=8"),
    "prefer": trainer("prefer", "dpo", "pairs=8", "val_share=0.2"),
    "ask": few(*ASKED, "--out={o}/answers.json"),
    "ask with pictures": case(*ASKED, "--show={o}/shown", free=(12 * 1024,)),
    "describe": CAPTION("describe", "audio", CLIPS, "--out={o}/caption", *SERVER),
    "describe video": CAPTION("describe", "video", CLIPS, "--out={o}/caption", *SERVER),
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
    train_on_clips(folder)
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


def train_on_clips(folder):
    """A run in `heard` of features that an extraction has made: it can be asked about files."""
    rows = "".join(f"clip{i},well,[amused],They look amused.\n" for i in range(6))
    (folder / "talking.csv").write_text(f"name,subtitle,labels,description\n{rows}")
    given = arguments("extract", folder, folder / "heard", "")
    run(COMMANDS["extract"], [*given, f"--csv={folder}/talking.csv"])
    records = folder / "heard" / "extracted"
    train.main(
        [
            f"--workdir={folder / 'heard'}",
            *(f"--config.data.{split}={records}" for split in ("train", "val")),
            "--config.data.test=",
            "--config.projectors.video_width=24",
            "--config.projectors.audio_width=32",
            "--config.mesh=data:-1",
            "--config.steps=1",
            "--config.batch_size=8",
            "--config.generate.batch_size=2",
            "--config.generate.max_new_tokens=8",
            "--config.num_buckets=1",
        ]
    )


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
            said = file.read()
            assert "Traceback" not in said, said
            if process.exitcode:
                raise SystemExit(said.splitlines()[-1])
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


@pytest.fixture(scope="module")
def whole(sources, server, tmp_path_factory):
    """What a command writes that nothing happens to, by its name."""

    @functools.cache
    def of(name):
        out = tmp_path_factory.mktemp("whole")
        begin(name, sources, out)
        run(COMMANDS[name], arguments(name, sources, out, server))
        return COMMANDS[name].found(out)

    return of


# --- full disks -----------------------------------------------------------------------------------

FULL = ("No space left", "disk is full", "disk full")


@contextlib.contextmanager
def small_disk(folder, prepare, free):
    """A file system of its own: `prepare()` writes to it, and then so many bytes are left."""
    folder.mkdir()
    size = 512 * 1024 + free
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        prepare()
        left = os.statvfs(folder)
        (folder / FILLER).write_bytes(bytes(left.f_bavail * left.f_frsize - free))
        yield folder
    finally:
        # Lazily: a library may still hold a file open that it could not write.
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    ("name", "free"),
    [(name, free) for name, command in COMMANDS.items() for free in command.free],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    name, free, sources, server, whole, tmp_path
):
    command, expected, disk = COMMANDS[name], whole(name), tmp_path / "disk"
    before = contents(sources / folder) if (folder := next(iter(command.begun), "")) else {}
    with small_disk(disk, lambda: begin(name, sources, disk), free):
        with pytest.raises(SystemExit) as stopped:
            run(command, arguments(name, sources, disk, server))
        sentence = str(stopped.value.code)
        assert sentence.startswith("error: ") and "\n" not in sentence
        assert any(word in sentence for word in FULL), sentence
        assert str(disk) in sentence, "it names what could not be written"
        for path, data in command.found(disk).items():
            if _has_answers(path):  # they grow, by whole answers
                whole_lines = data[: data.rfind(b"\n") + 1]
                assert set(answers(whole_lines)) <= set(answers(expected[path]))
            else:
                assert data in (expected[path], before.get(path)), path
        # With room, the same command does the rest.
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        (disk / FILLER).unlink()
        run(command, arguments(name, sources, disk, server))
        assert said(command.found(disk)) == said(expected)


# --- killed ---------------------------------------------------------------------------------------

KILLS = 20
KILLED = (
    *("predict", "evaluate", "import_arrays", "export-peft", "merge", "export-release"),
    *("export-hub", "datasets", "to_tfds", "extract", "crowd train", "crowd vote", "speakers"),
    *("describe", "describe video", "caption merge", "caption labels", "filter", "card"),
)
# Of which several processes do a share each; what they write is what one writes.
SHARED = ("extract", "speakers", "describe", "describe video", "caption merge")


def in_a_session():
    """For a command: it and all that it starts can be killed together."""
    os.setsid()
    os.environ["no_proxy"] = "*"


def in_small_blocks():
    """For a command: the few clips of a test are several blocks of `speakers`."""
    in_a_session()
    from data_prep.speakers import check

    check.BLOCK = 2


class Started:
    """A command that has been started as a process of its own."""

    def __init__(self, name, given, file):
        self._file = file
        before = in_small_blocks if name == "speakers" else in_a_session
        self.process = commands.start(COMMANDS[name].module, given, file, before=before)

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


@pytest.mark.parametrize(
    ("name", "shares"), [*((name, 1) for name in KILLED), *((name, 2) for name in SHARED)]
)
def test_a_command_that_is_killed_gives_the_same_bytes_when_it_is_run_again(
    name, shares, sources, server, tmp_path
):
    rng = random.Random(name)
    out, file = tmp_path / "out", tmp_path / "said"
    file.touch()
    begin(name, sources, out)
    before = contents(out)
    # Twice: what the first one compiles, the others find.
    for folder in ("first", "whole"):
        begin(name, sources, tmp_path / folder)
        began_s = time.monotonic()
        undisturbed = Started(name, arguments(name, sources, tmp_path / folder, server), file)
        assert undisturbed.wait() == 0, undisturbed.said
        took_s = time.monotonic() - began_s
    expected = contents(tmp_path / "whole")
    given = arguments(name, sources, out, server)
    parts = [[*given, f"--shard={i}/{shares}"] for i in range(shares)] if shares > 1 else [given]
    killed = 0
    for i in range(KILLS):
        command = Started(name, parts[i % shares], file)
        killed += command.wait(took_s * rng.uniform(0.0, 1.0)) is None
        command.kill()
        # What has its final name is whole.
        for path, data in contents(out).items():
            if not _has_answers(path):
                assert data in (expected[path], before.get(path)), path
    assert killed
    for part in parts:
        last = Started(name, part, file)
        ended = last.wait()
        done_already = "exists already" in last.said or "already holds records" in last.said
        assert ended == 0 or done_already, last.said
    assert said(contents(out)) == said(expected)
