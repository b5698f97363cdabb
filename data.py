"""Files of GLUE, VQA, captions -> text-to-text examples, splits, batches, metrics. Numbers and text only: no model, no image.

    python data.py --task rte --data-dir glue                # split sizes and five examples as the model sees them
    python data.py --task rte --data-dir glue --download     # fetch the official files first
    python data.py --task vqa --data-dir vl                  # vl/VQAv2 holds the official files

    splits = make_splits(TASKS["rte"], "glue")                 # {"train": [Example, ...], "validation": ..., "test": ...}
    rows = encode_examples(splits["train"], tokenizer.encode, 128)                  # ids, made once
    score(TASKS["rte"], texts, splits["validation"])           # generated texts -> {"accuracy": 0.71}

A row of a file becomes an Example: `source` text (task name, then the fields), `target` text (a label word), `gold`.
Formats: T5's own (Raffel et al. 2020, appendix D) [X], since public T5 checkpoints have seen them. Splits: see `make_splits`.
Marks: [P] printed in the paper, [D] derived, [X] borrowed from earlier work's code, [R] reconstructed, [C] our choice.
The order of the file: text tasks, their files and splits; batches; metrics; image tasks. Then, under "files", what this and the other
programs use to read, write and fetch any file safely, and the command line: a first reading can stop where that begins.
"""
import argparse
import contextlib
import hashlib
import http.client
import json
import math
import os
import re
import signal
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                               # Windows has none
    fcntl = None

class UserError(Exception):
    """A mistake that the user can mend: one line that names the file, the place, what was found and what was expected."""


# ----------------------------------------------------------------------------------------------------------- tasks

@dataclass
class Task:
    name: str       # the first word of every source text
    folder: str     # of its files, below the data folder
    fields: dict    # name in the source text -> column of the file (its name; its number where there is no header), in T5's (alphabetical) order
    column: object  # the label's column
    labels: dict    # label in the file -> label word, for f1 and matthews the positive class second; empty: a score from 0 to 5
    metrics: tuple  # keys of METRICS below
    rows: tuple = ()           # how many the official train and validation files have; of your own task: not needed
    url: str = ""              # a zip of the files; "": they are not downloaded
    files: dict = field(default_factory=lambda: dict(train="train.tsv", validation="dev.tsv", submission="test.tsv"))
    header: bool = True        # False: columns are counted from 0 (the unlabelled test file has a header even then)
    short_lines: bool = False  # True: the official file has a few rows with too few columns; they are left out


@dataclass
class ImageTask:
    name: str          # chooses the keys of the results file
    folder: str        # below the data folder or its vl/
    files: tuple       # training files by which a folder is recognised; the first one's name, train2014 replaced, is another split's
    prompt: str        # the first part of every source text
    read: object       # (task, folder, scheme) -> {split: [Example]}
    metrics: tuple     # those that choose the best checkpoint
    score: object      # (task, texts, examples) -> {metric: value}, may hold more than these
    max_answer: int    # tokens of the longest answer [C]
    beams: int         # of the search for it [captions: X: VL-T5, VL-Adapter]
    results: str       # name of the file of predictions
    labels: dict = field(default_factory=dict)  # label in the file -> label word
    fields: tuple = ("question",)               # names of the texts after the prompt; `read` knows the columns


@dataclass
class Example:
    parts: list     # the source text in pieces: ["rte sentence1:", <field>, "sentence2:", <field>]
    target: str     # "" where the file has no label
    gold: object    # label as the file writes it, or a float
    index: str      # the file's own row id where it has one, else the row's number from 0
    image: object = None   # (image set, image id), two strings: ("train2014", "9"); its features are found by this pair
    targets: tuple = ()    # right answers, (text, weight): training draws one by weight, `target` is the likeliest; empty: `target` alone

    @property
    def source(self):
        return " ".join(self.parts)


GLUE_URL, SUPERGLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/", "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/"
SENTENCES = dict(sentence1="sentence1", sentence2="sentence2")
words = lambda *labels: dict(zip(labels, labels))  # the file holds the label words themselves

TASKS = {task.name: task for task in (
    Task("cola", "CoLA", dict(sentence=3), column=1, labels={"0": "unacceptable", "1": "acceptable"},
         metrics=("matthews",), rows=(8551, 1043), url=GLUE_URL + "CoLA.zip", header=False),
    Task("sst2", "SST-2", dict(sentence="sentence"), column="label", labels={"0": "negative", "1": "positive"},
         metrics=("accuracy",), rows=(67349, 872), url=GLUE_URL + "SST-2.zip"),
    Task("mrpc", "MRPC", dict(sentence1="#1 String", sentence2="#2 String"), column="Quality",
         labels={"0": "not_equivalent", "1": "equivalent"}, metrics=("accuracy", "f1"), rows=(3668, 408)),
    Task("qqp", "QQP", dict(question1="question1", question2="question2"), column="is_duplicate",
         labels={"0": "not_duplicate", "1": "duplicate"}, metrics=("accuracy", "f1"), rows=(363849, 40430),
         url=GLUE_URL + "QQP-clean.zip", short_lines=True),
    Task("stsb", "STS-B", SENTENCES, column="score", labels={},
         metrics=("pearson", "spearman"), rows=(5749, 1500), url=GLUE_URL + "STS-B.zip"),
    Task("mnli", "MNLI", dict(hypothesis="sentence2", premise="sentence1"), column="gold_label",
         labels=words("entailment", "neutral", "contradiction"), metrics=("accuracy",), rows=(392702, 9815), url=GLUE_URL + "MNLI.zip",
         files=dict(train="train.tsv", validation="dev_matched.tsv", mismatched="dev_mismatched.tsv",
                    submission="test_matched.tsv", submission_mismatched="test_mismatched.tsv")),
    Task("qnli", "QNLI", dict(question="question", sentence="sentence"), column="label", labels=words("entailment", "not_entailment"),
         metrics=("accuracy",), rows=(104743, 5463), url=GLUE_URL + "QNLIv2.zip"),
    Task("rte", "RTE", SENTENCES, column="label", labels=words("entailment", "not_entailment"),
         metrics=("accuracy",), rows=(2490, 277), url=GLUE_URL + "RTE.zip"),
    Task("wnli", "WNLI", SENTENCES, column="label", labels={"0": "not_entailment", "1": "entailment"},
         metrics=("accuracy",), rows=(635, 71), url=GLUE_URL + "WNLI.zip"),
    # The paper's transfer tasks [P; TREC second-hand]. The formats of the first two are T5's [X], of the other three our own [C].
    Task("cb", "CB", dict(hypothesis="hypothesis", premise="premise"), column="label", labels=words("entailment", "contradiction", "neutral"),
         metrics=("accuracy",), rows=(250, 56), url=SUPERGLUE_URL + "CB.zip", files=dict(train="train.jsonl", validation="val.jsonl")),
    Task("boolq", "BoolQ", dict(passage="passage", question="question"), column="label", labels={"false": "False", "true": "True"},
         metrics=("accuracy",), rows=(9427, 3270), url=SUPERGLUE_URL + "BoolQ.zip", files=dict(train="train.jsonl", validation="val.jsonl")),
    Task("imdb", "aclImdb", dict(sentence="text"), column="label", labels={"neg": "negative", "pos": "positive"},
         metrics=("accuracy",), rows=(25000, 25000), files=dict(train="train", validation="test")),
    Task("paws", "PAWS", SENTENCES, column="label", labels={"0": "not_equivalent", "1": "equivalent"},
         metrics=("accuracy",), rows=(49401, 8000), files=dict(train="train.tsv", validation="dev.tsv", test="test.tsv")),
    Task("trec", "TREC", dict(question="question"), column="label",
         labels=dict(ABBR="abbreviation", ENTY="entity", DESC="description", HUM="human", LOC="location", NUM="number"),
         metrics=("accuracy",), rows=(5452, 500), files=dict(train="train_5500.label", validation="TREC_10.label")),
)}
GLUE = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]  # the paper's eight [P]
# MRPC comes from its own source; GLUE's dev set is a list of id pairs drawn from the training file.
MRPC_FILES = {"msr_paraphrase_train.txt": "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt",
              "msr_paraphrase_test.txt": "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_test.txt",
              "mrpc_dev_ids.tsv": GLUE_URL + "mrpc_dev_ids.tsv"}


def source_parts(task, texts):
    """The texts of a task's fields -> the pieces of the source text, for the rows of files and for --ask alike."""
    texts = [text.strip() for text in texts]
    if isinstance(task, ImageTask):
        return [task.prompt, *texts]
    parts = [part for name, text in zip(task.fields, texts) for part in (f"{name}:", text)]
    return [f"{task.name} {parts[0]}", *parts[1:]]


def stsb_target(score):
    """A score from 0 to 5 -> one of T5's 26 strings in steps of 0.2: 3.667 -> "3.6"."""
    return f"{round(score * 5) / 5:.1f}"


def read_text(path):
    """A file as text, without a byte order mark (official MRPC has one). Raises UserError where it is missing or not UTF-8."""
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {raw.count(10, 0, error.start) + 1}: not UTF-8 (byte 0x{raw[error.start]:02x})") from None


def read_rows(path, columns, header=True, short_lines=False):
    """A tab-separated file without quoting -> list of (line number, {column: cell}), with these columns and, where there is one, index.
    Without a header columns are called by their numbers from 0.

    Raises UserError where the file is missing, empty, not UTF-8, lacks a column, or has a line with another number of columns.
    """
    lines = [line.rstrip("\r").split("\t") for line in read_text(path).rstrip("\r\n").split("\n")]
    if len(lines) < 1 + header or lines == [[""]]:
        raise UserError(f"{path}: found no rows, expected {'a header and ' if header else ''}at least one row")
    names = lines[0] if header else list(range(len(lines[0])))
    for column in columns:
        if names.count(column) != 1:
            raise UserError(f"{path}: found columns {', '.join(map(str, names))}; expected one named {column}")
    where = {column: names.index(column) for column in [*columns, "index"] if column in names}
    rows = []
    for number, cells in enumerate(lines[header:], 1 + header):
        if len(cells) == len(names):
            rows.append((number, {column: cells[i] for column, i in where.items()}))
        elif not short_lines or len(cells) > len(names):
            raise UserError(f"{path}: line {number}: found {len(cells)} columns, expected {len(names)}")
    return rows


def read_json_lines(path):
    """A JSON object a line -> list of (line number, object). Raises UserError."""
    rows = [(number, parse_json(line, f"{path}: line {number}")) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if wrong := [number for number, row in rows if type(row) is not dict]:
        raise UserError(f"{path}: line {wrong[0]}: found {str(dict(rows)[wrong[0]])[:40]}, expected a JSON object")
    return rows


def read_superglue(path, columns):
    """SuperGLUE's format, JSON lines -> the same as read_rows; true becomes "true"."""
    rows = read_json_lines(path)
    for number, row in rows:
        check_entry(path, f"line {number}", row, {column: (str, int, bool) for column in columns})
    return [(number, {c: row[c] if type(row[c]) is str else json.dumps(row[c]) for c in columns}) for number, row in rows]


def read_labels(path):
    """TREC's format, Latin-1, "NUM:dist How far is it from Denver to Aspen ?" a line -> the same as read_rows."""
    rows = []
    for number, line in enumerate(path.read_bytes().decode("latin-1").rstrip().split("\n"), 1):
        kind, _, question = line.partition(" ")
        if not question.strip():
            raise UserError(f"{path}: line {number}: found {line[:40]!r}, expected a label and a question")
        rows.append((number, dict(label=kind.partition(":")[0], question=question)))
    return rows


def read_folder(path):
    """IMDB's format, a text a file: path/pos/0_9.txt, path/neg/..., in the order of their names -> the same as read_rows."""
    for label in ("neg", "pos"):
        if not any((path / label).glob("*.txt")):
            raise UserError(f"{path / label}: found no .txt file, expected a text in each")
    files = sorted(file for label in ("neg", "pos") for file in (path / label).glob("*.txt"))
    return [(number, dict(label=file.parent.name, text=read_text(file).replace("\n", " "))) for number, file in enumerate(files, 1)]


def read_examples(task, path, labelled=True):
    """One file of a task -> list of Example. Raises UserError naming the line for a wrong column, label or score."""
    fields, header = list(task.fields.values()), True
    if not task.header and labelled:                              # CoLA: no header, columns are numbers; its unlabelled file
        header = False                                            # has one, with the fields' own names
    elif not task.header:
        fields = list(task.fields)
    columns = [*fields, task.column] if labelled else fields
    if path.is_dir():
        rows = read_folder(path)
    elif path.suffix == ".label":
        rows = read_labels(path)
    elif path.suffix == ".jsonl":
        rows = read_superglue(path, columns)
    else:
        rows = read_rows(path, columns, header, task.short_lines)
    examples = []
    for count, (number, row) in enumerate(rows):
        gold, target = read_label(task, row[task.column], f"{path}: line {number}") if labelled else (None, "")
        examples.append(Example(source_parts(task, [row[field] for field in fields]), target, gold, row.get("index", str(count))))
    return examples


def read_label(task, text, place):
    """A cell of the label's column -> gold, target text. Raises UserError naming the place."""
    if task.labels:
        label = text.strip()
        if label not in task.labels:
            raise UserError(f"{place}: found label {label!r}, expected one of {', '.join(task.labels)}")
        return label, task.labels[label]
    score = parse_number(text)
    if not 0 <= score <= 5:
        raise UserError(f"{place}: found score {text!r}, expected a number from 0 to 5")
    return score, stsb_target(score)


def parse_number(text):
    """str -> float; -1 for what is no finite number, as T5's own evaluation has it."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def find_folder(task, data_dir):
    """-> the folder of a task's files below data_dir; for an image task also data_dir itself, or its vqa/ .... Raises UserError."""
    if isinstance(task, ImageTask):
        folders = [Path(data_dir) / task.folder, Path(data_dir) / "vl" / task.folder]
        folders = [folder for folder in folders if folder.is_dir()]
        folders += [place for place in (Path(data_dir), Path(data_dir) / task.name) for name in task.files if (place / name).exists()]
        if not folders:
            raise UserError(f"{Path(data_dir) / task.folder}: no such folder (nor {Path('vl') / task.folder} below {data_dir}, nor"
                            f" {' or '.join(task.files)} in it); expected the official files of {task.name}")
        return folders[0]
    for folder in (Path(data_dir) / task.folder, Path(data_dir) / "glue" / task.folder):
        if folder.is_dir():
            return folder
    raise UserError(f"{Path(data_dir) / task.folder}: no such folder (nor {Path('glue') / task.folder} below {data_dir}); expected"
                    f" the files of {task.name}{'; --download fetches them' * (task.name == 'mrpc' or bool(task.url))}")


def permutation(count):
    """The seed and the function that HyperFormer's public splits use [X]."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(42)).tolist()


def read_split(task, data_dir, split):
    """One official split of a task -> list of Example; `submission` is the file without labels."""
    folder = find_folder(task, data_dir)
    if split not in task.files:
        raise UserError(f"task {task.name} has no split {split}; it has {', '.join(task.files)}")
    path = folder / task.files[split]
    if task.name != "mrpc" or path.exists():
        if not path.exists():
            raise UserError(f"{path}: no such file, expected the {split} split of {task.name}")
        return read_examples(task, path, labelled=not split.startswith("submission"))
    if split == "submission":                                     # the official source has labels there; they are not used
        return [Example(e.parts, "", None, e.index) for e in read_examples(task, folder / "msr_paraphrase_test.txt")]
    path, ids = folder / "msr_paraphrase_train.txt", folder / "mrpc_dev_ids.tsv"
    examples = read_examples(task, path)
    if ids.exists():
        pairs = {(row[0], row[1]) for _, row in read_rows(ids, [0, 1], header=False)}
        rows = read_rows(path, ["#1 ID", "#2 ID"])
        held_out = {i for i, (_, row) in enumerate(rows) if (row["#1 ID"], row["#2 ID"]) in pairs}
    else:
        held_out = set(permutation(len(examples))[:task.rows[1]])
        if split == "validation":
            print(f"note: {ids} is not there: {task.rows[1]} rows drawn with seed 42 stand in for GLUE's validation set", file=sys.stderr)
    return [e for i, e in enumerate(examples) if (i in held_out) == (split == "validation")]


def make_splits(task, data_dir, scheme="paper"):
    """Task -> {"train": [Example], "validation": ..., "test": ...} (mnli: also "mismatched").

    scheme "paper": fewer than 10,000 training rows: the validation file is halved into validation and test; else 1,000
    training rows become validation (and leave training), the validation file is test [P; which rows: X, see permutation].
    scheme "official": train and validation as the files are; no test, whose labels are not public. paws has a test file with
    labels: its three files serve under both schemes [C].
    Image tasks have their official splits; scheme "paper": vqa and caption have Karpathy's [X] if dataset_coco.json is found.
    """
    if isinstance(task, ImageTask):
        folder = find_folder(task, data_dir)
        splits = {name: examples for name, examples in task.read(task, folder, scheme).items() if examples}
        if "train" not in splits or "validation" not in splits:
            found = ", ".join(f"{len(splits.get(name, ())):,} of {name}" for name in ("train", "validation"))
            raise UserError(f"{folder}: found examples: {found}; expected at least 1 of each")
        return splits
    splits = {name: read_split(task, data_dir, name) for name in task.files if not name.startswith("submission")}
    if len(splits["train"]) < 2 or len(splits["validation"]) < 2:
        raise UserError(f"{find_folder(task, data_dir)}: found {len(splits['train'])} training and {len(splits['validation'])}"
                        " validation rows, expected at least 2 of each")
    if scheme == "official" or "test" in splits:
        return splits
    train, validation = splits["train"], splits["validation"]
    if len(train) < 10_000:
        order, half = permutation(len(validation)), len(validation) // 2
        return {**splits, "validation": [validation[i] for i in order[:half]], "test": [validation[i] for i in order[half:]]}
    order = permutation(len(train))
    return {**splits, "train": [train[i] for i in order[1000:]], "validation": [train[i] for i in order[:1000]], "test": validation}


def draw_rows(examples, count, seed):
    """`count` of the rows, drawn by the seed, in their order; the rows of a smaller count are among those of a larger one."""
    chosen = np.random.default_rng([seed, 2**21]).permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen)]


# --------------------------------------------------------------------------------------------------------- batches

def encode_source(parts, encode, max_length):
    """The parts of a source text -> token ids, eos last. Too long: the longest field is cut, one token at a time."""
    ids = encode(" ".join(parts))
    if len(ids) <= max_length:
        return ids
    pieces = [encode(part)[:-1] for part in parts]
    for _ in range(sum(map(len, pieces)) + 1 - max_length):
        longest = max(pieces[1::2], key=len, default=[])          # odd parts are fields, even ones their names
        if longest:
            longest.pop()
    return sum(pieces, []) + ids[-1:]


@dataclass(slots=True)
class Row:
    """An example in ids, made once."""
    source: object       # int32 array
    targets: list        # its right answers, int32 arrays
    cumulative: object   # array: probability of the first answer, of the first two, ..., of all: 1
    image: object = None  # (array [images, N, V], row in it), of an image task

    def draw_target(self, uniform):
        """A random number in [0, 1) -> the answer drawn by it [X: VL-T5]."""
        return self.targets[int(np.searchsorted(self.cumulative, uniform, side="right"))]


MAX_TARGET_LENGTH = 128  # tokens [X: HyperFormer]


def encode_examples(examples, encode, max_source_length):
    """Examples -> list of Row; `encode(text)` gives ids that end with eos."""
    @lru_cache(maxsize=None)                                      # equal texts share their arrays
    def target_ids(text):
        ids = encode(text)
        return np.array(ids[:MAX_TARGET_LENGTH - 1] + ids[-1:] if len(ids) > MAX_TARGET_LENGTH else ids, np.int32)

    @lru_cache(maxsize=None)
    def cumulative(weights):
        sums = np.cumsum(weights)
        return sums / sums[-1]

    rows = []
    for example in examples:
        source = np.array(encode_source(example.parts, encode, max_source_length), np.int32)
        targets = example.targets or ((example.target, 1.0),)
        rows.append(Row(source, [target_ids(text) for text, _ in targets], cumulative(tuple(weight for _, weight in targets))))
    return rows


def plan_epoch(lengths, batch_size, seed, pool=16):
    """lengths [rows] -> list of arrays of row numbers: every row once, rows of like length together, order by the seed.

    Rows are shuffled, cut into pools of `pool` batches, sorted by length within a pool; then the batches are shuffled.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    size, batches = pool * batch_size, []
    for start in range(0, len(order), size):
        rows = order[start:start + size]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def pad(rows, value):
    """List of id arrays -> int64 array [B, longest], padded on the right with `value`.

    From 64 on lengths are multiples of 8: a CPU's library keeps programs of its own for every shape that it has met.
    """
    longest = max(map(len, rows))
    out = np.full((len(rows), longest if longest < 64 else -(-longest // 8) * 8), value, np.int64)
    for line, ids in zip(out, rows):
        line[:len(ids)] = ids
    return out


# --------------------------------------------------------------------------------------------------------- metrics
# predicted and gold: arrays [rows]; classes are numbers from 0, 1 is the positive one; -1 is an answer that is no label.

def accuracy(predicted, gold):
    return float(np.mean(predicted == gold))


def confusion(predicted, gold):
    predicted = np.where(predicted < 0, 1 - gold, predicted)      # no label at all counts as the wrong one
    return [int(np.sum((predicted == p) & (gold == g))) for p, g in ((1, 1), (1, 0), (0, 1), (0, 0))]


def f1(predicted, gold):
    tp, fp, fn, _ = confusion(predicted, gold)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def matthews(predicted, gold):
    tp, fp, fn, tn = confusion(predicted, gold)
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / scale if scale else 0.0


def pearson(predicted, gold):
    a, b = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (predicted, gold))
    if np.ptp(predicted) == 0 or np.ptp(gold) == 0:               # constant: defined as 0, not NaN
        return 0.0
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def ranks(x):
    """Numbers -> their ranks from 1 on; ties share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(predicted, gold):
    return pearson(ranks(predicted), ranks(gold))


METRICS = dict(accuracy=accuracy, f1=f1, matthews=matthews, pearson=pearson, spearman=spearman)


def parse_answers(task, texts):
    """Generated texts -> array [rows] of class numbers (-1: no label word) or, for a score, of floats."""
    if not task.labels:
        return np.array([parse_number(text) for text in texts])
    order = list(task.labels.values())
    return np.array([order.index(text.strip()) if text.strip() in order else -1 for text in texts])


def score(task, texts, examples):
    """Generated texts against the gold of their examples -> {metric: value}."""
    if isinstance(task, ImageTask):
        return task.score(task, texts, examples)
    gold = np.array([e.gold if not task.labels else list(task.labels).index(e.gold) for e in examples])
    return {metric: METRICS[metric](parse_answers(task, texts), gold) for metric in task.metrics}


def majority(task, training, examples):
    """What the most frequent training answer would score if it were the only one -> {metric: value}."""
    constant = Counter(e.target for e in training).most_common(1)[0][0]
    return score(task, [constant] * len(examples), examples)


def rightness(task, text, example):
    """How right one answer is, 0 to 1; None where answers are not right or wrong: scores and captions."""
    if isinstance(task, ImageTask):
        return task.score(task, [text], [example]).get("accuracy")
    return float(text.strip() == example.target) if task.labels else None


def write_submission(path, task, texts, examples):
    """A GLUE submission file: index <tab> prediction, labels as the files write them -> number of answers that were no label.

    Those are written as the first label, since the server takes nothing else.
    """
    answers = parse_answers(task, texts)
    order = list(task.labels)
    rows = [f"{e.index}\t{order[max(a, 0)] if order else f'{min(max(a, 0), 5):.3f}'}\n" for e, a in zip(examples, answers)]
    write_whole(path, "".join(["index\tprediction\n", *rows]).encode())
    return int(np.sum(answers < 0))


# ----------------------------------------------------------------------------------------------- vision and language
ID, TEXT, LIST = (int, str), (str,), (list,)
KINDS = {int: "a whole number", str: "a string", list: "a list", bool: "true or false"}
KARPATHY = dict(train="train", restval="train", val="validation", test="test")  # restval: the part of val2014 that trains


def named(names):
    """The first five of some names, each once, as text."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def check_entry(path, place, entry, kinds):
    """Raises UserError unless `entry` is a JSON object that holds every key of `kinds`, of one of the types named there."""
    for key, kind in kinds.items():
        if type(entry) is not dict or type(entry.get(key)) not in kind:
            found = f"{key} {str(entry[key])[:40]!r}" if type(entry) is dict and key in entry else f"no {key} in {str(entry)[:60]}"
            raise UserError(f"{path}: {place}: found {found}, expected {key} as {' or '.join(KINDS[k] for k in kind)}")


def read_entries(path, file, part, key, **kinds):
    """A list of objects in a JSON file, read from path -> {str(object[key]): object}, in the file's order.

    Raises UserError where there is no such list, naming the entry (from 0) that lacks a key, holds
    another type there than `kinds` has, or repeats another one's `key`.
    """
    rows, found, kinds = file.get(part), {}, {key: ID, **kinds}
    if type(rows) is not list:
        raise UserError(f"{path}: {part} holds {str(rows)[:40]}, expected a list")
    for number, row in enumerate(rows):
        check_entry(path, f"{part}[{number}]", row, kinds)
        if found.setdefault(str(row[key]), row) is not row:
            raise UserError(f"{path}: {part}[{number}]: found {key} {row[key]} a second time, expected it once")
    return found


def find_karpathy(task, folder):
    """-> path of dataset_coco.json: in the task's folder, in the data folder's COCO or vl/COCO, or the data folder; or None."""
    root = folder.parent if folder.name == task.folder else folder
    root = root.parent if root.name == "vl" else root
    paths = [place / "dataset_coco.json" for place in (folder, root / "COCO", root / "vl" / "COCO", root, root / "vl")]
    return next((path for path in paths if path.exists()), None)


def read_karpathy(path, **kinds):
    """dataset_coco.json -> {str(cocoid): object}, "split" being one of ours. Raises UserError."""
    images = read_entries(path, read_json(path), "images", "cocoid", split=TEXT, **kinds)
    for key, image in images.items():
        if image["split"] not in KARPATHY:
            raise UserError(f"{path}: cocoid {key}: found split {image['split']!r}, expected one of {', '.join(KARPATHY)}")
        image["split"] = KARPATHY[image["split"]]
    return images


def leave_one_out(n, k):
    """VQA accuracy of an answer that n of k annotators gave: min(1, matches / 3) among the others, averaged over who is left
    out; of ten, 0, 1, 2, 3, 4: 0, .3, .6, .9, 1. An only annotator is not left out [C]: officially nothing would be right."""
    return (n * min(1, (n - 1) / 3) + (k - n) * min(1, n / 3)) / k if k > 1 else float(n)


def read_questions(task, folder, subset, labelled=True):
    """VQAv2's question and annotation file of train2014, val2014, test2015, ... -> list of Example.

    gold: {"answers": [the annotators' answers as they are], "kind": answer type}; index: question id. targets: every
    distinct answer weighted by its accuracy. Raises UserError, also where the two files do not hold the same questions.
    """
    path = folder / task.files[0].replace("train2014", subset)
    file = read_json(path)
    questions, image_set = read_entries(path, file, "questions", "question_id", image_id=ID, question=TEXT), file.get("data_subtype")
    if image_set != subset:
        raise UserError(f"{path}: found data_subtype {image_set!r}, expected {subset}")
    image_set = subset.replace("test-dev", "test")                 # test-dev asks about a part of test2015's images
    answers = {}
    if labelled:
        other = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
        answers = read_entries(other, read_json(other), "annotations", "question_id", answers=LIST, answer_type=TEXT)
        for one, two, what in ((questions, answers, f"questions of {path.name} have no annotation"),
                               (answers, questions, f"annotations have no question in {path.name}")):
            if absent := [key for key in one if key not in two]:
                raise UserError(f"{other}: {len(absent)} of {len(one)} {what}: {named(absent)}")
    examples = []
    for key, question in questions.items():
        target, targets, gold = "", (), None
        if labelled:
            try:
                given = [sys.intern(answer["answer"]) for answer in answers[key]["answers"]]  # a few strings, many times
            except (TypeError, KeyError):
                given = []
            if not given:
                raise UserError(f"{other}: question_id {key}: found answers {str(answers[key]['answers'])[:40]}, expected a list of"
                                ' at least one {"answer": "..."}')
            stripped = [answer.strip() for answer in given]
            targets = tuple((a, leave_one_out(stripped.count(a), len(given))) for a in dict.fromkeys(stripped) if a)
            target = max(targets, key=lambda pair: pair[1])[0] if targets else ""
            gold = dict(answers=given, kind=answers[key]["answer_type"])
        image = (image_set, str(question["image_id"]))
        examples.append(Example(source_parts(task, [question["question"]]), target, gold, key, image, targets))
    return examples


def read_vqa(task, folder, scheme):
    """VQAv2 or OK-VQA -> {split: [Example]}: train2014 and val2014, or for VQAv2 with scheme "paper" Karpathy's splits."""
    splits = dict(train=read_questions(task, folder, "train2014"), validation=read_questions(task, folder, "val2014"))
    if task.name != "vqa" or scheme == "official":
        return splits
    path = find_karpathy(task, folder)
    if not path:
        print(f"note: {folder}: no dataset_coco.json there or in COCO: the official splits stand in for Karpathy's", file=sys.stderr)
        return splits
    images, examples = read_karpathy(path), splits["train"] + splits["validation"]
    if absent := [e.image[1] for e in examples if e.image[1] not in images]:
        raise UserError(f"{path}: {len(absent)} of {len(examples)} questions of {folder} ask about an image that is not there:"
                        f" {named(absent)}")
    return {split: [e for e in examples if images[e.image[1]]["split"] == split] for split in ("train", "validation", "test")}


def split_files(folder, pattern, *names):
    """-> pairs of a split and its file; the test split only where its file is there."""
    paths = [folder / pattern.format(name) for name in names]
    return [(split, path) for split, path in zip(("train", "validation", "test"), paths) if split != "test" or path.exists()]


def read_gqa(task, folder, scheme):
    """GQA's balanced questions -> {split: [Example]}; test is testdev, where it is there. gold: the answer."""
    splits = {}
    for split, path in split_files(folder, "{}_balanced_questions.json", "train", "val", "testdev"):
        splits[split] = []
        for key, row in read_json(path).items():
            check_entry(path, f"question {key}", row, dict(question=TEXT, imageId=ID, answer=TEXT))
            parts = source_parts(task, [row["question"]])
            splits[split].append(Example(parts, row["answer"].strip(), row["answer"], key, ("gqa", str(row["imageId"]))))
    return splits


def read_captions(task, folder, scheme):
    """COCO captions -> {split: [Example]}, an Example an image: Karpathy's splits where dataset_coco.json is, unless the
    scheme is official and captions_{train,val}2014.json are there too. gold: all captions; targets: each with weight 1."""
    path, splits, rows = find_karpathy(task, folder), {}, []
    if path and (scheme != "official" or not (folder / task.files[0]).exists()):
        for key, image in read_karpathy(path, filepath=TEXT, sentences=LIST).items():
            for number, sentence in enumerate(image["sentences"]):
                check_entry(path, f"cocoid {key}: sentences[{number}]", sentence, dict(raw=TEXT))
            rows.append((path, image["split"], image["filepath"], key, [sentence["raw"] for sentence in image["sentences"]]))
    else:
        for split, subset in (("train", "train2014"), ("validation", "val2014")):
            path = folder / task.files[0].replace("train2014", subset)
            file = read_json(path)
            captions = {key: [] for key in read_entries(path, file, "images", "id")}
            for key, row in read_entries(path, file, "annotations", "id", image_id=ID, caption=TEXT).items():
                if str(row["image_id"]) not in captions:
                    raise UserError(f"{path}: annotation {key}: found image_id {row['image_id']}, which is none of the file's images")
                captions[str(row["image_id"])].append(row["caption"])
            rows += [(path, split, subset, key, texts) for key, texts in captions.items()]
    for path, split, image_set, key, texts in rows:
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise UserError(f"{path}: image {key}: found no captions, expected at least one")
        targets = tuple((text, 1.0) for text in texts)
        splits.setdefault(split, []).append(Example(source_parts(task, []), texts[0], texts, key, (image_set, key), targets))
    return splits


def read_snlive(task, folder, scheme):
    """SNLI-VE, a JSON object a line -> {split: [Example]}, without the rows on whose label the annotators disagree ("-")."""
    splits = {}
    for split, path in split_files(folder, "snli_ve_{}.jsonl", "train", "dev", "test"):
        if not path.exists():
            raise UserError(f"{path}: no such file, expected the {split} split of {task.name}")
        splits[split] = []
        for number, row in read_json_lines(path):
            names = ("Flickr30K_ID", "Flickr30kID", "Flikr30kID")  # the last is what the official generator writes
            image = next((name for name in names if name in row), names[0])
            check_entry(path, f"line {number}", row, {"gold_label": TEXT, "sentence2": TEXT, image: ID})
            gold = row["gold_label"]
            if gold != "-" and gold not in task.labels:
                raise UserError(f"{path}: line {number}: found label {gold!r}, expected one of {', '.join(task.labels)}")
            if gold != "-":
                splits[split].append(Example(source_parts(task, [row["sentence2"]]), task.labels[gold], gold,
                                             str(row.get("pairID", number)), ("flickr30k", str(row[image]).removesuffix(".jpg"))))
    return splits


def read_unlabelled(task, data_dir):
    """The test questions whose answers only the server has -> list of Example: VQAv2's test2015, else test-dev2015.
    Raises UserError for the other tasks, which have none."""
    if not isinstance(task, ImageTask) or task.name != "vqa":
        raise UserError(f"task {task.name} has no test questions without answers; of the image tasks only vqa has")
    folder = find_folder(task, data_dir)
    whole = (folder / task.files[0].replace("train2014", "test2015")).exists()
    part = (folder / task.files[0].replace("train2014", "test-dev2015")).exists()
    return read_questions(task, folder, "test-dev2015" if part and not whole else "test2015", labelled=False)


# The normalisation of the official VQA evaluator (GT-Vision-Lab/VQA, vqaEval.py), with all its quirks. Its table of contractions
# maps a word that lacks one of its apostrophes to the word; one entry is the wrong way round, and stays so.
NUMBERS = {word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
    how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
    """.split() for i, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}


@lru_cache(1 << 18)
def normalise_answer(text):
    """Officially: marks are dropped where one stands beside a space, or anywhere if a comma stands between digits, else they
    become spaces; periods go unless a digit follows (the look-behind in the official pattern never matches, and its flag
    is taken as a count of 32); then lower case, number words, no articles, apostrophes."""
    out, comma = text, re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        if mark in text:
            out = out.replace(mark, "" if comma or f"{mark} " in text or f" {mark}" in text else " ")
    out = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out, count=32).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in out if word not in ("a", "an", "the"))


def vqa_accuracy(text, answers):
    """The official accuracy of one answer, 0 to 1. Both sides are normalised only where the annotators' answers differ."""
    text, *answers = (one.replace("\n", " ").replace("\t", " ").strip() for one in (text, *answers))
    if len(set(answers)) > 1:
        text, *answers = map(normalise_answer, (text, *answers))
    return leave_one_out(answers.count(text), len(answers))


def score_vqa(task, texts, examples):
    """-> {"accuracy": mean over the questions, "yes/no": ..., "number": ..., "other": ...}, kinds without questions left out."""
    values = np.array([vqa_accuracy(text, e.gold["answers"]) for text, e in zip(texts, examples)])
    kinds = np.array([e.gold["kind"] for e in examples])
    known = [kind for kind in ("yes/no", "number", "other") if kind in kinds]
    return {"accuracy": float(values.mean())} | {kind: float(values[kinds == kind].mean()) for kind in known}


def score_exact(task, texts, examples):
    """-> {"accuracy": share of the texts that are the gold answer, upper and lower case alike}."""
    return {"accuracy": float(np.mean([text.strip().lower() == e.gold.strip().lower() for text, e in zip(texts, examples)]))}


def tokenize_caption(text):
    """Caption -> list of words, lower case, without punctuation. Ours [C]: what the official Java tokenizer (PTB) gives in the
    plain cases: don't -> do n't, dog's -> dog 's, t-shirt, and/or, a.m. and 10:30 stay whole; rarer things (mr., brackets) differ."""
    text = re.sub(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m)|(?<=\bcan)not)\b", r" \1", text.lower().replace("\u2019", "'"))
    return re.findall(r"(?<!\S)(?:n't|'(?:s|re|ve|ll|d|m))\b|o'clock|\b(?:[a-z]\.){2,}|\d+(?:[.,:]\d+)+|@?\w+(?:[-/&]\w+)*|[$%&#@*=+]", text)


def ngrams(words):
    """-> Counter of all 1- to 4-grams."""
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def cider(hypotheses, references):
    """CIDEr-D, 0 to 10: lists of words [images], lists of lists of words [images][references] -> float, as pycocoevalcap's.

    Cosine of tf-idf vectors of n-grams, n = 1 to 4, the hypothesis' entries cut to the reference's, times a penalty on
    different lengths, sigma 6; idf over these very references, so that a single image scores 0.
    """
    references = [[(ngrams(words), len(words)) for words in image] for image in references]
    frequency = Counter(gram for image in references for gram in set().union(*(grams for grams, _ in image)))
    idf = lambda gram: math.log(len(references)) - math.log(max(1, frequency[gram]))

    def vectors(grams):
        parts = [{}, {}, {}, {}]
        for gram, count in grams.items():
            parts[len(gram) - 1][gram] = count * idf(gram)
        return [(part, math.sqrt(sum(value * value for value in part.values()))) for part in parts]

    total = 0.0
    for words, image in zip(hypotheses, references):
        mine = vectors(ngrams(words))
        for grams, length in image:
            penalty = math.exp(-(len(words) - length) ** 2 / (2 * 6.0 ** 2))
            for (a, norm_a), (b, norm_b) in zip(mine, vectors(grams)):
                if norm_a and norm_b:
                    dot = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
                    total += 10 / 4 * penalty * dot / (norm_a * norm_b) / len(image)
    return total / len(references)


def bleu4(hypotheses, references):
    """Corpus BLEU-4, 0 to 1, same arguments: the length penalty takes for each image the reference closest in length."""
    guessed, correct, length, closest = np.zeros(4), np.zeros(4), 0, 0
    for words, image in zip(hypotheses, references):
        most = Counter()
        for reference in image:
            most |= ngrams(reference)                             # the largest count in any one reference
        length, closest = length + len(words), closest + min((abs(len(r) - len(words)), len(r)) for r in image)[1]
        for gram, count in ngrams(words).items():
            guessed[len(gram) - 1] += count
            correct[len(gram) - 1] += min(count, most[gram])
    precision = (correct + 1e-15) / (guessed + 1e-9)              # pycocoevalcap's way around a division by zero
    return float(precision.prod() ** 0.25 * math.exp(min(0, 1 - (closest + 1e-9) / (length + 1e-15))))


def score_captions(task, texts, examples):
    """-> {"cider": 0 to 10 (papers print it times 100, so 1.2 as 120), "bleu4": 0 to 1}."""
    hypotheses = [tokenize_caption(text) for text in texts]
    references = [[tokenize_caption(text) for text in e.gold] for e in examples]
    return {"cider": cider(hypotheses, references), "bleu4": bleu4(hypotheses, references)}


def write_results(path, task, texts, examples):
    """Predictions as the official evaluators read them: VQAv2, OK-VQA and COCO a list of objects with a number as id, GQA with
    its id as text; SNLI-VE, which has no such format, as a line {"pairID", "gold_label"} for each example."""
    key, value = dict(vqa=("question_id", "answer"), okvqa=("question_id", "answer"), caption=("image_id", "caption"),
                      gqa=("questionId", "prediction"), snlive=("pairID", "gold_label"))[task.name]
    number = lambda index: int(index) if key in ("question_id", "image_id") and re.fullmatch("0|[1-9][0-9]*", index) else index
    rows = [{key: number(e.index), value: text} for text, e in zip(texts, examples)]
    write_whole(path, ("".join(json.dumps(row) + "\n" for row in rows) if task.name == "snlive" else json.dumps(rows)).encode())


IMAGE_TASKS = {task.name: task for task in (  # vqa:, gqa:, caption: are VL-T5's prompts [X], the other two are like them [C]
    ImageTask("vqa", "VQAv2", ("v2_OpenEnded_mscoco_train2014_questions.json",), "vqa:", read_vqa,
              metrics=("accuracy",), score=score_vqa, max_answer=10, beams=1, results="VQAv2.json"),
    ImageTask("gqa", "GQA", ("train_balanced_questions.json",), "gqa:", read_gqa,
              metrics=("accuracy",), score=score_exact, max_answer=10, beams=1, results="GQA.json"),
    ImageTask("okvqa", "OKVQA", ("OpenEnded_mscoco_train2014_questions.json",), "okvqa:", read_vqa,
              metrics=("accuracy",), score=score_vqa, max_answer=10, beams=1, results="OKVQA.json"),
    ImageTask("caption", "COCO", ("captions_train2014.json", "dataset_coco.json"), "caption:", read_captions,
              metrics=("cider",), score=score_captions, max_answer=40, beams=5, results="COCO.json", fields=()),
    ImageTask("snlive", "SNLI-VE", ("snli_ve_train.jsonl",), "snlive hypothesis:", read_snlive,
              metrics=("accuracy",), score=score_exact, max_answer=8, beams=1, results="SNLI-VE.jsonl",
              labels=words("entailment", "neutral", "contradiction"), fields=("hypothesis",)),
)}
VL = ["vqa", "gqa", "caption"]  # trained together [R; gqa P]


# ----------------------------------------------------------------------------------------------------------- files

def write_whole(path, content):
    """Bytes -> file, written aside and renamed, so that a reader finds the old file or the new one and never a half.

    Raises UserError where the disk is full, the folder is read-only, ...: the old file stays.
    """
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"{path}: cannot be written: {error.strerror}; {'its last version stays' if Path(path).exists() else 'nothing was written'}") from None


def parse_json(content, place):
    """JSON -> value. Raises UserError; `place` is the file, or a line of it."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None


def read_json(path, *parts):
    """JSON file -> dict. Raises UserError where it is missing, no JSON object, or one of its named parts is no object."""
    try:
        found = parse_json(Path(path).read_bytes(), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    for name, part in (("the file", found), *((name, isinstance(found, dict) and found.get(name)) for name in parts)):
        if not isinstance(part, dict):
            raise UserError(f"{path}: {name} holds {str(part)[:40]}, expected a JSON object")
    return found


PUBLIC_TYPES = {torch.float32, torch.float16, torch.bfloat16}


def read_safetensors(path, what):
    """A safetensors file -> {name: tensor}, which stay in the file until they are used, its metadata {key: text}. Raises UserError where
    it is missing or damaged; it should have been `what`."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file, expected {what}")
    open(path, "rb").close()                                      # without the right to read it: the system's own message
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def read_tensors(paths, wanted, what, optional=(), passed_by=lambda name: False):
    """safetensors files that are one whole -> {name: tensor}, the (last) file's metadata {key: text}.

    wanted: {name: a tensor of the shape and type that it must have; float32, float16 and bfloat16 may stand for one another}. All of
    them must be there but the `optional` ones; a tensor that is not wanted must be `passed_by`. Raises UserError as read_safetensors
    does, and for every missing, unknown or misshapen tensor.
    """
    tensors = {}
    for path in paths:
        found, metadata = read_safetensors(path, what)
        # Of two names for one tensor transformers stores one; the metadata holds {the other: the stored one}.
        found |= {other: found[name] for other, name in metadata.items() if name in found and other in wanted and other not in found}
        for name, tensor in found.items():
            if name in wanted:
                expected = wanted[name]
                if tensor.shape != expected.shape:
                    raise UserError(f"{path}: tensor {name} has shape {list(tensor.shape)}, expected {list(expected.shape)}")
                if tensor.dtype != expected.dtype and not {tensor.dtype, expected.dtype} <= PUBLIC_TYPES:
                    raise UserError(f"{path}: tensor {name} has type {tensor.dtype}, expected {expected.dtype}")
                if not tensor.isfinite().all():
                    raise UserError(f"{path}: tensor {name} holds numbers that are not finite")
                tensors[name] = tensor
            elif not passed_by(name):
                raise UserError(f"{path}: tensor {name} is unknown, expected {what}")
    for name in sorted(wanted.keys() - tensors.keys() - set(optional)):
        raise UserError(f"{paths[0] if len(paths) == 1 else Path(paths[0]).parent}: tensor {name} is missing, expected {what}")
    return tensors, metadata


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects within the first host and to the hub's own storage, never from https to http. Keeps the size and
    the hash that the hub announces in its redirecting answer."""
    announced = {}

    def redirect_request(self, request, file, code, message, headers, url):
        old, new = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(url)
        known = new.netloc == old.netloc or re.search(r"(^|\.)(huggingface\.co|hf\.co)$", new.hostname or "")
        if not known or new.scheme not in ("https", old.scheme):
            raise UserError(f"{request.full_url}: redirected to {new.scheme}://{new.netloc}, which is not trusted")
        self.announced = {**self.announced, **{k.lower(): v for k, v in headers.items()}}
        return super().redirect_request(request, file, code, message, headers, url)


def download(url, path, optional=False, tries=5, check=lambda part: None):
    """Fetch url into path -> True (False: `optional`, and the server has no such file).

    Goes to path.part first, is resumed after an interruption, held against the announced size and hash and against `check`, which raises
    UserError for what is no such file (the login page of a network, say), and renamed when whole. Raises UserError in one line after
    `tries` failures.
    """
    path, part = Path(path), Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(tries):
        try:
            headers, size = receive(url, part)
        except urllib.error.HTTPError as error:
            if error.code in (401, 404) and optional:             # the hub answers 401 for a repository that does not exist
                return False
            if error.code == 416:                                 # what lies there is longer than the file: begin again
                part.unlink(missing_ok=True)
            problem, final = f"the server answers {error.code} {error.reason}", 400 <= error.code < 500 and error.code not in (408, 416, 429)
        except (OSError, ValueError, http.client.HTTPException) as error:
            problem, final = str(getattr(error, "reason", error)), isinstance(error, (ValueError, http.client.InvalidURL))
        else:
            problem, final = find_fault(part, headers, size), False
            if not problem:
                try:
                    check(part)
                    os.replace(part, path)
                    return True
                except UserError as error:
                    problem = str(error)
            part.unlink()
        if final:
            break
        if attempt < tries - 1:
            time.sleep(2 ** attempt)
    raise UserError(f"{url}: {problem}; try again later, or fetch it by hand and put it at {path}")


def receive(url, part):
    """Append to a file what is missing of it -> the server's headers, the whole file's size (None: not announced). Raises OSError for an
    answer that is broken off, or another than was asked for."""
    have = part.stat().st_size if part.exists() else 0
    redirects = Redirects()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "hyperpelt"})
    with urllib.request.build_opener(redirects).open(request, timeout=30) as answer:
        headers = {**{k.lower(): v for k, v in answer.headers.items()}, **redirects.announced}
        if answer.status not in (200, 206) or headers.get("content-encoding", "identity") != "identity":
            raise OSError(f"the server answers {answer.status}, in the encoding {headers.get('content-encoding', 'identity')}")
        if answer.status == 200:                                  # the whole file, from its beginning
            have = 0
        elif not headers.get("content-range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise OSError(f"the server sends {headers.get('content-range')}, asked for was all from byte {have} on")
        length = answer.headers.get("Content-Length")
        size = int(headers.get("x-linked-size") or (have + int(length) if length else 0)) or None
        with open(part, "r+b" if have else "wb") as file, tqdm(
                total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar:
            file.seek(have)
            while block := answer.read1(1 << 20):                 # what is there, not a whole MB: a slow line loses nothing
                file.write(block)
                bar.update(len(block))
                if size and file.tell() > size:
                    raise OSError(f"the server sends more than the {size} bytes that it announced")
    if size and part.stat().st_size < size:
        raise OSError(f"broken off at byte {part.stat().st_size} of {size}")
    return headers, size


def find_fault(path, headers, size):
    """Compare a downloaded file with the announced size and hash (X-Linked-Etag: a sha256, or a git blob's sha1) -> None, or what is wrong."""
    announced = (headers.get("x-linked-etag") or headers.get("etag") or "").removeprefix("W/").strip('"').lower()
    content = hashlib.sha256() if len(announced) == 64 else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    if size is not None and path.stat().st_size != size:
        return f"found {path.stat().st_size} bytes, expected {size}"
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", announced):
        return None                                               # a server that announces no hash
    found = digest(path, content)
    return None if found == announced else f"found hash {found}, expected {announced}"


def digest(path, content=None):
    """A file's hash as hexadecimal digits: sha256, or what a hash object comes to that is fed with it."""
    content = content or hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


MOST_UNPACKED, MOST_RATIO = 2 * 10**9, 100     # bytes of a zip's contents; of one to those that it takes in the zip: GLUE's have 4


def unpack(archive, folder, names):
    """Put those of a zip's files FOLDER/NAME that have these names into `folder`, whose name is FOLDER. Refuses a zip with a path that
    leaves it, a link, or contents that blow up. Writes nothing unless all of it is whole."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            for member in members:
                path = Path(member.filename)
                if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
                    raise UserError(f"{archive}: refused: {member.filename} leads out of the folder")
                if member.file_size > MOST_RATIO * max(member.compress_size, 1000):
                    raise UserError(f"{archive}: refused: {member.filename} has {member.compress_size} bytes, {member.file_size} when unpacked")
            if sum(member.file_size for member in members) > MOST_UNPACKED:
                raise UserError(f"{archive}: refused: more than {MOST_UNPACKED / 1e9:.0f} GB when unpacked")
            there = {f"{folder.name}/{name}": name for name in names}
            contents = {there[path]: file.read(path) for path in file.namelist() if path in there}       # the CRCs are checked here
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(f"{archive}: not a whole zip file ({error})") from None
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(folder / name, content)


def download_task(task, data_dir):
    """Fetch those official files of a task that are not there yet into data_dir/FOLDER, and count their rows."""
    with contextlib.suppress(UserError):
        folder = find_folder(task, data_dir)
        if isinstance(task, ImageTask) or all((folder / name).exists() for name in task.files.values()):
            return
        if task.name == "mrpc" and all((folder / name).exists() for name in MRPC_FILES):
            return
    folder = Path(data_dir) / task.folder
    if task.name == "mrpc":
        for name, url in MRPC_FILES.items():
            (folder / name).exists() or download(url, folder / name)
    elif isinstance(task, Task) and task.url:
        archive = Path(data_dir) / f".{Path(task.url).name}"
        download(task.url, archive)
        try:
            unpack(archive, folder, [name for name in task.files.values() if not (folder / name).exists()])
        finally:
            archive.unlink()                                      # also a broken one: the next try fetches it again
    else:
        raise UserError(f"the files of {task.name} are not downloaded: put the official ones into {folder}")
    found = [len(read_split(task, data_dir, split)) for split in ("train", "validation")]
    print(f"{folder}: {found[0]} training and {found[1]} validation rows (official: {task.rows[0]} and {task.rows[1]})")
    if any(count < 0.999 * official for count, official in zip(found, task.rows)):           # of QQP there are copies with 3 fewer
        raise UserError(f"{folder}: found {found[0]} and {found[1]} rows, expected {task.rows[0]} and {task.rows[1]}; remove it to fetch it again")


def find_task(name):
    """Name -> Task or ImageTask. Raises UserError."""
    tasks = {**TASKS, **IMAGE_TASKS}
    if name not in tasks:
        raise UserError(f"task {name!r} is unknown; the known ones are {', '.join(tasks)}")
    return tasks[name]


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is a user's mistake like any other: one line."""

    def error(self, message):
        raise UserError(f"{message}; see --help")

    def parse_args(self, *arguments):
        for text in sys.argv:
            if text != text.encode(errors="replace").decode():
                raise UserError(f"{text!r}: not UTF-8, expected text that can be written to a file")
        return super().parse_args(*arguments)


def in_range(kind, low, high=10**9):
    """-> a converter for argparse: text -> a number of this kind from low to high, and so no nan."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"found {text}, expected {kind.__name__} from {low} to {high}")
    return convert


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", required=True, help=f"one of {', '.join([*TASKS, *IMAGE_TASKS])}")
    parser.add_argument("--data-dir", required=True, help="folder with RTE/train.tsv or glue/RTE/train.tsv, VQAv2/ or vl/VQAv2/, ...")
    parser.add_argument("--split", default="paper", choices=["paper", "official"], help="which splits (default: paper)")
    parser.add_argument("--download", action="store_true", help="fetch the official files if they are not there")
    args = parser.parse_args()
    task = find_task(args.task)
    if args.download:
        download_task(task, args.data_dir)
    splits = make_splits(task, args.data_dir, args.split)
    print(", ".join(f"{name} {len(rows):,}" for name, rows in splits.items()))
    for example in splits["train"][:5]:
        image = f"[{'/'.join(example.image)}] " if example.image else ""
        print(f"\n{image}{example.source}\n  -> {example.target}")


def catch_signals():
    """-> a list that SIGINT and SIGTERM go to, for a loop to look at; the second one stops at once."""
    stop = []

    def on_signal(number, frame):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):                  # Windows has no SIGHUP; nohup has it ignored
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), on_signal)
    return stop


def lock(path, descriptor=None):
    """Keep other processes off a file or folder, by its descriptor if it is open -> the descriptor (None on Windows, which has no such
    locks): until that is closed, or this process ends, however it does. Raises UserError where another one is at work on it."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process is at work on it") from None
    except OSError:                                               # a file system without locks
        pass
    return descriptor


OUT_OF_MEMORY = "error: memory is used up; a smaller --batch-size, --max-source-length or --prefix-length needs less"


def leave(message, code):
    print(message, file=sys.stderr)
    sys.exit(code)


def run(main):
    """Call a program's main; a user's mistake or a failing disk ends in one line on stderr and exit code 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:                                        # closed by whoever started the program
            setattr(sys, name, open(os.devnull, "w"))
        else:
            stream.reconfigure(errors="backslashreplace")         # a letter that the terminal does not know is no error
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                                       # the reader of a pipe, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave("stopped: nobody reads the output", 128 + 13)
    except (UserError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        leave(f"error: {' '.join(text.split())[:2000]}", 2)
    except (torch.OutOfMemoryError, MemoryError):
        leave(OUT_OF_MEMORY, 2)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):             # PyTorch's words for it on a CPU
            raise
        leave(OUT_OF_MEMORY, 2)
    except KeyboardInterrupt:
        leave("stopped", 130)


if __name__ == "__main__":
    run(main)
