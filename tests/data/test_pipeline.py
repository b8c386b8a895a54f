import dataclasses
import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import assert_same_tree

import affectgpt_jax
from affectgpt_jax.data.modalities import INPUT_MODES
from affectgpt_jax.data.packing import LENGTH_MULTIPLE
from affectgpt_jax.data.pipeline import (
    DataError,
    MixtureComponent,
    PromptProcessor,
    TrainPipeline,
    buckets_of,
    choose_lengths,
    sequential_batches,
)
from affectgpt_jax.data.prompts import load_prompts
from affectgpt_jax.data.records import (
    Record,
    RecordDataset,
    RecordError,
    RecordSubset,
    hold_out,
    write_records,
)
from affectgpt_jax.data.tokenizer import Tokenizer

TINY_BASE = Path(affectgpt_jax.__file__).parent / "assets" / "tiny_base"
COUNT, BATCH, FRAMES = 41, 4, 2
WIDTHS = {"face": 3, "audio": 5}
TOKEN_COUNTS = {"multi": 2, "audio": 3, "face": 1}


def clip(i: int, **changes) -> Record:
    """A clip whose texts and feature values all tell its number; lengths differ a lot."""
    features = {name: np.full((FRAMES, width), i + 1) for name, width in WIDTHS.items()}
    if i % 5 == 3:
        del features["audio"]
    record = Record(
        name=f"clip{i:02}",
        features=features,
        subtitle="" if i % 4 == 0 else "The dog is gone. " * (i % 3),
        description=f"Number {i} is {'very ' * (i % 9)}calm.",
        labels=(f"number {i}", "calm")[: 1 + i % 2],
    )
    return dataclasses.replace(record, **changes)


def make_dataset(path: Path, records) -> RecordDataset:
    write_records(path, records, encoders=dict.fromkeys(WIDTHS, "none"))
    return RecordDataset(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> RecordDataset:
    return make_dataset(tmp_path_factory.mktemp("records") / "train", map(clip, range(COUNT)))


@pytest.fixture(scope="module")
def processor() -> PromptProcessor:
    mode = INPUT_MODES["multi_audio_face_text"]
    prompts = load_prompts("compact")
    return PromptProcessor(Tokenizer(TINY_BASE), prompts, mode, TOKEN_COUNTS, features=WIDTHS)


def make(dataset, processor, **changes) -> TrainPipeline:
    settings = {"batch_size": BATCH, "max_tokens": 128, "num_buckets": 3} | changes
    return TrainPipeline(
        [MixtureComponent(dataset, processor, settings.pop("label", "hybrid"))], **settings
    )


@pytest.fixture(scope="module")
def pipeline(dataset, processor) -> TrainPipeline:
    return make(dataset, processor)


def epoch_steps(pipeline: TrainPipeline, epoch: int) -> list[int]:
    """The steps of one of the first 20 epochs, of 11 or 12 steps each."""
    return [step for step in range(250) if pipeline.locate(step)[0] == epoch]


def answers(processor: PromptProcessor, batch) -> list[str | None]:
    """The supervised text of every row, without its end token; None for a filler row."""
    texts = []
    for targets, weights in zip(batch["targets"], batch["target_weights"], strict=True):
        tokens = targets[weights > 0]
        assert tokens.size == 0 or tokens[-1] == processor.tokenizer.end_id
        texts.append(processor.tokenizer.decode(tokens[:-1]) if tokens.size else None)
    return texts


def clips_and_types(processor: PromptProcessor, batch) -> list[tuple[int, str]]:
    """Number and label type of every clip in a batch, read from its answers."""
    return [
        (int(re.search(r"\d+", text)[0]), "ovlabel" if "feel" in text else "description")
        for text in answers(processor, batch)
        if text is not None
    ]


def epoch_of(
    pipeline: TrainPipeline, processor: PromptProcessor, epoch: int
) -> list[tuple[int, str]]:
    batches = map(pipeline.batch, epoch_steps(pipeline, epoch))
    return [found for batch in batches for found in clips_and_types(processor, batch)]


# --- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["hybrid", "description", "ovlabel"])
def test_every_epoch_holds_every_clip_once(dataset, processor, label):
    pipeline = make(dataset, processor, label=label)
    for epoch in range(3):
        found = epoch_of(pipeline, processor, epoch)
        assert sorted(number for number, _ in found) == list(range(COUNT))
        if label != "hybrid":
            assert {kind for _, kind in found} == {label}


def test_a_batch_is_a_pure_function_of_its_step(dataset, processor, pipeline):
    steps = range(30)
    expected = [pipeline.batch(step) for step in steps]
    fresh = make(dataset, processor)
    for step in reversed(steps):
        assert_same_tree(fresh.batch(step), expected[step])
    with ThreadPoolExecutor(4) as pool:
        for found, batch in zip(pool.map(pipeline.batch, steps), expected, strict=True):
            assert_same_tree(found, batch)


def test_training_goes_on_in_the_middle_as_if_it_had_not_stopped(dataset, processor, pipeline):
    whole = list(pipeline.batches(0, 30))
    assert len(whole) == 30
    for start in (1, 17, 29):
        resumed = list(make(dataset, processor).batches(start, 30, threads=1))
        assert len(resumed) == 30 - start
        for found, expected in zip(resumed, whole[start:], strict=True):
            assert_same_tree(found, expected)
    for step, batch in enumerate(whole):
        assert_same_tree(batch, pipeline.batch(step))


def test_epochs_differ_in_order_and_in_label_types(pipeline, processor):
    first, second = (epoch_of(pipeline, processor, epoch) for epoch in range(2))
    assert [number for number, _ in first] != [number for number, _ in second]
    assert dict(first) != dict(second)


def test_seeds_differ_in_order_and_in_label_types(dataset, processor, pipeline):
    first = epoch_of(pipeline, processor, 0)
    second = epoch_of(make(dataset, processor, seed=1), processor, 0)
    assert [number for number, _ in first] != [number for number, _ in second]
    assert dict(first) != dict(second)


def test_hybrid_draws_each_label_type_half_of_the_time(pipeline, processor):
    epochs = 20
    drawn = [dict(epoch_of(pipeline, processor, epoch)) for epoch in range(epochs)]
    labels = sum(kind == "ovlabel" for epoch in drawn for kind in epoch.values())
    n = epochs * COUNT
    assert abs(labels - n / 2) < 4 * math.sqrt(n) / 2  # standard errors of fair coins
    for number in range(COUNT):
        assert {epoch[number] for epoch in drawn} == {"description", "ovlabel"}


def test_processes_share_every_batch(dataset, processor, pipeline):
    shares = [make(dataset, processor, process=(i, 2)) for i in range(2)]
    for step in range(25):
        rows = [share.batch(step) for share in shares]
        together = {
            key: {name: np.concatenate([r[key][name] for r in rows]) for name in rows[0][key]}
            if isinstance(value, dict)
            else np.concatenate([r[key] for r in rows])
            for key, value in rows[0].items()
        }
        assert_same_tree(together, pipeline.batch(step))


def test_processes_must_divide_the_batch(dataset, processor):
    with pytest.raises(DataError, match="batch_size 4 is not a multiple of 3 processes"):
        make(dataset, processor, process=(0, 3))


# --- rows ---------------------------------------------------------------------------------------


def test_exactly_the_answer_its_end_and_the_end_token_are_supervised(dataset, processor, pipeline):
    for step in epoch_steps(pipeline, 0):
        batch = pipeline.batch(step)
        texts = [text for text in answers(processor, batch) if text is not None]
        for (number, kind), text in zip(clips_and_types(processor, batch), texts, strict=True):
            entry = dataset.index[number]
            assert (
                text
                == {
                    "description": f"{entry.description}###",
                    "ovlabel": f"They feel {', '.join(entry.labels)}.###",
                }[kind]
            )
        assert set(np.unique(batch["target_weights"])) <= {0, 1}


def test_a_row_is_the_start_token_the_prompt_and_the_answer(dataset, processor, pipeline):
    batch = pipeline.batch(0)
    for row, (number, kind) in enumerate(clips_and_types(processor, batch)):
        used = batch["segment_ids"][row] > 0
        tokens = batch["tokens"][row][used]
        assert tokens[0] == processor.tokenizer.start_id
        entry, prompts = dataset.index[number], processor.prompts
        prompt = prompts.prompt(processor.mode, TOKEN_COUNTS, entry, kind)
        answer = prompts.answer(kind, entry)
        parts = [ids.tolist() for ids in processor.tokenizer.encode([prompt, answer])]
        assert tokens[1:-1].tolist() == [*parts[0], *parts[1]]
        assert used.tolist() == sorted(used, reverse=True)  # padding stands on the right alone
        assert batch["positions"][row].tolist() == list(range(len(used)))
        assert (batch["tokens"][row][~used] == processor.tokenizer.end_id).all()


def test_target_positions_are_one_before_their_targets(pipeline):
    for step in epoch_steps(pipeline, 0):
        batch = pipeline.batch(step)
        for row, weights in enumerate(batch["target_weights"]):
            at = batch["target_positions"][row][weights > 0]
            targets = batch["targets"][row][weights > 0]
            assert batch["tokens"][row][at + 1].tolist() == targets.tolist()
            used = (batch["segment_ids"][row] > 0).sum()
            assert at.tolist() == list(range(used - len(at) - 1, used - 1)) or not used


def test_soft_tokens_stand_at_the_placeholders_in_their_order(processor, pipeline):
    placeholders = list(processor.tokenizer.placeholder_ids.values())
    names = {id: text for text, id in processor.tokenizer.placeholder_ids.items()}
    order = ["<MultiHere>"] * 2 + ["<AudioHere>"] * 3 + ["<FaceHere>"]
    batch = pipeline.batch(0)
    for tokens, index in zip(batch["tokens"], batch["soft_token_index"], strict=True):
        np.testing.assert_array_equal(index > 0, np.isin(tokens, placeholders))
        found = {int(j): names[int(token)] for j, token in zip(index, tokens, strict=True) if j}
        assert found == {j + 1: name for j, name in enumerate(order)}


def test_features_are_the_clips_own_and_an_absent_modality_is_zero(dataset, processor, pipeline):
    absent = 0
    for step in epoch_steps(pipeline, 0):
        batch = pipeline.batch(step)
        for row, (number, _) in enumerate(clips_and_types(processor, batch)):
            for name in WIDTHS:
                has = name in dataset.index[number].present
                absent += not has
                assert batch["present"][name][row] == has
                assert (batch["features"][name][row] == (number + 1 if has else 0)).all()
    assert absent == 8


def test_filler_rows_weigh_nothing(processor, pipeline):
    rows = 0
    for step in epoch_steps(pipeline, 0):
        batch = pipeline.batch(step)
        for row, text in enumerate(answers(processor, batch)):
            if text is None:
                rows += 1
                assert not batch["target_weights"][row].any()
                assert not batch["segment_ids"][row].any()
                assert not batch["soft_token_index"][row].any()
                assert not any(present[row] for present in batch["present"].values())
    assert rows == -COUNT % BATCH  # an epoch has filler in its last batch only


def test_a_mode_without_features_reads_no_record(dataset, processor, monkeypatch):
    text = dataclasses.replace(processor, mode=INPUT_MODES["text"], token_counts={}, features={})
    pipeline = make(dataset, text)
    monkeypatch.setattr(RecordDataset, "__getitem__", lambda *_: pytest.fail("a record was read"))
    batch = pipeline.batch(0)
    assert batch["features"] == batch["present"] == {}
    assert not batch["soft_token_index"].any()


# --- buckets ------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=30),
    st.integers(1, 4),
)
def test_buckets_waste_the_least_padding_that_is_possible(examples, count):
    lengths, targets = np.array(examples).T
    rounded = [math.ceil(n / LENGTH_MULTIPLE) * LENGTH_MULTIPLE for n in lengths]
    sizes = sorted(set(rounded))

    def padded(ends):
        return sum(min(end for end in ends if end >= n) for n in rounded)

    best = min(
        padded((*shorter, sizes[-1]))
        for k in range(count)
        for shorter in itertools.combinations(sizes[:-1], k)
    )
    buckets = buckets_of(choose_lengths(lengths, count), lengths, targets)
    ends = [bucket.length for bucket in buckets]
    assert padded(ends) == best
    assert len(ends) <= count
    assert ends == sorted(set(ends))
    assert ends[-1] == sizes[-1]
    for n, answer in examples:
        # A row may stand in any batch that is at least as long.
        assert all(bucket.targets >= answer for bucket in buckets if bucket.length >= n)


def test_every_row_fits_its_bucket_wherever_it_ends_up(tmp_path, processor):
    """Short prompts with long answers beside long prompts with short ones."""
    records = [
        clip(i, subtitle="", description=f"Number {i} is {'so ' * 12}calm.")
        if i % 2
        else clip(i, subtitle="Stop! " * 20, description=f"Number {i}.")
        for i in range(10)
    ]
    dataset = make_dataset(tmp_path, records)
    pipeline = make(dataset, processor, label="description", num_buckets=2, batch_size=1)
    assert len(pipeline.buckets) == 2
    assert sorted(number for number, _ in epoch_of(pipeline, processor, 0)) == list(range(10))


def test_the_longest_example_fits_also_where_the_first_epoch_does_not_draw_it(processor, tmp_path):
    long = clip(0, description=f"Number 0 is {'very ' * 40}calm.")
    dataset = make_dataset(tmp_path, [long, *map(clip, range(1, 12))])
    [longest, *_] = processor.training_examples(dataset, "description")
    drawn = set()
    for seed in range(8):
        pipeline = make(dataset, processor, seed=seed, max_tokens=256)
        drawn.add("description" in {k for n, k in epoch_of(pipeline, processor, 0) if n == 0})
        assert pipeline.buckets[-1].length >= len(longest)
    assert drawn == {True, False}


def test_a_batch_mixes_label_types_and_is_as_long_as_its_longest_row_needs(processor, pipeline):
    mixed = 0
    for step in epoch_steps(pipeline, 0):
        batch = pipeline.batch(step)
        longest, width = (batch["segment_ids"] > 0).sum(axis=1).max(), batch["tokens"].shape[1]
        shorter = [b.length for b in pipeline.buckets if b.length < width]
        assert max(shorter, default=0) < longest <= width
        mixed += len({kind for _, kind in clips_and_types(processor, batch)}) == 2
    # Cut by length, batches would hold one kind each; the published loss is a mean over both.
    assert mixed > len(epoch_steps(pipeline, 0)) / 2


def test_more_buckets_pad_less(dataset, processor, pipeline):
    def padding(pipeline):
        batches = map(pipeline.batch, epoch_steps(pipeline, 0))
        return sum((batch["segment_ids"] == 0).sum() for batch in batches)

    one = make(dataset, processor, num_buckets=1)
    assert len(one.buckets) == 1
    assert len(pipeline.buckets) == 3
    assert padding(pipeline) < padding(one)


# --- several clips a row ------------------------------------------------------------------------

PACK_LENGTH = 256


@pytest.fixture(scope="module")
def packed(dataset, processor) -> TrainPipeline:
    return make(dataset, processor, pack_length=PACK_LENGTH)


def clips_of(batch) -> list[dict[str, object]]:
    """Every clip of a batch as a row of its own would hold it, without padding."""
    found = []
    for row, segments in enumerate(batch["segment_ids"]):
        for clip in range(segments.max()):
            here = np.flatnonzero(segments == 1 + clip)
            assert here.tolist() == list(range(here[0], here[-1] + 1))
            soft, at = batch["soft_token_index"][row, here], batch["target_positions"][row]
            mine = (batch["target_weights"][row] > 0) & (here[0] <= at) & (at <= here[-1])
            total = sum(TOKEN_COUNTS.values())
            assert set((soft[soft > 0] - 1) // total) == {clip}
            found.append(
                {
                    "tokens": batch["tokens"][row, here],
                    "positions": batch["positions"][row, here],
                    "soft_token_index": np.where(soft > 0, soft - clip * total, 0),
                    "target_positions": at[mine] - here[0],
                    "targets": batch["targets"][row, mine],
                    **{f: {k: x[row, clip] for k, x in batch[f].items()} for f in FEATURES},
                }
            )
    return found


FEATURES = ("features", "present")


def packed_epoch(pipeline: TrainPipeline, epoch: int) -> list[dict[str, object]]:
    """The batches of an epoch."""
    first = sum(len(pipeline.plan(e)) for e in range(epoch))
    return [pipeline.batch(first + i) for i in range(len(pipeline.plan(epoch)))]


def test_a_packed_epoch_holds_exactly_the_clips_of_one_without(pipeline, packed):
    for epoch in range(2):
        batches = [packed_epoch(p, epoch) for p in (packed, pipeline)]
        found, expected = (
            sorted(
                (clip for batch in part for clip in clips_of(batch)),
                key=lambda clip: clip["tokens"].tolist(),
            )
            for part in batches
        )
        assert len(found) == COUNT
        for one, other in zip(found, expected, strict=True):
            assert_same_tree(one, other)
        # No supervised token is left over, and none is there twice.
        weights = [sum(batch["target_weights"].sum() for batch in part) for part in batches]
        assert weights[0] == weights[1] == sum(len(clip["targets"]) for clip in found)


def test_packed_batches_have_one_shape_and_fewer_rows(pipeline, packed):
    (bucket,) = packed.buckets
    assert bucket.length == PACK_LENGTH
    assert bucket.clips > 1
    batches = packed_epoch(packed, 0)
    assert len(batches) < len(pipeline.plan(0))
    for batch in [*batches, packed.filler_batch(bucket)]:
        assert batch["tokens"].shape == (BATCH, PACK_LENGTH)
        assert batch["targets"].shape == (BATCH, bucket.targets)
        assert batch["features"]["face"].shape == (BATCH, bucket.clips, FRAMES, WIDTHS["face"])
        assert batch["present"]["face"].shape == (BATCH, bucket.clips)
        padding = batch["segment_ids"] == 0
        assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # on the right alone


def test_places_without_a_clip_are_absent(packed):
    spare = 0
    for batch in packed_epoch(packed, 0):
        clips = batch["segment_ids"].max(axis=1)
        empty = np.arange(packed.buckets[0].clips) >= clips[:, None]
        spare += empty.sum()
        for name in WIDTHS:
            assert not batch["present"][name][empty].any()
            assert not batch["features"][name][empty].any()
    assert spare


def test_a_packed_batch_is_a_pure_function_of_its_step(dataset, processor, packed):
    whole = list(packed.batches(0, 12))
    fresh = make(dataset, processor, pack_length=PACK_LENGTH)
    for found, expected in zip(fresh.batches(7, 12, threads=1), whole[7:], strict=True):
        assert_same_tree(found, expected)
    other = make(dataset, processor, pack_length=PACK_LENGTH, seed=1)
    assert other.batch(0)["tokens"].tobytes() != whole[0]["tokens"].tobytes()
    epochs = [packed_epoch(packed, epoch)[0]["tokens"].tobytes() for epoch in range(2)]
    assert epochs[0] != epochs[1]


def test_processes_share_packed_rows(dataset, processor, packed):
    shares = [make(dataset, processor, pack_length=PACK_LENGTH, process=(i, 2)) for i in range(2)]
    for step in range(6):
        parts = [share.batch(step) for share in shares]
        for key in ("tokens", "segment_ids", "soft_token_index", "targets"):
            together = np.concatenate([part[key] for part in parts])
            np.testing.assert_array_equal(together, packed.batch(step)[key])


def test_the_fill_of_an_epoch_is_what_its_batches_show(packed):
    batches, fill = packed_epoch(packed, 0), packed.fill(0)
    segments = np.stack([batch["segment_ids"] for batch in batches])
    weights = np.stack([batch["target_weights"] for batch in batches])
    assert fill.tokens == pytest.approx((segments > 0).mean(), rel=1e-12)
    assert fill.targets == pytest.approx(weights.mean(), rel=1e-6)  # a mean of float32
    clips = segments.max(axis=2)
    assert fill.clips_per_batch.tolist() == clips.sum(axis=1).tolist()
    assert sorted(fill.clips_per_row) == sorted(clips[clips > 0])
    assert fill.clips_per_batch.sum() == COUNT


def test_packed_rows_must_hold_the_longest_example_that_is_allowed(dataset, processor):
    with pytest.raises(DataError, match="pack_length 127 is less than max_tokens 128"):
        make(dataset, processor, pack_length=127)
    make(dataset, processor, pack_length=128)


def test_examples_that_are_dropped_stand_in_no_packed_row(dataset, processor):
    lengths = [len(example) for example in processor.training_examples(dataset, "description")]
    limit = int(np.median(lengths))
    changes = {"label": "description", "max_tokens": limit, "too_long": "drop"}
    pipeline = make(dataset, processor, pack_length=128, **changes)
    found = [clip for batch in packed_epoch(pipeline, 0) for clip in clips_of(batch)]
    assert sorted(len(clip["tokens"]) for clip in found) == sorted(
        length for length in lengths if length <= limit
    )


# --- trouble ------------------------------------------------------------------------------------


def longest(dataset, processor) -> tuple[str, int]:
    examples = processor.training_examples(dataset, "description")
    lengths = [len(example) for example in examples]
    return dataset.index[int(np.argmax(lengths))].name, max(lengths)


def test_an_example_over_the_limit_is_named(dataset, processor):
    name, length = longest(dataset, processor)
    assert not make(dataset, processor, max_tokens=length).dropped
    expected = (
        f"record '{name}' has {length} tokens as description, over --config.max_tokens="
        f"{length - 1}, as have .* more; raise the limit or pass --config.too_long=drop"
    )
    with pytest.raises(DataError, match=expected):
        make(dataset, processor, max_tokens=length - 1)


def test_dropping_leaves_out_what_is_too_long_and_counts_it(dataset, processor):
    lengths = [len(example) for example in processor.training_examples(dataset, "description")]
    # One that is over the limit, yet no longer than the limit rounded up to a row length.
    limit = next(n for n in sorted(lengths) if {n + 1, n + 2} & set(lengths) and n % 4 in (1, 2))
    pipeline = make(dataset, processor, label="description", max_tokens=limit, too_long="drop")
    kept = [number for number, length in enumerate(lengths) if length <= limit]
    assert pipeline.dropped == COUNT - len(kept) > 0
    assert sorted(number for number, _ in epoch_of(pipeline, processor, 0)) == kept
    assert max(bucket.length for bucket in pipeline.buckets) < limit + LENGTH_MULTIPLE


def test_dropping_everything_is_an_error(dataset, processor):
    with pytest.raises(
        DataError, match="has no example of at most 3 tokens; raise config.max_tokens"
    ):
        make(dataset, processor, max_tokens=3, too_long="drop")


def test_a_clip_without_description_is_named(tmp_path, processor):
    dataset = make_dataset(tmp_path, [clip(0), clip(1, description=""), clip(2)])
    with pytest.raises(DataError, match="record 'clip01': it has no description"):
        make(dataset, processor)
    make(dataset, processor, label="ovlabel").batch(0)


def test_a_clip_with_a_placeholder_in_its_texts_is_named(tmp_path, processor):
    for field in ("subtitle", "description"):
        text = {field: "Number 1. <FaceHere>"}
        dataset = make_dataset(tmp_path / field, [clip(0), clip(1, **text)])
        with pytest.raises(DataError, match="record 'clip01': the .* holds the reserved text"):
            make(dataset, processor)


def test_a_feature_that_no_clip_has_is_absent_everywhere(dataset, processor):
    batch = make(dataset, dataclasses.replace(processor, features=WIDTHS | {"frame": 7})).batch(0)
    assert batch["features"]["frame"].shape == (BATCH, 1, 1, 7)
    assert not batch["features"]["frame"].any()
    assert not batch["present"]["frame"].any()


# --- mixtures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> RecordDataset:
    """A second set; its numbers go on where those of the first end, and it has frames."""
    records = (
        clip(COUNT + i, features={"frame": np.full((1, 4), i + 1)}, emotion="calm")
        for i in range(10)
    )
    path = tmp_path_factory.mktemp("records") / "other"
    write_records(path, records, encoders={"frame": "none"})
    return RecordDataset(path)


def mixed(dataset, other, processor, first=1.0, second=1.0, **changes) -> TrainPipeline:
    counts, features = TOKEN_COUNTS | {"frame": 2}, WIDTHS | {"frame": 4}
    one = dataclasses.replace(processor, token_counts=counts, features=features)
    two = dataclasses.replace(one, mode=INPUT_MODES["frame_text"])
    settings = {"batch_size": BATCH, "max_tokens": 128, "seed": 3} | changes
    sources = [
        MixtureComponent(dataset, one, "hybrid", "one", first),
        MixtureComponent(other, two, "onehot", "two", second),
    ]
    return TrainPipeline(sources, **settings)


@pytest.mark.parametrize("pack_length", [0, 256])
@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 2), (0.5, 1), (2.5, 0.3)])
def test_an_epoch_of_a_mixture_visits_every_clip_as_often_as_its_weight(
    dataset, other, processor, first, second, pack_length
):
    pipeline = mixed(dataset, other, processor, first, second, pack_length=pack_length)
    draws = np.zeros(COUNT + 10, int)
    for epoch in range(10):
        plan = pipeline.plan(epoch)
        for batch in plan:
            real = batch.records >= 0
            np.add.at(draws, batch.records[real] + COUNT * batch.components[real], 1)
    expected = np.repeat([10 * first, 10 * second], [COUNT, 10])
    # A pass over a set may end in the middle of an epoch, so a clip can be one draw ahead.
    assert (abs(draws - expected) <= 1).all()
    assert draws[:COUNT].sum() == math.floor(10 * first * COUNT)
    assert draws[COUNT:].sum() == math.floor(10 * second * 10)


def test_components_of_one_size_draw_clips_and_label_types_of_their_own(dataset, processor):
    twice = [
        MixtureComponent(dataset, processor, "hybrid", name, weight=0.5) for name in ("one", "two")
    ]
    pipeline = TrainPipeline(twice, batch_size=BATCH, max_tokens=128)

    def epoch(number):
        """Component, record and label type of every draw, in their order: `[3, N]`."""
        parts = ([b.components, b.records, b.label_types] for b in pipeline.plan(number))
        draws = np.concatenate(list(parts), axis=1)[..., 0]
        return draws[:, draws[1] >= 0]

    draws = epoch(0)
    first, second = ({tuple(x) for x in draws[1:, draws[0] == i].T.tolist()} for i in (0, 1))
    assert {record for record, _ in first} != {record for record, _ in second}
    both = {record for record, _ in first} & {record for record, _ in second}
    types = [dict(first), dict(second)]
    assert any(types[0][record] != types[1][record] for record in both)
    # The components meet in another order in every epoch.
    assert draws[0].tolist() != epoch(2)[0].tolist()


def test_packed_rows_have_room_for_what_epochs_draw_often(dataset, other, processor):
    # The first set has descriptions among its answers, the second words alone.
    words, descriptions = (
        mixed(dataset, other, processor, first, second, pack_length=256).buckets[0].targets
        for first, second in ((0.25, 8), (8, 0.25))
    )
    assert words < descriptions - 16


def test_the_mix_of_every_step_is_known_and_repeats(dataset, other, processor):
    pipeline, again = mixed(dataset, other, processor), mixed(dataset, other, processor)
    mixes = [pipeline.component_counts(step) for step in range(40)]
    assert mixes[::-1] == [again.component_counts(step) for step in reversed(range(40))]
    assert sum(0 < mix["one"] < BATCH for mix in mixes) > 5  # both kinds meet in a batch
    for step, mix in enumerate(mixes):
        segments = pipeline.batch(step)["segment_ids"]
        assert mix["one"] + mix["two"] == segments.any(axis=1).sum()
        samples = pipeline.samples(step)
        assert samples.sum(axis=0)[0] == (segments > 0).sum()
        assert len(samples) == segments.any(axis=1).sum()


def test_the_mix_counts_clips_where_rows_hold_several(dataset, other, processor):
    pipeline = mixed(dataset, other, processor, pack_length=256)
    total = np.zeros(2, int)
    for step in range(len(pipeline.plan(0))):
        batch, mix = pipeline.batch(step), pipeline.component_counts(step)
        assert sum(mix.values()) == batch["segment_ids"].max(axis=1).sum()
        samples = pipeline.samples(step)
        assert len(samples) == sum(mix.values())
        filled = (batch["segment_ids"] > 0).sum(), batch["target_weights"].sum()
        assert tuple(samples.sum(axis=0)) == filled
        assert mix["two"] == batch["present"]["frame"].sum()
        total += list(mix.values())
    assert total.tolist() == [COUNT, 10]


def test_each_set_of_a_mixture_has_its_own_label_types_inputs_and_features(
    dataset, other, processor
):
    pipeline = mixed(dataset, other, processor)
    seen = set()
    for step in range(13):
        plan, batch = pipeline.planned(step), pipeline.batch(step)
        for row, text in enumerate(answers(processor, batch)):
            if text is None:
                continue
            source, record = plan.components[row, 0], plan.records[row, 0]
            seen.add(source)
            # Soft tokens are numbered over the slots of both: 1-2 multi, 3-5 audio, 6 face, 7-8
            # frame.
            placed = sorted(set(batch["soft_token_index"][row]) - {0})
            if source == 0:
                assert placed == [1, 2, 3, 4, 5, 6]
                assert not batch["present"]["frame"][row]
                assert (batch["features"]["face"][row] == record + 1).all()
            else:
                assert placed == [7, 8]
                assert text == "They feel calm.###"
                assert batch["present"]["frame"][row]
                assert not batch["present"]["face"][row]
                assert (batch["features"]["frame"][row] == record + 1).all()
    assert seen == {0, 1}


def test_processes_share_the_batches_of_a_mixture(dataset, other, processor):
    whole = mixed(dataset, other, processor)
    shares = [mixed(dataset, other, processor, process=(i, 2)) for i in range(2)]
    for step in range(8):
        parts = [share.batch(step)["tokens"] for share in shares]
        np.testing.assert_array_equal(np.concatenate(parts), whole.batch(step)["tokens"])


def test_sets_that_differ_in_frames_cannot_be_mixed(dataset, tmp_path, processor):
    features = {name: np.ones((FRAMES + 1, width)) for name, width in WIDTHS.items()}
    longer = make_dataset(tmp_path, [clip(0, features=features)])
    sources = [
        MixtureComponent(dataset, processor, "ovlabel", "a"),
        MixtureComponent(longer, processor, "ovlabel", "b"),
    ]
    with pytest.raises(DataError, match="have 2 and 3 frames of the feature 'face'"):
        TrainPipeline(sources, batch_size=2, max_tokens=128)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_positive(dataset, processor, weight):
    with pytest.raises(DataError, match="data set 'a': weight is"):
        MixtureComponent(dataset, processor, "ovlabel", "a", weight)


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_buckets", [1, 3])
def test_sequential_batches_visit_every_clip_once(dataset, processor, num_buckets):
    examples = processor.training_examples(dataset, "ovlabel")
    visited, widths = [], []
    for numbers, batch in sequential_batches(dataset, processor, examples, BATCH, num_buckets):
        widths.append(batch["tokens"].shape[1])
        assert len(batch["tokens"]) == BATCH
        assert [number for number, _ in clips_and_types(processor, batch)] == numbers.tolist()
        visited += numbers.tolist()
    assert sorted(visited) == list(range(COUNT))
    assert widths == sorted(widths, reverse=True), "what may not fit comes first"


def test_prompts_alone_have_nothing_to_supervise(dataset, processor):
    examples = processor.prompt_examples(dataset, "ovlabel")
    for numbers, batch in sequential_batches(dataset, processor, examples, BATCH):
        assert batch["target_weights"].shape == (BATCH, 0)
        for row, number in enumerate(numbers):
            used = (batch["segment_ids"][row] > 0).sum()
            np.testing.assert_array_equal(batch["tokens"][row, :used], examples[number].tokens)


def test_features_can_be_taken_from_other_clips(dataset, processor):
    source = np.random.default_rng(0).permutation(COUNT)
    examples = processor.training_examples(dataset, "ovlabel")
    batches = sequential_batches(dataset, processor, examples, BATCH, feature_from=source)
    for numbers, batch in batches:
        assert [number for number, _ in clips_and_types(processor, batch)] == numbers.tolist()
        for row, number in enumerate(numbers):
            assert (batch["features"]["face"][row] == source[number] + 1).all()
            expected = "audio" in dataset.index[source[number]].present
            assert batch["present"]["audio"][row] == expected


def test_holding_out_goes_by_name_alone(dataset):
    train, val = hold_out(dataset, 0.3)
    sides = {entry.name: side for side in (train, val) for entry in side.index}
    assert len(train) + len(val) == len(sides) == COUNT
    assert abs(len(val) - 0.3 * COUNT) < 4 * math.sqrt(0.21 * COUNT)  # standard errors
    for side in (train, val):
        assert [side[i].name for i in range(len(side))] == [entry.name for entry in side.index]

    some = RecordSubset(dataset, [i for i in reversed(range(COUNT)) if i % 3])
    for part, side in zip(hold_out(some, 0.3), (train, val), strict=True):
        assert all(sides[entry.name] is side for entry in part.index)
    more = {entry.name for entry in hold_out(dataset, 0.5)[1].index}
    assert {entry.name for entry in val.index} < more


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_holding_out_nothing_or_everything_is_an_error(dataset, share):
    with pytest.raises(RecordError, match="of 41 records leaves .* name a validation set"):
        hold_out(dataset, share)
