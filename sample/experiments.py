"""The paper's claims on a small scale: train, record, print.

    python sample/experiments.py run --model T5 --data-dir DIR              # all; 40 core-hours
    python sample/experiments.py run speed --model T5 --data-dir DIR --jobs 1
    python sample/experiments.py print          # tables from results.tsv into RESULTS.md

A job is one run of train.py on one core. When it has ended, each of its evaluations is a line of
results.tsv. A job with lines there is not run again, and one that was interrupted goes on: the same
command continues where it stopped.
"""
import argparse
import csv
import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import data
import train
from hyperpelt import ATTENTION_BLOCKS, HyperPELT, HyperPELTConfig, count
from t5 import T5, T5Config

SAMPLE = Path(__file__).resolve().parent
ROOT = SAMPLE.parent
RUNS = ROOT / "runs" / "experiments"
RESULTS = SAMPLE / "results.tsv"
ANNOTATIONS = SAMPLE / "vqa" / "v2_mscoco_val2014_annotations.json"
COLUMNS = ("experiment", "method", "tasks", "seed", "settings", "step", "metric", "value",
           "seconds", "commit")
FIRST_EDITION = "--set hyper_norm=false --norm-rate 1 --warmup-steps 10 --lr 2e-3"


@dataclass(frozen=True)
class Job:
    experiment: str
    method: str             # what the table calls it
    tasks: str
    seed: int
    settings: str           # options of train.py

    @property
    def folder(self):
        name = "-".join([self.tasks, self.method, *re.findall("--lr (.*?) ", self.settings)])
        return RUNS / self.experiment / f"{name}-{self.seed}".replace(" ", "-")


# ---- the experiments -----------------------------------------------------------------------------

def speed():
    """How fast the defaults learn, before and after, and full fine-tuning."""
    full = "--method full --lr 3e-4 --norm-rate 1"
    methods = (("hyperpelt", "", 3), ("first edition", FIRST_EDITION, 3), ("full", full, 1))
    for seed in range(3):
        for task, every in (("stsb", 60), ("mrpc", 46), ("rte", 39)):
            for method, options, seeds in methods:
                if seed < seeds:
                    common = f"--epochs 3 --eval-every {every} --max-eval-examples 500"
                    yield Job("speed", method, task, seed, f"{common} {options}".strip())


RUNGS = ("norms", "prefix", "adapter", "mam", "hyperprefix", "hyperadapter", "hyperpelt")
RATES = ("3e-4", "1e-3", "3e-3")
LADDER = "--protocol paper --epochs 3 --eval-every 25"


def ladder_tuning():
    """The sample's `rte`: three learning rates for every rung, on the validation examples."""
    for rung in RUNGS:
        for rate in RATES:
            yield Job("ladder-tuning", rung, "rte", 100, f"--method {rung} --lr {rate} {LADDER}")


def ladder():
    """Every rung at its best rate. The test examples were used for nothing else."""
    for seed in range(3):
        for rung in RUNGS:
            settings = best_settings("ladder-tuning", rung)
            yield Job("ladder", rung, "rte", seed, settings)


def best_settings(experiment, method):
    """-> settings of the run of a method with the highest value at its last evaluation."""
    rows = [row for row in read_results() if row["experiment"] == experiment
            and row["method"] == method and row["step"] != "best"]
    last = {row["settings"]: float(row["value"]) for row in rows}
    return max(last, key=last.get)


def hyper_embedding():
    """What each embedding does: one model for two tasks of the sample."""
    variants = {"hyperpelt": "", "z = 0": "--zero task", "l = 0": "--zero layer",
                "b = 0": "--zero block", "l, b frozen": "--freeze layer block",
                "one row": "--set per_position=false"}
    for seed in range(3):
        for variant, options in variants.items():
            yield Job("hyper-embedding", variant, "rte,sst2", seed,
                      f"--epochs 3 --eval-every 375 {options}".strip())


def budgets():
    """Prefixes against adapters with about the same number of trained parameters."""
    for seed in range(3):
        for length, bottleneck in ((1, 1), (8, 3), (49, 16)):
            for method, sizes in (
                ("hyperprefix", f"prefix_length={length}"),
                ("hyperadapter", f"prefix_length=1 bottleneck={bottleneck}"),
            ):
                settings = f"{best_settings('ladder-tuning', method)} --set {sizes}"
                yield Job("budgets", f"{method} {sizes}", "rte", seed, settings)


def blocks():
    """Prefixes in one kind of attention only; in all of them: the ladder's hyperprefix."""
    for seed in range(3):
        for block in ATTENTION_BLOCKS:
            settings = f"{best_settings('ladder-tuning', 'hyperprefix')} --set"
            yield Job("blocks", block, "rte", seed, f"{settings} 'prefix_blocks={block}'")


def vision():
    """What an image gives: the sample's questions, by their type."""
    for seed in range(3):
        for mode in ("both", "prefix", "adapter", "tokens", "shuffled"):
            yield Job("vision", mode, "vqa", seed, f"--vision {mode}")


# These take --model and --data-dir. The others use the sample.
ON_REAL_DATA = ("speed",)
EXPERIMENTS = {"speed": speed, "ladder-tuning": ladder_tuning, "ladder": ladder,
               "hyper-embedding": hyper_embedding, "budgets": budgets, "blocks": blocks,
               "vision": vision}


# ---- running -------------------------------------------------------------------------------------

def run_job(job, options):
    """Train, and add the evaluations to results.tsv."""
    folder = job.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "train", "--run", folder]
    settings = ["--task", job.tasks, "--seed", str(job.seed), "--protocol", "official",
                *shlex.split(job.settings)]
    if job.experiment in ON_REAL_DATA:
        settings += options
    # More threads would add up in another order, so that the numbers would differ.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    with open(f"{folder}.log", "w") as log:
        call = functools.partial(subprocess.run, cwd=ROOT, stdout=log, stderr=log, env=environment)
        failed = call([*command, "--resume", *settings]).returncode
        if job.tasks == "vqa" and not failed:
            failed = call([*command, "--predict", "validation"]).returncode
    if failed:
        return print(f"{folder}: failed, see {folder}.log")

    seconds = round(time.perf_counter() - start)
    with open(RESULTS, "a", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        for step, metric, value in read_evaluations(folder):
            writer.writerow([*dataclasses.astuple(job), step, metric, f"{value:.4f}", seconds,
                             commit()])
    print(f"{folder}: {seconds} s", flush=True)


def commit():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                          text=True)
    return done.stdout.strip()


def train_changed(arguments):
    """train.py, with two more options: embeddings that are 0, or stay as they were drawn."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--zero", nargs="+", default=[])
    parser.add_argument("--freeze", nargs="+", default=[])
    changes, sys.argv[1:] = parser.parse_known_args(arguments)

    class Changed(HyperPELT):
        def __init__(self, *args):
            super().__init__(*args)
            for name, parameter in self.named_parameters():
                table = name.split(".")[0]
                if table in changes.zero:
                    parameter.data.zero_()
                if table in changes.zero + changes.freeze:
                    parameter.requires_grad_(False)

    train.HyperPELT = Changed
    data.run(train.main)


def read_evaluations(folder):
    """Of a run: (step, "task metric", value) of each evaluation on validation; of its best
    checkpoint the metrics on test, and the accuracy on each type of question."""
    for line in (folder / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        for task, by_split in row.get("validation", {}).items():
            for metric, value in by_split["validation"].items():
                yield row["step"], f"{task} {metric}", value
    result = json.loads((folder / "metrics.json").read_text())
    for task, by_split in result["metrics"].items():
        for metric, value in by_split.get("test", {}).items():
            yield "best", f"{task} {metric}, test", value
    predictions = folder / "validation-VQAv2.json"
    if predictions.exists():
        answers = {row["question_id"]: row["answer"] for row in json.loads(predictions.read_text())}
        right = defaultdict(list)
        for row in json.loads(ANNOTATIONS.read_text())["annotations"]:
            accuracy = answers[row["question_id"]] == row["multiple_choice_answer"]
            right[row["question_type"]].append(accuracy)
        for question_type, values in right.items():
            yield "best", f"vqa type {question_type}", np.mean(values)


def read_results():
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def run(names, options, workers):
    for name in names:
        done = {tuple(row[column] for column in COLUMNS[:5]) for row in read_results()}
        jobs = [job for job in EXPERIMENTS[name]()
                if tuple(map(str, dataclasses.astuple(job))) not in done]
        print(f"{name}: {len(jobs)} jobs are left", flush=True)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(functools.partial(run_job, options=options), jobs))


# ---- tables and a picture ------------------------------------------------------------------------

def curves(experiment, test=False):
    """-> {(tasks, method): {seed: {step: value}}}, a value being the mean over the tasks of the
    mean of their metrics on validation; test: of the best checkpoint on test."""
    metrics = defaultdict(lambda: defaultdict(list))
    for row in read_results():
        if row["experiment"] == experiment and test == row["metric"].endswith(", test"):
            place = (row["tasks"], row["method"]), int(row["seed"]), row["step"]
            metrics[place][row["metric"].split()[0]].append(float(row["value"]))
    found = defaultdict(lambda: defaultdict(dict))
    for (run, seed, step), by_task in metrics.items():
        step = step if test else int(step)
        found[run][seed][step] = np.mean([np.mean(values) for values in by_task.values()])
    return found


def last_values(by_seed):
    """{seed: {step: value}} -> the last value of each seed."""
    return np.array([list(by_step.values())[-1] for _, by_step in sorted(by_seed.items())])


def first_steps(by_seed, goal):
    """-> for each seed, the step of the first evaluation that reaches the goal, or a dash."""
    return " ".join(next((str(step) for step, value in by_step.items() if value >= goal), "-")
                    for _, by_step in sorted(by_seed.items()))


def spread(values):
    """Numbers from 0 to 1 -> their mean and sample standard deviation in percent."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"


def difference(values, others):
    """Of the same seeds -> mean difference and its standard error in percent."""
    paired = 100 * (values - others)
    return f"{paired.mean():+.1f} ± {np.std(paired, ddof=1) / len(paired) ** 0.5:.1f}"


def speed_table():
    yield "task", "method", "seeds", "95 % of full's last value at step", "last value"
    found = curves("speed")
    for task, method in found:
        goal = 0.95 * last_values(found[task, "full"]).mean()
        by_seed = found[task, method]
        yield (task, method, str(len(by_seed)), first_steps(by_seed, goal),
               spread(last_values(by_seed)))


def ladder_table():
    yield ("rung", "learning rate", "test accuracy", "difference to hyperpelt",
           "0.9 on validation at step")
    test, validation = curves("ladder", test=True), curves("ladder")
    best = last_values(test["rte", "hyperpelt"])
    for rung in RUNGS:
        rate = re.search("--lr ([^ ]+)", best_settings("ladder-tuning", rung))[1]
        values = last_values(test["rte", rung])
        yield (f"`{rung}`", rate, spread(values),
               "" if rung == "hyperpelt" else difference(values, best),
               first_steps(validation["rte", rung], 0.9))


def hyper_embedding_table():
    yield "variant", "mean of both tasks", "difference to hyperpelt"
    found = curves("hyper-embedding")
    whole = last_values(found["rte,sst2", "hyperpelt"])
    for (_, variant), by_seed in found.items():
        values = last_values(by_seed)
        yield variant, spread(values), "" if values is whole else difference(values, whole)


def budgets_table():
    yield "method and sizes", "trained parameters", "test accuracy"
    t5_config = T5Config.from_file(SAMPLE / "mini-t5" / "config.json")
    for (_, label), by_seed in curves("budgets", test=True).items():
        method, *sizes = label.split()
        values = {name: int(size) for name, size in (text.split("=") for text in sizes)}
        with torch.device("meta"):
            model = HyperPELT(T5(t5_config), ["rte"], HyperPELTConfig(method, **values))
        trained = count(model.trained().values())
        yield f"`{method}`, {', '.join(sizes)}", f"{trained:,}", spread(last_values(by_seed))


def blocks_table():
    yield "prefixes in", "test accuracy"
    for (_, block), by_seed in curves("blocks", test=True).items():
        yield block, spread(last_values(by_seed))


def vision_table():
    """The accuracy of every mode on every type of question."""
    values = defaultdict(list)
    for row in read_results():
        if row["experiment"] == "vision" and "type" in row["metric"]:
            values[row["method"], row["metric"].split("type ")[1]].append(float(row["value"]))
    types = list(dict.fromkeys(question_type for _, question_type in values))
    yield "mode", "all", *types
    found = curves("vision")
    for _, mode in found:
        of_types = [spread(values[mode, question_type]) for question_type in types]
        yield mode, spread(last_values(found["vqa", mode])), *of_types


def draw_ladder():
    """figures/ladder.png: accuracy over steps of every rung, mean and range of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    found = curves("ladder")
    for rung in RUNGS:
        runs = np.array([list(by_step.values()) for by_step in found["rte", rung].values()])
        steps = list(next(iter(found["rte", rung].values())))
        axes.plot(steps, runs.mean(0), label=rung)
        axes.fill_between(steps, runs.min(0), runs.max(0), alpha=0.1)
    axes.set(xlabel="step", ylabel="accuracy on validation")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(SAMPLE / "figures" / "ladder.png", dpi=100)


TABLES = {"speed": speed_table, "ladder": ladder_table, "hyper-embedding": hyper_embedding_table,
          "budgets": budgets_table, "blocks": blocks_table, "vision": vision_table}


def markdown(rows):
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * lines[0].count(" | ") + " --- |", *lines[1:]])


def fill(page):
    """A page with its tables between <!-- NAME --> and <!-- end --> made anew."""
    for name, make_table in TABLES.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        filled = markdown(make_table())
        page = between.sub(rf"\1\n{filled}\n\n\2", page)
    return page


# ---- the command line ----------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="Run experiments, or print their tables.")
    parser.add_argument("command", choices=["run", "print", "train"])
    parser.add_argument("names", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default: 2")
    if sys.argv[1:2] == ["train"]:
        return train_changed(sys.argv[2:])
    args, options = parser.parse_known_args()
    if unknown := set(args.names) - EXPERIMENTS.keys():
        parser.error(f"found {', '.join(unknown)}, expected some of {', '.join(EXPERIMENTS)}")
    if args.command == "run":
        run(args.names or EXPERIMENTS, options, args.jobs)
    page = SAMPLE / "RESULTS.md"
    page.write_text(fill(page.read_text()))
    draw_ladder()


if __name__ == "__main__":
    main()
