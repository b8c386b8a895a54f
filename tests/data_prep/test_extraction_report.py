"""What becomes of clips: reasons, duplicates, and what other extractions have already."""

import csv

import pytest

from affectgpt_jax.common.errors import ReadError
from data_prep.report import (
    COLUMNS,
    Elsewhere,
    clip_report,
    read_elsewhere,
    reasons,
    write_report,
)

ALL = ("face", "frame", "audio")


def row(name, sha256="", **problems):
    return {"name": name, "problems": problems, "facts": {"sha256": sha256} if sha256 else {}}


def report(rows, allow_missing=False, elsewhere=None):
    return clip_report(rows, ALL, allow_missing, elsewhere or Elsewhere())


def test_a_reason_names_the_features_that_it_hinders_unless_it_hinders_all():
    rows = [
        row("whole"),
        row("blind", face="no video stream", frame="no video stream"),
        row("gone", face="no such file", frame="no such file", audio="no such file"),
        row("worst", face="no face", frame="dark", audio="no face"),
    ]
    found = {r["name"]: (r["status"], r["reason"]) for r in report(rows)}
    assert found == {
        "whole": ("ok", ""),
        "blind": ("left out", "face, frame: no video stream"),
        "gone": ("left out", "no such file"),
        "worst": ("left out", "face, audio: no face; frame: dark"),
    }
    allowed = {r["name"]: r["status"] for r in report(rows, allow_missing=True)}
    assert allowed == {"whole": "ok", "blind": "ok", "gone": "left out", "worst": "left out"}


def test_of_equal_clips_the_first_that_can_be_used_counts():
    rows = [row("a", "1", face="no face"), row("b", "1"), row("c", "1"), row("d", "2")]
    found = {r["name"]: (r["status"], r["reason"]) for r in report(rows)}
    assert found["a"] == ("left out", "face: no face")
    assert found["b"] == ("ok", "")
    assert found["c"] == ("left out", "the same file is 'b'")
    assert found["d"] == ("ok", "")


def test_pairs_of_descriptions_of_a_clip_have_its_file_on_purpose():
    rows = [row(name, "1") for name in ("s", "s#2", "t", "t#2")]
    found = [(r["name"], r["status"], r["reason"]) for r in report(rows)]
    assert found == [
        ("s", "ok", ""),
        ("s#2", "ok", ""),
        ("t", "left out", "the same file is 's'"),
        ("t#2", "left out", "the same file is 's'"),
    ]


def test_clips_without_a_file_that_can_be_hashed_are_not_the_same():
    rows = [row("a", frame="no video file", audio="no audio file"), row("b", audio="no audio file")]
    assert [r["status"] for r in report(rows, allow_missing=True)] == ["ok", "ok"]


def test_files_of_other_extractions_are_left_out_and_their_names_are_told(tmp_path):
    (tmp_path / "train").mkdir()
    write_report(tmp_path / "train" / "extraction.csv", report([row("a", "1"), row("b", "2")]))
    elsewhere = read_elsewhere([tmp_path / "train"])
    found = report([row("x", "1"), row("b", "3"), row("c", "4")], elsewhere=elsewhere)
    assert [r["status"] for r in found] == ["left out", "ok", "ok"]
    assert found[0]["reason"] == f"the same file is 'a' in {tmp_path / 'train'}"
    remark = f"kept, though {tmp_path / 'train'} has other files of that name: 1: 'b'"
    assert elsewhere.remarks(found) == [remark]
    assert elsewhere.remarks(found[:1]) == []


def test_what_another_extraction_left_out_may_be_here(tmp_path):
    rows = [row("a", "1", face="no face")]
    write_report(tmp_path / "extraction.csv", report(rows))
    elsewhere = read_elsewhere([tmp_path])
    (found,) = report([row("a", "1")], elsewhere=elsewhere)
    assert found["status"] == "ok"
    assert elsewhere.remarks([found]) == []


def test_a_directory_without_a_report_is_no_extraction(tmp_path):
    with pytest.raises(ReadError, match="extraction.csv cannot be read: No such file"):
        read_elsewhere([tmp_path])


def test_any_name_and_reason_can_be_read_back(tmp_path):
    rows = [row('a, "b"\nc\u4f60', "1"), row("d", face="a reason, with a comma")]
    write_report(tmp_path / "r.csv", report(rows))
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0]) == COLUMNS
    assert found[0]["name"] == 'a, "b"\nc\u4f60'
    assert (found[0]["face"], found[1]["face"]) == ("yes", "")
    assert found[1]["reason"] == "face: a reason, with a comma"


def test_reasons_are_counted_by_kind_the_most_frequent_first():
    rows = [row("a", audio="no audio stream")]
    rows += [row(f"b{i}", face=f"no face in {i} frames") for i in range(7)]
    rows += [
        row("c1", audio="damaged: 1,234 of 2,000 bytes"),
        row("c2", audio="damaged: 5 of 6 bytes"),
    ]
    first, second, third = reasons(report(rows))
    shown = "'b0', 'b1', 'b2', 'b3', 'b4' and 2 more"
    assert first == f"left out, face: no face in _ frames: 7: {shown}"
    assert second == "left out, audio: damaged: _ of _ bytes: 2: 'c1', 'c2'"
    assert third == "left out, audio: no audio stream: 1: 'a'"
    assert reasons(report(rows, allow_missing=True))[0].startswith("incomplete, face: no face in")


def test_many_kinds_of_reasons_do_not_hide_that_there_are_more():
    rows = [row(f"c{i}", face="no " + "x" * i) for i in range(25)]
    found = reasons(report(rows))
    assert len(found) == 21
    assert found[-1] == "and 5 more reasons of 5 clips"
