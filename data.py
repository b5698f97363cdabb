"""Official files of GLUE, SuperGLUE, VQA and captions -> text-to-text examples, splits, metrics.

    splits = make_splits(TASKS["rte"], "glue")               # {"train": [Example, ...], ...}
    score(TASKS["rte"], outputs, splits["validation"])       # {"accuracy": 0.71}

Text formats are T5's own (Raffel et al. 2020, appendix D), because public T5 checkpoints have
seen them. This module knows no model and no pixel. From top to bottom: tasks and examples, errors,
file formats, readers, the table of tasks, splits, text formats, metrics, predictions, files and
downloads, the end of a program.
Marks: [P] printed in the paper, [X] borrowed from earlier work's code, [R] reconstructed,
[C] our choice.
"""
import contextlib
import json
import math
import os
import re
import statistics
import sys
import urllib.request
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

# ---- tasks and examples --------------------------------------------------------------------------

def pairs(text):
    """Return {"a": "b", "c": "c"} of "a=b, c", the notation of the tables below."""
    items = [item.partition("=") for item in text.split(", ") if item]
    return {name: value or name for name, _, value in items}


@dataclass
class Task:
    """A data set: where its files are, and how they become text.

    The fields of type dict are given as strings in the notation of pairs().
    """

    # The first word of every source text.
    name: str
    # The folder of its files, below the data folder.
    folder: str
    # The format of the files: (path, where) -> rows, see the file formats below.
    read_rows: object
    # "name in the source text=column of the file", in alphabetical order as in T5.
    fields: dict
    # "label in the file=label word". Empty: no classes.
    # Of two, the second is the positive class of f1 and matthews.
    labels: dict = ""
    # The column of the label.
    column: str = "label"
    # The metrics of score(). Their mean chooses the best checkpoint.
    metrics: tuple = ("accuracy",)
    # "split=file". A file of the split "test" may be absent.
    files: dict = "train=train.tsv, validation=dev.tsv"
    # "file that the evaluation server takes=test file without labels".
    submission: dict = ""
    # "file=address" of the official files, in the order of the downloads. Empty: there are none.
    urls: dict = ""
    # The first part of the source text of an image task. Text tasks have none.
    prompt: str = ""
    # The keys of id and output in the file that an image task's official evaluator reads.
    result: str = ""
    # The largest number of tokens of an output, and the beams to search it with [C].
    max_answer: int = 10
    beams: int = 1

    def __post_init__(self):
        for name in ("fields", "labels", "files", "submission", "urls"):
            setattr(self, name, pairs(getattr(self, name)))
        self.is_visual = bool(self.prompt)

    def label_words(self):
        """Return the texts that a right output can be; none where answers are free."""
        if self.labels or self.is_visual:
            return list(self.labels.values())
        # Only STS-B is left.
        return [stsb_target(step / 5) for step in range(26)]


@dataclass(slots=True)
class Example:
    """One example of a task. A million of them must fit into memory.

    The gold of a class is the label as the file writes it; of STS-B, the score; of other tasks, the
    tuple of all right answers or captions.
    """

    # The source text in parts: ("rte sentence1:", text, "sentence2:", text).
    parts: tuple
    # The likeliest target text; empty in unlabelled data.
    target: str
    gold: object
    # The file's own id where it has one, else the number of the example from 0.
    index: str
    # (image set, image id), such as ("train2014", "9").
    image: tuple = None
    # Pairs (right answer, weight). Training draws one of them. Empty: only `target` is right.
    targets: tuple = ()
    # VQA's type of the answer: "yes/no", "number" or "other".
    kind: str = ""

    @property
    def source(self):
        return " ".join(self.parts)


# ---- errors --------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend: one line with the place, what was found and expected."""


@contextlib.contextmanager
def reading(place):
    """Turn an exception about a file's content into a UserError, whose message names the place.

    Yield an object. A reader adds a line or an entry to its `place`, and may set its `found` to
    the columns there.
    """
    where = SimpleNamespace(place=place, found=())
    try:
        yield where
        return
    except (UserError, NameError, MemoryError):
        # The file is not to blame.
        raise
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg}"
    except KeyError as error:
        problem = f"found no {error} among {', '.join(where.found) or 'its entries'}"
    except Exception as error:
        # Damaged bytes can lead a parser anywhere. Where this is a bug, its text is shown.
        problem = str(error).split("\n")[0]
    raise UserError(f"{where.place}: {problem}")


def read_json_file(path):
    """Read a whole JSON file. Raises UserError."""
    with reading(path):
        return json.loads(Path(path).read_bytes())


# ---- file formats --------------------------------------------------------------------------------
# A format is a generator (path, where) of rows, each a dict {column: cell}. Before it parses a row,
# it sets where.place, such as "train.tsv: line 7", which an error message then names. A row may
# have four entries that are no column of the file, which read_files takes: "index", "image", "kind"
# and "split".


def read_lines(path, where, encoding="utf-8"):
    """Yield the lines of a file that are not blank, without line end and byte order mark."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where.place = f"{path}: line {number}"
            if line.strip():
                yield line.decode(encoding).strip("\ufeff\r\n")


def read_tsv(path, where, names=(), short_lines=False):
    """Read GLUE's format: cells between tabs, without quoting.

    The first line names the columns unless `names` does. With short_lines, lines with too few
    cells are left out, because the official file of QQP has a few.
    """
    lines = read_lines(path, where)
    names = names or next(lines, "").split("\t")
    where.found = names
    for line in lines:
        cells = line.split("\t")
        if short_lines and len(cells) < len(names):
            continue
        if len(cells) != len(names):
            raise ValueError(f"found {len(cells)} columns, expected {len(names)}")
        yield dict(zip(names, cells, strict=True))


def read_json_lines(path, where):
    """Read SuperGLUE's format: a JSON object in each line."""
    for line in read_lines(path, where):
        yield json.loads(line)


def read_trec(path, where):
    """Read TREC's format, in Latin-1: "NUM:dist How far is it from Denver to Aspen ?"."""
    for line in read_lines(path, where, "latin-1"):
        label, _, question = line.partition(" ")
        yield {"question": question, "label": label.partition(":")[0]}


def read_imdb(path, where):
    """Read IMDB's format: one text in each file, path/neg/0_9.txt or path/pos/0_9.txt."""
    for label in ("neg", "pos"):
        for file in sorted((path / label).glob("*.txt")):
            where.place = file
            yield {"text": file.read_text("utf-8-sig").replace("\n", " "), "label": label}


def read_snlive(path, where):
    """Read SNLI-VE, without the rows on whose label the annotators disagree ("-")."""
    for row in read_json_lines(path, where):
        if row["gold_label"] == "-":
            continue
        # The last spelling is the official generator's.
        image = row.get("Flickr30K_ID") or row.get("Flickr30kID") or row["Flikr30kID"]
        image = ("flickr30k", str(image).removesuffix(".jpg"))
        yield {**row, "index": row["pairID"], "image": image}


# One value in an official file has at most so many characters.
LONGEST_VALUE = 262_144
# What stands before an entry: brackets, commas, white space, and the key (group 1) that begins a
# list. After an empty list the match goes on to the next key, so group 1 is the entry's own.
BEFORE_ENTRY = re.compile(r'(?:[\s,\[\]]*"([^"]*)"\s*:)*[\s,\[\]]*')


def read_json(path, where, part=None):
    """Yield (key, entry) of a JSON object of up to a gigabyte, piece by piece.

    The entries are the elements of the list whose key is `part`. Where that is None, every value is
    an entry, and of a list every element: {"a": [1, 2], "b": 3} yields a 1, a 2, b 3.
    """
    where.place = path
    decode = json.JSONDecoder().raw_decode
    text = key = ""
    position = number = 0
    with open(path, encoding="utf-8") as file:
        # The opening brace.
        file.read(1)
        while True:
            if len(text) - position < LONGEST_VALUE:
                text = text[position:] + file.read(8 * LONGEST_VALUE)
                position = 0
            before = BEFORE_ENTRY.match(text, position)
            if text.startswith("}", before.end()):
                return
            if before[1]:
                key = before[1]
                number = 0
            where.place = f"{path}: {key}[{number}]"
            entry, position = decode(text, before.end())
            number += 1
            if part in (key, None):
                yield key, entry


def read_gqa(path, where):
    """Read GQA's balanced questions, {question id: question}."""
    for index, row in read_json(path, where):
        image = ("gqa", str(row["imageId"]))
        yield {**row, "index": index, "image": image, "label": (row["answer"],)}


def read_questions(path, where):
    """Read a question file of VQAv2 or OK-VQA.

    The name tells the images, as in v2_OpenEnded_mscoco_train2014_questions.json. The questions of
    test-dev are about images of test.
    """
    image_set = path.stem.split("_")[-2].replace("test-dev", "test")
    for _, row in read_json(path, where, "questions"):
        image = (image_set, str(row["image_id"]))
        yield {**row, "index": row["question_id"], "image": image}


def read_vqa(path, where):
    """Read a question file with its annotations."""
    name = path.name.replace("OpenEnded_", "").replace("questions", "annotations")
    labels = {}
    for _, row in read_json(path.with_name(name), where, "annotations"):
        answers = tuple(answer["answer"] for answer in row["answers"])
        # The key is what an error message says that was not found.
        key = f"annotation of question {row['question_id']}"
        labels[key] = {"label": answers, "kind": row["answer_type"]}

    for row in read_questions(path, where):
        yield row | labels[f"annotation of question {row['index']}"]


def read_official_captions(path, where):
    """Read captions_train2014.json, one row for each image. The label is all its captions."""
    image_set = path.stem.removeprefix("captions_")
    captions = {}
    for _, row in read_json(path, where, "annotations"):
        captions.setdefault(str(row["image_id"]), []).append(row["caption"])
    for image, texts in captions.items():
        yield {"index": image, "image": (image_set, image), "label": tuple(texts)}


# Karpathy's "restval" is the part of val2014 that trains.
KARPATHY = pairs("train, restval=train, val=validation, test")


def read_karpathy(path, where):
    """Read dataset_coco.json, one row for each image. The label is all its captions."""
    for _, row in read_json(path, where, "images"):
        index = str(row["cocoid"])
        image = (row["filepath"], index)
        captions = tuple(sentence["raw"] for sentence in row["sentences"])
        split = KARPATHY[row["split"]]
        yield {"index": index, "image": image, "split": split, "label": captions}


# ---- readers -------------------------------------------------------------------------------------

def read_task(task, folder, protocol):
    """Read the files of a task, or those that stand in for them. Return {split: [Example]}.

    With protocol "paper", VQAv2 and captions have Karpathy's splits [X] if dataset_coco.json is
    found in the task's folder, above it, or in a folder COCO there.
    """
    karpathy = None
    if protocol == "paper" and task.name in ("vqa", "caption"):
        places = (folder, folder / "COCO", folder.parent, folder.parent / "COCO")
        paths = [place / "dataset_coco.json" for place in places]
        karpathy = next(filter(Path.exists, paths), None)
    if karpathy and task.name == "caption":
        return read_files(task, {"train": karpathy}, read_karpathy)
    if task.name == "mrpc" and not (folder / "train.tsv").exists():
        return read_files(task, {"train": folder / MRPC_SOURCE}, split_mrpc)

    paths = {split: folder / name for split, name in task.files.items()}
    if "test" in paths and not paths["test"].exists():
        del paths["test"]
    splits = read_files(task, paths, task.read_rows)
    return split_by_image(splits, karpathy) if karpathy else splits


def split_by_image(splits, path):
    """Pool training and validation examples, and split them as Karpathy's file splits images."""
    examples = splits["train"] + splits["validation"]
    splits = {split: [] for split in KARPATHY.values()}
    with reading(path) as where:
        split_of = {row["image"]: row["split"] for row in read_karpathy(path, where)}
    with reading(path):
        for example in examples:
            splits[split_of[example.image]].append(example)
    return splits


def read_files(task, paths, read_rows, labelled=True):
    """Read {split: path}. A row that names a split goes there. Return {split: [Example]}.

    Raises UserError, also where a split that is a key of `paths` gets fewer than 2 examples.
    """
    splits = {}
    for name, path in paths.items():
        with reading(path) as where:
            for number, row in enumerate(read_rows(path, where)):
                parts = source_parts(task, [row[column] for column in task.fields.values()])
                label = read_label(task, row[task.column]) if labelled else (None, "", ())
                gold, target, targets = label
                index = str(row.get("index", number))
                image, kind = row.get("image"), row.get("kind", "")
                example = Example(parts, target, gold, index, image, targets, kind)
                splits.setdefault(row.get("split", name), []).append(example)
            if len(splits.get(name, [])) < 2:
                raise ValueError(f"found fewer than 2 examples for {name}")
    return splits


def read_label(task, label):
    """Return gold, target and targets of an example. Raises ValueError for a wrong label."""
    if task.labels:
        label = str(label).strip()
        if label not in task.labels:
            raise ValueError(f"found label {label!r}, expected one of {', '.join(task.labels)}")
        return label, task.labels[label], ()
    if task.is_visual:
        return weigh_answers(label)
    # Only STS-B is left.
    value = parse_number(label)
    if not 0 <= value <= 5:
        raise ValueError(f"found score {label!r}, expected a number from 0 to 5")
    return value, stsb_target(value), ()


# Many examples have the same answers. With the cache, they share one result in memory.
@cache
def weigh_answers(answers):
    """Return the answers, the likeliest one, and pairs (answer, its VQA accuracy, see metrics)."""
    counts = Counter(answer.strip() for answer in answers)
    targets = [(text, leave_one_out(counts[text], len(answers))) for text in counts if text]
    best = max(targets, key=lambda pair: pair[1], default=("", 0))
    return answers, best[0], tuple(targets)


def parse_number(text):
    """Return a text's number; -1 for what is no finite number, as in T5's own evaluation."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


MRPC_SOURCE = "msr_paraphrase_train.txt"
MRPC_IDS = "mrpc_dev_ids.tsv"


def split_mrpc(path, where):
    """Read MRPC's own source. GLUE lists the pairs of ids that are its validation set."""
    rows = {f"{row['#1 ID']}\t{row['#2 ID']}": row for row in read_tsv(path, where)}
    ids = path.with_name(MRPC_IDS)
    if ids.exists():
        held_out = ids.read_text().split("\n")
    else:
        print(f"note: {ids} is not there: 408 examples are drawn to validate", file=sys.stderr)
        held_out = permutation(list(rows))[:408]
    for key, row in rows.items():
        yield {**row, "split": "validation" if key in held_out else "train"}


# ---- the table of tasks --------------------------------------------------------------------------

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
SUPERGLUE_URL = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"

TASK_LIST = [
    Task(
        "cola", "CoLA", partial(read_tsv, names=("source", "label", "original", "sentence")),
        "sentence", "0=unacceptable, 1=acceptable", metrics=("matthews",),
        submission="CoLA.tsv=test.tsv", urls=f"official.zip={GLUE_URL}CoLA.zip"
    ),
    Task(
        "sst2", "SST-2", read_tsv, "sentence", "0=negative, 1=positive",
        submission="SST-2.tsv=test.tsv", urls=f"official.zip={GLUE_URL}SST-2.zip"
    ),
    Task(
        "mrpc", "MRPC", read_tsv, "sentence1=#1 String, sentence2=#2 String",
        "0=not_equivalent, 1=equivalent", column="Quality", metrics=("accuracy", "f1"),
        submission="MRPC.tsv=test.tsv",
        urls=f"{MRPC_SOURCE}={MRPC_URL}{MRPC_SOURCE}, "
        f"test.tsv={MRPC_URL}msr_paraphrase_test.txt, {MRPC_IDS}={GLUE_URL}{MRPC_IDS}"
    ),
    Task(
        "qqp", "QQP", partial(read_tsv, short_lines=True), "question1, question2",
        "0=not_duplicate, 1=duplicate", column="is_duplicate", metrics=("accuracy", "f1"),
        submission="QQP.tsv=test.tsv", urls=f"official.zip={GLUE_URL}QQP-clean.zip"
    ),
    Task(
        "stsb", "STS-B", read_tsv, "sentence1, sentence2", column="score",
        metrics=("pearson", "spearman"),
        submission="STS-B.tsv=test.tsv", urls=f"official.zip={GLUE_URL}STS-B.zip"
    ),
    Task(
        "mnli", "MNLI", read_tsv, "hypothesis=sentence2, premise=sentence1",
        "entailment, neutral, contradiction", column="gold_label",
        files="train=train.tsv, validation=dev_matched.tsv, mismatched=dev_mismatched.tsv",
        submission="MNLI-m.tsv=test_matched.tsv, MNLI-mm.tsv=test_mismatched.tsv",
        urls=f"official.zip={GLUE_URL}MNLI.zip"
    ),
    Task(
        "qnli", "QNLI", read_tsv, "question, sentence", "entailment, not_entailment",
        submission="QNLI.tsv=test.tsv", urls=f"official.zip={GLUE_URL}QNLIv2.zip"
    ),
    Task(
        "rte", "RTE", read_tsv, "sentence1, sentence2", "entailment, not_entailment",
        submission="RTE.tsv=test.tsv", urls=f"official.zip={GLUE_URL}RTE.zip"
    ),
    Task(
        "wnli", "WNLI", read_tsv, "sentence1, sentence2", "0=not_entailment, 1=entailment",
        submission="WNLI.tsv=test.tsv", urls=f"official.zip={GLUE_URL}WNLI.zip"
    ),
    # The paper's transfer tasks [P; TREC second-hand]. The formats of cb and boolq are T5's [X],
    # those of the other three are ours [C].
    Task(
        "cb", "CB", read_json_lines, "hypothesis, premise", "entailment, contradiction, neutral",
        files="train=train.jsonl, validation=val.jsonl", urls=f"official.zip={SUPERGLUE_URL}CB.zip"
    ),
    Task(
        "boolq", "BoolQ", read_json_lines, "passage, question", "False, True",
        files="train=train.jsonl, validation=val.jsonl",
        urls=f"official.zip={SUPERGLUE_URL}BoolQ.zip"
    ),
    Task(
        "imdb", "aclImdb", read_imdb, "sentence=text", "neg=negative, pos=positive",
        files="train=train, validation=test"
    ),
    Task(
        "paws", "PAWS", read_tsv, "sentence1, sentence2", "0=not_equivalent, 1=equivalent",
        files="train=train.tsv, validation=dev.tsv, test=test.tsv"
    ),
    Task(
        "trec", "TREC", read_trec, "question",
        "ABBR=abbreviation, ENTY=entity, DESC=description, HUM=human, LOC=location, NUM=number",
        files="train=train_5500.label, validation=TREC_10.label"
    ),
    # The prompts of vqa, gqa and caption, and five beams, are VL-T5's [X]; the others are ours [C].
    Task(
        "vqa", "VQAv2", read_vqa, "question", prompt="vqa:", result="question_id answer",
        files="train=v2_OpenEnded_mscoco_train2014_questions.json, "
        "validation=v2_OpenEnded_mscoco_val2014_questions.json",
        submission="test2015-VQAv2.json=v2_OpenEnded_mscoco_test2015_questions.json, "
        "test-dev2015-VQAv2.json=v2_OpenEnded_mscoco_test-dev2015_questions.json"
    ),
    Task(
        "gqa", "GQA", read_gqa, "question", prompt="gqa:", result="questionId prediction",
        files="train=train_balanced_questions.json, validation=val_balanced_questions.json, "
        "test=testdev_balanced_questions.json"
    ),
    Task(
        "okvqa", "OKVQA", read_vqa, "question", prompt="okvqa:", result="question_id answer",
        files="train=OpenEnded_mscoco_train2014_questions.json, "
        "validation=OpenEnded_mscoco_val2014_questions.json"
    ),
    Task(
        "caption", "COCO", read_official_captions, "", metrics=("cider",),
        files="train=captions_train2014.json, validation=captions_val2014.json",
        prompt="caption:", result="image_id caption", max_answer=40, beams=5
    ),
    Task(
        "snlive", "SNLI-VE", read_snlive, "hypothesis=sentence2",
        "entailment, neutral, contradiction", column="gold_label",
        files="train=snli_ve_train.jsonl, validation=snli_ve_dev.jsonl, test=snli_ve_test.jsonl",
        prompt="snlive hypothesis:", result="pairID gold_label"
    ),
]
TASKS = {task.name: task for task in TASK_LIST}
# The paper's eight [P].
GLUE = "cola,sst2,mrpc,qqp,stsb,mnli,qnli,rte"
# Trained together [gqa P, at second hand; the others R].
VL = "vqa,gqa,caption"


def find_tasks(text):
    """Return {name: Task} of "rte", "rte,vqa", "glue" or "vl"."""
    names = {"glue": GLUE, "vl": VL}.get(text, text).split(",")
    for name in names:
        if name not in TASKS:
            raise UserError(f"task {name!r} is unknown; the known ones are {', '.join(TASKS)}")
    return {name: TASKS[name] for name in names}


# ---- splits --------------------------------------------------------------------------------------

def find_folder(task, data_dir):
    """Return the folder of a task's files: data_dir/RTE, data_dir/glue/RTE, data_dir/vl/VQAv2.

    The files of an image task may also lie in data_dir or data_dir/vqa.
    """
    root = Path(data_dir)
    for name in (task.folder, f"glue/{task.folder}", f"vl/{task.folder}", task.name):
        if (root / name).is_dir():
            return root / name
    if task.is_visual and (root / task.files["train"]).exists():
        return root
    return root / task.folder


def permutation(examples):
    """Shuffle with the seed and the function of HyperFormer's public splits [X]."""
    generator = torch.Generator().manual_seed(42)
    order = torch.randperm(len(examples), generator=generator).tolist()
    return [examples[number] for number in order]


def make_splits(task, data_dir, protocol="paper"):
    """Read a task. Return {"train": [Example], "validation": ..., "test": ...}.

    Protocol "paper": of a task with fewer than 10,000 training examples, the validation file is
    halved into validation and test. Of a larger one, 1,000 training examples become validation
    and leave training, and the validation file becomes test [P].
    Protocol "official": the labelled files as they are. Image tasks, and tasks with a labelled test
    file, are never split further [C]. Raises UserError for a split without examples.
    """
    folder = find_folder(task, data_dir)
    splits = read_task(task, folder, protocol)
    # Files that list the examples of several splits may leave one empty.
    for name in ("train", "validation", *splits):
        if not splits.get(name):
            raise UserError(f"{folder}: found no examples for {name}")
    if protocol == "official" or task.is_visual or "test" in splits:
        return splits

    if len(splits["train"]) < 10_000:
        shuffled = permutation(splits["validation"])
        half = len(shuffled) // 2
        return splits | {"validation": shuffled[:half], "test": shuffled[half:]}
    shuffled = permutation(splits["train"])
    return splits | {
        "train": shuffled[1000:],
        "validation": shuffled[:1000],
        "test": splits["validation"]
    }


def read_submission(task, data_dir):
    """Read the unlabelled test data. Return {file that the evaluation server takes: [Example]}."""
    folder = find_folder(task, data_dir)
    paths = {name: folder / file for name, file in task.submission.items()}
    if not paths:
        raise UserError(f"{task.name}: found no unlabelled test data in the table of tasks")
    # CoLA's test file has a header, unlike its others.
    read_rows = read_questions if task.is_visual else read_tsv
    return read_files(task, paths, read_rows, labelled=False)


def sample_examples(examples, count, seed):
    """Draw examples, in their order. A smaller sample is part of a larger one."""
    # The second number only keeps the draw apart from those of train.py.
    order = np.random.default_rng([seed, 2**21]).permutation(len(examples))
    return [examples[number] for number in sorted(order[:count])]


# ---- text formats --------------------------------------------------------------------------------

def source_parts(task, texts):
    """Return the parts of a source text: at even places prompts, at odd ones the texts."""
    parts = []
    for name, text in zip(task.fields, texts, strict=True):
        parts += [f"{name}:", text.strip()]
    return (task.prompt or f"{task.name} {parts[0]}", *parts[1:])


def encode_source(parts, encode, max_length):
    """Return the token ids of a source text, eos last.

    If they are too many, the longest field is cut, one token at a time, so that no field is lost.
    """
    ids = encode(" ".join(parts))
    if len(ids) <= max_length:
        return ids
    pieces = [encode(part)[:-1] for part in parts]
    fields = pieces[1::2]
    while any(fields) and sum(map(len, pieces)) >= max_length:
        max(fields, key=len).pop()
    return sum(pieces, []) + ids[-1:]


def stsb_target(score):
    """Return one of T5's 26 strings in steps of 0.2: 3.667 -> "3.6"."""
    return f"{round(score * 5) / 5:.1f}"


# ---- metrics -------------------------------------------------------------------------------------
# predicted, gold: arrays [examples] of scores or of classes. Where f1 or matthews is a metric, the
# classes are 0 and 1, and class 1 is the positive one.


def accuracy(predicted, gold):
    return np.mean(predicted == gold)


def f1(predicted, gold):
    return 2 * (predicted @ gold) / max(1, np.sum(predicted + gold))


def pearson(predicted, gold):
    # The correlation with a constant is defined as 0.
    if np.ptp(predicted) * np.ptp(gold) == 0:
        return 0.0
    return np.corrcoef(predicted, gold)[0, 1]


def ranks(values):
    """Return ranks from 1. Equal values share the mean of their ranks."""
    ordered = np.sort(values)
    first = np.searchsorted(ordered, values, "left") + 1
    last = np.searchsorted(ordered, values, "right")
    return (first + last) / 2


def spearman(predicted, gold):
    return pearson(ranks(predicted), ranks(gold))


METRICS = {
    "accuracy": accuracy,
    "f1": f1,
    # Matthews' correlation is Pearson's correlation of two binary variables.
    "matthews": pearson,
    "pearson": pearson,
    "spearman": spearman
}


def leave_one_out(matches, count):
    """Return the accuracy of an answer that some of the annotators gave.

    It is min(1, matches / 3) among all annotators but one, averaged over who is left out. Of ten,
    0, 1, 2, 3, 4 matches give 0, .3, .6, .9, 1. A single annotator is not left out [C].
    """
    if count == 1:
        return float(matches)
    left_out = matches * min(1, (matches - 1) / 3)
    others = (count - matches) * min(1, matches / 3)
    return (left_out + others) / count


# The normalisation of the official VQA evaluator (GT-Vision-Lab/VQA, vqaEval.py) has quirks, which
# are kept. Its tables map a number to digits, and a word that lacks one of its apostrophes to the
# word. One entry is the wrong way round, "somebody'd".
CORRECTIONS = pairs(
    "none=0, zero=0, one=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, "
    "ten=10, somebody'd=somebodyd"
)
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
for word in CONTRACTED.split():
    for place in re.finditer("'", word):
        CORRECTIONS[word[: place.start()] + word[place.end() :]] = word
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


@cache
def normalise_answer(text):
    """Normalise as officially: punctuation, periods, lower case, numbers, articles, apostrophes."""
    # Each mark becomes a space, with two exceptions that hold for the whole text. If it stands
    # beside a space anywhere, all marks of its kind are dropped. If a comma stands between digits
    # anywhere, all marks of all kinds are.
    result = text
    comma = re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if comma or beside_space else " ")

    # A period goes unless a digit follows. At most 32 go, because the official code passes its
    # flag as a count.
    result = re.sub(r"\.(?!\d)", "", result, count=32)
    words = [word for word in result.lower().split() if word not in ("a", "an", "the")]
    return " ".join(CORRECTIONS.get(word, word) for word in words)


def vqa_accuracy(text, answers):
    """Return the official accuracy of an output, 0 to 1, given the annotators' answers."""
    text, *answers = [re.sub(r"[\n\t]", " ", one).strip() for one in (text, *answers)]
    # Both sides are normalised, but only where the annotators' answers differ.
    if len(set(answers)) > 1:
        text, *answers = map(normalise_answer, (text, *answers))
    return leave_one_out(answers.count(text), len(answers))


# The end of a word that becomes a word of its own: n't, 's, 're, ..., and the "not" of "cannot".
CAPTION_SPLIT = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m)|(?<=\bcan)not)\b")
# Such an end; o'clock; abbreviations; numbers; words, joined by a mark or not; single signs.
CAPTION_WORD = re.compile(
    r"(?<!\S)(?:n't|'(?:s|re|ve|ll|d|m))\b|o'clock|\b(?:[a-z]\.){2,}"
    r"|\d+(?:[.,:]\d+)+|@?\w+(?:[-/&]\w+)*|[$%&#@*=+]"
)


def tokenize_caption(text):
    """Return a caption's words, in lower case and without punctuation [C].

    It agrees with the official Java tokenizer (PTB) in plain cases: don't -> do n't, dog's ->
    dog 's; t-shirt, and/or, a.m. and 10:30 stay whole. Rarer things (mr., brackets) differ.
    """
    text = text.lower().replace("\u2019", "'")
    return CAPTION_WORD.findall(CAPTION_SPLIT.sub(r" \1", text))


def ngrams(words, n):
    """Count the groups of n successive words."""
    return Counter(zip(*[words[start:] for start in range(n)], strict=False))


def cider(hypotheses, references):
    """Return CIDEr-D, 0 to 10, as pycocoevalcap does (Vedantam et al. 2015).

    hypotheses: lists of words [images]; references: lists of words [images][captions]. It is the
    cosine of tf-idf vectors of n-grams, averaged over n = 1 to 4 and the captions of an image. The
    idf is taken over these references, so a single image scores 0.
    """
    images = len(references)
    total = 0.0
    for n in range(1, 5):
        frequency = Counter()
        for captions in references:
            frequency.update({gram for caption in captions for gram in ngrams(caption, n)})

        for words, captions in zip(hypotheses, references, strict=True):
            counts = ngrams(words, n)
            for caption in captions:
                caption_counts = ngrams(caption, n)
                grams = list(counts | caption_counts)
                idf = np.array([math.log(images / max(1, frequency[gram])) for gram in grams])
                left = idf * [counts[gram] for gram in grams]
                right = idf * [caption_counts[gram] for gram in grams]
                norms = np.linalg.norm(left) * np.linalg.norm(right)
                # The hypothesis' weights are cut to the reference's.
                cosine = np.minimum(left, right) @ right / max(norms, 1e-300)
                # The penalty on different lengths has sigma 6.
                penalty = math.exp(-((len(words) - len(caption)) ** 2) / 72)
                # The factor is 10 over the four values of n.
                total += 2.5 * penalty * cosine / len(captions)
    return float(total / images)


def bleu4(hypotheses, references):
    """Return corpus BLEU-4, 0 to 1, as pycocoevalcap does, given the same arguments."""
    images = list(zip(hypotheses, references, strict=True))
    product = 1.0
    for n in range(1, 5):
        # The small numbers are pycocoevalcap's, against a division by zero.
        correct = 1e-15
        guessed = 1e-9
        for words, captions in images:
            # The largest count in any one reference limits the correct n-grams.
            limit = Counter()
            for caption in captions:
                limit |= ngrams(caption, n)
            counts = ngrams(words, n)
            correct += (counts & limit).total()
            guessed += counts.total()
        product *= correct / guessed

    # The length penalty compares with the reference that is closest in length.
    length = sum(map(len, hypotheses)) + 1e-15
    closest = 1e-9
    for words, captions in images:
        closest += min((abs(len(caption) - len(words)), len(caption)) for caption in captions)[1]
    return product**0.25 * math.exp(min(0, 1 - closest / length))


def correctness(task, output, example):
    """Return how right an output is, 0 to 1; None where outputs are not right or wrong."""
    if task.labels:
        return float(output.strip() == example.target)
    if "accuracy" in task.metrics:
        return vqa_accuracy(output, example.gold)


def score(task, outputs, examples):
    """Compare outputs with the gold of their examples. Return {metric: value}.

    CIDEr-D goes from 0 to 10 (papers print 1.2 as 120), the others to 1.
    """
    if task.name == "caption":
        hypotheses = [tokenize_caption(output) for output in outputs]
        references = [list(map(tokenize_caption, example.gold)) for example in examples]
        return {"cider": cider(hypotheses, references), "bleu4": bleu4(hypotheses, references)}
    # These are None in STS-B, whose scores are compared below.
    right = np.array(list(map(partial(correctness, task), outputs, examples)))
    if task.is_visual:
        metrics = {"accuracy": float(right.mean())}
        for kind in sorted({example.kind for example in examples} - {""}):
            chosen = [example.kind == kind for example in examples]
            metrics[kind] = float(right[chosen].mean())
        return metrics

    if task.labels:
        # A wrong output, also one that is no label, counts as the other one of two classes. With
        # three and more, only accuracy is computed: 1 - gold need not be a class, only another
        # number than gold.
        words = task.label_words()
        gold = np.array([words.index(example.target) for example in examples])
        predicted = np.where(right, gold, 1 - gold)
    else:
        # STS-B's gold scores are not rounded.
        gold = np.array([example.gold for example in examples])
        predicted = np.array(list(map(parse_number, outputs)))
    return {name: float(METRICS[name](predicted, gold)) for name in task.metrics}


def majority(task, train_examples, examples):
    """Return the score of the most frequent training target as the only output."""
    most_frequent = statistics.mode(example.target for example in train_examples)
    return score(task, [most_frequent] * len(examples), examples)


# ---- predictions ---------------------------------------------------------------------------------

def predictions_name(task, split):
    """Return "RTE-validation.tsv" or "validation-VQAv2.json"."""
    return f"{split}-{task.folder}.json" if task.is_visual else f"{task.folder}-{split}.tsv"


def write_predictions(path, task, outputs, examples):
    """Write outputs as the evaluators read them. Return the number of outputs that were no label.

    GLUE's files hold labels, so an output that is none becomes the first label.
    """
    words = task.label_words()
    if task.is_visual:
        id_key, output_key = task.result.split()
        # The ids of VQA and COCO are numbers.
        convert = int if id_key.endswith("_id") else str
        results = [
            {id_key: convert(example.index), output_key: output}
            for example, output in zip(examples, outputs, strict=True)
        ]
        text = json.dumps(results)
    else:
        labels = {word: label for label, word in task.labels.items()}
        text = "index\tprediction\n"
        for example, output in zip(examples, outputs, strict=True):
            if labels:
                label = labels.get(output.strip(), labels[words[0]])
            else:
                label = f"{np.clip(parse_number(output), 0, 5):.3f}"
            text += f"{example.index}\t{label}\n"
    write_file(path, text.encode())
    return sum(output.strip() not in words for output in outputs if words)


# ---- files and downloads -------------------------------------------------------------------------

def write_file(path, content):
    """Write bytes aside and rename, so that a reader finds the old file or the new one, whole."""
    aside = f"{path}.tmp"
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def fetch(url, path):
    """Download a file aside and rename it. Raises OSError, also for a connection that ends early,
    which torch.hub's function takes for the end of the file."""
    with tqdm(desc=path.name, unit="B", unit_scale=True, disable=None) as bar:

        def show(blocks, size, total):
            bar.total = total
            bar.update(blocks * size - bar.n)

        urllib.request.urlretrieve(url, f"{path}.tmp", show)
    os.replace(f"{path}.tmp", path)


def download(task, data_dir):
    """Fetch the official files if they are not there yet. Unpack those of a zip that are read."""
    folder = find_folder(task, data_dir)
    present = {path.name for path in folder.glob("*")}
    # GLUE's list is the last download of MRPC.
    if not task.urls or MRPC_IDS in present or present.issuperset(task.files.values()):
        return

    folder.mkdir(parents=True, exist_ok=True)
    for name, url in task.urls.items():
        with reading(url):
            fetch(url, folder / name)

    archive = folder / "official.zip"
    if archive.exists():
        with reading(archive), zipfile.ZipFile(archive) as members:
            for name in [*task.files.values(), *task.submission.values()]:
                write_file(folder / name, members.read(f"{task.folder}/{name}"))
        archive.unlink()


# ---- the end of a program ------------------------------------------------------------------------

def run(main):
    """Call a program's main. A user's mistake, a missing package or a full memory ends in one line
    and code 2."""
    try:
        main()
    except (UserError, OSError, ImportError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
        sys.exit(2)
