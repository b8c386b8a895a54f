"""Work in processes, in order, whatever becomes of the processes; and what is taken of a clip."""

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from clip_files import face_frames, grey_frames, tone, write_clip, write_talking

from affectgpt_jax.common.identity import files_sha256
from data_prep import decoding, media
from data_prep.caption.parts import media_parts
from data_prep.caption.settings import read_settings
from data_prep.clips import Clip
from data_prep.decoding import Abandoned, Job, decode_clip, in_order
from data_prep.speakers.tracks import Look, look

ALL = ("face", "frame", "audio")


def square(number):
    time.sleep(0.02 * (number % 3))
    if number < 0:
        os._exit(1)
    return number**2


def wait(seconds):
    time.sleep(seconds)
    return seconds


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers):
    found = in_order(square, range(12), workers, ahead=5, died=lambda: None)
    assert list(found) == [n**2 for n in range(12)]


def test_an_item_that_ends_its_process_costs_no_other_item():
    items = [1, 2, -1, 3, 4, -2, 5]
    found = list(in_order(square, items, 2, ahead=4, died=lambda: "died"))
    assert found == [1, 4, "died", 9, 16, "died", 25]


def test_an_item_that_has_no_end_costs_no_other_item():
    found = list(in_order(wait, [0.0, 60.0, 0.1], 1, ahead=2, died=lambda: "late", limit_s=2))
    assert found == [0.0, "late", 0.1]


def count_and_wait(folder):
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(600)


def begun(folder):
    """The number of processes that have begun with an item, once there is one."""
    while not (found := len(list(folder.glob("*.pid")))):
        time.sleep(0.01)
    return found


def gone(folder):
    """Whether all these processes have ended."""
    for path in folder.glob("*.pid"):
        try:
            os.kill(int(path.stem), 0)
        except ProcessLookupError:
            continue
        return False
    return True


def test_an_item_that_was_alone_when_it_ended_its_process_is_not_tried_again(tmp_path):
    (found,) = in_order(count_and_wait, [tmp_path], 1, 1, died=lambda: "late", limit_s=0.5)
    assert found == "late" and begun(tmp_path) == 1


def test_what_nobody_wants_any_more_ends_at_once(tmp_path):
    stop = threading.Event()
    found = in_order(count_and_wait, [tmp_path] * 3, 2, 3, died=lambda: "died", stop=stop)
    threading.Thread(target=lambda: begun(tmp_path) and stop.set(), daemon=True).start()
    with pytest.raises(Abandoned):
        next(found)
    assert begun(tmp_path) <= 2 and gone(tmp_path)


def end_and_wait(path):
    if path.suffix == ".txt":
        return path.name
    return count_and_wait(path)


def test_what_is_decoded_ahead_ends_with_the_iterator(tmp_path):
    items = [tmp_path / "a.txt", tmp_path, tmp_path]
    found = in_order(end_and_wait, items, 2, ahead=3, died=lambda: "died")
    assert next(found) == "a.txt"
    assert begun(tmp_path)
    found.close()
    assert gone(tmp_path)


def test_a_clip_gives_pixels_windows_and_facts(tmp_path):
    path = write_talking(tmp_path / "a.mp4", seconds=2.4)
    found = decode_clip(Job(Clip("a", path), ALL, 64))
    assert not found.problems
    assert found.arrays["face"].shape == found.arrays["frame"].shape == (8, 64, 64, 3)
    assert found.arrays["face"].dtype == found.arrays["frame"].dtype == np.uint8
    np.testing.assert_array_equal(found.arrays["audio"], media.windows(media.read_waveform(path)))
    assert found.facts["frames"] == 60 and found.facts["seconds"] == pytest.approx(2.4)
    assert found.facts["sha256"] == files_sha256([path])
    frames, _ = media.read_frames(path, 8, lambda image: media.resized(image, 64))
    np.testing.assert_array_equal(found.arrays["frame"], np.stack(frames))


def test_faces_are_sampled_from_the_frames_that_have_one(tmp_path):
    frames = face_frames(32)
    frames[:16] = grey_frames(16, (320, 240))
    path = write_clip(tmp_path / "a.mp4", frames)
    found = decode_clip(Job(Clip("a", path), ("face",), 112))
    # 8 of the 16 frames that are searched have a face; each is taken, none is made up.
    assert len(np.unique(found.arrays["face"].reshape(8, -1), axis=0)) == 8
    assert found.arrays["face"].std(axis=(1, 2, 3)).min() > 20


def test_sound_beside_the_video_goes_before_sound_in_it(tmp_path):
    video = write_talking(tmp_path / "a.mp4")
    audio = write_clip(tmp_path / "a.wav", None, tone(1.0, hertz=900), audio_codec="pcm_s16le")
    found = decode_clip(Job(Clip("a", video, audio), ("audio",), 0))
    np.testing.assert_array_equal(found.arrays["audio"], media.windows(media.read_waveform(audio)))


def test_openface_arrays_go_before_the_detector_and_need_no_video(tmp_path):
    track = np.random.default_rng(0).integers(0, 256, (20, 112, 112, 3), np.uint8)
    np.save(tmp_path / "a.npy", track)
    found = decode_clip(Job(Clip("a", faces=tmp_path / "a.npy"), ("face", "frame"), 112))
    np.testing.assert_array_equal(
        found.arrays["face"], track[[0, 2, 5, 7, 10, 12, 15, 17], ..., ::-1]
    )
    assert found.problems == {"frame": "no video file"}


def test_what_is_missing_does_not_take_the_rest_along(tmp_path):
    silent = write_clip(tmp_path / "a.mp4", face_frames(10))
    found = decode_clip(Job(Clip("a", silent), ALL, 32))
    assert found.problems == {"audio": "no audio stream"}
    faceless = write_clip(tmp_path / "b.mp4", grey_frames(10), tone(0.4))
    found = decode_clip(Job(Clip("b", faceless), ALL, 32))
    assert found.problems == {"face": "no face in 10 frames"}
    found = decode_clip(Job(Clip("c", tmp_path / "none.mp4"), ALL, 32))
    assert found.problems == dict.fromkeys(ALL, "no such file")


def test_the_hash_is_of_what_can_be_used(tmp_path):
    video = write_talking(tmp_path / "a.mp4")
    audio = write_clip(tmp_path / "a.wav", None, tone(1.0), audio_codec="pcm_s16le")
    (tmp_path / "text.mp4").write_text("words")
    np.save(tmp_path / "a.npy", np.zeros((8, 112, 112, 3), np.uint8))

    def digest(*files, **more):
        return decode_clip(Job(Clip("a", *files, **more), ALL, 32)).facts.get("sha256")

    assert digest(video, audio) == files_sha256([video, audio])
    assert digest(video, audio) not in (digest(video), digest(None, audio))
    assert digest(tmp_path / "text.mp4", audio) == digest(None, audio)
    assert digest(faces=tmp_path / "a.npy") is None


def test_a_file_that_a_disk_gives_up_on_is_one_more_that_cannot_be_used(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = write_talking(tmp_path / "a.mp4")
    monkeypatch.setattr(decoding, "files_sha256", fail)
    found = decode_clip(Job(Clip("a", path), ALL, 32))
    assert found.problems == dict.fromkeys(ALL, "damaged: Input/output error")
    assert not found.arrays and "sha256" not in found.facts
    sound = write_clip(tmp_path / "a.wav", None, tone(1.0), audio_codec="pcm_s16le")
    monkeypatch.setattr(media, "open", fail, raising=False)
    found = decode_clip(Job(Clip("a", None, sound), ("audio",), 0))
    assert found.problems == {"audio": "damaged: Input/output error"}
    assert look(Look(Clip("a", path, sound), False)).problem == "damaged: Input/output error"
    how = read_settings(tmp_path).media
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(media.MediaError, match="damaged: Input/output error"):
        media_parts("video", path, "video_url", how)
