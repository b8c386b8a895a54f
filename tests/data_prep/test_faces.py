"""Faces: where the cascade finds them, what is cut out, and the arrays of OpenFace."""

import cv2
import numpy as np
import pytest
from clip_files import face_frames, portrait

from data_prep import faces
from data_prep.media import MediaError, resized

# Of the portrait, by eye: left, top, right and bottom of the face, chin to hairline.
FACE = 55, 50, 125, 130


def wall(height=480, width=640):
    return np.full((height, width, 3), 140, np.uint8)


@pytest.mark.parametrize(("left", "top"), [(0, 0), (300, 100), (456, 264)])
def test_a_face_is_found_where_it_is(left, top):
    image = wall()
    image[top : top + 216, left : left + 184] = portrait()
    x, y, side = faces.find_face(image)
    centre = np.array([x + side / 2, y + side / 2])
    truth = np.array([FACE[0] + FACE[2], FACE[1] + FACE[3]]) / 2 + [left, top]
    assert np.abs(centre - truth).max() < 20
    assert 60 < side < 150


def test_of_two_faces_the_larger_one_counts():
    image = wall()
    image[:216, :184] = portrait()
    image[100:460, 300:607] = np.asarray(resized(portrait(), 360))[:, :307]
    x, _, side = faces.find_face(image)
    assert x > 300 and side > 120


def test_a_track_stays_with_its_person_until_that_one_is_gone():
    image = wall()
    image[:216, :184] = portrait()
    small = faces.find_face(image)
    image[100:460, 300:607] = resized(portrait(), 360)[:, :307]
    x, y, side = faces.find_face(image, near=(small[0] + 15, small[1] + 10, small[2]))
    assert np.abs(np.array([x, y, side]) - small).max() < 12
    image[:216, :184] = 140
    assert faces.find_face(image, near=small) == faces.find_face(image)


def test_a_wall_and_noise_have_no_face():
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    for image in (wall(), noise):
        assert faces.find_face(image) is None
        assert faces.find_face(image, near=(600, 400, 100)) is None


@pytest.mark.parametrize("size", [(2000, 2), (2, 2000), (1, 1), (1, 5000)])
def test_frames_that_are_too_thin_for_a_face_have_none(size):
    image = wall(*size)
    assert faces.find_face(image) is None and faces.find_faces(image[..., 0]) == []
    assert faces.find_face(image, near=(0, 0, 50)) is None


def test_what_shrinks_keeps_a_pixel_a_side_and_is_else_what_opencv_makes_of_it():
    assert faces.shrunk(wall(2000, 2), 0.18).shape == (360, 1, 3)
    image = face_frames(1)[0]
    expected = cv2.resize(image, None, fx=0.37, fy=0.37, interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(faces.shrunk(image, 0.37), expected)
    assert faces.shrunk(image, 1.0) is image


def test_a_crop_is_what_the_square_holds_with_the_edge_repeated_beyond():
    image = face_frames(1)[0]
    for x, y, side in (faces.find_face(image), (-30, -20, 90), (290, 200, 77)):
        padded = np.pad(image, ((200, 200), (200, 200), (0, 0)), mode="edge")
        expected = resized(padded[y + 200 : y + 200 + side, x + 200 : x + 200 + side], 112)
        found = faces.crop(image, (x, y, side))
        assert found.shape == (112, 112, 3) and found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_large_frames_have_the_face_in_the_same_place():
    small = face_frames(1)[0]
    large = small.repeat(4, axis=0).repeat(4, axis=1)
    ours, theirs = np.array(faces.find_face(large)) / 4, np.array(faces.find_face(small))
    assert np.abs(ours - theirs).max() < 12


def test_openface_arrays_are_read_as_opencv_wrote_them(tmp_path):
    track = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
    np.save(tmp_path / "a.npy", track)
    np.testing.assert_array_equal(faces.read_openface(tmp_path / "a.npy"), track[..., ::-1])
    np.testing.assert_array_equal(faces.read_openface(tmp_path / "a.npy", "rgb"), track)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (
            np.zeros((3, 96, 96, 3), np.uint8),
            r"the array is uint8 \[3, 96, 96, 3\], expected uint8",
        ),
        (np.zeros((3, 112, 112, 3), np.float32), "the array is float32"),
        (np.zeros((0, 112, 112, 3), np.uint8), "no face in the array"),
        (np.array([{"a": 1}], dtype=object), "not readable as an array: .*pickle"),
        (None, "no such file"),
    ],
)
def test_an_array_that_is_no_face_track_has_a_reason(array, reason, tmp_path):
    path = tmp_path / "a.npy"
    if array is not None:
        np.save(path, array, allow_pickle=True)
    with pytest.raises(MediaError, match=reason):
        faces.read_openface(path)
