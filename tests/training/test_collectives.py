"""Collectives read off partitioned programs, against what their shapes say."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from affectgpt_jax.training import collectives, sharding
from affectgpt_jax.training.collectives import Collective

LAYERS, WIDTH, ROWS = 5, 16, 8


def argument(mesh, shape, spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def sent_by(mesh, function, *arguments):
    lowered = jax.jit(function, out_shardings=NamedSharding(mesh, P())).lower(*arguments)
    return collectives.compile_and_read(lowered, mesh)[1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_loop_over_layers_is_counted_as_often_as_it_runs(dtype):
    mesh = sharding.make_mesh("fsdp:8")

    def layers(x, weights):
        def layer(x, w):
            whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ whole), None

        x = jax.lax.scan(layer, x, weights)[0]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp"))).sum()

    found = sent_by(
        mesh,
        layers,
        argument(mesh, (ROWS, WIDTH), P("fsdp"), dtype),
        argument(mesh, (LAYERS, WIDTH, WIDTH), P(None, "fsdp"), dtype),
    )
    size = jnp.dtype(dtype).itemsize
    assert found[0] == Collective("all-gather", ("fsdp",), LAYERS, LAYERS * WIDTH * WIDTH * size)
    assert [c.kind for c in found[1:]] == ["all-reduce"] and found[1].count == 1


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("data:8", ("data",)),
        ("data:2,fsdp:4", ("data", "fsdp")),
        ("data:2,fsdp:2,tensor:2", ("data", "fsdp")),
    ],
)
def test_gradients_of_a_batch_are_added_up_over_the_axes_that_split_it(text, axes):
    mesh = sharding.make_mesh(text)
    found = sent_by(
        mesh,
        jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))),
        argument(mesh, (WIDTH, 6), P()),
        argument(mesh, (ROWS, WIDTH), P(("data", "fsdp"))),
    )
    assert found == [Collective("all-reduce", axes, 1, WIDTH * 6 * 4)]


def test_one_device_sends_nothing():
    mesh = sharding.make_mesh("data:1", jax.devices()[:1])
    assert sent_by(mesh, lambda x: x.sum(), argument(mesh, (8,), P())) == []


MODULE = """HloModule m

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %r = f32[4]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}

%condition (p: (s32[], f32[4])) -> pred[] {{
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%branch (p: f32[4]) -> f32[4] {{
  ROOT %g = f32[4]{{0}} all-gather(%q), channel_id=2, replica_groups={groups}, dimensions={{0}}
}}

%other (p: f32[4]) -> f32[4] {{
  ROOT %p = f32[4]{{0}} parameter(0)
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %c = f32[4]{{0}} conditional(%i, %x, %x), branch_computations={{%other, %branch}}
  %w = (s32[], f32[4]{{0}}) while(%t), condition=%condition, body=%body
  %s = (bf16[2,8]{{1,0}}, pred[3]{{0}}) reduce-scatter(%a, %b), replica_groups={groups}
}}
"""


# Mesh data:2, fsdp:2, tensor:2; device i stands at its binary digits.
@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{}", ("data", "fsdp", "tensor")),
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor")),
        ("mesh['a'=2,'b'=2,'c'=2] {'b'}", ("fsdp",)),
        ("mesh['a'=2,'b'=4] {'b'}", ("fsdp", "tensor")),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",)),
        ("mesh['a'=4,'b'=2], device_ids=([8]) {'b'}", ("tensor",)),
    ],
)
def test_every_notation_of_groups_is_understood(groups, axes):
    text = MODULE.format(groups=groups)
    found = collectives.read(text, sharding.make_mesh("data:2,fsdp:2,tensor:2"))
    assert {c.kind: (c.axes, c.count, c.bytes) for c in found} == {
        "reduce-scatter": (axes, 1, (2 * 8 * 2 + 3) * 2 ** len(axes)),
        "all-reduce": (axes, 7, 7 * 16),
        "all-gather": (axes, 1, 16),
    }


def test_what_the_branches_of_a_loop_send_is_counted_as_often_as_the_loop_runs():
    mesh = sharding.make_mesh("data:8")

    def sum_of_all(x):
        def add(total, wanted):
            return total + jax.lax.cond(wanted, jnp.sum, lambda x: 0.0, x), None

        return jax.lax.scan(add, 0.0, jnp.arange(LAYERS) % 2 == 0)[0]

    found = sent_by(mesh, sum_of_all, argument(mesh, (WIDTH,), P("data")))
    assert found == [Collective("all-reduce", ("data",), LAYERS, LAYERS * 4)]


def test_a_loop_of_unknown_length_is_an_error_only_around_a_collective():
    mesh = sharding.make_mesh("data:8")
    x = argument(mesh, (WIDTH,), P("data"))

    def halve_until_small(x):
        return jax.lax.while_loop(lambda x: x[0] > 0.5, lambda x: x / 2, x)

    def halve_until_the_sum_is_small(x):
        return jax.lax.while_loop(lambda x: x.sum() > 0.5, lambda x: x / x.sum(), x)

    whole = argument(mesh, (WIDTH,), P())
    assert sent_by(mesh, halve_until_small, whole) == []
    with pytest.raises(collectives.ProgramError, match="a loop of unknown length"):
        sent_by(mesh, halve_until_the_sum_is_small, x)


def test_a_program_that_is_in_the_cache_is_read_again(tmp_path):
    mesh = sharding.make_mesh("data:8")
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        first, second = (
            sent_by(mesh, lambda x: x.sum(), argument(mesh, (ROWS,), P("data"))) for _ in range(2)
        )
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert first == second != [] and jax.config.jax_enable_compilation_cache
