"""The page and the API of `affectgpt serve`, over HTTP and in a browser, on a run of two steps."""

import base64
import contextlib
import dataclasses
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
from chromium import Page, browser
from test_live import Rows, wait
from web_client import WRITTEN, Client, events, record, serving, text, video

pytest.importorskip("starlette", reason="the extra serve is not installed")

from affectgpt_jax import predict, web
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records
from affectgpt_jax.evaluation.lexicon import load_lexicon, read_source
from affectgpt_jax.live import Engine
from data_prep import serve

# A model of two steps says the same about every clip, unless it is made to wander.
WANDER = ("--temperature=1.5", "--top-p=0.95", "--repetition-penalty=1.1", "--seed=3")
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
UPLOAD = 2**16
NAME = "demo-test-00004"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The run's test clips, and one with a name and texts that would like to be markup."""
    clips = list(demo.World(0).records("test", 12))
    strange = dict(
        name=HOSTILE, subtitle=f" {HOSTILE}\r\n", description=HOSTILE, labels=(HOSTILE, "calm")
    )
    clips.append(dataclasses.replace(clips[0], **strange))
    folder = tmp_path_factory.mktemp("served") / "records"
    write_records(folder, clips, encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo"))
    return folder


@pytest.fixture(scope="module")
def flags(trained_run, records):
    return [f"--workdir={trained_run}", f"--records={records}", *WANDER]


@pytest.fixture(scope="module")
def plain(flags):
    """What is served without files, since no encoder made the run's records."""
    with contextlib.ExitStack() as stack:
        arguments = serve.parse_arguments([*flags, "--max-prompt-tokens=72"])
        service = serve.make_service(arguments, stack)
        stack.callback(service.close)
        yield service


class Eyes:
    """Stands in for an extractor: a file that says "clip" looks like a clip of the demo world."""

    def __init__(self, clip):
        self.clip, self.seen = clip, []

    def __call__(self, name, files, stop):
        self.seen.append({kind: path for kind, path in files.items()})
        content = b"".join(path.read_bytes() for path in files.values())
        if not content.startswith(b"clip"):
            return web.Seen(None, ["face: the file is no video", "audio: the file is no video"])
        found = dataclasses.replace(
            self.clip, name=name, subtitle="", emotion="", labels=(), description=""
        )
        pictures = {"face": np.full((8, 4, 4, 3), 200, np.uint8)}
        sound = np.sin(np.arange(8 * 32000, dtype=np.float32)).reshape(8, -1)
        return web.Seen(found, [], {"length": "2.0 s"}, pictures, sound)


def service_like(plain, engine=None, look=None, timeout_s=600):
    return web.Service(
        plain.run,
        plain.clips,
        engine or plain.engine,
        sampling=plain._sampling,
        seed=3,
        lexicon=load_lexicon(),
        source=read_source(),
        limits=web.Limits(UPLOAD, timeout_s),
        look=look,
    )


@pytest.fixture(scope="module")
def eyes(plain):
    return Eyes(plain.clips[4])


@pytest.fixture(scope="module")
def client(plain, eyes):
    with serving(service_like(plain, look=eyes), ["mybox"]) as client:
        yield client


# --- answers --------------------------------------------------------------------------------------


def test_requests_at_once_have_the_answers_of_predict(client, flags, capsys):
    capsys.readouterr()
    predict.main([*flags, "--json"])
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({line["text"] for line in expected}) > 10, "answers that are alike prove little"

    def ask(line):
        return client.chat(record(line["name"]), line["question"])

    with ThreadPoolExecutor(len(expected)) as pool:
        found = list(pool.map(ask, expected))
    for line, (status, answer) in zip(expected, found, strict=True):
        assert status == 200, answer
        [choice] = answer["choices"]
        assert choice["message"]["content"] == line["text"]
        assert choice["finish_reason"] == ("length" if line["cut"] else "stop")
        assert answer["usage"]["completion_tokens"] == line["tokens"]
        extra = answer["affectgpt"]
        assert extra["logprob"] == pytest.approx(line["logprob"], abs=1e-4)
        assert {k: extra[k] for k in ("name", "question", "labels", "cut")} == {
            k: line[k] for k in ("name", "question", "labels", "cut")
        }


def test_an_answer_in_pieces_is_the_whole_one(client):
    asked = (record(NAME), "description")
    _, whole = client.chat(*asked)
    status, content = client.chat(*asked, stream=True, stream_options={"include_usage": True})
    assert status == 200
    first, *pieces, last, usage = events(content)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [piece["choices"][0]["delta"]["content"] for piece in pieces]
    assert "".join(texts) == whole["choices"][0]["message"]["content"] and len(texts) > 1
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert last["affectgpt"] == whole["affectgpt"]
    assert usage["usage"] == whole["usage"] and usage["choices"] == []
    assert len({piece["id"] for piece in (first, *pieces, last, usage)}) == 1


def test_openais_client_asks_it(client):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0) as api:
        [model] = api.models.list().data
        messages = [{"role": "user", "content": [record(NAME), text("ovlabel")]}]
        whole = api.chat.completions.create(model=model.id, messages=messages)
        pieces = api.chat.completions.create(model=model.id, messages=messages, stream=True)
        said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert said == whole.choices[0].message.content
        assert whole.affectgpt["labels"] is not None
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
            api.chat.completions.create(model="gpt", messages=messages)
        with pytest.raises(openai.BadRequestError, match="this server writes with 1.5"):
            api.chat.completions.create(model=model.id, messages=messages, temperature=0)


def test_a_question_a_subtitle_a_seed_and_a_limit_are_what_is_asked(client):
    asked = ((), ("Does the voice fit the face?",), ({"type": "subtitle", "text": "Not at all."},))
    answers = [client.chat(record(NAME), *parts)[1] for parts in asked]
    # Of the same words, the model finds each prompt's more or less probable.
    assert len({answer["affectgpt"]["logprob"] for answer in answers}) == 3
    seeds = [[client.chat(record(f"demo-test-{i:05}"), seed=seed)[1] for i in range(6)]
             for seed in (3, 5)]  # fmt: skip
    mine, others = ([answer["choices"] for answer in found] for found in seeds)
    assert mine != others
    _, cut = client.chat(record(NAME), max_tokens=2)
    assert cut["usage"]["completion_tokens"] == 2
    assert cut["choices"][0]["finish_reason"] == "length"


def test_labels_have_places_on_the_wheels(plain):
    lexicon = load_lexicon()
    [calm, none] = plain._places(["calm", "xyzzy"])
    assert calm["wheels"] == [
        [lexicon.label("calm", wheel, 1), lexicon.label("calm", wheel, 2)] for wheel in range(1, 6)
    ]
    assert none["wheels"] == [[None, None]] * 5
    for tree, rows in zip(plain._about["wheels"], read_source().wheels, strict=True):
        assert [part["name"] for part in tree] == list(dict.fromkeys(row[0] for row in rows))


def test_a_prompt_that_takes_long_holds_up_no_other_request(plain):
    rows, begun, may_go_on = Letters(), threading.Event(), threading.Event()
    make = rows.prompt

    def prompt(*asked):
        begun.set()
        assert may_go_on.wait(300)
        return make(*asked)

    rows.prompt = prompt
    rows.may_write.release(1000)
    with serving(service_like(plain, engine_of(rows))) as client, ThreadPoolExecutor(1) as pool:
        found = pool.submit(client.chat, record(NAME))
        assert begun.wait(300)
        try:
            assert client("/health")[0] == 200
        finally:
            may_go_on.set()
        assert found.result()[0] == 200


# --- what is refused ------------------------------------------------------------------------------

ASKED = {"role": "user", "content": [record(NAME), text("ovlabel")]}
WRONG = [
    (b"", "not JSON"),
    (b"[" * 5000 + b"]" * 5000, "nested deeper than 100 levels"),
    (b"\xff\xfe", "not UTF-8"),
    ({}, "the key 'messages' is missing"),
    ({"messages": []}, "there are 0 messages"),
    ({"messages": [ASKED, ASKED]}, "knows no conversation"),
    ({"messages": [{"role": "system", "content": "be kind"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "who?"}]}, "the message names no clip"),
    ({"messages": [{"role": "user", "content": [record(NAME), record(NAME)]}]}, "give one"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "expected one of"),
    ({"messages": [{"role": "user", "content": [{"type": "record"}]}]}, "'name' is missing"),
    ({"messages": [ASKED], "tools": []}, "the key 'tools' is unknown"),
    ({"messages": [ASKED], "n": 2}, "n: expected"),
    ({"messages": [ASKED], "stream": "yes"}, "stream: expected true or false"),
    ({"messages": [ASKED], "max_tokens": 0}, "1 or more"),
    ({"messages": [ASKED], "seed": -1}, "seed is -1"),
    ({"messages": [ASKED], "top_p": 0.5}, "this server writes with 0.95"),
    ({"messages": [{"role": "user", "content": [record(NAME), text("ovlable")]}]}, "mean ovlabel"),
    ({"messages": [{"role": "user", "content": [record(NAME), text("x <FaceHere>")]}]}, "reserved"),
    ({"messages": [{"role": "user", "content": [record(NAME), text("a b " * 99)]}]}, "limit of 72"),
    ({"messages": [{"role": "user", "content": [record(NAME), text("a " * 50_001)]}]}, "100,002 c"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [record(NAME), {"type": "subtitle", "text": "a" * 100_001}],
                }
            ]
        },
        "'subtitle' has 100,001 characters, over the limit of 100,000; shorten it",
    ),
    ({"messages": [{"role": "user", "content": [record(NAME), text("\ud800 ?")]}]}, "half of a"),
    ({"messages": [{"role": "user", "content": [record("\ud800")]}]}, "none of the 13 records"),
    ({"messages": [ASKED], "model": "\ud800"}, "there is no model"),
    ({"messages": [ASKED], "\ud800": 1}, "is unknown"),
]


@pytest.mark.parametrize(("body", "sentence"), WRONG, ids=[why[:24] for _, why in WRONG])
def test_what_cannot_be_answered_is_refused_in_a_sentence(client, body, sentence):
    status, _, found = client("/v1/chat/completions", body)
    assert status in (400, 404)
    message = found["error"]["message"]
    assert sentence in message and len(message) < 400 and "\n" not in message


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/x.mp4", "file:///etc/passwd", "data:video/mp4,clip", "data:;base64,@"]
)
def test_nothing_is_fetched_or_read_from_the_disk(client, eyes, url):
    before = len(eyes.seen)
    status, found = client.chat({"type": "video_url", "video_url": {"url": url}})
    assert status == 400 and "this server fetches nothing" in found["error"]["message"]
    assert len(eyes.seen) == before


@pytest.mark.parametrize(
    "path",
    ["/../../../etc/passwd", "/%2e%2e/setup.py", "/page.html", "/style.css/../x", "//etc/passwd",
     "/assets/serve/page.js", "/record?name=../../etc/passwd", "/record?name=%00", "/record",
     "/docs"],
)  # fmt: skip
def test_no_path_leads_to_a_file(client, path):
    status, _, found = client(path)
    assert status == 404 and "error" in found


def test_every_response_forbids_what_the_page_does_not_need(client):
    for path in ("/", "/page.js", "/about", "/nowhere", "/record?name=x"):
        _, headers, _ = client(path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control")]
        assert "server" not in headers


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"host": "localhost:1"}, True),
        ({"host": "mybox:8000"}, True),
        ({"host": "[::1]:8000"}, True),
        ({"host": "192.168.1.2"}, True),
        ({"host": "evil.example"}, False),
        ({"host": "localhost.evil.example"}, False),
        ({"host": ""}, False),
        ({"host": "[::1"}, False),
        ({"host": "localhost/x?"}, False),
        ({"host": "evil@localhost"}, False),
        ({"host": "localhost", "origin": "http://localhost"}, True),
        ({"host": "localhost", "origin": "http://localhost:81"}, False),
        ({"host": "localhost", "origin": "https://evil.example"}, False),
        ({"host": "localhost", "origin": "null"}, False),
        ({"host": "localhost", "origin": "http://["}, False),
    ],
)
def test_who_asks_must_name_this_server_and_come_from_its_page(client, headers, allowed):
    for path, body in (("/about", None), ("/v1/chat/completions", {"messages": [ASKED]})):
        status, _, found = client(path, body, **headers)
        assert status == (200 if allowed else 403)
        assert allowed or "error" in found


def test_preflights_of_other_pages_are_refused(client):
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    status, headers, _ = client("/v1/chat/completions", method="OPTIONS", **asked)
    assert status == 403 and "access-control-allow-origin" not in headers


# --- files ----------------------------------------------------------------------------------------


def test_an_uploaded_clip_is_shown_and_can_be_asked_about_until_it_is_forgotten(client, eyes):
    status, _, seen = client("/clips", b"clip", content_type="video/mp4")
    assert status == 200
    assert seen["facts"] == {"length": "2.0 s"} and seen["notes"] == []
    assert [url[:23] for url in seen["pictures"]["face"]] == ["data:image/jpeg;base64,"] * 8
    assert np.shape(seen["sound"]) == (8, 120) and 0.9 < np.max(seen["sound"]) <= 1
    part = {"type": "clip", "id": seen["clip"]}
    status, first = client.chat(part, {"type": "subtitle", "text": "Well."}, "ovlabel")
    assert status == 200 and first["affectgpt"]["name"] == "uploaded"
    # The same file in the request itself, and as a sound.
    subtitle = {"type": "subtitle", "text": "Well."}
    _, again = client.chat(video(b"clip"), subtitle, "ovlabel")
    assert again["choices"] == first["choices"]
    sound = {"data": base64.b64encode(b"clip").decode(), "format": "wav"}
    assert client.chat({"type": "input_audio", "input_audio": sound})[0] == 200
    kinds = [list(files) for files in eyes.seen[-3:]]
    assert kinds == [["video"], ["video"], ["audio"]]
    assert not [path for files in eyes.seen for path in files.values() if path.exists()]
    for _ in range(web.CLIPS_KEPT):
        client("/clips", b"clip", content_type="audio/wav")
    status, gone = client.chat(part)
    assert status == 404 and "send it anew" in gone["error"]["message"]


def test_broken_and_too_large_files_are_refused(client, eyes):
    status, _, found = client("/clips", b"no video", content_type="video/mp4")
    assert status == 422
    assert found["error"]["message"].startswith("the file cannot be used: face: the file is no")
    before = len(eyes.seen)
    large = bytes(UPLOAD + 1)
    status, _, found = client("/clips", large, content_type="video/mp4")
    assert status == 413 and "over the limit of 65,536 bytes" in found["error"]["message"]
    status, found = client.chat(video(large))
    assert status == 413 and "the video has 65,537 bytes" in found["error"]["message"]
    status, _, found = client("/clips", b"clip", content_type="text/plain")
    assert status == 415 and "expected" not in found and len(eyes.seen) == before
    status, found = client.chat(
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,%"}}
    )
    assert status == 400 and found["error"]["message"] == "video_url is not base64"


def test_a_body_without_a_length_is_counted_as_it_comes(client):
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=600)
    with contextlib.closing(connection):
        chunks = (bytes(2**14) for _ in range(8))
        connection.request("POST", "/clips", chunks, {"content-type": "video/mp4"})
        response = connection.getresponse()
        assert response.status == 413
        assert b"over the limit" in response.read()


def test_a_body_in_chunks_is_counted_whatever_its_header_says(plain, eyes, monkeypatch):
    monkeypatch.setattr(web, "SMALL_BODY", 2**10)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n"
        "transfer-encoding: chunked\r\n\r\n"
    )
    with serving(service_like(plain, engine_of(Letters()), eyes)) as client:
        with socket.create_connection(("127.0.0.1", client.port), timeout=600) as connection:
            connection.sendall(head.encode() + b"800\r\n" + b" " * 2**11 + b"\r\n0\r\n\r\n")
            assert b" 413 " in connection.recv(2**16).split(b"\r\n")[0]


class Slow:
    """Stands in for an extractor whose file has no end, and which takes a while to be ended."""

    def __init__(self):
        self.begun, self.may_end, self.stop = threading.Event(), threading.Event(), None

    def __call__(self, name, files, stop):
        self.stop = stop
        self.begun.set()
        assert stop.wait(300) and self.may_end.wait(300)
        raise RuntimeError("abandoned")


@pytest.fixture
def slow(plain):
    return service_like(plain, engine_of(Letters()), Slow())


def upload(client):
    """A request that sends a file, of which no response has been read."""
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=600)
    connection.request("POST", "/clips", b"clip", {"content-type": "video/mp4"})
    return connection


def test_the_file_of_a_client_that_leaves_is_read_no_further(slow, monkeypatch):
    monkeypatch.setattr(web, "FILES_AT_ONCE", 1)
    with serving(slow) as client:
        connection = upload(client)
        assert slow._look.begun.wait(300)
        connection.close()
        assert slow._look.stop.wait(300)
        # Its place is not free before nobody reads it.
        assert client("/clips", b"clip", content_type="video/mp4")[0] == 429
        slow._look.may_end.set()
        wait(lambda: not slow._files)


def test_a_file_that_takes_too_long_is_read_no_further(plain):
    look = Slow()
    look.may_end.set()
    with serving(service_like(plain, engine_of(Letters()), look, timeout_s=1)) as client:
        status, _, found = client("/clips", b"clip", content_type="video/mp4")
        assert status == 504 and look.stop.is_set()
        assert "not decoded after 1 s, which is the limit" in found["error"]["message"]
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", client.port)) as slowly:
            slowly.putrequest("POST", "/clips")
            slowly.putheader("content-type", "video/mp4")
            slowly.putheader("content-length", "4")
            slowly.endheaders(b"cl")
            response = slowly.getresponse()
            assert response.status == 504 and b"the body was not here after 1 s" in response.read()


def test_at_the_end_a_file_is_read_no_further(slow):
    slow._look.may_end.set()
    with serving(slow) as client:
        connection = upload(client)
        assert slow._look.begun.wait(300)
    response = connection.getresponse()
    assert response.status == 503 and b"the server is ending" in response.read()
    connection.close()


def test_a_run_whose_records_no_encoder_made_says_why_files_cannot_be_dropped(plain):
    assert not plain._about["can_upload"]
    assert plain._about["why_not"].startswith("files cannot be dropped: run was trained on ")
    assert "no encoder of data_prep has made" in plain._about["why_not"]
    assert str(plain.run.workdir.parent) not in plain._about["why_not"].split(",")[0].split("on")[0]
    with serving(service_like(plain, engine=engine_of(Letters()))) as client:
        for found in (client("/clips", b"clip", content_type="video/mp4")[2],
                      client.chat(video(b"clip"))[1]):  # fmt: skip
            assert "error" in found


# --- many requests, and the end -------------------------------------------------------------------


class Letters(Rows):
    """Stands in for the model: answers of 6 letters, written when the test says so."""

    max_new_tokens = 6
    lengths = (64,)

    def prompt(self, record, question, max_new_tokens=None, seed=0):
        return SimpleNamespace(
            record=record, question=question, example=[0] * 5, size=max_new_tokens or 6, seed=seed
        )


def engine_of(rows, queue=2, timeout_s=600):
    return Engine(rows, queue=queue, timeout_s=timeout_s)


@pytest.fixture
def letters(plain):
    """Rows that a test drives, and a client of a server that has them."""
    rows = Letters()
    engine = engine_of(rows)
    with serving(service_like(plain, engine=engine)) as client:
        yield rows, client
        rows.may_write.release(1000)


def begin(client, **keys):
    """A request that is answered in a stream, after its first event: connection and response."""
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=600)
    body = {"messages": [ASKED], "stream": True, **keys}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200 and response.headers["content-type"].startswith("text/event")
    assert b"assistant" in response.readline()
    return connection, response


def test_more_requests_than_may_wait_are_told_to_come_later(letters):
    rows, client = letters
    streams = []
    for _ in range(2):
        streams.append(begin(client, max_tokens=200))
    # One step lets the second join the first.
    wait(lambda: rows.may_write.release() or not rows.free)
    streams += [begin(client, max_tokens=200) for _ in range(2)]
    status, headers, found = client("/v1/chat/completions", {"messages": [ASKED]})
    assert status == 429 and headers["retry-after"] == "1"
    assert found["error"]["message"] == "2 questions wait already, which is the limit; ask later"
    rows.may_write.release(1000)
    for connection, response in streams:
        pieces = events(response.read().lstrip(b"\n"))
        assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == "x" * 200
        connection.close()


def test_a_client_that_leaves_gives_its_row_to_the_next(letters):
    rows, client = letters
    connections = [begin(client, max_tokens=10**6)[0] for _ in range(2)]
    wait(lambda: rows.may_write.release() or not rows.free)
    # Read to the end of what is there, so that closing is a clean end, not a reset alone.
    for connection in connections:
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(client.chat, record(NAME))
        wait(lambda: rows.may_write.release(1) or found.done())
        status, answer = found.result()
    assert status == 200 and answer["choices"][0]["message"]["content"] == "x" * 6


def test_a_client_that_leaves_gives_up_its_place_in_the_queue(plain):
    rows = Letters()
    engine = engine_of(rows)
    with serving(service_like(plain, engine=engine)) as client:
        streams = [begin(client, max_tokens=10**6) for _ in range(2)]
        wait(lambda: rows.may_write.release() or not rows.free)
        leaving = http.client.HTTPConnection("127.0.0.1", client.port, timeout=600)
        leaving.request("POST", "/v1/chat/completions", json.dumps({"messages": [ASKED]}))
        wait(lambda: engine._waiting)
        leaving.close()
        wait(lambda: all(ticket.dropped for ticket in engine._waiting))
        for connection, _ in streams:
            connection.close()
        rows.may_write.release(1000)


def test_errors_of_the_server_are_printed_and_forbid_what_all_responses_do(
    plain, monkeypatch, capfd, caplog
):
    rows = Letters()
    rows.may_write.release(1000)
    service = service_like(plain, engine=engine_of(rows))

    def fail(labels):
        raise ZeroDivisionError("no places")

    monkeypatch.setattr(service, "_places", fail)
    with serving(service) as client:
        connection, response = begin(client)
        last = events(response.read().lstrip(b"\n"))[-1]
        connection.close()
        assert last["error"]["message"].startswith("this request failed in the server")
        assert printed(capfd, caplog).count("ZeroDivisionError: no places") == 1
        status, headers, _ = client(f"/record?name={NAME}")
        assert status == 500 and "default-src 'none'" in headers["content-security-policy"]
    assert printed(capfd, caplog).count("ZeroDivisionError: no places") == 1


def test_an_error_of_the_model_is_printed_once_whoever_waits_for_an_answer(plain, capfd, caplog):
    rows = Letters()
    with serving(service_like(plain, engine=engine_of(rows))) as client:
        connection, response = begin(client, max_tokens=5000)
        found, asked = [], (record(NAME), "happy?")
        whole = threading.Thread(target=lambda: found.append(client.chat(*asked, max_tokens=5000)))
        whole.start()
        wait(lambda: rows.may_write.release() or not rows.free)
        rows.broken = True
        rows.may_write.release(1000)
        last = events(response.read().lstrip(b"\n"))[-1]
        connection.close()
        whole.join()
    [(status, answer)] = found
    why = "the model failed in this answer; the server has printed why"
    assert status == 500 and answer["error"]["message"] == last["error"]["message"] == why
    assert printed(capfd, caplog).count("ValueError: a device that failed") == 1


def printed(capfd, caplog):
    """What was printed since the last call, by the server's own log too."""
    text = capfd.readouterr().err + caplog.text
    caplog.clear()
    return text


def test_at_the_end_streams_are_told_and_nothing_is_left(plain):
    rows = Letters()
    service = service_like(plain, engine=engine_of(rows))
    folder = Path(service._folder.name)
    assert folder.is_dir()
    with serving(service) as client:
        connection, response = begin(client)
        wait(lambda: rows.free == 1)
        threading.Timer(0.3, rows.may_write.release, [2]).start()
    content = response.read().lstrip(b"\n")
    connection.close()
    assert "the server is ending" in events(content)[-1]["error"]["message"]
    assert not folder.exists()


# --- the command ----------------------------------------------------------------------------------


def sentence(*flags):
    with pytest.raises(SystemExit) as ended:
        serve.main([*map(str, flags)])
    return ended.value.code


def test_what_keeps_a_server_from_starting_is_one_sentence(flags, tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = sentence(*flags, f"--port={port}")
    assert message == (
        f"error: port {port} of 127.0.0.1: Address already in use; name another --port, or 0 for a "
        "free one"
    )
    assert sentence(*flags, "--port=0", "--host=203.0.113.7").startswith("error: port 0 of 203.0")
    message = sentence(f"--workdir={tmp_path}", "--port=0")
    assert "holds no run" in message
    assert sentence(*flags, "--queue=0") == 2 and "--queue is 0" in capsys.readouterr().err
    assert sentence(*flags, "--no-upload", "--video=x") == 2
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else find(name, *a)
    )
    message = sentence(*flags, "--port=0")
    assert message == ("error: the package uvicorn is missing: pip install 'affectgpt-jax[serve]'")


def test_another_host_comes_with_a_sentence(plain, monkeypatch, capsys):
    monkeypatch.setattr(serve, "make_server", lambda *_: SimpleNamespace(run=lambda sockets: None))
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        with contextlib.closing(serve.listen(host, 0)) as listening:
            serve.listen_until_interrupted(plain, [], listening)
            said = capsys.readouterr().err
            assert f"http://{host}:{listening.getsockname()[1]}" in said
            assert ("whoever reaches it can ask this run, without a password" in said) == warned


@pytest.mark.slow
def test_ctrl_c_ends_the_command(flags, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "data_prep.serve", *flags, "--port=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"http://127\.0\.0\.1:(\d+) \(Ctrl-C ends it\)", line):
                break
        assert found, said
        assert any("no more to compile" in line for line in said)
        client = Client(int(found[1]))
        assert client.chat(record(NAME))[0] == 200
        assert len(list(tmp_path.glob("affectgpt-serve-*"))) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "ended\n"
        assert not list(tmp_path.glob("affectgpt-serve-*"))
    finally:
        process.kill()
        process.wait()


# --- the page in a browser ------------------------------------------------------------------------


def shown(page, selector):
    return page.run(f"document.querySelector({json.dumps(selector)}).innerText")


def test_a_browser_asks_about_a_record_and_a_file(client, tmp_path):
    browser()
    _, whole = client.chat(record(NAME), "description")
    with Page(tmp_path / "profile", 390, 844) as page:
        page.open(f"{client.url}/#record={NAME}&ask")
        page.until(WRITTEN)
        answers = page.run(
            "[...document.querySelectorAll('.answer p:first-of-type')].map(p => p.textContent)"
        )
        assert page.run("document.getElementById('problem').innerText") == ""
        assert answers[0] == whole["choices"][0]["message"]["content"] and len(answers) == 2
        truth = demo_truth(client)
        assert shown(page, "#truth p") == ", ".join(truth["labels"])
        [place] = [p for p in truth["places"] if p["label"] == truth["labels"][0]]
        marked = "[...document.querySelectorAll('.sector.true title')].map(t => t.textContent)"
        wheel = int(page.run("document.querySelector('#wheels input:checked').value"))
        assert set(page.run(marked)) >= set(filter(None, place["wheels"][wheel]))
        other = next(i for i in range(5) if i != wheel and place["wheels"][i][0])
        page.run(f"document.querySelectorAll('#wheels input')[{other}].click()")
        assert place["wheels"][other][0] in page.run(marked)

        # A file, a broken one, and one that is too large.
        for name, content in (("a.mp4", b"clip"), ("b.mp4", b"no"), ("c.wav", bytes(UPLOAD + 1))):
            (tmp_path / name).write_bytes(content)
        page.choose_file("#file", tmp_path / "a.mp4")
        page.until("document.querySelectorAll('#seen img').length == 8")
        page.until("document.querySelector('#seen img').naturalWidth == 4")
        page.run("document.getElementById('kind').value = 'ovlabel'")
        page.run("document.getElementById('ask').requestSubmit()")
        page.until(f"({WRITTEN}) == 1")
        assert shown(page, "#name") == "a.mp4" and page.run(
            "document.getElementById('truth').hidden"
        )
        assert page.problems == [], "before anything was broken"
        page.choose_file("#file", tmp_path / "b.mp4")
        assert "the file is no video" in page.until("document.getElementById('problem').innerText")
        assert page.run("document.getElementById('go').disabled")
        page.choose_file("#file", tmp_path / "c.wav")
        page.until("document.getElementById('problem').innerText.includes('the limit is 1 MiB')")
        names = page.run("search().then((names) => names.length)")
        assert names == len(client("/records")[2]["names"]), "with no clip to ask about"

        # A name and texts that are markup, and nothing but this server was asked.
        page.open(f"{client.url}/#record={quote(HOSTILE)}&ask")
        page.until(WRITTEN)
        assert shown(page, "#name") == HOSTILE and HOSTILE in shown(page, "#truth")
        assert page.run("document.title") == "AffectGPT: run"
        assert page.run("document.querySelectorAll('img').length") == 0
        for width in (390, 1280):
            page.resize(width, 900)
            assert page.run("document.documentElement.scrollWidth") == width, "it scrolls sideways"
        asked = {url.split("/")[2] for url in page.requests if url.startswith(("http", "ws"))}
        assert asked == {f"127.0.0.1:{client.port}"}


def test_what_is_asked_while_another_clip_comes_is_not_shown_under_it(client, tmp_path):
    browser()
    other = "demo-test-00005"
    with Page(tmp_path / "profile") as page:
        page.open(f"{client.url}/#record={NAME}")
        page.until(f"document.getElementById('name').textContent == '{NAME}'")
        # Responses about records wait until the test says so; what is sent is kept.
        page.run("""
            window.real = window.fetch; window.sent = [];
            window.fetch = async (url, options) => {
              if (options?.body) sent.push(options.body);
              if (url.startsWith("/record?")) {
                await new Promise((resolve) => (window.go_on = resolve));
                if (window.broken) return new Response("{}", { status: 500 });
              }
              return real(url, options);
            }; 0
        """)
        ask = "document.getElementById('ask').requestSubmit()"
        page.run(f"pick('{other}'); 0")
        page.run(ask)
        page.until("sent.length")
        page.run("go_on()")
        page.until(f"document.getElementById('name').textContent == '{other}'")
        assert page.run("document.querySelectorAll('.answer').length") == 0
        assert not page.run("document.getElementById('go').disabled")
        # While one is answered, another is chosen, and does not come.
        page.run("window.broken = true")
        page.run(ask)
        page.run(f"pick('{NAME}'); 0")
        page.run("go_on()")
        page.until("document.getElementById('problem').innerText")
        assert not page.run("document.getElementById('go').disabled")
        # What fails after a third was chosen is nobody's problem.
        page.run(f"first = pick('{NAME}'); late = go_on; pick('{other}'); 0")
        page.run("late(); first")
        assert page.run("document.getElementById('problem').hidden")


def test_a_subtitle_that_nobody_changed_is_that_of_the_record(client, tmp_path):
    browser()
    with Page(tmp_path / "profile") as page:
        page.open(f"{client.url}/#record={quote(HOSTILE)}")
        page.until(f"document.getElementById('name').textContent == {json.dumps(HOSTILE)}")
        page.run("window.real = fetch; window.sent = []; 0")
        page.run("window.fetch = (u, o) => (o?.body && sent.push(o.body), real(u, o)); 0")
        page.run("document.getElementById('ask').requestSubmit()")
        page.until(WRITTEN)
        page.run("document.getElementById('subtitle').value += '!'")
        page.run("document.getElementById('ask').requestSubmit()")
        page.until(f"sent.length == 4 && {WRITTEN}")
        kinds = [
            [part["type"] for part in json.loads(body)["messages"][0]["content"]]
            for body in page.run("sent")
        ]
        assert kinds == [["record", "text"]] * 2 + [["record", "text", "subtitle"]] * 2


def demo_truth(client):
    return client(f"/record?name={NAME}")[2]["truth"]
