"""How much device memory an update takes, and the rematerialisation policy that follows.

The estimate follows from shapes alone, before anything is compiled. It sums the arguments of the
step, the gradient, the residuals that the forward pass saves for the backward pass, and the work of
one layer. Residuals are counted in the jaxpr that JAX differentiates, so they are right for every
policy and attention backend. A program compiled for a CPU would mislead: in place of a GPU's flash
attention it holds scores that the GPU never holds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh

from affectgpt_jax.common.trees import device_nbytes, nbytes, path_name
from affectgpt_jax.models.affectgpt import (
    AffectGPT,
    Batch,
    init_random_base,
    init_trainable,
    with_compute,
)
from affectgpt_jax.models.attention import (
    ATTENDED,
    CausalAttention,
    causal,
    causal_block,
    grouped,
)
from affectgpt_jax.models.decoder import DecoderConfig, OneDevice
from affectgpt_jax.training.losses import LossFunction, cross_entropy
from affectgpt_jax.training.sharding import data_parallel_size
from affectgpt_jax.training.step import State

# From the fastest to the one that saves the least.
POLICIES = ("none", "save_attention", "save_projections", "full")


def tried_by_auto(packed: bool) -> tuple[str, ...]:
    """The policies of which a remat of "auto" takes the first that fits.

    Rows of several samples leave "none" out. Reading what it keeps takes as long as computing that
    again: 6 rows of 2,048 tokens, compiled by jax 0.12, take 683 ms at least and 62.8 GiB on an
    H100, with "save_attention" 681 ms and 51.4 GiB, and 630 ms with both on an H200.
    """
    return POLICIES[1:] if packed else POLICIES


# Share of the device's memory that a program may use; fragmentation and workspaces take the rest.
USABLE = 0.9
# What changes no byte of an array whose size it keeps.
_VIEWS = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "name")


class Memory(NamedTuple):
    """Bytes on one device during an update.

    Attributes:
        base: frozen weights.
        state: trainable parameters, their optimizer state and gradient, and a copy of the adapters,
            which are cut into layers.
        saved: activations that the forward pass saves for the backward pass.
        work: the largest short-lived buffers: see `work_bytes`.
        gathered: frozen weights that fsdp gathers for a while: those of a layer and of the next
            one, which is prefetched, or the lm_head.
    """

    base: int
    state: int
    saved: int
    work: int
    gathered: int

    @property
    def total(self) -> int:
        return sum(self)


class Choice(NamedTuple):
    """A policy, its memory, and the device's limit in bytes (None where the device has none)."""

    policy: str
    memory: Memory
    limit: int | None

    @property
    def fits(self) -> bool:
        return self.limit is None or self.memory.total <= USABLE * self.limit

    def __str__(self) -> str:
        total = f"about {_gib(self.memory.total)}"
        if self.limit is None:
            return f"remat {self.policy}: {total} GiB; this device knows no memory limit"
        parts = ", ".join(f"{_gib(n)} {name}" for name, n in self.memory._asdict().items())
        doubt = "" if self.fits else "; it may not fit"
        return f"remat {self.policy}: {total} of {_gib(self.limit)} GiB ({parts}){doubt}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def choose_remat(
    model: AffectGPT,
    mesh: Mesh | AbstractMesh,
    abstract_state: State,
    abstract_base: Any,
    batch: Batch,
    gradient_accumulation_steps: int,
    limit: int | None,
    loss: LossFunction = cross_entropy,
    compute_capability: tuple[int, int] | None = None,
    packed: bool = False,
) -> Choice:
    """The first of `tried_by_auto` with which an update fits; the last one if none does.

    Args:
        model: any policy; the others are tried on copies of it.
        mesh: the devices. The batch axes split rows, the tensor axis heads, feed-forward width and
            logits.
        abstract_state, abstract_base: shapes with shardings.
        batch: abstract global batch of the largest shape.
        gradient_accumulation_steps: microbatches of a batch.
        limit: bytes of one device's memory; None takes the first policy of all.
        loss: of the train step.
        compute_capability: of the device, see `norms_computed_again`.
        packed: whether rows hold several samples.
    """
    tried = POLICIES if limit is None else tried_by_auto(packed)
    batch = rows_of_a_device(batch, mesh, gradient_accumulation_steps)
    device = mesh.shape["tensor"], compute_capability
    found = estimates(model, abstract_state, abstract_base, batch, loss, *device)
    for policy, memory in found:
        choice = Choice(policy, memory, limit)
        if policy in tried and choice.fits:
            break
    return choice


def rows_of_a_device(
    batch: Batch, mesh: Mesh | AbstractMesh, gradient_accumulation_steps: int
) -> Batch:
    """The rows of an abstract global batch that a device runs at a time."""
    part = data_parallel_size(mesh) * gradient_accumulation_steps

    def rows(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((max(1, x.shape[0] // part), *x.shape[1:]), x.dtype)

    return jax.tree.map(rows, batch)


def estimates(
    model: AffectGPT,
    abstract_state: State,
    abstract_base: Any,
    batch: Batch,
    loss: LossFunction = cross_entropy,
    tensor: int = 1,
    compute_capability: tuple[int, int] | None = None,
) -> Iterator[tuple[str, Memory]]:
    """What an update takes on one device, whose rows are those of the abstract batch.

    Args:
        model: any policy.
        abstract_state, abstract_base: shapes with shardings.
        batch: of the rows of a device.
        loss: of the train step.
        tensor: devices that share them.
        compute_capability: of the device, see `norms_computed_again`.

    Yields:
        Every policy with its memory, in the order of `POLICIES`; each costs about a second.
    """
    rows, targets = batch["targets"].shape
    shape = rows, batch["tokens"].shape[1], targets
    plain, everything = model.decoder.compute.attend in (causal, grouped), None
    for policy, saved in saved_activations(model, batch, loss, tensor, compute_capability):
        everything = everything or saved  # the first policy's
        work = work_bytes(model, *shape, everything - saved, tensor, plain)
        yield policy, of_update(abstract_state, abstract_base, saved, work)


def share_of_model(model: AffectGPT, tensor: int) -> AffectGPT:
    """The model whose activations are what each of so many devices holds of this one's.

    As `sharding` splits them: heads and feed-forward width, where they divide.
    """
    if tensor == 1:
        return model
    config = model.decoder.config

    def share(count: int) -> int:
        return count // tensor if count % tensor == 0 else count

    heads, kv_heads = share(config.num_attention_heads), share(config.num_key_value_heads)
    config = dataclasses.replace(
        config,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads if heads % kv_heads == 0 else heads,
        intermediate_size=share(config.intermediate_size),
    )
    return dataclasses.replace(model, decoder=model.decoder.clone(config=config))


def of_update(abstract_state: State, abstract_base: Any, saved: int, work: int) -> Memory:
    """The memory of an update with so many bytes of residuals and of short-lived buffers."""
    return Memory(
        base=device_nbytes(abstract_base),
        state=device_nbytes(abstract_state)
        + device_nbytes(abstract_state["trainable"])
        + device_nbytes(abstract_state["trainable"]["lora"]),
        saved=saved,
        work=work,
        gathered=gathered_bytes(abstract_base),
    )


def saved_activations(
    model: AffectGPT,
    batch: Batch,
    loss: LossFunction = cross_entropy,
    tensor: int = 1,
    compute_capability: tuple[int, int] | None = None,
) -> Iterator[tuple[str, int]]:
    """Bytes that a forward pass over an abstract batch saves on each of `tensor` devices, under
    every one of `POLICIES`; see `norms_computed_again` for the compute capability."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    # Sharding constraints do not change how many arrays are saved.
    model = with_compute(share_of_model(model, tensor), shard=OneDevice())
    trainable = jax.eval_shape(functools.partial(init_trainable, model), key)
    base = jax.eval_shape(functools.partial(init_random_base, model), key)
    for policy in POLICIES:
        saving = with_compute(model, remat=policy)

        def objective(trainable: Any, *others: Any, saving: AffectGPT = saving) -> Any:
            base, batch, key = others
            total, count, metrics = loss(saving, base, trainable, batch, key)
            return total, (count, metrics)

        # Each layer's part of the stacked adapters is kept too, however many rows there are; it
        # counts as state.
        saved = saved_bytes(objective, trainable, base, batch, key) - nbytes(trainable["lora"])
        if policy == "none" and model.decoder.lora and model.decoder.lora.dropout:
            config, dtype = model.decoder.config, jnp.dtype(model.decoder.compute.dtype)
            hidden = math.prod(batch["tokens"].shape) * config.hidden_size * dtype.itemsize
            saved -= config.num_hidden_layers * norms_computed_again(compute_capability) * hidden
        yield policy, saved


def norms_computed_again(compute_capability: tuple[int, int] | None) -> int:
    """Of a layer's two norms, those that XLA's CUDA compiler computes again with dropout's masks.

    It draws masks in one kernel with the norm's gradient where its model of the device finds that
    cheaper than reading the norm's result: from Hopper on for both norms, before for one.

    Args:
        compute_capability: of the device; None for the lower number.
    """
    return 2 if compute_capability is not None and compute_capability >= (9, 0) else 1


def work_bytes(
    model: AffectGPT,
    rows: int,
    length: int,
    targets: int,
    recomputed: int,
    tensor: int = 1,
    plain_attention: bool = False,
) -> int:
    """The largest short-lived buffers: of one layer's backward pass, or of a chunk of logits.

    A layer's are what it computes again, and gradients: of the three activations of feed-forward
    width, of its input, and of two that are added to that.

    Args:
        model: any policy.
        rows, length, targets: rows of a device, and tokens and supervised ones of each.
        recomputed: bytes that the policy leaves to all layers to compute again.
        tensor: devices that share the rows.
        plain_attention: whether attention is plain XLA's.
    """
    config = share_of_model(model, tensor).decoder.config
    itemsize = jnp.dtype(model.decoder.compute.dtype).itemsize
    widths = 3 * (config.intermediate_size + config.hidden_size)
    layer = max(0, recomputed) // config.num_hidden_layers + rows * length * widths * itemsize
    scores = score_bytes(config, rows, length) if plain_attention else 0
    return max(layer + scores, logit_bytes(model, rows, targets, tensor))


def logit_bytes(model: AffectGPT, rows: int, targets: int, tensor: int = 1) -> int:
    """A chunk of float32 logits and its gradient, of which `tensor` devices hold a share each."""
    chunk = max(rows, model.decoder.compute.loss_chunk)
    vocabulary = model.decoder.config.vocab_size
    share = vocabulary // tensor if vocabulary % tensor == 0 else vocabulary
    return 2 * min(rows * targets, chunk) * share * 4


def score_bytes(config: DecoderConfig, rows: int, length: int) -> int:
    """Float32 scores, weights and a gradient of one block of queries, as plain XLA holds them."""
    return 3 * rows * config.num_attention_heads * causal_block(length) * length * 4


def gathered_bytes(abstract_base: Any) -> int:
    """Bytes of the frozen weights that fsdp splits, gathered."""
    layers = rest = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_base):
        shares = [axis if isinstance(axis, tuple) else (axis,) for axis in leaf.sharding.spec]
        split = [math.prod(leaf.sharding.mesh.shape[a] for a in s if a) for s in shares]
        if not any("fsdp" in s and n > 1 for s, n in zip(shares, split)):
            continue
        others = math.prod(n for s, n in zip(shares, split) if "fsdp" not in s)
        whole = nbytes(leaf) // others
        if path_name(path).startswith("layers/0/"):
            layers += 2 * whole
        elif path_name(path).startswith("layers/"):
            pass  # like the first
        elif "lm_head" in abstract_base and path_name(path) == "embed_tokens":
            pass  # its rows are looked up where they are
        else:
            rest = max(rest, whole)
    return max(layers, rest)


def kernel_stand_in(name: str, samples: int) -> CausalAttention:
    """Attention with the residuals of a GPU kernel, for tracing on machines without a GPU.

    It adds queries, keys and values instead of attending, so it must not be run.

    Args:
        name: a backend of `models.attention`; "xla" is itself.
        samples: room for samples in a row. cuDNN's packed layout keeps statistics for each of them
            and for padding. The mask of "cudnn_masked" follows from the segments and is not
            counted: all layers share one, of 2 bytes for each pair of tokens in a row.
    """
    if name == "xla":
        return causal
    statistics = samples + 1 if name == "cudnn_packed" else 1

    def forward(query, key, value, segment_ids):
        batch, length, heads, _ = query.shape
        out = query + jnp.repeat(key + value, heads // key.shape[2], axis=2)
        out = checkpoint_name(out, ATTENDED)
        softmax = checkpoint_name(
            jnp.zeros((batch * statistics, heads, length), jnp.float32), ATTENDED
        )
        return out, (query, key, value, segment_ids, out, softmax)

    def backward(residuals, grad):
        key = residuals[1]
        grouped = grad.reshape(*key.shape[:3], -1, key.shape[3]).sum(axis=3)
        return grad, grouped, grouped, None

    attend = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    attend.defvjp(forward, backward)
    return attend


def saved_bytes(function: Callable, differentiated: Any, *others: Any) -> int:
    """Bytes that differentiating `function(differentiated, *others) -> (scalar, aux)` saves.

    Arguments that the backward pass reads again are not copied, and not counted. An array that it
    reads in two shapes is counted once.

    Args:
        function: traced, not run.
        differentiated: abstract arrays.
        others: abstract arrays.
    """

    def residuals(differentiated: Any, *others: Any) -> Any:
        # What `jax.vjp` returns is a tree, whose leaves are the residuals.
        return jax.vjp(lambda x: function(x, *others), differentiated, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(residuals)(differentiated, *others).jaxpr
    arguments = {((), id(variable)) for variable in (*jaxpr.invars, *jaxpr.constvars)}
    outer = _Call((), _equations_by_result(jaxpr), {})
    found = (_original(outer, variable) for variable in jaxpr.outvars)
    kept = {place: variable.aval for place, variable in found if place not in arguments}
    return nbytes(list(kept.values()))


class _Call(NamedTuple):
    """A jaxpr where it is called: the layers of a model may call the same one.

    Attributes:
        place: the calls that lead there.
        made_by: `_equations_by_result` of it.
        passed: for every one of its arguments the call it comes from, and what it is there.
    """

    place: tuple[int, ...]
    made_by: Mapping[int, Any]
    passed: Mapping[int, tuple[_Call, Any]]


def _equations_by_result(jaxpr: Any) -> dict[int, Any]:
    return {id(variable): equation for equation in jaxpr.eqns for variable in equation.outvars}


def _original(call: _Call, variable: Any) -> tuple[tuple[tuple[int, ...], int], Any]:
    """The array that a variable is another view of, by where it is made, and its variable."""
    equation = call.made_by.get(id(variable))
    if equation is None:
        if id(variable) in call.passed:
            return _original(*call.passed[id(variable)])
    elif equation.primitive.name in _VIEWS:
        (source,) = equation.invars
        if source.aval.size == variable.aval.size:
            return _original(call, source)
    elif equation.primitive.name == "jit":
        inner = equation.params["jaxpr"].jaxpr
        inputs = {id(v): (call, given) for v, given in zip(inner.invars, equation.invars)}
        deeper = _Call((*call.place, id(equation)), _equations_by_result(inner), inputs)
        return _original(deeper, inner.outvars[equation.outvars.index(variable)])
    return (call.place, id(variable)), variable


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of one device that a compiled program needs by XLA's buffer assignment.

    Arguments, results that are not written over them, and the one block of temporaries.
    """
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def device_limit() -> int | None:
    """Bytes that this process may use on one device; None on a CPU, which shares the host's."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None
