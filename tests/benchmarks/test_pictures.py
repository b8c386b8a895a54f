"""Pictures of results: what is drawn is what the files say, and what is committed is current."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from affectgpt_jax.common import drawing
from benchmarks import harness, pictures
from benchmarks.harness import RESULTS


@pytest.fixture
def drawn(monkeypatch):
    """The figures, and what their files say they are about."""
    found = []
    monkeypatch.setattr(
        drawing, "save_png", lambda figure, png, about=None: found.append((figure, png, about))
    )
    return found


def test_the_pictures_that_are_committed_are_of_the_results_that_are(drawn):
    pictures.main([])
    assert len(drawn) == 3
    for _, png, about in drawn:
        with Image.open(png) as picture:
            said = picture.text.get("Description")
        assert said == about, f"{png.name}: run python -m benchmarks.pictures"


def bars(axes):
    """Where each bar ends, by its name."""
    names = [text.get_text().replace("\n", ", ") for text in axes.get_yticklabels()]
    return {name: bar.get_x() + bar.get_width() for name, bar in zip(names, axes.patches)}


def test_bars_end_at_the_ratios_of_the_results_slower_ones_on_the_other_side_of_one(drawn):
    pictures.draw_speed(RESULTS, "speed.png")
    updates, answers = map(bars, drawn[0][0].axes)
    packed = harness.load(RESULTS / "train_step_affectgpt_12_beside_tuned_small.json")
    assert updates["12 clips, packed, over PyTorch, tuned"] == pytest.approx(
        packed["ratios"]["tuned"]["median"]
    )
    equal = harness.load(RESULTS / "train_step_affectgpt_3_small.json")["ratios"]["tuned"]["median"]
    assert updates["3 clips, over PyTorch, tuned"] == pytest.approx(equal)
    colours = {bar.get_facecolor() for axes in drawn[0][0].axes for bar in axes.patches}
    slower = [end for end in [*updates.values(), *answers.values()] if end < 1]
    assert len(colours) == 1 + bool(slower)
    ratios = [
        ratio
        for path in RESULTS.glob("train_step_*_small.json")
        for ratio in harness.load(path)["ratios"].values()
    ]
    assert len(updates) == len(ratios) and len(answers) == 6
    cases = harness.load(RESULTS / "generation_small.json")["kinds"]["labels"]["cases"]
    many, peer = cases["JAX, 32 at a time"], cases["transformers, 32 at a time"]
    assert answers["labels, 32 at a time"] == pytest.approx(
        many["clips_per_s"] / peer["clips_per_s"]
    )
    for axes in drawn[0][0].axes:
        low, high = axes.get_xlim()
        assert low < 1 and high > max(r["highest"] for r in ratios)


def test_runs_are_drawn_whole_and_smoothed_each_with_a_name(drawn):
    runs = {name: list(np.linspace(2, 1, 50) + n / 100) for n, name in enumerate("abcde")}
    apart = {name: [0.0, *[1e-3] * 49] for name in "bcde"}
    pictures.draw_runs(runs, apart, "x.png", "about", bound=0.5)
    [(figure, _, _)] = drawn
    losses, errors = figure.axes
    assert isinstance(figure, Figure)
    for axes, names in ((losses, list("abcde")), (errors, [*"bcde", "bound 0.5"])):
        assert [text.get_text() for text in axes.get_legend().get_texts()] == names
    # Curves that lie on one another are dashed in turns, so that all of them are seen.
    offsets = {line._unscaled_dash_pattern[0] for line in losses.lines if line.is_dashed()}
    assert len(offsets) == 4
    low, high = errors.get_ylim()
    assert 0 < low < 1e-3 and high > 0.5
