"""Data sets of MER-UniBench as their authors lay them out, with a few clips."""

import csv

import numpy as np

from affectgpt_jax.evaluation.datasets import BY_KEY

MELD_EMOTIONS = ("anger", "joy", "sadness", "neutral", "disgust", "fear", "surprise")


def write_rows(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_npz(path, **corpora):
    """As the release does: every corpus a pickled dict in an array without dimensions."""
    np.savez_compressed(path, **corpora)


def publish(root, key, subtitles=True):
    """A data set as its authors lay it out, with a few clips; returns name -> value."""
    dataset = BY_KEY[key]
    folder = root / dataset.folder
    folder.mkdir(parents=True)
    other = {"train_00": {"emo": 0, "val": 1.0}}
    names = [f"clip_{n}" for n in range(4)]
    match key:
        case "mer2023" | "mer2024":
            truth = dict(zip(names, ["happy", "sad", "worried", "neutral"]))
            labels = {n: {"emo": e, "val": -0.5} for n, e in truth.items()}
            write_npz(folder / "label-6way.npz", train_corpus=other, test1_corpus=labels)
        case "meld":
            names = [f"test_dia{n}_utt{n + 1}" for n in range(4)]
            truth = dict(zip(names, ["joy", "anger", "neutral", "surprise"]))
            labels = {n: {"emo": MELD_EMOTIONS.index(e)} for n, e in truth.items()}
            corpora = {"train_corpus": other, "val_corpus": other, "test_corpus": labels}
            write_npz(folder / "label.npz", **corpora)
        case "iemocap":
            names = [f"Ses05F_impro01_F{n:03d}" for n in range(4)]
            truth = dict(zip(names, ["happy", "sad", "neutral", "anger"]))
            labels = {n: {"emo": number} for number, n in enumerate(names)}
            labels |= {"Ses01F_impro05_F000": {"emo": 3}, "Ses04M_5_F005": {"emo": 1}}
            write_npz(folder / "label_4way.npz", whole_corpus=labels)
        case "ovmerdplus" | "ovmerd":
            truth = dict(zip(names, [["happy", "shy"], ["sad"], ["angry", "loud"], ["calm"]]))
            rows = [(n, f"[{', '.join(v)}]") for n, v in truth.items()]
            write_rows(folder / dataset.labels[0], ["name", "openset"], rows)
        case _:
            truth = dict(zip(names, [0.8, -1.0, 0.0, 0.2]))
            labels = {n: {"emo": 0, "val": np.float32(v)} for n, v in truth.items()}
            corpora = {"train_corpus": other, "val_corpus": other, "test_corpus": labels}
            write_npz(folder / "label.npz", **corpora)
    if subtitles:
        header = ["name", "chinese", "english", "sentence"]
        rows = [(n, f"\u4f60, {n}", f'she said "{n}", twice', f"a sentence, {n}") for n in names]
        rows.append(("train_00", "x", "y", "z"))
        write_rows(folder / dataset.subtitles, header, rows)
    return truth
