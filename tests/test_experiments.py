"""The small-scale experiments: what is run, recorded and printed."""

import functools
import json
import re
import shlex
import sys
from collections import defaultdict

import pytest
import safetensors.torch
import torch
from conftest import SAMPLE, run_cli

from hyperpelt import ATTENTION_BLOCKS, HyperPELT, HyperPELTConfig, list_sites
from t5 import T5, T5Config

sys.path.append(str(SAMPLE))
import experiments

TINY = "--max-steps 2 --max-train-examples 40 --max-eval-examples 8"


def test_the_tables_of_the_page_come_from_the_results():
    page = (SAMPLE / "RESULTS.md").read_text()
    assert "| `hyperpelt` | " in page and experiments.fill(page) == page
    # Also where the line breaks before the number.
    hours = experiments.fill("took\n0.0 core-hours").split()[1]
    assert hours != "0.0" and hours in page
    printed = {name for name in experiments.TABLES if f"<!-- {name} -->" in page}
    with open(experiments.RESULTS) as file:
        recorded = {line.split("\t")[0] for line in file} - {"experiment", "ladder-tuning"}
    assert printed == recorded


def test_a_job_is_run_and_recorded_once(tmp_path, monkeypatch, capsys):
    header = experiments.RESULTS.read_text().splitlines()[0]
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.tsv")
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    jobs = [
        experiments.Job("tiny", "norms", "rte", seed, f"--method norms {TINY}") for seed in range(2)
    ]
    jobs.append(experiments.Job("tiny", "wrong", "rte", 0, "--method wrong"))
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"tiny": lambda: jobs})
    (tmp_path / "results.tsv").write_text(header + "\n")
    for left in (3, 1):
        with pytest.raises(experiments.data.UserError, match="1 jobs failed"):
            experiments.run(["tiny"], "", "", 2)
        printed = capsys.readouterr().out
        assert f"tiny: {left} jobs" in printed and "wrong-0: failed" in printed
        recorded = experiments.read_results("tiny")
        assert sorted(row["seed"] for row in recorded) == ["0", "1"]
        assert all(row["step"] == "2" and row["metric"] == "rte accuracy" for row in recorded)
        machines = {row["machine"] for row in recorded}
        assert len(machines) == 1 and machines.pop().endswith(experiments.train.fast_dtypes()[0])


def test_a_question_is_a_choice_where_the_answers_about_a_scene_differ():
    path = SAMPLE / "vqa" / "v2_mscoco_val2014_annotations.json"
    answers = defaultdict(set)
    choices = defaultdict(set)
    for row in json.loads(path.read_text())["annotations"]:
        key = row["image_id"], row["question_type"]
        answers[key].add(row["multiple_choice_answer"])
        choices[key].add(experiments.is_choice(row))
    for key, found in answers.items():
        is_what = key[1].startswith("what")
        # One question alone does not show whether the other thing has another answer.
        if is_what and len(found) == 2 or not is_what:
            assert choices[key] == {is_what}


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_train_takes_the_settings_of_every_job(name):
    parser = experiments.train.make_parser()
    jobs = list(experiments.EXPERIMENTS[name]())
    for job in jobs:
        settings = re.sub("--(zero|freeze|lora|held-out) [a-z0-9 ]+", "", job.settings)
        args = parser.parse_args(["--task", job.tasks, *shlex.split(settings)])
        experiments.train.make_config(args)
        experiments.data.find_tasks(job.tasks)
    assert len({job.folder for job in jobs}) == len(jobs)


def train_changed(folder, options):
    """-> what a run of two steps has trained."""
    done = run_cli(
        SAMPLE / "experiments.py", "train", "--run", folder, *TINY.split(), *options.split()
    )
    assert done.returncode == 0, done.stderr
    return safetensors.torch.load_file(folder / "best.safetensors")


def test_parts_can_be_zero_or_frozen(tmp_path):
    trained = train_changed(tmp_path / "run", "--zero task --freeze layer t5")
    t5 = T5.from_pretrained(SAMPLE / "mini-t5")
    torch.manual_seed(0)
    start = HyperPELT(t5, ["rte"], HyperPELTConfig()).trained()
    norms = [name for name in start if name.startswith("t5.")]
    assert len(norms) > 10 and not trained["task.rte"].any()
    assert all(torch.equal(trained[name], start[name]) for name in ("layer", *norms))
    assert not torch.equal(trained["block"], start["block"])


def test_lora_is_trained_beside_the_norms(tmp_path):
    trained = train_changed(tmp_path / "run", "--method norms --lora 2")
    lora = [name for name in trained if "lora_B" in name]
    norms = [name for name in trained if "norm" in name]
    config = T5Config.from_file(SAMPLE / "mini-t5" / "config.json")
    attentions = list_sites(config, ATTENTION_BLOCKS)
    # q and v of every attention, each with two matrices.
    assert len(norms) > 10
    assert len(lora) == 2 * len(attentions) and len(trained) == 4 * len(attentions) + len(norms)
    assert all(trained[name].any() and trained[name].dtype == torch.float32 for name in lora)


def test_held_out_rows_are_training_rows_that_are_not_trained_on(monkeypatch):
    data, train = experiments.data, experiments.train
    read = functools.partial(data.make_splits, data.TASKS["rte"], SAMPLE, "official")
    rows = [example.source for example in read()["train"]]
    found = {}

    def read_in_the_run():
        found.update(data.make_splits(data.TASKS["rte"], SAMPLE, "official"))

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(train, "HyperPELT", train.HyperPELT)
    monkeypatch.setattr(data, "make_splits", data.make_splits)
    monkeypatch.setattr(train, "main", read_in_the_run)
    experiments.train_changed(["--held-out", "100"])
    assert len(found["validation"]) == 100 and found.keys() == {"train", "validation"}
    kept = [example.source for examples in found.values() for example in examples]
    assert sorted(kept) == sorted(rows)


def test_the_best_rate_is_that_of_a_method_with_all_rates(tmp_path, monkeypatch):
    lines = [experiments.RESULTS.read_text().splitlines()[0]]
    # The mean over the tasks is highest at 1e-3, that over the five metrics at 3e-3.
    values = {"3e-4": (0.5, 0.9, 0.3, 0.5, 0.5), "1e-3": (0.6, 0.7, 0.5, 0.5, 0.5)}
    values["3e-3"] = (0.2, 0.9, 0.9, 0.5, 0.5)
    names = ("rte accuracy", "mrpc accuracy", "mrpc f1", "stsb pearson", "stsb spearman")
    jobs = [("hyperpelt", rate) for rate in values] + [("adapter", "3e-4"), ("adapter", "1e-3")]
    for method, rate in jobs:
        start = f"three-tuning\t{method}, {rate}\trte,mrpc,stsb\t100\t--lr {rate}\t746"
        for name, value in zip(names, values[rate], strict=True):
            lines.append(f"{start}\t{name}\t{value}\t1\tabc")
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.tsv")
    (tmp_path / "results.tsv").write_text("\n".join(lines))
    assert experiments.best_rates() == {"hyperpelt": "1e-3"}
    jobs = list(experiments.three_tasks())
    assert [job.seed for job in jobs] == [0, 1, 2]
    assert all("--lr 1e-3" in job.settings for job in jobs)


def test_differences_are_paired():
    steps = {0: {"10": 0.1, "20": 0.5}, 1: {"10": 0.2, "20": 0.7}}
    others = {0: {"20": 0.4}, 1: {"20": 0.6}}
    assert experiments.difference(steps, others) == "+10.0 ± 0.0"
    assert experiments.difference(steps, {0: {"20": 0.4}, 1: {"20": 0.5}}) == "+15.0 ± 5.0"
    assert experiments.difference(steps, steps) == ""
    assert experiments.difference(steps, {0: {"20": 0.4}}) == ""
    assert experiments.spread(experiments.last_values(steps)) == "60.0 ± 14.1"
    assert experiments.first_steps(steps, 0.15) == "20 10"
    assert experiments.first_steps(steps, 0.6) == "- 20"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "slow"], "found slow, expected some of speed"),
        (["run", "--jobs", "1", "speed"], "speed, three-tasks, three-tuning need --model and"),
    ],
)
def test_a_mistake_is_a_short_error(arguments, message):
    done = run_cli(SAMPLE / "experiments.py", *arguments)
    assert done.returncode == 2 and message in done.stderr
