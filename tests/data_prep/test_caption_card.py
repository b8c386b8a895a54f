import csv
import json
import re
import subprocess

import pytest
from chat_stub import Stub
from chromium import browser
from scipy.stats import binomtest
from test_caption_filter import NAMES, data_set  # noqa: F401

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.data.records import Record, write_records
from data_prep.caption import compare
from data_prep.caption.__main__ import main
from data_prep.speakers.verdicts import write_speakers


@pytest.fixture
def carded(data_set):  # noqa: F811
    """The card of the filter's data set, with a crowd and durations."""
    root = data_set.parent
    crowd = root / "crowd"
    crowd.mkdir()
    corpora = [
        {"name": "meld", "classes": ["happy", "sad"], "valence": False, "clips": 90, "members": 10,
         "majority": 0.5, "score": 0.625, "score_sd": 0.1}
    ]  # fmt: skip
    leaks = [{"in": "meld", "and": "mer2024", "same": "file", "clips": 1, "names": ["clip00"]}]
    summary = {"corpora": corpora, "encoders": {}, "leaks": {}}
    summary["leaks"] = {"left_out": {}, "found": leaks, "compared": []}
    (crowd / "members.json").write_text(json.dumps(summary))
    (root / "ex").mkdir()
    rows = [f"{name},{2 + i / 10}" for i, name in enumerate(NAMES)]
    (root / "ex" / "extraction.csv").write_text("name,seconds\n" + "\n".join(rows) + "\n")
    main(["filter", f"--out={data_set}", f"--csv={root / 'clips.csv'}"])
    main(
        ["card", f"--out={data_set}", f"--csv={root / 'clips.csv'}", f"--crowd={crowd}",
         f"--records={root / 'ex'}", "--title=A | set", "--language", "zh", "en"]
    )  # fmt: skip
    return data_set


def test_the_card_says_what_is_in_and_what_is_left_out(carded):
    card = (carded / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    facts = {k: json.loads(v) for k, v in (line.split(": ", 1) for line in head.splitlines())}
    assert facts["language"] == ["zh", "en"] and facts["size_categories"] == ["n<1K"]
    assert facts["pretty_name"] == "A | set"
    assert body.lstrip().startswith("# A \\| set\n")
    for section in ("Size", "The filter", "Lengths", "Labels", "What the filter favours",
                    "Crowd and descriptions", "Samples", "How it was made", "The crowd",
                    "Limits and licence"):  # fmt: skip
        assert f"\n## {section}\n" in body, section
    assert "| all descriptions | 24 |" in body and "| kept | 19 |" in body
    assert "| speaker | 22 |" in body and "off screen, by synchrony" in body
    assert "| happy | 23 | 82.6 % |" in body and "| no vote | 1 | 0.0 % |" in body
    assert "| meld | 90 | happy, sad | 10 | 0.625 |" in body and '"and": "mer2024"' in body
    assert "2.5 standard deviations" in body and "synchrony (24 clips)" in body
    samples = body.split("Not kept:")[1].split("## ")[0]
    assert "emotion: the crowd did not vote" in samples and "| clip23 |" in samples
    for picture in set(re.findall(r"\]\((\S+\.png)\)", card)):
        assert (carded / picture).read_bytes()[:4] == b"\x89PNG"


def test_the_card_is_of_what_the_filter_wrote(data_set, capsys):  # noqa: F811
    root, out = data_set.parent, f"--out={data_set}"
    table = f"--csv={root / 'clips.csv'}"
    with pytest.raises(SystemExit, match="funnel.json is missing; run `affectgpt caption filter`"):
        main(["card", out, table])
    main(["filter", out, table, "--levels=none"])
    main(["card", out, table])
    card = (data_set / "README.md").read_text()
    # clip01 has no label, and is not in plus.csv.
    assert len((data_set / "plus.csv").read_text().splitlines()) == 1 + 23
    assert "| kept | 23 |" in card and "levels: none" in card
    assert (
        "| trained on | 23 | 2 | 1 | 0 |" in card and "| trained on | without a label | 1 |" in card
    )
    assert "| clip01 | " in card.split("Not kept:")[1] and "without a label to train" in card
    assert "see the leaks above" not in card
    assert "| labels | not known | none | descriptions | 24 |" in card
    assert "| descriptions | m | none | not known | 24 |" in card
    # A state that the filter has not seen.
    for file, old, new, told in (
        ("caption.toml", "tails = 2.5", "tails = 3", "caption.toml has changed since"),
        ("labels.csv", "[sad]", "[afraid]", "what is kept has changed since"),
        ("labels.csv", "[sad]", "[]", "what it judged has changed since"),
    ):
        text = (data_set / file).read_text()
        (data_set / file).write_text(text.replace(old, new))
        with pytest.raises(SystemExit, match=told):
            main(["card", out, table])
        (data_set / file).write_text(text)
    assert (data_set / "README.md").read_text() == card


def test_the_card_says_who_found_the_labels_and_drops_a_script_of_few(tmp_path, capsys):
    out = tmp_path / "set"
    replies = {f"c{i:02}": "\u4ed6\u5f88\u60b2\u4f24" * (9 + i % 4) + " sad" for i in range(40)}
    replies["c40"] = "I am sorry, there is nothing to see here, he is sad."
    lines = "".join(json.dumps({"name": n, "reply": r}) + "\n" for n, r in replies.items())
    (tmp_path / "given.jsonl").write_text(lines)
    (tmp_path / "clips.csv").write_text("name\n" + "\n".join(replies) + "\n")
    main(["merge", f"--out={out}", f"--csv={tmp_path / 'clips.csv'}",
          f"--replies={tmp_path / 'given.jsonl'}"])  # fmt: skip
    main(["labels", f"--out={out}"])
    speakers = [{"name": n, "verdict": "speaking", "network": "synchrony"} for n in replies]
    write_speakers(out / "speakers.csv", speakers)
    main(["filter", f"--out={out}", "--levels=low"])
    main(["card", f"--out={out}"])
    card = (out / "README.md").read_text()
    assert "| length | in words, as 1 of 41 descriptions only | 1 |" in card
    assert "- dropped in words, as 1 of 41 descriptions only" in card
    assert "| characters of the description | clips | kept |" in card
    assert "| words of the description | clips | kept |" in card
    assert re.search(r"\| labels \| rules .* \| none \| descriptions \| 41 \|", card)


def test_the_same_data_set_has_the_same_card(carded):
    before = {p: p.read_bytes() for p in carded.rglob("*") if p.is_file()}
    root = carded.parent
    main(
        ["card", f"--out={carded}", f"--csv={root / 'clips.csv'}", f"--crowd={root / 'crowd'}",
         f"--records={root / 'ex'}", "--title=A | set", "--language", "zh", "en"]
    )  # fmt: skip
    assert {p: p.read_bytes() for p in carded.rglob("*") if p.is_file()} == before


# --- a user study -------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "total"), [(69, 80), (0, 10), (10, 10), (3, 7)])
def test_intervals_are_wilsons(count, total):
    expected = binomtest(count, total).proportion_ci(method="wilson")
    found = compare.wilson(count, total)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert found.share == count / total


@pytest.fixture
def study(tmp_path):
    ours = {f"clip{i}": f"ours {i}" for i in range(9)} | {"evil": "</script><b>ours"}
    theirs = {f"clip{i}": f"theirs {i}" for i in range(1, 12)} | {"evil": "<i>theirs"}
    count = compare.write_page(
        tmp_path, ours, theirs, {"clip1": "a & b"}, pairs=20, seed=3, title="Which one?"
    )
    return tmp_path, count


def key_of(folder):
    pairs = json.loads((folder / "compare-key.json").read_text())["pairs"]
    return {pair["clip"]: pair["ours"] for pair in pairs}


def test_pairs_are_blinded_and_escaped(study):
    folder, count = study
    page = (folder / "compare.html").read_text()
    key = {
        p["clip"]: p["ours"] for p in json.loads((folder / "compare-key.json").read_text())["pairs"]
    }
    assert count == len(key) == 9 and set(key.values()) == {"a", "b"}
    assert "<b>ours" not in page and "<i>theirs" not in page and "a &amp; b" in page
    for clip, side in key.items():
        fieldset = page.split(f'data-clip="{clip}"')[1].split("</fieldset>")[0]
        first = fieldset.index("ours") < fieldset.index("theirs")
        assert first == (side == "a")


def test_answers_are_counted_by_the_key(study):
    folder, _ = study
    key = {
        p["clip"]: p["ours"] for p in json.loads((folder / "compare-key.json").read_text())["pairs"]
    }
    other = {"a": "b", "b": "a"}
    file = folder / "answers.csv"
    rows = [("ann", "clip1", key["clip1"]), ("ann", "clip2", other[key["clip2"]]),
            ("ann", "clip3", "tie"), ("bob", "clip1", key["clip1"])]  # fmt: skip
    page = json.loads((folder / "compare-key.json").read_text())["page"]
    assert f'<body data-page="{page}">' in (folder / "compare.html").read_text()
    head = "page,rater,clip,answer\n"
    file.write_text(head + "".join(",".join([page, *row]) + "\n" for row in rows))
    shares, raters = compare.count_answers(folder, [file])
    assert {name: share.count for name, share in shares.items()} == {"win": 2, "loss": 1, "tie": 1}
    assert raters == 2
    for text, told in (
        ("ann,clip77,a", "'clip77' is not in"),
        ("ann,clip1,c", "expected a, b or tie"),
        ("ann,clip1,a\nann,clip1,b", "line 3: 'ann' has answered about 'clip1' already"),
    ):
        rows = "".join(f"{page},{row}\n" for row in text.split("\n"))
        file.write_text(head + rows)
        with pytest.raises(UserError, match=told):
            compare.count_answers(folder, [file])
    # Other pairs or sides are another page, whose key answers are not counted by.
    strange = 'a\x1b"><script>'
    with pytest.raises(UserError, match="is the key of another page.*move compare.html and"):
        compare.write_page(folder, {strange: "x"}, {strange: "y"}, {}, pairs=1, seed=0, title="t")
    (folder / "compare-key.json").unlink()
    # A browser sends back what the page shows.
    compare.write_page(folder, {strange: "x"}, {strange: "y"}, {}, pairs=1, seed=0, title="t")
    assert strange not in (folder / "compare.html").read_text()
    with pytest.raises(UserError, match=f"line 2: the answer is about the page '{page}', and"):
        compare.count_answers(folder, [file])
    page = json.loads((folder / "compare-key.json").read_text())["page"]
    file.write_text(f'{head}{page},ann,"a\\x1b""><script>",tie\n')
    assert compare.count_answers(folder, [file])[0]["tie"].count == 1
    file.write_text(head)
    with pytest.raises(UserError, match="no answers"):
        compare.count_answers(folder, [file])
    with pytest.raises(UserError, match="no clip is described by both"):
        compare.write_page(folder, {"a": "x"}, {"b": "x"}, {}, pairs=2, seed=0, title="t")


# Clicks on the first, the last and the middle answer, then shows what would be saved.
CLICKS = """<script>
document.getElementById("rater").value = 'Ann "A" B';
[...document.querySelectorAll("fieldset")].slice(0, 3).forEach(
  (set, i) => set.querySelectorAll("input")[[0, 2, 1][i]].click());
document.body.append(Object.assign(document.createElement("pre"),
  { id: "saved", textContent: answers() + document.getElementById("left").textContent }));
</script></body>"""


def test_a_real_browser_saves_what_was_clicked(study, tmp_path):
    folder, _ = study
    text = (folder / "compare.html").read_text()
    digest = re.search(r"script-src 'sha256-[^']+'", text)[0]
    # The page's own script runs under its policy; that of this test would not.
    page = folder / "clicked.html"
    page.write_text(text.replace("</body>", CLICKS).replace(digest, "script-src 'unsafe-inline'"))

    def shown(path):
        done = subprocess.run(
            [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
             "--dump-dom", path.as_uri()],
            capture_output=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0
        return done.stdout.decode()

    saved = re.search(r'<pre id="saved">(.*?)</pre>', shown(page), re.DOTALL)[1]
    *rows, left = saved.splitlines()
    assert left == "6 pairs left"
    (folder / "answers.csv").write_text("\n".join(rows) + "\n")
    with open(folder / "answers.csv", newline="") as file:
        found = list(csv.reader(file))
    assert [row[3] for row in found] == ["answer", "a", "tie", "b"]
    assert found[1][1] == 'Ann "A" B'
    assert compare.count_answers(folder, [folder / "answers.csv"])[1] == 1
    assert "9 pairs left" in shown(folder / "compare.html")


# --- which describer ----------------------------------------------------------------------------


def test_describers_are_ranked_by_labels_of_people(tmp_path, capsys, monkeypatch):
    words = ["happy", "sad", "angry", "afraid", "surprised"]
    records = [Record(name=f"c{i}", features={}, labels=(words[i % 5],)) for i in range(20)]
    write_records(tmp_path / "truth", records, encoders={})
    for name, right in (("worse", 10), ("better", 18)):
        rows = [
            f"c{i},He is {words[i % 5] if i < right else words[(i + 1) % 5]}." for i in range(20)
        ]
        (tmp_path / f"{name}.csv").write_text("name,reply\n" + "\n".join(rows[:19]) + "\n")
    out = tmp_path / "set"
    files = [f"{name}={tmp_path / f'{name}.csv'}" for name in ("worse", "better")]
    main(["choose", f"--out={out}", f"--records={tmp_path / 'truth'}", "--replies", *files])
    found = json.loads((out / "choose.json").read_text())
    assert [c["name"] for c in found] == ["better", "worse"]
    assert found[0]["clips"] == 19 and found[0]["values"]["f"][0] > found[1]["values"]["f"][0] + 0.2
    said = capsys.readouterr().out
    assert "19 of 20" in said and "without a reply count as without labels" in said
    assert "extractions" not in said
    monkeypatch.setenv("no_proxy", "*")
    with Stub() as stub:
        server = ["--base-url", stub.url, "--model=m", "--runs=2"]
        main(
            ["choose", f"--out={out}", f"--records={tmp_path / 'truth'}", *server,
             "--replies", *files]
        )  # fmt: skip
    assert "half the range of 2 extractions at temperature 0" in capsys.readouterr().out
