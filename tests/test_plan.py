"""The plan of a run: closed forms of bytes and FLOPs, collectives of the step that is compiled."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from affectgpt_jax import plan, planner
from affectgpt_jax.build import base_config
from affectgpt_jax.configs import affectgpt_qwen25_7b, demo
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.models.decoder import PUBLISHED
from affectgpt_jax.models.flops import train_flops
from affectgpt_jax.models.lora import LoraConfig
from affectgpt_jax.training import collectives, gpu_compile, memory, roofline, sharding
from affectgpt_jax.training.devices import DEVICES
from affectgpt_jax.training.roofline import Shape

FUSION = 287_554  # parameters of the pre-fusion of the tiny base
A100 = DEVICES["a100-80g"]


def tiny_config(**changes):
    config = demo.get_config()
    config.input, config.batch_size = "text", 8
    config.update_from_flattened_dict(changes)
    return config


def tiny_planner(device=A100, length=32, targets=16, **changes):
    rows = Bucket(length, targets, 1)
    return planner.Planner(tiny_config(**changes), device, rows, roofline.EFFICIENCY)


def sent(mesh_text, remat="none", **changes):
    """Collectives of the compiled step by kind and axes, and those of the formulas."""
    mesh = sharding.make_mesh(mesh_text)
    planned = tiny_planner(**changes)
    _, found = collectives.compile_and_read(planned.lower(mesh, remat), mesh)
    shape, microbatches = Shape(**mesh.shape), planned.config.gradient_accumulation_steps
    rows = planned.config.batch_size // (shape.data * shape.fsdp * microbatches)
    expected = roofline.model_collectives(planned.sizes(rows, microbatches), shape, remat)
    return tuple({(c.kind, c.axes): c.bytes for c in list_} for list_ in (found, expected))


# --- What devices send each other -----------------------------------------------------------------


def test_data_parallel_lora_sends_the_bytes_of_its_adapters_and_heads_for_every_part():
    found, expected = sent(
        "data:8", batch_size=16, gradient_accumulation_steps=2, input="multi_text"
    )
    lora, fusion = 4 * 147_456, 4 * FUSION
    assert expected == {("all-reduce", ("data",)): 2 * (lora + fusion)}
    assert set(found) == set(expected)
    # The loss and the number of tokens beside them.
    assert found["all-reduce", ("data",)] - expected["all-reduce", ("data",)] == 2 * 8


def test_fsdp_gathers_the_layers_twice_and_the_vocabulary_once():
    # Without adapters: heads and pre-fusion are whole everywhere.
    found, expected = sent("fsdp:8", "full", **{"lora.rank": 0, "input": "multi_text"})
    tokens = 8 * 32 * 4  # of the batch, for the lookup of embeddings where they lie
    more = found["all-gather", ("fsdp",)] - expected["all-gather", ("fsdp",)]
    assert more == tokens


def test_tensor_parallelism_adds_up_hidden_states_five_times_a_layer():
    found, expected = sent("data:4,tensor:2", "full", **{"lora.rank": 0, "input": "multi_text"})
    tensor = "all-reduce", ("tensor",)
    # What the partitioner writes adds up five parts of the gradients of two inputs, of which a
    # GPU's compiler makes two sums; and one more for the embeddings. Beside them are the statistics
    # of the softmax over the vocabulary.
    layers = base_config("tiny").num_hidden_layers
    unsummed = (8 * layers + 1) / (5 * layers + 1) * expected[tensor]
    assert found[tensor] == pytest.approx(unsummed, rel=0.05)


# --- Memory ---------------------------------------------------------------------------------------


def test_what_a_batch_takes_is_in_proportion_to_its_rows():
    planned = tiny_planner(**{"dtype": "bfloat16"})
    mesh = sharding.make_mesh("data:1", jax.devices()[:1])
    program = planned.program.on(mesh, attend=memory.kernel_stand_in("cudnn", 1))
    estimates = memory.estimates(program.model, program.state, program.base, planned.batch(6))
    for policy, found in estimates:
        assert planned.memory(Shape(1, 1, 1), 6, policy).saved == pytest.approx(
            found.saved, rel=0.01
        )


@pytest.mark.parametrize(
    ("backend", "statistics"), [("cudnn", 1), ("cudnn_masked", 1), ("cudnn_packed", 4)]
)
def test_a_kernel_saves_its_inputs_its_output_and_statistics(backend, statistics):
    attend = memory.kernel_stand_in(backend, samples=3)

    def loss(query, key, value, segment_ids):
        # Each is computed here, so that none is an argument that nobody copies.
        out = attend(-query, -key, -value, segment_ids)
        return out.astype(jnp.float32).sum(), None

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    query, key = shape(2, 64, 4, 8), shape(2, 64, 2, 8)
    ids = shape(2, 64, dtype=jnp.int32)
    saved = memory.saved_bytes(lambda qkv, ids: loss(*qkv, ids), (query, key, key), ids)
    assert saved == 2 * 64 * 8 * 2 * (4 + 2 + 2 + 4) + 2 * statistics * 4 * 64 * 4


def test_gradients_reach_queries_keys_and_values_in_their_shapes():
    attend = memory.kernel_stand_in("cudnn", 1)
    query, key = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 2, 8))
    out, vjp = jax.vjp(lambda *x: attend(*x, jnp.ones((2, 5), jnp.int32)), query, key, key)
    assert [g.shape for g in vjp(out)] == [query.shape, key.shape, key.shape]


def test_fsdp_brings_together_two_layers_or_the_vocabulary():
    planned = tiny_planner()
    whole = planned.abstract(Shape(1, 1, 1))[1]
    assert memory.gathered_bytes(whole) == 0
    layers = planned.sizes(1, 1).layers
    lm_head = planned.sizes(1, 1).lm_head
    expected = max(2 * layers // planned.llm.num_hidden_layers, lm_head)
    assert memory.gathered_bytes(planned.abstract(Shape(1, 4, 1))[1]) == expected


# --- Recommendations ------------------------------------------------------------------------------


def device_with(memory_bytes):
    """An A100 whose usable memory is so many bytes."""
    return A100._replace(memory=int(memory_bytes / memory.USABLE / 0.9) + 2)


def test_a_base_that_fits_is_not_split():
    planned = tiny_planner()
    best = planned.recommend(8, 64, 1)
    assert (best.shape, best.microbatches, best.remat) == (Shape(8, 1, 1), 1, "none")
    assert best.flags == "--config.mesh=data:8 --config.remat=none"
    assert "gradients alone" in plan.reason(planned, best)


def test_a_base_that_does_not_fit_is_split_over_as_few_devices_as_will_do():
    # Rows of one token, so that the base is nearly all that there is.
    halves = tiny_planner(length=1, targets=1).memory(Shape(4, 2, 1), 1, "none")
    planned = tiny_planner(device=device_with(halves.total), length=1, targets=1)
    best = planned.recommend(8, 8, 1)
    assert best.shape.fsdp == 2
    assert "with the base whole on every device it would be too large" in plan.reason(planned, best)


def test_a_batch_that_does_not_fit_runs_in_parts_or_is_computed_again():
    roomy = tiny_planner(length=64, targets=8)
    least = roomy.memory(Shape(1, 1, 1), 4, "none")
    planned = tiny_planner(device=device_with(least.total), length=64, targets=8)
    best = planned.recommend(1, 64, 1)
    assert best.fits and (best.microbatches > 1 or best.remat != "none")
    assert best.batch_size == 64
    assert planned.most_rows(Shape(1, 1, 1), "none") == 4


def test_where_nothing_fits_it_says_so():
    planned = tiny_planner(device=device_with(1000))
    assert planned.recommend(8, 8, 1) is None
    assert planned.most_rows(Shape(1, 1, 1), "full") == 0


def test_a_longer_data_axis_changes_the_network_alone():
    planned = tiny_planner()
    asked = planned.layout(Shape(2, 4, 1), 1, 1)
    points = planned.curve(asked, plan.CURVE, "none")
    assert [p.shape for p in points[:5]] == [
        Shape(1, 1, 1), Shape(1, 2, 1), Shape(1, 4, 1), Shape(2, 4, 1), Shape(4, 4, 1),
    ]  # fmt: skip
    assert len(points) == 10 and points[-1].batch_size == 512
    assert len({p.time.compute for p in points}) == 1
    networks = [p.time.network for p in points]
    assert networks == sorted(networks) and networks[0] == 0


# --- The command ----------------------------------------------------------------------------------


def arguments(**changes):
    values = dict(
        device="a100-80g", devices=8, length=None, targets=None, efficiency=0.5, compile=False
    )
    return SimpleNamespace(**values | changes)


def test_the_papers_recipe_on_eight_devices(monkeypatch):
    config = affectgpt_qwen25_7b.get_config()
    config.batch_size = 24
    # Four of its layers, of which each takes seconds to compile.
    layers, whole = 4, PUBLISHED[config.llm]
    llm = dataclasses.replace(whole, num_hidden_layers=layers)
    monkeypatch.setitem(PUBLISHED, config.llm, llm)
    found = plan.make_plan(config, arguments())
    exact, needed = found["arguments"], found["layout"]["memory"]
    lora, fusion = layers * 40_370_176 // 28, 14_042_372
    outside = (2 * whole.vocab_size + 1) * whole.hidden_size
    base = outside + layers * (7_615_616_512 - outside) // 28
    assert exact["base"] == needed["base"] == 2 * base
    assert exact["trainable"] == 4 * (lora + fusion)
    assert 0 <= exact["optimizer"] - 2 * exact["trainable"] < 100  # two moments and counters
    # XLA leaves out the segments, which the stand-in does not read; batch and rounding are small.
    together = exact["base"] + exact["trainable"] + exact["optimizer"]
    assert 0 <= exact["compiled"] / together - 1 < 1e-4
    flops = train_flops(llm, LoraConfig(16), 1024, 616)
    assert found["flops"]["step"] == 24 * flops.total
    assert found["layout"]["seconds"]["compute"] == pytest.approx(3 * flops.total / 312e12)
    # All gradients in float32, and a byte for each chunk of 1,024 supervised tokens of a device:
    # whether any device needs it.
    chunks = -(-3 * 616 // 1024)
    assert found["collectives"] == [
        {
            "kind": "all-reduce",
            "axes": ("data",),
            "count": layers * 14 + 20 + 1,
            "bytes": 4 * lora + 4 * fusion + 8 + chunks,
        }
    ]
    assert found["recommended"]["flags"] == "--config.mesh=data:8 --config.remat=none"
    text = plan.report(found)
    assert "frozen base" in text and "before the GPU compiler combines them" in text
    length = "the run: 300,000 updates, about 7,200,000 clips, 229.8 epochs of the paper's 31,327"
    assert length in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_the_command_emulates_devices_and_prints_json(tmp_path):
    command = [
        sys.executable, "-m", "affectgpt_jax.plan", "--devices=4", "--device=h100-80g", "--json",
        "--config.mesh=data:2,fsdp:2", "--length=32", "--targets=8", "--config.batch_size=4",
        "--config.input=text",
    ]  # fmt: skip
    # As on a node whose environment asks for a GPU.
    env = {**os.environ, "JAX_PLATFORMS": "cuda"}
    output = subprocess.check_output(command, env=env, text=True, cwd=tmp_path)
    found = json.loads(output)
    assert found["layout"]["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert found["rows"] == {"length": 32, "targets": 8, "clips": 1}
    assert {c["kind"] for c in found["collectives"]} >= {"all-reduce", "all-gather"}
    seconds = found["layout"]["seconds"]
    assert seconds["floor"] == max(seconds[k] for k in ("compute", "memory", "network"))
    assert list(tmp_path.iterdir()) == []  # no workdir


def test_a_plan_needs_a_config_json_and_no_weights(tmp_path):
    from affectgpt_jax.build import base_directory

    (tmp_path / "config.json").write_text((base_directory("tiny") / "config.json").read_text())
    planned = tiny_planner(llm=str(tmp_path))
    assert planned.llm == tiny_planner().llm


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.llm=Qwen9"], "is not a directory"),
        (["--config.mesh=data:3"], "must multiply to the 8 devices"),
        (["--config.batch_size=3"], "use a multiple of 8"),
        (["--config.attention=cudnn"], "bfloat16 or float16, not in float32"),
        (
            ["--config.base_precision=fp8"],
            "compute capability 8.9 .* and this one has 8.0; use int8",
        ),
        (["--config.no_such_key=1"], "config.no_such_key is not a key"),
        (["--length=8", "--targets=9"], "--targets=9 are more than the 8 tokens"),
        (["--shape=2x8", "--length=8"], "--shape stands in place of --length"),
        (["--shape=2x8", "--config.batch_size=8"], "in place of --config.batch_size"),
        (["--shape=2x8", "--config.mesh=data:3"], "must multiply to the 8 devices"),
    ],
)
def test_what_training_would_refuse_is_refused(flags, message):
    with pytest.raises(SystemExit, match=message):
        plan.main(flags)


def test_wrong_values_of_its_own_flags_are_refused(capsys):
    for flag in (
        "--devices=0",
        "--device=a100",
        "--efficiency=2",
        "--length=x",
        "--shape=2,8",
        "--no-such=1",
    ):
        with pytest.raises(SystemExit):
            plan.main([flag])
        assert flag.split("=")[0] in capsys.readouterr().err


def test_the_length_of_a_run_is_told_as_far_as_its_clips_are_known(demo_records, tmp_path):
    config = affectgpt_qwen25_7b.get_config("24")
    assert plan.length_of_run(config) == {
        "updates": 37_500, "clips": 900_000, "epochs": 900_000 / 31_327,
        "of": "the paper's 31,327 clips",
    }  # fmt: skip
    config.data.train = str(tmp_path)  # no records there
    assert plan.length_of_run(config)["epochs"] is None
    config.data.train, config.data.val_share = str(demo_records["train"]), 0.25
    assert plan.length_of_run(config)["epochs"] == 900_000 / 48
    config.pack_length = 2040
    assert plan.length_of_run(config)["clips"] == 8 * 900_000


def test_rows_are_the_longest_that_training_may_have():
    config = affectgpt_qwen25_7b.get_config()
    assert plan.rows_of(config, None, None) == Bucket(1024, 616, 1)
    config.pack_length = 2048
    assert plan.rows_of(config, None, None) == Bucket(2048, 1228, 12)
    assert plan.rows_of(config, 512, 100) == Bucket(512, 100, 3)


def test_a_shape_is_of_the_rows_of_a_device_with_all_tokens_but_the_last_supervised():
    flags = ["--devices=8", "--shape=3x64", "--config.mesh=data:2,fsdp:2,tensor:2"]
    found, config = plan.parse_arguments([*flags, "--config.gradient_accumulation_steps=2"])
    assert config.batch_size == 3 * 4 * 2
    assert plan.rows_of(config, found.length, found.targets) == Bucket(64, 63, 1)


def test_a_mesh_that_splits_heads_can_be_planned():
    # The loss skips chunks in a conditional inside a loop, and sums over the vocabulary's parts.
    config = tiny_config(mesh="data:4,tensor:2")
    found = plan.make_plan(config, arguments(length=32, targets=16))
    assert ["tensor"] in [list(c["axes"]) for c in found["collectives"]]


def test_without_its_wheels_the_gpu_compiler_is_named_in_one_sentence(monkeypatch):
    monkeypatch.setattr(gpu_compile, "_installed", lambda module: False)
    with pytest.raises(SystemExit, match=r"pip install 'affectgpt-jax\[gpu-compile\]'$"):
        plan.main(["--compile", "--config.input=text"])


def test_a_plan_can_be_written_to_a_file_beside_the_report(tmp_path, capsys):
    path = tmp_path / "plan.json"
    flags = ["--devices=8", "--shape=1x32", "--config.input=text"]
    plan.main([*flags, f"--json={path}"])
    found = json.loads(path.read_text())
    assert found["estimate"]["peak_gib"] == found["layout"]["memory"]["total"] / 2**30
    assert "compiled" not in found
    assert "memory of one device" in capsys.readouterr().out


def test_recomputation_and_efficiency_make_the_expected_time_longer():
    planned = tiny_planner()
    shape = Shape(1, 1, 1)
    none, full = (planned.layout(shape, 1, 8, remat) for remat in ("none", "full"))
    assert full.time.compute > 1.2 * none.time.compute
    assert math.isclose(
        none.time.expected, max(none.time.compute, none.time.memory) / roofline.EFFICIENCY
    )


def test_packed_rows_recompute_even_where_there_is_room():
    config = affectgpt_qwen25_7b.get_config("6")
    for pack_length, remat in ((0, "none"), (2048, "save_attention")):
        config.pack_length = pack_length
        rows = plan.rows_of(config, None, None)
        planned = planner.Planner(config, DEVICES["h200-141g"], rows, roofline.EFFICIENCY)
        assert planned.layout(Shape(1, 1, 1), 1, 6).remat == remat
        best = planned.recommend(1, 6, 1)
        assert best.remat == remat
        assert ("no less time" in plan.reason(planned, best)) == bool(pack_length)
