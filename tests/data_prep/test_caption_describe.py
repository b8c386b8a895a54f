import base64
import csv
import json
import re

import numpy as np
import pytest
from chat_stub import Stub
from clip_files import face_frames, write_clip, write_talking

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.data.records import Record, RecordDataset, write_records
from affectgpt_jax.evaluation.chat_server import ChatError, ChatRefusal, ChatServer, Reply
from data_prep.caption import describe, filtering
from data_prep.caption.__main__ import main
from data_prep.caption.settings import read_settings
from data_prep.clips import find_clips
from data_prep.shards import parse_shard, shard_of_task


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def reply(text, finish="stop"):
    choice = {"message": {"content": text}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice], "usage": {"total_tokens": 7}})


def hears(body):
    """Answers by how much it was sent, the same for the same clip."""
    parts = body["messages"][0]["content"]
    if isinstance(parts, str):
        return reply(f"Merged: {parts.splitlines()[-3:]}")
    kinds = [part["type"] for part in parts]
    return reply(f"{kinds} of {sum(len(json.dumps(part)) for part in parts)} bytes")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Three clips: two whole ones, and one without sound."""
    folder = tmp_path_factory.mktemp("media")
    for seed in range(2):
        write_talking(folder / f"clip{seed}.mp4", seed=seed)
    write_clip(folder / "mute.mp4", face_frames(10))
    return folder


def ask(stub, kind, media, out, **options):
    server = ChatServer(stub.url, "omni", concurrency=1, attempts=2)
    clips = find_clips([media]).clips
    return describe.describe_media(kind, clips, out, server, read_settings(out), **options)


def test_a_server_hears_sound_and_sees_pictures_and_every_clip_has_a_line(media, tmp_path):
    with Stub(good=hears) as stub:
        heard = ask(stub, "audio", media, tmp_path)
        seen = ask(stub, "video", media, tmp_path)
    assert [line["name"] for line in heard] == ["clip0", "clip1", "mute"]
    assert [line["finish"] for line in heard] == ["stop", "stop", "unreadable"]
    assert heard[2]["reply"] == "" and heard[2]["why"] == "no audio stream"
    assert heard[0]["model"].startswith("omni, greedy, ") and heard[0]["tokens"] == 7
    assert {line["shown"] for line in heard} == {"input_audio, up to 30 s, without subtitle"}
    assert {line["shown"] for line in seen} == {"frames, 8 of up to 448 pixels, without subtitle"}
    assert heard[0]["media_sha256"] == seen[0]["media_sha256"] != heard[1]["media_sha256"]
    assert all("['text', " + ", ".join(["'image_url'"] * 8) in line["reply"] for line in seen)
    sound = next(b for _, _, b in stub.requests if "input_audio" in json.dumps(b))
    part = sound["messages"][0]["content"][1]["input_audio"]
    assert part["format"] == "wav"
    wav = base64.b64decode(part["data"])
    assert wav[:4] == b"RIFF" and abs(len(wav) - 44 - 2 * 16_000) < 2000  # a second at 16 kHz
    assert describe.read_described(tmp_path / "audio.jsonl")["mute"] == heard[2]


def test_a_killed_stage_asks_the_rest_and_leaves_the_same_bytes(media, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with Stub(good=hears) as stub:
        ask(stub, "video", media, whole)

    class Killed(Exception):
        pass

    def kill(done, total):
        if done == 1:
            raise Killed

    with Stub(good=hears) as stub:
        with pytest.raises(Killed):
            ask(stub, "video", media, killed, progress=kill)
        # Half a line, as a power cut leaves it.
        file = killed / ".replies" / "video.jsonl"
        file.write_bytes(file.read_bytes() + b'{"key": "tor')
        assert not (killed / "video.jsonl").exists()
        ask(stub, "video", media, killed)
        assert 3 <= len(stub.requests) <= 4  # the one that was under way is asked again
        again = len(stub.requests)
        ask(stub, "video", media, killed)
        assert len(stub.requests) == again
    assert (killed / "video.jsonl").read_bytes() == (whole / "video.jsonl").read_bytes()


def test_what_has_changed_is_asked_anew(media, tmp_path):
    clips = tmp_path / "clips"
    write_talking(clips / "a.mp4", seed=0)
    write_talking(clips / "b.mp4", seed=1)
    with Stub(good=hears) as stub:
        ask(stub, "audio", clips, tmp_path)
        write_talking(clips / "b.mp4", seed=2)
        ask(stub, "audio", clips, tmp_path)
        assert len(stub.requests) == 3
        file = tmp_path / "caption.toml"
        file.write_text(file.read_text().replace("Listen to", "Attend to"))
        ask(stub, "audio", clips, tmp_path)
        assert len(stub.requests) == 5


def test_shards_leave_what_one_process_leaves(media, tmp_path):
    with Stub(good=hears) as stub:
        ask(stub, "video", media, tmp_path / "one")
        assert ask(stub, "video", media, tmp_path / "two", shard=(1, 2)) is None
        files = {p.name for p in (tmp_path / "two" / ".replies").iterdir()}
        assert files == {"video-00001-of-00002.jsonl", "media-video-00001-of-00002.jsonl"}
        assert ask(stub, "video", media, tmp_path / "two", shard=(0, 2)) is not None
        assert len(stub.requests) == 6
    one, two = (tmp_path / n / "video.jsonl" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_shards_of_servers_of_their_own_and_one_that_moves_ask_nothing_twice(media, tmp_path):
    with Stub(good=hears) as one, Stub(good=hears) as two:
        assert ask(one, "video", media, tmp_path, shard=(0, 2)) is None
        assert ask(two, "video", media, tmp_path, shard=(1, 2)) is not None
        assert len(one.requests) + len(two.requests) == 3
    with Stub(good=hears) as moved:
        lines = ask(moved, "video", media, tmp_path)
        assert not moved.requests and {line["model"] for line in lines} == {
            "omni, greedy, 512 tokens"
        }


def test_the_task_of_srun_is_its_shard():
    batch = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}
    assert shard_of_task({}) == shard_of_task(batch) == (0, 1)
    assert shard_of_task(batch | {"SLURM_STEP_ID": "0"}) == (3, 4)
    for wrong in ("4/4", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="is not I/N"):
            parse_shard(wrong)
    for strange in ({}, {"SLURM_PROCID": "x\x1b"}, {"SLURM_PROCID": "4"}):
        with pytest.raises(UserError, match="no share of a step of srun; name one with --shard"):
            shard_of_task({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"} | strange)


def test_two_who_ask_for_the_same_file_do_not_ask_twice(media, tmp_path):
    answered = []

    def again(done, total):
        if done == 1 and not answered:
            answered.append("no")
            with pytest.raises(UserError, match="is being written by another process; wait"):
                ask(stub, "video", media, tmp_path)
            # Sound may be asked about meanwhile.
            assert len(ask(stub, "audio", media, tmp_path)) == 3

    with Stub(good=hears) as stub:
        ask(stub, "video", media, tmp_path, progress=again)
        assert answered and len(stub.requests) == 3 + 2


def test_settings_that_are_no_toml_are_refused(tmp_path):
    file = tmp_path / "caption.toml"
    for text, message in (("a." * 50_000 + "b=1", "nested deeper"), ("a=" + "9" * 5000, "not val")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_settings(tmp_path)


def test_a_server_that_does_not_take_a_medium_is_one_sentence(media, tmp_path):
    refusal = 400, {}, '{"error": {"message": "no video_url here"}}'
    with Stub(good=lambda body: refusal) as stub:
        with pytest.raises(ChatError, match="no video_url here.*try --as frames") as told:
            ask(stub, "video", media, tmp_path, form="video_url")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "video.jsonl").exists()


def test_a_server_that_refuses_everything_is_never_taken_for_one_that_answers(media, tmp_path):
    clips, out = tmp_path / "clips", tmp_path / "set"
    for seed in range(5, 9):
        write_talking(clips / f"clip{seed}.mp4", seed=seed)
    (clips / "broken.mp4").touch()
    with Stub(good=hears) as stub:
        ask(stub, "video", media, out)  # other clips, other replies
    refusal = 400, {}, '{"error": {"message": "no pictures here"}}'
    with Stub(good=lambda body: refusal) as stub:
        for _ in range(3):
            with pytest.raises(ChatError, match="no pictures here.*try --as video_url"):
                ask(stub, "video", clips, out)
    (out / "video.jsonl").unlink()
    with Stub(good=hears) as stub:
        lines = ask(stub, "video", clips, out)
    assert [line["finish"] for line in lines] == ["unreadable", *4 * ["stop"]]


def test_what_was_refused_is_asked_again_and_nothing_else(media, tmp_path):
    refusal = 400, {}, '{"error": {"message": "too dark"}}'
    with Stub(reply("fine"), refusal, refusal, refusal, good=hears) as stub:
        first = ask(stub, "video", media, tmp_path)
        files = [tmp_path / "video.jsonl", tmp_path / ".replies" / "video.jsonl"]
        written = [file.read_bytes() for file in files]
        assert [line["finish"] for line in first] == ["stop", "refused", "refused"]
        assert ask(stub, "video", media, tmp_path, shard=(1, 2)) is not None  # refused again
        assert [file.read_bytes() for file in files] == written
        # Answered in the file of a shard, which the refusal in another does not hide.
        ask(stub, "video", media, tmp_path, shard=(1, 2))
        lines = ask(stub, "video", media, tmp_path)
        assert [line["finish"] for line in lines] == 3 * ["stop"] and len(stub.requests) == 6
        ask(stub, "video", media, tmp_path)
        assert len(stub.requests) == 6


def test_single_refusals_and_empty_or_cut_replies_are_counted(media, tmp_path):
    turns = [reply("fine"), (400, {}, '{"error": {"message": "too dark"}}'), reply("", "length")]
    with Stub(*turns) as stub:
        server = ChatServer(stub.url, "omni", concurrency=1)
        clips = find_clips([media]).clips
        lines = describe.describe_media("video", clips, tmp_path, server, read_settings(tmp_path))
    assert [line["finish"] for line in lines] == ["stop", "refused", "length"]
    assert "too dark" in lines[1]["why"]
    first, *whys = describe.summary(lines)
    assert "3 clips" in first and "empty: 2" in first and "too dark" in whys[0]


@pytest.mark.parametrize("turn", ["hang up", "sleep", (500, {"retry-after-ms": "1"}, "")])
def test_a_server_that_breaks_off_loses_no_reply(turn, media, tmp_path):
    with Stub(reply("fine"), *[turn] * 4, good=hears) as stub:
        server = ChatServer(stub.url, "omni", concurrency=1, attempts=2, timeout_s=0.3)
        clips = find_clips([media]).clips
        settings = read_settings(tmp_path)
        with pytest.raises(ChatError, match="goes on from there"):
            describe.describe_media("video", clips, tmp_path, server, settings)
        # The server is back when it has done all of it.
        server = ChatServer(stub.url, "omni", concurrency=1)
        lines = describe.describe_media("video", clips, tmp_path, server, settings)
    assert lines[0]["reply"] == "fine"
    assert all(line["reply"] for line in lines)


def test_both_are_merged_with_the_subtitle(media, tmp_path, capsys):
    (tmp_path / "clips.csv").write_text(
        "name,subtitle\nclip0,I told you so!\nclip1,\nmute,\nghost,\n", encoding="utf-8"
    )
    (tmp_path / "heard.csv").write_text("name,reply\nclip0,a sigh\nother,x\n", encoding="utf-8")
    table = f"--csv={tmp_path / 'clips.csv'}"
    out = f"--out={tmp_path / 'set'}"
    main(["describe", "audio", table, out, f"--replies={tmp_path / 'heard.csv'}"])
    said = capsys.readouterr().out
    assert "without a reply in" in said and "'clip1', 'mute', 'ghost'" in said and "'other'" in said
    with Stub(good=hears) as stub:
        server = ["--base-url", stub.url, "--model", "text"]
        main(["describe", "video", table, f"--clips={media}", out, "--with-subtitle", *server])
        main(["merge", table, out, *server])
        asked = [b for _, _, b in stub.requests if isinstance(b["messages"][0]["content"], str)]
    lines = describe.read_described(tmp_path / "set" / "descriptions.jsonl")
    assert list(lines) == ["clip0", "clip1", "mute", "ghost"]
    seen = describe.read_described(tmp_path / "set" / "video.jsonl")
    assert {line["shown"] for line in seen.values()} == {
        "frames, 8 of up to 448 pixels, with subtitle"
    }
    assert lines["ghost"]["why"] == "neither sound nor pictures were described"
    message = next(m for b in asked if "a sigh" in (m := b["messages"][0]["content"]))
    assert message.startswith("Please act as an expert in the field of emotions.")
    assert "Subtitle: I told you so!" in message and "Acoustic clues: a sigh\n" in message
    main(["labels", out])
    rows = (tmp_path / "set" / "labels.csv").read_text().splitlines()
    assert rows[0] == "name,labels,sentiment,unparsed,description_sha256" and len(rows) == 5


def write_heard(folder, replies):
    """An audio.jsonl with these replies, by name."""
    lines, _ = describe.given_replies(_given(folder, replies), list(replies))
    describe.write_described(folder / "audio.jsonl", lines)


class Merger:
    """A model that reads text alone."""

    identity = "merger"

    def replies(self, messages):
        for number, message in enumerate(messages):
            try:
                text = message() if callable(message) else message
            except ChatRefusal as refusal:
                yield number, refusal
            else:
                yield number, Reply(f"so {text.splitlines()[-3:]}", "stop", 1)


def test_shards_that_run_at_the_same_time_leave_the_whole(media, tmp_path):
    names = [f"c{i}" for i in range(5)]
    for folder in ("one", "two"):
        write_heard(tmp_path / folder, {name: f"{name} hums" for name in names})
    settings = read_settings(tmp_path)
    other = []

    def meanwhile(shard_1):
        """Runs the other shard when this one has looked at what there is, and asked once."""
        other.clear()

        def progress(done, total):
            if done == 1 and not other:
                other.append("runs")
                other.append(shard_1())

        return progress

    def merged(folder, **options):
        return describe.merge(names, {}, tmp_path / folder, Merger(), settings, **options)

    expected = merged("one")
    first = merged("two", shard=(0, 2), progress=meanwhile(lambda: merged("two", shard=(1, 2))))
    assert other == ["runs", None] and first == expected
    one, two = (tmp_path / f / "descriptions.jsonl" for f in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    # Media, whose hashes the other shard has read, too.
    with Stub(good=hears) as stub:
        expected = ask(stub, "video", media, tmp_path / "one")
        inner = meanwhile(lambda: ask(stub, "video", media, tmp_path / "two", shard=(1, 2)))
        first = ask(stub, "video", media, tmp_path / "two", shard=(0, 2), progress=inner)
        assert other == ["runs", None] and first == expected
    one, two = (tmp_path / f / "video.jsonl" for f in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_cues_that_nobody_made_are_told_and_clips_without_any_are_not_described(tmp_path, capsys):
    table = tmp_path / "clips.csv"
    table.write_text("name,subtitle\na,x\nb,x\nc,x\nd,x\n")
    out = tmp_path / "set"
    write_heard(out, {"a": "hums", "b": "sings"})
    with Stub(good=hears) as stub:
        server = ["--base-url", stub.url, "--model", "text"]
        main(["merge", f"--csv={table}", f"--out={out}", *server])
        assert len(stub.requests) == 2
    said = capsys.readouterr().out
    assert "no video.jsonl: described by sound alone" in said
    assert "clips that no describer was asked about: 2: 'c', 'd'" in said
    lines = describe.read_described(out / "descriptions.jsonl")
    assert [line["finish"] for line in lines.values()] == ["stop", "stop", *2 * ["unreadable"]]
    found = filtering.judge_reply(lines["c"], None)
    assert (found.outcome, found.why) == (
        filtering.DROPPED, "neither sound nor pictures were described"
    )  # fmt: skip
    describe.write_described(out / "video.jsonl", [lines["a"]])
    assert describe.cue_remarks(list("abc"), out) == [
        "clips without a line in video.jsonl: 1: 'b'",
        "clips that no describer was asked about: 1: 'c'",
    ]


# --- labels -------------------------------------------------------------------------------------


def test_replies_about_labels_that_cannot_be_read_are_no_labels_and_no_sentiment(tmp_path):
    def labels(body):
        text = body["messages"][0]["content"]
        if "Words: [calm]" in text:
            return reply("It depends on positive or negative context.")
        if "Words:" in text:
            return reply("negative")
        if "clip0" in text:
            return reply("What a strange question to ask somebody like me!")
        if "clip1" in text:
            return 400, {}, '{"error": {"message": "we do not talk about that"}}'
        return reply("[calm]" if "clip2" in text else "[furious]")

    write_heard(tmp_path, {f"clip{i}": f"clip{i} speaks" for i in range(4)})
    (tmp_path / "audio.jsonl").rename(tmp_path / "descriptions.jsonl")
    with Stub(good=labels) as stub:
        # The refused one comes first at last, when all others have been answered.
        for requests in (6, 7):
            main(
                ["labels", f"--out={tmp_path}", "--base-url", stub.url, "--model=m",
                 "--concurrency=1"]
            )  # fmt: skip
            assert len(stub.requests) == requests
    found = filtering.read_labels(tmp_path / "labels.csv")
    assert [f"{x.labels} {x.sentiment}" for x in found.values()] == [
        "() neutral", "() neutral", "('calm',) neutral", "('furious',) negative"
    ]  # fmt: skip
    assert found["clip0"].unparsed.startswith("What a strange")
    assert "we do not talk about that" in found["clip1"].unparsed
    assert found["clip2"].unparsed.startswith("It depends") and not found["clip3"].unparsed
    about = json.loads((tmp_path / "labels.json").read_text())
    assert about["extractor"].startswith("m, greedy, ") and len(about["prompts_sha256"]) == 64


def test_pairs_that_name_an_emotion_become_records_of_their_own(tmp_path, capsys):
    pairs = [
        Record(
            name=name, question=question, answer=answer, features={"image": np.ones((1, 4), "f2")}
        )
        for name, question, answer in (
            ("cat", "What is on the mat?", "A cat."),
            ("man", "What is he doing?", "He is furious and shouts."),
            ("odd", "Who wrote this?", "Nobody."),
            ("girl", "Why is she sad?", "It rains."),
        )
    ]
    write_records(tmp_path / "all", pairs, encoders={"image": "clip"})
    flags = [f"--records={tmp_path / 'all'}", f"--write={tmp_path / 'emotion'}"]

    def labels(body):
        words = {"shouts": "[furious]", "she sad": "[sad]", "mat": "[]"}
        text = body["messages"][0]["content"].rpartition("Clues:")[2]
        other = "What a strange question to ask somebody like me!"
        return reply(next((label for word, label in words.items() if word in text), other))

    with Stub(good=labels) as stub:
        server = ["--base-url", stub.url, "--model=m"]
        main(["labels", f"--out={tmp_path / 'out'}", *flags, *server])
        assert len(stub.requests) == 4
        said = capsys.readouterr().out
        assert "2 of 4 pairs name an emotion, by m, greedy, " in said
        assert "replies that no labels could be read from, left out: 1" in said
        written = [p.read_bytes() for p in sorted(tmp_path.glob("*/[!.]*"))]
        main(["labels", f"--out={tmp_path / 'out'}", *flags, *server])
        assert "and were there; " in capsys.readouterr().out
        assert [p.read_bytes() for p in sorted(tmp_path.glob("*/[!.]*"))] == written
        with pytest.raises(SystemExit, match="emotion already holds other records"):
            others = f"--records={tmp_path / 'emotion'}", flags[1]
            main(["labels", f"--out={tmp_path / 'out'}", *others, *server])
    found = RecordDataset(tmp_path / "emotion")
    assert [(e.name, e.question) for e in found.index] == [
        ("man", "What is he doing?"), ("girl", "Why is she sad?"),
    ]  # fmt: skip
    assert found[0].features["image"].shape == (1, 4)
    with (tmp_path / "out" / "pairs.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {name: row["labels"] for name, row in rows.items()} == {
        "cat": "[]", "man": "[furious]", "odd": "[]", "girl": "[sad]",
    }  # fmt: skip
    assert rows["odd"]["unparsed"].startswith("What a strange") and not rows["cat"]["unparsed"]
    # Without a server, by rules.
    main(["labels", f"--out={tmp_path / 'out'}", flags[0], f"--write={tmp_path / 'rules'}"])
    assert [e.name for e in RecordDataset(tmp_path / "rules").index] == ["man", "girl"]


def test_a_server_that_refuses_every_label_is_one_sentence(tmp_path):
    write_heard(tmp_path, {f"clip{i}": f"clip{i} speaks" for i in range(9)})
    (tmp_path / "audio.jsonl").rename(tmp_path / "descriptions.jsonl")
    refusal = 400, {}, '{"error": {"message": "no such model"}}'
    with Stub(good=lambda body: refusal) as stub:
        with pytest.raises(SystemExit, match="no such model"):
            main(
                ["labels", f"--out={tmp_path}", "--base-url", stub.url, "--model=m",
                 "--concurrency=1"]
            )  # fmt: skip
        assert len(stub.requests) <= 4  # one may be under way
    assert not (tmp_path / "labels.csv").exists()


def _given(folder, replies):
    folder.mkdir(exist_ok=True)
    path = folder / "given.jsonl"
    lines = (json.dumps({"name": n, "reply": r}) + "\n" for n, r in replies.items())
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"name": "a"}\n', "'reply' is missing"),
        ('{"name": "a", "reply": "x"}\n' * 2, "line 2: 'a' has a reply already"),
        ('{"name": "z", "reply": "x"}\n', "has none of the 2 clips: it names 'z'"),
    ],
)
def test_replies_that_do_not_fit_are_refused(content, told, tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=told):
        describe.given_replies(path, ["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["describe", "audio", "--clips=x"], "name who describes"),
        (["describe", "audio", "--base-url=http://x/v1", "--model=m"], "name the clips"),
        (["describe", "video", "--clips=x", "--base-url=http://x/v1"], "go together"),
        (
            [
                "describe",
                "audio",
                "--clips=x",
                "--base-url=http://x/v1",
                "--model=m",
                "--with-subtitle",
            ],
            "--with-subtitle shows a model the subtitles of --csv",
        ),
        (["choose", "--records=x", "--replies=a=b", "--runs=0"], "--runs is 0; expected 1 or more"),
        (["compare", "--against=x", "--pairs=0"], "--pairs is 0; expected 1 or more"),
        (
            [
                "describe",
                "audio",
                "--clips=x",
                "--as=frames",
                "--base-url=http://x/v1",
                "--model=m",
            ],
            "audio is sent as input_audio or audio_url",
        ),
        (["merge", "--replies=x", "--workdir=y"], "both say who describes|--replies and --workdir"),
        (["merge", "--base-url=http://x/v1", "--model=m"], "neither audio.jsonl nor video.jsonl"),
        (["labels"], "descriptions.jsonl is missing"),
        (["labels", "--records=x"], "--records and --write go together"),
        (["filter", "--levels=low,mood"], "'mood' is no level"),
    ],
)
def test_wrong_command_lines_are_one_sentence(arguments, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, f"--out={tmp_path / 'set'}"])
    said = str(ended.value.code) + capsys.readouterr().err
    assert re.search(told, said), said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "verb", [["labels"], ["filter"], ["choose", "--records=x", "--replies=a=b"]]
)
def test_what_shares_no_work_is_refused_to_several_tasks(verb, tmp_path, monkeypatch, capsys):
    for name, value in (("STEP_ID", "0"), ("PROCID", "1"), ("NTASKS", "4")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SystemExit) as ended:
        main([*verb, f"--out={tmp_path / 'set'}"])
    said = str(ended.value.code) + capsys.readouterr().err
    assert f"{verb[0]} shares no work, and these are 4 tasks of srun; start it once" in said
    assert not (tmp_path / "set").exists()


def test_settings_are_checked(tmp_path):
    first = read_settings(tmp_path)
    assert first.prompts.merge.startswith("Please act as an expert") and "\n" not in (
        first.prompts.merge.strip()
    )
    path = tmp_path / "caption.toml"
    path.write_text(path.read_text().replace("tails = 2.5", "tails = 3"))
    assert read_settings(tmp_path).lengths.tails == 3.0
    assert read_settings(tmp_path).sha256 != first.sha256
    for old, new, told in (
        ("tails = 3", "tails = 0", "lengths.tails is 0"),
        ("tails = 3", 'tails = "x"', "lengths.tails: expected a number"),
        ('agree = "majority"', 'agree = "most"', "crowd.agree: expected one of"),
        ('"off_screen"', '"offscreen"', "speakers.drop has 'offscreen', which is no verdict"),
        ("[lengths]", "[lengths", "not valid TOML"),
    ):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=told):
            read_settings(tmp_path)
        path.write_text(text)


def test_the_base_of_a_run_merges_without_a_server(trained_run, tmp_path, capsys):
    out = tmp_path / "set"
    given = _given(tmp_path, {"a": "The voice gives a sigh.", "b": "The voice gives a gasp."})
    read_settings(out)
    path = out / "caption.toml"
    path.write_text(path.read_text().replace("merge = 512", "merge = 4"))
    (tmp_path / "clips.csv").write_text("name,subtitle\na,We won!\nb,\n")
    table = f"--csv={tmp_path / 'clips.csv'}"
    main(["describe", "audio", table, f"--out={out}", f"--replies={given}"])
    main(["merge", table, f"--out={out}", f"--workdir={trained_run}"])
    lines = describe.read_described(out / "descriptions.jsonl")
    assert list(lines) == ["a", "b"] and all("4 tokens" in x["model"] for x in lines.values())
    assert all(x["finish"] == "length" and x["tokens"] > 4 for x in lines.values())
    assert "descriptions.jsonl: 2 clips" in capsys.readouterr().out
