"""What the paper's experiments need, by the real command line at tiny size: baselines, transfer, seeds, export, processes, tables."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import train as train_module
from conftest import ROOT, execute, make_checkpoint, read_json, run
from hyperpelt import HyperPELT, HyperPELTConfig
from t5 import T5
from test_train import command, log_of

RUN = ["--steps", 24, "--eval-every", 12, "--lr", 0.02, "--warmup-steps", 4]


# ------------------------------------------------------------------------------------------------------ multi-task

def test_sampling_frequencies():
    """p ~ n^(1/T) over 100,000 draws: the shares that HyperFormer's sizes of GLUE give at T = 10, and T = 1 and 2 by hand."""
    counts = [8551, 66349, 3668, 362846, 5749, 391702, 103743, 2490]
    for temperature, expected in ((10, [.109, .134, .100, .158, .105, .159, .140, .096]), (1, np.array(counts) / sum(counts)),
                                  (2, np.sqrt(counts) / np.sqrt(counts).sum())):
        drawn = np.bincount(train_module.draw_tasks(counts, 100_000, temperature, 3), minlength=8) / 100_000
        assert np.abs(drawn - expected).max() < 5 * np.sqrt(0.25 / 100_000)


def test_published_averages():
    """Two rows of HyperFormer's table 1 (HyperFormer++ and multi-task fine-tuning, T5-base): the average is over the 11 values."""
    tasks = {name: data.TASKS[name] for name in data.GLUE}
    for row, published in (("63.73 94.03 89.66 92.63 90.28 87.20 90.00 89.66 85.74 93.02 75.36", 86.48),
                           ("54.88 92.54 90.15 93.01 91.13 88.07 88.84 88.53 85.66 92.04 75.36", 85.47)):
        values = iter(map(float, row.split()))
        metrics = {name: {"test": {metric: next(values) for metric in task.metrics}, "mismatched": {"accuracy": 0.0}} for name, task in tasks.items()}
        means = train_module.averages(tasks, metrics, "test")
        assert round(means["metrics"], 2) == published
        each = [np.mean(list(by_split["test"].values())) for by_split in metrics.values()]
        assert means["tasks"] == pytest.approx(np.mean(each)) and means["tasks"] != means["metrics"]


@pytest.fixture(scope="module")
def several(checkpoint, glue, tmp_path_factory):
    """Runs on two tasks, two seeds of each of two methods."""
    folder = tmp_path_factory.mktemp("several")
    for method in ("hyperpelt", "mam"):
        stdout, _ = run(*command(checkpoint, glue, folder / method, *RUN, "--method", method, "--seeds", 2, task="rte,stsb"))
    return folder, stdout


def test_resume_between_tasks(several, checkpoint, glue, tmp_path):
    """Killed in the middle of two tasks' training and resumed: the same sequence of tasks, rows and losses, the same bytes."""
    whole = several[0] / "hyperpelt" / "seed-0"
    arguments = command(checkpoint, glue, tmp_path / "run", *RUN, task="rte,stsb")
    killer = ("import os, train, data; old = train.learning_rate\n"
              "def rate(step, *more):\n    if step == 17: os._exit(9)\n    return old(step, *more)\n"
              "train.learning_rate = rate; data.run(train.main)")
    assert execute("-c", killer, *arguments[1:]).returncode == 9
    run("train.py", "--out", tmp_path / "run", "--resume")
    kept = lambda out: [{k: v for k, v in row.items() if k not in ("examples_per_s", "peak_memory_mb")} for row in log_of(out)]
    assert kept(tmp_path / "run") == kept(whole) and {row["task"] for row in log_of(whole) if "task" in row} == {"rte", "stsb"}
    for name in ("best.safetensors", "last.safetensors", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


def test_seeds_and_table(several):
    """One command, several seeds; --table: mean and standard deviation over them, by numpy from the runs' own files."""
    folder, stdout = several
    table = run("train.py", "--table", folder / "mam", *sorted((folder / "hyperpelt").iterdir()))[0].strip()
    assert table.splitlines()[:3] == stdout.strip().splitlines()[-3:]
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert head == ["method", "trained", "of the T5", "seeds", "rte accuracy, test", "stsb pearson, spearman, test", "mean of metrics", "mean of tasks"]
    assert [line[0] for line in lines] == ["mam", "hyperpelt"]
    for line in lines:
        metrics = [read_json(folder / line[0] / f"seed-{seed}" / "metrics.json") for seed in (0, 1)]
        values = np.array([[m["rte"]["test"]["accuracy"], *(m["stsb"]["test"][k] for k in ("pearson", "spearman"))] for m in metrics])     # [seeds, 3]
        columns = [values[:, 0], values[:, 1], values[:, 2], values.mean(1), (values[:, 0] + values[:, 1:].mean(1)) / 2]
        cells = [f"{100 * c.mean():.2f} ± {100 * abs(c[0] - c[1]) / 2**0.5:.2f}" for c in columns]
        assert line[3:] == ["2", cells[0], f"{cells[1]} / {cells[2]}", *cells[3:]]
        assert line[1] == f"{sum(t.numel() for t in load_file(folder / line[0] / 'seed-1' / 'best.safetensors').values()):,}"
        assert metrics[0]["average"]["test"]["metrics"] == pytest.approx(values[0].mean())


def test_seeds_beside_a_run_of_one(monkeypatch, tmp_path):
    """The folder that several seeds get by default is named as that of one run; a run that lies in it is not in their way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "rte-norms").mkdir(parents=True)
    (tmp_path / "runs" / "rte-norms" / "config.json").write_text("{}")
    started = []
    monkeypatch.setattr(train_module, "run_once", lambda settings: started.append((settings.out, settings.seed)))
    monkeypatch.setattr(train_module, "table", lambda folders: "")
    train_module.command(dict(method="norms", seeds=2))
    assert started == [(f"runs/rte-norms/seed-{i}", i) for i in (0, 1)]


def test_seeds_go_on(several, tmp_path):
    """A run of several seeds that broke off: --resume skips what is finished and ends with the same table."""
    shutil.copytree(several[0] / "mam", tmp_path / "mam")
    shutil.rmtree(tmp_path / "mam" / "seed-1")
    assert "holds a run already" in run(*command("x", "y", tmp_path / "mam", "--seeds", 2), ok=False)[1]
    settings = read_json(several[0] / "mam" / "seed-0" / "config.json")["settings"]
    arguments = command(settings["model"], settings["data_dir"], tmp_path / "mam", *RUN, "--method", "mam", "--seeds", 2, "--resume", task="rte,stsb")
    stdout = run(*arguments)[0]
    assert "seed-0" not in stdout and stdout.strip().splitlines()[-3:] == several[1].strip().splitlines()[-3:]
    assert (tmp_path / "mam" / "seed-1" / "best.safetensors").read_bytes() == (several[0] / "mam" / "seed-1" / "best.safetensors").read_bytes()


def test_single_task_runs_share_a_row(checkpoint, glue, tmp_path):
    for task in ("rte", "stsb"):
        run(*command(checkpoint, glue, tmp_path / task, "--steps", 2, "--method", "adapter", task=task))
    lines = run("train.py", "--table", tmp_path / "rte", tmp_path / "stsb")[0].splitlines()
    count = sum(sum(t.numel() for t in load_file(tmp_path / task / "best.safetensors").values()) for task in ("rte", "stsb"))
    assert len(lines) == 3 and f"| adapter | {count:,} |" in lines[2] and "| - |" not in lines[2] and "±" not in lines[2]
    assert "metrics.json: no such file" in run("train.py", "--table", tmp_path / "rte", tmp_path / "none", ok=False)[1].replace("config.json", "metrics.json")


# -------------------------------------------------------------------------------------------------------- transfer

def test_transfer(several, checkpoint, glue, tmp_path):
    """A new task begins with the norms, hypernetworks and the nearest (or named) task of a trained run; a known one as itself."""
    rows = [json.dumps(dict(premise=f"the cat {w}", hypothesis=f"a {w}", label=label)) for w in ("eats", "sees") for label in ("entailment", "contradiction", "neutral")]
    (tmp_path / "CB").mkdir()
    for name in ("train", "val"):
        (tmp_path / "CB" / f"{name}.jsonl").write_text("\n".join(rows * 3) + "\n")
    for method in ("hyperpelt", "mam"):
        base, arguments = several[0] / method / "seed-0", ["--method", method, "--init-from", several[0] / method / "seed-0", "--n-train", 4]
        trained = load_file(base / "best.safetensors")
        stdout = run(*command(checkpoint, tmp_path, tmp_path / method, *arguments, "--steps", 1, "--lr", 0, task="cb"))[0]
        new = load_file(tmp_path / method / "best.safetensors")
        losses = {name: float(value) for name, value in (part.split() for part in stdout.split("training rows: ")[1].splitlines()[0].split(", "))}
        source = stdout.split("cb begins as ")[1].split(";")[0]
        assert losses.keys() == {"rte", "stsb"} and source == min(losses, key=losses.get)
        assert "loss on 4 training rows" in stdout and "cb train 4" in stdout
        own = {name for name in new if new[name].shape != trained[name].shape}
        assert own and all(torch.equal(new[name][0], trained[name][["rte", "stsb"].index(source)]) for name in own)
        assert all(torch.equal(new[name], trained[name]) for name in new if name not in own)
    named = tmp_path / "named"
    stdout = run(*command(checkpoint, tmp_path, named, *arguments, "--steps", 1, "--lr", 0, "--init-task", "stsb", task="cb"))[0]
    assert "cb begins as stsb" in stdout and torch.equal(load_file(named / "best.safetensors")["learned.down"][0], trained["learned.down"][1])
    stdout = run(*command(checkpoint, glue, tmp_path / "known", *arguments, "--steps", 1, "--lr", 0, task="stsb"))[0]
    assert "stsb begins as stsb" in stdout and torch.equal(load_file(tmp_path / "known" / "best.safetensors")["learned.up"][0], trained["learned.up"][1])
    for more, words in ((["--init-task", "cola"], "--init-task: found cola"), (["--method", "prefix"], "method was mam, is prefix"),
                        (["--bottleneck", 5], "bottleneck was 4, is 5"), (["--n-train", 44], "rte has 43 training rows"),
                        (["--init-from", tmp_path / "none"], "no such file")):
        assert words in run(*command(checkpoint, glue, tmp_path / "wrong", *arguments, *more), ok=False)[1]


# ---------------------------------------------------------------------------------------------------------- export

@pytest.mark.parametrize("method", ["hyperpelt", "mam"])
def test_export(method, several, checkpoint, tmp_path):
    """The exported file on a plain T5 gives the logits of the run, and holds no hypernetwork."""
    out, file = several[0] / method / "seed-0", tmp_path / "stsb.safetensors"
    stdout = run("train.py", "--out", out, "--export", file, "--task", "stsb")[0]
    tensors = load_file(file)
    names = {name.rsplit(".", 1)[1] for name in tensors}
    assert names == {"key", "value", "down", "down_bias", "up", "up_bias", "weight"} and f"{sum(t.numel() for t in tensors.values()):,} deployed" in stdout
    assert f"{sum(t.numel() for t in load_file(out / 'best.safetensors').values()):,} trained" in stdout
    model = HyperPELT(T5.from_pretrained(checkpoint), ["rte", "stsb"], HyperPELTConfig(method, prefix_length=5, embedding_dim=12, hyper_dim=6, bottleneck=4)).eval()
    train_module.load_best(out / "best.safetensors", model)
    t5 = T5.from_pretrained(checkpoint).eval()
    sites = train_module.load_exported(file, t5)
    ids, labels = torch.randint(2, 60, (3, 9), generator=torch.Generator().manual_seed(0)), torch.tensor([[4, 1], [5, 1], [6, 1]])
    with torch.no_grad():
        assert torch.equal(t5(ids, None, labels, sites)[0], model(ids, ids != 0, labels, "stsb")[0])
        assert not torch.equal(t5(ids, None, labels, sites)[0], model(ids, ids != 0, labels, "rte")[0])
    assert "expected one of the run's tasks" in run("train.py", "--out", out, "--export", file, ok=False)[1]
    other = T5.from_pretrained(checkpoint)
    other.shared.weight.data += 1
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for path, t5, words in ((file, other, "was made for another T5"), (tmp_path / "other.safetensors", t5, "not a file that --export wrote"), (tmp_path / "no", t5, "no such file")):
        with pytest.raises(data.UserError, match=words):
            train_module.load_exported(path, t5)


# ------------------------------------------------------------------------------------------------------- processes

@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory, vocabulary):
    """Each process has dropout of its own: without it two have to do what one does."""
    folder = tmp_path_factory.mktemp("without")
    make_checkpoint(folder, vocab_size=256, dropout_rate=0.0)
    (folder / "spiece.model").write_bytes(vocabulary.read_bytes())
    return folder


def torchrun(*arguments, **more):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)


def test_two_processes_are_one(without_dropout, glue, tmp_path):
    """Batches of 8, 4 rows each (and a last batch of 3, of 2 and 1 rows): the loss curve, the metrics and the weights of one process."""
    more = ["--steps", 30, "--eval-every", 10, "--lr", 0.005, "--method", "hyperpelt"]
    run(*command(without_dropout, glue, tmp_path / "one", *more, task="rte,stsb"))
    process = torchrun(*command(without_dropout, glue, tmp_path / "two", *more, task="rte,stsb"))
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.count("step 10 of 30") == 1 and stdout.count("trained parameters") == 2      # printed once each
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a["step"] == b["step"] and a.get("task") == b.get("task") and a.get("validation") == b.get("validation")
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=2e-4) and a.get("accuracy") == b.get("accuracy")
    assert read_json(tmp_path / "one" / "metrics.json") == read_json(tmp_path / "two" / "metrics.json")
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4, rtol=1e-3) for name in a if name.startswith("trained."))


def test_processes_stop_and_go_on(without_dropout, glue, tmp_path):
    """SIGTERM to torchrun: all stop at the same step, and two go on to where two would have come; one alone is refused."""
    arguments = command(without_dropout, glue, tmp_path / "run", "--steps", 60, "--eval-every", 20, "--lr", 0.005)
    whole = torchrun(*command(without_dropout, glue, tmp_path / "whole", "--steps", 60, "--eval-every", 20, "--lr", 0.005))
    assert whole.wait(300) == 0
    process = torchrun(*arguments)
    while not ((tmp_path / "run" / "log.jsonl").exists() and len(log_of(tmp_path / "run")) >= 1) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=120)[1]
    assert "stopped at step" in stderr and "--resume" in stderr
    assert "another device" in run("train.py", "--out", tmp_path / "run", "--resume", ok=False)[1]
    process = torchrun("train.py", "--out", tmp_path / "run", "--resume")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "resumed at step" in stdout, stderr
    for name in ("best.safetensors", "last.safetensors", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_an_error_of_one_process_ends_all(without_dropout, glue, tmp_path):
    """The second process finds its data damaged: its line is shown, and nobody waits for ever."""
    broken = ("import os, sys, data, train\n"
              "if train.RANK: train.gather_images = lambda rows: (_ for _ in ()).throw(data.UserError('features: row 7 cannot be read'))\n"
              "data.run(train.main)\n")
    (tmp_path / "broken.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + broken)
    process = torchrun(tmp_path / "broken.py", *command(without_dropout, glue, tmp_path / "run", "--steps", 30)[1:])
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and "error: features: row 7 cannot be read" in stderr
    assert f'{ROOT}/train.py", line' not in stderr               # torchrun has a traceback of its own, the project has none
