"""What people see: a run without arguments on a bundled sample (here a tiny stand-in), its table and answers, --ask, drawings."""
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import train as train_module
from hyperpelt import HyperPELT, HyperPELTConfig
from t5 import T5, Tokenizer
from conftest import ROOT, read_json, run
from test_train import TINY, log_of
from test_vl_train import write_features

START = "import sys, pathlib; root, sample = sys.argv[1:3]; del sys.argv[1:3]; sys.path.insert(0, root)\nimport data, train\ntrain.SAMPLE = pathlib.Path(sample)\n"


FEW = ["--steps", 20, "--lr", 0.02, "--warmup-steps", 4]


def people(sample, *arguments, more="", **options):
    """train.py with another folder for its sample; `more` is code that goes before it."""
    return run("-c", START + more + "\ndata.run(train.main)", ROOT, sample, *arguments, **options)


@pytest.fixture(scope="module")
def sample(tmp_path_factory, checkpoint):
    """RTE: 20 of 30 training rows and 3 of 8 validation rows are not_entailment. VQA: 6 of 8 training questions are answered
    dog by all ten; of 4 validation questions two are, and one by two of ten."""
    folder = tmp_path_factory.mktemp("bundle") / "sample"
    shutil.copytree(checkpoint, folder / "mini-t5")
    rng = np.random.default_rng(0)
    (folder / "glue" / "RTE").mkdir(parents=True)
    for name, count, negative in (("train", 30, 20), ("dev", 8, 3)):
        rows = [f"{i}\t{' '.join(rng.choice(['cat', 'dog', 'sees', 'red'], 4))}\tthe {i} fish\t{'not_' * (i < negative)}entailment" for i in range(count)]
        (folder / "glue" / "RTE" / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    (folder / "vqa").mkdir()
    for subset, answers in (("train2014", [["dog"] * 10] * 6 + [["cat"] * 10] * 2), ("val2014", [["dog"] * 10, ["dog"] * 2 + ["cat"] * 8, ["dog"] * 10, ["cat"] * 10])):
        questions = [dict(image_id=40 + i, question="is it a man", question_id=i) for i in range(len(answers))]
        notes = [dict(image_id=40 + i, question_id=i, answer_type="other", answers=[dict(answer=a) for a in given]) for i, given in enumerate(answers)]
        (folder / "vqa" / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(json.dumps(dict(data_subtype=subset, questions=questions)))
        (folder / "vqa" / f"v2_mscoco_{subset}_annotations.json").write_text(json.dumps(dict(annotations=notes)))
        write_features(folder / "vqa" / "features", subset, range(40, 40 + len(answers)))
    return folder


@pytest.fixture(scope="module")
def first(sample, tmp_path_factory):
    """The first command of all, but for sizes: neither a model nor data are named, and it is run from somewhere else."""
    place = tmp_path_factory.mktemp("elsewhere")
    stdout, stderr = people(sample, *TINY, *FEW, cwd=place)
    assert "Traceback" not in stderr and "\r" not in stdout
    return place / "runs" / "rte-hyperpelt", stdout


@pytest.fixture(scope="module")
def mixed(sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "run"
    return out, people(sample, "--task", "rte,vqa", *TINY, *FEW, "--out", out)[0]


def table(stdout):
    """-> {(task, split, metric): (value, majority, rows)}"""
    lines = stdout[stdout.index("\ntask "):].split("\n\n")[0].split("\n")[2:]
    return {tuple(cells[:3]): tuple(map(float, cells[3:])) for cells in map(str.split, lines)}


def shown(stdout):
    """-> the answers in a run's output, as {field: text}"""
    blocks = [block.split("\n") for block in stdout.split("\n\n") if block.startswith("  ")]
    return [dict(line.split(None, 1) for line in block) for block in blocks]


def test_first_run(first, sample, checkpoint):
    out, stdout = first
    size = sum(p.numel() for p in T5.from_pretrained(checkpoint).parameters())
    lines, config, metrics = stdout.split("\n"), read_json(out / "config.json"), read_json(out / "metrics.json")
    assert lines[0] == f"mini-t5 (bundled, {size / 1e6:.1f} M parameters) on bundled sample data: rte train 30, validation 8"
    assert lines[1] == "for real: python train.py --task rte --method hyperpelt --model t5-base --data-dir glue --download --out runs/rte-hyperpelt-t5-base"
    assert config["settings"]["split"] == "official" and config["settings"]["model"] == config["settings"]["data_dir"] == ""
    assert table(stdout) == {("rte", "validation", "accuracy"): (round(metrics["rte"]["validation"]["accuracy"], 4), 0.375, 8)}
    assert metrics["majority"] == {"rte": {"validation": {"accuracy": 0.375}}}
    gold = {row.split("\t")[2]: row.split("\t")[1::2] for row in (sample / "glue/RTE/dev.tsv").read_text().splitlines()}
    assert len({answer["sentence2"] for answer in shown(stdout)}) == 5
    for answer in shown(stdout):
        sentence, label = gold[answer["sentence2"]]
        assert answer["sentence1"] == sentence and answer["gold"] == f"({'right' if answer['predicted'] == label else 'wrong'}) {label}"
    assert f"{config['trained_parameters']:,} trained parameters, {config['trained_parameters'] / size:.1%} of the T5's; best step" in lines[-2]
    again = people(sample, "--out", out, "--eval-only")[0]
    assert table(again) == table(stdout) and shown(again) == shown(stdout) and "for real" not in again


def test_ask_gives_the_answer_and_its_chances(first, sample, checkpoint):
    """The command that the run ends with, from the folder it ran in, gives the answer that it showed."""
    out, stdout = first
    asked = shlex.split(re.search("^ask it: .* --ask (.*)", stdout, re.M)[1])
    answered = next(answer for answer in shown(stdout) if [answer["sentence1"], answer["sentence2"]] == asked)
    hidden = shutil.move(sample / "glue", sample / "hidden")     # to ask, no data is read
    lines = people(sample, "--ask", *asked, cwd=out.parent.parent)[0].splitlines()
    shutil.move(hidden, sample / "glue")
    source = f"rte sentence1: {asked[0]} sentence2: {asked[1]}"
    assert lines[:2] == [source, answered["predicted"]] and [line.split()[0] for line in lines[2:]] == ["entailment", "not_entailment"]
    settings, tokenizer = read_json(out / "config.json")["settings"], Tokenizer.from_pretrained(checkpoint)
    sizes = {name: settings[name] for name in ("prefix_length", "embedding_dim", "hyper_dim", "bottleneck")}
    model = HyperPELT(T5.from_pretrained(checkpoint), ["rte"], HyperPELTConfig(**sizes)).eval()
    train_module.load_best(out / "best.safetensors", model)
    ids, chances = torch.tensor([tokenizer.encode(source)]), []
    for word in ("entailment", "not_entailment"):                # one word after the other, one token after the other
        word, chance = tokenizer.encode(word), 1.0
        for i in range(len(word)):
            with torch.no_grad():
                logits, _ = model(ids, None, torch.tensor([word[:i + 1]]), "rte")
            chance *= F.softmax(logits[0, i], 0)[word[i]].item()
        chances.append(chance)
    assert np.allclose([float(line.split()[1]) for line in lines[2:]], np.array(chances) / sum(chances), atol=1e-4)


def test_ask_about_images(mixed, sample, tmp_path, monkeypatch, capsys):
    def ask(*texts):                                             # in this process, which is faster
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(mixed[0]), "--features", str(features), "--ask", *texts])
        train_module.main()
        return capsys.readouterr().out

    stdout, lines = mixed[1], mixed[1].split("\n")
    assert lines[0].endswith("rte train 30, validation 8; vqa train 8, validation 4") and lines[1].endswith(f"--data-dir DIR --features features --out {mixed[0]}-t5-base")
    means = read_json(mixed[0] / "metrics.json")["average"]["validation"]
    assert f"\nmean of the 2 metrics on validation {means['metrics']:.4f}, of the 2 tasks {means['tasks']:.4f}\n" in stdout
    assert table(stdout)["vqa", "validation", "accuracy"][1:] == (0.65, 4)       # of 1, 0.6, 1, 0
    assert len(shown(stdout)) == 5 + 4 and "--ask vqa 'is it a man' val2014:4" in stdout
    answered = {answer["image"]: answer["predicted"] for answer in shown(stdout) if "image" in answer}
    assert people(sample, "--out", mixed[0], "--ask", "is it a man", "43")[0] == f"vqa: is it a man   [val2014:43]\n{answered['val2014:43']}\n"
    monkeypatch.setattr(train_module, "SAMPLE", sample)
    features = shutil.copytree(sample / "vqa" / "features", tmp_path / "features")
    assert "[train2014:47]" in ask("is it a man", "47") and "[train2014:43]" in ask("vqa", "is it a man", "train2014:43")
    assert "rte sentence1: a sentence2: 43\n" in ask("rte", "a", "43") and "rte sentence1: a sentence2: b\n" in ask("a", "b")
    write_features(features, "mine", [7])                        # images that the run does not know
    assert "[mine:7]" in ask("is it a man", "mine:7")
    for change, message in ((dict(weights="9"), "weights 9"), (dict(width=7), r"\[5, 7\]")):
        write_features(features, "mine", [7], **change)
        with pytest.raises(data.UserError, match=message):
            ask("is it a man", "mine:7")
    write_features(features, "val2014", range(40, 44), seed=1)
    with pytest.raises(data.UserError, match="another features"):
        ask("is it a man", "43")


def test_mistakes_of_asking(first, mixed, sample, tmp_path):
    assert "found texts: 1; expected rte: sentence1, sentence2\n" in people(sample, "--out", first[0], "--ask", "a cat", ok=False)[1]
    _, error = people(sample, "--out", mixed[0], "--ask", "vqa", "is it a man", "x" * 300 + ":99", ok=False)
    assert "99, which is in none of train2014, val2014; expected vqa: question, image id\n" in error
    assert "runs/sst2-norms/config.json: no such file, expected a run; this trains one: python train.py --task sst2 --method norms\n" in \
        people(sample, "--task", "sst2", "--method", "norms", "--ask", "a cat", cwd=tmp_path, ok=False)[1]


def test_which_data(first, sample, glue, monkeypatch, tmp_path):
    def settings(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "run"), *map(str, arguments)])
        return train_module.complete_settings(train_module.parse_arguments())

    defaults = {name.replace("-", "_"): default for name, _, default, _ in train_module.OPTIONS}
    assert all(type(value) is type(defaults[name]) for name, value in train_module.SAMPLE_DEFAULTS.items())    # as --resume wants them
    monkeypatch.setattr(train_module, "SAMPLE", sample)
    monkeypatch.setattr(train_module, "SAMPLE_DEFAULTS", dict(split="official", epochs=0.5))
    mini, own, epochs = str(sample / "mini-t5"), str(sample / "vqa" / "features"), defaults["epochs"]
    for arguments, expected in (([], (mini, str(sample), own, "official", 0.5)), (["--split", "paper"], (mini, str(sample), own, "paper", 0.5)),
                                (["--features", "x"], (mini, str(sample), "x", "official", 0.5)), (["--model", "x"], ("x", "glue", "", "paper", epochs)),
                                (["--download"], (mini, "glue", "", "paper", epochs)), (["--data-dir", glue], (mini, str(glue), "", "paper", epochs)),
                                (["--model", "x", "--data-dir", sample], ("x", str(sample), own, "official", 0.5))):
        s = settings(*arguments)
        assert (s.model, s.data_dir, s.features, s.split, s.epochs) == expected, arguments
    monkeypatch.setattr(train_module, "SAMPLE_DEFAULTS", dict(split="paper", epochs=9.5))       # a saved run keeps its own
    s = settings("--eval-only", "--out", first[0])
    assert (s.model, s.data_dir, s.split, s.steps) == (mini, str(sample), "official", 20) and s.epochs != 9.5
    for arguments, message in ((["--download", "--data-dir", sample], "nothing is downloaded into"), (["--resume", "--ask", "x"], "not allowed with"),):
        with pytest.raises(data.UserError, match=message):
            settings(*arguments)
    monkeypatch.setattr(train_module, "SAMPLE", tmp_path / "sample")
    with pytest.raises(data.UserError, match="mini-t5: no such folder, expected a small T5"):
        settings()


def test_majority():
    """Worked out by hand, for metrics of every kind."""
    rows = lambda task, *golds: [data.Example([], task.labels.get(gold) or str(gold), gold, "") for gold in golds]
    mrpc, cola, stsb, caption = (data.find_task(name) for name in ("mrpc", "cola", "stsb", "caption"))
    assert data.majority(mrpc, rows(mrpc, *"0111"), rows(mrpc, *"1100")) == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}
    assert data.majority(cola, rows(cola, *"011"), rows(cola, *"1100")) == {"matthews": 0.0}
    assert data.majority(stsb, rows(stsb, 1.0, 3.0, 3.0), rows(stsb, 0.0, 5.0)) == {"pearson": 0.0, "spearman": 0.0}
    images = [data.Example([], text, [text], "") for text in ("a red cat sat", "a dog ran by", "a dog ran by")]
    assert data.majority(caption, images, images[1:]) == data.score(caption, ["a dog ran by"] * 2, images[1:])


def test_accuracy_in_the_log_and_one_generation(sample, tmp_path):
    """The log's accuracy counted again from every step's logits, also of a run that was stopped between two rows of the log; the
    last evaluation's answers are not generated a second time."""
    more = ("import json, hyperpelt\nold, generate = hyperpelt.HyperPELT.forward, train.answer\n"
            "def forward(self, ids, mask, labels, *rest):\n"
            "    logits, loss = old(self, ids, mask, labels, *rest)\n"
            "    print('STEP', json.dumps([logits.argmax(-1).tolist(), labels.tolist()]))\n"
            "    return logits, loss\n"
            "def answer(*arguments):\n"
            "    print('ANSWER')\n"
            "    return generate(*arguments)\n"
            "hyperpelt.HyperPELT.forward, train.answer = forward, answer")
    out = tmp_path / "run"
    arguments = [*TINY, "--steps", 30, "--eval-every", 15, "--lr", 0.02, "--warmup-steps", 4, "--schedule", "constant", "--out"]
    stdout, _ = people(sample, *arguments, out, more=more)
    right = []
    for line in re.findall("^STEP (.*)", stdout, re.M):
        told, labels = json.loads(line)
        right.append([all(t == l for t, l in zip(*row) if l != -100) for row in zip(told, labels)])
    logged = {row["step"]: row["accuracy"] for row in log_of(out) if "accuracy" in row}
    assert logged == {step: round(np.mean(sum(right[step - 10:step], [])), 5) for step in (10, 20, 30)} and 0 < logged[30] < 1
    assert stdout.count("ANSWER") == 2
    stop = ("\nimport os, signal; old = train.learning_rate\n"
            "def learning_rate(step, *rest):\n"
            "    if step == 25: os.kill(os.getpid(), signal.SIGINT)\n"
            "    return old(step, *rest)\n"
            "train.learning_rate, data.leave = learning_rate, lambda message, code: sys.exit(0)")
    people(sample, *arguments, tmp_path / "stopped", more=stop)
    assert log_of(tmp_path / "stopped")[-1]["step"] == 20        # it stopped between two rows of the log
    people(sample, "--out", tmp_path / "stopped", "--resume")
    assert [row["accuracy"] for row in log_of(tmp_path / "stopped") if "accuracy" in row] == list(logged.values())


def is_png(path):
    from PIL import Image
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 200


def test_drawings(first, mixed, sample, monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib makes the drawings, and is not installed")
    pytest.importorskip("PIL", reason="Pillow opens the drawings, and is not installed")
    assert is_png(first[0] / "curves.png") and not (first[0] / "task_similarity.png").exists()
    assert is_png(mixed[0] / "curves.png") and is_png(mixed[0] / "task_similarity.png")
    drawn, log = {}, log_of(first[0])
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **_: drawn.update({path.name: self}))
    model = HyperPELT(T5.from_pretrained(sample / "mini-t5"), ["rte", "vqa", "sst2"], HyperPELTConfig(prefix_length=2, embedding_dim=3, hyper_dim=4, bottleneck=2))
    train_module.draw(model, {"rte": data.TASKS["rte"]} | dict.fromkeys(("vqa", "sst2"), data.Task("", "", {}, "", {}, (), ())),
                      {"rte": {"validation": {"accuracy": 0.375}}}, first[0])
    loss, accuracy = drawn["curves.png"].axes
    lines = [list(line.get_ydata()) for line in (*loss.lines, *accuracy.lines)]
    assert lines == [[row[key] for row in log if key in row] for key in ("loss", "accuracy", "mean")] + [[0.375, 0.375]]
    assert accuracy.lines[1].get_xdata()[-1] == 20
    z = model.hyper_embedding.task.detach().numpy().reshape(3, -1)
    cosines = [f"{a @ b / np.sqrt(a @ a * (b @ b)):.2f}" for a in z for b in z]
    assert [text.get_text() for text in drawn["task_similarity.png"].axes[0].texts] == cosines


def test_without_matplotlib(first, sample, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    out = shutil.copytree(first[0], tmp_path / "run", ignore=shutil.ignore_patterns("*.png"))
    assert "\nfor curves.png: pip install matplotlib\n" in people(sample, "--out", out, "--eval-only", PYTHONPATH=str(tmp_path))[0]
    assert not list(out.glob("*.png"))
