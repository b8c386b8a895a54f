import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

import affectgpt_jax
from affectgpt_jax.data import demo
from affectgpt_jax.data.demo import CONFLICT, CUE_TABLES, CUES, EMOTIONS, Clips, World
from affectgpt_jax.data.modalities import INPUT_MODES
from affectgpt_jax.data.prompts import LABEL_TYPES, load_prompts
from affectgpt_jax.data.records import RecordDataset, RecordSubset, decode, encode
from affectgpt_jax.data.tokenizer import Tokenizer

SEEDS = (0, 1, 2)
TINY_BASE = Path(affectgpt_jax.__file__).parent / "assets" / "tiny_base"


@pytest.fixture(scope="module", params=SEEDS)
def test_split(request) -> tuple[Clips, dict[str, np.ndarray]]:
    world = World(request.param)
    return world.clips("test"), world.evidence("test", features=tuple(demo.SHAPES))


def first(clips: Clips, n: int) -> Clips:
    return Clips(
        clips.emotion[:n],
        {m: values[:n] for m, values in clips.cues.items()},
        {m: values[:n] for m, values in clips.present.items()},
        clips.subtitles[:n],
        clips.labels[:n],
        clips.conflict[:n],
    )


def assert_share(found: np.ndarray, expected: float) -> None:
    """Within 4 standard errors of a share: one false alarm in 16,000."""
    error = math.sqrt(expected * (1 - expected) / found.size)
    assert abs(found.mean() - expected) < 4 * error, (found.mean(), expected, error)


@pytest.mark.parametrize("modality", CUES)
def test_cue_tables_are_distributions(modality):
    table = CUE_TABLES[modality]
    assert len(table) == len(EMOTIONS) == len(set(EMOTIONS)) >= 24
    assert (table >= 0).all()
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-12)


def test_posterior_is_a_sum_over_every_emotion_and_conflict():
    rng = np.random.default_rng(0)
    evidence = {m: rng.random((2, CUE_TABLES[m].shape[1])) for m in CUES}
    for size in (1, 2, 3):
        for seen in itertools.combinations(CUES, size):
            found = demo.posterior(evidence, seen)
            for n in range(2):
                expected = slow_posterior({m: evidence[m][n] for m in seen})
                np.testing.assert_allclose(found[n], expected, rtol=1e-12)


def slow_posterior(evidence: dict[str, np.ndarray]) -> np.ndarray:
    """Bayes' rule term by term: one conflicting modality or none, caused by any emotion."""
    emotions = range(len(EMOTIONS))
    likelihood = {
        m: [float(CUE_TABLES[m][cause] @ evidence[m]) for cause in emotions] for m in evidence
    }
    joint = np.zeros(len(EMOTIONS))
    for emotion in emotions:
        joint[emotion] += (1 - CONFLICT) * math.prod(likelihood[m][emotion] for m in evidence)
        for conflicting, other in itertools.product(CUES, emotions):
            joint[emotion] += (CONFLICT / 3 / len(EMOTIONS)) * math.prod(
                likelihood[m][other if m == conflicting else emotion] for m in evidence
            )
    return joint / joint.sum()


@pytest.mark.parametrize("name", demo.SHAPES)
def test_feature_evidence_is_the_gaussian_density_of_all_frames(name):
    """Against the dense covariance of two whole frames, which knows nothing of means."""
    world, frames = World(3), 2
    clips = world.clips("val", 6)
    features = [f[name][:frames] for f in world.features(clips, "val", [name]) if f]
    # Close to the mean no cue is so unlikely that its density underflows.
    offset = world.offset[name].astype(np.float64)
    values = offset + 0.1 * (np.stack(features) - offset)
    basis = world.nuisance[name].astype(np.float64)
    nuisance = demo.NUISANCE_STD**2 * basis.T @ basis
    covariance = np.kron(np.ones((frames, frames)), nuisance)
    covariance += demo.NOISE**2 * np.eye(len(covariance))
    centres = np.tile(offset + world.directions[name], (1, frames))
    residual = values.reshape(len(values), 1, -1) - centres  # [N, cues, T d]
    solved = np.linalg.solve(covariance, residual.reshape(-1, len(covariance)).T).T
    expected = -0.5 * (residual * solved.reshape(residual.shape)).sum(axis=-1)
    found = np.log(world.feature_evidence(name, values))
    # Both up to a term per clip. The nuisance basis is orthonormal to float32 rounding, which the
    # closed form takes as exact: 1e-7 of squared distances of up to 1e3.
    np.testing.assert_allclose(
        found - found.max(axis=1, keepdims=True),
        expected - expected.max(axis=1, keepdims=True),
        atol=1e-3,
    )


def test_every_modality_is_needed_for_the_best_score(test_split):
    found = demo.ceilings(test_split[1])
    best = found["multi_audio_face_text"]
    for mode in ("face", "audio", "text"):
        assert found[mode] <= 0.5 * best
    assert found["audio_face"] <= 0.95 * best
    assert found["face_text"] <= 0.8 * best
    assert found["audio_text"] <= 0.8 * best


def test_a_frame_shows_less_than_a_face_and_adds_nothing_to_it(test_split):
    found = demo.ceilings(test_split[1])
    assert set(found) == set(INPUT_MODES)
    assert found["frame"] < found["face"]
    assert found["multi_audio_frame_text"] < 0.9 * found["multi_audio_face_text"]
    # A frame is drawn from the face's own cue. What little it adds is where noise hid the face.
    both = found["audio_face_frame_text"]
    assert both == pytest.approx(found["audio_face_text"], abs=1e-3)
    # A portrait has the face's cue in fewer vectors: noise hides hardly more of it.
    assert found["image"] == pytest.approx(found["face"], abs=1e-2)
    for mode, value in found.items():
        plain = INPUT_MODES[mode].without_pre_fusion().name
        if mode != "multi_text":  # its pre-fused token is all there is
            assert found[plain] == value


@pytest.mark.parametrize("mode", INPUT_MODES)
def test_the_bayes_predictor_reaches_its_ceiling_on_drawn_clips(test_split, mode):
    clips, evidence = test_split
    belief = demo.posterior(evidence, demo.seen_by(INPUT_MODES[mode]))
    best = belief.max(axis=1)
    hit = belief.argmax(axis=1) == clips.emotion
    error = math.sqrt((best * (1 - best)).sum()) / len(clips)
    assert abs(hit.mean() - demo.ceilings(evidence)[mode]) < 3 * error


def test_absence_and_conflict_are_as_frequent_as_stated():
    clips = demo.draw_clips(np.random.default_rng(0), 60_000)
    for modality in CUES:
        assert_share(~clips.present[modality], demo.ABSENT)
    # A face is never read two levels off, so where it stands there, another emotion caused it.
    levels, columns = len(demo.FACE_CUES), len(demo.VOICE_CUES)
    valence = np.arange(len(EMOTIONS)) // columns
    shown = np.repeat(np.arange(levels), 2)
    far = abs(shown[None] - valence[:, None]) >= 2  # [emotion, cue]
    assert not CUE_TABLES["face"][far].any()
    # And that is said, for the modalities that are there.
    torn = np.array([word == "face" for word in clips.conflict])
    assert torn[far[clips.emotion, clips.cues["face"]] & clips.present["face"]].all()
    marked = np.array([bool(word) for word in clips.conflict])
    assert_share(marked, CONFLICT * (1 - demo.ABSENT) * (1 - 1 / len(EMOTIONS)))
    given_conflict = (far @ CUE_TABLES["face"].T).mean()
    assert_share(far[clips.emotion, clips.cues["face"]], CONFLICT / 3 * given_conflict)


def test_a_second_label_is_the_neighbour_in_valence_at_the_same_arousal():
    clips = demo.draw_clips(np.random.default_rng(1), 5000)
    place = {word: divmod(i, len(demo.VOICE_CUES)) for i, word in enumerate(EMOTIONS)}
    for emotion, labels in zip(clips.emotion, clips.labels, strict=True):
        assert labels[0] == EMOTIONS[emotion]
        for other in labels[1:]:
            (row, column), (near, same) = place[labels[0]], place[other]
            assert (abs(row - near), column - same) == (1, 0)
    assert_share(np.array([len(labels) == 2 for labels in clips.labels]), demo.COMPANION)


def test_a_seed_draws_the_same_records_again():
    once, again = (list(World(7).records("val", 12)) for _ in range(2))
    assert [encode(record) for record in once] == [encode(record) for record in again]


def test_the_features_of_a_clip_do_not_depend_on_how_many_are_drawn():
    world = World(7)
    clips = world.clips("val", 12)
    few = list(world.features(first(clips, 5), "val"))
    many = list(world.features(clips, "val"))
    assert len(few) == 5
    for a, b in zip(few, many, strict=False):
        assert a.keys() == b.keys()
        for modality, values in a.items():
            assert values.tobytes() == b[modality].tobytes()


def test_splits_and_seeds_draw_different_clips_and_noise():
    drawn = {}
    for seed, split in itertools.product((0, 1), demo.SIZES):
        world = World(seed)
        clips = world.clips(split, 20)
        features = next(f for f in world.features(clips, split) if "face" in f)["face"]
        # Between two frames of a clip, only noise differs.
        drawn[seed, split] = clips.subtitles, (features[0] - features[1])[:9].round(1).tolist()
    for a, b in itertools.combinations(drawn.values(), 2):
        assert a[0] != b[0]
        assert a[1] != b[1]


def test_seeds_change_the_appearance_of_cues_but_not_their_meaning():
    worlds = [World(0), World(1)]
    clips = worlds[0].clips("val", 200)
    here = clips.present["face"]
    cues = clips.cues["face"][here]
    drawn = [f["face"] for f in worlds[0].features(clips, "val") if "face" in f]
    own, foreign = (w.feature_evidence("face", np.stack(drawn)).argmax(axis=1) for w in worlds)
    assert (own == cues).mean() > 0.99
    assert (foreign == cues).mean() < 0.3  # one in twelve by chance

    columns, levels = len(demo.VOICE_CUES), len(demo.FACE_CUES)
    share = demo.FACE_OWN * (1 - CONFLICT / 3) + CONFLICT / 3 / levels
    for world in worlds:
        clips = world.clips("train")
        assert_share(clips.cues["face"] // 2 == clips.emotion // columns, share)


def test_a_feature_does_not_depend_on_which_others_are_drawn():
    world = World(7)
    clips = world.clips("val", 12)
    every = list(world.features(clips, "val", tuple(demo.SHAPES)))
    whole = max(every, key=len)
    assert {name: values.shape for name, values in whole.items()} == demo.SHAPES
    for name in demo.SHAPES:
        for alone, among in zip(world.features(clips, "val", [name]), every, strict=True):
            assert (name in alone) == (name in among)
            if alone:
                assert alone[name].tobytes() == among[name].tobytes()


@pytest.mark.parametrize("label_type", LABEL_TYPES)
def test_records_serve_every_label_type(label_type):
    prompts = load_prompts("compact")
    answers = set()
    for record in World(0).records("val", 40):
        prompts.question(label_type, record)
        answers.add(prompts.answer(label_type, record))
        a1, a2 = record.alternatives
        own = {"a1": a1, "a2": a2, "same": a1}[record.preferred]
        assert own == record.description
        assert (a1 == a2) == (record.preferred == "same")
    assert len(answers) > 1


def test_records_tell_what_was_drawn():
    world = World(0)
    clips = world.clips("train", 60)
    records = list(world.records("train", 60))
    assert len({record.name for record in records}) == 60
    for i, record in enumerate(records):
        assert decode(encode(record)).name == record.name
        assert record.emotion == record.labels[0] == EMOTIONS[clips.emotion[i]]
        assert record.features.keys() == {m for m in ("face", "audio") if clips.present[m][i]}
        assert bool(record.subtitle) == clips.present["text"][i]
        seen, heard = (
            words[clips.cues[m][i]] if clips.present[m][i] else "nothing"
            for m, words in (("face", demo.FACE_WORDS), ("audio", demo.VOICE_WORDS))
        )
        assert f"shows {seen} and the voice gives {heard}." in record.description
        assert record.description.endswith(f" {record.emotion}.")
        for modality, values in record.features.items():
            assert values.shape == demo.SHAPES[modality]
    valence = {record.emotion: record.valence for record in records}
    assert min(valence.values()) == -1
    assert max(valence.values()) == 1
    assert valence["furious"] < valence["worried"] < valence["calm"] < valence["joyful"]


@pytest.mark.parametrize(
    ("place", "seed"), [("demo", 5), ("demo:3", 3), ("demo:", None), ("demo:x", None), ("a", None)]
)
def test_a_source_names_a_world_or_none(place, seed):
    assert demo.world_seed(place, 5) == seed


def test_the_demo_world_knows_the_ceiling_of_a_mode_beside_the_main_ones(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.SIZES, "test", 64)
    first, second = (demo.materialize(tmp_path / str(seed), seed, "test") for seed in SEEDS[:2])
    found = first.ceilings("multi_audio_frame_text")
    assert list(found) == [*demo.MAIN_CEILINGS, "multi_audio_frame_text"]
    assert found != second.ceilings("multi_audio_frame_text")
    assert list(first.ceilings("face")) == list(demo.MAIN_CEILINGS)
    evidence = World(SEEDS[0]).evidence("test", 64)
    assert first.ceilings("face") == {
        name: demo.ceilings(evidence)[name] for name in demo.MAIN_CEILINGS
    }
    # Part of a test set is compared with the whole's; real records know none.
    assert RecordSubset(first, [3]).ceilings("face") == first.ceilings("face")
    assert RecordDataset(tmp_path / str(SEEDS[0])).ceilings("face") == {}


def test_materialize_writes_once_and_then_reuses(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.SIZES, "val", 6)
    said = []
    dataset = demo.materialize(tmp_path / "val", 5, "val", said.append)
    dataset.verify()
    assert [encode(r) for r in dataset] == [encode(r) for r in World(5).records("val")]
    assert len(said) == 1
    assert "6 generated clips" in said[0]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "val").iterdir()}
    demo.materialize(tmp_path / "val", 5, "val", said.append)
    assert len(said) == 1
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "val").iterdir()}


def test_cue_and_emotion_words_are_single_tokens_of_the_tiny_base():
    tokenizer = Tokenizer(TINY_BASE)
    words = [*demo.FACE_WORDS, *demo.VOICE_WORDS, *EMOTIONS]
    pieces = dict(zip(words, tokenizer.encode([f" {word}" for word in words]), strict=True))
    assert {word: len(ids) for word, ids in pieces.items()} == dict.fromkeys(words, 1)
    assert len({int(ids[0]) for ids in pieces.values()}) == len(words)


def test_an_absent_modality_says_nothing():
    clips = World(0).clips("val", 200)
    nothing = {m: np.zeros(200, bool) for m in CUES}
    evidence = demo.word_evidence(dataclasses.replace(clips, present=nothing))
    np.testing.assert_allclose(demo.posterior(evidence, CUES), 1 / len(EMOTIONS))
    assert demo.ceiling(evidence, CUES) == pytest.approx(1 / len(EMOTIONS))
