"""`plan --compile`: the real train step, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest

from affectgpt_jax.configs import demo
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.gpu_plan import Compilation, CompilerError, Request
from affectgpt_jax.training import gpu_compile, roofline
from affectgpt_jax.training.devices import DEVICES

pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(
        bool(gpu_compile.unavailable()), reason=gpu_compile.unavailable() or "it can be"
    ),
]


def request(device, devices, **changes):
    """The demo's step in bfloat16, a row of text a device."""
    config = demo.get_config()
    config.update_from_flattened_dict(
        {"dtype": "bfloat16", "input": "text", "batch_size": devices} | changes
    )
    rows = Bucket(32, 16, 3 if config.pack_length else 1)
    return Request(json.loads(config.to_json()), device, devices, rows, "none")


def planned(tmp_path, *flags):
    """The plan of the demo's model in bfloat16, what was printed, and what stood on stderr."""
    path = tmp_path / "plan.json"
    command = [
        sys.executable, "-m", "affectgpt_jax.plan", "--compile", f"--json={path}",
        "--config.dtype=bfloat16", "--config.input=text", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout, done.stderr


def test_a_plan_shows_what_the_compiler_says_beside_the_estimate(tmp_path):
    flags = "--device=h100-80g", "--devices=1", "--shape=2x64", "--config.lora.dropout=0"
    plan, shown, progress = planned(tmp_path, *flags)
    found, device = plan["compiled"], DEVICES["h100-80g"]
    assert plan["attention"]["name"] == "cudnn"
    assert found["kinds"]["attention"]["launches"] > 0
    assert found["launches"] == sum(part["launches"] for part in found["kinds"].values())
    assert found["moved_gb"] == pytest.approx(sum(p["gb"] for p in found["kinds"].values()))
    for part in ("movement_gb", "lora_gb", "other_gb"):
        assert found[part] > 0
    assert found["collectives"] == []
    # The planner's own bytes of the arguments, and its FLOPs.
    assert 2**30 * found["arguments_gib"] == pytest.approx(plan["arguments"]["compiled"], rel=0.01)
    assert 1e12 * found["tflop"] == pytest.approx(plan["flops"]["step"])
    small = found["moved_gb"] - found["matmul_gb"] - found["attention_gb"]
    at_least = plan["flops"]["step"] / (roofline.MATMUL_SHARE * device.flops)
    at_least += 1e9 * small / (roofline.BANDWIDTH_SHARE * device.hbm)
    assert found["floor_ms"] == pytest.approx(1e3 * at_least)
    assert found["tokens_per_s"] == pytest.approx(2 * 64 / at_least)
    assert "by buffer assignment" in shown and "movement without arithmetic" in shown
    assert "compiling for 1 x H100-SXM5-80GB  0:0" in progress


@pytest.mark.parametrize(
    ("device", "changes", "kinds"),
    [
        ("h100-80g", {"mesh": "data:2,fsdp:2,tensor:2", "pack_length": 32}, {"all-gather"}),
        ("a100-80g", {"mesh": "data:8", "base_precision": "int8"}, set()),
    ],
)
def test_layouts_and_precisions_compile(device, changes, kinds):
    with Compilation(request(device, 8, **changes)) as compilation:
        found = compilation.result()
    assert found["floor_ms"] > 0 and found["peak_gib"] > 0
    assert {c["kind"] for c in found["collectives"]} >= {"all-reduce"} | kinds
    for total, each in (("network_ms", "ms"), ("network_alone_ms", "alone_ms")):
        assert found[total] == pytest.approx(sum(c[each] for c in found["collectives"]))
    assert found["floor_ms"] > found["network_alone_ms"] > 0
    assert ("data",) in [tuple(c["axes"])[:1] for c in found["collectives"]]


def test_a_step_that_the_compiler_refuses_is_an_error_of_one_sentence():
    asked = request("h100-80g", 1, xla_options="xla_no_such_option=1")
    with Compilation(asked) as compilation, pytest.raises(CompilerError, match="no_such_option"):
        compilation.result()


def test_the_process_ends_with_the_block():
    with Compilation(request("h100-80g", 1)) as compilation:
        process = compilation._process
        assert process.poll() is None
    assert process.returncode < 0


def test_other_commands_say_nothing_of_the_compiler():
    """Training sets JAX up as on a machine without the extra."""
    code = (
        "from affectgpt_jax import cpu, restore; import jax; kept = cpu.keep_freed_memory(); "
        "restore.set_up_process(); print(jax.default_backend(), kept)"
    )
    env = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, env=env, check=True
    )
    assert (done.stdout, done.stderr) == ("cpu True\n", "")
