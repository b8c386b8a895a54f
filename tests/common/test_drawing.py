"""Curves, labels and files of pictures."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.common import drawing


def test_the_first_mean_is_the_first_value_and_a_window_is_a_share():
    values = [10.0, *range(99)]
    smooth = drawing.smooth(values)
    assert smooth[0] == 10.0
    assert smooth[50] == pytest.approx(sum(values[45:56]) / 11)
    assert smooth[-1] == pytest.approx(sum(values[-6:]) / 6)
    assert drawing.smooth([3.0]) == [3.0] and drawing.smooth([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_places_lie_apart_in_their_order(places):
    found = drawing.spread(places, 0.1)
    order = sorted(range(len(places)), key=places.__getitem__)
    assert all(found[b] - found[a] > 0.1 - 1e-9 for a, b in zip(order, order[1:]))
    # Moved no further than they must: what is apart stays, and the middle of all stays.
    assert sum(found) == pytest.approx(sum(places))
    if all(places[b] - places[a] >= 0.1 for a, b in zip(order, order[1:])):
        assert found == pytest.approx(places)


def test_the_same_data_are_the_same_bytes_and_half_a_picture_is_never_left(tmp_path, monkeypatch):
    def draw(name):
        figure = drawing.new_figure(2, 1)
        figure.subplots().plot([1, 2])
        drawing.save_png(figure, tmp_path / name, "about")
        return (tmp_path / name).read_bytes()

    first = draw("a.png")
    assert first == draw("b.png") and b"Description\0about" in first

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError):
        draw("a.png")
    assert (tmp_path / "a.png").read_bytes() == first


def test_matplotlib_is_loaded_by_a_picture_alone_and_pyplot_never():
    code = """
import sys
from affectgpt_jax.common import drawing
assert "matplotlib" not in sys.modules
drawing.new_figure(1, 1).subplots()
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
