"""Answers of several runs about the same clips, from files as `affectgpt evaluate` writes them."""

import json

import pytest

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.evaluation.answers import answers_file, side_by_side
from affectgpt_jax.evaluation.readers import Pairs
from affectgpt_jax.evaluation.report import write_ablation, write_report
from affectgpt_jax.evaluation.results import score_set
from affectgpt_jax.evaluation.summary import make_report
from affectgpt_jax.evaluation.tables import ablation_table, read_run

NAMES = tuple(f"clip{i}" for i in range(6))
TRUTH = ["joyful"] * 6


def evaluated(folder, words, parts=None):
    """A run's report, and its answers beside."""
    said = [[word] for word in words]
    pairs = {"step 9": Pairs(NAMES, said, TRUTH, ())}
    result = score_set("demo", "words", pairs, None, resamples=50, parts=parts)
    write_report(make_report("a run", [result], resamples=50), folder)
    lines = [
        json.dumps({"name": n, "text": f"They feel {w}.", "labels": [w], "truth": t})
        for n, w, t in zip(NAMES, words, TRUTH, strict=True)
    ]
    answers_file(folder, "demo", "step 9").write_text("\n".join(lines) + "\n")
    return result, folder / "report.json"


@pytest.fixture
def runs(tmp_path):
    one = evaluated(tmp_path / "one", ["joyful"] * 6)[1]
    other = evaluated(tmp_path / "other", ["joyful"] * 4 + ["sad <b>", "calm"])[1]
    return {"one": one, "other": other}


def test_clips_that_runs_answer_differently_come_first(runs):
    clips, remarks = side_by_side(runs, 3)
    assert not remarks and {clip.clip for clip in clips[:2]} == {"clip4", "clip5"}
    assert len(clips) == 3 and clips[2].answers["one"] == clips[2].answers["other"]
    (torn,) = (clip for clip in clips if clip.clip == "clip4")
    assert (torn.set, torn.truth) == ("demo", "joyful")
    assert torn.answers["other"] == (["sad <b>"], "They feel sad <b>.")
    assert side_by_side(runs, 3)[0] == clips != side_by_side(runs, 3, seed=5)[0]


def test_the_page_of_an_ablation_shows_them(runs, tmp_path):
    table = ablation_table("5", [read_run(name, path) for name, path in runs.items()])
    write_ablation(table, tmp_path / "out", side_by_side(runs, 2)[0])
    page = (tmp_path / "out" / "ablation.html").read_text(encoding="utf-8")
    assert "Answers side by side" in page and "They feel sad &lt;b&gt;." in page
    assert len(json.loads((tmp_path / "out" / "ablation.json").read_text())["answers"]) == 2
    write_ablation(table, tmp_path / "out")
    page = (tmp_path / "out" / "ablation.html").read_text(encoding="utf-8")
    assert "side by side" not in page


def test_answers_that_are_not_there_are_told(runs):
    answers_file(runs["other"].parent, "demo", "step 9").unlink()
    clips, remarks = side_by_side(runs, 3)
    assert not clips and remarks[0].startswith("no answers about demo side by side: there is no ")
    answers_file(runs["other"].parent, "demo", "step 9").write_text('{"name": "clip0"}\n')
    with pytest.raises(ReadError, match="line 1: expected a name and one of labels, sentiment"):
        side_by_side(runs, 3)


def test_sets_and_clips_that_the_runs_do_not_share_are_told(runs, tmp_path):
    def rename(name, old, new):
        place = runs[name]
        place.write_text(place.read_text().replace(old, new))

    lines = answers_file(runs["other"].parent, "demo", "step 9")
    lines.write_text(lines.read_text().replace('"clip', '"other'))
    assert side_by_side(runs, 3) == (
        [],
        ["no answers about demo side by side: no clip is one that all runs were asked about"],
    )
    rename("other", '"name": "demo"', '"name": "else"')
    clips, remarks = side_by_side(runs, 3)
    assert not clips and remarks == [
        "no answers about demo side by side: the report of 'other' does not have that set",
        "no answers about else side by side: the report of 'one' does not have that set",
    ]
    assert side_by_side(runs, 0) == ([], [])


def test_parts_of_a_set_are_scored_by_themselves(tmp_path):
    parts = {"clips that conflict": {"clip4", "clip5"}, "none of them": set()}
    words = ["joyful"] * 4 + ["joyful", "calm"]
    result, path = evaluated(tmp_path, words, parts)
    (part,) = result.parts
    assert (part.name, part.clips, part.value) == ("clips that conflict", 2, 0.5)
    assert part.interval.low <= 0.5 <= part.interval.high
    assert json.loads(path.read_text())["sets"][0]["parts"][0]["value"] == 0.5
    assert "clips that conflict" in path.with_name("report.html").read_text(encoding="utf-8")
