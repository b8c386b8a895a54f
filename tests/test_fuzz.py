"""Every reader of bytes from outside gives a value or one sentence, whatever the bytes are.

A case is an intact file with a few changes: bytes of it, or values of the document that it holds.
`python tests/fuzz.py` does the same with a coverage-guided fuzzer, for as long as one likes.
"""

import copy
import functools
import io
import json
import pickle
import shutil
import string
import struct
import zipfile
import zlib
from pathlib import Path
from typing import TypedDict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from affectgpt_jax import restore
from affectgpt_jax.build import base_directory
from affectgpt_jax.chat_api import parse_request
from affectgpt_jax.common import npy, plain_pickle
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.json import ResumableJsonl, parse_json
from affectgpt_jax.common.tables import csv_rows, xlsx_rows
from affectgpt_jax.common.text import one_line
from affectgpt_jax.data import records
from affectgpt_jax.data.arrays import open_arrays, records_from_csv
from affectgpt_jax.data.prompts import load_prompts
from affectgpt_jax.data.tokenizer import Tokenizer
from affectgpt_jax.evaluation import chat_server, readers
from affectgpt_jax.evaluation.extract import read_label_reply, read_sentiment_reply
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.training import checkpoints, distributed, metrics_writer
from affectgpt_jax.weights import huggingface, peft, release, streaming, torch_zip
from data_prep import release_prompts

CASES = 100
LONGEST_SENTENCE = 2000

# --- what is changed ------------------------------------------------------------------------------

DEEP = functools.reduce(lambda inner, _: [inner], range(200), [])
STRANGE = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]
    ),
    st.sampled_from(["", "../../x", "/etc/passwd", "\x1b]0;a\x07", "a\nb", "\ud800", "x" * 5000]),
    st.sampled_from([[], {}, [[]], {"": None}, [1, "a"], DEEP, {"a": DEEP}]),
    st.text(max_size=4),
    st.integers(),
)


@st.composite
def changed(draw, document):
    """A JSON document as bytes, of which one to three values are replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        parent = document
        while True:
            key = draw(st.sampled_from(range(len(parent)) if type(parent) is list else [*parent]))
            if not (parent[key] and type(parent[key]) in (list, dict) and draw(st.booleans())):
                break
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "replace":
            parent[key] = copy.deepcopy(draw(STRANGE))
        elif action == "add" and type(parent) is dict:
            parent[draw(st.text(max_size=3))] = copy.deepcopy(draw(STRANGE))
        elif len(parent) > 1:
            del parent[key]
    return json.dumps(document).encode()


@st.composite
def damaged(draw, data):
    """Bytes of which a few are replaced, removed, repeated or added."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "put", "cut", "repeat", "remove"])):
            case "flip" if at < len(data):
                data[at] ^= draw(st.integers(1, 255))
            case "put":
                data[at:at] = draw(st.binary(max_size=8) | st.sampled_from(SNIPPETS))
            case "cut":
                del data[at:]
            case "repeat":
                data[at:at] = data[at : at + 64] * draw(st.integers(1, 20))
            case "remove":
                del data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


SNIPPETS = [
    *(b'"', b"\0", b"\n", b"\xff\xfe", b"{", b"[" * 500, b"(" * 500, b",,", b"\x1b[2J", b"nan"),
    *(b"9" * 5000, b"\xed\xa0\x80", b"\xe2\x80\xa8", b"=1+1", b"<!DOCTYPE x [", b"h\0h\0\x86"),
]  # fmt: skip


def document_or_bytes(document):
    return changed(document) | damaged(json.dumps(document).encode())


# --- what is read ---------------------------------------------------------------------------------


def zipped(entries, kind=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def npz(**arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def npy_bytes(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
STRINGS = f'<sst xmlns="{MAIN}"><si><t>name</t></si><si><t>a</t></si></sst>'
SHEET = (
    f'<worksheet xmlns="{MAIN}"><sheetData><row><c r="A1" t="s"><v>0</v></c></row>'
    '<row><c r="A2" t="s"><v>1</v></c><c r="B2" t="inlineStr"><is><t>x</t></is></c></row>'
    "</sheetData></worksheet>"
)
PICKLES = [
    {"a": {"emo": 1, "val": np.float32(0.5)}},
    [np.asarray(["x", None], object), np.asarray([1.5, 2]), {1, 2}, (1, "a", b"b")],
]
LABELS = {"test_corpus": {"a": {"emo": 1, "val": 0.5}, "b": {"emo": 3, "val": -1.0}}}
REPLY = {"choices": [{"message": {"content": "[happy, sad]"}, "finish_reason": "stop"}]}
HELLO = ["hello", {"process_id": 1, "num_processes": 2, "host": "a"}]


def with_checksum(header):
    checked = struct.pack("<I", len(header)) + header + bytes(64)
    return struct.pack("<4sII", b"AGPT", 1, zlib.crc32(checked)) + checked


def pth(program):
    return zipped(
        {"a/data.pkl": program, "a/byteorder": b"little", "a/data/0": bytes(16), "a/version": b"3"},
        zipfile.ZIP_STORED,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an intact base, records and lexicon, files of which cases replace."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(base_directory("tiny"), folder / "base")
    shutil.copytree(load_lexicon.__globals__["DEFAULT"], folder / "lexicon")
    (folder / "adapter").mkdir()
    (folder / "run" / "checkpoints" / "3").mkdir(parents=True)
    (folder / "clips.csv").write_text("name\na\n")
    clips = [
        records.Record(name=n, features={"face": np.ones((2, 3))}, labels=("x",), valence=0.5)
        for n in "ab"
    ]
    records.write_records(folder / "records", clips, encoders={"face": "clip"})
    torch_zip.save(
        folder / "a.pth", {"model": {"w": np.ones((2, 2), np.float32), "b": np.ones(3)}, "epoch": 1}
    )
    return folder


def json_of(path):
    return json.loads(Path(path).read_text())


def tensors_of(path):
    return [tensor.numpy() for tensor in release.read_release(path).tensors.values()]


def index_of(folder):
    """The index of records with a manifest that fits, so that its content is looked at."""
    data = (folder / "records" / "index.jsonl").read_bytes()
    manifest = records.read_manifest(folder / "records")
    manifest = records.dataclasses.replace(
        manifest,
        count=len(data.split(b"\n")) - 1,
        index_sha256=records.hashlib.sha256(data).hexdigest(),
    )
    return records.read_index(folder / "records" / "index.jsonl", manifest)


def reply_of(data):
    server = object.__new__(chat_server.ChatServer)
    server._secret, server._url = chat_server.Secret("sk-0123456789"), "http://localhost/v1"
    return server._content(data)


def read_text_reply(data):
    text = data.decode(errors="replace")
    return read_label_reply(text), read_sentiment_reply(text)


REQUEST = {
    "model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3,
    "messages": [
        {"role": "user", "content": [
            {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,YQ=="}},
            {"type": "input_audio", "input_audio": {"data": "YQ==", "format": "wav"}},
            {"type": "subtitle", "text": "s"},
            {"type": "text", "text": "ovlabel"},
        ]},
    ],
}  # fmt: skip
ANSWER = {"name": "a", "labels": ["x"], "text": "y"}
METRIC = {"step": 1, "time_s": 0.5, "train/loss": 1.5}
TABLE = 'name,labels,valence,subtitle\na,"[x, y]",0.5,"q ""r"""\nb,z,,\n'
MANIFEST = {
    "step": 3, "val_loss": 0.5, "files": {"state/a": {"bytes": 1, "sha256": "0" * 64}},
    "base": {"name": "b", "sha256": "0" * 64},
}  # fmt: skip
TREE = "def get_x(self, a, b):\n    return {'a': [f'<{a}>', (1, 2)], 'b': \"###Human: \" + b}\n"


def plain_readers():
    """Readers of bytes, with cases."""
    return {
        "JSON": (parse_any, document_or_bytes({"a": [1, {"b": None}], "c": "d"})),
        "CSV": (lambda d: list(csv_rows(d, "f", ("name",))), damaged(TABLE.encode())),
        "xlsx": (
            lambda d: list(xlsx_rows(d, "f")),
            damaged(zipped({"xl/sharedStrings.xml": STRINGS, "xl/worksheets/sheet1.xml": SHEET})),
        ),
        "xlsx, its XML": (
            lambda d: list(
                xlsx_rows(
                    zipped({"xl/sharedStrings.xml": STRINGS, "xl/worksheets/sheet1.xml": d}), "f"
                )
            ),
            damaged(SHEET.encode()),
        ),
        "npy": (lambda d: npy_or_reason(d), damaged(npy_bytes(np.ones((3, 4), np.float32)))),
        "pickle": (
            lambda d: pickle_or_reason(d),
            st.sampled_from([0, 2, 4]).flatmap(
                lambda protocol: damaged(pickle.dumps(PICKLES, protocol))
            ),
        ),
        "pickle, any program": (
            lambda d: pickle_or_reason(d),
            st.lists(st.sampled_from(OPCODES), max_size=40).map(lambda ops: b"".join(ops) + b"."),
        ),
        "record": (records.decode, damaged(records.encode(RECORD))),
        "record, its header": (
            lambda d: records.decode(with_checksum(d)),
            document_or_bytes({"name": "a", "labels": ["x"], "features": [["face", 2, 3]]}),
        ),
        "roll-call": (distributed._as_hello, document_or_bytes(HELLO)),
        "server's reply": (reply_of, document_or_bytes(REPLY)),
        "chat request": (
            lambda d: parse_request(d, {"temperature": 0.0, "top_p": 1.0}),
            document_or_bytes(REQUEST),
        ),
        "text of a reply": (
            read_text_reply,
            damaged(b"**Emotions**: [happy, 'sad'] <think>x</think> ```json\n{}```"),
        ),
    }


def file_readers(place):
    """Readers of files: what reads, the path, and cases."""
    base, lexicon = place / "base", place / "lexicon"
    index = place / "records" / "index.jsonl"
    return {
        "manifest of records": (
            lambda: records.RecordDataset(place / "records")[0],
            place / "records" / "manifest.json",
            document_or_bytes(json_of(place / "records" / "manifest.json")),
        ),
        "index of records": (
            lambda: index_of(place),
            index,
            damaged(index.read_bytes())
            | st.lists(changed(json.loads(index.read_text().split("\n")[0])), min_size=1).map(
                lambda lines: b"\n".join([*lines, b""])
            ),
        ),
        "arrays": (
            lambda: [dict(open_arrays(place / "arrays.npz"))],
            place / "arrays.npz",
            damaged(npz(a=np.ones((2, 3)), b=np.zeros((2, 3))))
            | damaged(npz(names=["a", "b"], values=np.ones((2, 2, 3)))),
        ),
        "array": (
            lambda: list(records_from_csv(place / "clips.csv", {"face": place})),
            place / "a.npy",
            damaged(npy_bytes(np.ones((2, 3)))),
        ),
        "clips": (
            lambda: list(records_from_csv(place / "t.csv", {})),
            place / "t.csv",
            damaged(TABLE.encode()),
        ),
        "predictions": (
            lambda: readers.read_predictions(place / "p.jsonl", "fine"),
            place / "p.jsonl",
            document_or_bytes(ANSWER),
        ),
        "labels": (
            lambda: readers.read_truth(place / "l.npz", "basic", True, "test_corpus"),
            place / "l.npz",
            damaged(npz(**{key: np.asarray(value, object) for key, value in LABELS.items()})),
        ),
        ".pth": (
            lambda: tensors_of(place / "c.pth"),
            place / "c.pth",
            damaged((place / "a.pth").read_bytes()),
        ),
        ".pth, its pickle": (
            lambda: tensors_of(place / "d.pth"),
            place / "d.pth",
            damaged(zipfile.ZipFile(place / "a.pth").read("archive/data.pkl")).map(pth),
        ),
        "safetensors": (
            lambda: [t.read() for t in streaming.read_header(place / "s.safetensors").values()],
            place / "s.safetensors",
            damaged(save({"a": np.ones((2, 3), np.float32), "b": np.ones(3, np.float16)})),
        ),
        "index of weights": (
            lambda: huggingface.weight_files(place / "adapter"),
            place / "adapter" / "model.safetensors.index.json",
            document_or_bytes({"metadata": {}, "weight_map": {"a": "x.safetensors"}}),
        ),
        "config of a base": (
            lambda: huggingface.read_config(base),
            base / "config.json",
            document_or_bytes(json_of(base / "config.json")),
        ),
        "config of an adapter": (
            lambda: peft.read_adapter_config(place / "adapter"),
            place / "adapter" / "adapter_config.json",
            document_or_bytes(
                {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
            ),
        ),
        "chat template": (
            lambda: Tokenizer(base).chat_prompt("x"),
            base / "tokenizer_config.json",
            document_or_bytes({"chat_template": "{% for m in messages %}{{ m.role }}{% endfor %}"}),
        ),
        "tokenizer": (
            lambda: Tokenizer(base).encode(["a b"]),
            base / "tokenizer.json",
            tokenizers(json_of(base / "tokenizer.json")),
        ),
        "config of a run": (
            lambda: restore.load_config(place / "run"),
            place / "run" / "config.json",
            document_or_bytes({"seed": 0, "lora": {"rank": 8}}),
        ),
        "manifest of a checkpoint": (
            lambda: checkpoints.SavedRun(place / "run"),
            place / "run" / "checkpoints" / "3" / "manifest.json",
            document_or_bytes(MANIFEST),
        ),
        "metrics": (
            lambda: metrics_writer.read_metrics(place / "metrics.jsonl"),
            place / "metrics.jsonl",
            document_or_bytes(METRIC).map(lambda d: b"%s\n%s\n" % (json.dumps(METRIC).encode(), d)),
        ),
        "answers": (
            lambda: ResumableJsonl(place / "r.jsonl", Named, ("name",)),
            place / "r.jsonl",
            document_or_bytes({"name": "a", "text": "b"}).map(lambda line: line + b"\n"),
        ),
        "prompts": (
            lambda: load_prompts(str(place / "p.toml")),
            place / "p.toml",
            damaged(PROMPTS.encode()),
        ),
        "lexicon": (
            lambda: load_lexicon(lexicon),
            lexicon / "lexicon.json",
            document_or_bytes(json_of(lexicon / "lexicon.json")),
        ),
        "source of the release's prompts": (
            lambda: release_prompts.read_release(place / "base_dataset.py"),
            place / "base_dataset.py",
            damaged(TREE.encode()),
        ),
    }  # fmt: skip


class Named(TypedDict):
    name: str
    text: str


PROMPTS = """
[roles]
human = "H: "
assistant = " A: "
end = "###"
[inputs]
multi = "{multi}"
audio = "{audio}"
text = "{subtitle}"
[questions]
ovlabel = ["q"]
[answers]
ovlabel = "a"
"""
RECORD = records.Record(name="a", features={"face": np.ones((2, 3))}, labels=("x",))
OPCODES = [
    *(b"]", b"}", b")", b"(", b"t", b"l", b"d", b"a", b"e", b"s", b"u", b"N", b"\x85", b"\x86"),
    *(b"q\0", b"h\0", b"q\1", b"h\1", b"K\1", b"R", b"b", b"\x93", b"\x8f", b"\x90", b"\x91"),
    *(b"X\1\0\0\0a", b"U\1a", b"I01\n", b"G" + bytes(8), b"\x8a\1\xff", b"\x94", b"Q"),
    *(b"U\3|S1", b"U\2<f", b"U\6latin1", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n"),
    *(b"cnumpy.core.multiarray\n_reconstruct\n", b"ccollections\nOrderedDict\n"),
    *(b"cnumpy.core.multiarray\nscalar\n", b"c_codecs\nencode\n"),
]  # fmt: skip


def tokenizers(document):
    """Of a whole tokenizer most of a case would be the copying of its vocabulary."""
    vocabulary = document["model"]["vocab"]
    keep = dict(list(vocabulary.items())[:40])
    document["model"] |= {"vocab": keep, "merges": document["model"]["merges"][:5]}
    return document_or_bytes(document)


def parse_any(data):
    parse_json(data, "f", dict[str, list[int | dict[str, None]] | str])


def npy_or_reason(data):
    try:
        npy.read_npy(io.BytesIO(data), len(data))
    except ValueError as error:  # its callers name the file
        raise UserError(str(error)) from None


def pickle_or_reason(data):
    try:
        repr(plain_pickle.loads(data))
    except plain_pickle.PickleError as error:
        raise UserError(str(error)) from None


def check(read, cases, write=lambda case: None, arguments=lambda case: (case,)):
    @settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
    @given(cases)
    def case_by_case(case):
        write(case)
        try:
            read(*arguments(case))
        except UserError as error:
            sentence = one_line(str(error))
            assert 0 < len(sentence) < LONGEST_SENTENCE
            assert "Traceback" not in sentence

    case_by_case()


PLAIN = list(plain_readers())
FILES = [
    "manifest of records", "index of records", "arrays", "array", "clips", "predictions", "labels",
    ".pth", ".pth, its pickle", "safetensors", "index of weights", "config of a base",
    "config of an adapter", "chat template", "tokenizer", "config of a run",
    "manifest of a checkpoint", "metrics", "answers", "prompts", "lexicon",
    "source of the release's prompts",
]  # fmt: skip


def test_there_are_at_least_two_thousand_cases(place):
    assert list(file_readers(place)) == FILES
    assert CASES * (len(PLAIN) + len(FILES)) >= 2000


@pytest.mark.parametrize("name", PLAIN)
def test_bytes_of_any_kind_give_a_value_or_a_sentence(name):
    check(*plain_readers()[name])


@pytest.mark.parametrize("name", FILES)
def test_files_of_any_kind_give_a_value_or_a_sentence(name, place):
    read, path, cases = file_readers(place)[name]
    intact = path.read_bytes() if path.exists() else None
    try:
        check(lambda: read(), cases, write=path.write_bytes, arguments=lambda case: ())
    finally:
        path.unlink()
        if intact is not None:
            path.write_bytes(intact)


def test_changed_cases_are_of_every_kind():
    """A strategy that changes nothing would find nothing."""
    found = set()

    @settings(max_examples=200)
    @given(changed({"a": [1, 2], "b": {"c": string.digits}}))
    def look(case):
        value = json.loads(case)
        found.add(type(value.get("a")).__name__)

    look()
    assert {"list", "str", "NoneType", "int", "dict"} <= found
