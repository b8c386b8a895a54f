"""Files that are no records, extracted as the records of a run were, so that it can be asked.

    how = extraction_of(run)        # finds the encoders; loads nothing
    extractor = Extractor(how)      # loads them, once
    for found in extractor([Clip("talk", Path("talk.mp4"))], {"talk": "I am fine."}):
        if found.record:
            clips = how.as_records([found.record])  # for `inference.Generator`

Nothing is written.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from affectgpt_jax import build
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.json import check_type, read_json
from affectgpt_jax.data import demo
from affectgpt_jax.data.modalities import MODALITIES
from affectgpt_jax.data.records import (
    EXTRACTION,
    FORMAT_VERSION,
    MANIFEST_FILE,
    Feature,
    Manifest,
    MemoryRecords,
    Record,
    read_manifest,
)
from affectgpt_jax.restore import Run

from . import faces
from .blocks import BLOCKS, PLACES
from .clips import Clip
from .decoding import (
    LIMIT_S,
    Decoded,
    Job,
    available_cores,
    decode_clip,
    died_because,
    in_order,
)
from .detectors import DetectorFile, read_detector
from .encoders import WINDOWS, Encoder, EncoderError, EncoderPlace, find_encoder
from .encoders import names as encoder_names
from .report import reason_of
from .settings import BOXES, Settings, differences, make_settings, package_versions, placement
from .settings import VERSION as CODE_VERSION
from .stages import Stages, encode

EXTRACT = "files can be asked about where a run was trained on records of affectgpt extract"


class ExtractionError(UserError, ValueError):
    """Records whose extraction cannot be repeated."""


@dataclasses.dataclass(frozen=True)
class Extraction:
    """How the records of a run were extracted, and what here repeats it.

    Attributes:
        place: of the records; "" where there are none.
        manifest: theirs.
        settings: theirs; but device, precision and batch as they are here.
        features: that the run reads.
        encoders: that make them, by kind.
        notes: sentences about what may make features of a clip other than theirs.
        detector: of faces; None is the cascade.
        tracks: how many of their clips had OpenFace's faces, by directory.
    """

    place: str
    manifest: Manifest = dataclasses.field(repr=False)
    settings: Settings = dataclasses.field(repr=False)
    features: tuple[str, ...]
    encoders: Mapping[str, EncoderPlace]
    notes: tuple[str, ...] = ()
    detector: DetectorFile | None = None
    tracks: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def encoder_names(self) -> str:
        """The encoders, for people."""
        return ", ".join(f"{kind} by {place.name}" for kind, place in self.encoders.items())

    def remarks(self, with_tracks: bool = False) -> list[str]:
        """What people should know who have clips extracted, with arrays of faces or without."""
        detected = [
            f"{count:,} clips of {place} had OpenFace's faces; here they are detected"
            for place, count in self.tracks.items()
            if not with_tracks
        ]
        return [*self.notes, *detected]

    def as_records(self, records: Sequence[Record]) -> MemoryRecords:
        """Clips as data for `inference.Generator`, which takes them for those of a directory."""
        return MemoryRecords(records, self.manifest)


def extraction_of(
    run: Run,
    records: str | None = None,
    *,
    encoders: Mapping[str, str | None] | None = None,
    face_detector: Path | None = None,
    device: str | None = None,
    precision: str | None = None,
    download: bool = False,
) -> Extraction:
    """The extraction by which the records of a run were made; no weights are loaded.

    Args:
        run: of `restore.open_run`, with or without its weights.
        records: a directory of such records, where those of the run's config are no longer there.
        encoders: by kind, "video" or "audio", the directory of its weights, or NAME=DIRECTORY;
            None looks where they were, and then in the hub's cache. Where neither records are
            there nor the run has kept how they were made, they are what makes features, and have
            names.
        face_detector: the file of the network that finds faces; None is the cascade.
        device, precision: of PyTorch; those of the records where this machine has them, if None.
        download: get published weights that are not in the hub's cache.

    Raises:
        ExtractionError: records that no encoder of ours has made, or several have, or whose faces
            another detector has found.
        EncoderError: weights that are not here, or are others.
        RecordError: no records.
    """
    wanted = run.processor.mode.features
    detector = read_detector(face_detector.expanduser()) if face_detector else None
    if not wanted:
        raise ExtractionError(
            f"{run.workdir} reads subtitles alone (config.input={run.config.input!r}), nothing of "
            f"a video; {EXTRACT}, with another input"
        )
    if others := [name for name in wanted if not MODALITIES[name].encoder]:
        raise ExtractionError(
            f"{run.workdir} reads the feature {others[0]!r} (config.input={run.config.input!r}), "
            f"which no encoder of data_prep makes; {EXTRACT}, with another input"
        )
    kinds = list(dict.fromkeys(MODALITIES[name].encoder for name in wanted))
    given = encoders or {}
    places = sorted({e["source"] for e in build.training_sets(run.config).values()} - {""})
    gone = [place for place in places if _is_gone(run, place)]
    if records:
        found = {records: _read(run, records, wanted)}
    elif places and not gone:
        found = {place: _read(run, place, wanted) for place in places}
    elif (kept := run.workdir / build.EXTRACTION_FILE).is_file():
        found = {str(kept): _read(run, str(kept), wanted)}
    elif all((given.get(kind) or "").partition("=")[0] in encoder_names(kind) for kind in kinds):
        named = {kind: given[kind] for kind in kinds}
        return _named(run, named, detector, device, precision, download)
    else:
        why = f"which was {gone[0]!r}, is not there" if gone else "is not named"
        raise ExtractionError(
            f"what {run.workdir} was trained on {why}, so nothing says how features were made; "
            "name records that affectgpt extract wrote, --trained-on DIR, or without any the "
            "encoders, --video NAME[=DIR] --audio NAME[=DIR]"
        )
    (place, (manifest, theirs)), *rest = found.items()
    for other, (_, settings) in rest:
        for kind in kinds:
            if settings["encoders"][kind] != theirs["encoders"][kind]:
                names = [s["encoders"][kind]["name"] for s in (theirs, settings)]
                raise ExtractionError(
                    f"{run.workdir} was trained on features of several encoders: {kind} by "
                    f"{names[0]} in {place}, by {names[1]} in {other}; choose with --trained-on DIR"
                )
        if "face" in wanted and settings["faces"] != theirs["faces"]:
            ways = [
                ", ".join(f"{key} {value}" for key, value in s["faces"].items())
                for s in (theirs, settings)
            ]
            raise ExtractionError(
                f"{run.workdir} was trained on faces that were taken in several ways: {ways[0]} "
                f"in {place}, {ways[1]} in {other}; choose with --trained-on DIR"
            )
    build.check_features(run.config, MemoryRecords([], manifest), run.processor.mode)
    here = {
        kind: _find(theirs["encoders"][kind], kind, Path(place), given.get(kind), download)
        for kind in kinds
    }
    how = placement_like(theirs, device, precision)
    settings: Settings = {**theirs, **how}
    mine = {"version": CODE_VERSION, **how, "batch": theirs["batch"]}
    mine |= {"versions": package_versions()}
    notes, tracks = [], {}
    for name, (_, made) in found.items():
        other = differences(made, mine)
        if "face" in wanted:
            other += check_detector(name, made["faces"]["detector"], detector)
            if count := made.get("face arrays"):
                tracks[name] = count
        notes += [f"{name} was extracted otherwise: {note}" for note in other]
    return Extraction(place, manifest, settings, wanted, here, tuple(notes), detector, tracks)


def check_detector(place: str, theirs: str, detector: DetectorFile | None) -> list[str]:
    """What is to be said of how faces were found in records, and are found here.

    Raises:
        ExtractionError: by different detectors.
    """
    mine = detector.name if detector else faces.DETECTOR
    if theirs == BOXES:
        return [f"faces by boxes that somebody had there, by {mine} here"]
    if theirs != mine:
        advice = "leave out" if theirs == faces.DETECTOR else "name its file with"
        raise ExtractionError(
            f"faces of {place} were found by {theirs}, and would be by {mine} here; {advice} "
            "--face-detector"
        )
    return []


def _named(
    run: Run,
    given: Mapping[str, str],
    detector: DetectorFile | None,
    device: str | None,
    precision: str | None,
    download: bool,
) -> Extraction:
    """The extraction by encoders that somebody names, for weights that came without records."""
    places = {kind: find_encoder(text, kind, download) for kind, text in given.items()}
    wanted = run.processor.mode.features
    finder = detector and detector.name
    settings = make_settings(wanted, places, None, *placement(device, precision), "bgr", finder)
    features: dict[str, Feature] = {
        name: {
            "frames": WINDOWS,
            "width": run.processor.features[name],
            "encoder": places[MODALITIES[name].encoder].name,
            "present": 0,
        }
        for name in wanted
    }
    manifest = Manifest(FORMAT_VERSION, "", 0, [], features, {}, "", {})
    return Extraction("", manifest, settings, wanted, places, detector=detector)


def placement_like(
    theirs: Settings, device: str | None = None, precision: str | None = None
) -> dict[str, str]:
    """Device and precision: what is asked for, or else those of records, if they are here.

    Raises:
        EncoderError: as `placement`.
    """
    if device is None:
        device = placement(None, None)[0] if theirs["device"] == "cuda" else theirs["device"]
    if precision is None and theirs["device"] == device:
        precision = theirs["precision"]
    device, precision = placement(device, precision)
    return {"device": device, "precision": precision}


class _Kept(TypedDict):
    """What a run keeps, see `build.keep_extraction`."""

    features: dict[str, Feature]
    extraction: dict[str, Any]


def _is_gone(run: Run, place: str) -> bool:
    """Whether the records of a source string are not there; those of TFDS name no encoder."""
    if demo.world_seed(place, run.config.demo_seed) is not None:
        return False
    return not (Path(place).expanduser() / MANIFEST_FILE).is_file()


def _read(run: Run, place: str, wanted: Sequence[str]) -> tuple[Manifest, Settings]:
    """Manifest and settings of records that encoders of ours have made."""
    whose = f"{run.workdir} was trained on"
    if demo.world_seed(place, run.config.demo_seed) is not None:
        raise ExtractionError(f"{whose} the demo world, whose clips are generated; {EXTRACT}")
    path = Path(place).expanduser()
    if path.is_file():
        facts = read_json(path, _Kept, error=ExtractionError)
        extra = {EXTRACTION: facts["extraction"]}
        manifest = Manifest(FORMAT_VERSION, "", 0, [], facts["features"], {}, "", extra)
    else:
        manifest = read_manifest(path)
    if EXTRACTION not in manifest.extra:
        made = sorted({facts["encoder"] for facts in manifest.features.values()})
        raise ExtractionError(
            f"{whose} {place}, whose features ({', '.join(made)}) no encoder of data_prep has "
            f"made; {EXTRACT}"
        )
    settings = check_type(
        manifest.extra[EXTRACTION], Settings, f"{place}: {EXTRACTION}", error=ExtractionError
    )
    for name in wanted:
        if MODALITIES[name].encoder not in settings["encoders"]:
            raise ExtractionError(f"{place} has no encoder of the feature {name!r}; {EXTRACT}")
    return manifest, settings


def _find(
    theirs: Mapping[str, str], kind: str, records: Path, given: str | None, download: bool
) -> EncoderPlace:
    """The encoder of records, of which only the weights' hash is known for sure.

    Raises:
        EncoderError: it is not here, or another one is.
    """
    label, digest = theirs["name"], theirs["sha256"]
    name, _, model = label.partition(":")
    advice = f"name the directory of its weights: --{kind} DIR"
    if given:
        texts = [given if given.partition("=")[0] in encoder_names(kind) else f"{name}={given}"]
    else:
        noted = records.expanduser() / BLOCKS / PLACES
        was = read_json(noted, dict[str, str], error=EncoderError) if noted.is_file() else {}
        texts = [f"{name}={was[kind]}"] if Path(was.get(kind, "")).is_dir() and kind in was else []
        if not model or "/" in model:  # the hub has it
            texts.append(f"{name}={model}".rstrip("="))
    other = ""
    for text in texts:
        try:
            found = find_encoder(text, kind, download)
        except UserError as error:
            if text == texts[-1] and not other:
                raise EncoderError(f"the {kind} encoder {label} of {records}: {error}") from None
            continue
        if (digest_here := found.sha256()) == digest:
            return dataclasses.replace(found, name=label)
        other = f"{found.directory} holds other weights (sha256 {digest_here[:12]})"
    raise EncoderError(
        f"{records} was made by the {kind} encoder {label} (sha256 {digest[:12]}), but "
        f"{other or 'where it was there is none now'}; {advice}"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Extracted:
    """What became of a clip.

    Attributes:
        clip: its files.
        record: its features and subtitle; None where nothing of it can be used.
        problems: by feature that the run reads, why it is missing.
        facts: of the files, as extraction.csv has them.
        inputs: what the encoders were given: by feature pixels uint8 `[8, S, S, 3]`, or samples
            float32 `[8, 32000]` at 16 kHz.
    """

    clip: Clip
    record: Record | None
    problems: Mapping[str, str]
    facts: Mapping[str, Any]
    inputs: Mapping[str, np.ndarray]

    @property
    def reason(self) -> str:
        """Why features are missing, in one text; empty if none is."""
        return reason_of(self.problems, (*self.inputs, *self.problems))

    @property
    def silent(self) -> bool:
        """Whether there is sound, all of whose samples are zero."""
        return "audio" in self.inputs and not self.inputs["audio"].any()


class Extractor:
    """Encoders that are loaded, and the extraction of clips by them.

    Clips are decoded in processes of their own, ahead of the encoders, since a file may end the
    process that decodes it. Not for several threads at a time.

    Args:
        how: of `extraction_of`.
        workers: processes that decode; one a core if None.
        max_seconds: of a file; a longer one is not decoded, and has no features.
        limit_s: that the decoding of a clip may take.

    Raises:
        EncoderError: weights that are damaged, or features of another width than the run reads.
    """

    def __init__(
        self,
        how: Extraction,
        workers: int | None = None,
        max_seconds: float = math.inf,
        limit_s: float = LIMIT_S,
    ):
        self.how, self._max_seconds, self._limit_s = how, max_seconds, limit_s
        self._workers = available_cores() if workers is None else workers
        settings = how.settings
        self._encoders = {
            kind: Encoder(place, settings["device"], settings["precision"])
            for kind, place in how.encoders.items()
        }
        for feature in how.features:
            encoder = self._encoders[MODALITIES[feature].encoder]
            if encoder.width != (reads := how.manifest.features[feature]["width"]):
                raise EncoderError(
                    f"the encoder {encoder.place.name} makes features of width {encoder.width}, "
                    f"but the run reads {feature} of width {reads}; name another encoder"
                )

    def __call__(
        self,
        clips: Iterable[Clip],
        subtitles: Mapping[str, str] | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[Extracted]:
        """Extract clips in batches, as training's were, in their order.

        Args:
            clips: with names of their own.
            subtitles: by name of a clip.
            stop: ends what is under way when somebody sets it.

        Yields:
            What became of each clip. A file that cannot be used is no error.

        Raises:
            Abandoned: `stop` is set.
        """
        clips, said = list(clips), subtitles or {}
        settings, features = self.how.settings, self.how.features
        size = self._encoders["video"].image_size if "video" in self._encoders else 0
        order, batch = settings["faces"]["order of arrays"], settings["batch"]

        def died() -> Decoded:
            return Decoded(problems=dict.fromkeys(features, died_because(self._limit_s)))

        jobs = [
            Job(clip, features, size, order, self._max_seconds, self.how.detector) for clip in clips
        ]
        workers = max(1, min(self._workers, len(jobs)))
        ahead = 2 * batch + workers
        decoded = in_order(decode_clip, jobs, workers, ahead, died, self._limit_s, stop)
        try:
            left = iter(clips)
            while part := list(islice(left, batch)):
                results = [next(decoded) for _ in part]
                block = encode(part, results, self._encoders, features, batch, Stages(workers))
                for number, (clip, result) in enumerate(zip(part, results, strict=True)):
                    values = {
                        feature: block.features[feature][number]
                        for feature in features
                        if feature not in result.problems
                    }
                    record = None
                    if values:
                        subtitle = said.get(clip.name, "")
                        record = Record(name=clip.name, subtitle=subtitle, features=values)
                    yield Extracted(clip, record, result.problems, result.facts, result.arrays)
        finally:
            decoded.close()
