"""README and docs: their commands run, their links lead somewhere, what is made from sources is so.

A block of `sh` or `python` is run, in a folder that holds a trained run as `runs/demo`, unless a
comment above it says why not: `<!-- not run: REASON -->`. The flags of those are still checked.
"""

import csv
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from affectgpt_jax import __main__ as command_line
from affectgpt_jax import train
from affectgpt_jax.cli import make_parser
from affectgpt_jax.config import parse_command_line, validate
from affectgpt_jax.config_keys import config_keys, keys_of
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.data import demo

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "data_prep" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\]\((?!\w+:)([^()\s#]*)(?:#[\w-]*)?\)")


def name_of(page):
    return str(page.relative_to(ROOT))


# Why a block is not run.
REASONS = {
    "a GPU and a real base",
    "a cluster",
    "a server, which runs until it is stopped; tests/test_serve.py starts one",
    "an environment of its own",
    "an environment of its own, which the gate makes",
    "minutes of training",
    "hours of training",
    "minutes of training; the gate runs it in short",
    "minutes of training; tests/test_api.py runs it in short",
    "hours of measurement, or a GPU",
    "a run of your own",
    "clips that people have labelled; tests/data_prep/test_speakers.py has some",
    "the public data sets",
    "a file of the release; tests/data_prep/test_release_prompts.py has one of its form",
    "a file of the release; tests/test_checkpoint.py writes one",
    "PyTorch and encoders; tests/data_prep/test_walk.py runs it",
    "PyTorch, encoders and a server; tests/data_prep/test_caption_walk.py runs it",
    "half a minute of compilation; tests/test_plan.py runs such plans",
    "half a minute; tests/test_rollout_planner.py runs such plans",
    "the extra gpu-compile; tests marked gpu_compile run such plans",
}

every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


class Block(NamedTuple):
    """A block of code of a page, and why it is not run; None where it is."""

    language: str
    text: str
    reason: str | None

    def commands(self):
        """Its lines as words, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page):
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["language"], match["text"], match["reason"]) for match in found]


def without_launcher(words):
    """A command as one process runs it."""
    if words[0] == "sbatch":
        assert words[2] == "$(affectgpt launch slurm)"
        return ["affectgpt", "train", *words[3:]]
    if words[0] == "$(affectgpt launch ssh)":
        return words[2:]
    return words[1:] if words[0] == "srun" else words


def module_and_arguments(words):
    """What a command runs: `affectgpt NAME ...` or `python -m MODULE ...`."""
    if words[0] == "affectgpt":
        name, arguments = command_line.module_of(words[1]), words[2:]
    else:
        assert words[:2] == ["python", "-m"], words
        name, arguments = words[2], words[3:]
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    return module, arguments


def check_flags(words):
    """Refuse a command with a flag that is not there, as far as its module can tell."""
    module, arguments = module_and_arguments(words)
    if module is train:
        parse_command_line(arguments, make_parser("affectgpt train", ""))
    elif hasattr(module, "COMMAND"):
        module.COMMAND.parse(arguments)
    elif hasattr(module, "parse_arguments"):
        module.parse_arguments(arguments)


@every_page
def test_what_is_not_run_says_why(page):
    for block in blocks(page):
        assert block.language in ("sh", "python", "text", ""), block.text
        assert block.reason is None or block.reason in REASONS, block.text


def test_the_readme_walks_as_the_page_about_data_does():
    (walk,) = (b for b in blocks(ROOT / "README.md") if "affectgpt extract" in b.text)
    shown = [words for b in blocks(ROOT / "data_prep" / "README.md") for words in b.commands()]
    assert [words for words in walk.commands() if words not in shown] == []


@every_page
def test_the_flags_of_commands_are_there(page):
    extras = re.findall(
        r'^        "([\w-]+)": (?:\[|SERVE)', (ROOT / "setup.py").read_text(), re.MULTILINE
    )
    commands = [
        (block, without_launcher(words))
        for block in blocks(page)
        if block.language == "sh"
        for words in block.commands()
    ]
    for block, words in commands:
        if words[:2] == ["pip", "install"]:
            assert block.reason
            assert set(re.findall(r"\[([\w-]+)\]", " ".join(words))) <= set(extras)
        else:
            check_flags(words)


@pytest.fixture(scope="module")
def workspace(trained_run, tmp_path_factory):
    """A folder with a run, and a CSV file and arrays of 30 clips, of which some lack one."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(trained_run, folder / "runs" / "demo")
    arrays = {"face": folder / "features" / "clip", "audio": folder / "features" / "hubert"}
    for place in arrays.values():
        place.mkdir(parents=True)
    with open(folder / "clips.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "subtitle", "labels", "description", "emotion"])
        for clip in demo.World(0).records("train", 30):
            writer.writerow(
                [clip.name, clip.subtitle, ", ".join(clip.labels), clip.description, clip.emotion]
            )
            for name, features in clip.features.items():
                np.save(arrays[name] / f"{clip.name}.npy", features)
    return folder


DONE = set()


@every_page
def test_commands_run_as_they_are_shown(page, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            names = {}
            exec(compile(block.text, name_of(page), "exec"), names)
            if "get_config" in names:
                validate(names["get_config"]())
        if block.language != "sh" or block.reason is not None:
            continue
        for words in block.commands():
            if tuple(words) in DONE:  # README shows what a page shows, too
                continue
            DONE.add(tuple(words))
            module, arguments = module_and_arguments(words)
            module.main(arguments)
    assert "Traceback" not in capsys.readouterr().err


def test_what_the_shown_commands_write_is_there(workspace):
    if not DONE:
        pytest.skip("the commands were not run")
    for path in (
        "runs/demo/evaluate/report.html",
        "adapter/adapter_config.json",
        "merged/model.safetensors",
        "hub/README.md",
        "checkpoint.pth",
        "records/mine/manifest.json",
        "records/again/manifest.json",
    ):
        assert (workspace / path).is_file(), path


@every_page
def test_links_lead_to_files(page):
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_tests_that_pages_name_are_there():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    names = set(re.findall(r"::(test_\w+)", pages))
    assert len(names) > 50
    assert [name for name in names if f"def {name}(" not in sources] == []


def test_every_page_is_in_the_index_of_the_readme_and_of_the_site():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in readme, page.name
        assert f"- {page.name}\n" in index, page.name


def test_the_readme_is_short_and_its_pictures_are_small():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
    pictures = list((ROOT / "docs" / "img").iterdir())
    assert len(pictures) >= 3
    assert [path.name for path in pictures if path.stat().st_size > 300_000] == []


def test_what_is_made_from_sources_and_results_is_current(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    generate = importlib.import_module("generate")
    parts = []
    for page in generate.pages():
        text = page.read_text(encoding="utf-8")
        parts += generate.PART.findall(text)
        assert generate.rewritten(text) == text, f"{name_of(page)}: run python docs/generate.py"
    assert sorted(parts) == sorted(generate.PARTS)


def leaves(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items") and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_key_of_the_config_is_listed_once():
    names = [
        key.name for key in config_keys() if not (hasattr(key.default, "items") and key.default)
    ]
    assert sorted(names) == sorted(leaves(affectgpt_qwen25_7b.get_config()))


def test_a_key_has_the_comment_behind_it_or_else_the_lines_above():
    source = """
def get_config():
    c = ConfigDict()
    c.one = 1  # first
    # and more
    c.two = 2  # second
    # third
    c.three = (
        3,
    )
    c.four = 4
"""
    config = dict(one=1, two=2, three=(3,), four=4)
    assert [(key.name, key.meaning) for key in keys_of(source, config)] == [
        ("one", "first and more"),
        ("two", "second"),
        ("three", "third"),
        ("four", ""),
    ]
