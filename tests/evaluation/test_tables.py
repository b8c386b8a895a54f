import csv
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.identity import Identity
from affectgpt_jax.evaluation import published
from affectgpt_jax.evaluation.datasets import BY_NAME, DATASETS, GROUPS, UNIBENCH
from affectgpt_jax.evaluation.lexicon import OFFICIAL_SHA256, Lexicon, is_official, load_lexicon
from affectgpt_jax.evaluation.metrics import ScoreError, bootstrap, mean_interval
from affectgpt_jax.evaluation.published import read_published
from affectgpt_jax.evaluation.readers import Pairs
from affectgpt_jax.evaluation.report import write_report
from affectgpt_jax.evaluation.results import MEAN, group_means, score_set
from affectgpt_jax.evaluation.summary import make_report
from affectgpt_jax.evaluation.tables import (
    NOT_COMPARABLE,
    Run,
    ablation_table,
    main_table,
    read_run,
    render_markdown,
)

SHARED = Path(__file__).parents[2].parent / "shared"
NINE = [dataset.name for dataset in DATASETS if dataset.unibench]


def with_identity(identity):
    lexicon = load_lexicon()
    return Lexicon(identity, lexicon.forms, lexicon.labels, lexicon.table)


OFFICIAL = with_identity(Identity("official emotion wheels", OFFICIAL_SHA256))
DEFAULT = load_lexicon()


def predictions(task, clips, right):
    """Pairs of which the first `right` are right."""
    names = tuple(f"clip {n}" for n in range(clips))
    words = ("positive", "negative") if task == "sentiment" else (["happy"], ["sad"])
    found = [words[n >= right] for n in range(clips)]
    truth = {"sentiment": 1.0, "fine": ["happy"]}.get(task, "happy")
    return Pairs(names, found, [truth] * clips, ())


def results(names=NINE, lexicon=OFFICIAL, right=(30,), clips=40, resamples=20):
    return [
        score_set(
            name,
            BY_NAME[name].task,
            {f"epoch {n}": predictions(BY_NAME[name].task, clips, r) for n, r in enumerate(right)},
            lexicon if BY_NAME[name].task != "sentiment" else None,
            resamples=resamples,
        )
        for name in names
    ]


def shipped():
    with published.RESULTS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_published_figure_survived_the_copy():
    source = SHARED / "reference" / "published_results.csv"
    if not source.exists():
        pytest.skip("the published figures are not beside the checkout")
    with source.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == shipped()


def test_published_means_are_the_means_of_published_scores():
    for table in ("2/12", "3/13"):
        for system in read_published(table):
            mean = np.mean([system.values[name] for name in NINE])
            # Both sides are rounded to a hundredth of a percent.
            assert system.values[MEAN] == pytest.approx(mean, abs=0.6e-4)
    for table in ("4", "5"):
        for system in read_published(table):
            parts = [system.values[GROUPS[task]] * len(names) for task, names in UNIBENCH.items()]
            assert system.values[MEAN] == pytest.approx(sum(parts) / 9, abs=1e-4)
    for system in read_published("10"):
        p, r = system.others["OV-MERD", "Ps"], system.others["OV-MERD", "Rs"]
        assert system.values["OV-MERD"] == pytest.approx(2 * p * r / (p + r), abs=1.5e-4)


def test_the_paper_s_best_system_is_where_it_should_be():
    best = max(read_published("2/12"), key=lambda system: system.values[MEAN])
    assert (best.name, best.modalities, best.values[MEAN]) == ("AffectGPT", "AVT", 0.7477)
    assert best.others["CMU-MOSI", "ACC"] == 0.8125
    with pytest.raises(ReadError, match="no table '99'"):
        read_published("99")


def test_the_official_hash_is_that_of_the_official_files():
    if not (SHARED / "emotion_wheel").is_dir():
        pytest.skip("the official lexicon is not here")
    assert is_official(load_lexicon(SHARED / "emotion_wheel").identity)
    assert not is_official(DEFAULT.identity)


def test_the_table_has_the_shape_of_table_2():
    sets = results(["MER2023", "OV-MERD", *NINE[1:]])
    table = main_table("ours", "AVT", sets, group_means(sets, 20), peers=True)
    assert table.columns == (*NINE, "Mean", "OV-MERD")
    assert table.groups[:4] == (("Basic", 4), ("Sentiment", 4), ("Fine-grained", 1), ("", 1))
    ours, *peers = table.rows
    scores = [result.fixed.score.primary for result in sets if result.name != "OV-MERD"]
    assert ours.cells[9].value == pytest.approx(np.mean(scores))
    assert ours.cells[9].interval.low < ours.cells[9].value < ours.cells[9].interval.high
    assert all(cell.comparable for cell in ours.cells)
    systems = read_published("2/12")
    assert [cell.value for cell in peers[len(systems) - 1].cells] == [
        *(read_published("2/12")[-1].values[name] for name in NINE),
        0.7477,
        None,
    ]
    assert not any(cell.interval for row in peers for cell in row.cells)
    # Later systems stand below, each with its paper; of ours there is none.
    later = {row.name: (row.cells[9].value, row.source) for row in peers[len(systems) :]}
    assert later == {
        "AffectGPT-R1": (0.7948, "arXiv 2508.01318"),
        "OmniOPSD": (0.8419, "arXiv 2606.15920"),
    }
    assert {row.source for row in peers[: len(systems)]} == {"arXiv 2501.16566"}
    lines = render_markdown(table).splitlines()
    assert lines[2].endswith("| Source |") and lines[4].endswith("|  |")
    assert any("OmniOPSD" in line and line.endswith("| arXiv 2606.15920 |") for line in lines)
    alone = render_markdown(main_table("ours", "", sets, group_means(sets, 20), peers=False))
    assert "Source" not in alone


def test_without_all_nine_there_is_no_mean():
    sets = results(NINE[:-1])
    means = group_means(sets, 20)
    assert set(means) == {"Basic", "Sentiment"}
    table = main_table("ours", "", sets, means, peers=False)
    assert table.rows[0].cells[9].value is None
    assert "No mean: it needs all nine sets, and these are missing: OV-MERD+." in table.notes


def test_scores_of_another_lexicon_are_marked_beside_published_ones():
    sets = results(lexicon=DEFAULT)
    report = make_report("ours", sets, peers=True, resamples=20)
    marked = [cell.comparable for cell in report.tables[0].rows[0].cells]
    # The sentiment sets ask no lexicon; the mean holds sets that do.
    assert marked == [False] * 4 + [True] * 4 + [False, False]
    assert "they do not compare" in report.warnings[0] and "default lexicon" in report.warnings[0]
    text = render_markdown(report.tables[0])
    assert f"75.00{NOT_COMPARABLE}" in text
    assert f"{NOT_COMPARABLE} Not made with the official emotion wheels" in text
    fair = make_report("ours", results(), peers=True, resamples=20)
    assert NOT_COMPARABLE not in render_markdown(fair.tables[0])
    assert not any("do not compare" in warning for warning in fair.warnings)


def test_both_protocols_stand_side_by_side():
    sets = results(right=(35, 30))
    table = main_table("ours", "", sets, group_means(sets, 20), peers=False)
    fixed, best = table.rows
    assert best.name == "ours, best of 2, chosen on the test set"
    assert fixed.cells[0].value == 0.75 and best.cells[0].value == 0.875
    assert fixed.cells[9].value < best.cells[9].value
    # An interval around a maximum would not mean what it says.
    assert best.cells[9].interval is None


def test_two_lexicons_do_not_mix():
    mixed = results(["MER2023"]) + results(["MELD"], lexicon=DEFAULT)
    with pytest.raises(ScoreError, match="MER2023 and MELD were scored in two ways"):
        make_report("ours", mixed, resamples=0)
    with pytest.raises(ScoreError, match="two results of the set 'MELD'"):
        make_report("ours", results(["MELD", "MELD"]), resamples=0)
    wrong = dataclasses.replace(results(["MELD"])[0], task="fine")
    with pytest.raises(ScoreError, match="MELD is scored as basic, not as fine"):
        make_report("ours", [wrong], resamples=0)


def test_a_set_of_another_size_is_warned_about():
    [warning] = make_report("ours", results(["MER2023"]), resamples=0).warnings
    assert warning == "MER2023 has 40 clips here and 411 in the paper: not the same test set."


def test_a_mean_varies_less_than_the_sets_it_is_of():
    sets = results(clips=60, right=(30,))
    scores = [result.fixed.score for result in sets]
    mean = mean_interval(scores, 400)
    single = next(iter(bootstrap(scores[0], 400).values()))
    # Nine independent sets of one size: a third of the width, if each is drawn by itself.
    assert (mean.high - mean.low) / (single.high - single.low) == pytest.approx(1 / 3, abs=0.1)
    assert mean == mean_interval(scores, 400)
    with pytest.raises(ScoreError, match="one score or more"):
        mean_interval([])


@pytest.fixture
def runs(tmp_path):
    found = []
    for name, right in (("none", (20,)), ("qformer", (25,)), ("attention", (35, 30))):
        write_report(make_report(name, results(right=right), resamples=20), tmp_path / name)
        found.append(read_run(name, tmp_path / name / "report.json"))
    return found


def test_runs_come_together_in_the_shape_of_table_5(runs):
    table = ablation_table("5", runs, peers=True)
    best = "Mean, best checkpoint, chosen on the test set"
    assert table.columns == ("Fine-grained", "Basic", "Sentiment", "Mean", best)
    ours = [row for row in table.rows if not row.published]
    assert [row.name for row in ours] == ["none", "qformer", "attention"]
    assert [row.cells[1].value for row in ours] == [0.5, 0.625, 0.75]
    assert [row.cells[4].value is None for row in ours] == [True, True, False]
    peers = {row.name: [cell.value for cell in row.cells] for row in table.rows if row.published}
    assert peers["attention"] == [0.6252, 0.6838, 0.8422, 0.7477, None]
    assert "| qformer | 62.65 | 66.89 | 84.30 | 74.16 |" in render_markdown(table)


@pytest.mark.parametrize(
    ("number", "rows"), [("3", 14), ("4", 5), ("5", 3), ("6", 7), ("8", 4), ("fig4", 8)]
)
def test_every_ablation_of_the_paper_has_a_table(runs, number, rows):
    table = ablation_table(number, runs, peers=True)
    assert sum(row.published for row in table.rows) == rows
    assert all(len(row.cells) == len(table.columns) for row in table.rows)
    assert all(row.cells[3].value for row in table.rows)


def test_runs_on_another_set_are_compared_on_it(tmp_path):
    names = []
    for name, right in (("a", 20), ("b", 30)):
        pairs = {"p": predictions("words", 40, right)}
        demo = score_set("demo", "words", pairs, None, resamples=20)
        write_report(make_report(name, [demo], resamples=20), tmp_path / name)
        names.append(read_run(name, tmp_path / name / "report.json"))
    table = ablation_table("6", names)
    assert table.columns == ("demo",)
    assert [row.cells[0].value for row in table.rows] == [0.5, 0.75]
    assert NOT_COMPARABLE not in render_markdown(table)


def test_ablations_that_make_no_sense_are_refused(tmp_path, runs):
    with pytest.raises(ScoreError, match="no ablation '7'"):
        ablation_table("7", runs)
    with pytest.raises(ScoreError, match="one run or more"):
        ablation_table("5", [])
    with pytest.raises(ScoreError, match="two runs are called 'none'"):
        ablation_table("5", [runs[0], runs[0]])
    write_report(make_report("x", results(lexicon=DEFAULT), resamples=0), tmp_path)
    other = read_run("x", tmp_path / "report.json")
    with pytest.raises(ScoreError, match="two ways, which do not mix"):
        ablation_table("5", [*runs, other])


@pytest.mark.parametrize(
    ("number", "place", "rows"),
    [("3", "Table 3", 14), ("4", "Table 4", 5), ("fig4", "Figure 4", 8)],
)
def test_training_sets_filters_and_encoders_stand_beside_the_papers(number, place, rows):
    ours = Run("ours", {"Mean": 0.5}, {}, {}, "", None, True)
    table = ablation_table(number, [ours], peers=True)
    assert place in table.title and len(table.rows) == 1 + rows
    mean = table.columns.index("Mean")
    best = max(table.rows, key=lambda row: row.cells[mean].value)
    assert best.cells[mean].value == 0.7477
    assert not best.name.startswith(("trained on", "filter", "encoder"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: [],
        lambda report: report | {"format": "other"},
        lambda report: report | {"means": {"Mean": {"fixed": "high"}}},
        lambda report: report | {"means": {"Mean": {"fixed": float("nan")}}},
        lambda report: report | {"sets": [{"name": "x"}]},
        lambda report: {key: value for key, value in report.items() if key != "lexicon"},
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path, spoil):
    write_report(make_report("x", results(["MELD"]), resamples=5), tmp_path)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(ReadError, match="(is not|expected) a report.json"):
        read_run("x", path)


def test_markdown_keeps_its_columns_whatever_a_name_holds():
    names = ["a|b", "<script>", "`x`\n\n# y", "*b*", "\\", "\u202eabc", "\ud800", "&amp;", "🙂"]
    for name, other in itertools.pairwise(names):
        sets = results(["MELD"], resamples=0)
        sets += [dataclasses.replace(sets[0], name=other, task="basic")]
        lines = render_markdown(main_table(name, "|", sets, {}, False)).splitlines()
        rows = [line.replace("\\\\", "").replace("\\|", "") for line in lines if line[:1] == "|"]
        assert len({row.count("|") for row in rows}) == 1 and len(rows) == 3
        assert "<script" not in "".join(lines).replace("\\<", "")


def test_a_report_on_other_sets_alone_has_no_empty_columns():
    demo = score_set("demo", "words", {"p": predictions("words", 40, 30)}, None, resamples=0)
    report = make_report("ours", [demo], resamples=0)
    assert report.tables[0].columns == ("demo",) and report.tables[0].notes == ()
    assert report.warnings == () and report.means == {} and report.lexicon is None
    assert "| **ours** | 75.00 |" in render_markdown(report.tables[0])
    beside = make_report("ours", [demo], peers=True, resamples=0).tables[0]
    assert beside.columns == ("demo",) and not any(row.published for row in beside.rows)
