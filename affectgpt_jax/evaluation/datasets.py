"""The data sets of MER-UniBench: their truth, their sizes and where the release keeps their files.

Names, splits and files are those of arXiv 2501.16566 and of the AffectGPT release. Sizes are the
published numbers of test clips.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What one data set is and where its files lie, relative to its own folder.

    Attributes:
        name: as the paper's Table 2 writes it.
        key: what commands call it.
        language: of the speech; ISO 639-1.
        task: fine, basic or sentiment, which is how its truth counts.
        truth: the kind of truth, which is the column of a truth file: openset, emotion or valence.
        folder: the release's folder.
        labels: label files, of which one is enough, the one that needs no pickle first.
        split: the part that is tested, as the label file calls it.
        size: clips of that part.
        subtitles: the subtitle file.
        subtitle_column: the column of it that the release shows to the model.
        valence: the lowest and highest true value; None where the truth is none.
        audio, video, face: media folders.
        raw_folder, raw_video: the folders as the set's own authors ship them; "" where the release
            has no others.
        unibench: whether its primary score is one of the nine of the MER-UniBench mean.
    """

    name: str
    key: str
    language: str
    task: str
    truth: str
    folder: str
    labels: tuple[str, ...]
    split: str
    size: int
    subtitles: str = "transcription-engchi-polish.csv"
    subtitle_column: str = "english"
    valence: tuple[float, float] | None = None
    audio: str = "audio"
    video: str = "video"
    face: str = "openface_face"
    raw_folder: str = ""
    raw_video: str = ""
    unibench: bool = True


# In the order of Table 2.
DATASETS = (
    DataSet(
        name="MER2023",
        key="mer2023",
        language="zh",
        task="basic",
        truth="emotion",
        folder="mer2023-dataset-process",
        labels=("label-6way.npz",),
        split="test1_corpus",
        size=411,
    ),
    DataSet(
        name="MER2024",
        key="mer2024",
        language="zh",
        task="basic",
        truth="emotion",
        folder="mer2024-dataset-process",
        labels=("label-6way.npz",),
        split="test1_corpus",
        size=1169,
        subtitles="transcription_merge.csv",
        subtitle_column="chinese",
    ),
    DataSet(
        name="MELD",
        key="meld",
        language="en",
        task="basic",
        truth="emotion",
        folder="meld-process",
        # The first is the file that MELD's own authors publish.
        labels=("test_sent_emo.csv", "label.npz"),
        split="test_corpus",
        size=2610,
        audio="subaudio",
        video="subvideo",
        raw_folder="MELD.Raw",
        raw_video="output_repeated_splits_test",
    ),
    DataSet(
        name="IEMOCAP",
        key="iemocap",
        language="en",
        task="basic",
        truth="emotion",
        folder="iemocap-process",
        labels=("label_4way.npz",),
        # Of which the fifth session is tested: name[4] == "5".
        split="whole_corpus",
        size=1241,
        audio="subaudio",
        video="subvideo-tgt",
    ),
    DataSet(
        name="CMU-MOSI",
        key="mosi",
        language="en",
        task="sentiment",
        truth="valence",
        folder="cmumosi-process",
        labels=("label.npz",),
        split="test_corpus",
        size=686,
        valence=(-3.0, 3.0),
        audio="subaudio",
        video="subvideo",
    ),
    DataSet(
        name="CMU-MOSEI",
        key="mosei",
        language="en",
        task="sentiment",
        truth="valence",
        folder="cmumosei-process",
        labels=("label.npz",),
        split="test_corpus",
        size=4659,
        valence=(-3.0, 3.0),
        audio="subaudio",
        video="subvideo_new",
    ),
    DataSet(
        name="CH-SIMS",
        key="sims",
        language="zh",
        task="sentiment",
        truth="valence",
        folder="sims-process",
        labels=("label.npz",),
        split="test_corpus",
        size=457,
        valence=(-1.0, 1.0),
    ),
    DataSet(
        name="CH-SIMS v2",
        key="simsv2",
        language="zh",
        task="sentiment",
        truth="valence",
        folder="simsv2-process",
        labels=("label.npz",),
        split="test_corpus",
        size=1034,
        valence=(-1.0, 1.0),
        video="video_new",
    ),
    DataSet(
        name="OV-MERD+",
        key="ovmerdplus",
        language="zh",
        task="fine",
        truth="openset",
        folder="ovmerdplus-process",
        labels=("ovlabel.csv",),
        split="all",
        size=532,
        subtitles="subtitle_eng.csv",
        subtitle_column="sentence",
    ),
    DataSet(
        name="OV-MERD",
        key="ovmerd",
        language="zh",
        task="fine",
        truth="openset",
        folder="mer2025-dataset",
        labels=("track2_train_ovmerd.csv",),
        split="all",
        size=332,
        subtitles="subtitle_chieng.csv",
        unibench=False,
    ),
)
BY_KEY = {dataset.key: dataset for dataset in DATASETS}
BY_NAME = {dataset.name: dataset for dataset in DATASETS}
# The nine of the mean by task, in the order in which Table 2 names the groups.
UNIBENCH = {
    task: tuple(d.name for d in DATASETS if d.unibench and d.task == task)
    for task in ("basic", "sentiment", "fine")
}
# Tasks of MER-UniBench; words that must be named exactly, without a lexicon; and which of two
# descriptions people prefer (MER-Prefer of MER2026).
TASKS = (*UNIBENCH, "words", "preference")
GROUPS = {"fine": "Fine-grained", "basic": "Basic", "sentiment": "Sentiment"}
# The world that `train` generates; its words are its own, so that no lexicon is asked.
DEMO = "demo"


def name_and_task(head: str) -> tuple[str, str]:
    """The name for the report and the task, of `NAME[:TASK]` on a command line.

    Returns:
        The name of a known set as Table 2 has it, or the user's; the task is "" where nothing
        tells it.

    Raises:
        ValueError: an unknown task, or one that is not the set's.
    """
    key, _, task = head.partition(":")
    known = BY_KEY.get(key)
    expected = known.task if known else "words" if key == DEMO else task
    if (expected and expected not in TASKS) or (known and task not in ("", expected)):
        raise ValueError(
            f"{task!r} is not the task of {key}; expected {expected if known else ', '.join(TASKS)}"
        )
    return known.name if known else key, task or expected
