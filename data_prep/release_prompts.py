"""The PyTorch release's prompts as a prompt file: `python -m data_prep.release_prompts`.

A checkpoint answers to the prompts that it was trained on. Those of the release are its authors'
sentences, so they do not ship; this takes them from your own clone:

    python -m data_prep.release_prompts --source base_dataset.py --out release.toml

The source is parsed and never run. `get_prompt_for_multimodal` gives the input modes, the methods
`func_get_qa_*` the label types. What is not built by joining string literals is refused with its
line; what has no place in a prompt file (the format is that of
`affectgpt_jax/assets/prompts/default.toml`) is left out and named, on the screen and in the file.
The same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from affectgpt_jax.common.errors import UserError

PROMPT_METHOD = "get_prompt_for_multimodal"
END = "###"  # where the source does not say what follows an answer

# Every name of the release's `face_or_frame`, and the input mode that sees the same.
MODES = {
    "faceframe": "audio_face_frame_text",
    "face": "audio_face_text",
    "frame": "audio_frame_text",
    "audioonly": "audio",
    "textonly": "text",
    "faceonly": "face",
    "frameonly": "frame",
    "image": "image",
    "audio_text": "audio_text",
    "face_text": "face_text",
    "frame_text": "frame_text",
    "multiface_text": "multi_text",
    "multiface_audio_face_text": "multi_audio_face_text",
    "multiframe_audio_frame_text": "multi_audio_frame_text",
    "multiface_audio_face_frame_text": "multi_audio_face_frame_text",
}
# Modes whose first sentence introduces the input that they are called after.
INTRODUCING = ("multi_text", "audio", "face", "frame", "image", "text")


class LabelType(NamedTuple):
    """The method that builds a label type, and the slots of its question and answer."""

    method: str
    question: tuple[str, ...]
    answer: tuple[str, ...]


LABEL_TYPES = {
    "description": LabelType("func_get_qa_description", (), ("description",)),
    "ovlabel": LabelType("func_get_qa_ovlabel", (), ("labels",)),
    "onehot": LabelType("func_get_qa_onehot_wo_candidates", (), ("emotion",)),
    "onehot_candidates": LabelType(
        "func_get_qa_onehot_w_candidates", ("candidates",), ("emotion",)
    ),
    "sentiment": LabelType("func_get_qa_sentiment", (), ("sentiment",)),
    "valence": LabelType("func_get_qa_valence", ("low", "high"), ("valence",)),
    "caption": LabelType("func_get_qa_caption", (), ("caption",)),
    "qa": LabelType("func_get_qa_direct", ("question",), ("answer",)),
    "preference": LabelType("func_get_qa_preference", ("first", "second"), ("preferred",)),
}

# What the release puts into its sentences, format included, and the slot that stands for it.
SLOTS = {
    "subtitle": "subtitle",
    "user_message": "question",
    "sample['description']": "description",
    "sample['ovlabel']": "labels",
    "sample['onehot']": "emotion",
    "self.candidate_labels": "candidates",
    "sample['sentiment']": "sentiment",
    "sample['valence']:.2f": "valence",
    "self.minval": "low",
    "self.maxval": "high",
    "sample['caption']": "caption",
    "sample['question']": "question",
    "sample['answer']": "answer",
    "sample['preference']['a1']": "first",
    "sample['preference']['a2']": "second",
    "sample['preference']['p']": "preferred",
}


class ReleaseError(UserError, ValueError):
    """A source that is not built as the release is; the message names file and line."""


class Slot(str):
    """A place in a template, "{name}"; any other string of a template is literal text."""


Piece = list[str]  # one operand of a concatenation: literals and slots, in order
Names = dict[str, list[Piece]]  # the strings that a method's local names hold


class Converted(NamedTuple):
    """A prompt file's tables, and what is left out of them or assumed, with the reasons."""

    tables: dict[str, dict[str, Any]]
    notes: list[str]


def read_release(path: Path, caption: str = "image") -> Converted:
    """Read the prompts of the release's `base_dataset.py` without running it.

    Args:
        path: the file.
        caption: whose caption questions to take, "image" or "audio".

    Raises:
        ReleaseError: not Python, or built in a way that is not understood.
        OSError: the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in somebody else's strings
            tree = ast.parse(path.read_bytes())
        return convert(tree, caption)
    except ReleaseError as error:
        message = str(error)
    except SyntaxError as error:
        message = f"line {error.lineno or 1}: not valid Python: {error.msg}"
    except ValueError as error:  # of the parser, about the file as a whole
        message = f"line 1: not valid Python: {error}"
    except (RecursionError, MemoryError):
        message = "line 1: nested too deeply to be the release's"
    raise ReleaseError(f"{path.name}, {message}")


def convert(tree: ast.Module, caption: str) -> Converted:
    """The tables of a prompt file from a parsed source; raises as `read_release` does."""
    notes: list[str] = []
    cls, methods = find_class(tree)
    modes, inputs, assistant = read_modes(methods[PROMPT_METHOD], notes)
    questions, answers = read_label_types(cls, methods, caption, notes)
    # What all first sentences begin with, up to a space: neither a word nor a slot is cut.
    human = "".join(os.path.commonprefix(list(inputs.values())).rpartition(" ")[:2])
    tables = {
        "roles": {"human": human, "assistant": assistant, "end": read_end(tree, notes)},
        "inputs": {name: text.removeprefix(human) for name, text in inputs.items()},
        "modes": modes,
        "questions": questions,
        "answers": answers,
    }
    return Converted(tables, notes)


def find_class(tree: ast.Module) -> tuple[ast.ClassDef, dict[str, ast.FunctionDef]]:
    """The one class that has `PROMPT_METHOD`, and its methods by name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = [entry for entry in node.body if isinstance(entry, ast.FunctionDef)]
            if PROMPT_METHOD in (method.name for method in methods):
                found.append((node, methods))
    if not found:
        raise ReleaseError(f"line 1: no class here has a method {PROMPT_METHOD}")
    if len(found) > 1:
        raise _refusal(found[1][0], f"a second class has a method {PROMPT_METHOD}; expected one")
    cls, methods = found[0]
    read = {PROMPT_METHOD, *(kind.method for kind in LABEL_TYPES.values())}
    by_name: dict[str, ast.FunctionDef] = {}
    for method in methods:
        if method.name in by_name and method.name in read:
            raise _refusal(method, f"{cls.name} has a second method {method.name}; expected one")
        by_name[method.name] = method
    return cls, by_name


def read_modes(
    method: ast.FunctionDef, notes: list[str]
) -> tuple[dict[str, str], dict[str, str], str]:
    """Templates by input mode, first sentences by input, and what follows every question."""
    branches: dict[str, ast.Compare] = {}
    for node in ast.walk(method):
        match node:
            case ast.Compare(
                left=ast.Name(id="face_or_frame"),
                ops=[ast.Eq()],
                comparators=[ast.Constant(value=str(name))],
            ):
                branches.setdefault(name, node)
            case ast.If(orelse=[first, *_]) if not isinstance(first, ast.If):
                notes.append(
                    f"left out: the else of {method.name} (every input mode here has a name)"
                )
    modes, first_sentences, endings = {}, {}, {}
    for name, test in branches.items():
        if name not in MODES:
            notes.append(f"left out: the prompt {name!r} (no input mode here shows the same)")
            continue
        mode, where = MODES[name], f"the branch for {name!r}"
        taken = {f"face_or_frame == {other!r}": other == name for other in branches}
        value, names = follow(method, where, taken)
        prompt = [_with_soft_slots(p) for p in pieces(value, names, f"{where} returns")]
        slots = ["subtitle" if part == "text" else part for part in mode.split("_")]
        modes[mode] = template(_joined(prompt), (*slots, "question"), where, test)
        endings.setdefault(modes[mode].rpartition("{question}")[2], name)
        if len(endings) > 1:
            (one, first), (other, _) = endings.items()
            raise _refusal(
                test,
                f"{where} ends in {other!r} after the question, that for {first!r} in {one!r}; "
                "expected one ending of all",
            )
        if mode in INTRODUCING:
            where = f"the first literal of {where}"
            first_sentences[mode] = template(prompt[0], slots[:1], where, test)
    for name, mode in MODES.items():
        if mode in INTRODUCING and mode not in modes:
            raise _refusal(method, f"{method.name} has no branch for {name!r}")
        if mode not in modes:
            notes.append(f"left out: [modes].{mode} (the source has no branch for {name!r})")
    notes.append("left out: [modes].audio_face (the release has no prompt for these inputs)")
    inputs = {mode.split("_")[0]: first_sentences[mode] for mode in INTRODUCING}
    return modes, inputs, next(iter(endings))


def read_label_types(
    cls: ast.ClassDef,
    methods: Mapping[str, ast.FunctionDef],
    caption: str,
    notes: list[str],
) -> tuple[dict[str, str | list[str]], dict[str, str]]:
    """Questions and answers by label type."""
    questions: dict[str, str | list[str]] = {}
    answers: dict[str, str] = {}
    for key, kind in LABEL_TYPES.items():
        method = methods.get(kind.method)
        if method is None:
            notes.append(f"left out: the label type {key} (the source has no method {kind.method})")
            continue
        question, answer, names = question_and_answer(method, caption)
        where = f"the question of {method.name}"
        match question:
            case ast.Call(
                func=ast.Attribute(attr="func_random_prompts"),
                args=[ast.Attribute(value=ast.Name(id="self"), attr=name)],
                keywords=[],
            ) if key == "caption":
                candidates = read_candidates(cls, name)
                if not candidates:
                    notes.append(
                        f"left out: the label type {key} (self.{name} is no list in the source)"
                    )
                    continue
                questions[key] = candidates
            case _:
                parts = _joined(pieces(question, names, f"{where} is"))
                # A question may name the ends of its scale twice; an answer is read back.
                questions[key] = template(parts, kind.question, where, question, repeats=True)
        answers[key] = _answer(method, answer, names, kind.answer)
        if key == "preference":
            _, answer, names = question_and_answer(method, caption, preferred=False)
            answers["preference_same"] = _answer(method, answer, names, ())
    if "caption" in questions:
        other = {"image": "audio", "audio": "image"}[caption]
        notes.append(f"left out: the caption questions about {other} (--caption={caption})")
    known = {kind.method for kind in LABEL_TYPES.values()}
    for name in methods:
        if re.fullmatch(r"func_get_(qa_.+|.+_reward)", name) and name not in known:
            what = "rewards are" if name.endswith("_reward") else "it is"
            notes.append(f"left out: {name} ({what} no label type here)")
    return questions, answers


def _answer(method: ast.FunctionDef, node: ast.expr, names: Names, slots: Sequence[str]) -> str:
    where = f"the answer of {method.name}"
    return template(_joined(pieces(node, names, f"{where} is")), slots, where, node)


def question_and_answer(
    method: ast.FunctionDef, caption: str, preferred: bool = True
) -> tuple[ast.expr, ast.expr, Names]:
    """The two expressions that a `func_get_qa_*` returns, and its local names.

    Args:
        method: the method.
        caption: which modality's questions a caption method is asked for.
        preferred: whether one of two descriptions is the better one.
    """
    taken = {
        "question_only": False,
        "modality == 'image'": caption == "image",
        "modality == 'audio'": caption == "audio",
        "p in ['a1', 'a2']": preferred,
    }
    value, names = follow(method, method.name, taken)
    match value:
        case ast.Dict(
            keys=[ast.Constant(value="question"), ast.Constant(value="answer")],
            values=[question, answer],
        ):
            return question, answer, names
    raise _refusal(
        value,
        f"{method.name} returns {_kind(value)}, expected {{'question': ..., 'answer': ...}}",
    )


def read_candidates(cls: ast.ClassDef, name: str) -> list[str]:
    """The questions in the list `self.NAME`; none where the class assigns no literal list to it."""
    assigned = [
        node.value
        for node in ast.walk(cls)
        if isinstance(node, ast.Assign) and f"self.{name}" in map(ast.unparse, node.targets)
    ]
    if len(assigned) > 1:
        raise _refusal(assigned[1], f"self.{name} is assigned a second time; expected once")
    match assigned:
        case [ast.List(elts=entries) | ast.Tuple(elts=entries)]:
            where = f"an entry of self.{name}"
            texts = [(_joined(pieces(e, {}, f"{where} is")), e) for e in entries]
            return [template(parts, (), where, entry) for parts, entry in texts]
    return []


def read_end(tree: ast.Module, notes: list[str]) -> str:
    """What the source joins to the end of every answer."""
    ends: dict[str, ast.BinOp] = {}
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(op=ast.Add(), left=left, right=ast.Constant(value=str(end))):
                if ast.unparse(left) == "qa_pair['answer']":
                    ends[end] = node
    if len(ends) > 1:
        raise _refusal(list(ends.values())[1], f"answers end in one of {list(ends)}; expected one")
    if not ends:
        notes.append(
            f"assumed: [roles].end = {END!r} (the source does not say what ends an answer)"
        )
    return next(iter(ends), END)


def follow(
    method: ast.FunctionDef, where: str, taken: Mapping[str, bool]
) -> tuple[ast.expr, Names]:
    """Go through a method on one way, and say what it returns.

    Args:
        method: the method.
        where: how errors call this way.
        taken: the tests of its branches, as `ast.unparse` writes them, and which way to go there.

    Returns:
        The expression that is returned, and the local names at that point.

    Raises:
        ReleaseError: a statement that is not an assignment of strings, an assertion, a branch on
            one of the tests, or a return.
    """
    for node in ast.walk(method):
        # On all ways, so that no sentence hides behind a test that this one never comes to.
        if isinstance(node, ast.If) and ast.unparse(node.test) not in taken:
            tests = " or ".join(list(taken)[:4])
            raise _refusal(
                node, f"{method.name} branches on {_snippet(node.test)}, expected {tests}"
            )
    names: Names = {}
    statements = list(method.body)
    while statements:
        statement = statements.pop(0)
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = pieces(value, names, f"{where} assigns {name} from")
            case ast.If(test=test, body=body, orelse=orelse):
                statements[:0] = body if taken[ast.unparse(test)] else orelse
            case ast.Return(value=ast.expr() as value):
                return value, names
            case ast.Assert() | ast.Pass() | ast.Expr(value=ast.Constant()):  # a docstring
                pass
            case _:
                raise _refusal(
                    statement,
                    f"{where} holds {_snippet(statement)}, expected only assignments of strings, "
                    "assertions, branches and a return of a value",
                )
    raise _refusal(method, f"{where} ends without a return")


def pieces(node: ast.expr, names: Names, lead: str) -> list[Piece]:
    """The operands of a concatenation of string literals.

    Args:
        node: the expression.
        names: local names that it may use.
        lead: how an error begins, such as "the branch for 'face' assigns prompt from".

    Raises:
        ReleaseError: anything but string literals and interpolations that are in `SLOTS`, joined
            by + or formatted by %.
    """
    match node:
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return [*pieces(left, names, lead), *pieces(right, names, lead)]
        case ast.Name(id=name) if name in names:
            return names[name]
    return [_piece(node, names, lead)]


def _joined(pieces: Iterable[Piece]) -> Piece:
    return [part for piece in pieces for part in piece]


def _piece(node: ast.expr, names: Names, lead: str) -> Piece:
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            return _joined(_piece(value, names, lead) for value in values)
        case ast.FormattedValue(value=value, conversion=conversion, format_spec=spec):
            form = "" if conversion == -1 else f"!{chr(conversion)}"
            if spec is not None:
                form += ":" + "".join(str(getattr(v, "value", "")) for v in spec.values)
            return _interpolation(value, form, names, lead)
        case ast.BinOp(op=ast.Mod(), left=ast.Constant(value=str(text)), right=right):
            return _percent(node, text, right, names, lead)
        case _ if (slot := SLOTS.get(ast.unparse(node))) is not None:
            return [Slot(f"{{{slot}}}")]
    raise _refusal(node, f"{lead} {_kind(node)}, expected concatenated string literals")


def _interpolation(node: ast.expr, form: str, names: Names, lead: str) -> Piece:
    """What stands for an expression inside a string; `form` is its conversion and format."""
    if isinstance(node, ast.Name) and node.id in names and not form:
        return _joined(names[node.id])
    slot = SLOTS.get(ast.unparse(node) + form)
    if slot is None:
        raise _refusal(
            node, f"{lead} a string with {{{_snippet(node)}{form}}}, for which there is no slot"
        )
    return [Slot(f"{{{slot}}}")]


def _percent(node: ast.BinOp, text: str, right: ast.expr, names: Names, lead: str) -> Piece:
    """The parts of `text % right`."""
    values = list(right.elts) if isinstance(right, ast.Tuple) else [right]
    parts: Piece = []
    literals_and_forms = re.split(r"(%%|%[^%a-zA-Z]*[a-zA-Z])", text)
    if sum(form not in ("", "%%") for form in literals_and_forms[1::2]) != len(values):
        raise _refusal(node, f"{lead} a string whose % do not match its {len(values)} values")
    for number, part in enumerate(literals_and_forms):
        if number % 2 == 0 or part == "%%":
            parts.append(part.replace("%%", "%"))
        else:
            form = "" if part == "%s" else f":{part[1:]}"
            parts += _interpolation(values.pop(0), form, names, lead)
    return parts


def _with_soft_slots(piece: Piece) -> Piece:
    """Placeholders such as <FaceHere> as slots."""
    parts: Piece = []
    for part in piece:
        if isinstance(part, Slot):
            parts.append(part)
            continue
        for number, text in enumerate(re.split(r"<(\w+)Here>", part)):
            parts.append(Slot(f"{{{text.lower()}}}") if number % 2 else text)
    return parts


def template(
    parts: Piece, slots: Sequence[str], where: str, node: ast.AST, repeats: bool = False
) -> str:
    """The parts as a template of a prompt file, in which a brace that is text is written twice.

    Args:
        parts: literals and slots.
        slots: those that it must hold, in any order, and no others.
        where: how errors call it.
        node: names their line.
        repeats: whether a slot may come more than once.

    Raises:
        ReleaseError: other slots, or a character that no file can hold.
    """
    found = sorted(part for part in parts if isinstance(part, Slot))
    expected = sorted(f"{{{slot}}}" for slot in slots)
    if (sorted(set(found)) if repeats else found) != expected:
        raise _refusal(
            node,
            f"{where} holds {', '.join(found) or 'no slot'}, expected "
            f"{', '.join(expected) or 'no slot'}",
        )
    text = "".join(
        part if isinstance(part, Slot) else part.replace("{", "{{").replace("}", "}}")
        for part in parts
    )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refusal(node, f"{where} has half a character (a lone surrogate)") from None
    return text


def _refusal(node: ast.AST, message: str) -> ReleaseError:
    return ReleaseError(f"line {node.lineno}: {message}")


def _kind(node: ast.expr) -> str:
    match node:
        case ast.Call():
            return "a call"
        case ast.IfExp():
            return "a conditional expression"
    return _snippet(node)


def _snippet(node: ast.AST) -> str:
    """Its source on one line, shortened."""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def to_toml(tables: Mapping[str, Mapping[str, str | Sequence[str]]], header: Sequence[str]) -> str:
    """A TOML document of strings and lists of strings, under comment lines.

    Strings of TOML are written as in JSON, but for DEL, which only TOML escapes.
    """

    def value(text: str | Sequence[str]) -> str:
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

    blocks = ["\n".join(f"# {_printable(line)}".rstrip() for line in header)]
    for name, table in tables.items():
        lines = [f"{key} = {value(text)}" for key, text in table.items()]
        blocks.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _printable(text: str) -> str:
    """For comments and screens: names of files and branches may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text)


def header(source: Path, out: Path, caption: str, notes: Sequence[str]) -> list[str]:
    """The comment on top of a prompt file: what it was made from, and the notes."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return [
        "The prompts of the PyTorch release of AffectGPT, for checkpoints trained on them. Its",
        "authors wrote the sentences. affectgpt_jax/assets/prompts/default.toml tells the format.",
        "",
        f"made from: {source.name}, SHA-256 {digest}",
        f"made by: python -m data_prep.release_prompts --source {source.name} --out {out.name} "
        f"--caption {caption}",
        *notes,
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 and one sentence for trouble that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="base_dataset.py of your clone")
    parser.add_argument("--out", type=Path, required=True, help="the TOML file to write")
    parser.add_argument(
        "--caption",
        choices=("image", "audio"),
        default="image",
        help="what the caption questions are about (default: image)",
    )
    args = parser.parse_args(argv)
    if args.out.exists() and args.out.samefile(args.source):
        sys.exit(f"error: --out={args.out} is the source; name another file")
    try:
        tables, notes = read_release(args.source, args.caption)
        comment = header(args.source, args.out, args.caption, notes)
        args.out.write_text(to_toml(tables, comment), encoding="utf-8", newline="\n")
    except ReleaseError as error:
        sys.exit(f"error: {_printable(str(error))}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    print(f"{args.out}: {len(tables['modes'])} input modes, {len(tables['questions'])} label types")
    for line in notes:
        print(_printable(line))


if __name__ == "__main__":
    main()
