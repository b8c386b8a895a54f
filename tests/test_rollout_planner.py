"""The plan of a step of reinforcement: closed forms of bytes, phases, and what is refused."""

import json
import types

import jax
import numpy as np
import pytest

from affectgpt_jax import plan, rollouts
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.data.pipeline import empty_batch
from affectgpt_jax.models import generate
from affectgpt_jax.rollout_planner import PASSES, RolloutPlanner
from affectgpt_jax.training import gpu_compile, roofline, sharding
from affectgpt_jax.training.devices import DEVICES
from affectgpt_jax.training.roofline import Shape

A100 = DEVICES["a100-80g"]
ONE = Shape(1, 1, 1)
# Of the tiny base: 3 layers, 2 key heads of 48, float32.
KV_BYTES = 2 * 3 * 2 * 48 * 4


def arguments(*flags):
    return plan.parse_arguments(["--rl", "--devices=1", "--config.input=text", *flags])


def planner(*flags, prompt=21, answer=None, device=A100):
    _, config = arguments(*flags)
    config.batch_size = sum(rollouts.row_counts(config, 1))
    answer = answer or config.rl.max_new_tokens
    return RolloutPlanner(config, device, prompt, answer, (64, 40), roofline.EFFICIENCY)


def test_a_rollout_holds_the_cache_of_all_answers_and_of_their_prompts():
    small = planner("--config.rl.prompts=8", "--config.rl.group=2")
    found = small.rollout_memory(ONE)
    assert small.prompt_length == 24 and small.slots == 24 + 16 - 1
    assert found.cache == 8 * (2 * 39 + 24) * KV_BYTES
    state = small.update.abstract(ONE)[0]
    assert found.start == 4 * sum(x.size for x in jax.tree.leaves(state["trainable"]))
    assert 0 <= found.state - 3 * found.start < 100  # two moments and counters
    # Two devices that share the prompts hold half the cache each, and both the base.
    half = small.rollout_memory(Shape(2, 1, 1))
    assert half.cache == found.cache // 2 and half.base == found.base
    # Key heads are shared over the tensor axis.
    assert small.rollout_memory(Shape(1, 1, 2)).cache == found.cache // 2


def test_slots_are_those_of_the_cache_that_generation_makes(monkeypatch):
    """By the decoder's own arrays, on a batch of prompts."""
    small = planner("--config.rl.prompts=2", "--config.rl.group=2")
    program = small.update.program.on(sharding.make_mesh("data:1", jax.devices()[:1]))
    state, base = program.init_state(0), program.init_base(0)
    batch = empty_batch(2, Bucket(small.prompt_length, 0), small.update.features)
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    rows = generate.identities([f"{i}" for i in range(4)])
    made = []
    insert = generate.insert
    monkeypatch.setattr(
        generate, "insert", lambda *a: made.append([x.cache for x in a[1:3]]) or insert(*a)
    )
    prompts = [generate.Prompts(np.arange(4), batch, rows)]
    trees = base, state["trainable"]
    list(generate.generate_all(program.model, *trees, prompts, small.decoding, 4))
    [caches] = made
    assert sum(x.nbytes for x in jax.tree.leaves(caches)) == small.rollout_memory(ONE).cache


def test_a_merged_copy_counts_where_answers_are_written_by_one():
    apart, merged = (planner(f"--config.rl.merge_lora={x}") for x in ("false", "true"))
    kernels = apart.update.sizes(1, 1).layers
    assert apart.rollout_memory(ONE).merged == 0
    assert merged.rollout_memory(ONE).merged == kernels
    # "auto" copies where a quarter of the device is enough for it.
    for factor, copied in ((3.9, 0), (4.1, kernels)):
        device = A100._replace(memory=int(factor * kernels / 0.9))
        auto = planner("--config.rl.merge_lora=auto", device=device)
        assert auto.rollout_memory(ONE).merged == copied


def test_rows_and_arrays_are_those_of_the_update():
    shared = planner("--config.rl.prompts=8", "--config.rl.group=4", prompt=20)
    assert shared.update.rows == Bucket(20 + 4 * 16, 4 * 16)
    assert shared.update.attention(1).name == "xla"
    apart = planner("--config.rl.share_prompt=False", "--config.rl.updates=2", prompt=20)
    assert apart.update.rows == Bucket(36, 16)
    assert apart.config.batch_size == 64 * 4
    assert set(apart.update.by_token) == {
        *rollouts.BY_TOKEN, "reference_log_probs", "old_log_probs",
    }  # fmt: skip
    beside = planner("--config.rl.sft_share=0.5", "--config.rl.group=2", prompt=20)
    assert beside.update.rows == Bucket(64, 40)
    assert beside.config.batch_size == 64 + 32


def test_a_step_is_its_phases_and_answers_are_written_token_by_token():
    small = planner("--config.rl.updates=2", answer=9)
    layout = small.update_layout(ONE, 1)
    found = small.passes(layout)
    assert list(found) == list(PASSES)
    times = {name: times for name, (times, _) in found.items()}
    assert times == {"prefill": 1, "insert": 1, "decode": 8, "log_probs": 2, "update": 2}
    assert found["update"].each == layout.time
    # A forward pass has a third of the FLOPs of a pass back and forth, or a little more.
    share = found["log_probs"].each.compute / layout.time.compute
    assert 0.3 < share < 0.5
    # A token reads all weights and the cache.
    cache = 256 * small.slots * KV_BYTES
    base = small.rollout_memory(ONE).base
    assert found["decode"].each.memory * A100.hbm >= cache + base
    none = planner("--config.rl.stop_kl=0")
    assert none.passes(none.update_layout(ONE, 1))["log_probs"].times == 0


def test_the_start_is_held_beside_the_update_and_decides_what_is_computed_again():
    small = planner()
    needed = small.update.memory(ONE, 64, "none")
    start = small.rollout_memory(ONE).start
    layout = small.update_layout(ONE, 1)
    assert layout.remat == "none"
    assert layout.memory.total == needed.total + start
    # With a little less memory something has to be computed again, or not all rows fit.
    device = A100._replace(memory=int((needed.total + start - 4) / 0.9 / 0.9))
    assert planner(device=device).update_layout(ONE, 1).remat != "none"
    tiny = planner(device=A100._replace(memory=int(1.5 * needed.total / 4)))
    fewest = tiny.microbatches(ONE)
    assert fewest > 1 and 64 % fewest == 0
    assert not tiny.update_layout(ONE, fewest // 2).fits
    assert planner(device=A100._replace(memory=1000)).microbatches(ONE) is None


def test_microbatches_are_those_that_the_prompts_can_be_shared_by():
    """96 rows of 64 prompts could be 3 microbatches, which `reinforce` refuses."""
    flags = ("--config.rl.sft_share=0.5", "--config.rl.group=2")
    roomy = planner(*flags)
    tried = []
    roomy.update_layout = lambda shape, n: tried.append(n) or types.SimpleNamespace(fits=False)
    assert roomy.microbatches(ONE) is None and tried == [1, 2, 4, 8, 16, 32, 64]
    # Of 71 rows, some are padding.
    odd = planner("--config.rl.sft_share=0.1")
    assert odd.config.batch_size == 71
    layouts = {n: odd.update_layout(Shape(2, 1, 1), n) for n in (1, 2)}
    assert {n: layout.rows for n, layout in layouts.items()} == {1: 36, 2: 18}


def test_fsdp_gathers_the_base_for_every_token():
    small = planner()
    shape = Shape(1, 4, 1)
    passes = small.passes(small.update_layout(shape, 1))
    base = small.update.sizes(1, 1)
    gathered = (3 / 4) * (base.layers + base.lm_head) / A100.nvlink
    assert passes["decode"].each.network == pytest.approx(gathered)
    assert small.passes(small.update_layout(Shape(4, 1, 1), 1))["decode"].each.network == 0


def test_the_report_says_what_fits_and_how_long_a_step_takes(tmp_path, capsys):
    path = tmp_path / "plan.json"
    plan.main(
        [
            "--rl",
            "--devices=8",
            "--config.input=text",
            "--prompt=20",
            "--answer=5",
            f"--json={path}",
        ]
    )
    found, text = json.loads(path.read_text()), capsys.readouterr().out
    assert found["rows"] == {"length": 84, "targets": 64, "clips": 1, "count": 64}
    assert found["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    peaks = [found["memory"][phase]["total"] for phase in ("rollout", "update")]
    assert found["estimate"]["peak_gib"] == max(peaks) / 2**30 and found["fits"]
    step = found["seconds"].pop("step")
    together = sum(x["times"] * x["expected"] for x in found["seconds"].values())
    assert step["expected"] == pytest.approx(together)
    assert found["answers_per_s"] == pytest.approx(256 / together)
    assert "fits: 64.1 of 79.1 GiB are usable" in text and "answers/s" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rl", "--length=8"], "rows of --rl follow from --prompt and --answer"),
        (["--rl", "--shape=2x8"], "--shape cannot stand here"),
        (["--answer=8"], "--answer cannot stand here: it belongs to --rl"),
        (["--rl", "--answer=99"], "--answer=99 is not in the 1 to 16 tokens"),
        (["--rl", "--prompt=60"], "--prompt=60 leaves less than config.rl.max_new_tokens=16"),
        (["--rl", "--config.rl.prompts=9"], "config.rl.prompts=9 .* use a multiple of 8"),
        (["--rl", "--config.rl.epsilon=2"], "config.rl.epsilon is 2.0; expected over 0"),
        (["--rl", "--config.rl.group=1"], "config.rl.group is 1; expected 2 or more"),
        (["--rl", "--config.rl.no_such=1"], "rl.no_such"),
        (["--rl", "--config.lora.dropout=0.1"], "must be 0: with dropout"),
        (["--rl", "--config.batch_size=8"], "config.batch_size cannot be set here"),
        (["--rl", "--config.pack_length=4096"], "config.pack_length cannot be set here"),
        (["--rl", "--config.mesh=data:3"], "must multiply to the 8 devices"),
    ],
)
def test_what_reinforce_would_refuse_is_refused(flags, message):
    with pytest.raises(SystemExit, match=message):
        plan.main(flags)


@pytest.mark.gpu_compile
@pytest.mark.skipif(
    bool(gpu_compile.unavailable()), reason=gpu_compile.unavailable() or "it can be"
)
def test_the_programs_of_a_step_compile_for_a_gpu_beside_the_estimate(tmp_path, capsys):
    path = tmp_path / "plan.json"
    plan.main(
        [
            "--rl", "--compile", "--device=h100-80g", "--devices=8", "--prompt=24",
            "--config.dtype=bfloat16", "--config.input=text", "--config.rl.prompts=8",
            "--config.rl.merge_lora=true", f"--json={path}",
        ]
    )  # fmt: skip
    plans = json.loads(path.read_text())
    found = plans["compiled"]
    assert list(found["passes"]) == list(PASSES)
    for part in found["passes"].values():
        assert part["launches"] > 0 and part["floor_ms"] > 0
        assert part["peak_gib"] >= part["there_gib"] > 0
    assert found["peak_gib"] == max(part["peak_gib"] for part in found["passes"].values())
    decoding = 1e-3 * found["passes"]["decode"]["floor_ms"]
    assert found["step_s"] > plans["answer"] * decoding
    assert "by buffer assignment" in capsys.readouterr().out
