"""From unlabelled clips to a described and filtered training set, as the paper made MER-Caption.

A data set is a folder, --out, and every stage goes on where it stopped:

    affectgpt caption describe audio --out caption --csv clips.csv \\
        --clips DIR --base-url http://localhost:8000/v1 --model NAME
    affectgpt caption describe video --out caption ...
    affectgpt caption merge  --out caption --csv clips.csv --base-url URL ...
    affectgpt caption labels --out caption
    affectgpt speakers check --out caption/speakers.csv --csv clips.csv ...
    affectgpt crowd vote     --out caption/votes.csv --crowd crowd ...
    affectgpt caption filter --out caption --csv clips.csv --levels low,emotion
    affectgpt caption card   --out caption

caption/caption.toml has the prompts and thresholds, and may be edited. `demo` shows all of it on
generated clips whose truth is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax import cli
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.json import write_json
from affectgpt_jax.common.progress import Counter
from affectgpt_jax.common.text import listed, print_lines, say
from affectgpt_jax.evaluation.chat_server import ChatServer
from affectgpt_jax.evaluation.extract import ChatExtractor, Extractor, ReplyCache
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rules import RuleExtractor

from ..clips import find_clips, read_clip_rows
from ..contents import read_seconds
from ..encoders import MISSING
from ..shards import add_shard_flag, shard_of_task
from . import describe, filtering, labels, pairs
from .settings import DESCRIPTIONS, FORMS, REPLIES, CaptionError, read_settings


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help.
        UsageError: something is wrong with it.
    """
    parser = cli.make_parser("affectgpt caption", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], None], what: str) -> Any:
        found = verbs.add_parser(name, help=what, description=what)
        found.set_defaults(run=run)
        add = found.add_argument
        add("--out", type=Path, required=True, metavar="DIR", help="folder of the data set")
        return add

    add = verb("describe", run_describe, "ask a model about the sound or the pictures of clips")
    add("kind", choices=describe.KINDS, help="what is shown to the model")
    add("--csv", type=Path, metavar="FILE", help="which clips, their subtitles and files")
    add("--clips", nargs="+", default=[], type=Path, metavar="DIR", help="folders of media files")
    add("--as", dest="form", metavar="FORM", help=_forms())
    add("--with-subtitle", action="store_true", help="show it, too; default: cues alone")
    _add_model(add, base=False)
    _add_shared(add)

    add = verb("merge", run_merge, "make one description of what was said about a clip")
    add("--csv", type=Path, metavar="FILE", help="which clips, and their subtitles")
    _add_model(add, base=True)
    _add_shared(add)

    add = verb("labels", run_labels, "find emotions and sentiment of descriptions; default: rules")
    _add_model(add, base=True)
    add("--records", type=Path, metavar="DIR", help="question-answer pairs, instead; for --write")
    add("--write", type=Path, metavar="DIR", help="records of the pairs that name an emotion")
    add("--lexicon", type=Path, metavar="DIR", help="official emotion wheels; default: shipped")

    add = verb("filter", run_filter, "keep the descriptions that pass the tests of the levels")
    add(
        "--levels",
        type=cli.argument_type(parse_levels),
        default=tuple(filtering.LEVELS),
        metavar="LEVELS",
        help=f"none, or some of {','.join(filtering.LEVELS)}; default: all",
    )
    add("--csv", type=Path, metavar="FILE", help="which clips; default: all with a description")
    add("--to", type=Path, metavar="DIR", help="where to write; default: --out")
    add("--records", type=Path, metavar="DIR", help="records of the clips, for --write")
    add("--write", type=Path, metavar="DIR", help="records of the clips that are kept")
    add("--lexicon", type=Path, metavar="DIR", help="official emotion wheels; default: shipped")

    add = verb(
        "card", run_card, "README.md and plots: what is in the data set, and how it was made"
    )
    add("--csv", type=Path, metavar="FILE", help="which clips; default: all with a description")
    add("--crowd", type=Path, metavar="DIR", help="the crowd that voted, for its corpora and leaks")
    add("--records", type=Path, metavar="DIR", help="extraction of the clips, for durations")
    add("--title", default="MER-Caption of our own", help="of the data set")
    add(
        "--license", default="other", help="of the annotations, as the hub names it; default: other"
    )
    add("--language", nargs="+", default=["en"], metavar="CODE", help="default: en")
    add("--seed", type=int, default=0, help="of the sample rows; default: 0")
    add("--lexicon", type=Path, metavar="DIR", help="official emotion wheels; default: shipped")

    add = verb("compare", run_compare, "a page for raters: ours or theirs, blinded; then counts")
    add(
        "--against", type=Path, metavar="FILE", help="their descriptions: CSV or JSONL, name, reply"
    )
    add("--csv", type=Path, metavar="FILE", help="subtitles of the clips, to be shown")
    add("--pairs", type=int, default=20, metavar="N", help="clips to compare; default: 20")
    add("--seed", type=int, default=0, help="of clips and sides; default: 0")
    add("--answers", nargs="+", type=Path, metavar="FILE", help="count what raters saved, instead")

    add = verb("choose", run_choose, "score describers by labels of people, as in Table 10")
    add("--records", type=Path, required=True, metavar="DIR", help="records with labels")
    add("--replies", nargs="+", required=True, metavar="NAME=FILE", help="of each describer")
    add(
        "--runs",
        type=int,
        default=3,
        metavar="N",
        help="extractions by a server, at temperature 0; default: 3",
    )
    _add_model(add, base=False)
    add("--lexicon", type=Path, metavar="DIR", help="official emotion wheels; default: shipped")

    add = verb("demo", run_demo, "all stages on generated clips whose truth is known")
    add("--seed", type=int, default=0, help="of the world; default: 0")
    add("--clips", type=int, metavar="N", help="that nobody has labelled; default: 2048")
    add(
        "--rendered",
        type=int,
        default=40,
        metavar="N",
        help="clips as pixels and sound, too; default: 40",
    )
    return parser.parse_args(argv)


def _forms() -> str:
    return "; ".join(f"{kind}: {' or '.join(forms)}" for kind, forms in FORMS.items())


def _add_model(add: Callable[..., Any], base: bool) -> None:
    cli.add_chat_server_flags(add)
    add("--timeout", type=float, default=120.0, metavar="S", help="for a reply; default: 120 s")
    if base:
        add("--workdir", type=Path, metavar="RUN", help="a run, whose base is asked instead")


def _add_shared(add: Callable[..., Any]) -> None:
    add("--replies", type=Path, metavar="FILE", help="JSONL or CSV with name and reply, instead")
    add_shard_flag(add)


def parse_levels(text: str) -> tuple[str, ...]:
    """Levels with commas between them.

    Raises:
        ValueError: an unknown one.
    """
    if text == "none":
        return ()
    asked = [level.strip() for level in text.split(",")]
    for level in asked:
        if level not in filtering.LEVELS:
            known = ", ".join(filtering.LEVELS)
            raise ValueError(f"{level!r} is no level; use none, or some of {known}")
    return tuple(level for level in filtering.LEVELS if level in asked)


# --- who is asked -------------------------------------------------------------------------------


def _check_model(arguments: argparse.Namespace, others: Sequence[str]) -> None:
    """Refuse a command line that names nobody to ask, several, or half a server."""
    if bool(arguments.base_url) != bool(arguments.model):
        raise cli.UsageError("--base-url and --model go together; see affectgpt caption --help")
    named = [
        f"--{n.replace('_', '-')}" for n in ("base_url", *others) if getattr(arguments, n, None)
    ]
    if len(named) > 1:
        raise cli.UsageError(f"{' and '.join(named)} both say who describes; name one of them")
    if arguments.concurrency < 1 or arguments.timeout <= 0:
        raise cli.UsageError("--concurrency and --timeout must be more than 0")


def _check_write(arguments: argparse.Namespace) -> None:
    """Refuse half of what says which records become which."""
    if bool(arguments.records) != bool(arguments.write):
        raise cli.UsageError("--records and --write go together: from where, and where to")


def _check_least(arguments: argparse.Namespace, **least: int) -> None:
    """Refuse numbers that are less than these."""
    for name, lowest in least.items():
        if (value := getattr(arguments, name)) < lowest:
            raise cli.UsageError(f"--{name} is {value}; expected {lowest} or more")


def _server(arguments: argparse.Namespace, max_tokens: int) -> ChatServer:
    return ChatServer(
        arguments.base_url,
        arguments.model,
        api_key=os.environ.get(arguments.api_key_env, ""),
        concurrency=arguments.concurrency,
        timeout_s=arguments.timeout,
        max_tokens=max_tokens,
    )


def _base(workdir: Path, max_tokens: int) -> Any:
    """The frozen base of a run, as a chat model."""
    # They load JAX, which other stages do without.
    from affectgpt_jax.chat import BaseChat
    from affectgpt_jax.restore import open_run, set_up_process

    set_up_process()
    run = open_run(workdir.expanduser()).with_weights()
    return BaseChat(
        run.model.decoder,
        run.base,
        run.identity,
        run.processor.tokenizer,
        run.mesh,
        batch_size=run.config.generate.batch_size,
        max_new_tokens=max_tokens,
    )


# --- verbs --------------------------------------------------------------------------------------


def run_describe(arguments: argparse.Namespace) -> None:
    """`describe audio` and `describe video`."""
    _check_model(arguments, ("replies",))
    if not (arguments.base_url or arguments.replies):
        raise cli.UsageError("name who describes: --base-url and --model, or --replies FILE")
    if not (arguments.csv or arguments.clips):
        raise cli.UsageError("name the clips: --csv FILE, --clips DIR, or both")
    if arguments.with_subtitle and (arguments.replies or not arguments.csv):
        raise cli.UsageError("--with-subtitle shows a model the subtitles of --csv FILE")
    kind, out = arguments.kind, arguments.out.expanduser()
    if arguments.form and arguments.form not in FORMS[kind]:
        raise cli.UsageError(f"--as {arguments.form}: {kind} is sent as {_forms_of(kind)}")
    settings = read_settings(out)
    if arguments.replies:
        names = (
            list(read_clip_rows(arguments.csv))
            if arguments.csv
            else [clip.name for clip in find_clips(arguments.clips).clips]
        )
        _take_given(kind, arguments.replies, names, out)
        return
    found = find_clips([path.expanduser() for path in arguments.clips], arguments.csv)
    subtitles = _subtitles(arguments.csv) if arguments.with_subtitle else None
    server = _server(arguments, getattr(settings.replies, kind))
    with Counter(f"replies about {kind}", stream=sys.stderr) as count:
        lines = describe.describe_media(
            kind,
            found.clips,
            out,
            server,
            settings,
            form=arguments.form,
            subtitles=subtitles,
            shard=arguments.shard or shard_of_task(),
            progress=count,
        )
    _report(out / f"{kind}.jsonl", lines, found.remarks())


def _forms_of(kind: str) -> str:
    return " or ".join(FORMS[kind])


def _take_given(kind: str, file: Path, names: Sequence[str], out: Path) -> None:
    lines, remarks = describe.given_replies(file.expanduser(), names)
    describe.write_described(out / f"{kind}.jsonl", lines)
    _report(out / f"{kind}.jsonl", lines, remarks)


def _report(
    path: Path, lines: Sequence[describe.Described] | None, remarks: Sequence[str] = ()
) -> None:
    if lines is None:
        print_lines(["this part is done; the last one, or a run without --shard, writes the file"])
        return
    print_lines([f"{path}: {line}" for line in describe.summary(lines)[:1]])
    print_lines([*describe.summary(lines)[1:], *remarks])


def _subtitles(table: Path | None) -> dict[str, str]:
    rows = read_clip_rows(table) if table else {}
    return {name: row.get("subtitle", "").strip() for name, row in rows.items()}


def run_merge(arguments: argparse.Namespace) -> None:
    """`merge`."""
    _check_model(arguments, ("replies", "workdir"))
    if not (arguments.base_url or arguments.replies or arguments.workdir):
        raise cli.UsageError(
            "name who merges: --base-url and --model, --workdir RUN, or --replies FILE"
        )
    out = arguments.out.expanduser()
    settings = read_settings(out)
    subtitles = _subtitles(arguments.csv)
    names = list(subtitles) or _described_names(out)
    if arguments.replies:
        _take_given(DESCRIPTIONS, arguments.replies, names, out)
        return
    limit = settings.replies.merge
    model = _server(arguments, limit) if arguments.base_url else _base(arguments.workdir, limit)
    with Counter("descriptions", stream=sys.stderr) as count:
        lines = describe.merge(
            names,
            subtitles,
            out,
            model,
            settings,
            shard=arguments.shard or shard_of_task(),
            progress=count,
        )
    _report(out / f"{DESCRIPTIONS}.jsonl", lines, describe.cue_remarks(names, out))


def _described_names(out: Path) -> list[str]:
    """The clips that a describer has been asked about."""
    said: dict[str, Any] = {}
    for kind in describe.KINDS:
        said |= describe.read_described(out / f"{kind}.jsonl", missing_ok=True)
    if not said:
        raise CaptionError(f"{out} has neither audio.jsonl nor video.jsonl; name clips by --csv")
    return list(said)


def run_labels(arguments: argparse.Namespace) -> None:
    """`labels`."""
    _check_model(arguments, ("workdir",))
    _check_write(arguments)
    out = arguments.out.expanduser()
    rules = RuleExtractor(load_lexicon(arguments.lexicon))
    extractor: Extractor = rules
    if arguments.base_url or arguments.workdir:
        chat = _server(arguments, 512) if arguments.base_url else _base(arguments.workdir, 512)
        cache = ReplyCache(out / REPLIES / "labels.jsonl")
        count = Counter("replies about labels", stream=sys.stderr)
        extractor = ChatExtractor(chat, cache, rules.in_text, count)
    if arguments.write:
        source, to = arguments.records.expanduser(), arguments.write.expanduser()
        print_lines(pairs.write_emotional_pairs(source, out, to, extractor))
    else:
        print_lines(labels.label_descriptions(out, extractor))


def run_filter(arguments: argparse.Namespace) -> None:
    """`filter`."""
    _check_write(arguments)
    out = arguments.out.expanduser()
    to = (arguments.to or out).expanduser()
    settings = read_settings(out)
    lexicon = load_lexicon(arguments.lexicon)
    data = filtering.read_data_set(out, arguments.csv, settings)
    filtering.check_stages(data, out, arguments.levels)
    judged = filtering.judge(data, settings, lexicon)
    usable, lacking_words = filtering.trainable(data, judged, arguments.levels)
    if arguments.write:
        # Before anything is written over.
        source, records = arguments.records.expanduser(), arguments.write.expanduser()
        made = filtering.made_of(source, plus=filtering.plus_rows(data, usable))
        there = filtering.are_written(records, made)
    about = {"settings_sha256": settings.sha256, "lexicon": str(lexicon.identity)}
    stages = filtering.write_results(data, judged, arguments.levels, to, about)
    print_lines(_funnel_lines(stages))
    if not filtering.kept_names(judged, arguments.levels):
        raise CaptionError(f"no clip is kept; {to / filtering.FILTERED} says why of each")
    print_lines(
        f"kept, but without {what} to train on: {len(names):,}: {listed(names)}"
        for what, names in lacking_words.items()
    )
    if arguments.write:
        count, lacking = filtering.write_training_records(data, usable, source, records, made)
        print_lines([f"{records}: {count:,} records{', which were there' if there else ''}"])
        if lacking:
            print_lines([f"kept, but without a record: {len(lacking):,}: {listed(lacking)}"])


def _funnel_lines(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{'test':<12}{'clips':>10}{'labels':>9}{'dropped':>10}{'not judged':>12}"]
    for stage in stages:
        lines.append(
            f"{stage['test']:<12}{stage['clips']:>10,}{stage['labels']:>9,}"
            f"{stage['dropped']:>10,}{stage['not_judged']:>12,}"
        )
        reasons = list(stage["reasons"].items())
        lines += [f"    {count:,}: {reason}" for reason, count in reasons[:6]]
        if len(reasons) > 6:
            lines.append(f"    and {len(reasons) - 6} more reasons")
    return lines


def run_card(arguments: argparse.Namespace) -> None:
    """`card`."""
    from . import card

    _check_least(arguments, seed=0)
    out = arguments.out.expanduser()
    settings, lexicon = read_settings(out), load_lexicon(arguments.lexicon)
    data = filtering.read_data_set(out, arguments.csv, settings)
    judged = filtering.judge(data, settings, lexicon)
    levels = card.read_filter(data, judged, lexicon, settings, out)
    path = card.write_card(
        data,
        judged,
        levels,
        lexicon,
        settings,
        out,
        title=arguments.title,
        license_name=arguments.license,
        languages=arguments.language,
        crowd=arguments.crowd,
        seconds=read_seconds(arguments.records) if arguments.records else None,
        seed=arguments.seed,
    )
    print_lines([f"{path}, and the plots beside it"])


def run_compare(arguments: argparse.Namespace) -> None:
    """`compare`."""
    from . import compare

    out = arguments.out.expanduser()
    if bool(arguments.against) == bool(arguments.answers):
        raise cli.UsageError("--against FILE makes a page, --answers FILES counts: name one")
    _check_least(arguments, pairs=1, seed=0)
    if arguments.answers:
        shares, raters = compare.count_answers(out, arguments.answers)
        total = sum(share.count for share in shares.values())
        print_lines([f"{total:,} answers of {raters:,} raters"])
        print_lines(
            f"{name:<5}{s.count:>6,}  {s.share:.2f} ({s.low:.2f} to {s.high:.2f})"
            for name, s in shares.items()
        )
        return
    lines = describe.read_described(out / f"{DESCRIPTIONS}.jsonl")
    ours = {name: line["reply"] for name, line in lines.items()}
    theirs, remarks = describe.given_replies(arguments.against, list(ours))
    pairs = compare.write_page(
        out,
        ours,
        {line["name"]: line["reply"] for line in theirs},
        _subtitles(arguments.csv),
        pairs=arguments.pairs,
        seed=arguments.seed,
        title="Which description is better?",
    )
    print_lines(
        [
            f"{out / compare.PAGE}: {pairs:,} pairs, for raters; whose they are is in "
            f"{compare.KEY}, which raters must not see",
            *remarks,
        ]
    )


def run_choose(arguments: argparse.Namespace) -> None:
    """`choose`."""
    from . import choose

    _check_model(arguments, ())
    _check_least(arguments, runs=1)
    out = arguments.out.expanduser()
    replies: dict[str, Path] = {}
    for text in arguments.replies:
        name, equals, file = text.partition("=")
        if not (name and equals and file) or name in replies:
            raise cli.UsageError(f"--replies {text}: expected NAME=FILE, each name once")
        replies[name] = Path(file)
    lexicon = load_lexicon(arguments.lexicon)
    rules = RuleExtractor(lexicon)
    makers: list[Callable[[], Extractor]] = [lambda: rules]
    if arguments.base_url:
        chat = _server(arguments, 512)

        def maker(run: int) -> Callable[[], Extractor]:
            cache = ReplyCache(out / REPLIES / f"choose-{run}.jsonl")
            return lambda: ChatExtractor(chat, cache, rules.in_text)

        makers = [maker(run) for run in range(arguments.runs)]
    truth = choose.read_truth(arguments.records.expanduser())
    found = choose.choose(truth, replies, makers, lexicon)
    write_json(out / "choose.json", [dataclasses.asdict(candidate) for candidate in found])
    print_lines(choose.table(found, len(truth)))
    if len(makers) > 1:
        print_lines(
            [
                f"+- is half the range of {len(makers):,} extractions at temperature 0, which "
                "differ where the server's arithmetic does: it is no error of the score"
            ]
        )


def run_demo(arguments: argparse.Namespace) -> None:
    """`demo`."""
    # The crowd learns in JAX.
    from . import demo

    if arguments.seed < 0 or (arguments.clips is not None and arguments.clips < 64):
        raise cli.UsageError("--seed must be 0 or more, and --clips 64 or more")
    if arguments.rendered < 0 or arguments.rendered == 1:
        raise cli.UsageError("--rendered must be 0, for none, or 2 or more")
    start = time.perf_counter()
    out = arguments.out.expanduser()
    result = demo.build(out, arguments.seed, clips=arguments.clips or demo.CLIPS, say=say)
    if arguments.rendered:
        try:
            facts = demo.rendered_facts(out, arguments.seed, arguments.rendered, say=say)
        except ModuleNotFoundError as error:
            say(f"no clips are rendered: {MISSING.format(error.name)}")
        else:
            result = dataclasses.replace(result, facts=result.facts | facts)
    print_lines(demo.table(result, time.perf_counter() - start))
    print_lines([f"{out}: {demo.FILTERS_FILE}, filtered.csv, funnel.png, README.md"])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error(interrupted="interrupted; the same command goes on from there"):
        arguments = parse_arguments(argv)
        if "shard" not in arguments and (tasks := shard_of_task()[1]) > 1:
            raise cli.UsageError(
                f"{arguments.verb} shares no work, and these are {tasks:,} tasks of srun; start it "
                "once, as by srun -n 1"
            )
        try:
            arguments.run(arguments)
        except ModuleNotFoundError as error:
            raise UserError(MISSING.format(error.name)) from None


if __name__ == "__main__":
    main()
