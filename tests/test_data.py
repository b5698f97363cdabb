"""GLUE files, formats, splits, batches and metrics: against the real files, scikit-learn, scipy and rows worked by hand."""
import dataclasses
import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import data
from conftest import ROOT, run
from data import TASKS, UserError
from t5 import Tokenizer


def write(folder, name, *lines, encoding="utf-8"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes("\n".join(lines).encode(encoding) + b"\n")


# ------------------------------------------------------------------------------------------------ formats, by hand

def row_of(task, tmp_path, *lines, split="train"):
    write(tmp_path / task.folder, task.files.get(split, "train.tsv"), *lines)
    return data.read_split(task, tmp_path, split)[0]


@pytest.mark.parametrize("name, lines, source, target", [
    ("cola", ["gj04\t1\t\tThe sailors rode the breeze.", "gj04\t0\t*\tThe more."], "cola sentence: The sailors rode the breeze.", "acceptable"),
    ("sst2", ["sentence\tlabel", "hide new secretions \t0"], "sst2 sentence: hide new secretions", "negative"),
    ("mrpc", ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t2\t3\tHe said "no.\tHe "refused'],
     'mrpc sentence1: He said "no. sentence2: He "refused', "equivalent"),
    ("qqp", ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "5\t1", "6\t1\t2\tWhy?\tHow?\t0"], "qqp question1: Why? question2: How?", "not_duplicate"),
    ("stsb", ["index\tgenre\tsentence1\tsentence2\tscore", "0\tnews\tA plane.\tA jet.\t3.667"], "stsb sentence1: A plane. sentence2: A jet.", "3.6"),
    ("mnli", ["index\tsentence1\tsentence2\tlabel1\tgold_label", "0\tI sat.\tI stood.\tneutral\tcontradiction"],
     "mnli hypothesis: I stood. premise: I sat.", "contradiction"),
    ("qnli", ["index\tquestion\tsentence\tlabel", "0\tWho?\tHe did.\tentailment"], "qnli question: Who? sentence: He did.", "entailment"),
    ("rte", ["index\tsentence1\tsentence2\tlabel", "0\tA b.\tC d.\tnot_entailment\r"], "rte sentence1: A b. sentence2: C d.", "not_entailment"),
    ("wnli", ["index\tsentence1\tsentence2\tlabel", "0\tA b.\tC d.\t1"], "wnli sentence1: A b. sentence2: C d.", "entailment"),
])
def test_formats(name, lines, source, target, tmp_path):
    """One row of each official file -> T5's own text; quotes, BOM, CR and short QQP lines met."""
    example = row_of(TASKS[name], tmp_path, *lines)
    assert (example.source, example.target) == (source, target)


@pytest.mark.parametrize("name, path, content, source, target, index", [
    ("cb", "CB/train.jsonl", '{"premise": "It \u2019s so.", "hypothesis": "It is", "label": "neutral", "idx": 0}\n',
     "cb hypothesis: It is premise: It \u2019s so.", "neutral", "0"),
    ("boolq", "BoolQ/train.jsonl", '\n{"question": "is it", "passage": "It -- it is.", "idx": 9, "label": true}',
     "boolq passage: It -- it is. question: is it", "True", "0"),
    ("imdb", "aclImdb/train/pos/0_9.txt", "Good.<br />Really\tgood.\n", "imdb sentence: Good.<br />Really\tgood.", "positive", "0"),
    ("paws", "PAWS/train.tsv", "id\tsentence1\tsentence2\tlabel\n1\tIn Paris , he .\tHe , in Paris .\t0\n",
     "paws sentence1: In Paris , he . sentence2: He , in Paris .", "not_equivalent", "0"),
    ("trec", "TREC/train_5500.label", b"HUM:ind Who wrote \xf0the : book ?\n", "trec question: Who wrote \xf0the : book ?", "human", "0"),
])
def test_formats_of_the_transfer_tasks(name, path, content, source, target, index, tmp_path):
    """SuperGLUE's JSON lines, IMDB's folder of texts, PAWS' TSV, TREC's Latin-1 labels."""
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    if name == "imdb":                                           # there is a folder for each label
        (tmp_path / "aclImdb/train/neg").mkdir()
        (tmp_path / "aclImdb/train/neg/0_1.txt").write_text("Bad.")
    example = data.read_split(TASKS[name], tmp_path, "train")[-1]
    index = "1" if name == "imdb" else index
    assert (example.source, example.target, example.index) == (source, target, index)


def test_wrong_files_of_the_transfer_tasks(tmp_path):
    for path, content, words in (("CB/train.jsonl", '{"premise": "a", "hypothesis": "b", "label": "maybe"}', "line 1: found label 'maybe', expected one of entailment"),
                                 ("CB/train.jsonl", '{"premise": "a", "label": "neutral"}', "line 1: found no hypothesis in"),
                                 ("BoolQ/train.jsonl", '{"passage": "a", "question": "b", "label": null}', "line 1: found label 'None', expected label as a string"),
                                 ("BoolQ/train.jsonl", '{"passage": "a", "question": "b", "label": true}\n{', "line 2: not JSON"),
                                 ("TREC/train_5500.label", "WHO:ind Who ?", "line 1: found label 'WHO', expected one of ABBR")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(content)
        task = next(task for task in TASKS.values() if path.startswith(task.folder))
        with pytest.raises(UserError, match=words):
            data.read_split(task, tmp_path, "train")
    with pytest.raises(UserError, match="task trec has no split submission; it has train, validation"):
        data.read_split(TASKS["trec"], tmp_path, "submission")


def write_official(task, folder, split, count):
    """`count` rows that all differ, in the official format of one of a task's files."""
    label, path = list(task.labels or {"2.5": 0}), folder / task.folder / task.files[split]
    rows = [{**{column: f"{split} {field} {i}" for field, column in task.fields.items()}, task.column: label[i % len(label)]} for i in range(count)]
    if path.suffix == ".jsonl":
        lines = [json.dumps({**row, "label": {"true": True, "false": False}.get(row["label"], row["label"])}) for row in rows]
    elif path.suffix == ".label":
        lines = [f"{row['label']}:x {row['question']}" for row in rows]
    elif path.suffix == ".tsv":
        columns = list(rows[0]) if task.header else [None, 1, None, 3]
        lines = ["\t".join(map(str, columns))] * task.header + ["\t".join(str(row.get(column, "x")) for column in columns) for row in rows]
    else:
        for i, row in enumerate(rows):
            write(path / row["label"], f"{i}_1.txt", row["text"])
        return
    write(path.parent, path.name, *lines)


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint(name, tmp_path):
    """Every task, both schemes, all rows or a few drawn by several seeds: nothing twice, nothing lost."""
    task, files = TASKS[name], [split for split in TASKS[name].files if not split.startswith("submission")]
    for split in files:
        write_official(task, tmp_path, split, 30 if split == "train" else 20)
    for scheme in ("paper", "official"):
        splits = data.make_splits(task, tmp_path, scheme)
        assert splits.keys() == set(files) | ({"test"} if scheme == "paper" else set())
        whole = [e.source for examples in splits.values() for e in examples]
        assert len(whole) == len(set(whole)) == 30 + 20 * (len(files) - 1)
    drawn = {}
    for seed in range(5):
        drawn[seed] = [{e.source for e in data.draw_rows(splits["train"], count, seed)} for count in (4, 16, 99)]
        assert [len(part) for part in drawn[seed]] == [4, 16, 30] and drawn[seed][0] < drawn[seed][1] < drawn[seed][2]
        assert not drawn[seed][2] & {e.source for e in splits["validation"]}
    assert drawn[0][0] != drawn[1][0]


def test_stsb_targets():
    """26 strings in steps of 0.2."""
    assert [data.stsb_target(x) for x in (0, 3.8, 3.667, 4.75, 2.5, 5)] == ["0.0", "3.8", "3.6", "4.8", "2.4", "5.0"]
    assert len({data.stsb_target(x / 1000) for x in range(5001)}) == 26


def test_unlabelled_cola_has_a_header(tmp_path):
    write(tmp_path / "CoLA", "test.tsv", "index\tsentence", "7\tBill is here.")
    example = data.read_split(TASKS["cola"], tmp_path, "submission")[0]
    assert (example.source, example.index, example.target) == ("cola sentence: Bill is here.", "7", "")


def test_real_files(shared_glue):
    """Row counts of the real files, and both split schemes on them."""
    sizes = lambda task, scheme: {k: len(v) for k, v in data.make_splits(TASKS[task], shared_glue, scheme).items()}
    assert sizes("rte", "official") == {"train": 2490, "validation": 277}
    assert sizes("rte", "paper") == {"train": 2490, "validation": 138, "test": 139}
    assert sizes("stsb", "official") == {"train": 5749, "validation": 1500}
    assert sizes("stsb", "paper") == {"train": 5749, "validation": 750, "test": 750}
    assert sizes("mrpc", "official") == {"train": 3668, "validation": 408}
    assert len(data.read_split(TASKS["rte"], shared_glue, "submission")) == 3000
    assert len(data.read_split(TASKS["mrpc"], shared_glue, "submission")) == 1725
    halves = data.make_splits(TASKS["rte"], shared_glue)
    assert sorted(int(e.index) for part in ("validation", "test") for e in halves[part]) == list(range(277))
    gold = [e.gold for e in data.read_split(TASKS["rte"], shared_glue, "validation")]
    assert round(gold.count("entailment") / 277, 3) == 0.527    # the published majority


def test_large_tasks_hold_out_training_rows(tmp_path):
    """10,000 rows or more: 1,000 leave training and become validation, the validation file is test; nothing is lost."""
    header = "index\tquestion\tsentence\tlabel"
    for file, count in (("train.tsv", 10_000), ("dev.tsv", 30)):
        write(tmp_path / "QNLI", file, header, *(f"{i}\tq {i}\ts\tentailment" for i in range(count)))
    splits = data.make_splits(TASKS["qnli"], tmp_path)
    ids = {name: {e.index for e in part} for name, part in splits.items()}
    assert {name: len(part) for name, part in splits.items()} == {"train": 9000, "validation": 1000, "test": 30}
    assert not ids["train"] & ids["validation"] and len(ids["train"] | ids["validation"]) == 10_000
    assert splits == data.make_splits(TASKS["qnli"], tmp_path)


def test_mrpc_by_list_of_ids(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    write(tmp_path / "MRPC", "msr_paraphrase_train.txt", header, *(f"1\t{i}\t{i + 1}\ta\tb{i}" for i in range(6)))
    write(tmp_path / "MRPC", "mrpc_dev_ids.tsv", "2\t3", "5\t6")
    splits = data.make_splits(TASKS["mrpc"], tmp_path, "official")
    assert [e.parts[-1] for e in splits["validation"]] == ["b2", "b5"] and [e.parts[-1] for e in splits["train"]] == ["b0", "b1", "b3", "b4"]


# --------------------------------------------------------------------------------------------------------- batches

def test_truncation_keeps_every_field(vocabulary):
    """The longest field is cut first; names of fields, the short field and eos stay."""
    encode = Tokenizer(vocabulary).encode
    long, short = " ".join(["cat", "dog", "bird"] * 20), "the red house"
    for first, second in ((long, short), (short, long), (long, long)):
        parts = ["rte sentence1:", first, "sentence2:", second]
        whole = encode(" ".join(parts))
        assert sum((encode(part)[:-1] for part in parts), []) + [1] == whole
        ids = data.encode_source(parts, encode, 40)
        text = Tokenizer(vocabulary).decode(ids)
        assert len(ids) == 40 and ids[-1] == 1 and "sentence1:" in text and "sentence2:" in text
        assert short not in (first, second) or short in text
        assert data.encode_source(parts, encode, len(whole)) == whole
    assert len(data.encode_source(["rte sentence1:", "a", "sentence2:", "b"], encode, 3)) <= 40      # nothing left to cut


def test_batches():
    """Every row once an epoch, a function of the seed, little padding, and no order that the lengths would tell."""
    lengths = np.random.default_rng(0).integers(5, 128, 1003)
    plan = data.plan_epoch(lengths, 32, [0, 1])
    assert sorted(np.concatenate(plan)) == list(range(1003)) and len(plan) == 32
    assert all(np.array_equal(a, b) for a, b in zip(plan, data.plan_epoch(lengths, 32, [0, 1])))
    assert not all(np.array_equal(a, b) for a, b in zip(plan, data.plan_epoch(lengths, 32, [0, 2])))
    padded = sum(lengths[rows].max() * len(rows) for rows in plan)
    assert padded < 1.1 * lengths.sum()
    means = [lengths[rows].mean() for rows in plan]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.5
    assert data.pad([np.array([3, 1]), np.array([1])], -100).tolist() == [[3, 1], [1, -100]]
    padded = data.pad([np.arange(70), np.arange(5)], 0)                      # 64 and longer: multiples of 8
    assert padded.shape == (2, 72) and padded[0].tolist() == [*range(70), 0, 0] and not padded[1, 5:].any()
    assert [data.pad([np.ones(n)], 0).shape[1] for n in (63, 64, 65, 128)] == [63, 64, 72, 128]


# --------------------------------------------------------------------------------------------------------- metrics

def test_metrics_equal_scikit_learn_and_scipy():
    metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n in (2, 7, 50, 1000):
        for _ in range(20):
            predicted, gold = rng.integers(0, 2, n), rng.integers(0, 2, n)
            assert data.accuracy(predicted, gold) == pytest.approx(metrics.accuracy_score(gold, predicted))
            assert data.f1(predicted, gold) == pytest.approx(metrics.f1_score(gold, predicted, zero_division=0))
            assert data.matthews(predicted, gold) == pytest.approx(metrics.matthews_corrcoef(gold, predicted))
            a, b = rng.integers(0, 6, n) / 5, rng.normal(size=n)         # many ties in a
            if np.ptp(a):
                assert data.pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
                assert data.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])
            assert np.array_equal(data.ranks(a), stats.rankdata(a))


def test_degenerate_metrics():
    """Constants give 0, not NaN; an answer that is no label counts as the opposite of the truth."""
    gold = np.array([0, 1, 1, 0])
    for constant in (np.zeros(4, int), np.ones(4, int)):
        assert data.matthews(constant, gold) == 0 and data.pearson(constant, gold) == 0 and data.spearman(constant, gold) == 0
    assert data.pearson(np.full(3, 0.1), np.array([0.1, 0.2, 0.4])) == 0 and data.f1(np.zeros(4, int), gold) == 0
    none, opposite = np.full(4, -1), 1 - gold
    assert data.f1(none, gold) == data.f1(opposite, gold) and data.matthews(none, gold) == data.matthews(opposite, gold) == -1
    assert data.accuracy(none, gold) == 0


def test_answers_and_scores(tmp_path):
    """Texts -> numbers: a label word or nothing for classes; for STS-B the raw gold score counts, not the rounded one."""
    rte, stsb = TASKS["rte"], TASKS["stsb"]
    assert data.parse_answers(rte, ["entailment", " not_entailment ", "entail", ""]).tolist() == [0, 1, -1, -1]
    assert data.parse_answers(stsb, ["3.6", "x", "nan", "inf", ""]).tolist() == [3.6, -1, -1, -1, -1]
    examples = [data.Example([], "", gold, "") for gold in (1.0, 2.9, 3.1)]
    assert data.score(stsb, ["1.0", "3.0", "3.0"], examples)["pearson"] == pytest.approx(np.corrcoef([1, 3, 3], [1, 2.9, 3.1])[0, 1])
    mrpc = [data.Example([], "", gold, "") for gold in "1101"]
    assert data.score(TASKS["mrpc"], ["equivalent", "not_equivalent", "equivalent", "?"], mrpc) == {"accuracy": 0.25, "f1": pytest.approx(2 / 5)}


def test_official_sizes():
    """Rows of the training and validation files as GLUE, SuperGLUE and the papers of the other sets print them."""
    assert {name: task.rows for name, task in TASKS.items()} == dict(
        cola=(8551, 1043), sst2=(67349, 872), mrpc=(3668, 408), qqp=(363849, 40430), stsb=(5749, 1500), mnli=(392702, 9815), qnli=(104743, 5463),
        rte=(2490, 277), wnli=(635, 71), cb=(250, 56), boolq=(9427, 3270), imdb=(25000, 25000), paws=(49401, 8000), trec=(5452, 500))


def test_long_targets_keep_their_end():
    encode = lambda text: [ord(c) for c in text] + [1]
    for length in (3, 127, 128, 500):
        row, = data.encode_examples([data.Example(["x"], "a" * length, None, "0")], encode, 20)
        assert row.targets[0].tolist() == [97] * min(length, 127) + [1]


@pytest.mark.parametrize("training, validation", [(1, 3), (3, 1)])
def test_one_row_is_not_enough_and_two_are(training, validation, tmp_path):
    for name, count in (("train.tsv", training), ("dev.tsv", validation)):
        write(tmp_path / "RTE", name, "index\tsentence1\tsentence2\tlabel", *(f"{i}\ta\tb\tentailment" for i in range(count)))
    with pytest.raises(UserError, match=f"found {training} training and {validation} validation rows, expected at least 2 of each"):
        data.make_splits(TASKS["rte"], tmp_path)
    for name, count in (("train.tsv", 2), ("dev.tsv", 2)):
        write(tmp_path / "RTE", name, "index\tsentence1\tsentence2\tlabel", *(f"{i}\ta\tb\tentailment" for i in range(count)))
    assert {name: len(examples) for name, examples in data.make_splits(TASKS["rte"], tmp_path).items()} == {"train": 2, "validation": 1, "test": 1}


@pytest.mark.parametrize("program", ["data", "train", "clip_features"])
def test_help_begins_with_what_the_program_does(program):
    first = __import__(program).__doc__.split("\n")[0]
    assert first in " ".join(run(f"{program}.py", "--help")[0].split())


def test_submission_files(tmp_path):
    examples = [data.Example([], "", None, str(i)) for i in range(3)]
    assert data.write_submission(tmp_path / "a", TASKS["cola"], ["acceptable", "unacceptable", "?"], examples) == 1
    assert (tmp_path / "a").read_text() == "index\tprediction\n0\t1\n1\t0\n2\t0\n"
    assert data.write_submission(tmp_path / "b", TASKS["stsb"], ["5.2", "2.4", "?"], examples) == 1
    assert (tmp_path / "b").read_text() == "index\tprediction\n0\t5.000\n1\t2.400\n2\t0.000\n"
    data.write_submission(tmp_path / "c", TASKS["mnli"], ["neutral", "contradiction", "?"], examples)
    assert (tmp_path / "c").read_text() == "index\tprediction\n0\tneutral\n1\tcontradiction\n2\tentailment\n"


# ---------------------------------------------------------------------------------------------------- user's mistakes

HEADER = "index\tsentence1\tsentence2\tlabel"


@pytest.mark.parametrize("content, words", [
    (b"", "no rows"), (b"\n\n", "no rows"), (HEADER.encode(), "no rows"),
    (f"{HEADER}\n0\ta\tb\tentailment\n1\ta\tb\n".encode(), "line 3: found 3 columns, expected 4"),
    (f"{HEADER}\n0\ta\tb\tc\tentailment\n".encode(), "line 2: found 5 columns, expected 4"),
    (f"{HEADER}\n0\ta\tb\tyes\n".encode(), "line 2: found label 'yes', expected one of entailment, not_entailment"),
    (f"{HEADER}\n0\ta\t\xff\tentailment\n".encode("latin-1"), "line 2: not UTF-8 (byte 0xff)"),
    (b"index\tpremise\tsentence2\tlabel\n0\ta\tb\tentailment\n", "found columns index, premise, sentence2, label; expected one named sentence1"),
])
def test_wrong_rows(content, words, tmp_path):
    write(tmp_path / "RTE", "dev.tsv", HEADER, "0\ta\tb\tentailment")
    (tmp_path / "RTE" / "train.tsv").write_bytes(content)
    _, error = run("data.py", "--task", "rte", "--data-dir", tmp_path, ok=False)
    assert words in error and str(tmp_path / "RTE" / "train.tsv") in error


def test_other_mistakes(tmp_path):
    assert "--task" in run("data.py", "--data-dir", tmp_path, ok=False)[1]
    assert "no such folder" in run("data.py", "--task", "rte", "--data-dir", tmp_path, ok=False)[1]
    assert "'rtf' is unknown" in run("data.py", "--task", "rtf", "--data-dir", tmp_path, ok=False)[1]
    write(tmp_path / "RTE", "train.tsv", HEADER, "0\ta\tb\tentailment")
    assert "dev.tsv: no such file, expected the validation split" in run("data.py", "--task", "rte", "--data-dir", tmp_path, ok=False)[1]
    write(tmp_path / "STS-B", "train.tsv", "sentence1\tsentence2\tscore", "a\tb\t5.1")
    assert "line 2: found score '5.1'" in run("data.py", "--task", "stsb", "--data-dir", tmp_path, ok=False)[1]


def test_show(glue):
    out, _ = run("data.py", "--task", "rte", "--data-dir", glue)
    assert "train 43, validation 10, test 10" in out and out.count("rte sentence1: ") == 5 and out.count("  -> ") == 5


# ------------------------------------------------------------------------------------------------------- official zips

def make_zip(**members):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name) if isinstance(name, str) else name, content)
    return memory.getvalue()


def test_a_reader_who_has_enough(glue):
    """python data.py ... | head -1: no error when the pipe is closed."""
    program = subprocess.Popen([sys.executable, "data.py", "--task", "rte", "--data-dir", glue], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    assert program.stderr.read() == b"stopped: nobody reads the output\n" and program.wait() == 141


def test_unpack(tmp_path):
    """The task's own .tsv files and nothing else; a path out of the folder, a link or a broken archive is refused whole."""
    archive, folder = tmp_path / "a.zip", tmp_path / "data" / "RTE"
    archive.write_bytes(make_zip(**{"RTE/train.tsv": "x", "RTE/dev.tsv": "z", "other/RTE/test.tsv": "y", "__MACOSX/RTE/._dev.tsv": ""}))
    folder.mkdir(parents=True)
    (folder / "dev.tsv").write_text("own")
    data.unpack(archive, folder, ["train.tsv", "test.tsv"])
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"train.tsv": "x", "dev.tsv": "own"}
    link = zipfile.ZipInfo("RTE/dev.tsv")
    link.external_attr = 0o120777 << 16
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        file.writestr(link, "/etc/passwd")
    for content in (make_zip(**{"RTE/../../train.tsv": "x"}), make_zip(**{"/RTE/train.tsv": "x"}), memory.getvalue(), b"PK\3\4 broken"):
        archive.write_bytes(content)
        with pytest.raises(UserError, match="refused|not a whole zip"):
            data.unpack(archive, tmp_path / "other" / "RTE", ["train.tsv", "dev.tsv"])
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob("*.tsv"))


def test_download_task(tmp_path, monkeypatch, capsys):
    """The archive is fetched, unpacked, counted and removed; files that are there already are left alone."""
    lines = "\n".join([HEADER, "0\ta\tb\tentailment", "1\ta\tb\tnot_entailment"])
    monkeypatch.setattr(data, "download", lambda url, path: path.write_bytes(make_zip(**{"RTE/train.tsv": lines, "RTE/dev.tsv": lines, "RTE/test.tsv": lines})))
    (tmp_path / "RTE.zip").write_text("the user's own")
    with pytest.raises(UserError, match="RTE: found 2 and 2 rows, expected 2490 and 277; remove it to fetch it again"):      # cut off, say
        data.download_task(TASKS["rte"], tmp_path)
    assert "2 training and 2 validation rows (official: 2490 and 277)" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["RTE.zip", "dev.tsv", "test.tsv", "train.tsv"]
    monkeypatch.setattr(data, "download", lambda *args: 1 / 0)
    data.download_task(TASKS["rte"], tmp_path)
    fetched = []
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    contents = {"msr_paraphrase_train.txt": "\n".join([header, *(f"1\t{i}\t{i}\ta\tb" for i in range(5))]), "mrpc_dev_ids.tsv": "1\t1\n2\t2"}
    monkeypatch.setattr(data, "download", lambda url, path: fetched.append(path.name) or path.write_text(contents.get(path.name, "x")))
    (tmp_path / "MRPC").mkdir()
    (tmp_path / "MRPC" / "msr_paraphrase_test.txt").write_text("x")      # an earlier download stopped here
    data.download_task(dataclasses.replace(TASKS["mrpc"], rows=(3, 2)), tmp_path)
    assert sorted(fetched) == ["mrpc_dev_ids.tsv", "msr_paraphrase_train.txt"]
    assert "3 training and 2 validation rows" in capsys.readouterr().out
