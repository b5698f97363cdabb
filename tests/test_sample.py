"""The bundled sample: text tasks, small T5. Its image side is in test_sample_vqa.py."""
import hashlib
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "sample"
sys.path.insert(0, str(SAMPLE))
import make  # noqa: E402
from conftest import run  # noqa: E402
from t5 import T5, Tokenizer  # noqa: E402

BUNDLED = pytest.mark.skipif(not (SAMPLE / "mini-t5").is_dir(), reason="sample/mini-t5 is not bundled yet: sample/make.py text, vocab and pretrain make it")


def rows(folder, name):
    header, *lines = (SAMPLE / "glue" / folder / f"{name}.tsv").read_text().splitlines()
    return header.split("\t"), [line.split("\t") for line in lines]


@pytest.mark.parametrize("folder, header", [("RTE", ["index", "sentence1", "sentence2", "label"]), ("SST-2", ["sentence", "label"])])
def test_glue_files(folder, header, tmp_path, monkeypatch):
    """GLUE's columns, sizes, halves of each label, no row in both files; make.py writes the very same bytes again."""
    parts = {}
    for name, count in (("train", 4000), ("dev", 400)):
        found, parts[name] = rows(folder, name)
        assert found == header and len(parts[name]) == count
        labels = [row[-1] for row in parts[name]]
        assert abs(labels.count(labels[0]) / count - 0.5) < 0.04
    texts = [tuple(row[-len(header) + (folder == "RTE"):-1]) for part in parts.values() for row in part]
    assert len(set(texts)) == 4400
    monkeypatch.setattr(make, "HERE", tmp_path)
    monkeypatch.setattr(make, "bags_of_words", lambda *_: None)
    make.glue(type("Args", (), {"seed": 0}))
    for name in parts:
        file = Path("glue") / folder / f"{name}.tsv"
        assert (tmp_path / file).read_bytes() == (SAMPLE / file).read_bytes()


def linear(train, dev, view):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    counts = CountVectorizer(analyzer=view)
    model = LogisticRegression(max_iter=3000).fit(counts.fit_transform(train), [row[-1] for row in train])
    return model.score(counts.transform(dev), [row[-1] for row in dev])


def test_bags_of_words_do_not_solve_the_tasks():
    """Neither the hypothesis alone, nor both bags, nor how many words are shared; for SST-2 the sentence's words. Words here are split at spaces."""
    train, dev = rows("RTE", "train")[1], rows("RTE", "dev")[1]
    assert linear(train, dev, lambda row: row[2].lower().split()) < 0.62
    assert linear(train, dev, lambda row: [f"a {w}" for w in row[1].lower().split()] + [f"b {w}" for w in row[2].lower().split()]) < 0.62

    def overlap(row):
        a, b = (set(re.findall(r"\w+", text.lower())) for text in row[1:3])
        return [f"both {len(a & b)}", f"new {len(b - a)}", f"gone {len(a - b)}", f"share {round(5 * len(a & b) / len(a | b))}"]
    assert linear(train, dev, overlap) < 0.62
    assert linear(*(rows("SST-2", name)[1] for name in ("train", "dev")), lambda row: row[0].split()) < 0.62


def test_labels_follow_from_a_model_of_the_world():
    """by_number's labels from arithmetic, by_role's from who did what, worked out from the text alone."""
    numbers = {word: i + 1 for i, word in enumerate("one two three four five six seven eight nine".split())}
    checked = {"number": 0, "role": 0, "scale": 0, "kind": 0, "clause": 0}
    for _, premise, hypothesis, label in rows("RTE", "train")[1] + rows("RTE", "dev")[1]:
        entailed = label == "entailment"
        a, b = premise[:-1].lower(), hypothesis[:-1].lower()
        if match := re.search(r"(at least|at most|exactly) (\w+)", b):
            of = [numbers[w] for w in a.split() if w in numbers]             # the subject's and the object's
            n, k = of[0 if b.startswith(match[0]) else -1], numbers[match[2]]
            assert entailed == {"at least": n >= k, "at most": n <= k, "exactly": n == k}[match[1]], (premise, hypothesis)
            checked["number"] += 1
        roles = [re.fullmatch(r"the ([\w ]+?) (?:was (\w+ed) by|(\w+ed)) the ([\w ]+)", text) for text in (a, b)]
        if all(roles) and not {"not", "and", "or", "nor"} & set((a + " " + b).split()) and ("was" in a or "was" in b) and sorted(set(a.split()) - {"was", "by"}) == sorted(set(b.split()) - {"was", "by"}):
            who = [(m[4], m[1]) if m[2] else (m[1], m[4]) for m in roles]
            where = [re.sub(r"^.*?( (in|near|at|behind|on|by|after|before|last|during) .*)?$", r"\1", f"{x} {y}") for x, y in who]
            if not any(where):
                assert entailed == (who[0] == who[1]), (premise, hypothesis)
                checked["role"] += 1
        if b in a.split(" and ") and " no" not in a:                         # a whole clause of two
            assert entailed, (premise, hypothesis)
            checked["clause"] += 1
        gone, new = ([w for w in x.split() if w not in y.split()] for x, y in ((a, b), (b, a)))
        if len(gone) == len(new) == 1:
            pair = {gone[0], new[0]}
            if any(pair <= set(one + other) for one, other in make.SCALES):
                assert entailed == any(pair == set(end) for scale in make.SCALES for end in scale), (premise, hypothesis)
                checked["scale"] += 1
            if gone[0] in make.NOUNS and new[0] in make.NOUNS:
                narrower, wider = (new[0], gone[0]) if a.startswith("no ") else (gone[0], new[0])
                tree = json.dumps({t: {t: {m: leaves.split() for m, leaves in middles.items()}} for t, middles in make.KINDS.items()})
                assert narrower in tree and entailed == (wider in make.PARENT.get(narrower, "") or wider == make.PARENT.get(make.PARENT.get(narrower, ""))), (premise, hypothesis)
                checked["kind"] += 1
    assert all(count > 100 for count in checked.values()), checked


@BUNDLED
def test_mini_t5_is_a_t5():
    """Size and ids as promised; transformers loads the same files and gives the same logits."""
    transformers = pytest.importorskip("transformers")
    folder = SAMPLE / "mini-t5"
    ours, tokenizer = T5.from_pretrained(folder).eval(), Tokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in ours.parameters()) <= 8_000_000
    assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20
    assert (tokenizer.pieces.pad_id(), tokenizer.pieces.eos_id(), tokenizer.pieces.unk_id(), tokenizer.pieces.bos_id()) == (0, 1, 2, -1)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder).float().eval()
    ids = torch.tensor([tokenizer.encode("The dog <extra_id_0> the cat in the garden <extra_id_1> lunch.")])
    labels = torch.tensor([tokenizer.encode("<extra_id_0> chased <extra_id_1> after")])
    with torch.no_grad():
        logits, _ = ours(ids, ids != 0, labels)
        expected = theirs(input_ids=ids, labels=labels)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    for question, answers in (("which is more : two or five ?", ["five"]), ("the opposite of big", ["small", "little"]), ("is every sparrow a bird ?", ["yes"]),
                              ("count on from three", ["four five six"])):
        assert tokenizer.decode(ours.generate(torch.tensor([tokenizer.encode(question)]), max_new_tokens=8)[0].tolist()) in answers


def test_span_corruption_loses_nothing():
    """Source and target, put together again at the sentinels, are the text."""
    rng = np.random.default_rng(0)
    for length in (8, 40, 128):
        ids = rng.integers(3, 5000, length).tolist()
        source, target = make.corrupt(ids, rng, 5099)
        gaps, current = {}, None
        for i in target[:-1]:
            if i > 4999:
                current = gaps.setdefault(i, [])
            else:
                current.append(i)
        assert [j for i in source[:-1] for j in (gaps[i] if i > 4999 else [i])] == ids and source[-1] == target[-1] == 1
        assert sum(map(len, gaps.values())) == max(1, round(0.15 * length))


@BUNDLED
def test_questions_of_pretraining_are_not_the_sample(tmp_path):
    """No question contains a premise, a hypothesis or a sentence of the sample, or T5's format of its tasks; only `say again` says the labels."""
    kinds = [[w, make.kin(w)] for w in make.NOUNS if make.kin(w)]
    (tmp_path / "wordnet.json").write_text(json.dumps({"kinds": kinds, "synonyms": make.SYNONYMS, "opposites": make.ANTONYMS}))
    questions = make.Questions(tmp_path, ["It was a witty saying about nothing at all."], Tokenizer(SAMPLE / "mini-t5/spiece.model").pieces)
    assert "entailment" in questions.words and not {"sentence", "rte", "entailment"} & set(questions.marks)      # what texts are marked with
    sample = {text.lower().rstrip(".") for name in ("train", "dev") for row in rows("RTE", name)[1] for text in row[1:3]}
    rng = random.Random(0)
    for _ in range(3000):
        source, _ = questions.one(rng)
        source = re.sub("say again : .*", "", source)
        assert not re.search(r"\b(sentence|sentence1|sentence2|rte|sst2|entailment)\b", source)
        assert not any(part.strip() in sample for part in re.split(r" \. |text:|:|\?", source))


def test_readme_lists_every_file():
    """sample/README.md names every bundled file with its size and sha256, and the whole is at most 40 MB."""
    files = [p for p in SAMPLE.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.name not in ("README.md", "make.py", "tour.py")]
    text = (SAMPLE / "README.md").read_text()
    for path in files:
        line = next((line for line in text.splitlines() if f"`{path.relative_to(SAMPLE).as_posix()}`" in line), "")
        assert f"{path.stat().st_size:,}" in line and hashlib.sha256(path.read_bytes()).hexdigest()[:16] in line, path
    assert sum(p.stat().st_size for p in files) <= 40 * 10**6


@BUNDLED
def test_first_command_runs_on_the_sample(tmp_path):
    """python train.py, only shorter, from another folder: what it runs on, the table; then a question by hand."""
    stdout, _ = run(ROOT / "train.py", "--task", "rte", "--steps", 8, cwd=tmp_path)
    first, second = stdout.splitlines()[:2]
    assert first.startswith("mini-t5 (bundled, 7.1 M parameters) on bundled sample data: rte train 4,000, validation 400")
    assert second == "for real: python train.py --task rte --method hyperpelt --model t5-base --data-dir glue --download --out runs/rte-hyperpelt-t5-base"
    table = re.search(r"rte +validation +accuracy +(\S+) +(\S+) +400", stdout)
    labels = [row[-1] for row in rows("RTE", "dev")[1]]
    majority = max(("entailment", "not_entailment"), key=[row[-1] for row in rows("RTE", "train")[1]].count)
    assert float(table[2]) == round(labels.count(majority) / 400, 4)
    stdout, _ = run(ROOT / "train.py", "--ask", "Three sparrows chased a moth.", "At least two birds chased an insect.", cwd=tmp_path)
    assert stdout.startswith("rte sentence1: Three sparrows chased a moth. sentence2: At least two birds chased an insect.\n")
    told = [float(p) for p in re.findall(r"^  \w+ +([01]\.\d{4})$", stdout, re.M)]
    assert len(told) == 2 and abs(sum(told) - 1) < 2e-4


@BUNDLED
def test_text_and_images_in_one_run_of_the_sample(tmp_path):
    stdout, _ = run(ROOT / "train.py", "--task", "sst2,vqa", "--steps", 4, "--eval-every", 4, cwd=tmp_path)
    assert re.search(r"sst2 +validation +accuracy +\S+ +\S+ +400", stdout) and re.search(r"vqa +validation +accuracy +\S+ +\S+ +1,?200", stdout)
    stdout, _ = run(ROOT / "train.py", "--task", "sst2,vqa", "--ask", "how many things are there?", "703", cwd=tmp_path)
    assert stdout.splitlines()[0] == "vqa: how many things are there?   [val2014:703]"
