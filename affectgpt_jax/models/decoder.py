"""The Qwen2 / Qwen2.5 decoder (arXiv 2407.10671, 2412.15115) with LoRA beside frozen weights.

Llama (arXiv 2307.09288, 2407.21783) and Qwen3 (arXiv 2505.09388) are the same decoder up to three
choices of `DecoderConfig`: which projections have a bias, whether queries and keys are normed, and
whether rotary frequencies are scaled.

One module, two variable collections: `params` holds the frozen base under its Hugging Face names,
`lora` the adapters. The base's layers are a tuple of trees, one array for every tensor of a
checkpoint, and run one after the other in the program: a loop over a stack would copy each layer's
weights out of it, and what each layer saves into another one, which in a LoRA update of a 7B model
is a fifth of all bytes that are moved. Adapters are small, and stay stacked along a leading axis.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from affectgpt_jax.models import attention
from affectgpt_jax.models.lora import PROJECTED, TARGETS, LoraConfig, Projection, project
from affectgpt_jax.models.quantize import PRECISIONS


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """How Llama 3.1 and later stretch rotary positions; the fields are Hugging Face's.

    Wavelengths (in tokens) beyond `original_max_position_embeddings / low_freq_factor` become
    `factor` times as long, those below `... / high_freq_factor` stay, and between the two the
    frequencies are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; defaults are Qwen2.5-7B-Instruct.

    Attributes:
        qkv_bias, o_bias: whether q, k and v, and whether the output projection have a bias.
        qk_norm: an RMSNorm over `head_dim` on queries and keys, before they are rotated (Qwen3).
        rope_scaling: None for plain rotary positions.

    The other attributes have the names and the meaning of Hugging Face's `config.json`.

    Raises:
        ValueError: query heads that cannot share the key heads evenly, or an odd head_dim.
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int = 128
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = True
    o_bias: bool = False
    qk_norm: bool = False
    rope_scaling: Llama3RopeScaling | None = None

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")


_LLAMA3 = dict(rope_theta=5e5, rms_norm_eps=1e-5, qkv_bias=False)
_LLAMA3_ROPE = Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
_QWEN3 = dict(qkv_bias=False, qk_norm=True)

# Shapes of the published families, so that a run can be planned before any file is there.
PUBLISHED = {
    "Qwen2.5-0.5B-Instruct": DecoderConfig(
        151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True
    ),
    "Qwen2.5-1.5B-Instruct": DecoderConfig(
        151936, 1536, 8960, 28, 12, 2, 128, tie_word_embeddings=True
    ),
    "Qwen2.5-3B-Instruct": DecoderConfig(
        151936, 2048, 11008, 36, 16, 2, 128, tie_word_embeddings=True
    ),
    "Qwen2.5-7B-Instruct": DecoderConfig(),
    "Qwen2.5-14B-Instruct": DecoderConfig(152064, 5120, 13824, 48, 40, 8, 128),
    "Qwen2.5-32B-Instruct": DecoderConfig(152064, 5120, 27648, 64, 40, 8, 128),
    "Qwen2.5-72B-Instruct": DecoderConfig(152064, 8192, 29568, 80, 64, 8, 128),
    "Qwen3-0.6B": DecoderConfig(
        151936, 1024, 3072, 28, 16, 8, 128, tie_word_embeddings=True, **_QWEN3
    ),
    "Qwen3-1.7B": DecoderConfig(
        151936, 2048, 6144, 28, 16, 8, 128, tie_word_embeddings=True, **_QWEN3
    ),
    "Qwen3-4B": DecoderConfig(
        151936, 2560, 9728, 36, 32, 8, 128, tie_word_embeddings=True, **_QWEN3
    ),
    "Qwen3-8B": DecoderConfig(151936, 4096, 12288, 36, 32, 8, 128, **_QWEN3),
    "Qwen3-14B": DecoderConfig(151936, 5120, 17408, 40, 40, 8, 128, **_QWEN3),
    "Qwen3-32B": DecoderConfig(151936, 5120, 25600, 64, 64, 8, 128, **_QWEN3),
    "Llama-2-7b-chat-hf": DecoderConfig(
        32000, 4096, 11008, 32, 32, 32, 128, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False
    ),
    "Llama-3.1-8B-Instruct": DecoderConfig(
        128256, 4096, 14336, 32, 32, 8, 128, rope_scaling=_LLAMA3_ROPE, **_LLAMA3
    ),
}


class KVCache(NamedTuple):
    """Keys (rotated) and values of one layer, `[B, K, S, d]` each.

    Heads come before slots, so that attention is one batched product over contiguous memory.
    """

    key: jax.Array
    value: jax.Array


class DecodeStep(NamedTuple):
    """Cache slots of a decode step: `slot` `[B]` int32 is where each row writes its new key and
    value, `key_mask` `[B, S]` bool marks those that it reads, `slot` included."""

    slot: jax.Array
    key_mask: jax.Array


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019), computed in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up` (Shazeer 2020)."""
    return nn.silu(gate) * up


def recomputed(function: Callable, *static: int) -> Callable:
    """An elementwise function that the backward pass recomputes from its inputs.

    Autodiff would save every intermediate: a layer would save the feed-forward width six times
    instead of three. The recomputation fuses into the operations that read its result.
    """
    return jax.checkpoint(function, prevent_cse=False, static_argnums=static)


def rotary_frequencies(
    width: int, theta: float, scaling: Llama3RopeScaling | None = None
) -> np.ndarray:
    """Radians per token of every pair of dimensions, `[width/2]` float32 (Su et al. 2021).

    Constants of a model, so they are computed in float64 and rounded once.
    """
    frequencies = theta ** (-np.arange(0, width, 2) / width)
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rotary_tables(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, d/2]` float32 for positions `[B, T]`."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `[B, T, H, d]` by position; dimension i pairs with i + d/2, as Hugging Face does."""
    cos, sin = (table[:, :, None, :] for table in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class RMSNorm(nn.Module):
    eps: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return recomputed(rms_norm, 2)(x, scale, self.eps)


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """The `ComputeConfig.shard` of a device that holds everything."""

    data_parallel_size: int = 1
    several_devices: bool = False

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        return x


def float32_logits(states: jax.Array, lm_head: jax.Array) -> jax.Array:
    """The default of `ComputeConfig.logits`."""
    rows = len(states)
    # For one row, XLA would convert the whole lm_head to float32 on a GPU.
    states = jnp.pad(states, ((0, max(0, 2 - rows)), (0, 0)))
    logits = jnp.einsum("bd,dv->bv", states, lm_head, preferred_element_type=jnp.float32)
    return logits[:rows]


# 1,024 x 152,064 float32 logits take 0.6 GiB. Every chunk reads the whole lm_head twice: with
# half as many positions, twice the bytes.
LOSS_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a decoder runs, as opposed to which function it computes.

    Attributes:
        dtype: of activations and matmuls; norms and softmax stay float32.
        param_dtype: of the frozen weights.
        base_precision: of the projections' frozen kernels, one of `quantize.PRECISIONS`; "" leaves
            them in `param_dtype`.
        remat: "none" keeps what the backward pass reads; "save_projections" keeps the outputs of
            the projections and the adapters' narrow products, and recomputes attention and the
            rest; "save_attention" keeps those and what attention returns; "full" keeps only each
            layer's input.
        loss_chunk: supervised positions of a device whose logits are alive at once.
        attend: the causal attention backend, over whole rows.
        attend_cached: the attention backend of a decode step.
        logits: `(states [B, D], lm_head [D, V]) -> [B, V]` float32, of a decode step.
        shard: `(x, logical axes) -> x`, called on activations; its `data_parallel_size` is
            the number of devices that share the rows of a batch, its `several_devices` whether
            there are any others, with which collectives exchange.

    Raises:
        ValueError: an unknown remat policy or base precision.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    base_precision: str = ""
    remat: str = "none"
    loss_chunk: int = LOSS_CHUNK
    attend: attention.CausalAttention = attention.causal
    attend_cached: attention.CachedAttention = attention.cached
    logits: Callable[[jax.Array, jax.Array], jax.Array] = float32_logits
    shard: Any = OneDevice()

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; expected one of {sorted(REMAT_POLICIES)}")
        if self.base_precision not in PRECISIONS:
            raise ValueError(
                f"base_precision is {self.base_precision!r}; expected one of {PRECISIONS}"
            )

    @property
    def loss_chunk_of_all(self) -> int:
        """Supervised positions of all devices together whose logits are alive at once."""
        return self.loss_chunk * self.shard.data_parallel_size


def _is_attention_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether this is the forward pass of cuDNN's attention, whose result has no name."""
    return "dot_product_attention_fwd" in primitive.name


_names = jax.checkpoint_policies.save_only_these_names
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "save_attention": jax.checkpoint_policies.save_from_both_policies(
        _names(PROJECTED, attention.ATTENDED), _is_attention_kernel
    ),
    "save_projections": _names(PROJECTED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class DecoderLayer(nn.Module):
    """One pre-norm block."""

    config: DecoderConfig
    lora: LoraConfig | None
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        hidden_states: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None = None,
        seeds: Mapping[str, jax.Array] | None = None,
        cache: KVCache | None = None,
        step: DecodeStep | None = None,
        *,
        keep_cache: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """Run the block.

        Args:
            hidden_states: `[B, T, D]`.
            rotary: of `rotary_tables`.
            segment_ids: `[B, T]` int32; needed unless `step` is given.
            seeds: of the dropout of every projection, `[2]` uint32 by name; None drops nothing.
            cache: this layer's keys and values so far, with `step`.
            step: set for decoding.
            keep_cache: without `step`: return the keys and values of the rows.

        Returns:
            Hidden states `[B, T, D]`, and the cache, updated or new, or None.
        """
        c, run = self.config, self.compute
        batch, length, width = hidden_states.shape

        def projected(x: jax.Array, sizes: Mapping[str, int], use_bias: bool = False):
            """The projections of one input to so many features each."""
            weights = []
            for name, features in sizes.items():
                lora = self.lora if self.lora and name in self.lora.targets else None
                precision = run.param_dtype, run.base_precision
                layer = Projection(features, use_bias, lora, *precision, name=name)
                weights.append(layer(x.shape[-1]))
            scale, rate = (self.lora.scale, self.lora.dropout) if self.lora else (1.0, 0.0)
            with jax.named_scope("_".join(sizes)):
                return project(x, weights, scale, rate, seeds and [seeds[name] for name in sizes])

        def heads(x: jax.Array, count: int) -> jax.Array:
            axes = ("batch", None, "heads", None)
            return run.shard(x.reshape(batch, length, count, c.head_dim), axes)

        x = RMSNorm(c.rms_norm_eps, run.param_dtype, name="input_layernorm")(hidden_states)
        counts = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
        sizes = zip(("q_proj", "k_proj", "v_proj"), counts, strict=True)
        qkv = projected(x, {name: count * c.head_dim for name, count in sizes}, c.qkv_bias)
        query, key, value = (heads(y, count) for y, count in zip(qkv, counts, strict=True))
        if c.qk_norm:
            query = RMSNorm(c.rms_norm_eps, run.param_dtype, name="q_norm")(query)
            key = RMSNorm(c.rms_norm_eps, run.param_dtype, name="k_norm")(key)
        query, key = rotate(query, rotary), rotate(key, rotary)
        with jax.named_scope("attention"):
            if step is None:
                attended = run.attend(query, key, value, segment_ids)
                kept = KVCache(key.swapaxes(1, 2), value.swapaxes(1, 2)) if keep_cache else None
            else:
                at = (jnp.arange(batch), slice(None), step.slot)
                kept = KVCache(
                    cache.key.at[at].set(key[:, 0], mode="drop", unique_indices=True),
                    cache.value.at[at].set(value[:, 0], mode="drop", unique_indices=True),
                )
                attended = run.attend_cached(query, *kept, step.key_mask)
        attended = attended.reshape(batch, length, c.num_attention_heads * c.head_dim)
        hidden_states += projected(attended, {"o_proj": width}, c.o_bias)[0]

        x = RMSNorm(c.rms_norm_eps, run.param_dtype, name="post_attention_layernorm")(hidden_states)
        gate, up = projected(x, dict.fromkeys(("gate_proj", "up_proj"), c.intermediate_size))
        gated = run.shard(recomputed(swiglu)(gate, up), ("batch", None, "mlp"))
        hidden_states += projected(gated, {"down_proj": width})[0]
        return run.shard(hidden_states, ("batch", None, None)), kept


class Decoder(nn.Module):
    """The decoder from embeddings to final-norm hidden states.

    Variables: `params` {"embed_tokens", "lm_head" unless tied, "norm", "layers": a tuple of the
    `params` of `DecoderLayer`}, and `lora` {"layers": adapters with a leading axis of layers}. They
    are made by `init_base` and `init_lora`.

    The caller applies the `lm_head`, since it needs logits at few positions.
    """

    config: DecoderConfig
    lora: LoraConfig | None = None
    compute: ComputeConfig = ComputeConfig()

    def setup(self):
        c, run = self.config, self.compute
        self.embed_tokens = self.param(
            "embed_tokens",
            nn.initializers.normal(0.02),
            (c.vocab_size, c.hidden_size),
            run.param_dtype,
        )
        if not c.tie_word_embeddings:
            self.lm_head = self.param(
                "lm_head",
                nn.initializers.normal(0.02),
                (c.hidden_size, c.vocab_size),
                run.param_dtype,
            )
        self.norm = RMSNorm(c.rms_norm_eps, run.param_dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids `[B, T]` -> embeddings `[B, T, D]`.

        Placeholder ids that were added to the tokenizer may lie beyond the table; they are clipped
        here and their embeddings replaced by soft tokens.
        """
        table = self.embed_tokens.astype(self.compute.dtype)
        embeds = jnp.take(table, tokens, axis=0, mode="clip")
        return self.compute.shard(embeds, ("batch", None, None))

    def final_norm(self, hidden_states: jax.Array) -> jax.Array:
        """The norm behind the last layer."""
        return self.norm(hidden_states)

    def __call__(
        self,
        inputs_embeds: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        cache: Sequence[KVCache] | None = None,
        step: DecodeStep | None = None,
        keep_cache: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[KVCache, ...] | None]:
        """Run all layers.

        Args:
            inputs_embeds: `[B, T, D]`.
            positions: `[B, T]` int32 rotary positions, counted from 0 in every segment.
            segment_ids: `[B, T]` int32, 0 for padding; needed unless `step` is given.
            cache: keys and values so far, of every layer, with `step`.
            step: set for decoding: `T` is 1 and a row's new token goes to its `step.slot`.
            keep_cache: without `step`: return the keys and values of the rows, S = T slots.
            dropout_key: of LoRA's dropout; None drops nothing.

        Returns:
            Hidden states `[B, T, D]` after the final norm, and the caches, updated or new, or None.
        """
        c, run = self.config, self.compute
        frequencies = rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        rotary = rotary_tables(positions, frequencies)
        depth = c.num_hidden_layers
        seeds = [None] * depth
        if dropout_key is not None and self.lora is not None and self.lora.dropout:
            seeds = _unstacked(_dropout_seeds(dropout_key, depth))
        adapters = [{}] * depth
        if self.has_variable("lora", "layers"):
            adapters = _unstacked(self.get_variable("lora", "layers"))
        run_layer = functools.partial(
            DecoderLayer(c, self.lora, run, parent=None).apply, keep_cache=keep_cache
        )
        if run.remat != "none":
            run_layer = jax.checkpoint(run_layer, policy=REMAT_POLICIES[run.remat])
        # Traced and differentiated once for all layers, and written out for each.
        run_layer = jax.jit(run_layer, inline=True)
        hidden_states = inputs_embeds.astype(run.dtype)
        caches = []
        for i, params in enumerate(self.get_variable("params", "layers")):
            with jax.named_scope(f"layers_{i}"):
                if run.shard.several_devices:
                    hidden_states, adapters[i] = _gradients_together((hidden_states, adapters[i]))
                hidden_states, kept = run_layer(
                    {"params": params, "lora": adapters[i]},
                    hidden_states,
                    rotary,
                    segment_ids,
                    seeds[i],
                    None if cache is None else cache[i],
                    step,
                )
            caches.append(kept)
        return self.norm(hidden_states), None if caches[0] is None else tuple(caches)


def _unstacked(tree: Any) -> list[Any]:
    """The trees of every layer of a tree of arrays `[L, ...]`."""
    parts = jax.tree.map(_parts, tree)
    structure = jax.tree.structure(tree)
    return [structure.unflatten(leaves) for leaves in zip(*structure.flatten_up_to(parts))]


@jax.custom_vjp
def _parts(x: jax.Array) -> tuple[jax.Array, ...]:
    """`x[0], x[1], ...`. Autodiff would add up a whole array of zeros for each gradient."""
    return tuple(x)


_parts.defvjp(lambda x: (tuple(x), None), lambda _, grads: (jnp.stack(grads),))


@jax.custom_vjp
def _gradients_together(x: Any) -> Any:
    """The arguments, whose gradients are there before anything reads one of them.

    Nothing but the optimizer reads the gradients of adapters. A scheduler that hides collectives
    would leave them for later, and keep what they are made of, of several layers at a time.
    """
    return x


_gradients_together.defvjp(
    lambda x: (x, None), lambda _, grads: (jax.lax.optimization_barrier(grads),)
)


def _dropout_seeds(key: jax.Array, count: int) -> dict[str, jax.Array]:
    """The seeds `[L, 2]` uint32 of the dropout of every projection, in one draw."""
    seeds = jax.random.bits(key, (len(TARGETS), count, 2), jnp.uint32)
    return dict(zip(TARGETS, seeds, strict=True))


def lm_head(params: Mapping[str, Any]) -> jax.Array:
    """The kernel `[D, V]` that projects hidden states to logits, tied to the embeddings or not."""
    return params["lm_head"] if "lm_head" in params else params["embed_tokens"].T


def init_base(module: Decoder, key: jax.Array) -> dict[str, Any]:
    """Random base weights, the `params` tree; with `jax.eval_shape` just its shapes."""
    params_key, _ = jax.random.split(key)
    hidden_states = jnp.zeros((1, 1, module.config.hidden_size), module.compute.dtype)
    outer = module.init(params_key, hidden_states, method="final_norm")["params"]
    return {**outer, "layers": tuple(_unstacked(_init_layers(module, key)["params"]))}


def init_lora(module: Decoder, key: jax.Array) -> dict[str, Any]:
    """Fresh adapters, the `lora` tree (empty where the module has none)."""
    layers = _init_layers(module, key).get("lora")
    return {"layers": layers} if layers else {}


def _init_layers(module: Decoder, key: jax.Array) -> dict[str, Any]:
    """The variables of all layers, stacked: one program draws them, however many there are."""
    c, run = module.config, module.compute
    hidden_states = jnp.zeros((1, 1, c.hidden_size), run.dtype)
    ids = jnp.zeros((1, 1), jnp.int32)
    rotary = rotary_tables(ids, rotary_frequencies(c.head_dim, c.rope_theta))
    layer = DecoderLayer(c, module.lora, run)

    def init(params_key: jax.Array, lora_key: jax.Array) -> Any:
        return layer.init({"params": params_key, "lora": lora_key}, hidden_states, rotary, ids)

    keys = (jax.random.split(k, c.num_hidden_layers) for k in jax.random.split(key))
    return jax.jit(jax.vmap(init))(*keys)
