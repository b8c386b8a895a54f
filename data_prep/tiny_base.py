"""Train the tiny base model that the default run adapts: `python -m data_prep.tiny_base`.

A Qwen2-architecture language model of about a million parameters, and its tokenizer, from nothing
but the demo world's texts. Where a prompt has room for a soft token, this corpus puts the *word*
of a cue ("smile", "whisper"), so that the model learns what cues mean, in the very positions where
adapted features will stand. It never sees a feature vector.

Writes `config.json`, `model.safetensors`, `tokenizer.json` and `training.json` (how it was made,
and its score from words alone against the ceiling; below 90 % of it the script fails).
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from affectgpt_jax import cli, runtime
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.data import demo
from affectgpt_jax.data.examples import Example, build_examples
from affectgpt_jax.data.modalities import INPUT_MODES, MODALITIES, InputMode
from affectgpt_jax.data.prompts import load_prompts
from affectgpt_jax.data.records import Annotations
from affectgpt_jax.data.tokenizer import Tokenizer
from affectgpt_jax.models.decoder import ComputeConfig, Decoder, DecoderConfig, init_base, lm_head
from affectgpt_jax.weights.huggingface import save_base

ASSET = Path(str(importlib.resources.files("affectgpt_jax") / "assets" / "tiny_base"))
# Qwen2's pre-tokenizer: contractions, words with one leading space, single digits, punctuation.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 704
MODEL = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
    rope_theta=1e4,
    tie_word_embeddings=True,
)
LENGTH = 48  # tokens a row; the longest text of the corpus fits
MODES = ("multi_audio_face_text", "audio_face", "audio_text", "face_text", "audio", "face", "text")
ONE_EACH = dict.fromkeys(MODALITIES, 1)
SEED = 20250117


def draw_texts(rng: np.random.Generator, n: int):
    """Prompts with placeholders, answers, and the cue word for every slot ("" for an absent one).

    Returns three lists of length n; words are dicts slot -> word.
    """
    prompts = load_prompts("compact")
    clips = demo.draw_clips(rng, n)
    questions = rng.choice(["description", "ovlabel"], size=n)
    # The full mode is what the default run uses; the others keep single inputs readable.
    modes = rng.choice(MODES, size=n, p=[0.55] + [0.075] * (len(MODES) - 1))
    texts, answers, words = [], [], []
    for i in range(n):
        mode = INPUT_MODES[modes[i]]
        clip = Annotations(
            name="",
            subtitle=clips.subtitles[i],
            description=clips.description(i),
            labels=clips.labels[i],
        )
        texts.append(prompts.prompt(mode, ONE_EACH, clip, questions[i]))
        answers.append(prompts.answer(questions[i], clip))
        words.append(_slot_words(rng, clips, i, mode))
    return texts, answers, words


def _slot_words(rng, clips: demo.Clips, i: int, mode: InputMode) -> dict[str, str]:
    face = demo.FACE_WORDS[clips.cues["face"][i]] if clips.present["face"][i] else ""
    voice = demo.VOICE_WORDS[clips.cues["audio"][i]] if clips.present["audio"][i] else ""
    # The fused token may come to mean either cue, so the base has to read either there, and to do
    # without it.
    both = ("", face, voice)[rng.integers(3)]
    words = {"multi": both, "audio": voice, "face": face}
    return {slot: words[slot] for slot in mode.slots}


def train_tokenizer(path: Path, rng: np.random.Generator) -> None:
    """Byte-level BPE with Qwen2's pre-tokenizer and chat tokens, from corpus texts."""
    texts, answers, _ = draw_texts(rng, 20_000)
    for placeholder in (m.placeholder for m in MODALITIES.values()):
        texts = [text.replace(placeholder, "") for text in texts]
    cues = [f" {word}" for word in (*demo.FACE_WORDS, *demo.VOICE_WORDS)] * 1000
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL) - len(MODALITIES),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([*texts, *answers, *cues], trainer)
    raw.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    raw.save(str(path))


def word_id(tokenizer: Tokenizer, word: str) -> int:
    """The single token of a cue word.

    Raises:
        ValueError: the word takes several tokens, so it would not fit a one-token slot.
    """
    (ids,) = tokenizer.encode([f" {word}"])
    if len(ids) != 1:
        raise ValueError(f"the cue {word!r} takes {len(ids)} tokens; a slot holds one")
    return int(ids[0])


def fill_rows(
    tokenizer: Tokenizer, examples: list[Example], words: list[dict[str, str]]
) -> dict[str, np.ndarray]:
    """Right-padded rows with cue words in the slots.

    Returns:
        tokens `[B, T]` int32, `absent` `[B, T]` (slots whose embedding is zero, as an absent
        modality's soft token is), `weight` `[B, T]` float32 of each position as a target, `length`
        `[B]`.
    """
    ids = {w: word_id(tokenizer, w) for w in (*demo.FACE_WORDS, *demo.VOICE_WORDS)}
    shape = (len(examples), LENGTH)
    tokens = np.full(shape, tokenizer.end_id, np.int32)
    absent, weight = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, (example, slots) in enumerate(zip(examples, words, strict=True)):
        n = len(example)
        tokens[row, :n] = example.tokens
        # Prompts are mostly fixed text; a small weight keeps the model fluent in them.
        weight[row, 1:n] = np.where(np.arange(1, n) < example.answer_start, 0.1, 1.0)
        for slot, word in slots.items():
            at = tokens[row] == tokenizer.placeholder_ids[MODALITIES[slot].placeholder]
            weight[row, at] = 0
            absent[row, at] = not word
            tokens[row, at] = ids[word] if word else tokenizer.end_id
    length = np.asarray([len(example) for example in examples], np.int32)
    return {"tokens": tokens, "absent": absent, "weight": weight, "length": length}


def hidden_states(module: Decoder, params, batch) -> jax.Array:
    """Final hidden states `[B, T, D]` of rows with cue words in their slots."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), batch["tokens"].shape)
    segment_ids = (positions < batch["length"][:, None]).astype(jnp.int32)
    embeds = module.apply({"params": params}, batch["tokens"], method="embed")
    embeds = jnp.where(batch["absent"][..., None], 0, embeds)
    return module.apply({"params": params}, embeds, positions, segment_ids)[0]


def loss_fn(module: Decoder, params, batch) -> jax.Array:
    logits = hidden_states(module, params, batch)[:, :-1] @ lm_head(params)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    weight = batch["weight"][:, 1:]
    return (nll * weight).sum() / weight.sum()


def word_score(module: Decoder, params, tokenizer: Tokenizer, n: int = 4096) -> dict[str, float]:
    """Hit rate from cue words alone, in the default input mode, beside the best possible.

    The answer's frame is given and the emotion read off as the best next token among the 24.
    """
    rng = np.random.default_rng(SEED + 1)
    prompts, mode = load_prompts("compact"), INPUT_MODES["multi_audio_face_text"]
    clips = demo.draw_clips(rng, n)
    asked = [Annotations(name="", subtitle=text) for text in clips.subtitles]
    texts = [prompts.prompt(mode, ONE_EACH, clip, "ovlabel") for clip in asked]
    frame = prompts.answers["ovlabel"].around("labels")[0].rstrip()
    words = [_slot_words(rng, clips, i, mode) for i in range(n)]
    batch = fill_rows(tokenizer, build_examples(tokenizer, texts, [frame] * n), words)
    batch["length"] = batch["length"] - 1  # the end token is not part of the frame
    apply = jax.jit(functools.partial(hidden_states, module))
    hidden = jnp.concatenate(
        [apply(params, {k: v[i : i + 512] for k, v in batch.items()}) for i in range(0, n, 512)]
    )
    last = hidden[jnp.arange(n), batch["length"] - 1]
    first = jnp.asarray([tokenizer.encode([f" {word}"])[0][0] for word in demo.EMOTIONS])
    guess = np.asarray(jnp.argmax((last @ lm_head(params))[:, first], axis=-1))
    return {
        "hit": float((guess == clips.emotion).mean()),
        "ceiling": demo.ceiling(demo.word_evidence(clips), demo.CUES),
    }


def train(out: Path, steps: int, batch_size: int, learning_rate: float) -> float:
    """Train tokenizer and model into `out`; returns the share of the ceiling from words alone."""
    started = time.perf_counter()
    rng = np.random.default_rng(SEED)
    train_tokenizer(out / "tokenizer.json", rng)
    tokenizer = Tokenizer(out)
    module = Decoder(MODEL, compute=ComputeConfig())
    params = init_base(module, jax.random.key(SEED))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count:,} parameters, {len(tokenizer)} tokens", flush=True)

    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, min(200, steps // 3), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(functools.partial(loss_fn, module))(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for i in range(steps):
        texts, answers, words = draw_texts(rng, batch_size)
        batch = fill_rows(tokenizer, build_examples(tokenizer, texts, answers), words)
        params, opt_state, loss = step(params, opt_state, batch)
        if (i + 1) % 100 == 0:
            elapsed = time.perf_counter() - started
            print(f"step {i + 1}/{steps}  loss {float(loss):.4f}  {elapsed:.0f} s", flush=True)
        if (i + 1) % 500 == 0:
            print(word_score(module, params, tokenizer, 2048), flush=True)

    score = word_score(module, params, tokenizer)
    share = score["hit"] / score["ceiling"]
    save_base(out, MODEL, params)
    report = {
        "command": f"python -m data_prep.tiny_base --steps {steps} --batch {batch_size} "
        f"--learning_rate {learning_rate}",
        "parameters": count,
        "seed": SEED,
        "loss_last": float(loss),
        "words_alone": {**score, "share_of_ceiling": share},
        "wall_s": round(time.perf_counter() - started, 1),
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "optax": optax.__version__},
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return share


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        parser = cli.make_parser("python -m data_prep.tiny_base", __doc__.split("\n")[0])
        parser.add_argument("--out", type=Path, default=ASSET, help="directory to write")
        parser.add_argument("--steps", type=int, default=1200, help="default: 1200")
        parser.add_argument("--batch", type=int, default=64, help="texts a step; default: 64")
        parser.add_argument("--learning-rate", type=float, default=2e-3, help="default: 0.002")
        arguments = parser.parse_args(argv)
        runtime.prepare_plugins()
        # What ships is replaced only by a model that passes, and as a whole.
        with tempfile.TemporaryDirectory() as temporary:
            share = train(
                Path(temporary), arguments.steps, arguments.batch, arguments.learning_rate
            )
            if share < 0.9:
                raise UserError(
                    f"from words alone the base reaches {share:.1%} of the ceiling, not 90 %; "
                    "train it for more --steps"
                )
            shutil.copytree(temporary, arguments.out, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
