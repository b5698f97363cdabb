"""data.py: files written by hand in the official formats, metrics against other libraries."""

import copy
import functools
import http.server
import io
import json
import re
import statistics
import threading
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SHARED, SPIECE

import data
from data import TASKS, Example, UserError

TEXT_TASKS = [name for name, task in TASKS.items() if not task.is_visual]


def write(path, *lines):
    """Write lines, of which each is text, bytes or an object for JSON. Return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"\n".join(t.encode() if isinstance(t, str) else t for t in texts))
    return path


def official(name, folder):
    return data.make_splits(TASKS[name], folder, "official")


def sizes(splits):
    return {name: len(examples) for name, examples in splits.items()}


def indices(splits):
    return {name: [example.index for example in part] for name, part in splits.items()}


def shuffled(count):
    return torch.randperm(count, generator=torch.Generator().manual_seed(42)).tolist()


# ---- text tasks: formats and splits --------------------------------------------------------------

PAIR_HEADER = "index\tsentence1\tsentence2\tlabel"
MNLI_HEADER = "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label"
QQP_HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"


@pytest.mark.parametrize(
    "name, header, row, source, target, gold",
    [
        ("cola", [], "gj04\t0\t*\tThe more. ", "sentence: The more.", "unacceptable", "0"),
        ("sst2", ["sentence\tlabel"], "hide it \t0", "sentence: hide it", "negative", "0"),
        (
            "mrpc",
            [MRPC_HEADER],
            '1\t2\t3\tSaid "no.\tHe "did',
            'sentence1: Said "no. sentence2: He "did',
            "equivalent",
            "1",
        ),
        (
            "qqp",
            [QQP_HEADER, "5\t1", "6\t1\t2\tx"],
            "7\t1\t2\tWhy?\tHow?\t0",
            "question1: Why? question2: How?",
            "not_duplicate",
            "0",
        ),
        (
            "stsb",
            ["index\tgenre\tsentence1\tsentence2\tscore"],
            "0\tnews\tA plane.\tA jet.\t3.667",
            "sentence1: A plane. sentence2: A jet.",
            "3.6",
            3.667,
        ),
        (
            "mnli",
            [MNLI_HEADER],
            "0\t9\tI sat.\tI stood.\tneutral\tcontradiction",
            "hypothesis: I stood. premise: I sat.",
            "contradiction",
            "contradiction",
        ),
        (
            "qnli",
            ["index\tquestion\tsentence\tlabel"],
            "0\tWho?\tHe.\tentailment",
            "question: Who? sentence: He.",
            "entailment",
            "entailment",
        ),
        (
            "rte",
            [PAIR_HEADER + "\r"],
            "0\tA b.\tC d.\tnot_entailment\r",
            "sentence1: A b. sentence2: C d.",
            "not_entailment",
            "not_entailment",
        ),
        ("wnli", [PAIR_HEADER], "0\tA.\tB.\t1", "sentence1: A. sentence2: B.", "entailment", "1"),
        (
            "paws",
            ["id\tsentence1\tsentence2\tlabel"],
            "1\tIn , he .\tHe , in .\t0",
            "sentence1: In , he . sentence2: He , in .",
            "not_equivalent",
            "0",
        ),
        (
            "cb",
            [],
            {"premise": "It\u2019s so.", "hypothesis": "It is", "label": "neutral", "idx": 0},
            "hypothesis: It is premise: It\u2019s so.",
            "neutral",
            "neutral",
        ),
        (
            "boolq",
            [""],
            {"question": "is it", "passage": "It is.", "idx": 9, "label": True},
            "passage: It is. question: is it",
            "True",
            "True",
        ),
        (
            "trec",
            [],
            b"HUM:ind Who wrote \xf0the : book ?",
            "question: Who wrote \xf0the : book ?",
            "human",
            "HUM",
        ),
    ],
)
def test_a_row_becomes_the_text_of_t5(name, header, row, source, target, gold, tmp_path):
    """Trap 22: quotes, byte order mark, Windows line ends, short lines of QQP."""
    for file in TASKS[name].files.values():
        write(tmp_path / TASKS[name].folder / file, *header, row, row, "")
    example, other = official(name, tmp_path)["train"]
    assert (example.source, example.target, example.gold) == (f"{name} {source}", target, gold)
    assert example.index == "0" and other.index == ("0" if "index" in str(header) else "1")
    assert not hasattr(example, "__dict__")


def test_texts_of_imdb_are_files_in_two_folders(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"aclImdb/{split}/pos/1_9.txt", "\ufeffGood.", "Really")
        write(tmp_path / f"aclImdb/{split}/neg/1_1.txt", "Bad.")
        write(tmp_path / f"aclImdb/{split}/unsup/0_0.txt", "Unlabelled.")
    found = [(e.source, e.target, e.index) for e in official("imdb", tmp_path)["validation"]]
    assert found == [
        ("imdb sentence: Bad.", "negative", "0"),
        ("imdb sentence: Good. Really", "positive", "1"),
    ]


def write_rows(name, folder, count, files=None):
    """Write examples that all differ into the official files of a text task."""
    task = TASKS[name]
    columns = [*task.fields.values(), task.column]
    labels = list(task.labels) or ["2.5"]
    for file in files or task.files.values():
        path = folder / file
        texts = [[f"{file} {column} {i}" for column in columns[:-1]] for i in range(count)]
        rows = [[*row, labels[i % len(labels)]] for i, row in enumerate(texts)]
        if name == "imdb":
            for i, (text, label) in enumerate(rows):
                write(path / label / f"{i}_1.txt", text)
        elif name == "trec":
            write(path, *(f"{label}:x {text}" for text, label in rows))
        elif name == "cola":
            write(path, *(f"x\t{label}\t\t{text}" for text, label in rows))
        elif path.suffix == ".jsonl":
            write(path, *(dict(zip(columns, row, strict=True)) for row in rows))
        else:
            write(path, "\t".join(columns), *("\t".join(row) for row in rows))


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_splits_are_disjoint_and_complete(name, tmp_path):
    """Trap 18: no example is in two splits, and none is lost, under both protocols."""
    files = TASKS[name].files
    write_rows(name, tmp_path / TASKS[name].folder, 21)
    for protocol in ("paper", "official"):
        expected = dict.fromkeys(files, 21)
        if protocol == "paper" and "test" not in files:
            expected |= {"validation": 10, "test": 11}
        splits = data.make_splits(TASKS[name], tmp_path, protocol)
        assert sizes(splits) == expected
        sources = [example.source for part in splits.values() for example in part]
        assert len(set(sources)) == len(sources) == 21 * len(files)
    if TASKS[name].labels:
        found = {example.gold: example.target for example in splits["train"]}
        assert found == TASKS[name].labels and all(found.values())


@pytest.mark.parametrize("count", [9_999, 10_000])
def test_large_tasks_hold_out_training_examples(count, tmp_path):
    """From 10,000 training examples on, 1,000 of them validate, and the validation file tests."""
    write_rows("qnli", tmp_path / "QNLI", count, ["train.tsv"])
    write_rows("qnli", tmp_path / "QNLI", 30, ["dev.tsv"])
    train, validation, test = range(count), shuffled(30)[:15], shuffled(30)[15:]
    if count == 10_000:
        train, validation, test = shuffled(count)[1000:], shuffled(count)[:1000], range(30)
    found = indices(data.make_splits(TASKS["qnli"], tmp_path))
    assert found == {
        "train": [*map(str, train)],
        "validation": [*map(str, validation)],
        "test": [*map(str, test)],
    }


@pytest.mark.skipif(not (SHARED / "data/glue").is_dir(), reason="needs the real GLUE files")
def test_real_files():
    """Sizes as GLUE prints them, and the majority of RTE (trap 22)."""
    folder = SHARED / "data"
    for name, train, validation in (("stsb", 5749, 1500), ("mrpc", 3668, 408), ("rte", 2490, 277)):
        splits = official(name, folder)
        assert sizes(splits) == {"train": train, "validation": validation}
    constant = data.majority(TASKS["rte"], splits["train"], splits["validation"])
    assert round(constant["accuracy"], 3) == 0.527
    assert sizes(data.read_submission(TASKS["rte"], folder)) == {"RTE.tsv": 3000}


def test_samples_are_nested_and_in_order():
    examples = list(range(100))
    few, more = (data.sample_examples(examples, count, 0) for count in (4, 16))
    assert len(few) == 4 and set(few) < set(more) and more == sorted(more)
    assert data.sample_examples(examples, 500, 0) == examples
    assert data.sample_examples(examples, 16, 1) != more


def test_the_table_of_tasks():
    """Metrics and searches as in the paper."""
    folders = (
        "CoLA SST-2 MRPC QQP STS-B MNLI QNLI RTE WNLI CB BoolQ aclImdb PAWS TREC VQAv2 GQA"
        " OKVQA COCO SNLI-VE"
    )
    assert " ".join(task.folder for task in TASKS.values()) == folders
    assert [bool(task.urls) for task in data.TASK_LIST] == [True] * 11 + [False] * 8
    assert [task.is_visual for task in data.TASK_LIST] == [False] * 14 + [True] * 5
    assert list(data.find_tasks("glue")) == "cola sst2 mrpc qqp stsb mnli qnli rte".split()
    assert [*data.find_tasks("vl"), *data.find_tasks("rte,cb")] == "vqa gqa caption rte cb".split()
    metrics = {
        "cola": ("matthews",),
        "stsb": ("pearson", "spearman"),
        "caption": ("cider",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
    }
    for name, task in TASKS.items():
        assert task.metrics == metrics.get(name, ("accuracy",))
        assert (task.max_answer, task.beams) == ((40, 5) if name == "caption" else (10, 1))
    targets = [data.stsb_target(value) for value in (0, 3.8, 3.667, 4.75, 2.5, 5)]
    assert targets == ["0.0", "3.8", "3.6", "4.8", "2.4", "5.0"]
    words = {
        "snlive": ["entailment", "neutral", "contradiction"],
        "vqa": [],
        "stsb": [f"{i / 5:.1f}" for i in range(26)],
        "boolq": ["False", "True"],
        "cola": ["unacceptable", "acceptable"],
        "sst2": ["negative", "positive"],
        "mrpc": ["not_equivalent", "equivalent"],
        "paws": ["not_equivalent", "equivalent"],
        "qqp": ["not_duplicate", "duplicate"],
        "wnli": ["not_entailment", "entailment"],
        "trec": "abbreviation entity description human location number".split(),
    }
    assert {name: TASKS[name].label_words() for name in words} == words


# ---- text formats --------------------------------------------------------------------------------

TOKENIZER = sentencepiece.SentencePieceProcessor(model_file=str(SPIECE))


def encode(text):
    return [*TOKENIZER.encode(text), 1]


def test_truncation_keeps_every_field():
    """Trap 16: the longest field is cut first. Prompts, the short field and eos stay (trap 14)."""
    long, short = " ".join(["many words that repeat"] * 30), "the red house"
    for texts in ((long, short), (short, long), (long, long)):
        parts = data.source_parts(TASKS["rte"], [f" {texts[0]}", f"{texts[1]}\n"])
        assert parts == ("rte sentence1:", texts[0], "sentence2:", texts[1])
        ids = data.encode_source(parts, encode, 40)
        text = TOKENIZER.decode(ids[:-1])
        assert len(ids) == 40 and ids[-1] == 1
        assert "rte sentence1:" in text and "sentence2:" in text
        assert short in text or short not in texts
    halves = [len(encode(part)) for part in text.removeprefix("rte sentence1:").split("sentence2:")]
    assert abs(halves[0] - halves[1]) <= 1
    # A text that fits is encoded as a whole, and prompts are never cut.
    whole = encode(" ".join(parts))
    assert data.encode_source(parts, encode, len(whole)) == whole
    for parts in (("caption:",), ("vqa:", ""), ("vqa:", "Why is it so?")):
        ids = data.encode_source(parts, encode, 1)
        assert TOKENIZER.decode(ids[:-1]) == parts[0] and ids[-1] == 1


# ---- metrics of text tasks -----------------------------------------------------------------------


def score(name, outputs, golds):
    """Score outputs against labels of the file, or against scores of STS-B."""
    examples = [Example((), TASKS[name].labels.get(gold, ""), gold, "") for gold in golds]
    return data.score(TASKS[name], outputs, examples)


def test_metrics_equal_scikit_learn_and_scipy():
    metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for count in (2, 7, 50, 400) * 10:
        predicted, gold = rng.integers(0, 2, count), rng.integers(0, 2, count)
        words = np.array(["not_equivalent", "equivalent"])[predicted]
        mrpc = score("mrpc", list(words), [str(label) for label in gold])
        assert mrpc["accuracy"] == pytest.approx(metrics.accuracy_score(gold, predicted))
        assert mrpc["f1"] == pytest.approx(metrics.f1_score(gold, predicted, zero_division=0))
        words = np.array(["unacceptable", "acceptable"])[predicted]
        cola = score("cola", list(words), [str(label) for label in gold])
        assert cola["matthews"] == pytest.approx(metrics.matthews_corrcoef(gold, predicted))

        scores, raw = [0.1, 0.3, *rng.integers(0, 26, count) / 5], rng.uniform(0, 5, count + 2)
        stsb = score("stsb", [str(value) for value in scores], raw)
        assert stsb["pearson"] == pytest.approx(stats.pearsonr(scores, raw)[0])
        assert stsb["spearman"] == pytest.approx(stats.spearmanr(scores, raw)[0])


@pytest.mark.parametrize(
    "name, outputs, golds, expected",
    [
        # Trap 24: a constant gives 0, not NaN.
        ("cola", ["acceptable"] * 4, "0110", {"matthews": 0}),
        ("cola", ["unacceptable"] * 4, "0110", {"matthews": 0}),
        ("cola", ["acceptable", "unacceptable"], "11", {"matthews": 0}),
        ("stsb", ["0.1"] * 3, [0.1, 0.2, 0.4], {"pearson": 0, "spearman": 0}),
        ("mrpc", ["not_equivalent"] * 2, "00", {"accuracy": 1, "f1": 0}),
        # Of two classes, what is no label counts as the opposite of the gold.
        ("cola", ["?", "", "x", "acceptabl"], "0110", {"matthews": -1}),
        # One true positive, two false positives, one false negative.
        (
            "mrpc",
            [" equivalent ", "not_equivalent", "equivalent", "?"],
            "1100",
            {"accuracy": 0.25, "f1": 2 / 5},
        ),
        ("mnli", ["?", "?", "?"], TASKS["mnli"].labels, {"accuracy": 0}),
        # Trap 19: golds of STS-B are not rounded. What is no number counts as -1, as in T5.
        (
            "stsb",
            ["1.0", "3.0", "x", "nan", "inf"],
            [1.0, 2.9, 3.1, 4.0, 0.3],
            {
                "pearson": np.corrcoef([1, 3, -1, -1, -1], [1.0, 2.9, 3.1, 4.0, 0.3])[0, 1],
                "spearman": np.corrcoef([4, 5, 2, 2, 2], [2, 3, 4, 5, 1])[0, 1],
            },
        ),
        ("gqa", [" yes", "noo"], [("yes",), ("no",)], {"accuracy": 0.5}),
        (
            "caption",
            ["a cat sits there", "two dogs run home now"],
            [("A cat sits there.",), ("Two dogs run home now.",)],
            {"cider": 10, "bleu4": 1},
        ),
    ],
)
def test_scores(name, outputs, golds, expected):
    assert score(name, outputs, golds) == pytest.approx(expected)


def test_majority_correctness_and_types_of_answers():
    train = [Example((), target, "", "") for target in ("entailment", "neutral", "neutral")]
    test = [Example((), label, label, "") for label in ("neutral", "entailment", "entailment")]
    assert data.majority(TASKS["mnli"], train, test) == {"accuracy": 1 / 3}
    right = [data.correctness(TASKS["mnli"], output, test[0]) for output in ("neutral ", "neutra")]
    assert right == [1, 0]
    for name, gold in (("stsb", 1.0), ("caption", ("1.0",))):
        assert data.correctness(TASKS[name], "1.0", Example((), "1.0", gold, "")) is None
    examples = [
        Example((), "", ["yes"] * count + ["no"] * (10 - count), "", kind=kind)
        for count, kind in ((10, "yes/no"), (9, "yes/no"), (7, "other"))
    ]
    scores = data.score(TASKS["vqa"], ["yes", "no", "No"], examples)
    assert scores == pytest.approx({"accuracy": (1 + 0.3 + 0.9) / 3, "yes/no": 0.65, "other": 0.9})


@pytest.mark.parametrize("name", ["mnli", "mrpc", "cola", "stsb", "vqa", "caption"])
def test_a_checkpoint_can_hold_every_metric(name):
    """torch.load refuses numpy's numbers with weights_only=True, which a resumed run relies on."""
    task = TASKS[name]
    words = task.label_words() or ["a cat", "a dog"]
    golds = [[word] for word in words] if task.is_visual else map(float, range(len(words)))
    examples = [Example((), *pair, "") for pair in zip(words, golds, strict=True)]
    file = io.BytesIO()
    torch.save(data.score(task, words, examples), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == set(task.metrics) | (
        {"bleu4"} if name == "caption" else set()
    )


# ---- metrics of image tasks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "output, answers, expected",
    [
        # The answers are the same: no normalisation, except for newlines, tabs and outer spaces.
        ("yes", ["yes"] * 10, 1),
        ("Yes", ["yes"] * 10, 0),
        (" yes\n", ["yes"] * 10, 1),
        ("new\tyork", ["new york"] * 10, 1),
        ("yes", [" yes", "yes\n"] * 5, 1),
        ("the cat", ["cat"] * 10, 0),
        ("2", ["two"] * 10, 0),
        ("dont", ["don't"] * 10, 0),
        ("cat", ["cat", "a cat", "The Cat", *["dog"] * 7], 0.9),
        ("", ["cat"] * 4 + ["x"] * 6, 0),
    ],
)
def test_vqa_accuracy(output, answers, expected):
    assert data.vqa_accuracy(output, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    "output, same, different",
    [
        ("2", "two", "to"),
        ("none", "0", "no"),
        ("Zero", "none", "nil"),
        ("ten", "10", "1"),
        ("three four five six", "3 4 5 6", "3 4 5"),
        ("seven eight nine one", "7 8 9 1", "7 8 9 0"),
        ("11", "11", "eleven"),
        ("a an the cat", "cat", "a"),
        ("the", "", "they"),
        # A mark becomes a space, or nothing: beside a space, or for a comma between digits.
        ("t-shirt", "t shirt", "tshirt"),
        ("t- shirt", "t shirt", "t  -shirts"),
        ("hot-dog -bun", "hotdog bun", "hot dog bun"),
        ("red,blue", "red blue", "redblue"),
        ("red,blue, green", "redblue green", "red blue green"),
        ("2,000", "2000", "2 000"),
        ("1,000-2,000", "10002000", "1000 2000"),
        ('"stop!"', "stop", "stop !!x"),
        ("b_c\\d=e+f>g<h@i`j;k/l", "b c d e f g h i j k l", "bcdefghijkl"),
        ("{[(why?)]}", "why", "(why)x"),
        ("10:30", "10:30", "10 30"),
        ("50%", "50%", "50"),
        ("#1", "#1", "1"),
        ("dogs'", "dogs'", "dogs"),
        # A period goes unless a digit follows. At most 32 go.
        ("u.s.a.", "usa", "u s a"),
        ("3.", "3", "3.0"),
        ("3.5", "3.5", "35"),
        (".5", ".5", "5"),
        ("1.b", "1b", "1 b"),
        ("b" + 32 * ".", "b", "b0"),
        ("b" + 33 * ".", "b" + 33 * ".", "b"),
        # Contractions get their apostrophe. One entry of the official table is the wrong way round.
        ("dont", "don't", "do nt"),
        ("Hes", "he's", "he"),
        ("couldnt've", "couldn'tve", "couldntve"),
        ("y'all'dve", "yall'd've", "yalldve"),
        ("its", "its", "it's"),
        ("im", "im", "i'm"),
        ("twas", "'twas", "was"),
        ("somebody'd", "somebodyd", "somebody"),
        ("5 oclock", "five o'clock", "five clock"),
        ("CAF\u00c9", "caf\u00e9", "cafe"),
    ],
)
def test_vqa_normalisation(output, same, different):
    """Trap 26, worked by hand from the rules of the official evaluator."""
    assert data.vqa_accuracy(output, [same] * 4 + ["x"] * 6) == 1
    assert data.vqa_accuracy(output, [different] * 4 + ["x"] * 6) == 0


@pytest.mark.parametrize("count", [2, 3, 10])
def test_vqa_accuracy_leaves_one_annotator_out(count):
    """Trap 25: min(1, matches / 3) among the others, averaged; not among all."""
    for matches in range(count + 1):
        answers = ["cat"] * matches + ["dog"] * (count - matches)
        others = [answers[:i] + answers[i + 1 :] for i in range(count)]
        expected = statistics.mean(min(1, part.count("cat") / 3) for part in others)
        assert data.vqa_accuracy("cat", answers) == pytest.approx(expected)
    assert [data.vqa_accuracy(text, ["cat"]) for text in ("cat", "dog")] == [1, 0]
    # The official tables have 114 words that can match in lower case and change, and 12 numbers.
    assert len(data.CORRECTIONS) == 114 + 12


def test_cider_and_bleu_equal_pycocoevalcap():
    """Trap 27: no, few and many words, 1 to 5 references, and one image alone, which scores 0."""
    coco = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    rng = np.random.default_rng(0)
    words = "a the man dog cat on with red table sits runs of".split()
    for images in [1, 2, 3, 10, 40] * 2:
        outputs = [list(rng.choice(words, rng.integers(14))) for _ in range(images)]
        golds = [
            [list(rng.choice(words, rng.integers(1, 14))) for _ in range(rng.integers(1, 6))]
            for _ in range(images)
        ]
        outputs[-1] = golds[-1][0]

        hypotheses = {i: [" ".join(output)] for i, output in enumerate(outputs)}
        references = {i: [" ".join(gold) for gold in image] for i, image in enumerate(golds)}
        expected, _ = coco.compute_score(references, hypotheses)
        assert data.cider(outputs, golds) == pytest.approx(expected, abs=1e-9)
        assert images > 1 or expected == 0
        bleu = BleuScorer(n=4)
        for i in range(images):
            bleu += (hypotheses[i][0], references[i])
        expected = bleu.compute_score(option="closest")[0][3]
        assert data.bleu4(outputs, golds) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "text, words",
    [
        ("A man's dog, don't run!", "a man 's dog do n't run"),
        ("The T-shirt\u2014it\u2019s 2,000 miles", "the t-shirt it 's 2,000 miles"),
        ("Two dogs; one sits -- at 10:30 a.m.", "two dogs one sits at 10:30 a.m."),
        ('"Stop"/go ... a phone,and a bag .', "stop go a phone and a bag"),
        ("I cannot see B&W and/or 50% o'clock", "i can not see b&w and/or 50 % o'clock"),
        ("'quoted' dogs' Caf\u00e9", "quoted dogs caf\u00e9"),
        ("...", ""),
    ],
)
def test_words_of_a_caption(text, words):
    assert data.tokenize_caption(text) == words.split()


# ---- image tasks: files; predictions -------------------------------------------------------------

QUESTIONS = "OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "mscoco_{}_annotations.json"
TRAIN = [
    (9000, 9, "What is this? ", ["cat"] * 6 + ["dog"] * 3 + ["bird"]),
    (9001, 9, "Is it a caf\u00e9?", ["yes"] * 10),
    (9002, 25, "", ["", " "] + 8 * ["\u732b "]),
    (9003, 25, "Why?", 10 * [""]),
]
VAL = [(42000, 42, "How many?", ["2", "3"]), (42001, 30, "Where?", ["here"])]


def write_vqa(folder, version="v2_", train=TRAIN, val=VAL):
    """Rows are (question id, image id, question, answers). The two files have different orders."""
    for subset, rows in (("train2014", train), ("val2014", val)):
        questions = [
            {"image_id": image, "question": text, "question_id": key}
            for key, image, text, _ in rows
        ]
        annotations = [
            {
                "question_type": "what [",
                "answer_type": "other",
                "question_id": key,
                "answers": [{"answer_id": 1, "answer": answer} for answer in answers],
            }
            for key, _, _, answers in reversed(rows)
        ]
        head = {"info": {"year": 2017, "a": []}, "license": [], "data_subtype": subset}
        write(folder / (version + QUESTIONS.format(subset)), {**head, "questions": questions})
        write(folder / (version + ANNOTATIONS.format(subset)), {"annotations": annotations, **head})


def karpathy(*images):
    """Return dataset_coco.json of images: (subset, image id, split, captions)."""
    rows = [
        {
            "filepath": subset,
            "cocoid": key,
            "split": split,
            "sentences": [{"tokens": text.split(), "raw": text} for text in captions],
        }
        for subset, key, split, captions in images
    ]
    return {"images": rows, "dataset": "coco"}


IMAGES = karpathy(
    ("train2014", 9, "train", ["A cat.", " A caf\u00e9 \n"]),
    ("val2014", 42, "restval", ["Dogs."]),
    ("train2014", 25, "val", ["A dog.", "Why."]),
    ("train2014", 26, "val", ["B."]),
    ("val2014", 30, "test", ["Why.", "So."]),
)


@pytest.mark.parametrize("place", ["VQAv2", "vl/VQAv2", "vqa", "."])
def test_vqa_files(place, tmp_path):
    write_vqa(tmp_path / place)
    splits = official("vqa", tmp_path)
    assert sizes(splits) == {"train": 4, "validation": 2}
    first, second, third, fourth = splits["train"]
    assert (first.source, first.image) == ("vqa: What is this?", ("train2014", "9"))
    assert (first.index, first.target, first.gold) == ("9000", "cat", tuple(TRAIN[0][3]))
    assert first.targets == (("cat", 1), ("dog", pytest.approx(0.9)), ("bird", pytest.approx(0.3)))
    assert second.source == "vqa: Is it a caf\u00e9?"
    assert (third.parts, third.targets) == (("vqa:", ""), (("\u732b", 1),))
    assert third.gold[-1] == "\u732b " and (fourth.target, fourth.targets) == ("", ())
    two, one = splits["validation"]
    assert (two.image, two.target) == (("val2014", "42"), "2")
    assert two.targets == (("2", pytest.approx(1 / 6)), ("3", pytest.approx(1 / 6)))
    assert one.targets == (("here", 1),) and (first.kind, one.kind) == ("other", "other")


@pytest.mark.parametrize("place", ["VQAv2", "COCO", "."])
def test_karpathy_splits_of_vqa(place, tmp_path):
    """Both files are pooled and restval trains. OK-VQA has official splits only."""
    write_vqa(tmp_path / "VQAv2")
    write_vqa(tmp_path / "OKVQA", version="")
    assert data.make_splits(TASKS["vqa"], tmp_path, "paper") == official("vqa", tmp_path)
    write(tmp_path / place / "dataset_coco.json", IMAGES)
    assert indices(data.make_splits(TASKS["vqa"], tmp_path, "paper")) == {
        "train": ["9000", "9001", "42000"],
        "validation": ["9002", "9003"],
        "test": ["42001"],
    }
    splits = data.make_splits(TASKS["okvqa"], tmp_path, "paper")
    assert splits == official("okvqa", tmp_path)
    assert splits["train"][0].source == "okvqa: What is this?"


def test_gqa_files(tmp_path):
    entry = {
        "semantic": [{"argument": "x [1]"}],
        "question": " Is it red?",
        "isBalanced": True,
        "imageId": "n123",
        "groups": {"global": None},
        "answer": "yes",
        "types": {},
    }
    entries = {"0201": entry, "02": {**entry, "answer": "no", "imageId": 7}, "3": entry}
    for name in ("train", "val"):
        write(tmp_path / f"GQA/{name}_balanced_questions.json", entries)
    splits = data.make_splits(TASKS["gqa"], tmp_path)
    first, second, third = splits["train"]
    assert first.gold is third.gold and first.targets is third.targets
    assert first.parts[0] is third.parts[0]
    assert (list(splits), first.parts) == (["train", "validation"], ("gqa:", "Is it red?"))
    assert (first.index, first.image, first.target) == ("0201", ("gqa", "n123"), "yes")
    assert (second.index, second.image, second.gold) == ("02", ("gqa", "7"), ("no",))
    write(tmp_path / "GQA/testdev_balanced_questions.json", entries)
    assert indices(data.make_splits(TASKS["gqa"], tmp_path))["test"] == ["0201", "02", "3"]


def test_caption_files(tmp_path):
    """One example for each image. Karpathy's file alone is enough for the paper's protocol."""
    write(tmp_path / "COCO/dataset_coco.json", IMAGES)
    splits = data.make_splits(TASKS["caption"], tmp_path)
    assert indices(splits) == {"train": ["9", "42"], "validation": ["25", "26"], "test": ["30"]}
    first, second = splits["train"]
    assert (first.source, first.image) == ("caption:", ("train2014", "9"))
    assert (first.target, first.gold) == ("A cat.", ("A cat.", " A caf\u00e9 \n"))
    (one, weight), (two, other_weight) = first.targets
    assert (one, two) == ("A cat.", "A caf\u00e9") and weight == other_weight > 0
    for subset, keys in (("train2014", (9, 25)), ("val2014", (42, 43))):
        rows = [{"image_id": key, "caption": f"{i}. {key} \n"} for i in range(2) for key in keys]
        path = tmp_path / f"COCO/captions_{subset}.json"
        write(path, {"images": [{"id": 9}], "annotations": rows})
    assert data.make_splits(TASKS["caption"], tmp_path) == splits
    train = [row for row in IMAGES["images"] if row["split"] in ("train", "restval")]
    write(tmp_path / "COCO/dataset_coco.json", {"images": train})
    with pytest.raises(UserError, match="COCO: found no examples for validation"):
        data.make_splits(TASKS["caption"], tmp_path)
    splits = official("caption", tmp_path)
    assert indices(splits) == {"train": ["9", "25"], "validation": ["42", "43"]}
    example = splits["validation"][0]
    assert (example.image, example.gold[1]) == (("val2014", "42"), "1. 42 \n")


def snli(label="neutral", key="Flickr30K_ID", image="1"):
    return {"gold_label": label, "sentence2": " A bowl.", "pairID": "1.jpg#0", key: image}


def test_snlive_files(tmp_path):
    """Three spellings of the image's key; rows whose label is "-" are left out."""
    rows = [
        snli(),
        snli("-"),
        snli("entailment", "Flickr30kID", 2),
        "",
        snli("contradiction", "Flikr30kID", "3.jpg"),
    ]
    for name in ("train", "dev", "test"):
        write(tmp_path / f"SNLI-VE/snli_ve_{name}.jsonl", *rows)
    examples = data.make_splits(TASKS["snlive"], tmp_path)["test"]
    assert [example.image for example in examples] == [("flickr30k", i) for i in "123"]
    assert [example.target for example in examples] == ["neutral", "entailment", "contradiction"]
    assert (examples[0].source, examples[0].index) == ("snlive hypothesis: A bowl.", "1.jpg#0")
    scores = data.score(TASKS["snlive"], ["neutral", "neutral", ""], examples)
    assert scores == {"accuracy": pytest.approx(1 / 3)}


@pytest.mark.parametrize("indent", [None, 1])
def test_json_is_read_in_pieces(indent, tmp_path, monkeypatch):
    """All entries come through, wherever a piece ends."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list('ab"\\{}[]:, \u00e9'), rng.integers(30))) for _ in range(300)]
    entries = [{"id": i, "text": text, "more": [{"x": [text]}]} for i, text in enumerate(texts)]
    content = {"first": [], "n": 12.5, "list": entries, "name": "a, b: [c]", "empty": {}}
    path = write(tmp_path / "a.json", json.dumps(content, indent=indent) + "\n")
    for longest in (400, 523, data.LONGEST_VALUE):
        monkeypatch.setattr(data, "LONGEST_VALUE", longest)
        found = [tuple(entry) for entry in data.read_json(path, SimpleNamespace(), "list")]
        assert found == [("list", entry) for entry in entries]


def test_submissions(tmp_path):
    """CoLA's file has a header only here. The questions of test-dev are about test2015's images."""
    for file in ("CoLA/test", "WNLI/test", "MNLI/test_matched", "MNLI/test_mismatched"):
        header = "index\tsentence\tsentence1\tsentence2"
        write(tmp_path / f"{file}.tsv", header, "7\ta\ta\ta", f"8\t{file}\t{file}\t{file}")
    for subset in ("test2015", "test-dev2015"):
        questions = [{"image_id": 7, "question": subset, "question_id": i} for i in (7, 8)]
        write(tmp_path / f"VQAv2/v2_{QUESTIONS.format(subset)}", {"questions": questions})
    found = {}
    for name in ("cola", "wnli", "mnli", "vqa"):
        for file, examples in data.read_submission(TASKS[name], tmp_path).items():
            assert {(e.target, e.gold, e.targets) for e in examples} == {("", None, ())}
            assert [example.index for example in examples] == ["7", "8"]
            found[file] = (examples[1].parts[1], examples[1].image)
    assert found == {
        "CoLA.tsv": ("CoLA/test", None),
        "WNLI.tsv": ("WNLI/test", None),
        "MNLI-m.tsv": ("MNLI/test_matched", None),
        "MNLI-mm.tsv": ("MNLI/test_mismatched", None),
        "test2015-VQAv2.json": ("test2015", ("test2015", "7")),
        "test-dev2015-VQAv2.json": ("test-dev2015", ("test2015", "7")),
    }


@pytest.mark.parametrize(
    "name, outputs, expected, unknown",
    [
        ("cola", ["acceptable", " unacceptable", "?"], ["1", "0", "0"], 1),
        ("stsb", ["5.2", "2.4", "?"], ["5.000", "2.400", "0.000"], 2),
        ("mnli", ["neutral", "contradiction", ""], ["neutral", "contradiction", "entailment"], 1),
    ],
)
def test_predictions_of_text_tasks(name, outputs, expected, unknown, tmp_path):
    """The format of the GLUE server."""
    examples = [Example((), "", None, index) for index in ("4", "5", "60")]
    path = tmp_path / data.predictions_name(TASKS[name], "test")
    assert path.name == f"{TASKS[name].folder}-test.tsv"
    assert data.write_predictions(path, TASKS[name], outputs, examples) == unknown
    rows = ["index\tprediction", *map("\t".join, zip(("4", "5", "60"), expected, strict=True)), ""]
    assert path.read_text() == "\n".join(rows)


@pytest.mark.parametrize(
    "name, index, id_key, key",
    [
        ("vqa", 60, "question_id", "answer"),
        ("okvqa", 60, "question_id", "answer"),
        ("caption", 60, "image_id", "caption"),
        ("gqa", "060", "questionId", "prediction"),
        ("snlive", "1#6", "pairID", "gold_label"),
    ],
)
def test_predictions_of_image_tasks(name, index, id_key, key, tmp_path):
    """The formats of the official evaluators."""
    path = tmp_path / data.predictions_name(TASKS[name], "test")
    assert path.name == f"test-{TASKS[name].folder}.json"
    example = Example((), "", None, str(index))
    unknown = data.write_predictions(path, TASKS[name], ["\u00e9"], [example])
    assert json.loads(path.read_text()) == [{id_key: index, key: "\u00e9"}]
    assert unknown == (name == "snlive")


# ---- mistakes ------------------------------------------------------------------------------------


def test_mnli_keeps_its_mismatched_split_and_needs_test_rows(tmp_path):
    header, row = "index\tsentence1\tsentence2", "0\ta\tb"
    for name in ("train", "dev_matched", "dev_mismatched"):
        write(
            tmp_path / f"MNLI/{name}.tsv",
            "\n".join([f"{header}\tgold_label", *[f"{row}\tneutral"] * 4]),
        )
    splits = data.make_splits(TASKS["mnli"], tmp_path)
    sizes = {name: len(examples) for name, examples in splits.items()}
    assert sizes == {"train": 4, "validation": 2, "mismatched": 4, "test": 2}
    for name in ("test_matched", "test_mismatched"):
        write(tmp_path / f"MNLI/{name}.tsv", header)
    with pytest.raises(UserError, match="test_matched.tsv: .* found fewer than 2 examples"):
        data.read_submission(TASKS["mnli"], tmp_path)


RTE, ENTAILED = "RTE/train.tsv", "0\ta\tb\tentailment"
STSB, SNLI = "STS-B/train.tsv", "SNLI-VE/snli_ve_train.jsonl"
SCORES = "sentence1\tsentence2\tscore\na\tb\t"
QUESTION = {"image_id": 9, "question": "Why?", "question_id": 1}
ASKED = "VQAv2/v2_" + QUESTIONS.format("train2014")
ANSWERED = "VQAv2/v2_" + ANNOTATIONS.format("train2014")


@pytest.mark.parametrize(
    "task, file, content, message",
    [
        ("rte", "RTE/dev.tsv", f"{PAIR_HEADER}\n{ENTAILED}", "line 2: found fewer than 2 examples"),
        ("rte", RTE, f"{PAIR_HEADER}\n\n0\ta\tb", "line 3: found 3 columns, expected 4"),
        (
            "rte",
            RTE,
            f"{PAIR_HEADER}\n0\ta\tb\tyes",
            "line 2: found label 'yes', expected one of ent",
        ),
        ("rte", RTE, "sentence1\tsentence2\na\tb", "found no 'label' among sentence1, sentence2"),
        (
            "rte",
            RTE,
            PAIR_HEADER.encode() + b"\n0\ta\t\xff\tb",
            "line 2: 'utf-8' codec can't decode",
        ),
        ("rte", RTE, None, "No such file or directory"),
        ("stsb", STSB, f"{SCORES}5.1", "line 2: found score '5.1', expected a number from 0 to 5"),
        ("stsb", STSB, f"{SCORES}-.1", "found score '-.1'"),
        (
            "qqp",
            "QQP/train.tsv",
            f"{QQP_HEADER}\n0\t1\t2\ta\tb\t1\t1",
            "found 7 columns, expected 6",
        ),
        ("cb", "CB/train.jsonl", '{"label": "neutral"', "line 1: not JSON: Expecting"),
        ("cb", "CB/train.jsonl", '{"label": "neutral"}', "line 1: found no 'hypothesis' among its"),
        ("cb", "CB/train.jsonl", "[]", "line 1: list indices must be integers"),
        ("cb", "CB/train.jsonl", '{"hypothesis": 1, "premise": ""}', "line 1: 'int' object"),
        ("snlive", SNLI, snli(key="image"), "line 1: found no 'Flikr30kID' among its"),
        (
            "vqa",
            ASKED,
            json.dumps({"questions": [QUESTION]})[:-2],
            "questions[1]: not JSON: Expecting",
        ),
        (
            "vqa",
            ASKED,
            {"questions": [QUESTION, {}]},
            "questions[1]: found no 'image_id' among its",
        ),
        (
            "vqa",
            ASKED,
            {"questions": [{**QUESTION, "question_id": 3}]},
            "questions[0]: found no 'annotation of question 3' among its entries",
        ),
        ("vqa", ANSWERED, None, "No such file or directory"),
        (
            "vqa",
            ANSWERED,
            {"annotations": [{"question_id": 1}]},
            "annotations[0]: found no 'answers'",
        ),
        ("vqa", "dataset_coco.json", karpathy(("train2014", 9, "dev", [])), "[0]: found no 'dev'"),
        (
            "vqa",
            "dataset_coco.json",
            karpathy(("train2014", 8, "val", [])),
            "no ('train2014', '9')",
        ),
        (
            "gqa",
            "GQA/train_balanced_questions.json",
            {"7": {"imageId": 1}},
            "7[0]: found no 'answer'",
        ),
    ],
)
def test_a_wrong_file_is_named_with_the_place(task, file, content, message, tmp_path):
    """All other files are right."""
    for name in ("rte", "stsb", "qqp", "cb"):
        write_rows(name, tmp_path / TASKS[name].folder, 4)
    rows = [(key, 9, "Why?", ["so"]) for key in (1, 2)]
    write_vqa(tmp_path / "VQAv2", train=rows, val=rows)
    entry = {"question": "a", "imageId": 1, "answer": "b"}
    for split, name in (("train", "train"), ("val", "dev")):
        write(tmp_path / f"SNLI-VE/snli_ve_{name}.jsonl", snli(), snli())
        write(tmp_path / f"GQA/{split}_balanced_questions.json", {"1": entry, "2": entry})
    data.make_splits(TASKS[task], tmp_path)

    path = tmp_path / file
    if content is None:
        path.unlink()
    else:
        write(path, content)
    with pytest.raises(UserError) as caught:
        data.make_splits(TASKS[task], tmp_path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_what_is_not_there(tmp_path):
    for name, folder in (("rte", "RTE"), ("vqa", "VQAv2")):
        with pytest.raises(UserError, match=f"{tmp_path}/{folder}/.*: .Errno 2. No such file"):
            official(name, tmp_path)
    with pytest.raises(UserError, match="task 'rtf' is unknown; the known ones are cola, sst2"):
        data.find_tasks("rte,rtf")
    with pytest.raises(UserError, match="gqa: found no unlabelled test data"):
        data.read_submission(TASKS["gqa"], tmp_path)
    data.download(TASKS["imdb"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_mistakes_of_the_user_end_in_one_line_and_bugs_do_not(capsys):
    def fail(error):
        raise error

    for error in (UserError("a\n b"), OSError("a b"), torch.OutOfMemoryError("a b"), MemoryError()):
        with pytest.raises(SystemExit, match="2"):
            data.run(functools.partial(fail, error))
        line = "error: a b\n" if str(error) else "error: out of memory\n"
        assert capsys.readouterr().err == line
    with pytest.raises(NameError), data.reading("place"):
        data.run(functools.partial(fail, NameError()))
    with pytest.raises(UserError, match="^place: a b$"), data.reading("place"):
        fail(ValueError("a b"))


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "old")
    monkeypatch.setattr(data.os, "fsync", lambda number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.write_file(path, b"new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    data.write_file(path, b"new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


# ---- downloads -----------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Of a file whose name begins with "cut", the connection ends after three bytes."""

    def copyfile(self, source, outputfile):
        is_cut = self.path.startswith("/cut")
        outputfile.write(source.read(3 if is_cut else -1))


@pytest.fixture
def server(tmp_path):
    """An address, and the folder of the files there."""
    handler = functools.partial(Handler, directory=tmp_path / "web")
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http_server.serve_forever, args=[0.02], daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}/", tmp_path / "web"
    http_server.shutdown()


def zipped(names):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        for name in names.split():
            file.writestr(name, "\n".join([PAIR_HEADER, *[ENTAILED] * 3]))
    return memory.getvalue()


def served(name, urls):
    task = copy.copy(TASKS[name])
    task.urls = urls
    return task


WHOLE = zipped("RTE/train.tsv RTE/dev.tsv RTE/test.tsv RTE/original/x.tsv ../out.tsv")


def test_download_of_a_zip(server, tmp_path):
    """The files that are read are unpacked, and what is there is not fetched again."""
    address, web = server
    archive = write(web / "RTE.zip", WHOLE)
    task = served("rte", {"official.zip": f"{address}RTE.zip"})
    data.download(task, tmp_path / "new")
    found = sorted(path.name for path in tmp_path.rglob("*.tsv"))
    assert found == ["dev.tsv", "test.tsv", "train.tsv"]
    assert len(list((tmp_path / "new/RTE").iterdir())) == 3
    archive.unlink()
    data.download(task, tmp_path / "new")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<html>", "not a zip"),
        (None, "HTTP Error 404"),
        (zipped("RTE/train.tsv"), "found no .*RTE/dev.tsv"),
        (WHOLE.replace(b"entailment", b"entailmenx"), "Bad CRC-32"),
    ],
)
def test_broken_downloads(content, message, server, tmp_path):
    address, web = server
    if content:
        write(web / "RTE.zip", content)
    with pytest.raises(UserError, match=message):
        data.download(served("rte", {"official.zip": f"{address}RTE.zip"}), tmp_path)


def test_a_connection_that_ends_early_leaves_no_file(server, tmp_path):
    """The next try finds nothing of the file and fetches it again."""
    address, web = server
    write(web / "cut.tsv", PAIR_HEADER)
    task = served("rte", {"train.tsv": f"{address}cut.tsv"})
    for _ in range(2):
        with pytest.raises(UserError, match=rf"got only 3 out of {len(PAIR_HEADER)} bytes"):
            data.download(task, tmp_path)
        assert not (tmp_path / "RTE/train.tsv").exists()


def test_mrpc_from_its_three_sources(server, tmp_path, capsys):
    """GLUE's list is the validation set; without it, 408 others are. train.tsv comes first."""
    address, web = server
    urls = TASKS["mrpc"].urls.items()
    task = served("mrpc", {name: f"{address}{url.split('/')[-1]}" for name, url in urls})
    rows = [f"1\t{i}\t{i + 1}\ta\tb{i}" for i in range(500)]
    for name in ("train", "test"):
        write(web / f"msr_paraphrase_{name}.txt", MRPC_HEADER, *rows)
    ids = write(web / "mrpc_dev_ids.tsv", "2\t3", "5\t6", "1\t3", "")
    data.download(task, tmp_path)
    ids.unlink()
    data.download(task, tmp_path)
    found = indices(official("mrpc", tmp_path) | data.read_submission(TASKS["mrpc"], tmp_path))
    every = [*map(str, range(500))]
    assert found == {
        "train": [index for index in every if index not in ("2", "5")],
        "validation": ["2", "5"],
        "MRPC.tsv": every,
    }
    assert "note: " not in capsys.readouterr().err
    ids = write(tmp_path / "MRPC/mrpc_dev_ids.tsv", "2\t4")
    for protocol in ("official", "paper"):
        with pytest.raises(UserError, match="MRPC: found no examples for validation"):
            data.make_splits(TASKS["mrpc"], tmp_path, protocol)

    ids.unlink()
    found = indices(official("mrpc", tmp_path))
    assert [int(index) for index in found["validation"]] == sorted(shuffled(500)[:408])
    assert [int(index) for index in found["train"]] == sorted(shuffled(500)[408:])
    assert re.fullmatch("note: .*mrpc_dev_ids.tsv is not there: 408 .*\n", capsys.readouterr().err)
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path / "MRPC" / file, MRPC_HEADER, *rows[:3])
    assert sizes(official("mrpc", tmp_path)) == {"train": 3, "validation": 3}
