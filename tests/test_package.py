"""The package as users install it, and what the gate runs."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources that git would give a user."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    folders = ("affectgpt_jax", "configs", "data_prep")
    for name in (*folders, "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    # Without isolation, so that building needs no network: [test] brings setuptools along.
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--quiet", "-w", str(out), str(source)], check=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else_at_top_level(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"affectgpt_jax"}
    for needed in (
        "configs/demo.py", "configs/launch/slurm.sh", "assets/tiny_base/model.safetensors",
        "assets/serve/page.html", "train.py", "data_prep/extract.py", "data_prep/taxonomies.toml",
        "py.typed",
    ):  # fmt: skip
        assert f"affectgpt_jax/{needed}" in names


def test_every_folder_of_the_package_is_shipped(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("affectgpt_jax", "configs", "data_prep"):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT).as_posix().removeprefix("affectgpt_jax/")
            assert f"affectgpt_jax/{inside}" in names


def test_an_installed_wheel_trains_from_another_directory(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    for split, size in (("train", 32), ("test", 8)):
        encoders = dict.fromkeys(demo.DEFAULT_FEATURES, "demo")
        write_records(tmp_path / split, demo.World(0).records(split, size), encoders=encoders)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    flags = ["--config=configs/demo.py", "--workdir=run", "--config.steps=2"]
    flags += [f"--config.data.train={tmp_path / 'train'}", "--config.data.val="]
    flags += [f"--config.data.test={tmp_path / 'test'}", "--config.data.val_share=0.3"]
    flags += ["--config.batch_size=8", "--config.generate.batch_size=8", "--config.num_buckets=1"]
    done = subprocess.run(
        [sys.executable, "-m", "affectgpt_jax.train", *flags],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (elsewhere / "run" / "result.json").exists()
    for command in ("extract", "import-arrays", "check_cluster"):
        run = [sys.executable, str(site / "bin" / "affectgpt"), command, "--help"]
        done = subprocess.run(run, cwd=elsewhere, env=environment, capture_output=True, text=True)
        shown = f"usage: affectgpt {command.replace('_', '-')} "
        assert done.stdout.startswith(shown), done.stderr
    where = "import affectgpt_jax, affectgpt_jax.configs as c; print(affectgpt_jax.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.stdout.startswith(str(site)), "the checkout was used, not the wheel"


def test_a_wrong_flag_ends_the_command_with_one_line_and_status_1(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "affectgpt_jax.train", "--config.stepz=3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: config.stepz is not a key")
    assert "Traceback" not in done.stderr


def test_the_gate_runs_the_commands_of_the_readme():
    readme, gate = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    assert blocks[0].strip() == "pip install -e . && python -m affectgpt_jax.train"
    assert blocks[1].strip() == "pip install -e '.[test]' && pytest -n 2 --dist=loadfile"
    assert "-e '.[test]'" in gate
    assert re.search(r"^AFFECTGPT_STRICT_SKIPS=1 pytest -n 2 --dist=loadfile", gate, re.MULTILINE)
    assert "docs/demo.ipynb" in gate
    assert "mkdocs build --strict" in gate
