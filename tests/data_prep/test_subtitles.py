"""Subtitles of clips, out of a table or of a file beside each clip."""

import pytest

from affectgpt_jax.common.errors import ReadError
from data_prep.subtitles import read_sidecar, read_subtitles

SRT = """1
00:00:00,000 --> 00:00:01,500
I told you
<i>so.</i>

2
00:00:02,000 --> 00:00:03,000 X1:100
{\\an8}Twice: 12 --> 13
"""
VTT = """WEBVTT - a header

NOTE
not said --> here

intro
00:00.000 --> 00:01.500 align:start
<v Ann>I told you so.

00:01:00.000 --> 00:01:01.000
Twice: 12 --> 13
"""


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("srt", SRT),
        ("srt", SRT.replace("\n", "\r\n")),
        ("vtt", VTT),
        ("txt", "I told you so.\n\n  Twice: 12 --> 13\n"),
    ],
)
def test_words_are_left_of_a_file_of_subtitles(suffix, text, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(text.encode("utf-8-sig"))
    assert read_sidecar(path) == "I told you so. Twice: 12 --> 13"


def test_a_folder_has_a_file_for_some_of_the_clips(tmp_path):
    (tmp_path / "film").mkdir()
    (tmp_path / "film" / "a.srt").write_text(SRT)
    (tmp_path / "b.txt").write_text("well")
    found, how = read_subtitles(tmp_path, ["film/a", "b", "c"])
    assert found == {"film/a": "I told you so. Twice: 12 --> 13", "b": "well"} and how == ""
    with pytest.raises(ReadError, match=r"no subtitle of any clip; expected files such as c\.srt"):
        read_subtitles(tmp_path, ["c"])


def test_a_table_may_name_clips_alike_but_otherwise(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('name,labels,subtitle\ntest_a1,x,"yes, well"\ntest_b2,y, no \n')
    assert read_subtitles(path, ["test_b2"]) == ({"test_b2": " no "}, "")
    found, how = read_subtitles(path, ["a1", "b2", "c3"])
    assert found == {"a1": "yes, well", "b2": " no "} and "test_a1" in how
    with pytest.raises(ReadError, match="has no row of any clip; the first is called 'zzz'"):
        read_subtitles(path, ["zzz"])
    path.write_text("name,subtitle\na,1\na,2\n")
    with pytest.raises(ReadError, match="line 3: the name 'a' stands there already"):
        read_subtitles(path, ["a"])
