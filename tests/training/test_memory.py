"""What an update is expected to take, against sizes that follow from the shapes, and the choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from tiny_model import make_batch, make_model

from affectgpt_jax import build
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.models.affectgpt import AffectGPT, init_random_base, with_compute
from affectgpt_jax.models.decoder import PUBLISHED, ComputeConfig, Decoder
from affectgpt_jax.training import memory, sharding
from affectgpt_jax.training.optimizer import make_optimizer
from affectgpt_jax.training.step import init_state


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


# --- What is saved --------------------------------------------------------------------------------


def test_what_the_backward_pass_reads_again_is_counted_once():
    def squares(x):
        return jnp.sum(jnp.sin(x) ** 2), None  # saves sin and cos

    assert memory.saved_bytes(squares, shape(8, 16)) == 2 * 8 * 16 * 4


def test_arguments_that_the_backward_pass_reads_are_not_counted():
    def product(x, weights):
        return jnp.sum(x @ weights), None

    assert memory.saved_bytes(product, shape(8, 16), shape(16, 32)) == 0


def test_an_array_that_is_read_in_two_shapes_is_counted_once():
    def views(x):
        once = jnp.sin(x)
        policy = jax.checkpoint_policies.nothing_saveable
        product = jax.checkpoint(lambda x: jnp.sum(x * x), policy=policy)
        return product(once) + product(once.reshape(-1)), None

    assert memory.saved_bytes(views, shape(8, 16)) == 2 * 8 * 16 * 4  # sin and cos


def test_calls_of_one_function_are_looked_into():
    policy = jax.checkpoint_policies.nothing_saveable
    square = jax.checkpoint(lambda x: x * x, policy=policy)

    @functools.partial(jax.jit, inline=True)
    def layer(x):
        once = jnp.sin(x)
        return square(once) + square(once.reshape(-1)).reshape(x.shape)

    def layers(x):
        return jnp.sum(layer(layer(x))), None

    # Each layer's cos, and sin, which is read in two shapes; the second's input is an addition.
    assert memory.saved_bytes(layers, shape(8, 16)) == 2 * 2 * 8 * 16 * 4


def test_a_scan_saves_for_every_layer_in_the_dtype_of_each_value():
    def layers(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0], dtype=jnp.float32), None

    half = jnp.bfloat16
    saved = memory.saved_bytes(layers, shape(8, 16, dtype=half), shape(5, 16, 16, dtype=half))
    assert saved % (5 * 8 * 16 * 2) == 0 and 1 <= saved // (5 * 8 * 16 * 2) <= 2


# --- The paper's step -----------------------------------------------------------------------------


def one_device():
    return jax.make_mesh(
        (1, 1, 1),
        sharding.AXES,
        devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
    )


def paper(rows, length=512, targets=256):
    """Model, mesh, state, base and batch of the 7B recipe on text without dropout, all abstract.

    Attention is left out: what it saves depends on the backend.
    """
    config = affectgpt_qwen25_7b.get_config()
    config.input, config.lora.dropout = "text", 0.0
    model = build.model(config, PUBLISHED["Qwen2.5-7B-Instruct"])
    model = with_compute(model, attend=lambda q, k, v, segment_ids: q)
    optimizer = make_optimizer(build.optimizer_config(config), config.steps)
    mesh = one_device()
    state = sharding.abstract(mesh, lambda key: init_state(model, optimizer, key))
    base = sharding.abstract(mesh, lambda key: init_random_base(model, key))
    integers = shape(rows, length, dtype=jnp.int32)
    batch = {
        **dict.fromkeys(("tokens", "positions", "segment_ids", "soft_token_index"), integers),
        **dict.fromkeys(("target_positions", "targets"), shape(rows, targets, dtype=jnp.int32)),
        "target_weights": shape(rows, targets),
        "features": {},
        "present": {},
    }
    return model, mesh, state, base, batch


@functools.cache
def papers_memory():
    model, _, state, base, batch = paper(3)
    return dict(memory.estimates(model, state, base, batch))


WIDE, NARROW = (28 * 3 * 512 * width * 2 for width in (18944, 3584))  # bytes in all layers


def test_the_papers_weights_and_state_take_what_their_shapes_say():
    found = papers_memory()
    assert found["full"].base == 2 * 7_615_616_512
    # Adapters, two moments and the gradient in float32, and a few counters.
    assert 0 <= found["full"].state - 5 * 4 * 40_370_176 < 100


def test_full_rematerialisation_saves_the_input_of_every_layer():
    # Beside it the last norm's input and the loss's gradient, which are one layer's worth each.
    assert NARROW < papers_memory()["full"].saved < 1.2 * NARROW


def test_no_rematerialisation_saves_the_feed_forward_width_three_times():
    # gate, up and their product; of the narrow ones both norms' inputs and outputs, the input of
    # the output projection, rotated queries, and little more.
    saved = papers_memory()["none"].saved
    assert 3 * WIDE + 4 * NARROW < saved < 3 * WIDE + 7 * NARROW


def test_what_the_projections_return_is_saved_once_with_their_adapters():
    # gate, up, queries, the output projection and a layer's input; keys and values are narrow.
    assert (
        2 * WIDE + 3 * NARROW < papers_memory()["save_projections"].saved < 2 * WIDE + 4.5 * NARROW
    )


def test_many_long_rows_need_rematerialisation_on_an_80_gb_card():
    limit = 60 * 2**30  # the share of it that JAX takes
    assert memory.choose_remat(*paper(3), 1, limit).policy == "none"
    assert memory.choose_remat(*paper(48, 1024), 1, limit).policy == "full"


def test_a_norm_is_not_saved_where_the_compiler_computes_it_again_with_dropouts_masks():
    model, *_, batch = paper(3)
    lora = dataclasses.replace(model.decoder.lora, dropout=0.05)
    dropping = dataclasses.replace(model, decoder=model.decoder.clone(lora=lora))
    before, ampere, hopper = (
        next(memory.saved_activations(dropping, batch, compute_capability=capability))[1]
        for capability in (None, (8, 0), (9, 0))
    )
    assert before == ampere and ampere - hopper == NARROW


def test_work_is_what_a_layer_computes_again_and_its_gradients():
    model, *_ = paper(3)
    tokens = 3 * 512
    gradients = 3 * tokens * (18944 + 3584) * 2
    assert memory.work_bytes(model, 3, 512, 4, 0) == gradients
    assert memory.work_bytes(model, 3, 512, 4, 28 * 1000) == gradients + 1000
    # Heads, and feed-forward width, are shared by four.
    assert memory.work_bytes(model, 3, 512, 4, 0, tensor=4) == 3 * tokens * (4736 + 3584) * 2
    assert memory.work_bytes(model, 3, 512, 512, 0) == memory.logit_bytes(model, 3, 512)


@pytest.mark.parametrize(
    ("rows", "targets", "positions"),
    [(3, 100, 300), (3, 512, 1024), (1200, 4, 1200)],  # a chunk is 1,024 positions, or one a row
)
def test_a_chunk_of_logits_and_its_gradient_are_counted(rows, targets, positions):
    model, *_ = paper(3)
    assert memory.logit_bytes(model, rows, targets) == 2 * positions * 152_064 * 4


def test_of_what_fsdp_splits_two_layers_or_the_vocabulary_are_whole_at_a_time():
    def gathered(name, mesh):
        half = ComputeConfig(param_dtype=jnp.bfloat16)
        model = AffectGPT(Decoder(PUBLISHED[name], None, half), None)
        shapes = jax.eval_shape(lambda key: init_random_base(model, key), jax.random.key(0))
        return memory.gathered_bytes(sharding.with_shardings(sharding.make_mesh(mesh), shapes))

    # Llama's layers are large beside its vocabulary, Qwen's vocabulary beside its layers.
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11_008
    assert gathered("Llama-2-7b-chat-hf", "fsdp:8") == 2 * layer * 2
    assert gathered("Qwen2.5-7B-Instruct", "fsdp:8") == 152_064 * 3584 * 2
    assert gathered("Qwen2.5-7B-Instruct", "fsdp:4,tensor:2") == 152_064 * 3584 * 2 / 2
    assert gathered("Qwen2.5-7B-Instruct", "data:8") == 0


# --- The choice -----------------------------------------------------------------------------------


def tiny(mesh=None):
    mesh, model = mesh or one_device(), make_model()
    optimizer = make_optimizer(build.optimizer_config(affectgpt_qwen25_7b.get_config()), 10)
    state = sharding.abstract(mesh, lambda key: init_state(model, optimizer, key))
    base = sharding.abstract(mesh, lambda key: init_random_base(model, key))
    return model, mesh, state, base, sharding.abstract_batch(mesh, make_batch([16] * 8))


@pytest.mark.parametrize("policy", memory.POLICIES)
def test_the_first_policy_that_fits_is_chosen(policy):
    model, mesh, state, base, batch = tiny()
    need = dict(memory.estimates(model, state, base, batch))[policy].total
    choice = memory.choose_remat(model, mesh, state, base, batch, 1, int(need / memory.USABLE) + 1)
    assert choice.policy == policy
    assert "may not fit" not in str(choice)
    less = memory.choose_remat(model, mesh, state, base, batch, 1, int(need / memory.USABLE) - 1)
    assert less.policy != policy or not less.fits, "the rest of the memory is not for the program"


def test_where_nothing_fits_the_last_policy_is_tried_and_it_says_so():
    # Packed rows compute something again even where there is room.
    enough = memory.choose_remat(*tiny(), 1, 10**12, packed=True)
    assert (enough.policy, enough.fits) == ("save_attention", True)
    assert memory.choose_remat(*tiny(), 1, None, packed=True).policy == "none"
    choice = memory.choose_remat(*tiny(), 1, 1000)
    assert choice.policy == "full"
    assert str(choice).startswith("remat full: about 0.0 of 0.0 GiB (0.0 base, ")
    assert str(choice).endswith("; it may not fit")


def test_a_device_without_a_limit_keeps_everything():
    choice = memory.choose_remat(*tiny(), 1, memory.device_limit())
    assert choice.policy == "none" and choice.limit is None
    assert "knows no memory limit" in str(choice)


def test_devices_and_accumulation_share_the_rows_and_fsdp_the_parameters():
    one, split = (
        memory.choose_remat(*tiny(mesh), parts, None).memory
        for mesh, parts in ((None, 1), (sharding.make_mesh("data:2,fsdp:2,tensor:2"), 2))
    )
    # The tensor axis splits the wide ones of a row's activations and leaves the narrow ones whole.
    assert one.saved / 16 < split.saved < one.saved / 8
    assert split.base < one.base / 2
