"""XLA's CUDA compiler without a GPU: what it says of programs whose bytes and FLOPs are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from affectgpt_jax.training import gpu_compile, sharding
from affectgpt_jax.training.devices import DEVICES

LAYERS, WIDTH, ROWS, RANK = 3, 256, 512, 16

gpu_compiled = pytest.mark.skipif(
    bool(gpu_compile.unavailable()), reason=gpu_compile.unavailable() or "it can be"
)

if not gpu_compile.unavailable():
    jax.devices()  # JAX loads the plugin now, before a command under test hides it


def mesh_of(name, text="data:1", count=1):
    return sharding.make_mesh(text, gpu_compile.devices(name, count))


def compile_for(mesh, function, *arguments):
    """What the compiler says of a function of arrays, given as `(shape, spec)`."""
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in arguments
    ]
    return gpu_compile.read(
        gpu_compile.compile_step(jax.jit(function).lower(*shapes), {}), mesh, RANK
    )


@pytest.mark.gpu_compile
@gpu_compiled
@pytest.mark.parametrize("name", DEVICES)
def test_a_loop_of_matmuls_moves_what_its_shapes_say(name):
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    weights, rows = LAYERS * WIDTH * WIDTH * 2, ROWS * WIDTH * 2
    found = compile_for(mesh_of(name), layers, ((ROWS, WIDTH), P()), ((LAYERS, WIDTH, WIDTH), P()))
    assert found["kinds"]["matmul"]["launches"] == LAYERS
    assert found["matmul_gb"] == pytest.approx(
        (weights + LAYERS * 2 * rows) / 1e9,
        rel=1e-4,  # and the places of slices
    )
    assert found["matmul_tflop"] == pytest.approx(LAYERS * 2 * ROWS * WIDTH * WIDTH / 1e12)
    # tanh reads and writes the rows.
    assert found["other_gb"] == pytest.approx(LAYERS * 2 * rows / 1e9, rel=0.01)
    assert 2**30 * found["peak_gib"] >= weights + 2 * rows
    assert found["collectives"] == []


@pytest.mark.gpu_compile
@gpu_compiled
def test_narrow_matmuls_copies_and_fills_are_told_apart():
    def function(x, y, w, a, b):
        # Of other rows: XLA would merge two products of the same ones.
        return x @ w, (y @ a) @ b, x.T.copy()

    arguments = (
        ((ROWS, WIDTH), P()),
        ((ROWS, WIDTH), P()),
        ((WIDTH, WIDTH), P()),
        ((WIDTH, RANK), P()),
        ((RANK, WIDTH), P()),
    )
    found = compile_for(mesh_of("h100-80g"), function, *arguments)
    assert found["kinds"]["lora"]["launches"] == 2
    assert found["movement_gb"] == pytest.approx(2 * ROWS * WIDTH * 2 / 1e9, rel=0.01)
    assert {launch["kind"] for launch in found["largest"]} >= {"lora", "movement"}


@pytest.mark.gpu_compile
@gpu_compiled
def test_collectives_of_more_than_a_node_are_found_with_their_axes():
    mesh = mesh_of("a100-40g", "data:8,fsdp:2", 16)
    whole = NamedSharding(mesh, P())
    found = compile_for(
        mesh,
        lambda x, w: jax.lax.with_sharding_constraint(x.T @ x, whole) @ w,
        ((ROWS, WIDTH), P(("data", "fsdp"))),
        ((WIDTH, WIDTH), P("fsdp")),
    )
    sums = [c for c in found["collectives"] if c["kind"] == "all-reduce"]
    assert [(c["axes"], c["bytes"]) for c in sums] == [(("data", "fsdp"), 2 * WIDTH * WIDTH)]


def test_jax_is_given_the_planned_gpus_answers_and_gets_its_own_questions_back():
    from jax._src.cudnn import fused_attention_stablehlo as private

    own = private.check_compute_capability
    with gpu_compile.in_place_of_local_gpu((9, 0)):
        assert private.check_compute_capability("8.0") and private.check_compute_capability("9.0")
        assert not private.check_compute_capability("10.0")
        assert private.is_cuda_compute_capability_equal("9.0")
        assert not private.is_cuda_compute_capability_equal("9.1")
        assert private.check_cudnn_version() >= 91000
    assert private.check_compute_capability is own


def test_a_compiler_of_another_version_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(
        gpu_compile, "_installed", lambda module: "cuda12" in module or "nvcc" in module
    )
    monkeypatch.setattr(gpu_compile.importlib.metadata, "version", lambda name: "0.7.1")
    assert f"jax-cuda12-pjrt 0.7.1 is not for jax {jax.__version__}" in gpu_compile.unavailable()


def test_there_is_a_target_for_every_device():
    root = gpu_compile.importlib.resources.files("affectgpt_jax") / "assets" / "gpu_targets"
    assert {file.name for file in root.iterdir()} == {f"{name}.txtpb" for name in DEVICES}
    for name, device in DEVICES.items():
        text = (root / f"{name}.txtpb").read_text()
        major, _ = device.compute_capability
        assert f"major: {major}" in text and device.name.split("-")[0] in text
