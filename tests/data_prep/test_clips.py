"""Which clips a folder and a CSV file mean, and which files are told to be none."""

import errno
import os
import sys
from pathlib import Path

import pytest

from affectgpt_jax.common.errors import ReadError
from data_prep.clips import Clip, ClipError, find_clips, named_clips


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def write_table(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_name_is_the_path_without_its_suffix_and_sound_may_lie_elsewhere(tmp_path):
    touch(tmp_path / "video", "b.MP4", "film1/a.avi", "c.mkv")
    touch(tmp_path / "audio", "film1/a.wav", "d.mp3")
    found = find_clips([tmp_path / "video", tmp_path / "audio"])
    video, audio = tmp_path / "video", tmp_path / "audio"
    assert found.clips == [
        Clip("b", video / "b.MP4"),
        Clip("c", video / "c.mkv"),
        Clip("d", None, audio / "d.mp3"),
        Clip("film1/a", video / "film1/a.avi", audio / "film1/a.wav"),
    ]
    assert found.clips[3].sound == audio / "film1/a.wav"
    assert found.clips[0].sound == video / "b.MP4"
    assert found.remarks() == []


def test_what_is_hidden_is_no_clip_and_what_is_no_medium_is_told(tmp_path):
    touch(tmp_path, "a.mp4", ".b.mp4", ".blocks/c.mp4", "notes.txt", "film/d.npy")
    found = find_clips([tmp_path])
    assert [clip.name for clip in found.clips] == ["a"]
    remark = "files that are no media by their suffix: 2: 'notes.txt', 'film/d.npy'"
    assert found.remarks() == [remark]


def test_linked_folders_are_searched_and_links_in_a_circle_end(tmp_path):
    touch(tmp_path / "disk", "a.mp4")
    touch(tmp_path / "clips", "b.mp4")
    os.symlink(tmp_path / "disk", tmp_path / "clips" / "more")
    os.symlink(tmp_path / "clips", tmp_path / "disk" / "back")
    names = [clip.name for clip in find_clips([tmp_path / "clips"]).clips]
    assert names == ["b", "more/a"]


def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    touch(tmp_path, "a.mp4", "film/b.mp4")
    scandir = os.scandir

    def scan(place):
        if Path(place).name == "film":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(ClipError, match=r"/film cannot be searched for clips \(Permission denied"):
        find_clips([tmp_path])


def test_a_name_in_two_rows_is_refused(tmp_path):
    touch(tmp_path / "clips", "a.mp4", "b.mp4")
    table = write_table(tmp_path / "t.csv", "name,subtitle\na,1\nb,2\n a,3\n")
    with pytest.raises(ReadError, match="t.csv, line 4: 'a' has a row already"):
        find_clips([tmp_path / "clips"], table)


def test_a_table_decides_which_clips_there_are_and_in_which_order(tmp_path):
    touch(tmp_path / "clips", "a.mp4", "b.mp4", "c.mp4", "a.wav")
    table = write_table(tmp_path / "t.csv", "name,labels\nc,x\na,y\nz,y\n")
    found = find_clips([tmp_path / "clips"], table)
    assert [clip.name for clip in found.clips] == ["c", "a", "z"]
    assert found.clips[1].audio == tmp_path / "clips" / "a.wav"
    assert found.clips[2] == Clip("z")
    assert found.remarks() == [
        "rows of the CSV file without a file: 1: 'z'",
        "files without a row in the CSV file, left out: 1: 'b'",
    ]


def test_files_that_are_called_otherwise_than_all_rows_are_found_and_told(tmp_path):
    touch(tmp_path / "clips", "dia0_utt0.mp4", "dia0_utt1.mp4", "extra_dia0_utt1.mp4")
    table = write_table(tmp_path / "t.csv", "name\ntest_dia0_utt0\ntest_dia0_utt1\n")
    found = find_clips([tmp_path / "clips"], table)
    assert [clip.name for clip in found.clips] == ["test_dia0_utt0", "test_dia0_utt1"]
    assert found.clips[0].video == tmp_path / "clips" / "dia0_utt0.mp4"
    assert found.remarks() == [
        "files of the clips: 2 are found by other names, as 'dia0_utt0' for 'test_dia0_utt0'",
        "files without a row in the CSV file, left out: 1: 'extra_dia0_utt1'",
    ]


@pytest.mark.parametrize("name", ["../secret", "/tmp/secret", "a/../../secret"])
def test_no_name_leads_out_of_the_folder_of_faces(name, tmp_path):
    touch(tmp_path, "secret.npy", "faces/a.npy", "clips/a.mp4")
    table = write_table(tmp_path / "t.csv", f"name,video\n{name},clips/a.mp4\n")
    with pytest.raises(ClipError, match="leads out of .*faces; expected that of a file below it"):
        find_clips([], table, tmp_path / "faces")


def test_files_that_a_table_names_lie_relative_to_it(tmp_path):
    table = write_table(
        tmp_path / "t.csv", "name,video,audio,face\na,v/1.mp4,,f/1.npy\nb,,/s.wav,\n"
    )
    a, b = find_clips([], table, None).clips
    assert a == Clip("a", tmp_path / "v/1.mp4", None, tmp_path / "f/1.npy")
    assert b == Clip("b", None, Path("/s.wav"))


def test_arrays_of_faces_lie_flat_or_in_a_folder_of_their_own(tmp_path):
    touch(tmp_path / "clips", "a.mp4", "b.mp4")
    touch(tmp_path / "faces", "a.npy", "b/b.npy")
    a, b = find_clips([tmp_path / "clips"], None, tmp_path / "faces").clips
    assert a.faces == tmp_path / "faces" / "a.npy"
    assert b.faces == tmp_path / "faces" / "b" / "b.npy"


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are always UTF-8 here")
def test_a_file_name_that_is_no_text_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"")
    with pytest.raises(ClipError, match=r"caf\\udce9.mp4': the name is not UTF-8; rename the"):
        find_clips([tmp_path])


def test_files_that_somebody_names_are_clips_by_their_stem(tmp_path):
    touch(tmp_path, "a.mp4", "more/x.mp4", "more/film/y.mkv", "more/film/y.wav", "other/x.mp4")
    a, voice, gone = tmp_path / "a.mp4", tmp_path / "a.wav", tmp_path / "gone.mp4"
    more, other = tmp_path / "more", tmp_path / "other"
    # Sound beside pictures of the same name is theirs; what is not there shows when it is decoded.
    assert named_clips([a, gone, voice]).clips == [Clip("a", a, voice), Clip("gone", gone)]
    assert named_clips([voice]).clips == [Clip("a", audio=voice)]
    assert named_clips([more, a]).clips == [
        Clip("film/y", more / "film/y.mkv", more / "film/y.wav"),
        Clip("x", more / "x.mp4"),
        Clip("a", a),
    ]
    # Two of one name go by their folders, too; another container is a clip of its own.
    found = named_clips([more, other / "x.mp4", a, tmp_path / "a.mkv"]).clips
    assert [clip.name for clip in found] == [
        "film/y",
        "more/x",
        "other/x",
        "a",
        "a.mkv",
    ]
    for twice in ([a, a], [more, more / "x.mp4"], [more / "x.mp4", more], [more, more / "film"]):
        with pytest.raises(ClipError, match="is named twice"):
            named_clips(twice)
    with pytest.raises(ClipError, match="is named twice"):
        named_clips([a, more / ".." / "a.mp4"])


def test_names_lead_nowhere_but_below_the_folder_that_clips_have_in_common(tmp_path, monkeypatch):
    touch(
        tmp_path, "x/talk.mp4", "y/talk.mp4", "faces/x/talk.npy", "faces/y/talk.npy", "here/b.mp4"
    )
    monkeypatch.chdir(tmp_path / "here")
    paths = [Path("../x/talk.mp4"), tmp_path / "y" / "talk.mp4", Path("b.mp4")]
    found = named_clips(paths, tmp_path / "faces").clips
    assert [clip.name for clip in found] == ["x/talk", "y/talk", "b"]
    assert [clip.faces for clip in found] == [
        tmp_path / "faces" / f"{name}.npy" for name in ("x/talk", "y/talk", "b")
    ]
    assert [clip.video for clip in found] == paths
    # A name that belongs to another clip already.
    touch(tmp_path, "f/x/talk.mp4")
    with pytest.raises(ClipError, match="would both be the clip 'x/talk'"):
        named_clips([tmp_path / "f", *paths])


def test_files_of_a_folder_that_are_no_media_are_told(tmp_path):
    touch(tmp_path, "recordings/a.mp4", "recordings/b.mxf")
    (remark,) = named_clips([tmp_path / "recordings"]).remarks()
    assert remark == "files that are no media by their suffix: 1: 'recordings/b.mxf'"


def test_arrays_of_faces_go_with_files_that_somebody_names(tmp_path):
    touch(tmp_path, "a.mp4", "faces/a.npy")
    (clip,) = named_clips([tmp_path / "a.mp4"], tmp_path / "faces").clips
    assert clip == Clip("a", tmp_path / "a.mp4", faces=tmp_path / "faces" / "a.npy")
