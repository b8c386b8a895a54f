"""What a model computes on the way to its loss and its update: the same quantities from JAX and
from PyTorch, under PyTorch's names, on one set of weights and one stream of batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from ml_collections import ConfigDict

from affectgpt_jax import build
from affectgpt_jax.configs import affectgpt_qwen25_7b, demo
from affectgpt_jax.data.demo import DEFAULT_FEATURES, World
from affectgpt_jax.data.pipeline import MixtureComponent, PromptProcessor, TrainPipeline
from affectgpt_jax.data.records import RecordDataset, write_records
from affectgpt_jax.data.tokenizer import Tokenizer
from affectgpt_jax.models.affectgpt import (
    AffectGPT,
    Batch,
    embed_inputs,
    hidden_states,
    loss_sum_and_count,
)
from affectgpt_jax.models.attention import causal
from affectgpt_jax.models.decoder import DecoderConfig, lm_head
from affectgpt_jax.program import Program, make_program
from affectgpt_jax.training.optimizer import (
    OptimizerConfig,
    make_optimizer,
)
from affectgpt_jax.training.sharding import shardings_of
from affectgpt_jax.weights.huggingface import load_base
from benchmarks.sides import one_device
from benchmarks.torch_reference import training
from benchmarks.torch_reference.model import AffectGPT as Twin
from benchmarks.torch_reference.model import to_device
from benchmarks.torch_reference.weights import by_torch_name

CLIPS = 500  # no multiple of a batch, so that epochs end with filler rows
# Head type -> type of the pre-fusion, and of the image head, which know two types each.
HEADS = {
    "attention": ("attention", "mean"),
    "mean": ("none", "mean"),
    "qformer": ("qformer", "qformer"),
}
# {quantity: {tensor: float32 values}}
Quantities = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A config with the data that it trains on.

    Attributes:
        config: as `train` reads it.
        directory: of the base.
        llm: its shape.
        processor, dataset, pipeline: the demo world as the config reads it.
        device: "cpu" or "cuda", for both frameworks.
    """

    config: ConfigDict
    directory: Path
    llm: DecoderConfig
    processor: PromptProcessor
    dataset: RecordDataset
    pipeline: TrainPipeline
    device: str


def make_config(llm: str, steps: int, batch_size: int, seed: int, heads: str) -> ConfigDict:
    """The shipped config that fits a base, on the demo world, without dropout.

    Args:
        llm: "tiny" or a directory.
        steps: length of the training run.
        batch_size: clips in a batch.
        seed: of initialisation and data order.
        heads: one of `HEADS`.
    """
    config = (demo if llm == "tiny" else affectgpt_qwen25_7b).get_config()
    config.llm, config.seed, config.data.train = llm, seed, "demo"
    config.steps, config.batch_size, config.num_buckets = steps, batch_size, 1
    config.max_tokens = 1024  # a Q-Former writes dozens of tokens
    config.optimizer.warmup_steps = steps // 10
    if llm == "tiny":
        # At the demo's own rate a run is chaotic: two whose starts differ in the last bit have
        # losses that differ by tens of percent after a hundred updates.
        config.optimizer.learning_rate, config.optimizer.final_learning_rate = 1e-4, 5e-6
    config.lora.dropout = config.qformer.dropout = 0.0
    config.fusion, config.projectors.image = HEADS[heads]
    config.projectors.video = config.projectors.audio = heads
    return config


def make_case(config: ConfigDict, records: Path, device: str) -> Case:
    """Opens the base and the records, which it writes where they are not there yet.

    Raises:
        ConfigError, TokenizerError, WeightsError: a base that cannot be used.
    """
    directory = build.base_directory(config.llm)
    processor = build.prompt_processor(config, Tokenizer(directory))
    if not records.exists():
        world, encoders = World(config.demo_seed), dict.fromkeys(DEFAULT_FEATURES, "demo world")
        write_records(records, world.records("train", CLIPS), encoders=encoders, split="train")
    dataset = RecordDataset(records)
    pipeline = TrainPipeline(
        [MixtureComponent(dataset, processor, config.label)],
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        num_buckets=config.num_buckets,
        seed=config.seed,
    )
    llm = build.base_config(config.llm)
    return Case(config, directory, llm, processor, dataset, pipeline, device)


def program_of(case: Case, **changes: Any) -> Program:
    """The update of a case on one device, with keys of its config changed, dotted."""
    config = case.config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    batches = case.pipeline.filler_batches()
    return make_program(config, one_device(), batches, llm=case.llm, attend=causal)


def load(case: Case, program: Program, dtype: Any = None) -> Any:
    """The base of a case where a program wants it, in `dtype` or as the program holds it."""
    abstract = program.base
    if dtype is not None:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
    return load_base(case.directory, abstract, shardings_of(program.base))


def load_jax(case: Case, dtype: str, **changes: Any) -> tuple[Program, Any]:
    """The update, and the base rounded to bfloat16, then held in `dtype`."""
    torch.cuda.empty_cache()  # of the twin before
    program = program_of(case, dtype=dtype, **changes)
    base = load(case, program, jnp.bfloat16)
    return program, jax.tree.map(lambda x: x.astype(dtype), base)


def load_torch(case: Case, dtype: str) -> Twin:
    """The twin on the same base, with adapters and fusers of its own."""
    fusion = build.fusion_config(case.config)
    lora = build.model(case.config, case.llm).decoder.lora
    twin = Twin.from_pretrained(case.directory, fusion, lora, dtype=torch.bfloat16)
    return (twin.float() if dtype == "float32" else twin).to(case.device)


def relative_error(found: np.ndarray, expected: np.ndarray, scale: np.ndarray) -> float:
    """`||found - expected|| / ||scale||`; 0 without a difference, infinite for other shapes."""
    found, expected, scale = (np.asarray(x, np.float64) for x in (found, expected, scale))
    if found.shape != expected.shape:
        return math.inf
    difference, size = np.linalg.norm(found - expected), np.linalg.norm(scale)
    return float(difference / size) if size else math.inf if difference else 0.0


def make_probe_jax(model: AffectGPT) -> Callable[[Any, Any, Batch], Quantities]:
    """`(base, trainable, batch)` to hidden states of real tokens, logits of supervised ones, loss
    and gradients.

    Hidden states are the embeddings, then what the final norm makes of every layer's output.
    Dropout is off. The loss is the mean over the supervised tokens.
    """
    embed = jax.jit(lambda *inputs: embed_inputs(model, *inputs, dropout_key=None))

    @jax.jit
    def outputs(base, trainable, batch, depth):
        base, lora = _first_layers(base, trainable["lora"], depth)
        states = hidden_states(model, base, {**trainable, "lora": lora}, batch)[0]
        chosen = jnp.take_along_axis(states, batch["target_positions"][..., None], axis=1)
        head = lm_head(base).astype(chosen.dtype)
        logits = jnp.einsum("bsd,dv->bsv", chosen, head, preferred_element_type=jnp.float32)
        return states, logits

    @jax.jit
    def loss_and_gradient(trainable, base, batch):
        def loss(trainable):
            total, count = loss_sum_and_count(model, base, trainable, batch)
            return total / jnp.maximum(count, 1)

        return jax.value_and_grad(loss)(trainable)

    def probe(base: Any, trainable: Any, batch: Batch) -> Quantities:
        states = [embed(base, trainable, batch)]
        for depth in range(1, model.decoder.config.num_hidden_layers + 1):
            output, logits = outputs(base, trainable, batch, depth)
            states.append(output)
        loss, gradient = loss_and_gradient(trainable, base, batch)
        states = [np.asarray(x, np.float32) for x in states]
        return _quantities(batch, states, logits, loss, by_torch_name(gradient))

    return probe


def _first_layers(base: Any, lora: Any, depth: jax.Array) -> tuple[Any, Any]:
    """A base and adapters of which the layers from `depth` on add nothing.

    A layer whose two output projections are zero passes on what it is given. So one program gives
    the output of every layer.
    """
    last = ("o_proj", "down_proj")

    def cut_layer(number: int, layer: Any) -> Any:
        def cut(x: jax.Array) -> jax.Array:
            return jnp.where(number < depth, x, 0)

        return {
            name: jax.tree.map(cut, part) if name in last else part for name, part in layer.items()
        }

    def cut_adapters(x: jax.Array) -> jax.Array:
        keep = jnp.arange(len(x)) < depth
        return jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, 0)

    layers = tuple(cut_layer(i, layer) for i, layer in enumerate(base["layers"]))
    adapters = {
        part: {
            name: jax.tree.map(cut_adapters, factors) if name in last else factors
            for name, factors in targets.items()
        }
        for part, targets in lora.items()
    }
    return {**base, "layers": layers}, adapters


def probe_torch(twin: Twin, batch: Mapping[str, Any]) -> Quantities:
    """The same of the twin, which is left without gradients."""
    tensors = to_device(batch, twin.tuning, twin.causal_lm.device)
    decoder = twin.eval().causal_lm.model
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
        for layer in decoder.layers
    ]
    with torch.no_grad():
        embeds, final = twin.embed_inputs(tensors), twin.hidden_states(tensors)
        for hook in hooks:
            hook.remove()
        states = [embeds, *map(decoder.norm, outputs[:-1]), final]
        logits = twin.supervised_logits(tensors)
    loss, count = twin.loss_sum_and_count(tensors)
    loss = loss / count.clamp(min=1)
    loss.backward()
    gradient = {
        name: _numpy(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in twin.named_parameters()
        if p.requires_grad
    }
    twin.zero_grad()
    return _quantities(batch, [_numpy(x) for x in states], _numpy(logits), _numpy(loss), gradient)


def _quantities(
    batch: Batch,
    states: list[np.ndarray],
    logits: Any,
    loss: Any,
    gradient: dict[str, np.ndarray],
) -> Quantities:
    real = np.asarray(batch["segment_ids"]) > 0
    supervised = np.asarray(batch["target_weights"]) > 0
    logits = np.asarray(logits, np.float32)[supervised]
    targets = np.asarray(batch["targets"])[supervised]
    likelihoods = logits[np.arange(len(targets)), targets] - np.logaddexp.reduce(logits, axis=-1)
    names = ["embeddings", *(f"layer {i}" for i in range(len(states) - 1))]
    quantities = {
        "hidden states": {name: x[real] for name, x in zip(names, states, strict=True)},
        "logits": {"logits": logits, "log-likelihoods": likelihoods},
        "loss": {"loss": np.asarray(loss, np.float32)},
        "gradients of LoRA": {k: x for k, x in gradient.items() if ".lora_" in k},
        "gradients of fusers": {k: x for k, x in gradient.items() if ".lora_" not in k},
    }
    return {name: tensors for name, tensors in quantities.items() if tensors}


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def update_jax(trainable: Any, gradient: Any, config: OptimizerConfig) -> dict[str, np.ndarray]:
    """What the first update of optax adds to every parameter, given its gradient."""
    optimizer = make_optimizer(config, steps=1)
    change = jax.jit(lambda t, g: optimizer.update(g, optimizer.init(t), t)[0])
    return by_torch_name(change(trainable, gradient))


def update_torch(
    parameters: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    config: OptimizerConfig,
) -> dict[str, np.ndarray]:
    """The same of `torch.optim.AdamW`, in float64: a float32 parameter would round the change."""
    wide = {name: torch.nn.Parameter(torch.tensor(x).double()) for name, x in parameters.items()}
    optimizer = training.make_optimizer(wide.items(), config)
    for name, parameter in wide.items():
        parameter.grad = torch.tensor(gradients[name]).double()
    training.apply_gradients(optimizer, training.learning_rate(config, 0, 1), config.clip_norm)
    return {name: p.detach().numpy() - parameters[name] for name, p in wide.items()}


def make_train_jax(
    train_step: Callable[..., Any], optimizer: optax.GradientTransformation
) -> Callable[[Any, Any, Iterable[Batch]], tuple[Any, list[float]]]:
    """`(base, trainable, batches)` to `trainable` after an update for every batch, and the loss
    before each.

    Args:
        train_step: of a program, as `training.step.make_train_step` makes it.
        optimizer: the program's.
    """
    step = jax.jit(train_step, donate_argnums=0)

    def train(base: Any, trainable: Any, batches: Iterable[Batch]) -> tuple[Any, list[float]]:
        trainable = jax.tree.map(jnp.array, trainable)  # a copy: a step overwrites its state
        state = {
            "trainable": trainable,
            "opt_state": optimizer.init(trainable),
            "step": jnp.zeros((), jnp.int32),
        }
        losses = []
        for batch in batches:
            state, metrics = step(state, base, batch)
            losses.append(float(metrics["loss"]))
        return state["trainable"], losses

    return train


def train_torch(
    twin: Twin, batches: Iterable[Batch], config: OptimizerConfig, steps: int
) -> list[float]:
    """Updates the twin in place, once for every batch of a run of `steps`; the loss before each."""
    optimizer = training.make_optimizer(twin.named_parameters(), config)
    losses = []
    twin.train()
    for i, batch in enumerate(batches):
        loss = training.train_step(
            twin,
            optimizer,
            to_device(batch, twin.tuning, twin.causal_lm.device),
            learning_rate=training.learning_rate(config, i, steps),
            clip_norm=config.clip_norm,
        )
        losses.append(loss.item())
    return losses
