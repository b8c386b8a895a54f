"""The PyTorch release's prompts as a prompt file: `affectgpt release-prompts`.

A checkpoint answers to the prompts that it was trained on. Those of the release are its authors'
sentences, so they do not ship; this takes them from your own clone:

    affectgpt release-prompts --source base_dataset.py --out release.toml

The source is parsed and never run. `get_prompt_for_multimodal` gives the input modes, the methods
`func_get_qa_*` the label types. What is not built by joining string literals is refused with its
line; what has no place in a prompt file (the format is that of
`affectgpt_jax/assets/prompts/default.toml`) is left out and named, on the screen and in the file.
The same source gives the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from affectgpt_jax import cli
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.files import write_text
from affectgpt_jax.common.text import one_line, print_lines
from affectgpt_jax.data.prompts import parse_prompts

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


# The method that builds each label type.
LABEL_TYPES = {
    "description": "func_get_qa_description",
    "ovlabel": "func_get_qa_ovlabel",
    "onehot": "func_get_qa_onehot_wo_candidates",
    "onehot_candidates": "func_get_qa_onehot_w_candidates",
    "sentiment": "func_get_qa_sentiment",
    "valence": "func_get_qa_valence",
    "caption": "func_get_qa_caption",
    "qa": "func_get_qa_direct",
    "preference": "func_get_qa_preference",
}

# What the release puts into its sentences, and the slot that stands for it.
SLOTS = {
    "subtitle": "subtitle",
    "user_message": "question",
    "sample['description']": "description",
    "sample['ovlabel']": "labels",
    "sample['onehot']": "emotion",
    "self.candidate_labels": "candidates",
    "sample['sentiment']": "sentiment",
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


# The strings that a method's local names hold: the operands of each concatenation, as templates.
Names = dict[str, list[str]]


class Converted(NamedTuple):
    """A prompt file's tables, and notes on what is left out or assumed, with the reasons."""

    tables: dict[str, dict[str, Any]]
    notes: list[str]


def read_release(path: Path, caption: str = "image") -> Converted:
    """Read the prompts of the release's `base_dataset.py` without running it.

    Args:
        path: the file.
        caption: whose caption questions to take, "image" or "audio".

    Raises:
        ReleaseError: not Python, or built in a way that is not understood.
        PromptError: a prompt, question or answer that lacks an input or a value, or has another.
        OSError: the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in somebody else's strings
            tree = ast.parse(path.read_bytes())
        converted = convert(tree, caption)
    except ReleaseError as error:
        raise ReleaseError(f"{path.name}, {error}") from None
    except SyntaxError as error:
        message = f"line {error.lineno or 1}: not valid Python: {error.msg}"
        raise ReleaseError(f"{path.name}, {message}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # of the parser, about the whole
        raise ReleaseError(f"{path.name}, line 1: not valid Python: {error}") from None
    parse_prompts(converted.tables, path.name)
    return converted


def convert(tree: ast.Module, caption: str) -> Converted:
    """The tables of a prompt file from a parsed source.

    Raises:
        ReleaseError: built in a way that is not understood.
    """
    notes = ["left out: [modes].audio_face (the release has no prompt for these inputs)"]
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = [{m.name: m for m in c.body if isinstance(m, ast.FunctionDef)} for c in classes]
    found = [(c, m) for c, m in zip(classes, methods) if PROMPT_METHOD in m]
    if len(found) != 1:
        raise ReleaseError(
            f"line 1: {len(found)} classes here have a method {PROMPT_METHOD}, expected one"
        )
    [(cls, by_name)] = found
    modes, inputs, assistant = read_modes(by_name[PROMPT_METHOD], notes)
    questions, answers = read_label_types(cls, by_name, caption, notes)
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


def read_modes(
    method: ast.FunctionDef, notes: list[str]
) -> tuple[dict[str, str], dict[str, str], str]:
    """Templates by input mode, first sentences by input, and what follows every question."""
    tests = {}
    for node in ast.walk(method):
        match node:
            case ast.Compare(
                left=ast.Name(id="face_or_frame"),
                ops=[ast.Eq()],
                comparators=[ast.Constant(value=str(name))],
            ):
                tests[name] = ast.unparse(node)
    if missing := [name for name in MODES if name not in tests]:
        raise _refusal(method, f"{method.name} has no branch for {missing[0]!r}")
    modes, inputs = {}, {}
    for name, test in tests.items():
        if name not in MODES:
            notes.append(f"left out: the prompt {name!r} (no input mode here shows the same)")
            continue
        mode, where = MODES[name], f"the branch for {name!r}"
        value, names = follow(method, where, {other: other == test for other in tests.values()})
        prompt = [
            re.sub(r"<(\w+)Here>", lambda match: f"{{{match[1].lower()}}}", operand)
            for operand in operands(value, names, f"{where} returns")
        ]
        modes[mode] = "".join(prompt)
        if mode in INTRODUCING:
            inputs[mode.split("_")[0]] = prompt[0]
    endings = {text.rpartition("{question}")[2] for text in modes.values()}
    if len(endings) > 1:
        raise _refusal(method, f"prompts end in one of {sorted(endings)}, expected one ending")
    return modes, inputs, endings.pop()


def read_label_types(
    cls: ast.ClassDef,
    methods: Mapping[str, ast.FunctionDef],
    caption: str,
    notes: list[str],
) -> tuple[dict[str, str | list[str]], dict[str, str]]:
    """Questions and answers by label type."""
    questions: dict[str, str | list[str]] = {}
    answers: dict[str, str] = {}
    for key, name in LABEL_TYPES.items():
        if name not in methods:
            raise _refusal(cls, f"{cls.name} has no method {name}")
        question, names, answers[key] = read_question_and_answer(methods[name], caption)
        match question:
            case ast.Call(func=ast.Attribute(attr="func_random_prompts"), args=[candidates]):
                questions[key] = read_candidates(cls, ast.unparse(candidates))
            case _:
                parts = operands(question, names, f"the question of {name} is")
                questions[key] = "".join(parts)
        if key == "preference":
            *_, same = read_question_and_answer(methods[name], caption, preferred=False)
            answers["preference_same"] = same
    other = {"image": "audio", "audio": "image"}[caption]
    notes.append(f"left out: the caption questions about {other} (--caption={caption})")
    notes += [
        f"left out: {name} (it is no label type here)"
        for name in methods
        if re.fullmatch(r"func_get_(qa_.+|.+_reward)", name) and name not in LABEL_TYPES.values()
    ]
    return questions, answers


def read_question_and_answer(
    method: ast.FunctionDef, caption: str, preferred: bool = True
) -> tuple[ast.expr, Names, str]:
    """The question that a `func_get_qa_*` returns, the names it uses, and the answer's template.

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
            where = f"the answer of {method.name} is"
            return question, names, "".join(operands(answer, names, where))
    raise _refusal(
        value,
        f"{method.name} returns {_snippet(value)}, expected {{'question': ..., 'answer': ...}}",
    )


def read_candidates(cls: ast.ClassDef, name: str) -> list[str]:
    """The questions in the list that the class assigns to `name`, once."""
    assigned = [
        node.value
        for node in ast.walk(cls)
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets)
    ]
    match assigned:
        case [ast.List(elts=entries)]:
            return ["".join(operands(entry, {}, f"an entry of {name} is")) for entry in entries]
    raise _refusal(assigned[-1] if assigned else cls, f"expected one list assigned to {name}")


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
    """Follow one path through a method.

    Args:
        method: the method.
        where: how errors call this path.
        taken: the tests of its branches, as `ast.unparse` writes them, and whether they hold.

    Returns:
        The expression that is returned, and the local names at that point.

    Raises:
        ReleaseError: a statement that is not an assignment of strings, an assertion, a branch on
            one of the tests, or a return.
    """
    names: Names = {}
    statements = list(method.body)
    while statements:
        statement = statements.pop(0)
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = operands(value, names, f"{where} assigns {name} from")
            case ast.If(test=test, body=body, orelse=orelse) if ast.unparse(test) in taken:
                statements[:0] = body if taken[ast.unparse(test)] else orelse
            case ast.Return(value=ast.expr() as value):
                return value, names
            case ast.Assert() | ast.Expr(value=ast.Constant()):  # a docstring
                pass
            case _:
                raise _refusal(
                    statement,
                    f"{where} holds {_snippet(statement)}, expected only assignments of strings, "
                    "assertions, known branches and a return of a value",
                )
    raise _refusal(method, f"{where} ends without a return")


def operands(node: ast.expr, names: Names, lead: str) -> list[str]:
    """The operands of a concatenation of string literals, as templates.

    In a template, "{slot}" stands for what is interpolated, and braces of the text are doubled.

    Args:
        node: the expression.
        names: local names that it may use.
        lead: how an error begins, such as "the branch for 'face' assigns prompt from".

    Raises:
        ReleaseError: anything but string literals and interpolations that are in `SLOTS`, joined
            by +, or the valence formatted by %.
    """
    match node:
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return operands(left, names, lead) + operands(right, names, lead)
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Constant(value=str(text)) if not re.search("[\ud800-\udfff]", text):
            return [_doubled(text)]
        case ast.JoinedStr(values=values):
            return ["".join(part for value in values for part in operands(value, names, lead))]
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return operands(value, names, lead)
        case ast.BinOp(op=ast.Mod(), left=ast.Constant(value=str(text)), right=right):
            parts = re.split(r"(%%|%\.2f)", text)
            formats = [part for part in parts if "%" in part and part != "%%"]
            if formats == ["%.2f"] and ast.unparse(right) == "sample['valence']":
                written = {"%%": "%", "%.2f": "{valence}"}
                return ["".join(written.get(part) or _doubled(part) for part in parts)]
        case _ if (slot := SLOTS.get(ast.unparse(node))) is not None:
            return [f"{{{slot}}}"]
    raise _refusal(node, f"{lead} {_snippet(node)}, expected string literals joined by +")


def _doubled(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _refusal(node: ast.AST, message: str) -> ReleaseError:
    return ReleaseError(f"line {node.lineno}: {message}")


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

    blocks = ["\n".join(f"# {one_line(line)}".rstrip() for line in header)]
    for name, table in tables.items():
        lines = [f"{key} = {value(text)}" for key, text in table.items()]
        blocks.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def header(source: Path, out: Path, caption: str, notes: Sequence[str]) -> list[str]:
    """The comment on top of a prompt file: what it was made from, and the notes."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return [
        "The prompts of the PyTorch release of AffectGPT, for checkpoints trained on them. Its",
        "authors wrote the sentences. affectgpt_jax/assets/prompts/default.toml tells the format.",
        "",
        f"made from: {source.name}, SHA-256 {digest}",
        f"made by: affectgpt release-prompts --source {source.name} --out {out.name} "
        f"--caption {caption}",
        *notes,
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        parser = cli.make_parser("affectgpt release-prompts", __doc__.split("\n")[0])
        add = parser.add_argument
        add("--source", type=Path, required=True, help="base_dataset.py of your clone")
        add("--out", type=Path, required=True, help="the TOML file to write")
        add(
            "--caption",
            choices=("image", "audio"),
            default="image",
            help="what the caption questions are about (default: image)",
        )
        arguments = parser.parse_args(argv)
        source, out = arguments.source, arguments.out
        if out.exists() and out.samefile(source):
            raise ReleaseError(f"--out={out} is the source; name another file")
        tables, notes = read_release(source, arguments.caption)
        comment = header(source, out, arguments.caption, notes)
        with cli.writing(f"--out={out}"):
            write_text(out, to_toml(tables, comment))
        modes, questions = len(tables["modes"]), len(tables["questions"])
        print_lines([f"{out}: {modes} input modes, {questions} label types", *notes])


if __name__ == "__main__":
    main()
