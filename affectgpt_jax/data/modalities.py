"""The registry of modalities: what a model can be given of a clip, from records to the prompt.

Everything else derives from these tables: features of records, slots and placeholders of prompts,
input modes, the flags of `import_arrays`, `config.projectors`, the modules of the model, the
ceilings of the demo world. To add a modality, such as features of the pose, add

1. a row to `MODALITIES`, a row to `HEADS` unless it shares the head of another modality, and the
   input modes that show it;
2. a module to `models.fusers`, if none of its kinds of head fits;
3. a line to the table `[inputs]` of the prompt files.

Code that uses the package as a library calls `register` instead of editing the tables.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Head:
    """A submodule of `models.fusers.Fusion`, which computes soft tokens.

    Attributes:
        name: of the submodule, hence of its parameters.
        kinds: how it may compute them (keys of `fusers.HEAD_CLASSES` or
            `fusers.PRE_FUSION_CLASSES`), the default first.
        num_queries: soft tokens where the kind is "qformer"; the other kinds that ship compute one.
        max_positions: feature vectors per sample where the kind is "qformer".
        feature_width: default width of the features that it reads; 0 for a pre-fusion, which reads
            features of other heads.
    """

    name: str
    kinds: tuple[str, ...]
    num_queries: int
    max_positions: int
    feature_width: int = 0

    @property
    def is_pre_fusion(self) -> bool:
        """Whether it reads two features together; any other head reads one."""
        return not self.feature_width

    @property
    def kind_key(self) -> str:
        """The config key that chooses the kind."""
        return "fusion" if self.is_pre_fusion else f"projectors.{self.name}"

    @property
    def width_key(self) -> str:
        """The config key of the width of its features."""
        return f"projectors.{self.name}_width"


@dataclasses.dataclass(frozen=True)
class Modality:
    """A slot of soft tokens in the prompt, and the feature that they are computed from.

    Attributes:
        name: of the slot and, unless `fused`, of the feature in records.
        placeholder: the text that stands for one of its soft tokens in a prompt.
        head: the head that computes them; modalities may share one.
        fused: for a pre-fusion, the names of the two modalities whose features it reads together.
        template: its key in `[inputs]` of a prompt file; "" is its name.
        letter: "A" (audio) or "V" (visual), as tables of the field write it.
        encoder: what `data_prep.extract` computes the feature with, "video" or "audio"; "" where
            the feature comes from elsewhere.
        demo_cue: the cue of the demo world, "face" or "audio", that the feature shows; "" where the
            demo world has no such feature.
    """

    name: str
    placeholder: str
    head: str
    fused: tuple[str, ...] = ()
    template: str = ""
    letter: str = ""
    encoder: str = ""
    demo_cue: str = ""

    @property
    def features(self) -> tuple[str, ...]:
        """The features that its soft tokens are computed from."""
        return self.fused or (self.name,)

    @property
    def prompt_slot(self) -> str:
        """The name of its slot in templates."""
        return self.template or self.name


@dataclasses.dataclass(frozen=True)
class InputMode:
    """What a model sees of a clip.

    Attributes:
        name: the mode's name in configs and prompt files.
        slots: soft-token slots, in prompt order.
        text: whether the subtitle is part of the prompt.
    """

    name: str
    slots: tuple[str, ...]
    text: bool

    @property
    def features(self) -> tuple[str, ...]:
        """The features that the mode reads, in the order of its slots."""
        return tuple(dict.fromkeys(f for slot in self.slots for f in MODALITIES[slot].features))

    def without_pre_fusion(self) -> InputMode:
        """The mode that sees the same, each modality through its own head only."""
        slots = tuple(slot for slot in self.slots if not MODALITIES[slot].fused)
        return next(m for m in INPUT_MODES.values() if (m.slots, m.text) == (slots, self.text))


def modalities_in_words(mode: str) -> str:
    """What an input mode of this name sees, such as "audio + face + text"."""
    return mode.removeprefix("multi_").replace("_", " + ")


_KINDS = ("attention", "mean", "qformer")
HEADS = {
    head.name: head
    for head in (
        Head("multi", ("attention", "qformer", "projected"), num_queries=16, max_positions=264),
        Head("audio", _KINDS, num_queries=8, max_positions=8, feature_width=1024),
        Head("video", _KINDS, num_queries=32, max_positions=32, feature_width=768),
        Head("image", ("mean", "qformer"), num_queries=32, max_positions=257, feature_width=768),
    )
}

# In prompt order.
MODALITIES = {
    modality.name: modality
    for modality in (
        Modality("multi", "<MultiHere>", "multi", fused=("face", "audio")),
        Modality("multi_frame", "<MultiHere>", "multi", ("frame", "audio"), template="multi"),
        Modality("audio", "<AudioHere>", "audio", letter="A", encoder="audio", demo_cue="audio"),
        Modality("face", "<FaceHere>", "video", letter="V", encoder="video", demo_cue="face"),
        Modality("frame", "<FrameHere>", "video", letter="V", encoder="video", demo_cue="face"),
        Modality("image", "<ImageHere>", "image", letter="V", demo_cue="face"),
    )
}

INPUT_MODES = {
    mode.name: mode
    for mode in (
        # With the pre-fusion of voice and picture; the first is the paper's default.
        InputMode("multi_audio_face_text", ("multi", "audio", "face"), True),
        InputMode("multi_audio_frame_text", ("multi_frame", "audio", "frame"), True),
        InputMode("multi_audio_face_frame_text", ("multi", "audio", "face", "frame"), True),
        InputMode("multi_text", ("multi",), True),
        # Without.
        InputMode("audio_face_frame_text", ("audio", "face", "frame"), True),
        InputMode("audio_face_text", ("audio", "face"), True),
        InputMode("audio_frame_text", ("audio", "frame"), True),
        InputMode("audio_face", ("audio", "face"), False),
        InputMode("audio_text", ("audio",), True),
        InputMode("face_text", ("face",), True),
        InputMode("frame_text", ("frame",), True),
        InputMode("audio", ("audio",), False),
        InputMode("face", ("face",), False),
        InputMode("frame", ("frame",), False),
        InputMode("text", (), True),
        InputMode("image", ("image",), False),
    )
}

# Orders that formats fix; modalities that are added come last.
_RECORD_ORDER = ("face", "frame", "audio", "image")  # of features in record files
# Of placeholders in the release's tokenizer, which fixes their ids.
_TOKEN_ORDER = ("<ImageHere>", "<AudioHere>", "<FrameHere>", "<FaceHere>", "<MultiHere>")


def feature_names() -> tuple[str, ...]:
    """The features that a record may have, in the order in which records hold them."""
    own = [modality.name for modality in MODALITIES.values() if not modality.fused]
    return tuple(sorted(own, key=lambda name: _place(name, _RECORD_ORDER)))


def placeholders() -> tuple[str, ...]:
    """The placeholders of soft tokens, in the order in which they are added to a tokenizer."""
    texts = dict.fromkeys(modality.placeholder for modality in MODALITIES.values())
    return tuple(sorted(texts, key=lambda text: _place(text, _TOKEN_ORDER)))


def _place(value: str, order: tuple[str, ...]) -> int:
    return order.index(value) if value in order else len(order)


def extracted_features() -> dict[str, tuple[str, ...]]:
    """By kind of encoder, "video" and "audio", the features that `data_prep.extract` computes."""
    found: dict[str, tuple[str, ...]] = {"video": (), "audio": ()}
    for name in feature_names():
        if kind := MODALITIES[name].encoder:
            found[kind] += (name,)
    return found


def projectors() -> dict[str, str | int]:
    """The keys of `config.projectors` that heads have, with their defaults."""
    heads = [head for head in HEADS.values() if not head.is_pre_fusion]
    kinds = {head.name: head.kinds[0] for head in heads}
    return kinds | {f"{head.name}_width": head.feature_width for head in heads}


def register(modality: Modality, head: Head | None = None, modes: Iterable[InputMode] = ()) -> None:
    """Add a modality, before configs, records and prompts are read.

    Args:
        modality: the new slot.
        head: its head, unless it shares one that is there.
        modes: input modes that show it.

    Raises:
        ValueError: a name that is taken, a head, feature or slot that is not there, a head of
            features without a width, or a placeholder that is not of the form `<NameHere>`.
    """
    heads = HEADS | ({head.name: head} if head else {})
    modalities = MODALITIES | {modality.name: modality}
    modes = tuple(modes)
    for new, table in (
        *([(head, HEADS)] if head else []),
        (modality, MODALITIES),
        *((mode, INPUT_MODES) for mode in modes),
    ):
        if new.name in table:
            raise ValueError(
                f"{type(new).__name__} {new.name!r} is registered already; choose another name"
            )
    if not re.fullmatch(r"<[A-Za-z]+Here>", modality.placeholder):
        raise ValueError(
            f"the placeholder of {modality.name!r} is {modality.placeholder!r}; expected a text "
            "such as <PoseHere>"
        )
    if modality.head not in heads:
        raise ValueError(
            f"the modality {modality.name!r} names the head {modality.head!r}; expected one of "
            f"{', '.join(heads)}, or pass its head too"
        )
    if bool(modality.fused) != heads[modality.head].is_pre_fusion:
        raise ValueError(
            f"the head {modality.head!r} of {modality.name!r} has the feature_width "
            f"{heads[modality.head].feature_width}; a pre-fusion has none, any other head has one"
        )
    for name, known in (
        *((name, feature_names()) for name in modality.fused),
        *((slot, modalities) for mode in modes for slot in mode.slots),
    ):
        if name not in known:
            raise ValueError(f"{name!r} is not known; expected one of {', '.join(known)}")
    if head:
        HEADS[head.name] = head
    MODALITIES[modality.name] = modality
    INPUT_MODES.update({mode.name: mode for mode in modes})
