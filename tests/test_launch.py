"""The launch scripts, with `ssh` and `srun` replaced by what starts processes here."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "configs" / "launch"
CHECK = ("python", "-m", "affectgpt_jax.check_cluster", "--max_mib=1", "--slowest=0")

# The last argument is what the remote shell is to run.
SSH = '#!/usr/bin/env bash\necho "$@" >>"$LOG"\nexec bash -c "${!#}"\n'
# Two tasks on one node, told what srun tells them.
SRUN = """#!/usr/bin/env bash
echo "$@" >>"$LOG"
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=2
export SLURM_JOB_ID=$PORT SLURM_STEP_ID=0 CUDA_VISIBLE_DEVICES=0
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!
"""


@pytest.fixture
def run(tmp_path):
    """Run a script; returns its status, its output and what the stubs were called with."""
    python = f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n'
    for name, text in (("ssh", SSH), ("srun", SRUN), ("python", python)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    log.touch()
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "LOG": str(log),
        "PORT": str(port),
    }

    def run(script, *arguments, **more):
        done = subprocess.run(
            ["bash", SCRIPTS / script, *arguments],
            env=env | more,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
        )
        return done.returncode, done.stdout, log.read_text().splitlines()

    return run


def test_ssh_starts_a_process_on_each_host_and_marks_its_lines(run):
    code, output, calls = run("ssh.sh", "127.0.0.1,127.0.0.1", *CHECK)
    assert code == 0, output
    assert len(calls) == 2 and all("BatchMode=yes 127.0.0.1" in call for call in calls)
    assert {call.split("--process_id=")[1].split()[0] for call in calls} == {"0", "1"}
    assert "[0 127.0.0.1] ok: 2 processes, 2 devices" in output


def test_ssh_ends_with_the_status_of_a_process_that_fails(run):
    code, output, _ = run("ssh.sh", "127.0.0.1,127.0.0.1", *CHECK, "--no_such_flag=1")
    assert code == 2
    assert "unrecognized arguments: --no-such-flag=1" in output


def test_ssh_keeps_arguments_whole(run):
    code, output, _ = run("ssh.sh", "here", "printf", "<%s>", "a b", "$HOME", 'c"d')
    assert code == 0
    assert output.startswith('[0 here] <a b><$HOME><c"d><--coordinator_address=here:')


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [((), 2, "usage: ssh.sh"), (("here", "no_such_command"), 127, "no command no_such_command")],
)
def test_ssh_says_what_it_lacks(run, arguments, status, message):
    code, output, calls = run("ssh.sh", *arguments)
    assert code == status and message in output and not calls


def test_slurm_checks_the_cluster_and_trains_with_all_arguments(run):
    code, output, calls = run("slurm.sh", "--help")
    assert code == 0, output
    assert calls == [
        "--kill-on-bad-exit=1 python -m affectgpt_jax.check_cluster",
        "--kill-on-bad-exit=1 python -m affectgpt_jax.train --help",
    ]
    assert "ok: 2 processes, 2 devices" in output


def test_slurm_leaves_the_check_out_if_asked(run):
    code, _, calls = run("slurm.sh", "--config.no_such_key=1", CHECK_CLUSTER="0")
    assert code == 1
    assert calls == ["--kill-on-bad-exit=1 python -m affectgpt_jax.train --config.no_such_key=1"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_no_complaint():
    subprocess.run(["shellcheck", *SCRIPTS.glob("*.sh")], check=True)
