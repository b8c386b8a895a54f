"""What the picture of a run holds: lines, names and limits of its axes."""

import json
import math

import pytest
from matplotlib.text import Text

from affectgpt_jax.common import drawing
from affectgpt_jax.training.run_picture import curves_of, plot_run


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws records; the axes by title. Written where a test asks: it takes long."""
    figures, save = [], drawing.save_png

    def draw(records, *, written=False, **references):
        def keep(figure, *args):
            figures.append(figure)
            if written:
                save(figure, *args)

        monkeypatch.setattr(drawing, "save_png", keep)
        log, png = tmp_path / "metrics.jsonl", tmp_path / "run.png"
        log.write_text("".join(json.dumps(record) + "\n" for record in records))
        plot_run(log, png, references=references)
        assert not written or png.read_bytes().startswith(b"\x89PNG")
        return {axes.get_title(): axes for axes in figures[-1].axes}

    return draw


def heights(axes):
    return [list(line.get_ydata()) for line in axes.lines]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def names_beside(axes):
    """Names right of the axes, from the highest one down."""
    texts = sorted(axes.texts, key=lambda text: -text.get_position()[1])
    return [text.get_text() for text in texts]


def test_losses_are_drawn_raw_and_smoothed_from_the_first_step(draw):
    # Two kinds of batches in turn, as label answers and descriptions give; the first loss is high.
    losses = [9.0] + [1.0 + 2.0 * (step % 2) for step in range(1, 100)]
    records = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses)]
    axes = draw([*records, {"step": 50, "val/loss": 2.0}])["loss"]
    raw, mean, val = heights(axes)
    assert raw == losses and val == [2.0]
    assert mean[0] == 9.0
    assert mean[50] == pytest.approx(2.0, abs=0.2)
    assert max(mean[20:]) - min(mean[20:]) < 0.5
    assert axes.lines[0].get_xdata()[0] == axes.lines[1].get_xdata()[0] == 0
    assert legend(axes) == ["train", "val"]


def test_the_score_axis_holds_ceilings_and_control_which_are_named(draw):
    records = [{"step": 50, "val/hit": 0.5}, {"step": 99, "test/hit": 0.75}]
    references = {"ceiling": 0.875, "text": 0.203, "face": 0.2, "control": 0.02}
    axes = draw(records, **references)["hit rate"]
    assert heights(axes) == [[0.5], [0.75], *([height] * 2 for height in references.values())]
    low, high = axes.get_ylim()
    assert low == 0 and 0.875 < high < 1.2
    assert legend(axes) == ["val", "test"]
    assert names_beside(axes) == [
        "ceiling  0.875", "text  0.203", "face  0.200", "control  0.020",
    ]  # fmt: skip


def test_names_beside_lines_lie_apart_however_near_the_lines_are(draw):
    near = {f"line {number}": 0.5 + number / 1000 for number in range(8)}
    axes = draw([{"step": 1, "val/hit": 0.5}], written=True, **near)["hit rate"]
    places = sorted(text.get_position()[1] for text in axes.texts)
    assert min(b - a for a, b in zip(places, places[1:])) > 0.05
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without their arrows
    assert not [(a, b) for a in boxes for b in boxes if a is not b and a.overlaps(b)]


def test_what_drives_a_run_has_panels_below_where_it_is_logged(draw):
    records = [
        {"step": s, "train/loss": 1.0, "train/learning_rate": 1e-3, "train/grad_norm": 10.0 / s}
        for s in range(1, 9)
    ]
    records += [{"step": 9, "rate/tokens/s": 5000.0}]
    panels = draw(records)
    # No score was logged, so that there is no panel for it.
    assert list(panels) == ["loss", "learning rate", "gradient norm", "tokens/s"]
    assert heights(panels["learning rate"]) == [[1e-3] * 8]
    raw, smoothed = heights(panels["gradient norm"])
    assert raw == [10.0 / s for s in range(1, 9)] and len(smoothed) == 8
    assert panels["gradient norm"].get_yscale() == "log"
    assert panels["tokens/s"].get_ylim()[0] == 0


def test_a_run_by_rewards_shows_rewards_and_the_distance_to_its_start(draw):
    records = [
        {"step": s, "train/loss": -0.1, "train/reward_score": 0.5, "train/kl": 0.01 * s}
        for s in range(1, 9)
    ]
    records += [{"step": 8, "val/loss": 0.4, "val/sampled_reward": 0.6, "val/f": 0.7}]
    panels = draw(records, before=0.4)
    # Its loss of validation is what the reward lacks of 1, and no loss of that kind.
    assert legend(panels["loss"]) == ["train"]
    scores = panels["reward of a sample, F of the most probable answer"]
    assert legend(scores) == [
        "val reward of a sample", "train reward of a sample", "val F of the most probable answer",
    ]  # fmt: skip
    assert names_beside(scores) == ["before  0.400"]
    assert heights(panels["KL to the start"])[0] == [0.01 * s for s in range(1, 9)]


def test_components_of_a_mixture_have_curves_of_their_own(draw):
    panels = draw([{"step": 3, "val/loss": 1.0, "val/loss/a": 0.5, "val/hit/a": 0.2}])
    assert legend(panels["loss"]) == ["val", "val a"]
    assert legend(panels["hit rate"]) == ["val a"]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "train/loss": 2.0}],
        [{"step": 1, "train/loss": None, "train/loss_nonfinite": "nan"}],
        [{"step": 1, "train/grad_norm": None, "train/grad_norm_nonfinite": "nan"}],
        [{"step": 1, "test/hit": 0.0}],
    ],
    ids=["none", "one loss", "nan", "no panel", "one score"],
)
def test_a_run_with_few_points_still_gives_a_picture(draw, records):
    draw(records)
    for axes in draw(records, written=True, ceiling=0.875).values():
        assert all(map(math.isfinite, axes.get_ylim()))


def test_curves_have_their_names_as_they_are_and_the_picture_draws_no_formula(draw):
    long = "x" * 50
    names = ["a$b", f"{long}1", f"{long}2"]
    records = [{"step": 1, "train/loss": 1.0}]
    records += [{"step": 2, f"val/loss/{name}": 2.0, f"val/hit/{name}": 0.5} for name in names]
    curves = curves_of(records)
    assert list(curves["loss"]) == ["train", *(f"val {name}" for name in names)]
    assert list(curves["hit rate"]) == [f"val {name}" for name in names]
    assert r"val a\$b" in legend(draw(records)["loss"])
