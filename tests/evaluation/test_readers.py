import csv
import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.common import plain_pickle
from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.evaluation.readers import (
    pair,
    parse_labels,
    read_predictions,
    read_texts,
    read_truth,
)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(table):
    return dict(zip(table.names, table.values, strict=True))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("['happy', 'sad']", ["happy", "sad"]),
        ('["Happy", "very sad" ]', ["happy", "very sad"]),
        ("[happy, sad]", ["happy", "sad"]),
        ("happy,sad", ["happy", "sad"]),
        (" [ Happy ] ", ["happy"]),
        # One bracket goes on each side, not more.
        ("[[happy], [sad]]", ["[happy]", "[sad]"]),
        ("it's", ["it", "s"]),
        ("[]", []),
        ("", []),
        ("[',', \"\"]", []),
        ("happy and sad", ["happy and sad"]),
    ],
)
def test_a_label_list_is_parsed_as_the_release_does(text, labels):
    assert parse_labels(text) == labels


@given(st.lists(st.text(alphabet="abc -", min_size=1).filter(str.strip), max_size=5))
def test_any_way_to_write_a_list_reads_the_same(words):
    expected = [word.strip() for word in words]
    for text in (str(words), json.dumps(words), ",".join(words), f"[{', '.join(words)}]"):
        assert parse_labels(text) == expected


def test_predictions_as_the_evaluation_writes_them(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        '\ufeff{"name": "a", "text": "Happy.", "labels": ["Happy ", ""]}\n\n'
        '{"name": "b", "text": "?", "labels": []}\r\n',
    )
    assert rows(read_predictions(path, "fine")) == {"a": ["happy"], "b": []}


def test_predictions_in_other_keys_and_formats(tmp_path):
    openset = write(tmp_path / "o.jsonl", '{"name": "a", "openset": "[\'sad\', \'Low\']"}')
    text = write(tmp_path / "t.jsonl", '{"name": "a", "text": "sad, low"}')
    table = write(tmp_path / "o.csv", "openset,name\n\"['sad', 'low']\", a \n")
    for path in (openset, text, table):
        assert rows(read_predictions(path, "basic")) == {"a": ["sad", "low"]}


def test_sentiments(tmp_path):
    lines = '{"name": "a", "labels": ["sad"], "sentiment": "Negative"}\n'
    path = write(tmp_path / "s.jsonl", lines)
    assert rows(read_predictions(path, "sentiment")) == {"a": "negative"}
    path = write(tmp_path / "s.csv", 'name,openset\na,[positive]\nb,"positive, negative"\nc,\n')
    expected = {"a": "positive", "b": "positive, negative", "c": ""}
    assert rows(read_predictions(path, "sentiment")) == expected


def archive(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_archives_of_text_need_no_pickle(tmp_path):
    path = archive(
        tmp_path / "x-openset.npz", filenames=["a", "b"], fileitems=["['Sad', 'low']", "[]"]
    )
    assert rows(read_predictions(path, "fine")) == {"a": ["sad", "low"], "b": []}
    path = archive(
        tmp_path / "x-openset-sentiment.npz", filenames=["a", "b"], fileitems=["positive", ""]
    )
    assert rows(read_predictions(path, "sentiment")) == {"a": "positive", "b": ""}


def test_archives_of_objects_are_read_on_request(tmp_path):
    items = np.empty(2, object)
    items[:] = [["Sad", "low"], []]
    path = archive(tmp_path / "x.npz", filenames=["a", "b"], fileitems=items)
    with pytest.raises(ReadError, match="x.npz, fileitems holds pickled.*--allow-pickle"):
        read_predictions(path, "fine")
    assert rows(read_predictions(path, "fine", allow_pickle=True)) == {"a": ["sad", "low"], "b": []}


def test_descriptions_are_no_labels(tmp_path):
    path = archive(tmp_path / "x.npz", name2reason={"a": "He smiles."})
    with pytest.raises(ReadError, match="label extraction first"):
        read_predictions(path, "fine", allow_pickle=True)


def test_truth_of_every_task(tmp_path):
    fine = write(tmp_path / "f.csv", "name,openset\na,\"['sad', 'Low']\"\nb,[]\n")
    assert rows(read_truth(fine, "fine")) == {"a": ["sad", "low"], "b": []}
    basic = write(tmp_path / "b.csv", "name,emotion\na, Sad\n")
    assert rows(read_truth(basic, "basic")) == {"a": "sad"}
    valence = write(
        tmp_path / "v.jsonl", '{"name": "a", "valence": -1}\n{"name":"b","valence":"0.5"}'
    )
    assert rows(read_truth(valence, "sentiment")) == {"a": -1.0, "b": 0.5}


def test_the_public_csv_of_meld(tmp_path):
    path = write(
        tmp_path / "test_sent_emo.csv",
        "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season\n"
        '1,"Why, no?",Mark,surprise,positive,0,0,3\n'
        "2,Yes.,Ross,anger,negative,12,3,3\n",
    )
    assert rows(read_truth(path, "basic")) == {"dia0_utt0": "surprise", "dia12_utt3": "anger"}
    with pytest.raises(ReadError, match="expected 'name' beside"):
        read_truth(path, "sentiment")
    write(path, "Emotion,Dialogue_ID,Utterance_ID\njoy,x,1\n")
    with pytest.raises(ReadError, match="line 2: Dialogue_ID 'x' and Utterance_ID '1' are not"):
        read_truth(path, "basic")


def test_label_archives_of_the_release(tmp_path):
    mer = archive(
        tmp_path / "label-6way.npz",
        train_corpus={"t": {"emo": "sad", "val": 0.0}},
        test1_corpus={"a": {"emo": "happy", "val": -1.5}, "b": {"emo": "neutral", "val": 0}},
    )
    assert rows(read_truth(mer, "basic", True)) == {"a": "happy", "b": "neutral"}
    with pytest.raises(ReadError, match="--allow-pickle"):
        read_truth(mer, "basic")
    meld = archive(tmp_path / "label.npz", test_corpus={"a": {"emo": 1}, "b": {"emo": np.int64(6)}})
    assert rows(read_truth(meld, "basic", True)) == {"a": "joy", "b": "surprise"}
    iemocap = archive(
        tmp_path / "label_4way.npz",
        whole_corpus={"Ses01F_x": {"emo": 0}, "Ses05F_x": {"emo": 3}, "Ses05M_x": {"emo": 1}},
    )
    assert rows(read_truth(iemocap, "basic", True)) == {"Ses05F_x": "anger", "Ses05M_x": "sad"}
    mosi = archive(tmp_path / "label.npz", test_corpus={"a": {"emo": 0, "val": np.float32(-2.5)}})
    assert rows(read_truth(mosi, "sentiment", True)) == {"a": -2.5}
    with pytest.raises(ReadError, match="use --task=sentiment"):
        read_truth(mosi, "basic", True)
    with pytest.raises(ReadError, match="hold no such truth"):
        read_truth(mosi, "fine", True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", r"ends in \.jsonl, \.csv or \.npz"),
        ("p.csv", "", r"is empty; expected a CSV file with a header"),
        ("p.csv", "name,openset\n", r"has no clips"),
        ("p.csv", "clip,openset\na,b\n", r"no column 'name' in the header \['clip', 'openset'\]"),
        ("p.csv", "name,labels,labels\n", r"column 'labels' more than once"),
        ("p.csv", "name,word\na,b\n", r"line 2: expected 'labels' or 'openset' or 'text'"),
        ("p.csv", "name,openset\na,[b, c]\n", r"line 2: expected 2 cells.*found 3.*double quotes"),
        ("p.csv", 'name,openset\na,"b\nc,d\n', r"line 3: not CSV: unexpected end of data"),
        ("p.csv", b"name,openset\na,b\n\xff,c\n", r"line 3: byte 0xff is not UTF-8"),
        ("p.csv", "name,openset\na,b".encode("utf-16"), r"line 1: byte 0xff is not UTF-8"),
        ("p.csv", f"name,openset\na,{'b' * 200_000}\n", r"line 2: not CSV: field larger than"),
        ("p.csv", "name,openset\n ,b\n", r"line 2: expected the name of a clip, found ' '"),
        ("p.csv", "name,openset\na,b\na,c\nb,\n", r"has 1 clip more than once \('a'\)"),
        ("p.jsonl", '{"name": "a"', r"line 1: not JSON"),
        ("p.jsonl", "[" * 100_000, r"line 1: nested deeper than 100 levels"),
        ("p.jsonl", '["a"]', r"line 1: expected a JSON object, found \['a'\]"),
        ("p.jsonl", '{"name": 1, "labels": []}', r"expected the name of a clip, found 1"),
        ("p.jsonl", '{"name": "a", "name": "b", "labels": []}', r"a key more than once"),
        ("p.jsonl", '{"name": "a", "labels": {"b": 1}}', r"expected a list of words.*'a'"),
        ("p.jsonl", '{"name": "a", "labels": [1]}', r"expected a list of words, found \[1\]"),
        (
            "p.jsonl",
            '{"name": "a", "labels": []}\n{"name": "b", "text": ""}',
            r"line 2: expected 'labels' beside \['name', 'text'\]",
        ),
        ("p.npz", "no zip", r"is not a readable npz archive"),
    ],
)
def test_trouble_with_predictions_is_one_sentence(tmp_path, name, content, message):
    with pytest.raises(ReadError, match=message) as caught:
        read_predictions(write(tmp_path / name, content), "fine")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("value", ["nan", "inf", "", "x", "1_5", "1e999"])
def test_valences_that_are_no_numbers_are_counted(tmp_path, value):
    path = write(tmp_path / "t.csv", f"name,valence\na,1\nb,{value}\nc,{value}\n")
    with pytest.raises(ReadError, match=r"line 3: expected a finite.*2 clips \('b', 'c'\)"):
        read_truth(path, "sentiment")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ReadError, match=r"p.csv cannot be read: No such file"):
        read_predictions(tmp_path / "p.csv", "fine")


def tables(tmp_path, predictions, truth):
    p = write(tmp_path / "p.csv", "name,openset\n" + "".join(f"{n},{v}\n" for n, v in predictions))
    t = write(tmp_path / "t.csv", "name,openset\n" + "".join(f"{n},{v}\n" for n, v in truth))
    return read_predictions(p, "fine"), read_truth(t, "fine")


def test_clips_are_paired_by_name_in_the_order_of_the_truth(tmp_path):
    found = pair(*tables(tmp_path, [("b", "low"), ("a", "sad")], [("a", "x"), ("b", "y")]))
    assert (found.names, found.predictions, found.truth) == (
        ("a", "b"),
        [["sad"], ["low"]],
        [["x"], ["y"]],
    )
    assert found.findings == ()


def test_what_does_not_pair_is_reported_by_name(tmp_path):
    truth = [(f"clip{n}", "x") for n in range(8)] + [("void", "[]")]
    predicted = tables(tmp_path, [("clip0", ""), ("void", "x"), ("other", "x")], truth)
    with pytest.raises(ReadError, match=r"of 7 clips of .*'clip5' and 2 more.*--missing=empty"):
        pair(*predicted)
    found = pair(*predicted, missing="empty")
    assert found.predictions == [[]] * 8 + [["x"]]
    assert [(f.what.split(",")[0], len(f.names)) for f in found.findings] == [
        ("without a prediction", 7),
        ("predicted but not in the truth", 1),
        ("with an empty prediction", 1),
        ("with an empty truth", 1),
    ]
    assert str(found.findings[1]) == "1 clip predicted but not in the truth, left out: 'other'"
    with pytest.raises(ReadError, match="no clip in common: one has 'x1', the other 'clip0'"):
        pair(*tables(tmp_path, [("x1", "")], truth), missing="empty")


class Hostile:
    """Calls a function when Python unpickles it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def object_archive(path, name, content):
    """An archive with one array of one object, whose pickle is given."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|O", "fortran_order": False, "shape": ()}
    )
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.npy", stream.getvalue() + content)
    return path


def npy_header(dtype, count):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({count},), }}".ljust(501)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 502) + header.encode() + b"\n"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_pickles_run_nothing(tmp_path, protocol):
    trace = tmp_path / "trace"
    for hostile in (
        Hostile(open, str(trace), "w"),
        Hostile(exec, f"open({str(trace)!r}, 'w')"),
        Hostile(getattr, "text", "join"),
        Hostile(np.load, str(trace)),
        Hostile(pickle.loads, b"N."),
    ):
        data = pickle.dumps({"a": hostile}, protocol)
        path = object_archive(tmp_path / "label.npz", "test_corpus", data)
        for read, task in ((read_truth, "basic"), (read_predictions, "fine")):
            with pytest.raises(ReadError):
                read(path, task, allow_pickle=True)
        with pytest.raises(plain_pickle.PickleError, match="would call"):
            plain_pickle.loads(data)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        # 65 MiB of zeros in 65 KiB; an array of 2 ** 40 empty texts; objects that are not there.
        (bytes(65 * 2**20), "test_corpus.npy expands from"),
        (npy_header("|S0", 2**40), "its header names an array"),
        (npy_header("<f4", 2**40), "its header names an array"),
        (npy_header("|O", 2**40) + pickle.dumps([]), "pickled values do not fill an array"),
        (npy_header("|O", "(1," * 60 + "1" + ")" * 60), "shape is not valid: (("),
        (b"\x93NUMPY\x03\x00", "its version is neither 1 nor 2"),
    ],
    ids=range(6),
)
def test_small_archives_that_would_fill_the_memory_are_refused(tmp_path, content, reason):
    path = tmp_path / "label.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("test_corpus.npy", content)
    with pytest.raises(ReadError) as error:
        read_truth(path, "basic", allow_pickle=True)
    assert reason in str(error.value) and len(str(error.value)) < 500


def test_a_name_out_of_a_pickle_is_no_value(tmp_path):
    path = archive(tmp_path / "label.npz", test_corpus={"a": {"emo": print}})
    with pytest.raises(ReadError, match="expected an emotion, found Name"):
        read_truth(path, "basic", allow_pickle=True)


def test_csv_round_trip_of_awkward_text(tmp_path):
    names = ["plain", 'with "quotes"', "comma, and\nnewline", "ümläut", "a\u2028line", "'"]
    path = tmp_path / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("name", "emotion"), *((name, "sad") for name in names)])
    assert rows(read_truth(path, "basic")) == dict.fromkeys(names, "sad")
    lines = "\n".join(json.dumps({"name": n, "labels": ["x"]}, ensure_ascii=False) for n in names)
    path = write(tmp_path / "p.jsonl", lines)
    assert rows(read_predictions(path, "fine")) == dict.fromkeys(names, ["x"])


def test_a_named_split_is_read_and_no_other(tmp_path):
    path = tmp_path / "label.npz"
    corpora = {"test_corpus": {"a": {"emo": 1}}, "whole_corpus": {"Ses05": {"emo": 2}}}
    np.savez(path, **corpora)
    assert rows(read_truth(path, "basic", allow_pickle=True)) == {"a": "joy"}
    found = read_truth(path, "basic", allow_pickle=True, split="whole_corpus")
    assert rows(found) == {"Ses05": "neutral"}
    with pytest.raises(ReadError, match="no array test1_corpus, which would hold the test split"):
        read_truth(path, "basic", allow_pickle=True, split="test1_corpus")


def test_texts_stand_beside_labels_where_a_file_has_them(tmp_path):
    lines = '{"name": "a ", "labels": [], "text": "He frowns."}\n{"name": "b", "labels": []}\n'
    assert read_texts(write(tmp_path / "p.jsonl", lines)) == {"a": "He frowns."}
    assert read_texts(write(tmp_path / "p.csv", "name,labels\na,sad\n")) == {}
