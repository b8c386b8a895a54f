"""An AffectGPT of a few thousand parameters with random weights, and random batches for it."""

import jax
import jax.numpy as jnp
import numpy as np

from affectgpt_jax.models.affectgpt import AffectGPT, init_random_base, init_trainable
from affectgpt_jax.models.decoder import ComputeConfig, Decoder, DecoderConfig
from affectgpt_jax.models.fusers import Fusion, FusionConfig
from affectgpt_jax.models.lora import LoraConfig

# No value is one that some library would fall back to.
LLM = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=500.0,
    rms_norm_eps=1e-3,
)
FUSION = FusionConfig(("multi", "audio", "face"), widths={"video": 6, "audio": 10}, width=8)
FRAMES = 3


def make_model(
    llm: DecoderConfig = LLM,
    dropout: float = 0.0,
    fusion: FusionConfig | None = FUSION,
    lora: bool = True,
    **execution,
) -> AffectGPT:
    adapters = LoraConfig(rank=4, alpha=2.0, dropout=dropout) if lora else None
    decoder = Decoder(llm, adapters, ComputeConfig(**execution))
    module = fusion and Fusion(fusion, llm.hidden_size, decoder.compute.dtype)
    return AffectGPT(decoder, module)


def random_tree(abstract, seed: int = 0):
    """Normal values at a scale at which every parameter matters.

    A model's own start has zero biases, unit norms and zero `lora_b`, behind which errors hide.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape)
        name = path[-1].key
        if name == "scale":
            value = 1 + 0.2 * value
        elif name == "bias":
            value = 0.3 * value
        elif name != "embed_tokens":
            value *= leaf.shape[-2] ** -0.5
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def random_base(model: AffectGPT, seed: int = 0):
    return random_tree(
        jax.eval_shape(lambda k: init_random_base(model, k), jax.random.key(0)), seed
    )


def random_trainable(model: AffectGPT, seed: int = 1):
    return random_tree(jax.eval_shape(lambda k: init_trainable(model, k), jax.random.key(0)), seed)


def make_batch(lengths, width: int = 16, targets: int = 6, llm: DecoderConfig = LLM, seed: int = 2):
    """A batch of right-padded rows of these lengths, one clip each; 0 is a filler row.

    The soft tokens stand at positions 1 to 3 in a random order, and the last tokens of a row, as
    many as fit but at most `targets`, are supervised: rows differ in their share of the loss.
    """
    rng = np.random.default_rng(seed)
    rows, lengths = len(lengths), np.asarray(lengths)
    at = np.arange(width)
    batch = {
        "tokens": rng.integers(llm.vocab_size, size=(rows, width), dtype=np.int32),
        "positions": np.broadcast_to(at, (rows, width)).astype(np.int32),
        "segment_ids": (at < lengths[:, None]).astype(np.int32),
        "soft_token_index": np.zeros((rows, width), np.int32),
        "target_positions": np.zeros((rows, targets), np.int32),
        "targets": np.zeros((rows, targets), np.int32),
        "target_weights": np.zeros((rows, targets), np.float32),
        "features": {
            "audio": rng.normal(size=(rows, 1, FRAMES, FUSION.widths["audio"])).astype(np.float16),
            "face": rng.normal(size=(rows, 1, FRAMES, FUSION.widths["video"])).astype(np.float16),
        },
        "present": {"audio": lengths[:, None] > 0, "face": lengths[:, None] > 0},
    }
    for row, length in enumerate(lengths):
        count = max(0, min(targets, length - 4))
        if count:
            batch["soft_token_index"][row, 1:4] = 1 + rng.permutation(3)
        batch["target_positions"][row, :count] = np.arange(length - 1 - count, length - 1)
        batch["targets"][row, :count] = batch["tokens"][row, length - count : length]
        batch["target_weights"][row, :count] = 1
    return batch


def pack_rows(batch, rows, width: int, targets: int, clips: int, soft_tokens: int = 3):
    """The same clips, several a row.

    Args:
        batch: rows of one clip each.
        rows: for every new row the clips in it, as rows of `batch`.
        width, targets, clips: the shape of the new rows.
        soft_tokens: of every clip.
    """
    packed = {
        name: np.zeros((len(rows), targets if "target" in name else width), batch[name].dtype)
        for name in batch
        if name not in ("features", "present")
    }
    for part in ("features", "present"):
        packed[part] = {
            name: np.zeros((len(rows), clips, *x.shape[2:]), x.dtype)
            for name, x in batch[part].items()
        }
    for row, members in enumerate(rows):
        first = target = 0
        for clip, i in enumerate(members):
            end = first + (batch["segment_ids"][i] > 0).sum()
            last = target + int(batch["target_weights"][i].sum())
            for name in ("tokens", "positions", "soft_token_index"):
                packed[name][row, first:end] = batch[name][i, : end - first]
            soft = packed["soft_token_index"][row, first:end]
            soft[soft > 0] += clip * soft_tokens
            packed["segment_ids"][row, first:end] = 1 + clip
            for name in ("target_positions", "targets", "target_weights"):
                packed[name][row, target:last] = batch[name][i, : last - target]
            packed["target_positions"][row, target:last] += first
            for part in ("features", "present"):
                for name, x in batch[part].items():
                    packed[part][name][row, clip] = x[i, 0]
            first, target = end, last
    return packed


def relative_error(found, expected) -> float:
    """Largest deviation, in units of the largest expected value."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.abs(found - expected).max() / np.abs(expected).max()
