"""The train step of a small decoder, compiled for GPUs that are not here: what XLA makes of it.

A few tokens beside wide layers, so that whatever handles a kernel stands out by its bytes.
"""

import functools
import json
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.models.decoder import LOSS_CHUNK
from affectgpt_jax.planner import Planner
from affectgpt_jax.training import gpu_compile, hlo, hlo_traffic, roofline, sharding, xla_options
from affectgpt_jax.training.devices import DEVICES
from affectgpt_jax.training.roofline import Shape

pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.slow,  # half a minute each: `pytest -m gpu_compile`
    pytest.mark.skipif(
        bool(gpu_compile.unavailable()), reason=gpu_compile.unavailable() or "it can be"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _optimised():
    """These are looked at and not run; unoptimised, some of their kernels take ptxas minutes."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


LAYERS, HIDDEN, WIDE, VOCABULARY = 2, 1024, 3072, 4096
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 128
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
TOKENS = 128  # of a device
ROWS = (TOKENS, 64, 1)  # length, supervised, samples
PACKED = (TOKENS, 64, 3)
DROPOUT = {"lora.dropout": 0.05}


class Step(NamedTuple):
    """A compiled step."""

    found: dict  # of gpu_compile.read
    module: hlo.Module
    launches: list[hlo_traffic.Launch]
    expected: list  # collectives by the formulas
    estimate: float  # GiB

    def of(self, kind):
        return [launch for launch in self.launches if launch.kind == kind]

    def sent(self, kind, *axes):
        return [
            c for c in self.found["collectives"] if c["kind"] == kind and list(c["axes"]) == [*axes]
        ]


@functools.cache
def step(device="h100-80g", count=1, remat="none", rows=ROWS, rows_each=1, llm="", **changes):
    """The paper's recipe without dropout, on text, with so many rows a device."""
    config = affectgpt_qwen25_7b.get_config()
    config.update_from_flattened_dict({"input": "text", "lora.dropout": 0.0} | changes)
    data, fsdp, tensor = shape = Shape(*sharding.parse_mesh(config.mesh, count))
    parts = config.gradient_accumulation_steps
    config.batch_size, config.pack_length = rows_each * data * fsdp * parts, 0
    if rows[2] > 1:
        config.pack_length = rows[0]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN2))
        config.llm = llm or folder
        planner = Planner(config, DEVICES[device], Bucket(*rows), roofline.EFFICIENCY)
    mesh = sharding.make_mesh(config.mesh, gpu_compile.devices(device, count))
    options, _ = xla_options.compiler_options("cuda", count, {}, "", xla_options.refusal_by_xla)
    with gpu_compile.in_place_of_local_gpu(DEVICES[device].compute_capability):
        lowered = planner.lower(mesh, remat, stand_in=False)
    compiled = gpu_compile.compile_step(lowered, options)
    module = hlo.parse(compiled.as_text())
    return Step(
        gpu_compile.read(compiled, mesh, config.lora.rank),
        module,
        hlo_traffic.launches(module, config.lora.rank),
        roofline.model_collectives(planner.sizes(rows_each, parts), shape, remat),
        planner.memory(shape, rows_each, remat).total / 2**30,
    )


def cublas_calls(found, dtype):
    """How many calls of cuBLAS multiply arrays of a dtype, as HLO spells it."""
    return sum(
        bool(operands) and all(hlo.arrays(shape)[0].dtype == dtype for shape in operands)
        for body in found.module.computations.values()
        for i in body.values()
        if "cublas" in i.attributes and i.opcode.startswith("custom-call")
        for operands in [[body[name].shape for name in i.operands[:2] if name in body]]
    )


# --- Movement and memory --------------------------------------------------------------------------

# The smallest kernel, which is more than any activation and than all adapters of a projection.
KERNEL = HIDDEN * KV_HEADS * HEAD_DIM
KERNELS = LAYERS * (2 * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM + 3 * HIDDEN * WIDE)  # all of them


@pytest.mark.parametrize(
    ("device", "remat", "changes"),
    [
        ("h100-80g", "none", {}),
        ("h100-80g", "save_attention", {"lora.dropout": 0.05}),
        ("a100-80g", "save_projections", {}),
        ("h100-80g", "full", {"gradient_accumulation_steps": 2}),
    ],
)
def test_no_kernel_is_copied_and_no_stack_is_filled(device, remat, changes):
    found = step(device, remat=remat, **changes)
    least = 2 * KERNEL
    assert least > 2 * TOKENS * WIDE and least > 4 * LAYERS * WIDE * 16
    moved = [f for f in found.of(hlo_traffic.MOVEMENT) if max(f.read, f.written) >= least]
    assert not moved, [(f.name, f.shape, f.op_name) for f in moved]


@pytest.mark.parametrize(
    ("device", "precision"), [("h100-80g", "fp8"), ("h100-80g", "int8"), ("a100-80g", "int8")]
)
def test_8_bit_kernels_are_transposed_for_one_direction_and_one_at_a_time(device, precision):
    # cuBLAS wants both operands of an 8-bit product along the sum, which forward and backward pass
    # take over different axes.
    found = step(device, base_precision=precision)
    moved = [f for f in found.of(hlo_traffic.MOVEMENT) if max(f.read, f.written) >= KERNEL]
    assert sum(f.bytes for f in moved) <= 1.05 * 2 * KERNELS
    assert max(f.written for f in moved) <= HIDDEN * WIDE


def test_what_dropout_leaves_of_an_input_is_not_kept():
    rows = (2048, 64, 1)
    without, beside = (
        step(rows=rows, **changes).found["peak_gib"] for changes in ({}, {"lora.dropout": 0.05})
    )
    # Of a layer's down projection alone it would be this.
    assert beside - without < LAYERS * 2048 * WIDE * 2 / 2**30


def test_nf4_kernels_are_widened_again_and_not_kept():
    beside = step().found["peak_gib"] - step(base_precision="nf4").found["peak_gib"]
    # Of 16 bits a weight 11.75 are saved, but for kernels that are widened at the time.
    assert beside > 0.6 * 11.75 / 8 * KERNELS / 2**30


def test_plain_attention_does_not_keep_its_scores():
    long, length = (1024, 64, 1), 1024
    xla, cudnn = (step(rows=long, attention=name).found["peak_gib"] for name in ("xla", "cudnn"))
    # Scores of half the square, of all layers.
    assert xla - cudnn < LAYERS * HEADS * length * length / 2 * 4 / 2**30


def test_a_layers_gradients_are_there_before_the_next_one_begins():
    # Else what adapters' gradients are made of is kept until the scheduler comes to them.
    found = step(count=8, mesh="tensor:8", **DROPOUT)
    backward = [f.op_name for f in found.launches if "transpose(" in f.op_name]
    layers = [int(n.split("layers_")[1][0]) for n in backward if "layers_" in n and "low_rank" in n]
    assert {*layers} == {*range(LAYERS)} and layers == sorted(layers, reverse=True)


def test_save_attention_computes_attention_once():
    launches = {
        policy: len(step(remat=policy).of(hlo_traffic.ATTENTION))
        for policy in ("none", "save_attention", "save_projections", "full")
    }
    once, twice = 2 * LAYERS, 3 * LAYERS  # forward and backward
    assert launches == {
        "none": once,
        "save_attention": once,
        "save_projections": twice,
        "full": twice,
    }


QWEN = "Qwen2.5-7B-Instruct"
PAPERS, LONG, SEVERAL = (1024, 616, 1), (4096, 4095, 1), (2048, 1228, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "count", "remat", "rows", "rows_each", "changes"),
    [
        ("a100-80g", 8, "none", PAPERS, 3, DROPOUT),
        ("h100-80g", 1, "none", (512, 308, 1), 3, DROPOUT),
        ("h100-80g", 1, "none", LONG, 2, {}),
        ("h100-80g", 1, "save_attention", LONG, 2, {}),
        ("h100-80g", 1, "save_projections", LONG, 2, {}),
        ("h100-80g", 1, "full", LONG, 2, {}),
        ("h100-80g", 1, "none", PAPERS, 12, DROPOUT),
        ("a100-80g", 8, "none", PAPERS, 3, {"mesh": "fsdp:8", **DROPOUT}),
        ("a100-80g", 1, "none", PAPERS, 3, {"gradient_accumulation_steps": 8, **DROPOUT}),
        ("a100-80g", 1, "none", PAPERS, 3, {"attention": "xla", **DROPOUT}),
        ("h100-80g", 1, "save_attention", SEVERAL, 6, DROPOUT),
        ("a100-80g", 1, "save_attention", SEVERAL, 6, DROPOUT),
        ("h100-80g", 1, "save_projections", SEVERAL, 6, DROPOUT),
        ("h100-80g", 1, "none", PAPERS, 3, {"base_precision": "fp8", **DROPOUT}),
        ("h100-80g", 1, "none", PAPERS, 3, {"base_precision": "int8", **DROPOUT}),
        ("h100-80g", 1, "none", PAPERS, 3, {"base_precision": "nf4", **DROPOUT}),
        ("h100-80g", 1, "none", LONG, 2, {"base_precision": "fp8"}),
        ("h100-80g", 8, "none", PAPERS, 12, {"mesh": "data:2,tensor:4", **DROPOUT}),
        ("h100-80g", 8, "none", SEVERAL, 2, {"mesh": "data:4,tensor:2", **DROPOUT}),
        (
            "h100-80g",
            8,
            "none",
            PAPERS,
            6,
            {"mesh": "fsdp:4,tensor:2", "base_precision": "int8", **DROPOUT},
        ),
    ],
)
def test_the_estimate_of_a_7b_step_is_within_a_twentieth_of_the_compilers(
    device, count, remat, rows, rows_each, changes
):
    found = step.__wrapped__(device, count, remat, rows, rows_each, QWEN, **changes)
    assert found.estimate == pytest.approx(found.found["peak_gib"], rel=0.05)


# --- More than one device -------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["h100-80g", "a100-80g"])
def test_chunks_of_the_vocabulary_are_those_of_one_device(device):
    positions = 2560
    rows = (positions, positions, 1)

    def matmuls(count):
        launches = step(device, count, remat="full", rows=rows).of(hlo_traffic.MATMUL)
        return sum(f.times for f in launches if "lm_head" in f.op_name)

    # Logits and their gradient.
    assert matmuls(1) == matmuls(8) == 2 * math.ceil(positions / LOSS_CHUNK)


def test_gradients_of_adapters_are_added_up_once_in_float32():
    found = step(count=8, mesh="data:8")
    (formula,) = found.expected
    sums = found.sent("all-reduce", "data")
    assert sums == found.found["collectives"] and not any(s["in_loop"] for s in sums)
    # The loss and the count of tokens are beside them.
    assert sum(s["count"] * s["bytes"] for s in sums) == pytest.approx(formula.bytes, rel=1e-3)
    dtypes = {
        array.dtype
        for body in found.module.computations.values()
        for i in body.values()
        if hlo.base_opcode(i) == "all-reduce"
        for array in hlo.arrays(hlo.result_shape(i))
    }
    assert dtypes == {"f32"}


@pytest.mark.parametrize(("remat", "times"), [("none", 4), ("save_attention", 4), ("full", 5)])
def test_devices_that_share_heads_add_hidden_states_up_four_times_a_layer(remat, times):
    found = step(count=8, remat=remat, mesh="data:2,tensor:4")
    hidden = TOKENS * HIDDEN * 2
    # XLA joins those of so small a model with the adapters' narrow ones, so bytes are counted.
    # One more of the embeddings; of the first layer nothing needs the gradient of its input.
    sent = sum(s["count"] * s["bytes"] for s in found.sent("all-reduce", "tensor"))
    assert int(sent / hidden) == times * LAYERS
    assert sum(c.count for c in found.expected if c.axes == ("tensor",)) == times * LAYERS + 1


@pytest.mark.parametrize("precision", ["", "int8"])
def test_fsdp_gathers_what_the_formula_says(precision):
    found = step(count=8, mesh="fsdp:8", base_precision=precision)
    gathered = sum(s["count"] * s["bytes"] for s in found.sent("all-gather", "fsdp"))
    formula = next(c.bytes for c in found.expected if c.kind == "all-gather")
    assert gathered == pytest.approx(formula, rel=0.05)


# --- Precisions and everything else ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [
        ("h100-80g", "fp8", "f8e4m3fn"),
        ("h100-80g", "int8", "s8"),
        ("a100-80g", "int8", "s8"),
    ],
)
def test_8_bit_kernels_are_multiplied_as_they_are(device, precision, dtype):
    found = step(device, base_precision=precision)
    # Seven projections, forward and backward; those of the first layer's input have no gradient.
    assert cublas_calls(found, dtype) >= 2 * 7 * LAYERS - 3
    saved = step(device).found["peak_gib"] - found.found["peak_gib"]
    assert saved > 0.8 * KERNELS / 2**30  # but for the transposed one


@pytest.mark.parametrize(
    ("device", "count", "remat", "rows", "changes"),
    [
        ("h100-80g", 1, "full", PACKED, {"attention": "cudnn_packed"}),
        ("h100-80g", 1, "save_attention", PACKED, {"attention": "cudnn_masked"}),
        ("h100-80g", 8, "none", PACKED, {"attention": "xla", "mesh": "fsdp:4,tensor:2"}),
        ("h100-80g", 8, "save_attention", ROWS, {"base_precision": "fp8", "mesh": "fsdp:8"}),
        (
            "h100-80g",
            8,
            "save_projections",
            PACKED,
            {"base_precision": "int8", "mesh": "data:2,tensor:4"},
        ),
        ("a100-80g", 1, "save_attention", PACKED, {"attention": "cudnn_masked"}),
        ("a100-80g", 8, "full", ROWS, {"attention": "xla", "base_precision": "nf4"}),
        (
            "a100-80g",
            8,
            "none",
            PACKED,
            {"base_precision": "nf4", "mesh": "data:2,fsdp:2,tensor:2", "lora.dropout": 0.05},
        ),
        ("a100-80g", 1, "none", ROWS, {"dtype": "float32"}),
    ],
)
def test_everything_compiles(device, count, remat, rows, changes):
    found = step(device, count, remat, rows, **changes)
    backend = changes.get("attention", "")
    kernels = found.of(hlo_traffic.ATTENTION)
    assert bool(kernels) == (backend != "xla" and changes.get("dtype") != "float32")
    assert found.found["peak_gib"] > 0
