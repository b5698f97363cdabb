"""GLUE files -> text-to-text examples, splits, batches, metrics. Numbers and text only: no model in sight.

    python data.py --task rte --data-dir glue                # split sizes and five examples as the model sees them
    python data.py --task rte --data-dir glue --download     # fetch the official files first

A row of a file becomes an Example: `source` text (task name, then the fields), `target` text (a label word), `gold`.
Formats: T5's own (Raffel et al. 2020, appendix D), since public T5 checkpoints have seen them. Splits: see `make_splits`.
"""
import argparse
import hashlib
import http.client
import json
import math
import os
import re
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend: one line that names the file, the place, what was found and what was expected."""


# ----------------------------------------------------------------------------------------------------------- tasks

@dataclass
class Task:
    name: str       # the first word of every source text
    folder: str     # below the data folder
    fields: dict    # name in the source text -> column of the file, in T5's (alphabetical) order
    column: object  # of the label
    labels: dict    # label in the file -> label word, the positive class second; empty: a score from 0 to 5
    metrics: tuple  # names of functions below
    rows: tuple     # of the official train and validation files
    url: str = ""
    files: dict = field(default_factory=lambda: dict(train="train.tsv", validation="dev.tsv", submission="test.tsv"))
    header: bool = True        # False: columns are counted from 0 (the unlabelled test file has a header even then)
    short_lines: bool = False  # True: the official file has a few rows with too few columns; they are left out


GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
SENTENCES, ENTAILMENT = dict(sentence1="sentence1", sentence2="sentence2"), ("entailment", "not_entailment")
words = lambda *labels: dict(zip(labels, labels))  # the file holds the label words themselves

TASKS = {task.name: task for task in (
    Task("cola", "CoLA", dict(sentence=3), 1, {"0": "unacceptable", "1": "acceptable"}, ("matthews",), (8551, 1043),
         GLUE_URL + "CoLA.zip", header=False),
    Task("sst2", "SST-2", dict(sentence="sentence"), "label", {"0": "negative", "1": "positive"}, ("accuracy",),
         (67349, 872), GLUE_URL + "SST-2.zip"),
    Task("mrpc", "MRPC", dict(sentence1="#1 String", sentence2="#2 String"), "Quality",
         {"0": "not_equivalent", "1": "equivalent"}, ("accuracy", "f1"), (3668, 408)),
    Task("qqp", "QQP", dict(question1="question1", question2="question2"), "is_duplicate",
         {"0": "not_duplicate", "1": "duplicate"}, ("accuracy", "f1"), (363849, 40430), GLUE_URL + "QQP-clean.zip",
         short_lines=True),
    Task("stsb", "STS-B", SENTENCES, "score", {}, ("pearson", "spearman"), (5749, 1500), GLUE_URL + "STS-B.zip"),
    Task("mnli", "MNLI", dict(hypothesis="sentence2", premise="sentence1"), "gold_label",
         words("entailment", "neutral", "contradiction"), ("accuracy",), (392702, 9815), GLUE_URL + "MNLI.zip",
         dict(train="train.tsv", validation="dev_matched.tsv", mismatched="dev_mismatched.tsv",
              submission="test_matched.tsv", submission_mismatched="test_mismatched.tsv")),
    Task("qnli", "QNLI", dict(question="question", sentence="sentence"), "label", words(*ENTAILMENT), ("accuracy",),
         (104743, 5463), GLUE_URL + "QNLIv2.zip"),
    Task("rte", "RTE", SENTENCES, "label", words(*ENTAILMENT), ("accuracy",), (2490, 277), GLUE_URL + "RTE.zip"),
    Task("wnli", "WNLI", SENTENCES, "label", {"0": "not_entailment", "1": "entailment"}, ("accuracy",), (635, 71),
         GLUE_URL + "WNLI.zip"),
)}
GLUE = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]  # the paper's eight
# MRPC comes from its own source; GLUE's dev set is a list of id pairs drawn from the training file.
MRPC_FILES = {"msr_paraphrase_train.txt": "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt",
              "msr_paraphrase_test.txt": "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_test.txt",
              "mrpc_dev_ids.tsv": GLUE_URL + "mrpc_dev_ids.tsv"}


@dataclass
class Example:
    parts: list     # the source text in pieces: ["rte sentence1:", <field>, "sentence2:", <field>]
    target: str     # "" where the file has no label
    gold: object    # label as the file writes it, or a float
    index: str      # the file's own row id where it has one, else the row's number from 0

    @property
    def source(self):
        return " ".join(self.parts)


def stsb_target(score):
    """A score from 0 to 5 -> one of T5's 26 strings in steps of 0.2: 3.667 -> "3.6"."""
    return f"{round(score * 5) / 5:.1f}"


def read_rows(path, header, short_lines=False):
    """A tab-separated file without quoting -> (column names or None, list of (line number, list of cells)).

    Raises UserError where the file is missing, empty, not UTF-8, or has a line with another number of columns.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    try:
        text = raw.decode("utf-8-sig")                            # official MRPC starts with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {raw.count(10, 0, error.start) + 1}: not UTF-8 (byte 0x{raw[error.start]:02x})") from None
    lines = [line.rstrip("\r").split("\t") for line in text.rstrip("\r\n").split("\n")]
    names = lines[0] if header else None
    if len(lines) < 1 + header or lines == [[""]]:
        raise UserError(f"{path}: found no rows, expected {'a header and ' if header else ''}at least one row")
    rows = []
    for number, cells in enumerate(lines[header:], 1 + header):
        if len(cells) == len(lines[0]):
            rows.append((number, cells))
        elif not short_lines or len(cells) > len(lines[0]):
            raise UserError(f"{path}: line {number}: found {len(cells)} columns, expected {len(lines[0])}")
    return names, rows


def read_examples(task, path, labelled=True):
    """One file of a task -> list of Example. Raises UserError naming the line for a wrong column, label or score."""
    header = task.header or not labelled
    names, rows = read_rows(path, header, task.short_lines)
    columns = list(task.fields.values()) if task.header or labelled else list(task.fields)
    columns += [task.column] if labelled else []
    for column in columns:
        if (column not in names) if header else (column >= len(rows[0][1])):
            raise UserError(f"{path}: found columns {', '.join(names or rows[0][1])}; expected one named {column}")
    where = [names.index(column) if header else column for column in columns]
    index = names.index("index") if header and "index" in names else None
    examples = []
    for count, (number, cells) in enumerate(rows):
        parts = [part for name, i in zip(task.fields, where) for part in (f"{name}:", cells[i].strip())]
        parts[0] = f"{task.name} {parts[0]}"
        gold, target = None, ""
        if labelled:
            gold = cells[where[-1]].strip()
            if task.labels and gold not in task.labels:
                raise UserError(f"{path}: line {number}: found label {gold!r}, expected one of {', '.join(task.labels)}")
            if not task.labels:
                gold = parse_number(gold)
                if not 0 <= gold <= 5:
                    raise UserError(f"{path}: line {number}: found score {cells[where[-1]]!r}, expected a number from 0 to 5")
            target = task.labels[gold] if task.labels else stsb_target(gold)
        examples.append(Example(parts, target, gold, cells[index] if index is not None else str(count)))
    return examples


def parse_number(text):
    """str -> float; -1 for what is no finite number, as T5's own evaluation has it."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def find_folder(task, data_dir):
    for folder in (Path(data_dir) / task.folder, Path(data_dir) / "glue" / task.folder):
        if folder.is_dir():
            return folder
    raise UserError(f"{Path(data_dir) / task.folder}: no such folder (nor {Path('glue') / task.folder} below {data_dir}); expected"
                    f" the files of {task.name}; --download fetches them")


def permutation(count):
    """The seed and the function that HyperFormer's public splits use."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(42)).tolist()


def read_split(task, data_dir, split):
    """One official split of a task -> list of Example; `submission` is the file without labels."""
    folder = find_folder(task, data_dir)
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
        names, rows = read_rows(path, header=True)
        pairs = {tuple(cells[:2]) for _, cells in read_rows(ids, header=False)[1]}
        held_out = {i for i, (_, cells) in enumerate(rows) if (cells[1], cells[2]) in pairs}
    else:
        held_out = set(permutation(len(examples))[:task.rows[1]])
        if split == "validation":
            print(f"note: {ids} is not there: {task.rows[1]} rows drawn with seed 42 stand in for GLUE's validation set", file=sys.stderr)
    return [e for i, e in enumerate(examples) if (i in held_out) == (split == "validation")]


def make_splits(task, data_dir, scheme="paper"):
    """Task -> {"train": [Example], "validation": ..., "test": ...} (mnli: also "mismatched").

    scheme "paper": fewer than 10,000 training rows: the validation file is halved into validation and test; else 1,000
    training rows become validation (and leave training), the validation file is test (HyperPELT, section 5.1).
    scheme "official": train and validation as the files are; no test, whose labels are not public.
    """
    splits = {name: read_split(task, data_dir, name) for name in task.files if not name.startswith("submission")}
    if len(splits["train"]) < 2 or len(splits["validation"]) < 2:
        raise UserError(f"{find_folder(task, data_dir)}: found {len(splits['train'])} training and {len(splits['validation'])}"
                        " validation rows, expected at least 2 of each")
    if scheme == "official":
        return splits
    held_out = "validation" if len(splits["train"]) < 10_000 else "train"
    rows = splits[held_out]
    order = permutation(len(rows))
    size = len(rows) // 2 if held_out == "validation" else 1000
    first, rest = [rows[i] for i in order[:size]], [rows[i] for i in order[size:]]
    if held_out == "validation":
        return {**splits, "validation": first, "test": rest}
    return {**splits, "train": rest, "validation": first, "test": splits["validation"]}


# --------------------------------------------------------------------------------------------------------- batches

def encode_source(parts, encode, max_length):
    """The parts of a source text -> token ids, eos last. Too long: the longest field is cut, one token at a time."""
    ids = encode(" ".join(parts))
    if len(ids) <= max_length:
        return ids
    pieces = [encode(part)[:-1] for part in parts]
    for _ in range(sum(map(len, pieces)) + 1 - max_length):
        longest = max(pieces[1::2], key=len)                      # odd parts are fields, even ones their names
        if longest:
            longest.pop()
    return sum(pieces, []) + ids[-1:]


def encode_examples(examples, encode, max_source_length, max_target_length):
    """Examples -> list of (source ids, target ids), as int32 arrays; `encode(text)` gives ids that end with eos."""
    targets = {e.target: encode(e.target)[:max_target_length] for e in examples}
    return [(np.array(encode_source(e.parts, encode, max_source_length), np.int32), np.array(targets[e.target], np.int32))
            for e in examples]


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
    """List of id arrays -> int64 array [B, longest], padded on the right with `value`."""
    out = np.full((len(rows), max(map(len, rows))), value, np.int64)
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


def spearman(predicted, gold):
    def ranks(x):                                                 # ties share the mean of their ranks
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return pearson(ranks(predicted), ranks(gold))


def parse_answers(task, texts):
    """Generated texts -> array [rows] of class numbers (-1: no label word) or, for a score, of floats."""
    if not task.labels:
        return np.array([parse_number(text) for text in texts])
    order = list(task.labels.values())
    return np.array([order.index(text.strip()) if text.strip() in order else -1 for text in texts])


def score(task, texts, examples):
    """Generated texts against the gold of their examples -> {metric: value}."""
    gold = np.array([e.gold if not task.labels else list(task.labels).index(e.gold) for e in examples])
    return {metric: globals()[metric](parse_answers(task, texts), gold) for metric in task.metrics}


def write_submission(path, task, texts, examples):
    """A GLUE submission file: index <tab> prediction, labels as the files write them -> number of answers that were no label.

    Those are written as the first label, since the server takes nothing else.
    """
    answers = parse_answers(task, texts)
    order = list(task.labels)
    rows = [f"{e.index}\t{order[max(a, 0)] if order else f'{min(max(a, 0), 5):.3f}'}\n" for e, a in zip(examples, answers)]
    write_whole(path, "".join(["index\tprediction\n", *rows]).encode())
    return int(np.sum(answers < 0))


# ----------------------------------------------------------------------------------------------------------- files

def write_whole(path, content):
    """Bytes -> file, written aside and renamed, so that a reader finds the old file or the new one and never a half."""
    aside = Path(f"{path}.tmp")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_json(path, *parts):
    """JSON file -> dict. Raises UserError where it is missing, no JSON object, or one of its named parts is no object."""
    try:
        found = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    for name, part in (("the file", found), *((name, isinstance(found, dict) and found.get(name)) for name in parts)):
        if not isinstance(part, dict):
            raise UserError(f"{path}: {name} holds {str(part)[:40]}, expected a JSON object")
    return found


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects within the first host and to the hub's own storage, never from https to http. Keeps the size and
    the hash that the hub announces in its redirecting answer."""

    def redirect_request(self, request, file, code, message, headers, url):
        old, new = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(url)
        known = new.netloc == old.netloc or re.search(r"(^|\.)(huggingface\.co|hf\.co)$", new.hostname or "")
        if not known or new.scheme not in ("https", old.scheme):
            raise UserError(f"{request.full_url}: redirected to {new.scheme}://{new.netloc}, which is not trusted")
        self.announced = {**getattr(self, "announced", {}), **{k.lower(): v for k, v in headers.items()}}
        return super().redirect_request(request, file, code, message, headers, url)


def download(url, path, optional=False, tries=5):
    """Fetch url into path -> True (False: `optional`, and the server has no such file).

    Goes to path.part first, is resumed after an interruption, checked by the announced size and hash (X-Linked-Etag: a
    sha256, or a git blob's sha1), and renamed when whole. Raises UserError in one line after `tries` failures.
    """
    path, part = Path(path), Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        redirects = Redirects()
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "hyperpelt"})
        try:
            with urllib.request.build_opener(redirects).open(request, timeout=30) as answer:
                headers = {**{k.lower(): v for k, v in answer.headers.items()}, **getattr(redirects, "announced", {})}
                have = have if answer.status == 206 else 0        # 200: the server sends the whole file again
                length = answer.headers.get("Content-Length")
                size = headers.get("x-linked-size") or (have + int(length) if length else None)
                with open(part, "r+b" if have else "wb") as file, tqdm(
                        total=size and int(size), initial=have, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                    file.seek(have)
                    while block := answer.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
            if size and part.stat().st_size < int(size):
                raise OSError(f"broken off at byte {part.stat().st_size} of {size}")
        except urllib.error.HTTPError as error:
            if error.code in (401, 404) and optional:             # the hub answers 401 for a repository that does not exist
                return False
            if error.code == 416:                                 # what lies there is longer than the file: begin again
                part.unlink(missing_ok=True)
            problem, final = f"the server answers {error.code} {error.reason}", 400 <= error.code < 500 and error.code not in (408, 416, 429)
        except (OSError, ValueError, http.client.HTTPException) as error:
            problem, final = str(getattr(error, "reason", error)), isinstance(error, (ValueError, http.client.InvalidURL))
        else:
            announced = headers.get("x-linked-etag") or headers.get("etag") or ""
            wrong = check(part, announced.removeprefix("W/").strip('"').lower(), size and int(size))
            if not wrong:
                os.replace(part, path)
                return True
            part.unlink()
            problem, final = wrong, False
        if final:
            break
        if attempt < tries - 1:
            time.sleep(2 ** attempt)
    raise UserError(f"{url}: {problem}; try again later, or fetch it by hand and put it at {path}")


def check(path, announced, size):
    """Compare a downloaded file with the announced size and hash -> None, or what is wrong."""
    content = hashlib.sha256() if len(announced) == 64 else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    if size is not None and path.stat().st_size != size:
        return f"found {path.stat().st_size} bytes, expected {size}"
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", announced):
        return None                                               # a server that announces no hash
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return None if content.hexdigest() == announced else f"found hash {content.hexdigest()}, expected {announced}"


def unpack(archive, folder):
    """Put the .tsv files that lie directly in a zip's folder `folder.name` into `folder`. Refuses a zip with a path that
    leaves it, a link, or more than 2 GB of content."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            for member in members:
                path = Path(member.filename)
                if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
                    raise UserError(f"{archive}: refused: {member.filename} leads out of the folder")
            if sum(member.file_size for member in members) > 2 * 10**9:
                raise UserError(f"{archive}: refused: more than 2 GB when unpacked")
            folder.mkdir(parents=True, exist_ok=True)
            for member in members:
                if Path(member.filename).parent.name == folder.name and member.filename.endswith(".tsv"):
                    write_whole(folder / Path(member.filename).name, file.read(member))  # the zip's CRC is checked here
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{archive}: not a whole zip file ({error})") from None


def download_task(task, data_dir):
    """Fetch those official files of a task that are not there yet into data_dir/FOLDER, and count their rows."""
    folder = Path(data_dir) / task.folder
    wanted = list(task.files.values())
    for place in (folder, Path(data_dir) / "glue" / task.folder):
        if all((place / name).exists() for name in wanted) or task.name == "mrpc" and all((place / name).exists() for name in MRPC_FILES):
            return
    if task.name == "mrpc":
        for name, url in MRPC_FILES.items():
            (folder / name).exists() or download(url, folder / name)
    else:
        archive = Path(data_dir) / Path(task.url).name
        download(task.url, archive)
        unpack(archive, folder)
        archive.unlink()
    found = tuple(len(read_split(task, data_dir, split)) for split in ("train", "validation"))
    print(f"{folder}: {found[0]} training and {found[1]} validation rows (official: {task.rows[0]} and {task.rows[1]})")


def find_task(name):
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; the known ones are {', '.join(TASKS)}")
    return TASKS[name]


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is a user's mistake like any other: one line."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--data-dir", required=True, help="folder with RTE/train.tsv or glue/RTE/train.tsv")
    parser.add_argument("--split", default="paper", choices=["paper", "official"], help="which splits (default: paper)")
    parser.add_argument("--download", action="store_true", help="fetch the official files if they are not there")
    args = parser.parse_args()
    task = find_task(args.task)
    if args.download:
        download_task(task, args.data_dir)
    splits = make_splits(task, args.data_dir, args.split)
    print(", ".join(f"{name} {len(rows):,}" for name, rows in splits.items()))
    for example in splits["train"][:5]:
        print(f"\n{example.source}\n  -> {example.target}")


def leave(message, code):
    print(message, file=sys.stderr)
    sys.exit(code)


def run(main):
    """Call a program's main; a user's mistake or a failing disk ends in one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        leave(f"error: {' '.join(str(error).split())}", 2)
    except torch.OutOfMemoryError:
        leave("error: the GPU's memory is used up; a smaller --batch-size or --max-source-length needs less", 2)
    except KeyboardInterrupt:
        leave("stopped", 130)


if __name__ == "__main__":
    run(main)
