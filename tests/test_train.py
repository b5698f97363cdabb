"""The command line in subprocesses, at tiny size, on made-up rows: what a user does and what a user gets wrong."""
import importlib.util
import json
import math
import os
import re
import resource
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
from hyperpelt import METHODS, HyperPELT, HyperPELTConfig
from t5 import T5, Tokenizer
from conftest import ROOT, execute, make_checkpoint, read_json, run

TINY = ["--prefix-length", 5, "--embedding-dim", 12, "--hyper-dim", 6, "--bottleneck", 4, "--batch-size", 8, "--precision", "fp32"]

RUN = ["--steps", 40, "--eval-every", 10, "--lr", 0.02, "--warmup-steps", 4, "--schedule", "constant"]


def command(checkpoint, glue, out, *more, task="rte"):
    return ["train.py", "--task", task, "--model", checkpoint, "--data-dir", glue, "--out", out, *TINY, *more]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(checkpoint, glue, tmp_path_factory):
    """A run of 40 steps, never interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    stdout, _ = run(*command(checkpoint, glue, out, *RUN))
    return out, stdout


def test_a_run_and_its_folder(finished):
    out, stdout = finished
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".png") == ["best.safetensors", "config.json", "last.safetensors", "log.jsonl", "metrics.json"]
    metrics, log, config = read_json(out / "metrics.json"), log_of(out), read_json(out / "config.json")
    steps = [row for row in log if "loss" in row]
    assert [row["step"] for row in steps] == [10, 20, 30, 40] and steps[3]["loss"] < steps[0]["loss"]
    assert set(steps[0]) == {"step", "task", "loss", "accuracy", "lr", "examples_per_s", "peak_memory_mb"} and steps[0]["lr"] == 0.02
    started, ended = ((out / name).stat().st_mtime for name in ("config.json", "metrics.json"))
    rows_of_a_step = 43 / 6                                                  # an epoch: five batches of 8 and one of 3
    assert 0 < sum(10 * rows_of_a_step / row["examples_per_s"] for row in steps) < 1.05 * (ended - started)
    evaluations = {row["step"]: row["validation"]["rte"]["validation"]["accuracy"] for row in log if "validation" in row}
    assert list(evaluations) == [10, 20, 30, 40]
    best = max(evaluations.values())
    assert metrics["best_step"] == min(step for step, value in evaluations.items() if value == best)
    assert metrics["rte"]["validation"]["accuracy"] == best and 0 <= metrics["rte"]["test"]["accuracy"] <= 1
    names = set(load_file(out / "best.safetensors"))
    assert {n for n in names if not n.startswith("t5.")} and all("norm" in n for n in names if n.startswith("t5."))
    trained = sum(t.numel() for t in load_file(out / "best.safetensors").values())
    assert config["trained_parameters"] == trained and config["fingerprints"]["device"] == "cpu" and f"{trained:,} trained parameters" in stdout
    assert "\r" not in stdout                                    # no progress bar where the output is no terminal


def test_same_seed_same_bytes(finished, checkpoint, glue, tmp_path):
    out, _ = finished
    run(*command(checkpoint, glue, tmp_path / "run", *RUN))
    for name in ("best.safetensors", "last.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    run(*command(checkpoint, glue, tmp_path / "other", *RUN, "--seed", 1))
    assert (out / "best.safetensors").read_bytes() != (tmp_path / "other" / "best.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_and_resume_exactly(number, finished, checkpoint, glue, tmp_path):
    """Stopped by a signal at any step and resumed, a run ends with the bytes and the log of one never stopped."""
    out = tmp_path / "run"
    arguments = command(checkpoint, glue, out, *RUN)
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not ((out / "log.jsonl").exists() and len(log_of(out)) >= 1) and process.poll() is None:
        time.sleep(0.001)                                        # the row of step 10 is in the log
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in stderr and "Traceback" not in stderr
    assert 10 <= int(re.search(r"stopped at step (\d+)", stderr)[1]) < 40
    stdout, _ = run("train.py", "--out", out, "--resume")
    assert "resumed at step" in stdout
    for name in ("best.safetensors", "last.safetensors", "metrics.json"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes(), name
    timeless = lambda rows: [{k: v for k, v in row.items() if k not in ("examples_per_s", "peak_memory_mb")} for row in rows]
    assert timeless(log_of(out)) == timeless(log_of(finished[0]))


def test_resume_from_an_older_checkpoint(finished, checkpoint, glue, tmp_path):
    """A run killed after its checkpoint of step 20: log rows after it are dropped, and all is repeated exactly."""
    out = tmp_path / "run"
    arguments = command(checkpoint, glue, out, *RUN)
    killer = ("import os, train, data; old = train.save_last\n"
              "def save(path, model, optimiser, progress):\n"
              "    if progress['step'] == 30: os._exit(9)\n"
              "    old(path, model, optimiser, progress)\n"
              "train.save_last = save; data.run(train.main)")
    assert execute("-c", killer, *arguments[1:]).returncode == 9 and log_of(out)[-1]["step"] == 30
    run("train.py", "--out", out, "--resume")
    for name in ("best.safetensors", "last.safetensors", "metrics.json"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes(), name
    assert [row["step"] for row in log_of(out)] == [row["step"] for row in log_of(finished[0])]


def test_eval_only_and_predict(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    before = read_json(out / "metrics.json")
    (out / "metrics.json").unlink()
    run("train.py", "--out", out, "--eval-only")
    assert read_json(out / "metrics.json") == before
    for split, file, count in (("submission", "RTE.tsv", 6), ("validation", "RTE-validation.tsv", 10)):
        run("train.py", "--out", out, "--predict", split)
        lines = (out / file).read_text().splitlines()
        assert lines[0] == "index\tprediction" and len(lines) == count + 1
        assert all(line.split("\t")[1] in ("entailment", "not_entailment") for line in lines[1:])
    predicted = {line.split("\t")[0]: line.split("\t")[1] for line in lines[1:]}
    gold = {e.index: e.gold for e in data.make_splits(data.TASKS["rte"], read_json(out / "config.json")["settings"]["data_dir"])["validation"]}
    assert predicted.keys() == gold.keys()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "hyperpelt"])
def test_every_method_trains(method, checkpoint, glue, tmp_path):
    run(*command(checkpoint, glue, tmp_path / "run", "--method", method, "--steps", 12, "--eval-every", 12, "--lr", 0.01,
                 "--schedule", "linear", "--label-smoothing", 0.1, "--warmup-steps", 2, "--split", "official"))
    log, metrics = log_of(tmp_path / "run"), read_json(tmp_path / "run" / "metrics.json")
    assert math.isfinite(log[0]["loss"]) and set(metrics["rte"]) == {"validation"}
    assert log[0]["lr"] == pytest.approx(0.01 * (12 - 9) / (12 - 2))          # the tenth step of a linear schedule


def test_two_tasks_in_one_run(checkpoint, glue, tmp_path):
    run(*command(checkpoint, glue, tmp_path / "run", "--epochs", 2, "--precision", "bf16", task="rte,stsb"))
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert set(metrics["rte"]["test"]) == {"accuracy"} and set(metrics["stsb"]["test"]) == {"pearson", "spearman"}
    assert len(load_file(tmp_path / "run" / "best.safetensors")["hyper_embedding.task"]) == 2


def test_batches_are_a_function_of_seed_and_step():
    """Single task: each row once an epoch. Several: one task a batch, in the proportions of n^(1/T)."""
    class Settings:
        batch_size, steps, epochs, temperature, seed = 4, 0, 2.0, 10.0, 0
    rows = {"a": {"train": [data.Row(np.array([i, 1]), [np.array([1])], np.ones(1)) for i in range(10, 30)]}}
    steps, batch = train_module.make_batches(rows, Settings)
    assert steps == 10
    seen = torch.cat([batch(step).input_ids[:, 0] for step in range(5)])
    assert sorted(seen.tolist()) == list(range(10, 30))
    again = torch.cat([train_module.make_batches(rows, Settings)[1](step).input_ids[:, 0] for step in range(5)])
    assert torch.equal(seen, again)
    counts = dict(cola=8551, sst2=66349, mrpc=3668, qqp=362846, stsb=5749, mnli=391702, qnli=103743, rte=2490)
    expected = dict(cola=.109, sst2=.134, mrpc=.100, qqp=.158, stsb=.105, mnli=.159, qnli=.140, rte=.096)
    one = data.Row(np.array([5, 1]), [np.array([1])], np.ones(1))
    Settings.steps = 20_000
    steps, batch = train_module.make_batches({name: {"train": [one] * count} for name, count in counts.items()}, Settings)
    drawn = [batch(step).task for step in range(0, 20_000, 10)]
    for name, share in expected.items():
        assert abs(drawn.count(name) / len(drawn) - share) < 4 * math.sqrt(share / len(drawn))


# ---------------------------------------------------------------------------------------------------- user's mistakes

def test_resume_of_another_run_is_refused(finished, checkpoint, glue, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    _, error = run("train.py", "--out", out, "--resume", "--lr", 0.5, "--bottleneck", 9, ok=False)
    assert "--lr was 0.02, is 0.5" in error and "--bottleneck was 4, is 9" in error
    assert "holds a run already" in run(*command(checkpoint, glue, out), ok=False)[1]
    changed = tmp_path / "glue"
    shutil.copytree(glue, changed)
    (changed / "RTE" / "train.tsv").write_text((glue / "RTE" / "train.tsv").read_text().replace("cat", "dog"))
    assert "another data" in run("train.py", "--out", out, "--resume", "--data-dir", changed, ok=False)[1]
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"shared.weight": tensors["shared.weight"] + 1}, other / "model.safetensors")
    assert "another backbone" in run("train.py", "--out", out, "--resume", "--model", other, ok=False)[1]
    assert "no such file" in run("train.py", "--out", tmp_path / "none", "--resume", ok=False)[1]


def test_damaged_checkpoints(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    whole = (out / "best.safetensors").read_bytes()
    (out / "best.safetensors").write_bytes(whole[:-100])
    assert "not a whole safetensors file" in run("train.py", "--out", out, "--eval-only", ok=False)[1]
    tensors = load_file(finished[0] / "best.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "hyper_embedding.task"}, out / "best.safetensors")
    assert "tensor hyper_embedding.task is missing" in run("train.py", "--out", out, "--predict", "test", ok=False)[1]
    save_file(tensors | {"hyper_embedding.task": torch.zeros(1, 5, 11)}, out / "best.safetensors")
    assert "has shape [1, 5, 11], expected [1, 5, 12]" in run("train.py", "--out", out, "--eval-only", ok=False)[1]
    save_file(tensors, out / "best.safetensors")
    assert "metadata: hyperpelt: found None, expected an object with step" in run("train.py", "--out", out, "--eval-only", ok=False)[1]
    state = load_file(out / "last.safetensors")
    progress = {"hyperpelt": json.dumps(dict(step=40, evaluated=40, best_step=10, best=0.5, right=0, seen=0))}
    for wrong in (dict(step=40, evaluated=40, best_step=10, best=0.5, right=0), dict(step=40, evaluated=40, best_step="10", best=0.5, right=0, seen=0), [40]):
        save_file(state, out / "last.safetensors", {"hyperpelt": json.dumps(wrong)})
        assert f"metadata: hyperpelt: found {str(wrong)[:40]}, expected an object with step, evaluated, best_step, best, right, seen" in \
            run("train.py", "--out", out, "--resume", ok=False)[1]
    save_file(state | {"generator.cpu": torch.zeros_like(state["generator.cpu"])}, out / "last.safetensors", progress)
    assert "tensor generator" in run("train.py", "--out", out, "--resume", ok=False)[1]
    for text, words in (("[]", "expected a JSON object"), ('{"settings": null}', "settings holds None"), ("{", "not JSON"),
                        ('{"settings": {"lr": "x"}}', "expected")):
        (out / "config.json").write_text(text)
        assert words in run("train.py", "--out", out, "--resume", ok=False)[1]
    shutil.copy(finished[0] / "config.json", out)
    (out / "last.safetensors").unlink()
    assert "last.safetensors: no such file" in run("train.py", "--out", out, "--resume", ok=False)[1]


def test_wrong_command_lines(checkpoint, glue, tmp_path, monkeypatch):
    base = command(checkpoint, glue, tmp_path / "run")
    for more, word in ((["--method", "lora"], "lora"), (["--steps", "-1"], "int from 1 to"), (["--lr", "x"], "--lr"), (["--nonsense"], "--nonsense"),
                       (["--epochs", "0"], "--epochs"), (["--temperature", "nan"], "--temperature"), (["--seed", 2**70], "--seed"),
                       (["--predict", "test"], "config.json: no such file"), (["--resume"], "config.json: no such file")):
        monkeypatch.setattr(sys, "argv", [*map(str, base + more)])
        with pytest.raises(data.UserError, match=word):
            train_module.complete_settings(train_module.parse_arguments())
    for more, word in ((["--task", "rtf"], "'rtf' is unknown"), (["--model", "t5-bse"], "'t5-bse' is neither"), (["--data-dir", tmp_path], "no such folder"),
                       (["--batch-size", "0"], "int from 1 to")):
        assert word in run(*base, *more, ok=False)[1]
    assert not (tmp_path / "run").exists()
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "spiece.model").unlink()
    assert "spiece.model: no such file" in run(*base, "--model", broken, ok=False)[1]
    tokens = shutil.copytree(checkpoint, tmp_path / "tokens")
    make_checkpoint(tokens, vocab_size=100)
    assert "vocab_size 100" in run(*base, "--model", tokens, ok=False)[1]
    help_text = " ".join(run("train.py", "--help")[0].split())
    assert all(f"--{name}" in help_text for name, *_ in train_module.OPTIONS) and help_text.count("(default: ") == len(train_module.OPTIONS)


def test_divergence_stops_the_run(checkpoint, glue, tmp_path):
    _, error = run(*command(checkpoint, glue, tmp_path / "run", "--steps", 50, "--lr", 1e8, "--warmup-steps", 0), ok=False)
    assert re.search(r"step \d+, task rte, training rows (\d+, ){5}... \(from 0\): loss .* diverged", error)
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "run" / "last.safetensors").values())


def test_one_generation_for_a_whole_evaluation(checkpoint, monkeypatch):
    """The hypernetworks run once for an evaluation of several batches, each of several decoding steps."""
    model = HyperPELT(T5.from_pretrained(checkpoint), ["rte"], HyperPELTConfig(prefix_length=3, embedding_dim=8, hyper_dim=4, bottleneck=2))
    calls = []
    model.prefix_hypernetwork.register_forward_hook(lambda *args: calls.append("prefix"))
    model.adapter_hypernetwork.register_forward_hook(lambda *args: calls.append("adapter"))
    rows = [data.Row(np.array([5, 6, 7, 1]), [np.array([1])], np.ones(1))] * (2 * train_module.EVAL_BATCH + 1)
    texts = train_module.answer(model, Tokenizer.from_pretrained(checkpoint), data.TASKS["rte"], rows, [])
    assert calls == ["prefix", "adapter"] and len(texts) == len(rows) and len(set(texts)) == 1


def test_longest_answer(checkpoint, monkeypatch):
    """No more tokens are asked for than the longest right answer has, and one that ends it; captions are searched for with five beams."""
    tokenizer, asked = Tokenizer.from_pretrained(checkpoint), []
    model = HyperPELT(T5.from_pretrained(checkpoint), ["rte", "stsb", "vqa", "caption", "snlive"], HyperPELTConfig(prefix_length=3, embedding_dim=8, hyper_dim=4, bottleneck=2))
    monkeypatch.setattr(model.t5, "generate", lambda ids, max_new_tokens, num_beams, sites: asked.append((max_new_tokens, num_beams)) or ids)
    for name in model.tasks:
        train_module.answer(model, tokenizer, data.find_task(name), [data.Row(np.array([5, 1]), [np.array([1])], np.ones(1))], [])
    tokens = lambda *words: max(len(tokenizer.encode(word)) for word in words)
    scores = [f"{i / 5:.1f}" for i in range(26)]
    assert scores[0] == "0.0" and scores[18] == "3.6" and scores[-1] == "5.0"
    assert asked == [(tokens("entailment", "not_entailment"), 1), (tokens(*scores), 1), (10, 1), (40, 5), (tokens("entailment", "neutral", "contradiction"), 1)]


def test_right_rows_are_counted():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (200, 3, 4), generator=generator).float() + torch.rand(200, 3, 4, generator=generator) / 2
    labels = torch.randint(0, 4, (200, 3), generator=generator)
    labels[::2, 2] = -100
    expected = sum(all(row[t].argmax() == label for t, label in enumerate(wanted) if label != -100) for row, wanted in zip(logits, labels))
    assert 0 < expected < 200 and train_module.count_right(logits, labels).item() == expected


def test_peak_memory(monkeypatch):
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert train_module.peak_memory_mb() == pytest.approx(kilobytes / 1024, abs=1)
    monkeypatch.setattr(sys, "platform", "darwin")                           # counts bytes
    assert train_module.peak_memory_mb() == pytest.approx(kilobytes / 1024**2, abs=1)


def test_torn_log(tmp_path):
    """What a crash leaves at the end of log.jsonl is dropped with the rows after the checkpoint."""
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 5}\n{"step": 10}\n{"step": 15}\n{"ste')
    assert train_module.read_log(log, 10) == ['{"step": 5}', '{"step": 10}'] and len(train_module.read_log(log, 99)) == 3
    log.write_bytes(b'{"step": 5}\n\xff\xfe')
    assert train_module.read_log(log, 99) == ['{"step": 5}'] and train_module.read_log(tmp_path / "none", 9) == []


def test_mnli_from_files_to_two_submissions(checkpoint, tmp_path):
    """Matched and mismatched sets are scored apart, and GLUE wants a file for each."""
    (tmp_path / "MNLI").mkdir()
    for name in ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched"):
        labelled = not name.startswith("test")
        lines = ["index\tsentence1\tsentence2" + "\tgold_label" * labelled]
        lines += [f"{i}\tthe cat\ta dog" + "\tneutral" * labelled for i in range(6)]
        (tmp_path / "MNLI" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    run(*command(checkpoint, tmp_path, out, "--steps", 2, task="mnli"))
    assert list(read_json(out / "metrics.json")["mnli"]) == list(read_json(out / "metrics.json")["majority"]["mnli"]) == ["validation", "mismatched", "test"]
    run("train.py", "--out", out, "--predict", "submission")
    assert all(len((out / f"MNLI-{part}.tsv").read_text().splitlines()) == 7 for part in ("m", "mm"))


def test_tour(finished, tmp_path):
    """The tour of a trained run: shapes from the run's sizes, shares of attention that are shares, the answer as --eval-only has it."""
    out, _ = run("hyperpelt.py", "--tour", finished[0])
    assert "[10, 5, 6]" not in out and "[12, 5, 6]" in out and "[3, 5, 16], [3, 5, 16]: heads, N, d_kv" in out and "[4, 32], [4], [32, 4], [32]" in out
    shares = [float(x) for line in out.split("eq. (3)")[1].split("eq. (4)")[0].splitlines() if "attention  " in line for x in re.findall(r"\d\.\d{3}", line)]
    assert len(shares) == 3 + 2 + 2 and all(0 < share < 1 for share in shares)
    first = data.make_splits(data.TASKS["rte"], read_json(finished[0] / "config.json")["settings"]["data_dir"])["validation"][0]
    assert first.source in out and f"should be: {first.target}" in out
    if importlib.util.find_spec("matplotlib"):
        assert (finished[0] / "tour.png").read_bytes()[1:4] == b"PNG" and f"drawn: {finished[0]}/tour.png" in out
    after = out.split("after: ")[1].strip()
    shutil.copytree(finished[0], tmp_path / "run")
    run("train.py", "--out", tmp_path / "run", "--predict", "validation")
    predicted = dict(line.split("\t") for line in (tmp_path / "run" / "RTE-validation.tsv").read_text().splitlines())[first.index]
    assert after == predicted or after not in ("entailment", "not_entailment")      # a submission has the first label for what is none
    assert "this trains one" in run("hyperpelt.py", "--tour", tmp_path / "none", ok=False)[1]
