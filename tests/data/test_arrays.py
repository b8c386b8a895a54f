import dataclasses
import json
import os
import re
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.common import labels
from affectgpt_jax.data.arrays import (
    COLUMNS,
    open_arrays,
    parse_labels,
    parse_list,
    records_from_csv,
    sample_rows,
)
from affectgpt_jax.data.records import Annotations, RecordError, write_records

NAMES = ("a", "b", "c 名")


def values(name: str, frames: int = 3, width: int = 4) -> np.ndarray:
    rng = np.random.default_rng(list(name.encode()))
    return rng.normal(size=(frames, width)).astype(np.float32)


def folder(path, names=NAMES, **shape):
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        np.save(path / f"{name}.npy", values(name, **shape))
    return path


def table(path, text: str, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def clips(tmp_path):
    """A CSV file of the three clips and a folder of their faces."""
    text = 'name,subtitle,labels\na,hello,happy\nb,,\nc 名,别走!,"[Worried, sad]"\n'
    return table(tmp_path / "clips.csv", text), folder(tmp_path / "face")


# --- what becomes of a table --------------------------------------------------------------------


def test_rows_and_arrays_become_records_in_the_order_of_the_rows(clips):
    path, face = clips
    records = list(records_from_csv(path, {"face": face}))
    assert [record.name for record in records] == list(NAMES)
    assert [record.subtitle for record in records] == ["hello", "", "别走!"]
    assert [record.labels for record in records] == [("happy",), (), ("worried", "sad")]
    for record in records:
        np.testing.assert_array_equal(record.features["face"], values(record.name))


def test_every_annotation_has_a_column(tmp_path):
    assert set(COLUMNS) == {field.name for field in dataclasses.fields(Annotations)}
    cells = {
        "name": (" x ", "x"),
        "subtitle": (" Well... \n then ", " Well... \n then "),
        "description": ('She says "no", twice.', 'She says "no", twice.'),
        "labels": ("['Angry', \"sad\",,]", ("angry", "sad")),
        "emotion": (" Anger ", "Anger"),
        "candidates": ("Anger, Joy", ("Anger", "Joy")),
        "valence": ("-0.25", -0.25),
        "valence_range": ("[-3, 3]", (-3.0, 3.0)),
        "caption": ("A man.", "A man."),
        "question": ("Why?", "Why?"),
        "answer": ("So.", "So."),
        "alternatives": (json.dumps(["It's, so.", "名"]), ("It's, so.", "名")),
        "preferred": ("a2 ", "a2"),
        "source": ("mine", "mine"),
    }
    quoted = ['"' + text.replace('"', '""') + '"' for text, _ in cells.values()]
    path = table(tmp_path / "clips.csv", f"{','.join(cells)}\n{','.join(quoted)}\n")
    (record,) = records_from_csv(path, {})
    for column, (_, expected) in cells.items():
        assert getattr(record, column) == expected, column
    write_records(tmp_path / "out", [record], encoders={})
    empty = ["x"] + [""] * (len(cells) - 1)
    table(path, f"{','.join(cells)}\n{','.join(empty)}\n")
    (record,) = records_from_csv(path, {})
    for field in dataclasses.fields(Annotations):
        assert field.name == "name" or getattr(record, field.name) == field.default


@given(st.text(alphabet="[]'\", aAb\n名") | st.text())
def test_labels_are_read_as_the_evaluation_reads_them(text):
    assert list(parse_labels(text)) == labels.read_labels(text)
    assert [word.lower() for word in parse_list(text)] == labels.parse_labels(text)


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("utf-8", None), ("utf-8-sig", None), ("gb18030", "gb18030"), ("utf-16", "utf-16")],
)
def test_a_table_may_have_a_byte_order_mark_or_a_named_encoding(encoding, named, tmp_path):
    path = table(tmp_path / "clips.csv", "name,subtitle\nx,别走!\n", encoding)
    (record,) = records_from_csv(path, {}, **({"encoding": named} if named else {}))
    assert (record.name, record.subtitle) == ("x", "别走!")


def test_spreadsheet_line_ends_blank_lines_and_ignored_columns(tmp_path):
    text = '\r\n,name,subtitle,note\r\n0,a,x,1\r\n\r\n1,b,"two\r\nlines",2\r\n'
    path = table(tmp_path / "clips.csv", text)
    records = list(records_from_csv(path, {}, ignore=["", "note"]))
    assert [(r.name, r.subtitle) for r in records] == [("a", "x"), ("b", "two\r\nlines")]


# --- where arrays come from ---------------------------------------------------------------------


def test_arrays_may_be_a_folder_an_archive_a_stack_or_a_dict(clips, tmp_path):
    path, face = clips
    arrays = {name: values(name) for name in NAMES}
    np.savez(tmp_path / "each.npz", **arrays)
    np.savez_compressed(
        tmp_path / "stack.npz", names=NAMES[::-1], clip=np.stack([arrays[n] for n in NAMES[::-1]])
    )
    for source in (face, tmp_path / "each.npz", tmp_path / "stack.npz", arrays):
        for record in records_from_csv(path, {"face": source}):
            np.testing.assert_array_equal(record.features["face"], arrays[record.name])
    for source in (face, tmp_path / "each.npz", tmp_path / "stack.npz"):
        opened = open_arrays(source)
        assert sorted(opened) == sorted(NAMES) and len(opened) == 3
        assert "d" not in opened
        with pytest.raises(KeyError):
            opened["d"]


def test_a_name_may_lead_into_a_folder_below(tmp_path):
    folder(tmp_path / "face" / "dia0", ["utt1"])
    path = table(tmp_path / "clips.csv", "name\ndia0/utt1\n")
    assert list(open_arrays(tmp_path / "face")) == ["dia0/utt1"]
    (record,) = records_from_csv(path, {"face": tmp_path / "face"})
    np.testing.assert_array_equal(record.features["face"], values("utt1"))


def test_missing_arrays_leave_the_modality_out_where_that_is_allowed(clips):
    path, face = clips
    (face / "b.npy").unlink()
    records = list(records_from_csv(path, {"face": face}, allow_missing=True))
    assert [list(record.features) for record in records] == [["face"], [], ["face"]]


def test_arrays_are_read_one_clip_at_a_time(clips, monkeypatch):
    path, face = clips
    read = []
    real = np.lib.format.read_array
    monkeypatch.setattr(
        np.lib.format, "read_array", lambda file, **kw: read.append(file.name) or real(file, **kw)
    )
    records = records_from_csv(path, {"face": face})
    assert read == []
    next(records)
    assert [os.path.basename(file) for file in read] == ["a.npy"]


@pytest.mark.parametrize(
    ("count", "frames", "expected"),
    [
        (8, 8, range(8)),
        (16, 8, range(0, 16, 2)),
        (10, 4, (0, 2, 5, 7)),
        (3, 8, (0, 1, 2, 2, 2, 2, 2, 2)),
        (1, 3, (0, 0, 0)),
        (100, 1, (0,)),
    ],
)
def test_rows_are_sampled_as_affectgpt_samples_frames(count, frames, expected):
    assert sample_rows(count, frames).tolist() == list(expected)


def test_clips_of_many_lengths_are_sampled_to_one(clips, tmp_path):
    path, face = clips
    for name, frames in zip(NAMES, (1, 6, 9)):
        np.save(face / f"{name}.npy", np.arange(2.0 * frames).reshape(frames, 2))
    records = list(records_from_csv(path, {"face": face}, frames=3))
    found = [(record.features["face"][:, 0] / 2).tolist() for record in records]
    assert found == [[0, 0, 0], [0, 2, 4], [0, 3, 6]]
    write_records(tmp_path / "out", records, encoders={"face": "mine"})


# --- what is wrong, in one sentence -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "clips.csv is empty; expected a CSV file with a header"),
        ("\n\n", "clips.csv is empty"),
        ("name\n", "clips.csv has no clips; expected a row for each below the header"),
        ("id,subtitle\na,x\n", r"no column 'name' in the header \['id', 'subtitle'\]; expected"),
        (
            "name;subtitle\na;x\n",
            r"no column 'name' in the header \['name;subtitle'\]; expected co",
        ),
        ("Name\na\n", r"no column 'name' in the header \['Name'\]"),
        (
            "name,subtitel\na,x\n",
            r"'subtitel' is unknown \(did you mean 'subtitle'\); rename it, o",
        ),
        ("name,Labels\na,x\n", r"'Labels' is unknown \(did you mean 'labels'\); .*--ignore Labels"),
        ("name,my note\na,x\n", r"'my note' is unknown \(known are name, .*--ignore 'my note'"),
        ("name,features\na,x\n", "the column 'features' is unknown"),
        ("name,labels,labels\na,x,y\n", "the header has the column 'labels' more than once"),
        ("name,subtitle\na,x,y\n", 'line 2: expected 2 cells, .* found 3; .*"double quotes"'),
        ("name,subtitle\na,x\nb\n", "line 3: expected 2 cells, as in the header, found 1"),
        ('name,subtitle\na,"x\n', "line 2: not CSV: unexpected end of data"),
        ("name,subtitle\na,x\n ,y\n", "line 3: the name is empty; give each clip one"),
        ("name\na\nb\n\na\n", "line 5: the name 'a' stands in line 2 already; names must be uniqu"),
        ("name,valence\na,high\n", "line 2, column 'valence': expected a number, found 'high'"),
        ("name,valence\na,nan\n", "column 'valence': expected a number, found 'nan'"),
        ('name,valence_range\na,"-1"\n', "expected two numbers, the lowest and the highest, fou"),
        ('name,valence_range\na,"-1,x"\n', "'valence_range': expected a number, found 'x'"),
        ('name,valence_range\na,"-1,"\n', "'valence_range': expected two numbers"),
        ('name,alternatives\na,"x, y"\n', "'alternatives': expected JSON, as in .* found 'x, y'"),
        ('name,alternatives\na,"[1, 2]"\n', "'alternatives': expected JSON"),
        ("name,alternatives\na," + "[" * 99999 + "\n", "'alternatives': expected JSON"),
        ("name,subtitle\na," + "x" * 200_000 + "\n", "line 2: not CSV: field larger than field li"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_sentence(text, message, tmp_path):
    path = table(tmp_path / "clips.csv", text)
    with pytest.raises(RecordError, match=message) as error:
        records_from_csv(path, {})
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "utf-8"}, "clips.csv, line 2: byte 0xb1 is not UTF-8; .*--encoding gb18030"),
        ({"encoding": "utf-9"}, "'utf-9' is not an encoding; try utf-8 or gb18030"),
        ({"encoding": "gb18030", "ignore": ["note"]}, "no column 'note' to ignore in the header"),
        ({"encoding": "gb18030", "ignore": ["name"]}, "no column 'name'"),
        ({"encoding": "gb18030", "frames": 0}, "frames is 0; expected 1 or more"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_sentence(changes, message, tmp_path):
    path = table(tmp_path / "clips.csv", "name,subtitle\nx,别\n", "gb18030")
    with pytest.raises(RecordError, match=message):
        records_from_csv(path, {}, **changes)


def test_what_is_not_there_is_one_sentence(clips, tmp_path):
    path, face = clips
    with pytest.raises(RecordError, match="none.csv cannot be read: No such file or directory"):
        records_from_csv(tmp_path / "none.csv", {})
    with pytest.raises(RecordError, match="features \\['voice'\\] are unknown; use \\('face',"):
        records_from_csv(path, {"voice": face})
    with pytest.raises(RecordError, match="nowhere does not exist; expected a folder with an arra"):
        records_from_csv(path, {"face": tmp_path / "nowhere"})
    with pytest.raises(RecordError, match="clips.csv is not an .npz archive; expected a folder"):
        records_from_csv(path, {"face": path})


def test_a_clip_without_an_array_is_named_before_any_array_is_read(clips):
    path, face = clips
    (face / "b.npy").unlink()
    np.save(face / "a.npy", "not numbers")
    with pytest.raises(RecordError) as error:
        records_from_csv(path, {"face": face})
    assert str(error.value) == (
        f"1 of the 3 clips of {path} have no face array: 'b' "
        f"(the first would be {face / 'b.npy'}); add them, or pass --allow-missing "
        "(allow_missing=True) to go without"
    )


@pytest.mark.parametrize("allow_missing", [False, True])
def test_a_folder_of_other_names_is_never_taken_for_missing_arrays(allow_missing, clips, tmp_path):
    path, _ = clips
    other = folder(tmp_path / "other", ["video_a"])
    with pytest.raises(RecordError, match="3 of the 3 clips .* there is one of 'video_a'; use the"):
        records_from_csv(path, {"face": other}, allow_missing=allow_missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="would be .*a.npy; use the same names"):
        records_from_csv(path, {"face": tmp_path / "empty"}, allow_missing=allow_missing)


def broken(name):
    """What to put where b's array should be."""
    good = values("b")
    return {
        "vector": good[0],
        "frames of pixels": np.zeros((3, 8, 8, 3), np.uint8),
        "scalar": np.float32(1),
        "wide": values("b", width=5),
        "long": values("b", frames=4),
        "nan": np.where(np.eye(3, 4) > 0, np.nan, good),
        "huge": 1e6 * good,
        "text": good.astype(str),
        "no rows": good[:0],
        "objects": np.array([{"a": 1}, None]),
    }[name]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            "vector",
            r"has the shape \[4\]; expected \[T, d\], a row per frame; a single vector is o",
        ),
        ("frames of pixels", r"has the shape \[3, 8, 8, 3\]; expected \[T, d\]"),
        ("scalar", r"has the shape \[\]; expected \[T, d\]"),
        (
            "wide",
            r"b.npy is \[3, 5\], but .*a.npy is \[3, 4\]; extract all clips with the same enc",
        ),
        ("long", r"b.npy is \[4, 4\], but .*a.npy is \[3, 4\]; --frames N samples each to N rows"),
        ("nan", r"record 'b', feature 'face': 3 values are not finite, the first at \[0, 0\]"),
        ("huge", "record 'b', feature 'face': .* overflows float16"),
        ("text", "record 'b', feature 'face': expected a non-empty numeric array"),
        ("no rows", r"b.npy is \[0, 4\], but"),
        (
            "objects",
            "b.npy cannot be read: Object arrays cannot be loaded when .*; save it as an a",
        ),
    ],
)
def test_an_array_that_cannot_be_used_is_one_sentence_that_names_it(
    array, message, clips, tmp_path
):
    path, face = clips
    np.save(face / "b.npy", broken(array), allow_pickle=True)
    with pytest.raises(RecordError, match=message) as error:
        records = records_from_csv(path, {"face": face})
        write_records(tmp_path / "out", records, encoders={"face": "clip"})
    assert re.search(r"b\.npy|'b'", str(error.value))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_damaged_array_files_are_one_sentence(clips):
    path, face = clips
    good = (face / "b.npy").read_bytes()
    header = good[:128].replace(b"'descr'", b"'decsr'")
    for data in (
        b"",
        b"hello",
        good[:-1],
        good[:60],
        b"PK\x03\x04",
        header,
        good[:10] + b"\xff" * 60,
    ):
        (face / "b.npy").write_bytes(data)
        with pytest.raises(RecordError, match="b.npy cannot be read: .*; save it as an array") as e:
            list(records_from_csv(path, {"face": face}))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"names": ["a", "b"]},
            r"names is <U1 \[2\] and x \[3, 3, 4\]; expected as many names, of",
        ),
        ({"names": [1, 2, 3]}, "names is int64 .*expected as many names, of text, as clips"),
        ({"names": ["a", "b", "a"]}, "names has 'a' more than once; keep one"),
        (
            {"names": np.array(["a", None, 3], object)},
            "array 'names' cannot be read: Object arrays",
        ),
        (
            {"names": ["a", "b", "c"]},
            r"1 of the 3 clips .* 'c 名' \(the first would be .*x, clip 'c 名'\)",
        ),
    ],
)
def test_a_stack_whose_names_do_not_fit_is_one_sentence(arrays, message, clips, tmp_path):
    path, _ = clips
    np.savez(tmp_path / "stack.npz", x=np.zeros((3, 3, 4)), **arrays)
    with pytest.raises(RecordError, match=message) as error:
        list(records_from_csv(path, {"face": tmp_path / "stack.npz"}))
    assert "stack.npz" in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_archive_is_one_sentence(clips, tmp_path):
    path, _ = clips
    archive = tmp_path / "each.npz"
    np.savez(archive, **{name: values(name) for name in NAMES})
    data = archive.read_bytes()
    middle = data.index(values("b").tobytes())
    archive.write_bytes(data[:middle] + b"xx" + data[middle + 2 :])
    with pytest.raises(RecordError, match="each.npz, array 'b' cannot be read: Bad CRC-32"):
        list(records_from_csv(path, {"face": archive}))
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(RecordError, match="each.npz is not an .npz archive"):
        records_from_csv(path, {"face": archive})


def test_a_dict_of_arrays_is_named_in_messages(clips):
    path, _ = clips
    with pytest.raises(
        RecordError, match=r"'b', 'c 名' \(the first would be the face arrays, clip 'b'\)"
    ):
        records_from_csv(path, {"face": {"a": values("a")}})
    arrays = {name: values(name) for name in NAMES} | {"b": [1.0, 2.0]}
    with pytest.raises(RecordError, match=r"the face arrays, clip 'b' has the shape \[2\]"):
        list(records_from_csv(path, {"face": arrays}))


@pytest.mark.parametrize("name", ["../b", "/b", "a/../../b", "sub/../../b"])
def test_no_name_of_a_clip_leads_out_of_its_folder(name, clips, tmp_path):
    _, face = clips
    np.save(face.parent / "b.npy", values("b"))
    path = table(tmp_path / "mine.csv", f"name\n{name}\n")
    with pytest.raises(RecordError, match=r"the name '.*b.npy' leads out of .*; expected that of"):
        records_from_csv(path, {"face": face})


def test_arrays_that_are_larger_than_their_files_are_refused(clips, tmp_path):
    path, face = clips
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024), }".ljust(117)
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.encode() + b"\n" + bytes(100)
    (face / "b.npy").write_bytes(data)
    with pytest.raises(RecordError, match="b.npy cannot be read: its header names an array"):
        list(records_from_csv(path, {"face": face}))
    archive = tmp_path / "zeros.npz"
    # 65 MiB of zeros in 65 KiB.
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("a.npy", "w", force_zip64=True) as entry:
            for _ in range(65):
                entry.write(bytes(2**20))
    with pytest.raises(RecordError, match="'a' cannot be read: a.npy expands from .* to 68,15"):
        open_arrays(archive)["a"]
