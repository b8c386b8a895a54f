"""Members of a crowd: MERBench's attention fusion, all of a corpus trained at once.

A member reads one vector for each modality of a clip (the mean over time of a feature), encodes
each by three layers, weighs the codes by an attention over modalities, and has a head for the class
of emotion and one for valence (MERBench, arXiv 2401.03429). The members of a corpus differ in the
fold that they leave out, by which their best epoch is chosen, and in their seed. They are trained
side by side by `vmap`: a member is an index into arrays that all share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

Params = dict[str, Any]

# In a member's validation score; of a corpus that has both kinds of labels, as MERBench has it.
VALENCE_WEIGHT = 0.25
PREDICTED = 1024  # clips at a time


@dataclasses.dataclass(frozen=True)
class Settings:
    """How members are trained; the defaults are MERBench's where it has one.

    Attributes:
        folds: parts of a corpus; each member leaves one out, and every fold has its members.
        seeds: members of a fold and a width.
        hidden: widths of the layers; each has its own members.
        epochs: at most.
        patience: epochs without a better validation score of any member, after which all stop.
        batch_size: clips of a step.
        learning_rate, weight_decay: of Adam; the decay is an L2 penalty in the gradient.
        dropout: of inputs.
        modality_dropout: share of clips whose modality is hidden from a step, so that votes on
            clips without it are of use.
        seed: of everything random.
    """

    folds: int = 5
    seeds: int = 2
    hidden: tuple[int, ...] = (128,)
    epochs: int = 100
    patience: int = 5
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    dropout: float = 0.3
    modality_dropout: float = 0.1
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What members read of N clips.

    Attributes:
        names: of the clips.
        arrays: by modality float16 `[N, d]`; zeros where a clip lacks it.
    """

    names: list[str]
    arrays: dict[str, np.ndarray]

    @property
    def there(self) -> np.ndarray:
        """Whether a clip has any modality, bool `[N]`."""
        return np.any([array.any(axis=1) for array in self.arrays.values()], axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Clips with human labels.

    Attributes:
        name: of the corpus.
        inputs: what members read.
        words: its classes; empty without emotions.
        emotion: int `[N]`, a place in `words`; -1 without one.
        valence: float32 `[N]`, -1 to 1; NaN without one.
    """

    name: str
    inputs: Inputs
    words: tuple[str, ...]
    emotion: np.ndarray
    valence: np.ndarray

    @property
    def has_valence(self) -> bool:
        """Whether any clip has a valence."""
        return bool(np.isfinite(self.valence).any())


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The trained members of one corpus and width.

    Attributes:
        params: with a leading axis of members, at each one's best epoch.
        folds, seeds, epochs: of each member: the fold that it left out, its seed, its best epoch.
        scores: of each member on its own fold, see `validation_score`.
    """

    params: Params
    folds: list[int]
    seeds: list[int]
    epochs: list[int]
    scores: list[float]


# --- one member -----------------------------------------------------------------------------------


def init_member(rng: np.random.Generator, widths: Mapping[str, int], hidden: int, classes: int):
    """Fresh parameters, uniform within `1/sqrt(inputs)` as torch.nn.Linear has them."""

    def linear(into: int, out: int) -> Params:
        bound = into**-0.5
        kernel, bias = (rng.uniform(-bound, bound, shape) for shape in ((into, out), (out,)))
        return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}

    def encoder(width: int) -> list[Params]:
        return [linear(width, hidden), linear(hidden, hidden), linear(hidden, hidden)]

    return {
        "encoders": {name: encoder(width) for name, width in sorted(widths.items())},
        "attention": encoder(hidden * len(widths)),
        "weights": linear(hidden, len(widths)),
        "emotion": linear(hidden, classes),
        "valence": linear(hidden, 1),
    }


def forward(
    params: Params, inputs: Mapping[str, jax.Array], drop: Callable[[str, jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Logits `[B, C]` and valence `[B]` of inputs `[B, d]` by modality.

    Args:
        params: of one member.
        inputs: by modality.
        drop: applied to the input of each encoder, with its name.
    """
    codes = [_encode(params["encoders"][name], drop(name, x)) for name, x in sorted(inputs.items())]
    joined = drop("attention", jnp.concatenate(codes, axis=-1))
    weights = _linear(_encode(params["attention"], joined), params["weights"])
    fused = jnp.einsum("bm,mbh->bh", weights, jnp.stack(codes))
    return _linear(fused, params["emotion"]), _linear(fused, params["valence"])[:, 0]


def _linear(x: jax.Array, layer: Params) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _encode(layers: Sequence[Params], x: jax.Array) -> jax.Array:
    for layer in layers:
        x = jax.nn.relu(_linear(x, layer))
    return x


def _keep(name: str, x: jax.Array) -> jax.Array:
    return x


# --- all members of a corpus ----------------------------------------------------------------------


def train_group(
    corpus: Corpus, hidden: int, settings: Settings, progress: Callable[[int, int], None]
) -> Group:
    """Train the members of a corpus, `folds * seeds` of them.

    Args:
        corpus: the clips, at least one for each fold.
        hidden: width of the layers.
        settings: how to train.
        progress: called with epochs done and epochs at most.
    """
    total = len(corpus.inputs.names)
    rng = np.random.default_rng([settings.seed, total, hidden])
    fold_of = rng.permutation(total) % settings.folds
    members = [(fold, seed) for fold in range(settings.folds) for seed in range(settings.seeds)]
    classes = max(len(corpus.words), 1)
    widths = {name: array.shape[1] for name, array in corpus.inputs.arrays.items()}
    inits = [
        init_member(np.random.default_rng([settings.seed, 1, *m]), widths, hidden, classes)
        for m in members
    ]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inits)
    data = {
        "inputs": {name: jnp.asarray(a) for name, a in corpus.inputs.arrays.items()},
        "emotion": jnp.asarray(corpus.emotion, jnp.int32),
        "valence": jnp.asarray(corpus.valence, jnp.float32),
    }
    optimizer = _optimizer(settings)
    validation = _padded([np.flatnonzero(fold_of == fold) for fold, _ in members])
    training = [np.flatnonzero(fold_of != fold) for fold, _ in members]
    steps = -(-max(map(len, training)) // settings.batch_size)
    state = {
        "params": params,
        "optimizer": jax.vmap(optimizer.init)(params),
        "best": jax.tree.map(jnp.copy, params),
        "score": jnp.full(len(members), -jnp.inf, jnp.float32),
        "epoch": jnp.zeros(len(members), jnp.int32),
    }
    has = (bool(corpus.words), corpus.has_valence)
    for epoch in range(1, settings.epochs + 1):
        shuffled = [
            np.random.default_rng([settings.seed, 2, epoch, *m]).permutation(mine)
            for m, mine in zip(members, training)
        ]
        order = _padded(shuffled, steps * settings.batch_size)
        order = order.reshape(len(members), steps, settings.batch_size).swapaxes(0, 1)
        key = jax.random.fold_in(jax.random.key(settings.seed), epoch)
        state = _epoch(state, data, order, validation, key, epoch, settings, has)
        progress(epoch, settings.epochs)
        if epoch - int(state["epoch"].max()) >= settings.patience:
            break
    return Group(
        params=jax.tree.map(np.asarray, state["best"]),
        folds=[fold for fold, _ in members],
        seeds=[seed for _, seed in members],
        epochs=np.asarray(state["epoch"]).tolist(),
        scores=[round(float(score), 6) for score in state["score"]],
    )


def lower_epoch(
    clips: int, widths: Mapping[str, int], classes: int, settings: Settings, device: jax.Device
) -> jax.stages.Lowered:
    """One pass over a corpus of emotions and valence, for a device that need not be here.

    Args:
        clips: of the corpus.
        widths: of the inputs, by modality.
        classes: of emotions.
        settings: how to train, with one width of the layers.
        device: to compile for.
    """
    members, batch = settings.folds * settings.seeds, settings.batch_size
    steps = -(-(clips - clips // settings.folds) // batch)
    f32, i32 = jnp.float32, jnp.int32

    def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    [hidden] = settings.hidden
    member = init_member(np.random.default_rng(0), widths, hidden, classes)
    params = jax.tree.map(lambda x: of(x.dtype, members, *x.shape), member)
    state = {
        "params": params,
        "optimizer": jax.eval_shape(jax.vmap(_optimizer(settings).init), params),
        "best": params,
        "score": of(f32, members),
        "epoch": of(i32, members),
    }
    data = {
        "inputs": {name: of(jnp.float16, clips, width) for name, width in widths.items()},
        "emotion": of(i32, clips),
        "valence": of(f32, clips),
    }
    order, validation = of(i32, steps, members, batch), of(i32, members, clips // settings.folds)
    key = jax.eval_shape(jax.random.key, 0)
    place = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (state, data, order, validation, key, of(i32)),
    )
    return _epoch.lower(*arguments, settings, (True, True))


def _padded(rows: Sequence[np.ndarray], length: int = 0) -> np.ndarray:
    """Rows of numbers as one int32 array, -1 behind the shorter ones."""
    out = np.full((len(rows), length or max(map(len, rows))), -1, np.int32)
    for row, values in zip(out, rows):
        row[: len(values)] = values
    return out


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay), optax.adam(settings.learning_rate)
    )


@functools.partial(jax.jit, static_argnames=("settings", "has"), donate_argnames="state")
def _epoch(state, data, order, validation, key, epoch, settings, has):
    """One pass over the clips, then the validation score, which may make it a member's best."""
    optimizer = _optimizer(settings)

    def step(carry, now):
        number, rows = now
        keys = jax.random.split(jax.random.fold_in(key, number), len(rows))
        grads = jax.vmap(jax.grad(_loss), in_axes=(0, None, 0, 0, None, None))(
            carry[0], data, rows, keys, settings, has
        )
        updates, moments = jax.vmap(optimizer.update)(grads, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), moments), None

    start = state["params"], state["optimizer"]
    (params, moments), _ = jax.lax.scan(step, start, (jnp.arange(len(order)), order))
    score = jax.vmap(_validate, in_axes=(0, None, 0, None))(params, data, validation, has)
    better = score > state["score"]

    def choose(new, old):
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return {
        "params": params,
        "optimizer": moments,
        "best": jax.tree.map(choose, params, state["best"]),
        "score": choose(score, state["score"]),
        "epoch": jnp.where(better, epoch, state["epoch"]),
    }


def _rows(data, rows):
    """Inputs and labels of clips by number; -1 is no clip, and has no labels."""
    there = rows >= 0
    emotion = jnp.where(there, data["emotion"][rows], -1)
    valence = jnp.where(there, data["valence"][rows], jnp.nan)
    return {n: x[rows].astype(jnp.float32) for n, x in data["inputs"].items()}, emotion, valence


def _loss(params, data, rows, key, settings, has):
    """Cross-entropy and squared error of valence, each over the clips that have the label."""
    inputs, emotion, valence = _rows(data, rows)
    keys = dict(zip([*sorted(inputs), "attention"], jax.random.split(key, len(inputs) + 1)))

    def drop(name, x):
        # A clip in ten goes without a modality; the attention reads codes, which are all there.
        elements, clips = jax.random.split(keys[name])
        kept = jax.random.bernoulli(elements, 1 - settings.dropout, x.shape) / (
            1 - settings.dropout
        )
        if name != "attention":
            kept *= jax.random.bernoulli(clips, 1 - settings.modality_dropout, (len(x), 1))
        return x * kept

    logits, predicted = forward(params, inputs, drop)
    loss = 0.0
    if has[0]:
        known = emotion >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(emotion, 0))
        loss += jnp.sum(jnp.where(known, losses, 0)) / jnp.maximum(known.sum(), 1)
    if has[1]:
        known = jnp.isfinite(valence)
        errors = jnp.square(predicted - jnp.where(known, valence, 0))
        loss += jnp.sum(jnp.where(known, errors, 0)) / jnp.maximum(known.sum(), 1)
    return loss


def _validate(params, data, rows, has):
    inputs, emotion, valence = _rows(data, rows)
    logits, predicted = forward(params, inputs, _keep)
    return validation_score(logits, predicted, emotion, valence, has)


def validation_score(logits, predicted, emotion, valence, has) -> jax.Array:
    """Weighted F1 of emotions, less a quarter of the squared error of valence.

    Args:
        logits, predicted: of a member: `[N, C]` and `[N]`.
        emotion, valence: the labels `[N]`, -1 and NaN where there is none.
        has: whether the corpus has emotions, and whether it has valence; of valence alone, the
            score is minus the squared error.
    """
    score = jnp.zeros(())
    if has[0]:
        classes = jnp.arange(logits.shape[-1])
        known = emotion >= 0
        truth = (emotion[:, None] == classes) & known[:, None]
        guess = (logits.argmax(axis=-1)[:, None] == classes) & known[:, None]
        hits, support, guessed = (truth & guess).sum(0), truth.sum(0), guess.sum(0)
        f1 = 2 * hits / jnp.maximum(support + guessed, 1)
        score += (f1 * support).sum() / jnp.maximum(support.sum(), 1)
    if has[1]:
        known = jnp.isfinite(valence)
        errors = jnp.where(known, jnp.square(predicted - jnp.where(known, valence, 0)), 0)
        error = errors.sum() / jnp.maximum(known.sum(), 1)
        score -= VALENCE_WEIGHT * error if has[0] else error
    return score


def predict(params: Params, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[M, N, C]` and valence `[M, N]` of all members of a group."""
    probabilities, valences = [], []
    for start in range(0, len(inputs.names), PREDICTED):
        part = {n: a[start : start + PREDICTED] for n, a in inputs.arrays.items()}
        count = len(next(iter(part.values())))
        part = {n: np.pad(a, ((0, PREDICTED - count), (0, 0))) for n, a in part.items()}
        p, v = _predict(params, part)
        probabilities.append(np.asarray(p)[:, :count])
        valences.append(np.asarray(v)[:, :count])
    return np.concatenate(probabilities, axis=1), np.concatenate(valences, axis=1)


@jax.jit
def _predict(params, inputs):
    inputs = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    logits, valence = jax.vmap(lambda member: forward(member, inputs, _keep))(params)
    return jax.nn.softmax(logits, axis=-1), valence
