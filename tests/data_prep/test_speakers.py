"""Speaker check: synchrony, tracks, verdicts, calibration; networks beside their authors' code."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.weights import torch_zip
from affectgpt_jax.weights.streaming import WeightsError
from data_prep.clips import Clip, ClipError
from data_prep.media import MediaError
from data_prep.speakers import __main__ as command
from data_prep.speakers import calibrate, check, mfcc, networks, tracks
from data_prep.speakers.rendered import rendered
from data_prep.speakers.synchrony import (
    NO_FACE,
    OFF_SCREEN,
    OTHER_SPEAKS,
    SILENT,
    SPEAKING,
    UNREADABLE,
    UNSURE,
    Judgement,
    TraceError,
    judge_traces,
    voiced_frames,
)
from data_prep.speakers.verdicts import read_speakers, write_speakers

SHARED = Path(__file__).parents[2].parent / "shared" / "asd"
NAMES = {"light-asd": "light_asd", "lr-asd": "lr_asd"}


# --- synchrony ------------------------------------------------------------------------------------


def speech(rng, frames=100):
    """Loudness 0 to 1 with syllables and a pause."""
    level = np.abs(np.sin(np.cumsum(rng.uniform(0.3, 0.9, frames))))
    pause = rng.integers(10, 70)
    level[pause : pause + 20] = 0
    return level


def energy(level):
    return 20 * np.log10(level + 0.003)


def traces(seed, own=True, delay=1):
    rng = np.random.default_rng(seed)
    heard = speech(rng)
    shown = np.roll(heard if own else speech(rng), delay)
    light = np.cumsum(rng.normal(0, 1, 100))
    mouth = 90 + light - 25 * shown + rng.normal(0, 2, 100)
    return mouth, energy(heard), 130 + light + rng.normal(0, 1, 100)


def test_a_mouth_that_moves_with_the_sound_speaks_and_another_does_not():
    found = {own: [] for own in (True, False)}
    for own in found:
        for seed in range(30):
            mouth, heard, upper = traces(seed, own)
            found[own].append(judge_traces(mouth, heard, upper=upper).verdict)
    assert found[True].count(SPEAKING) >= 29 and OFF_SCREEN not in found[True]
    assert found[False].count(OFF_SCREEN) >= 24 and SPEAKING not in found[False]


def test_a_mouth_that_opens_before_the_sound_by_more_than_speech_allows_is_no_match():
    mouth, heard, upper = traces(0, delay=1)
    assert judge_traces(mouth, heard, upper=upper).score > 0.6
    assert judge_traces(np.roll(mouth, 9), heard, upper=np.roll(upper, 9)).score < 0.5


def test_without_strong_evidence_the_verdict_is_unsure():
    mouth, heard, upper = traces(0, own=False)
    # Too short to know, with the mouth of another.
    assert judge_traces(mouth[:25], heard[:25], upper=upper[:25]).verdict == UNSURE
    # A weak match, as film has them.
    mouth, heard, upper = traces(0)
    noisy = mouth + np.random.default_rng(1).normal(0, 8, 100)
    found = judge_traces(noisy, heard, upper=upper)
    assert 0.3 < found.score < 0.45 and found.verdict == UNSURE
    # A picture that stands still.
    assert judge_traces(np.ones(100), heard).verdict == UNSURE


def test_silence_is_told_of_before_anything_is_compared():
    mouth, _, upper = traces(0)
    found = judge_traces(mouth, np.full(100, -60.0), upper=upper)
    assert found.verdict == SILENT and found.voiced_share == 0 and math.isnan(found.score)
    quiet = np.full(100, -60.0)
    quiet[50:54] = -20
    assert judge_traces(mouth, quiet).verdict == SILENT


@pytest.mark.parametrize("level", [-12, -30, -45])
def test_a_steady_sound_is_no_silence(level):
    # Music, noise, or a voice without pauses: nothing stands out, and nothing is dropped.
    mouth, _, upper = traces(0)
    steady = level + np.random.default_rng(0).normal(0, 1, 100)
    assert judge_traces(mouth, steady, upper=upper).verdict == UNSURE


def test_silence_is_judged_on_the_whole_clip_and_a_network_is_asked_about_steady_sound():
    mouth, heard, upper = traces(0)
    still = np.concatenate([np.full(100, -90.0), heard])
    track = tracks.Track(0, 1.0, mouth, upper, np.full((100, 112, 112), 110, np.uint8))
    seen = tracks.Seen(frames=200, faces=20, energy=still, tracks=[track])
    # This face is gone when the voice begins.
    assert check.Synchrony().judge([seen])[0][0].verdict == UNSURE

    seen = tracks.Seen(
        frames=100,
        faces=20,
        energy=np.full(100, -20.0),
        mfcc=np.zeros((400, 13), np.float32),
        tracks=[track],
    )
    network = check.NetworkDetector(Counting(), None, 1)
    found = network.judge([seen])[0][0]
    assert (found.verdict, found.active_share, found.voiced_share) == (SPEAKING, 1, 0)
    found = network.judge([dataclasses.replace(seen, energy=np.full(100, -80.0))])[0][0]
    assert found.verdict == SILENT


def test_voiced_frames_close_short_pauses_and_keep_long_ones():
    level = np.zeros(60)
    level[20:30] = level[33:40] = level[50:60] = 1
    expected = np.zeros(60, bool)
    expected[20:40] = expected[50:60] = True
    np.testing.assert_array_equal(voiced_frames(energy(level)), expected)


def test_traces_that_cannot_be_compared_are_refused():
    mouth, heard, _ = traces(0)
    with pytest.raises(TraceError, match="one value per frame"):
        judge_traces(mouth[:-1], heard)
    with pytest.raises(TraceError, match="50 values per second; expected 25"):
        judge_traces(mouth, heard, rate=50)
    with pytest.raises(TraceError, match="not finite"):
        judge_traces(mouth, np.where(np.arange(100) == 3, np.nan, heard))


# --- networks -------------------------------------------------------------------------------------


def test_mfcc_are_those_of_python_speech_features():
    time = np.arange(4000) / 16_000
    sound = 0.3 * np.sin(2 * np.pi * 200 * time) * np.linspace(1, 0, 4000)
    sound[2000:2600] = 0
    found = mfcc.mfcc(sound, 23)
    # The package's own answer for frames 0, 13 and 22 of these samples, rounded to 16 bits.
    np.testing.assert_allclose(found[[0, 13, 22]], np.array(MFCC), atol=2e-4)
    longer = mfcc.mfcc(sound, 30)
    np.testing.assert_array_equal(longer[:23], found)
    assert (longer[26:, 0] == np.float32(np.log(np.finfo(float).eps))).all()


MFCC = [
    [
        17.9071,
        23.1845,
        15.2652,
        10.8287,
        6.3331,
        0.7400,
        -4.1988,
        -9.6670,
        -13.7921,
        -17.0055,
        -18.1240,
        -18.2800,
        -17.0917,
    ],
    [
        -36.0437,
        0.0000,
        0.0000,
        0.0000,
        0.0000,
        0.0000,
        -0.0000,
        0.0000,
        0.0000,
        0.0000,
        0.0000,
        0.0000,
        0.0000,
    ],
    [
        12.8570,
        22.6427,
        15.0386,
        9.8985,
        5.6971,
        0.1573,
        -5.0992,
        -10.1547,
        -14.3412,
        -17.2501,
        -18.1483,
        -17.9745,
        -16.3830,
    ],
]


@pytest.fixture(scope="module", params=sorted(NAMES))
def published(request):
    """The name of a network, its weights, and what its authors' code answers."""
    path = SHARED / f"{NAMES[request.param]}_talkset.model"
    if not path.is_file():
        pytest.skip("the published speaker networks are not beside the checkout")
    return request.param, path, np.load(SHARED / f"{NAMES[request.param]}_golden.npz")


def test_a_network_answers_as_its_authors_code_and_padding_changes_nothing(published):
    name, path, golden = published
    network = networks.load(path, name)
    # One program for two lengths: the shorter clip is padded, with noise.
    mfccs, faces = np.zeros((2, 100, 13), np.float32), np.zeros((2, 25, 112, 112), np.float32)
    for row, frames in enumerate((25, 10)):
        rng = np.random.default_rng(frames)
        mfccs[row, : 4 * frames] = rng.standard_normal((4 * frames, 13)) * 8
        faces[row, :frames] = rng.integers(0, 256, (frames, 112, 112))
    mfccs[1, 40:], faces[1, 10:] = 5.0, 77.0
    found = network.logits(mfccs, faces, np.array([25, 10]))
    np.testing.assert_allclose(found[0], golden["logits_25"], atol=1e-4)
    np.testing.assert_allclose(found[1, :10], golden["logits_10"], atol=1e-4)


def test_a_file_of_another_network_is_refused_by_name(published, tmp_path):
    name, path, _ = published
    other = next(other for other in NAMES if other != name)
    with pytest.raises(WeightsError, match=f"lacks model.visualEncoder.*no file of {other}"):
        networks.load(path, other)
    tensors = {key: value.numpy() for key, value in torch_zip.load(path).items()}
    torch_zip.save(tmp_path / "more", tensors | {"model.more": np.zeros(3, np.float32)})
    with pytest.raises(WeightsError, match=f"tensors that {name} has not: 'model.more'"):
        networks.load(tmp_path / "more", name)
    cut = tensors | {"lossAV.FC.weight": np.zeros((2, 64), np.float32)}
    torch_zip.save(tmp_path / "cut", cut)
    with pytest.raises(WeightsError, match=r"lossAV.FC.weight has the shape \[2, 64\]"):
        networks.load(tmp_path / "cut", name)


class Counting:
    """A stand-in for a network: the score of a frame is its face's brightness less 100."""

    def __init__(self):
        self.calls = []

    def logits(self, mfccs, faces, lengths):
        self.calls.append((mfccs.shape, faces.shape, lengths.tolist()))
        score = faces.mean(axis=(2, 3)) - 100
        return np.stack([-score, score], axis=-1)


def test_tracks_are_scored_in_pieces_of_whole_seconds_and_smoothed():
    faces = np.full((40, 112, 112), 110, np.uint8)
    faces[20:] = 80
    network = Counting()
    found = check.score_tracks(network, [(np.zeros((160, 13), np.float32), faces)], (6, 1))[0]
    assert [call[1][1] for call in network.calls] == [25, 25, 50]
    assert [call[2] for call in network.calls] == [[25], [15], [40]]
    np.testing.assert_allclose(found[:18], 10)
    np.testing.assert_allclose(found[18:22], [4, -2, -8, -14], atol=1e-5)
    np.testing.assert_allclose(found[22:], -20)


def test_a_network_is_named_with_its_file():
    with pytest.raises(ClipError, match="expected synchrony, or one of light-asd=FILE, lr-asd"):
        check.load_detector("talknet=x")
    with pytest.raises(ClipError, match="expected synchrony"):
        check.load_detector("light-asd")
    with pytest.raises(ClipError, match="--passes 7: expected 1 to 6"):
        check.load_detector("light-asd=x", passes=7)


# --- tracks and verdicts --------------------------------------------------------------------------


def test_boxes_that_overlap_are_one_track_over_short_gaps():
    found = [[(10, 10, 40)], [(14, 10, 40), (200, 50, 80)], [], [(22, 10, 40), (205, 50, 80)]]
    (start, first), (later, second) = tracks.follow(found, 20)
    assert (start, len(first)) == (0, 20) and (later, len(second)) == (1, 19)
    np.testing.assert_allclose(first[8], [30 + 6.4, 30, 40], atol=2)
    # One glimpse is no track.
    assert tracks.follow([[(10, 10, 40)], [], [], [], []], 25) == []


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talking")
    return folder, rendered(folder, seed=1, count=3)


def judgement(verdict, score=0.0):
    return Judgement(verdict, score, 0.5, 0.5)


def test_the_largest_face_is_judged_and_another_may_be_the_speaker():
    seen = tracks.Seen(frames=50, faces=9, energy=np.zeros(50))
    found = [judgement(OFF_SCREEN), judgement(SPEAKING)]
    assert check.row_of("a", seen, found, "x")["verdict"] == OTHER_SPEAKS
    assert check.row_of("a", seen, found[:1], "x")["verdict"] == OFF_SCREEN
    assert check.row_of("a", seen, found[::-1], "x")["verdict"] == SPEAKING
    assert check.row_of("a", seen, [judgement(UNSURE), found[1]], "x")["verdict"] == UNSURE
    assert check.row_of("a", seen, [], "x")["verdict"] == NO_FACE
    row = check.row_of("a", tracks.Seen("no audio stream"), [], "x")
    assert (row["verdict"], row["reason"], row["network"]) == (UNREADABLE, "no audio stream", "x")


def test_rendered_clips_are_judged_alike_however_the_work_is_shared(talking, monkeypatch, tmp_path):
    folder, truth = talking
    (folder / "broken.mp4").write_bytes(b"no film")
    clips = [Clip(name, folder / f"{name}.mp4") for name in [*truth, "broken"]]
    monkeypatch.setattr(check, "BLOCK", 2)
    looked = []

    def in_order(function, jobs, *_, **__):
        return (looked.append(job) or function(job) for job in jobs)

    monkeypatch.setattr(check, "in_order", in_order)  # no processes
    whole = check.check_clips(clips, tmp_path / "whole" / "speakers.csv")
    for row in whole[:3]:
        expected = {True: [SPEAKING], False: [OFF_SCREEN, UNSURE]}[truth[row["name"]]]
        assert row["verdict"] in expected, row
    assert whole[3]["verdict"] == UNREADABLE and "not readable as media" in whole[3]["reason"]
    assert len(looked) == 4
    # Two shares, of which the second is stopped and goes on.
    shared = tmp_path / "shared" / "speakers.csv"
    assert check.check_clips(clips, shared, shard=(1, 2)) is None
    assert not shared.exists() and len(looked) == 6
    check.check_clips(clips, shared, shard=(0, 2))
    assert len(looked) == 8
    assert shared.read_bytes() == (tmp_path / "whole" / "speakers.csv").read_bytes()
    check.check_clips(clips, shared)
    assert len(looked) == 8
    rows = read_speakers(shared)
    assert list(rows) == [clip.name for clip in clips]
    assert {row["network"] for row in rows.values()} == {"synchrony"}
    # A file that goes away while it is read costs its own block alone.
    clips[0] = Clip("gone", Path(shutil.copy(clips[0].video, tmp_path / "gone.mp4")))

    def look(job):
        (tmp_path / "gone.mp4").unlink(missing_ok=True)
        return tracks.look(job)

    monkeypatch.setattr(check, "look", look)
    with pytest.raises(ClipError, match="changed while they were read; run the command again"):
        check.check_clips(clips, tmp_path / "gone" / "speakers.csv")
    assert len(looked) == 12
    rows = check.check_clips(clips, tmp_path / "gone" / "speakers.csv")
    assert len(looked) == 14 and rows[0]["reason"] == "no such file"


@pytest.mark.slow
def test_synchrony_is_right_on_rendered_clips_that_it_decides(tmp_path):
    truth = rendered(tmp_path / "clips", seed=0, count=40)
    clips = [Clip(name, tmp_path / "clips" / f"{name}.mp4") for name in truth]
    check.check_clips(clips, tmp_path / "speakers.csv", workers=2)
    found = calibrate.calibrate(read_speakers(tmp_path / "speakers.csv"), truth)
    assert found.right >= 0.95 * found.decided
    assert found.clips - found.decided <= 0.2 * found.clips


def test_pictures_come_at_even_times_and_long_videos_are_refused(talking):
    from data_prep import media

    folder, _ = talking
    path = folder / "talking-000.mp4"
    frames = media.frames_at(path, 25, lambda image: int(image.mean()), 1000)
    halves = media.frames_at(path, 50, lambda image: int(image.mean()), 1000)
    assert halves[::2] == frames and halves[1:-1:2] == frames[:-1]
    with pytest.raises(MediaError, match="longer than 1 s"):
        media.frames_at(path, 25, lambda image: 0, 25)


# --- files and calibration ------------------------------------------------------------------------


def test_verdicts_are_read_as_they_were_written_and_checked(tmp_path):
    path = tmp_path / "speakers.csv"
    rows = [
        {"name": "a", "verdict": SPEAKING, "score": 0.5, "faces": 3, "network": "synchrony"},
        {"name": "b", "verdict": SILENT, "score": math.nan, "network": "synchrony"},
    ]
    write_speakers(path, rows)
    found = read_speakers(path)
    assert found["a"]["score"] == "0.5000" and found["a"]["faces"] == "3"
    assert found["b"]["score"] == "" and found["b"]["verdict"] == SILENT
    text = path.read_text()
    for old, new, message in (
        ("silent", "quiet", "line 3: the verdict 'quiet' is none of speaking"),
        ("b,", "a,", "line 3: the clip 'a' has a row already"),
        ("0.5000", "half", "line 2: expected a number as score, found 'half'"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ReadError, match=message):
            read_speakers(path)


def test_calibration_counts_what_is_decided_and_finds_equal_error(tmp_path):
    verdicts = {"a": SPEAKING, "b": SPEAKING, "c": OFF_SCREEN, "d": UNSURE, "e": OFF_SCREEN}
    scores = {"a": "0.9", "b": "0.4", "c": "0.1", "d": "0.35", "e": "0.5"}
    rows = {n: {"verdict": v, "score": scores[n], "network": "x"} for n, v in verdicts.items()}
    truth_file = tmp_path / "truth.csv"
    truth_file.write_text("name,speaking\na,1\nb,0\nc,0\nd,1\ne,1\nf,1\n")
    found = calibrate.calibrate(rows, calibrate.read_truth(truth_file))
    assert (found.clips, found.decided, found.right, found.without) == (5, 4, 2, ["f"])
    assert (found.kept, found.dropped_right) == (pytest.approx(2 / 3), 0.5)
    assert found.auc == pytest.approx(5 / 6)
    assert (found.error, found.threshold) == (pytest.approx(1 / 3), pytest.approx(0.45))
    assert "it does not reach the paper's 90 %" in calibrate.lines(found)[2]
    assert "at 0.450, for information: what can be set is --share" in calibrate.lines(found)[4]
    assert calibrate.wilson(9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    truth_file.write_text("name,speaking\na,yes\n")
    with pytest.raises(ReadError, match="line 2: expected 0 or 1"):
        calibrate.read_truth(truth_file)
    with pytest.raises(ReadError, match="none of the labelled clips 'z'"):
        calibrate.calibrate(rows, {"z": True})


def test_the_command_calibrates(tmp_path, capsys):
    write_speakers(
        tmp_path / "v.csv",
        [{"name": "a", "verdict": SPEAKING, "score": 0.5, "network": "synchrony"}],
    )
    (tmp_path / "t.csv").write_text("name,speaking\na,1\n")
    command.main(["calibrate", f"--verdicts={tmp_path / 'v.csv'}", f"--truth={tmp_path / 't.csv'}"])
    said = capsys.readouterr().out
    assert "synchrony on 1 labelled clips" in said and "for information: nothing is to be" in said
