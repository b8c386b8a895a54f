import contextlib
import html.parser
import json
import random
import re
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from chromium import browser

from affectgpt_jax.evaluation.markup import escape_markdown, printable
from affectgpt_jax.evaluation.readers import Finding, Pairs
from affectgpt_jax.evaluation.report import write_report
from affectgpt_jax.evaluation.results import score_set
from affectgpt_jax.evaluation.summary import make_report
from affectgpt_jax.report import main

VOID = {"meta", "link"}
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
NASTY = (
    "<script>alert(1)</script>",
    "</style><img src=http://x.invalid/a onerror=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "--><!--",
    "]]>&amp;&lt;",
    "line\nbreak\r\nand\ttab",
    "\u202eright to left\u202c \u05d0\u05d1\u05d2",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600",
    "\0\x01\x1b[31m\x7f\x85",
    "\ud800 lone",
    "{{template}} {0} %s",
    "x" * 5000,
    "\u2028\u2029\ufeff",
    "javascript:alert(1)",
)


class Checker(html.parser.HTMLParser):
    """Opens and closes, elements and their attributes, and the text outside of style."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def check(page):
    """The page is whole, and holds no element or attribute that could do anything."""
    found = Checker()
    found.feed(page)
    found.close()
    assert found.open == []
    assert not found.tags & {"script", "img", "iframe", "object", "form", "base", "embed"}
    assert not {name for name in found.attributes if name.startswith("on") or name == "src"}
    assert POLICY in page
    return "".join(found.text)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def files(tmp_path):
    """Two checkpoints on a basic set, predictions on a sentiment set, and the demo world's."""
    emotions = ["happy", "sad", "angry", "neutral"]
    truth = [(f"c{n}", emotions[n % 4]) for n in range(40)]
    text = "name,emotion,subtitle\n" + "".join(f"{n},{e},\n" for n, e in truth)
    write(tmp_path / "truth.csv", text)
    for epoch, right in ((30, 36), (60, 28)):
        records = [
            {
                "name": n,
                "labels": [e if i < right else "zorblish"],
                "text": f"He is {e} <b>now</b>.",
            }
            for i, (n, e) in enumerate(truth)
        ]
        write(tmp_path / f"{epoch}.jsonl", lines(records))
    write(tmp_path / "v.csv", "name,valence\n" + "".join(f"c{n},{n - 20}\n" for n in range(40)))
    records = [
        {"name": f"c{n}", "sentiment": "positive" if n > 15 else "neutral"} for n in range(40)
    ]
    write(tmp_path / "s.jsonl", lines(records))
    return tmp_path


def run(*arguments):
    main([str(argument) for argument in arguments])


def failure(*arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    return str(stop.value)


def arguments_of(files, out):
    basic = f"mer2023={files / '30.jsonl'},{files / '60.jsonl'},{files / 'truth.csv'}"
    demo = f"demo={files / '60.jsonl'},{files / 'truth.csv'}"
    return [
        *("--set", basic, "--set", f"mosi={files / 's.jsonl'},{files / 'v.csv'}", "--set", demo),
        *("--reference", "demo:ceiling with face=0.186", "--peers", "--bootstrap=50"),
        *("--system", "tiny", "--modalities", "AVT", "--out", out),
    ]


def test_prediction_files_become_a_report(files, capsys):
    run(*arguments_of(files, files / "out"))
    told = capsys.readouterr()
    assert told.out.split() == [
        str(files / "out" / f"report.{end}") for end in ("html", "json", "md")
    ]
    assert "warning: Scores of MER2023 were made with the lexicon AffectGPT-JAX default" in told.err
    assert "warning: MER2023 has 40 clips here and 411 in the paper" in told.err
    text = check((files / "out" / "report.html").read_text(encoding="utf-8"))
    for part in (
        "tiny",
        "best of 2, chosen on the test set",
        "ceiling with face",
        "zorblish",
        "He is happy <b>now</b>.",
        "Emotion-LLaMA",
        "they do not compare",
        "one true word, hit rate of the first label, no lexicon",
    ):
        assert part in text
    report = json.loads((files / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    sets = {entry["name"]: entry for entry in report["sets"]}
    assert set(sets) == {"MER2023", "CMU-MOSI", "demo"}
    assert sets["demo"]["protocols"]["fixed_value"] == 28 / 40
    assert sets["demo"]["references"] == {"ceiling with face": 0.186}
    assert sets["MER2023"]["protocols"]["chosen_on_test"] is True
    assert sets["MER2023"]["results"][-1]["counts"]["unknown_predicted"]["zorblish"] == 12
    assert report["comparable"] is False and report["lexicon"]["sha256"] in text
    table = (files / "out" / "report.md").read_text(encoding="utf-8")
    assert "| **tiny, fixed checkpoint** | AVT |" in table
    assert "| AffectGPT | AVT | 78.54 | 78.80 |" in table


def test_clips_without_a_prediction_stop_the_report_or_are_warned_about(files, capsys):
    write(files / "one.jsonl", '{"name": "c0", "labels": ["happy"]}\n')
    known = ["--set", f"demo={files / 'one.jsonl'},{files / 'truth.csv'}", "--out", files / "out"]
    assert "no prediction of 39 clips" in failure(*known)
    run(*known, "--missing=empty", "--bootstrap=0")
    assert (
        "warning: demo: 39 clips have no prediction and count as empty." in capsys.readouterr().err
    )
    page = (files / "out" / "report.html").read_text(encoding="utf-8")
    assert "39 clips without a prediction, scored as empty: " in check(page)


def test_references_have_a_named_line_each_and_bars_are_as_long_as_scores(files):
    more = ("--reference", "demo:ceiling=0.9", "--reference", "demo:chance=0.25")
    run(*arguments_of(files, files / "out"), *more)
    page = (files / "out" / "report.html").read_text(encoding="utf-8")
    # From the highest one down, each with its value.
    named = re.findall(r'<span class="named"><bdi>(.*?)</bdi>.*?>([\d.]+)</span>', page, re.DOTALL)
    assert named == [("ceiling", "90.00"), ("chance", "25.00"), ("ceiling with face", "18.60")]
    bars = re.findall(r'<td class="bar" style="--v:([\d.]+)">([\d.]+)</td>', page)
    assert len(bars) > 10
    assert all(100 * float(length) == pytest.approx(float(said), abs=0.01) for length, said in bars)


def test_published_systems_stand_only_beside_sets_that_they_have_a_score_on(files):
    known = ["--set", f"demo={files / '60.jsonl'},{files / 'truth.csv'}", "--peers"]
    run(*known, "--bootstrap=0", "--out", files / "out")
    text = check((files / "out" / "report.html").read_text(encoding="utf-8"))
    assert "No published system has a score on demo." in text
    assert "Emotion-LLaMA" not in text and "MER2023" not in text


def test_curves_of_a_training_lie_in_their_frames(tmp_path):
    pairs = {"p": Pairs(("a",), [["x"]], ["x"], ())}
    steps = list(range(1, 1001))
    curves = {
        "loss": {"train": (steps, [2 - s / 1000 for s in steps]), "val": ([500, 1000], [1.5, 1])},
        "hit rate": {"val": ([500, 1000], [0.0, 0.0])},
    }
    sets = [score_set("one", "words", pairs, None, resamples=0)]
    write_report(make_report("x", sets, resamples=0, curves=curves), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    check(page)
    paths = re.findall(r'<path class="line-(\d)( dots)?" d="(.*?)"/>', page)
    # Of few points each is marked.
    assert [(line, dots) for line, dots, _ in paths] == [
        ("0", ""), ("1", ""), ("1", " dots"), ("0", ""), ("0", " dots"),
    ]  # fmt: skip
    train, val = ([list(map(float, at.split())) for at in re.findall(r"[\d.]+ [\d.]+", d)]
                  for _, _, d in paths[:2])  # fmt: skip
    assert 250 < len(train) <= 301 and train[0][0] == 0.1 and train[-1][0] == 100
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in train + val)
    assert train[-1][1] == val[-1][1]  # both are 1
    ticks = re.findall(r'<span class="tick" style="top:([\d.]+)%">([\d.]+)</span>', page)
    assert [value for _, value in ticks][:5] == ["0", "0.5", "1", "1.5", "2"]
    assert next(float(top) for top, value in ticks if value == "1") == train[-1][1]


def test_the_same_files_make_the_same_report(files):
    for out in ("a", "b"):
        run(*arguments_of(files, files / out))
    for name in ("report.html", "report.json", "report.md"):
        assert (files / "a" / name).read_bytes() == (files / "b" / name).read_bytes()


def test_runs_become_an_ablation(files, capsys):
    # Where `evaluate` writes into a workdir, and anywhere else.
    places = {"60": files / "run60" / "evaluate", "30": files / "run30"}
    for name, place in places.items():
        demo = f"demo={files / name}.jsonl,{files / 'truth.csv'}"
        run("--set", demo, "--bootstrap=20", "--out", place)
    runs = [f"--run=<60>={files / 'run60'}", f"--run=<30>={files / 'run30' / 'report.json'}"]
    run("--ablation=5", *runs, "--peers", "--out", files / "out")
    text = check((files / "out" / "ablation.html").read_text(encoding="utf-8"))
    assert "<60>" in text and "qformer" in text
    whole = (files / "out" / "ablation.json").read_bytes()
    run("--ablation=5", runs[0], f"--run=<30>={files / 'run30'}", "--peers", "--out", files / "out")
    assert (files / "out" / "ablation.json").read_bytes() == whole
    table = (files / "out" / "ablation.md").read_text(encoding="utf-8")
    assert "| **\\<60\\>** | – | – | – | – | 70.00 (" in table
    assert json.loads((files / "out" / "ablation.json").read_text())["columns"][-1] == "demo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --set"),
        (["--set=mer2023=p"], "is not NAME=PREDICTIONS,TRUTH"),
        (["--set=mer2023=p,p,t"], "names a prediction file twice"),
        (["--set=other=p,t"], "say how it is scored, as in other:basic="),
        (["--set=other:best=p,t"], "'best' is not the task of other"),
        (["--set=mer2023:fine=p,t"], "'fine' is not the task of mer2023; expected basic"),
        (["--set=mosi=p,t", "--reference=demo:x=0.5"], "there is no --set demo"),
        (["--set=mosi=p,t", "--reference=mosi:x=5"], "with a share from 0 to 1"),
        (["--set=mosi=p,t", "--lexicon=d"], "--lexicon has no part here: no --set is scored as fi"),
        (["--ablation=5", "--run=a=b", "--level=2"], "--level has no part here: no --set is score"),
        (["--ablation=5"], "go together"),
        (["--ablation=5", "--run=x"], "is not LABEL=RUN"),
        (["--ablation=7", "--run=a=b"], "invalid choice"),
        (["--set=mosi=p,t", "--bootstrap=-1"], "must be 0 or more"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out=x"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_trouble_is_one_sentence(files):
    known = f"demo={files / '60.jsonl'},{files / 'truth.csv'}"
    out = write(files / "taken", "")
    message = failure("--set", known, "--out", out)
    assert message == f"error: --out={out} cannot be written: File exists"
    message = failure("--set", f"mosi={files / 'no.jsonl'},{files / 'v.csv'}", "--out", out)
    assert message.startswith(f"error: {files / 'no.jsonl'} cannot be read")
    message = failure("--set", known, "--set", known, "--out", out)
    assert message == "error: there are two results of the set 'demo'; keep one"
    message = failure("--ablation=4", f"--run=a={files / 'truth.csv'}", "--out", out)
    assert "not JSON" in message and message.endswith("expected a report.json")


def nasty_report(seed, words=NASTY):
    """A report in which everything that comes from outside is hostile."""
    draw = random.Random(seed)

    def name(n):
        return f"{draw.choice(words)}{n}"

    clips = 60
    truth = [draw.choice(words) for _ in range(clips)]
    labels = [draw.sample(words, draw.randrange(4)) for _ in range(clips)]
    names = tuple(name(n) for n in range(clips))
    findings = (Finding(draw.choice(words), names[:12]),)
    texts = {n: draw.choice(words) * draw.choice([1, 40]) for n in names}
    references = {draw.choice(words): 0.4, "ceiling": 0.9}
    sets = []
    for n, task in enumerate(("words", "sentiment")):
        told = [draw.choice([*words, "positive"]) for _ in names] if n else labels
        true = [draw.choice([-1.0, 0.5]) for _ in names] if n else truth
        pairs = {name(k): Pairs(names, told, true, findings) for k in range(2)}
        settings = {"resamples": 10, "texts": texts, "references": references, "seed": seed}
        sets.append(score_set(f"{draw.choice(words)}{n}", task, pairs, None, **settings))
    return make_report(
        draw.choice(words), sets, modalities=draw.choice(words), peers=True, seed=seed
    )


@pytest.mark.parametrize("seed", range(25))
def test_hostile_text_stays_text(tmp_path, seed):
    report = nasty_report(seed)
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_bytes().decode("utf-8")
    text = check(page)
    assert printable(report.system) in text
    assert all(printable(result.name) in text for result in report.sets)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", page)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in table.replace("\\<", "")


def test_thousands_of_classes_make_a_page_of_bounded_size(tmp_path):
    words = [f"emotion {n}" for n in range(3000)]
    names = tuple(map(str, range(3000)))
    pairs = {"p": Pairs(names, [[w, w + "?"] for w in reversed(words)], words, ())}
    report = make_report(
        "many", [score_set("many", "words", pairs, None, resamples=0)], resamples=0
    )
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "and 2,960 more in report.json" in check(page)
    assert len(page) < 400_000
    [entry] = json.loads((tmp_path / "report.json").read_text())["sets"]
    assert len(entry["results"][0]["classes"]) == 3000


def test_escaping_keeps_what_can_be_shown():
    assert printable("\0\x9b\ud800\n\u4f60\U0001f600") == "\\x00\\x9b\\ud800\n\u4f60\U0001f600"
    assert escape_markdown("a|b\n<c> `d` & e") == "a\\|b \\<c\\> \\`d\\` &amp; e"


def test_half_a_report_is_never_left_behind(tmp_path, monkeypatch):
    report = nasty_report(0)
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with contextlib.suppress(OSError):
        write_report(nasty_report(1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_loads_nothing_heavy(files):
    code = """
import sys
from affectgpt_jax.report import main
main(sys.argv[1:])
heavy = {"jax", "jaxlib", "flax", "torch", "pandas", "scipy", "matplotlib", "absl"}
sys.exit(f"loaded {heavy & set(sys.modules)}" if heavy & set(sys.modules) else 0)
"""
    command = [sys.executable, "-c", code, *map(str, arguments_of(files, files / "out"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Templates are loaded when a page is written.
    importing = "import sys, affectgpt_jax.report; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", importing]).returncode == 0


def browse(page, profile, *flags):
    """What a real browser makes of a page: its output and its log. Any name leads nowhere."""
    command = [
        browser(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--log-level=0",
        *flags,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


# Where the browser itself asks for updates, dictionaries and the time.
ITS_OWN = ("google.com", "googleapis.com", "gvt1.com")


def requests_of(log):
    """Hosts in a browser's net log that the page asked for."""
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    urls = (urlsplit(str(event.get("params", {}).get("url", ""))) for event in events)
    hosts = {url.hostname or "" for url in urls if url.scheme in ("http", "https", "ws", "wss")}
    return {host for host in hosts if not host.endswith(ITS_OWN)}


@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_a_real_browser_renders_the_page_without_error_or_request(files, kind):
    browser()
    if kind == "plain":
        run(*arguments_of(files, files / "out"))
    else:
        write_report(nasty_report(3), files / "out")
    page, net, shot = files / "out" / "report.html", files / "net.json", files / "shot.png"
    dom, log = browse(page, files / "profile", "--dump-dom", f"--log-net-log={net}")
    assert "CONSOLE" not in log
    assert requests_of(net) == set()
    assert "</html>" in dom and dom.count("<section>") == (3 if kind == "plain" else 2)
    assert "<script" not in dom and "<img" not in dom
    browse(page, files / "profile", f"--screenshot={shot}", "--window-size=400,900")
    assert shot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and shot.stat().st_size > 10_000


def test_the_browser_check_sees_a_request_and_a_console_error(tmp_path):
    text = '<title>x</title><img src="http://x.invalid/a"><script>console.error("boo")</script>'
    page = write(tmp_path / "page.html", text)
    flags = "--dump-dom", f"--log-net-log={tmp_path / 'net.json'}"
    _, log = browse(page, tmp_path / "profile", *flags)
    assert "CONSOLE" in log
    assert requests_of(tmp_path / "net.json") == {"x.invalid"}
