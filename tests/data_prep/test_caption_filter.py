import dataclasses
import json

import numpy as np
import pytest

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.tables import write_csv
from affectgpt_jax.data.records import EXTRACTION, Record, RecordDataset, write_records
from affectgpt_jax.evaluation.lexicon import load_lexicon
from data_prep.caption import filtering
from data_prep.caption.__main__ import main
from data_prep.caption.describe import Described, write_described
from data_prep.caption.filtering import DROPPED, NOT_JUDGED, PASSED, Labelled
from data_prep.caption.labels import COLUMNS, description_sha256
from data_prep.caption.lengths import fit_cuts, measure
from data_prep.caption.settings import read_settings
from data_prep.clips import find_clips, read_clip_rows
from data_prep.contents import read_seconds
from data_prep.crowd.votes import Vote, write_votes
from data_prep.report import read_elsewhere
from data_prep.speakers.verdicts import write_speakers

LEXICON = load_lexicon()


def described(text="words " * 40, finish="stop", why="", name="a"):
    return Described(
        name=name,
        reply=text,
        finish=finish,
        why=why,
        tokens=0,
        model="m",
        prompt_sha256="",
        media_sha256="",
    )


def vote(emotion="happy", sentiment="positive", votes=3, name="a"):
    return Vote(name, emotion, votes, 3, 0.9, sentiment, votes, 3, 0.5, 0.1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return read_settings(tmp_path_factory.mktemp("settings"))


def labelled(*labels, sentiment="positive"):
    return Labelled(labels, sentiment, "")


# --- lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She smiles a little", (4, "words")),
        ("\u5979\u5fae\u7b11\u4e86 OK", (6, "characters")),
        ("", (0, "words")),
        ("123 !?", (2, "words")),
    ],
)
def test_lengths_are_words_or_characters(text, expected):
    assert measure(text) == expected


def test_cuts_are_those_of_the_normal_part():
    rng = np.random.default_rng(0)
    normal = rng.normal(60, 8, 4000).round().astype(int)
    failed, rambling = rng.integers(2, 12, 400), rng.integers(180, 220, 200)
    lengths = np.concatenate([normal, failed, rambling])
    cut = fit_cuts(["word " * n for n in lengths], tails=2.5)["words"]
    # A mean and a standard deviation of all would be 60 +- 34.
    assert abs(cut.mean - 60) < 1.5 and abs(cut.deviation - 8) < 2
    inside = (lengths >= cut.low) & (lengths <= cut.high)
    assert inside[:4000].mean() > 0.97 and not inside[4000:].any()


def test_a_script_of_few_texts_has_no_cuts_of_its_own():
    chinese = ["\u4ed6" * (40 + i % 9) for i in range(200)]
    few = ["No.", "I am sorry, there is nothing to see.", "The man and the woman " * 80] * 5
    cuts = fit_cuts([*chinese, *few], tails=2.5)
    assert list(cuts) == ["characters"]
    for text in few:
        found = filtering.judge_length(described(text), cuts)
        assert (found.outcome, found.why) == (DROPPED, "in words, as 15 of 215 descriptions only")
    assert filtering.judge_length(described(chinese[0]), cuts).outcome == PASSED
    # A data set in two languages has cuts for both, and a small one in one for that.
    both = fit_cuts([*chinese, *(["word " * 40] * 30)], tails=2.5)
    assert list(both) == ["characters", "words"]
    assert list(fit_cuts(["word " * 40] * 3, tails=2.5)) == ["words"]


# --- tests of a clip ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "labels", "outcome", "why"),
    [
        (described(), labelled("happy"), PASSED, ""),
        (None, None, NOT_JUDGED, "no description"),
        (described("", "unreadable", "no video stream"), None, DROPPED, "no video stream"),
        (described(""), None, DROPPED, "the reply is empty"),
        (described(finish="length"), labelled("happy"), DROPPED, "cut off"),
        (described("I cannot identify any emotion."), labelled(), DROPPED, "refusal"),
        # What says more than that is none.
        (described("I cannot identify his emotion, she is sad."), labelled("sad"), PASSED, ""),
    ],
)  # fmt: skip
def test_failed_replies_are_dropped(line, labels, outcome, why):
    found = filtering.judge_reply(line, labels)
    assert found.outcome == outcome and why in found.why


@pytest.mark.parametrize(
    ("labels", "word", "agree", "outcome"),
    [
        (("joyful",), "happy", "all", PASSED),
        (("furious",), "happy", "any", DROPPED),
        (("sad", "joyful"), "happy", "all", PASSED),
        (("disappointed",), "sad", "majority", PASSED),
        (("disappointed",), "sad", "all", DROPPED),
        (("grateful",), "happy", "majority", DROPPED),
        (("grateful",), "happy", "any", PASSED),
        ((), "happy", "any", DROPPED),
        ((), "neutral", "all", PASSED),
        (("neutral", "happy"), "neutral", "all", PASSED),
        (("happy",), "neutral", "any", DROPPED),
        (("blorf",), "happy", "any", NOT_JUDGED),
        (("happy",), "", "any", NOT_JUDGED),
    ],
)
def test_labels_agree_with_the_crowd_on_wheels(labels, word, agree, outcome, settings):
    crowd = dataclasses.replace(settings.crowd, agree=agree)
    changed = dataclasses.replace(settings, crowd=crowd)
    found = filtering.judge_emotion(labelled(*labels), vote(word), changed, LEXICON)
    assert found.outcome == outcome, found


def test_few_votes_and_other_sentiments_are_dropped(settings):
    crowd = dataclasses.replace(settings.crowd, least_votes=2)
    strict = dataclasses.replace(settings, crowd=crowd)
    joyful = labelled("joyful")
    assert filtering.judge_emotion(joyful, vote(votes=1), strict, LEXICON).outcome == DROPPED
    assert filtering.judge_sentiment(joyful, vote(votes=1), strict).outcome == DROPPED
    assert filtering.judge_sentiment(joyful, vote(), settings).outcome == PASSED
    found = filtering.judge_sentiment(joyful, vote(sentiment="neutral"), settings)
    assert found.outcome == DROPPED and "the description is positive" in found.why
    assert filtering.judge_sentiment(None, vote(), settings).outcome == NOT_JUDGED


def test_what_was_not_read_is_not_judged(settings):
    for unread, word, emotion in (
        (Labelled((), "neutral", "Hm?"), "neutral", NOT_JUDGED),
        (Labelled((), "neutral", "Hm?"), "happy", NOT_JUDGED),
        (Labelled(("joyful",), "neutral", "Hm?"), "happy", PASSED),
        (Labelled(("joyful",), "neutral", "Hm?"), "neutral", NOT_JUDGED),
        (Labelled(("neutral",), "neutral", "Hm?"), "neutral", PASSED),
    ):
        found = filtering.judge_emotion(unread, vote(word), settings, LEXICON)
        assert found.outcome == emotion, found
        found = filtering.judge_sentiment(unread, vote(word, "neutral"), settings)
        assert found.outcome == NOT_JUDGED
        assert found.why == "the reply about labels could not be read"


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [("speaking", PASSED), ("unsure", PASSED), ("off_screen", DROPPED), ("no_face", DROPPED)],
)
def test_verdicts_drop_on_evidence_only(verdict, outcome, settings):
    row = {"verdict": verdict, "network": "synchrony"}
    assert filtering.judge_speaker(row, settings.speakers.drop).outcome == outcome


# --- the whole of it ----------------------------------------------------------------------------

NAMES = [f"clip{i:02d}" for i in range(24)]


@pytest.fixture
def data_set(tmp_path):
    """A data set of 24 clips: the last one has no vote, clip01 failed, clip02 is off screen,
    clip03 is said to be sad, clip04 is positive against the crowd's negative."""
    out = tmp_path / "set"
    texts = {name: "word " * (40 + i % 5) + "happy" for i, name in enumerate(NAMES)}
    texts["clip01"] = "No."
    lines = [described(text, name=name) for name, text in texts.items()]
    write_described(out / "descriptions.jsonl", lines)
    labels = {
        name: {
            "labels": "[happy]",
            "sentiment": "positive",
            "unparsed": "",
            "description_sha256": description_sha256(texts[name]),
        }
        for name in NAMES
    }
    labels["clip01"]["labels"], labels["clip03"]["labels"] = "[]", "[sad]"
    rows = [{"name": name} | row for name, row in labels.items()]
    write_csv(out / "labels.csv", COLUMNS, rows)
    write_speakers(
        out / "speakers.csv",
        [
            {
                "name": name,
                "verdict": "off_screen" if name == "clip02" else "speaking",
                "network": "synchrony",
            }
            for name in NAMES
        ],
    )
    votes = [vote(name=name, sentiment="negative" if name == "clip04" else "positive")
             for name in NAMES[:-1]]  # fmt: skip
    write_votes(out / "votes.csv", votes)
    write_csv(tmp_path / "clips.csv", ("name", "subtitle"), [{"name": n} for n in NAMES])
    return out


def run(data_set, *arguments):
    main(["filter", f"--out={data_set}", f"--csv={data_set.parent / 'clips.csv'}", *arguments])


def contents(*folders):
    return {f: f.read_bytes() for folder in folders for f in folder.rglob("*") if f.is_file()}


def test_every_clip_has_a_row_and_every_loss_a_reason(data_set, capsys):
    run(data_set)
    rows = (data_set / "filtered.csv").read_text().splitlines()
    assert rows[0].startswith("name,kept,reply,reply_value,reply_why,length,") and len(rows) == 25
    kept = [row.split(",")[0] for row in rows[1:] if row.split(",")[1] == "yes"]
    assert kept == [NAMES[0], *NAMES[5:-1]]
    report = json.loads((data_set / "funnel.json").read_text())
    stages = {stage["test"]: stage for stage in report["funnel"]}
    assert [s["clips"] for s in report["funnel"]] == [24, 24, 23, 22, 20, 19, 19]
    assert report["funnel"][-1] == {
        "test": "trained on", "clips": 19, "labels": 1, "dropped": 0, "not_judged": 0, "reasons": {}
    }  # fmt: skip
    assert stages["emotion"]["dropped"] == 1 and stages["emotion"]["not_judged"] == 1
    assert stages["emotion"]["reasons"] == {
        "the crowd says happy": 1,
        "the crowd did not vote": 1,
    }
    assert "the crowd did not vote" in capsys.readouterr().out
    assert (data_set / "funnel.png").read_bytes()[:4] == b"\x89PNG"
    plus = (data_set / "plus.csv").read_text().splitlines()
    assert plus[0] == "name,subtitle,labels,description" and len(plus) == 20
    assert plus[1].startswith("clip00,,[happy],word word")


def test_levels_can_be_combined_in_any_way(data_set, capsys):
    kept = {}
    for levels in ("none", "low", "emotion", "sentiment", "sentiment,low"):
        to = data_set / levels.replace(",", "-")
        run(data_set, f"--levels={levels}", f"--to={to}")
        kept[levels] = json.loads((to / "funnel.json").read_text())["funnel"][-2]["clips"]
    assert kept == {"none": 24, "low": 22, "emotion": 21, "sentiment": 22, "sentiment,low": 20}
    # What failed teaches nothing, and is said to be left out.
    assert len((data_set / "none" / "plus.csv").read_text().splitlines()) == 1 + 23
    said = capsys.readouterr().out
    assert "kept, but without a label to train on: 1: 'clip01'" in said
    assert "\n    1: without a label\n" in said
    stage = json.loads((data_set / "none" / "funnel.json").read_text())["funnel"][-1]
    assert (stage["test"], stage["clips"], stage["dropped"]) == ("trained on", 23, 1)


def test_what_names_no_emotion_and_is_neutral_to_the_crowd_is_trained_on_as_neutral(data_set):
    text = (data_set / "descriptions.jsonl").read_text()
    changed = text.replace("word happy", "word there", 1)  # clip00
    lines = [json.loads(line) for line in changed.splitlines()]
    lines[5]["reply"] = "I cannot identify any emotion."
    write_described(data_set / "descriptions.jsonl", lines)
    main(["labels", f"--out={data_set}"])
    votes = [vote(name=n) for n in NAMES]
    for i in (0, 5):
        votes[i] = vote("neutral", "neutral", name=NAMES[i])
    write_votes(data_set / "votes.csv", votes)
    run(data_set, "--levels=emotion")
    rows = read_clip_rows(data_set / "plus.csv")
    assert rows[NAMES[0]]["labels"] == "[neutral]" and rows[NAMES[6]]["labels"] == "[happy]"
    stage = json.loads((data_set / "funnel.json").read_text())["funnel"][-1]
    assert NAMES[5] not in rows and stage["reasons"] == {"without a label": 1}
    assert stage["labels"] == 2
    main(["card", f"--out={data_set}", f"--csv={data_set.parent / 'clips.csv'}"])
    # What the crowd has not been asked about is not neutral.
    run(data_set, "--levels=none")
    assert NAMES[0] not in read_clip_rows(data_set / "plus.csv")


def test_the_training_set_names_the_files_of_the_clips_wherever_it_is_written(data_set, tmp_path):
    (tmp_path / "media").mkdir()
    for name in NAMES:
        (tmp_path / "media" / f"{name}.mp4").touch()
    deep = tmp_path / "disk" / "deep" / "set"
    deep.parent.mkdir(parents=True)
    data_set.rename(deep)
    data_set.symlink_to(deep)
    cells = [["name", "video", "audio"], *([n, f"media/{n}.mp4", ""] for n in NAMES)]
    cells[1][1:] = "", f"{tmp_path}/media/{NAMES[0]}.mp4"
    (tmp_path / "clips.csv").write_text("".join(",".join(row) + "\n" for row in cells))
    for to in (data_set, tmp_path / "elsewhere", tmp_path):
        run(data_set, f"--to={to}")
        clips = find_clips([], to / "plus.csv").clips
        assert len(clips) == 19 and all(clip.sound.is_file() for clip in clips)
    rows = read_clip_rows(tmp_path / "plus.csv")
    assert rows[NAMES[5]]["video"] == f"media/{NAMES[5]}.mp4" and not rows[NAMES[5]]["audio"]
    main(["card", f"--out={data_set}", f"--csv={tmp_path / 'clips.csv'}"])


def test_records_of_what_is_kept_have_the_new_annotations(data_set, tmp_path, capsys):
    source = tmp_path / "records"
    features = {"face": np.ones((2, 3), np.float16)}
    records = [Record(name=name, features=features, subtitle="hm") for name in NAMES[:-2]]
    write_records(source, records, encoders={"face": "e"})
    to = tmp_path / "plus"
    run(data_set, f"--records={source}", f"--write={to}")
    found = RecordDataset(to)
    assert [entry.name for entry in found.index] == [NAMES[0], *NAMES[5:-2]]
    first = found[0]
    assert first.labels == ("happy",) and first.description.endswith("happy")
    assert first.subtitle == "hm" and found.manifest.features["face"]["encoder"] == "e"
    assert "without a record: 1: 'clip22'" in capsys.readouterr().out


def test_records_of_what_is_kept_say_how_they_were_extracted(data_set, tmp_path, capsys):
    source, to = tmp_path / "records", tmp_path / "plus"
    face = {"face": np.ones((2, 3), np.float16)}
    records = [Record(name=n, features={} if n == "clip07" else face, subtitle="hm") for n in NAMES]
    how = {"version": 2, "encoders": {"video": {"name": "clip", "sha256": "x"}}}
    extra = {EXTRACTION: how | {"face arrays": 23}, "note": "mine"}
    write_records(source, records, encoders={"face": "clip"}, extra=extra)
    lines = "".join(f"{n},ok,2.5,h{n}\n" for n in NAMES)
    (source / "extraction.csv").write_text(f"name,status,seconds,sha256\n{lines}")
    (source / ".blocks").mkdir()
    (source / ".blocks" / "encoders.json").write_text('{"video": "/models/clip"}')
    run(data_set, f"--records={source}", f"--write={to}")
    found = RecordDataset(to)
    made = found.manifest.extra.pop("made of")
    assert made.keys() == {"source", "plus"}
    assert found.manifest.extra == {EXTRACTION: how | {"face arrays": 18}, "note": "mine"}
    assert len(found) == 19
    elsewhere = read_elsewhere([to])
    assert set(elsewhere.names) == {entry.name for entry in found.index}
    assert read_seconds(to) == dict.fromkeys(elsewhere.names, 2.5)
    assert (to / ".blocks" / "encoders.json").read_text() == '{"video": "/models/clip"}'
    # Run again, all stays as it is.
    written = contents(to, data_set)
    capsys.readouterr()
    run(data_set, f"--records={source}", f"--write={to}")
    assert f"{to}: 19 records, which were there" in capsys.readouterr().out
    assert contents(to, data_set) == written

    # Others are not touched, and nothing is written.
    def refused(*flags):
        with pytest.raises(SystemExit, match="plus already holds other records; delete it"):
            run(data_set, *flags, f"--records={source}", f"--write={to}")
        assert contents(to, data_set) == written

    refused("--levels=none")
    (source / "manifest.json").unlink()
    write_records(source, records[::-1], encoders={"face": "clip"}, extra=extra)
    refused()


def test_labels_of_other_descriptions_are_refused(data_set):
    path = data_set / "descriptions.jsonl"
    path.write_text(path.read_text().replace("No.", "Yes."))
    told = "labels.csv is of other descriptions of 1 clips: 'clip01'; run `affectgpt caption labels"
    with pytest.raises(SystemExit, match=told):
        run(data_set)
    main(["labels", f"--out={data_set}"])
    run(data_set)


@pytest.mark.parametrize(
    ("file", "levels", "told"),
    [
        ("votes.csv", "emotion", "votes.csv is missing, which the level emotion needs; run .*vote"),
        ("speakers.csv", "low", "speakers.csv is missing"),
        ("labels.csv", "none", "labels.csv is missing, which a training set needs"),
    ],
)
def test_a_stage_that_has_not_run_is_named(file, levels, told, data_set):
    (data_set / file).unlink()
    with pytest.raises(SystemExit, match=told):
        run(data_set, f"--levels={levels}")


def test_a_stage_of_other_clips_is_refused(data_set):
    text = (data_set / "votes.csv").read_text()
    (data_set / "votes.csv").write_text(text.replace("clip", "film"))
    with pytest.raises(SystemExit, match="votes.csv has none of the 24 clips: it names 'film00'"):
        run(data_set)


def test_nothing_kept_and_half_a_pair_of_flags_are_errors(data_set):
    text = (data_set / "votes.csv").read_text()
    (data_set / "votes.csv").write_text(text.replace("happy", "angry"))
    with pytest.raises(SystemExit, match="no clip is kept; .*filtered.csv says why"):
        run(data_set)
    with pytest.raises(SystemExit):
        run(data_set, "--records=x")


def test_broken_tables_are_refused_by_line(data_set):
    table = data_set.parent / "clips.csv"
    table.write_text("name,subtitle\na,\na,\n")
    with pytest.raises(UserError, match="line 3: 'a' has a row already"):
        read_clip_rows(table)
    labels = data_set / "labels.csv"
    labels.write_text(labels.read_text().replace("positive", "fine", 1))
    with pytest.raises(UserError, match="line 2: the sentiment is 'fine'"):
        filtering.read_labels(labels)
