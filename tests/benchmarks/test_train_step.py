"""The train-step benchmark: its arithmetic, what it refuses, and all of its sides end to end."""

import json
from types import SimpleNamespace

import needs_torch
import pytest

from affectgpt_jax.cli import UsageError
from benchmarks import profile_table, train_step
from benchmarks.train_step import ComparisonError, agreement


def test_losses_agree_only_token_by_token():
    ours = [1.0, 2.0, 3.0, 4.0]
    same = agreement(ours, [1.0, 2.0, 3.0, 4.000001], "float32")
    assert same["tokens"] == 4 and 0 < same["apart"] < same["bound"]
    # Equal means hide what is wrong.
    with pytest.raises(ComparisonError, match=r"losses of the same 4 tokens are .* expected"):
        agreement(ours, ours[::-1], "float32")
    with pytest.raises(ComparisonError, match="4 supervised tokens in JAX, 3 in PyTorch"):
        agreement(ours, ours[:3], "float32")
    with pytest.raises(ComparisonError):
        agreement([1.0, float("nan")], [1.0, 2.0], "bfloat16")


@pytest.mark.parametrize("value", ["1", "KEY"])
def test_settings_are_pairs(value):
    with pytest.raises(UsageError):
        train_step.COMMAND.parse(["--set", value])


def test_only_clips_share_rows():
    for flags in (["--pack"], ["--peer", "torch", "--tuning", "packed"]):
        with pytest.raises(UsageError, match="only the clips of --workload affectgpt"):
            train_step.COMMAND.parse(["--workload", "small", *flags])


@pytest.mark.parametrize(
    "flags",
    [["--steps", "0"], ["--block", "0"], ["--warmup", "-1"], ["--batch", "0"], ["--steps", "x"]],
)
def test_counts_of_which_nothing_comes_are_refused(flags):
    flag, value = flags
    with pytest.raises(UsageError, match=f"argument {flag}: {value!r} given; expected "):
        train_step.COMMAND.parse(flags)


@pytest.mark.parametrize(
    "flags", [["--tuning", "release"], ["--peer-gradient-accumulation-steps", "2"]]
)
def test_what_is_of_pytorch_wants_pytorch(flags):
    refusal = f"{flags[0]} is of PyTorch, which does not run; add --peer torch"
    with pytest.raises(UsageError, match=refusal):
        train_step.COMMAND.parse(["--workload", "small", *flags])
    assert train_step.COMMAND.parse([*flags, "--peer", "torch"]).tuning
    assert train_step.COMMAND.parse(["--peer", "torch"]).tuning == ["tuned"]


ANCHOR = ["--workload", "anchor", "--scale", "full"]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (ANCHOR, "train_step_anchor_full"),
        ([*ANCHOR, "--dtype", "float32"], "train_step_anchor_float32_full"),
        ([*ANCHOR, "--set", "base_precision=int8"], "train_step_anchor_base_precision-int8_full"),
        (
            [*ANCHOR, "--set", "lora.rank=8", "--set", 'lora.targets=["q/k"]'],
            "train_step_anchor_lora.rank-8_lora.targets-q-k_full",
        ),
        (
            ["--workload=affectgpt", "--batch=12", "--pack", "--peer=torch", "--scale=small"],
            "train_step_affectgpt_12_beside_tuned_small",
        ),
        (
            ["--workload=affectgpt", "--batch=12", "--peer=torch", "--scale=small"],
            "train_step_affectgpt_12_padded_rows_beside_tuned_small",
        ),
        (
            ["--workload=affectgpt", "--batch=12", "--pack=2048", "--scale=small"],
            "train_step_affectgpt_12_packed_2048_rows_small",
        ),
    ],
)
def test_a_trial_has_a_file_of_its_own(flags, name):
    assert train_step.name_of(train_step.COMMAND.parse(flags)) == name


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A packed mix beside every tuning, with a profile: the report, what was printed, the trace."""
    needs_torch.pytorch("the peer runs in PyTorch")
    folder = tmp_path_factory.mktemp("measured")
    flags = ["--workload", "affectgpt", "--scale", "tiny", "--batch", "8", "--pack"]
    flags += ["--peer", "torch", "--tuning", "release", "tuned", "packed", "--set", "lora.rank=8"]
    flags += ["--steps", "2", "--block", "1", "--warmup", "1", "--profile", str(folder / "trace")]
    out = folder / "report.json"
    (folder / "trace").mkdir()
    (folder / "trace" / "program-7.hlo").write_text("of before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # compilation takes longest
        train_step.COMMAND.main([*flags, "--records", str(folder), "--out", str(out)])
    return SimpleNamespace(report=json.loads(out.read_text()), trace=folder / "trace", out=out)


def test_every_tuning_computes_the_same_losses(measured):
    losses = measured.report["losses"]
    assert losses.keys() == {"release", "tuned", "packed"}
    assert all(0 < same["apart"] < same["bound"] == 1e-5 for same in losses.values())
    assert all(same["tokens"] > 100 for same in losses.values())


def test_the_report_has_both_sides_and_who_made_it(measured):
    report = measured.report
    assert report["sides"].keys() == {"jax", "release", "tuned", "packed"}
    assert report["ratios"].keys() == {"release", "tuned", "packed"}
    assert report["settings"]["sides"]["jax"]["settings"] == {"lora.rank": 8}
    assert report["environment"]["command"].startswith("python -m benchmarks.train_step --workload")
    assert "torch" in report["environment"]["versions"]
    for side in report["sides"].values():
        assert side["steps"] == 2 and side["peak_bytes"] > 2**20 and side["samples_per_s"] > 0
    assert report["sides"]["jax"]["fill"] > 0.9 > report["sides"]["tuned"]["fill"]
    assert report["sides"]["jax"]["compile_s"] > 0


def test_reports_are_shown_again(measured, capsys):
    train_step.COMMAND.main(["--show", str(measured.out)])
    printed = capsys.readouterr().out
    assert printed.strip() == train_step.table([measured.report])
    rows = printed.strip().splitlines()[2:]
    assert len(rows) == 4
    assert all(row.startswith("| affectgpt 8, tiny, float32, lora.rank=8 | ") for row in rows)


def test_a_profile_accounts_for_every_part_of_a_step(measured, tmp_path, capsys):
    assert not (measured.trace / "program-7.hlo").exists(), "it is of another run"
    out = tmp_path / "profile.json"
    profile_table.COMMAND.main([str(measured.trace), "--out", str(out)])
    assert json.loads((measured.out.with_name("profile_report.json")).read_text()) == json.loads(
        out.read_text()
    )
    found = json.loads(out.read_text())
    assert found["steps"] == 1
    made = found["environment"]["command"]
    assert made.startswith("python -m benchmarks.train_step --workload affectgpt")
    assert made.endswith("--profile DIR")
    assert str(measured.trace) not in made
    parts = found["seconds"]
    assert {
        "frozen matmuls",
        "attention",
        "LoRA",
        "lm_head",
        "heads and fusion",
    } <= parts.keys()
    assert parts.get("other", 0) < 0.2 * sum(parts.values()), "the names of scopes are not found"
    # The parts are shares of one step, so together they last as long.
    block = json.loads((measured.trace / "block.json").read_text())
    assert sum(parts.values()) == pytest.approx(sum(block["seconds"]), rel=0.5)
    assert "The most to gain is in" in capsys.readouterr().out


def test_what_fails_in_a_side_is_one_sentence(tmp_path):
    flags = ["--workload", "small", "--scale", "tiny", "--records", str(tmp_path)]
    with pytest.raises(SystemExit, match="error: the config has no key 'no.such'"):
        train_step.COMMAND.main([*flags, "--set", "no.such=1"])
    with pytest.raises(SystemExit, match="error: config.remat is 5; expected a value of str"):
        train_step.COMMAND.main([*flags, "--set", "remat=5"])
    with pytest.raises(SystemExit, match="error: config.lora.rank is 'x'; expected a .* of int"):
        train_step.COMMAND.main([*flags, "--set", "lora.rank=x"])
    with pytest.raises(SystemExit, match="error: jax: ConfigError: .*cudnn"):
        train_step.COMMAND.main([*flags, "--set", "attention=cudnn"])
