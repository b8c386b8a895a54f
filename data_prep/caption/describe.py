"""Descriptions of clips by models: of their sound, of their pictures, and of both together.

A line of `audio.jsonl`, `video.jsonl` and `descriptions.jsonl` is a `Described`: one a clip, in
their order. What is asked goes first into a file below `.replies`, under a hash of all that the
reply depends on (model, prompt, limits and the content of the clip's file), in the order of
arrival. So a stage that was stopped goes on, asks nothing twice but what was refused, and asks anew
what has changed; and its output depends on the replies alone.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypedDict

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes, sha256_of, write_text
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import ResumableJsonl, json_lines
from affectgpt_jax.common.tables import csv_rows
from affectgpt_jax.common.text import json_line, listed
from affectgpt_jax.evaluation.chat_server import ChatError, ChatRefusal, Message, Reply
from affectgpt_jax.evaluation.extract import REFUSALS, spoken

from ..clips import Clip
from .settings import DESCRIPTIONS, FORMS, REPLIES, CaptionError, Settings

KINDS = ("audio", "video")
# How a reply ended, where no model said it: nothing to ask about; the server would not answer; the
# reply comes from a file.
UNREADABLE, REFUSED, GIVEN = "unreadable", "refused", "given"
_NOT_SAID = (UNREADABLE, REFUSED)
Progress = Callable[[int, int], None]


class _Shown(TypedDict, total=False):
    shown: str


class Answered(_Shown):
    """A reply and what it depends on.

    `shown` says for people in which form the clip was shown, and whether its subtitle was; replies
    from files lack it, as do those that were kept before it was. `finish` is the server's word why
    it ended ("stop", "length" for one that was cut off), or one of `UNREADABLE`, `REFUSED` and
    `GIVEN`; `why` says more where there is no reply.
    """

    reply: str
    finish: str
    why: str
    tokens: int
    model: str
    prompt_sha256: str
    media_sha256: str


class _Kept(Answered):
    key: str


class Described(Answered):
    """A line of the output: what was said about a clip."""

    name: str


class Unreadable(ChatRefusal):
    """There is nothing of a clip to ask about; the text is the reason."""


class Describer(Protocol):
    """Who is asked: a `ChatServer`, or a `BaseChat`, which reads text alone."""

    identity: str

    def replies(self, messages: Sequence[Message]) -> Iterator[tuple[int, Reply | ChatRefusal]]: ...


def describe_media(
    kind: str,
    clips: Sequence[Clip],
    out: Path,
    server: Describer,
    settings: Settings,
    *,
    form: str | None = None,
    subtitles: Mapping[str, str] | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: Progress = lambda done, total: None,
) -> list[Described] | None:
    """What a model says about the sound or the pictures of clips, as `KIND.jsonl`.

    Args:
        kind: "audio" or "video".
        clips: in the order of the output.
        out: folder of the data set.
        server: who is asked.
        settings: prompt and media.
        form: of the parts, one of `settings.FORMS[kind]`.
        subtitles: by name, where the model is to see them; by default it does not, so that cues
            are not read off the words.
        shard: number and count of the processes that share the work.
        progress: called with the replies there are and the number there will be.

    Returns:
        The lines; None where other shards have not finished.

    Raises:
        ChatError: a server that does not answer, or refuses such media.
    """
    # What decodes is an extra, which text does without.
    from ..media import MediaError
    from .parts import media_parts

    form = form or FORMS[kind][0]
    prompt = getattr(settings.prompts, kind)
    paths = {c.name: c.sound if kind == "audio" else c.video for c in clips}
    files = [path for path in paths.values() if path]
    own = {path for path in list(paths.values())[shard[0] :: shard[1]] if path}
    # A file for each kind: sound and pictures may be asked about at the same time.
    store = out / REPLIES / f"media-{kind}{_suffix(shard)}.jsonl"

    def media() -> dict[str, str]:
        hashes = media_hashes(files, own, store) | {None: ""}
        return {name: hashes[path] for name, path in paths.items() if path in hashes}

    # What is not shown of a clip changes nothing.
    shown = [form, settings.media.seconds] if kind == "audio" else [form]
    if kind == "video" and form == "frames":
        shown += [settings.media.frames, settings.media.pixels]

    how = form
    if kind == "audio":
        how += f", up to {settings.media.seconds:g} s"
    elif form == "frames":
        how += f", {settings.media.frames} of up to {settings.media.pixels} pixels"
    how += f", {'with' if subtitles else 'without'} subtitle"

    def question(name: str) -> tuple[Message, str]:
        words = prompt + (f"\nSubtitle: {subtitles.get(name, '')}" if subtitles else "")
        path = paths[name]

        def message():
            try:
                parts = media_parts(kind, path, form, settings.media)
            except MediaError as error:
                raise Unreadable(str(error)) from None
            return [{"type": "text", "text": words.strip()}, *parts]

        return message, words

    questions = {clip.name: question(clip.name) for clip in clips}
    try:
        return _ask(kind, questions, media, out, server, prompt, shown, how, shard, progress)
    except ChatRefusal as error:
        other = next(f for f in FORMS[kind] if f != form)
        raise ChatError(
            f"{error}; the first {kind} clips are refused as {form}: try --as {other}, or a model "
            f"that takes {kind}"
        ) from None


def merge(
    names: Sequence[str],
    subtitles: Mapping[str, str],
    out: Path,
    model: Describer,
    settings: Settings,
    *,
    shard: tuple[int, int] = (0, 1),
    progress: Progress = lambda done, total: None,
) -> list[Described] | None:
    """One description a clip, of what was said about sound and pictures and of its subtitle.

    A clip of which neither was described is not asked about: its reply is `UNREADABLE`.

    Arguments, results and errors are those of `describe_media`.

    Raises:
        CaptionError: neither of both has been described.
    """
    said = {kind: read_described(out / f"{kind}.jsonl", missing_ok=True) for kind in KINDS}
    if not any(said.values()):
        raise CaptionError(
            f"{out} has neither audio.jsonl nor video.jsonl; run `describe audio` or `describe "
            "video` first"
        )

    def question(name: str) -> tuple[Message, str]:
        heard, seen = (said[kind].get(name, {}).get("reply", "").strip() for kind in KINDS)
        subtitle = subtitles.get(name, "").strip()
        if not (heard or seen):
            return _nothing, ""
        text = merge_message(settings.prompts.merge, heard, seen, subtitle)
        return text, text

    questions = {name: question(name) for name in names}
    prompt = settings.prompts.merge
    media = functools.partial(dict.fromkeys, names, "")
    how = "clues and subtitle"
    return _ask(DESCRIPTIONS, questions, media, out, model, prompt, [], how, shard, progress)


def cue_remarks(names: Sequence[str], out: Path) -> list[str]:
    """What clips lack that are to be merged: whole files of cues, or lines in them.

    Raises:
        ReadError: a file that cannot be read.
    """
    said = {kind: read_described(out / f"{kind}.jsonl", missing_ok=True) for kind in KINDS}
    asked = [name for name in names if any(name in lines for lines in said.values())]
    remarks = []
    for kind, other in zip(KINDS, ("pictures", "sound")):
        if not (out / f"{kind}.jsonl").exists():
            remarks.append(f"no {kind}.jsonl: described by {other} alone")
        elif lacking := [name for name in asked if name not in said[kind]]:
            remarks.append(f"clips without a line in {kind}.jsonl: {_counted(lacking)}")
    if unasked := sorted(set(names) - set(asked)):
        remarks.append(f"clips that no describer was asked about: {_counted(unasked)}")
    return remarks


def _counted(names: Sequence[str]) -> str:
    return f"{len(names):,}: {listed(names)}"


def merge_message(prompt: str, heard: str, seen: str, subtitle: str) -> str:
    """The message that asks to merge clues; a clue that is missing is said to be."""
    return (
        f"{prompt.strip()}\nAcoustic clues: {heard or 'none'}\nVisual clues: {seen or 'none'}\n"
        f"Subtitle: {subtitle or 'none'}"
    )


def _nothing() -> str:
    raise Unreadable("neither sound nor pictures were described")


def _ask(
    kind: str,
    questions: Mapping[str, tuple[Message, str]],
    media: Callable[[], Mapping[str, str]],
    out: Path,
    model: Describer,
    prompt: str,
    shown: Sequence[object],
    how: str,
    shard: tuple[int, int],
    progress: Progress,
) -> list[Described] | None:
    """Ask what has not been asked, and write the output when everything has been.

    Args:
        kind: of the output.
        questions: by name the message and its words.
        media: reads the hash of the media in each message, by name: "" for none; missing where it
            is not known yet, which is so for clips of other shards only.
        shown: what else the message depends on; empty for text alone.
        how: what is shown, for people.
    """
    number, count = shard
    folder = out / REPLIES
    prompt_sha256 = json_sha256(prompt)

    def keys_of(hashes: Mapping[str, str]) -> dict[str, str]:
        return {
            # Of what cannot be read, clips have no reply in common.
            name: json_sha256(
                [model.identity, words, hashes[name] or (name if shown else ""), *shown]
            )
            for name, (_, words) in questions.items()
            if name in hashes
        }

    hashes = media()
    keys, kept = keys_of(hashes), _kept_replies(folder, kind)
    own: dict[str, str] = {}  # the first clip of each question
    for name in list(questions)[number::count]:
        own.setdefault(keys[name], name)
    # What was refused is asked again, as a server with other flags may take it; and it does not
    # show that the server takes such messages at all.
    missing = {
        key: questions[name][0]
        for key, name in own.items()
        if key not in kept or kept[key]["finish"] == REFUSED
    }
    answered = any(kept[k]["finish"] not in _NOT_SAID for k in keys.values() if k in kept)
    with _store(folder / f"{kind}{_suffix(shard)}.jsonl") as store:
        done = len(own) - len(missing)
        progress(done, len(own))

        def keep(key: str, reply: Reply, why: str) -> None:
            nonlocal done
            line = {
                "key": key,
                "reply": spoken(reply.text).strip(),
                "finish": reply.finish,
                "why": why,
                "tokens": reply.tokens,
                "model": model.identity,
                "prompt_sha256": prompt_sha256,
                "media_sha256": hashes[own[key]],
                "shown": how,
            }
            if kept.get(key) != line:  # refused as before
                kept[key] = line
                store.append(line)
            done += 1
            progress(done, len(own))

        if missing:
            _collect(model, missing, answered, keep)
    if count > 1:
        # Other shards that ran at the same time have read and asked what was not there before.
        keys, kept = keys_of(media()), _kept_replies(folder, kind)
    if len(keys) < len(questions) or not kept.keys() >= set(keys.values()):
        return None
    lines = [
        Described(name=name, **{k: v for k, v in kept[key].items() if k != "key"})
        for name, key in keys.items()
    ]
    write_described(out / f"{kind}.jsonl", lines)
    return lines


def _kept_replies(folder: Path, kind: str) -> dict[str, Answered]:
    """What all shards have been answered so far, by key."""
    kept: dict[str, Answered] = {}
    for path in sorted(folder.glob(f"{kind}*.jsonl")):
        for (key,), found in _store(path).records.items():
            # A refusal in one file may have been answered since, in that of another shard.
            if key not in kept or found["finish"] != REFUSED:
                kept[key] = found
    return kept


def _suffix(shard: tuple[int, int]) -> str:
    number, count = shard
    return "" if count == 1 else f"-{number:05d}-of-{count:05d}"


def _collect(
    model: Describer,
    messages: Mapping[str, Message],
    answered: bool,
    keep: Callable[[str, Reply, str], None],
) -> None:
    """Ask, and hand over what comes.

    Raises:
        ChatRefusal: the server has refused the first few, or all, and nothing was `answered`.
    """
    keys = list(messages)
    refused: list[tuple[str, ChatRefusal]] = []  # of which it is not known yet whether all are
    for number, reply in model.replies(list(messages.values())):
        if isinstance(reply, Unreadable):
            keep(keys[number], Reply("", UNREADABLE, 0), str(reply))
            continue
        if isinstance(reply, ChatRefusal):
            refused.append((keys[number], reply))
            if not answered and len(refused) < REFUSALS:
                continue
            if not answered:
                raise reply
        else:
            answered = True
            keep(keys[number], reply, "")
        for key, refusal in refused:
            keep(key, Reply("", REFUSED, 0), str(refusal))
        refused.clear()
    if refused:
        raise refused[0][1]


def _store(path: Path) -> ResumableJsonl:
    return ResumableJsonl(path, _Kept, ("key",), advice="delete the file, and all is asked again")


class _Stamped(TypedDict):
    file: str
    bytes: int
    time_ns: int
    sha256: str


def media_hashes(
    paths: Iterable[Path], own: Collection[Path], file: Path
) -> dict[Path | None, str]:
    """The hash of each file, "" of one that cannot be read; what has not changed is not read again.

    Args:
        paths: of media.
        own: those that are read here; others have a hash if the shard whose they are has read them.
        file: a JSONL file of hashes by path, size and time, which grows; those beside it are read.
    """
    known: dict[tuple[str, int, int], str] = {}
    for beside in sorted(file.parent.glob("media*.jsonl")):
        records = _media_store(beside).records.values()
        known |= {(r["file"], r["bytes"], r["time_ns"]): r["sha256"] for r in records}
    found: dict[Path | None, str] = {}
    unknown = {}
    for path in dict.fromkeys(paths):
        try:
            status = path.stat()
        except OSError:
            found[path] = ""
            continue
        key = (str(path), status.st_size, status.st_mtime_ns)
        if key in known:
            found[path] = known[key]
        elif path in own:
            unknown[path] = key

    def hashed(path: Path) -> str:
        try:
            return sha256_of(path)
        except OSError:
            return ""

    store = _media_store(file)
    with store, ThreadPoolExecutor(8) as pool:
        for (path, key), sha256 in zip(unknown.items(), pool.map(hashed, unknown), strict=True):
            found[path] = sha256
            if sha256:
                store.append(dict(zip(_Stamped.__annotations__, (*key, sha256), strict=True)))
    return found


def _media_store(path: Path) -> ResumableJsonl:
    return ResumableJsonl(path, _Stamped, ("file", "bytes", "time_ns"), advice="delete the file")


# --- files --------------------------------------------------------------------------------------


def write_described(path: Path, lines: Iterable[Described]) -> None:
    """Write or replace a file of descriptions.

    Raises:
        OSError: it cannot be written.
    """
    texts = (json_line(json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    write_text(path, "".join(texts))


def read_described(path: Path, missing_ok: bool = False) -> dict[str, Described]:
    """The lines of a file of descriptions by name; none of a file that may be missing and is.

    Raises:
        ReadError: it cannot be read, or a line is not one.
    """
    if missing_ok and not path.exists():
        return {}
    lines = json_lines(read_bytes(path), str(path), Described)
    return {line["name"]: line for _, line in lines}


class _Given(TypedDict):
    name: str
    reply: str


def given_replies(path: Path, names: Sequence[str]) -> tuple[list[Described], list[str]]:
    """Descriptions of any other source, and remarks on what does not fit.

    Args:
        path: a JSONL file of objects with the keys `name` and `reply`, or a CSV file with such
            columns.
        names: of the clips, in order; one without a reply in the file has the reply "".

    Raises:
        ReadError: a file that cannot be read, or has a name twice.
        CaptionError: it has none of the clips.
    """
    data = read_bytes(path)
    if path.suffix.lower() == ".csv":
        rows: Iterator[tuple[int, Mapping[str, str]]] = csv_rows(data, str(path), ("name", "reply"))
    else:
        rows = json_lines(data, str(path), _Given)
    replies: dict[str, str] = {}
    for line, row in rows:
        if row["name"] in replies:
            raise ReadError(f"{path}, line {line}: {row['name']!r} has a reply already")
        replies[row["name"]] = row["reply"].strip()
    lacking = [name for name in names if name not in replies]
    if len(lacking) == len(names):
        raise CaptionError(
            f"{path} has none of the {len(names):,} clips: it names {listed(list(replies))}, and "
            f"they are called {listed(names)}"
        )
    model = f"replies of {path.name} (sha256 {sha256_of(path)[:12]})"
    lines = [
        Described(
            name=name,
            reply=replies.get(name, ""),
            finish=GIVEN,
            why="" if name in replies else "no reply in the file",
            tokens=0,
            model=model,
            prompt_sha256="",
            media_sha256="",
        )
        for name in names
    ]
    known = set(names)
    remarks = []
    if lacking:
        remarks.append(f"clips without a reply in {path}: {_counted(lacking)}")
    if other := [name for name in replies if name not in known]:
        remarks.append(f"replies of {path} to no clip: {_counted(other)}")
    return lines, remarks


def summary(lines: Sequence[Described]) -> list[str]:
    """How replies ended, a line each kind, and why some clips have none."""
    ends = Counter(line["finish"] or "said nothing why" for line in lines)
    empty = sum(1 for line in lines if not line["reply"])
    tokens = sum(line["tokens"] for line in lines)
    shown = ", ".join(f"{end}: {n:,}" for end, n in ends.most_common())
    parts = [f"{len(lines):,} clips; replies ended by {shown}; empty: {empty:,}"]
    if tokens:
        parts[0] += f"; {tokens:,} tokens"
    whys = Counter(line["why"] for line in lines if line["why"])
    parts += [f"without a reply: {n:,}: {why}" for why, n in whys.most_common(5)]
    return parts
