"""The paper's claims on a small scale: train, record, print.

    python sample/experiments.py run --model T5 --data-dir DIR      # all jobs that are missing
    python sample/experiments.py run ladder-tuning ladder           # these two, on the sample
    python sample/experiments.py print          # tables of RESULTS.md and figures/ladder.png

A job is one run of train.py on one core. When it has ended, each of its evaluations is a line of
results.tsv. A job with lines there is not run again, and one that was interrupted goes on: the same
command continues where it stopped.
"""
import argparse
import csv
import functools
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent / "make"))

import numpy as np
import torch

import data
import scenes
import train
from hyperpelt import ATTENTION_BLOCKS, VISION, HyperPELT, HyperPELTConfig, count
from t5 import T5, T5Config

SAMPLE = Path(__file__).resolve().parent
ROOT = SAMPLE.parent
RUNS = ROOT / "runs" / "experiments"
RESULTS = SAMPLE / "results.tsv"
SIDES = RUNS / "sides-data"
JOB_COLUMNS = ("experiment", "method", "tasks", "seed", "settings")


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

FIRST_EDITION = "--set hyper_norm=false --norm-rate 1 --warmup-steps 10 --lr 2e-3"
FULL = "--method full --lr 3e-4 --norm-rate 1"
RUNGS = ("norms", "prefix", "adapter", "mam", "hyperprefix", "hyperadapter", "hyperpelt")
AT_DEFAULT = "hyperpelt, default"
FIVE_EPOCHS = "--epochs 5 --eval-every 625"
# The methods that are also trained on each task alone.
ALONE = {"hyperpelt": "--method hyperpelt", "adapter": "--method adapter", "full": FULL}
# Methods of models for several tasks that need more than --method.
OTHER = {"full": FULL, "LoRA": "--method norms --lora 8",
         "prefix, per-task": "--method prefix --set sharing=per-task",
         "mam, per-task": "--method mam --set sharing=per-task"}
RATES = ("3e-4", "1e-3", "3e-3")
# Ways to let an image in, {label in the tables: options}. Those with maps set visual_maps.
WAYS = {mode: f"--vision {mode}" for mode in VISION}
WAYS |= {f"{mode} (maps)": f"--vision {mode} --set visual_maps=true" for mode in ("both", "prefix")}
SIZES = (16, 64, 256)
FEW = "--max-steps 200 --batch-size 16 --eval-every 200"
ONLY_Z = "--freeze layer block hypernetworks t5 --lr 1e-2"
LADDER = "--protocol paper --epochs 3 --eval-every 25"
THREE = "rte,mrpc,stsb"
THREE_METHODS = ("hyperpelt", "adapter", "norms", "LoRA", "hyperprefix", "hyperadapter", "full",
                 "hypervector", "prefix", "mam", "prefix, per-task", "mam, per-task")
THREE_STEPS = "--max-steps 746 --batch-size 16 --eval-every 746"


def options_of(method):
    """-> options of train.py for a method of a model for several tasks."""
    return OTHER.get(method, f"--method {method}")


def speed():
    """How fast the defaults learn, before and after, and full fine-tuning (one seed)."""
    for seed in range(3):
        for task, every in (("stsb", 60), ("mrpc", 46), ("rte", 39)):
            common = f"--epochs 3 --eval-every {every} --max-eval-examples 500"
            yield Job("speed", "hyperpelt", task, seed, common)
            yield Job("speed", "first edition", task, seed, f"{common} {FIRST_EDITION}")
            if seed == 0:
                yield Job("speed", "full", task, seed, f"{common} {FULL}")


def ladder_tuning():
    """The sample's `rte`: three learning rates for every rung, on the validation examples."""
    for rung in RUNGS:
        for rate in RATES:
            yield Job("ladder-tuning", rung, "rte", 100, f"--method {rung} --lr {rate} {LADDER}")


def tuned(rung):
    """-> settings with the rate that has the highest accuracy after the last step."""
    last = {row["settings"]: float(row["value"]) for row in read_results("ladder-tuning")
            if row["method"] == rung and row["step"] != "best"}
    if not last:
        raise data.UserError(f"{RESULTS}: found no ladder-tuning of {rung}, run it first")
    return max(sorted(last), key=last.get)


def ladder():
    """Every rung at its best rate, and HyperPELT at its default. Nothing is chosen on the test
    examples."""
    for seed in range(3):
        for rung in RUNGS:
            yield Job("ladder", rung, "rte", seed, tuned(rung))
        yield Job("ladder", AT_DEFAULT, "rte", seed, f"--method hyperpelt --lr 1e-3 {LADDER}")


def hyper_embedding():
    """What each embedding does: one model for two tasks of the sample."""
    variants = {"hyperpelt": "", "z = 0": "--zero task", "l = 0": "--zero layer",
                "b = 0": "--zero block", "l, b frozen": "--freeze layer block",
                "one row": "--set per_position=false"}
    for variant, options in variants.items():
        for seed in range(3):
            settings = f"{FIVE_EPOCHS} {options}".strip()
            yield Job("hyper-embedding", variant, "rte,sst2", seed, settings)


def two_tasks():
    """Each task of the sample in a model of its own; and both in one model, by every method, with
    as many passes over the examples. `hyper-embedding` has HyperPELT's."""
    for method, options in ALONE.items():
        for task, seed in itertools.product(("sst2", "rte"), range(3)):
            yield Job("two-tasks", method, task, seed, f"{options} {FIVE_EPOCHS}")
    for method in ("adapter", "norms", "hyperadapter", "hyperprefix", "LoRA", "full", "hypervector",
                   "prefix", "mam", "prefix, per-task"):
        options = options_of(method)
        for seed in range(3):
            yield Job("two-tasks", method, "rte,sst2", seed, f"{options} {FIVE_EPOCHS}")


def rates():
    """Methods of `two-tasks` at two other learning rates than the default of 1e-3."""
    methods = ("adapter", "hyperpelt", "norms", "LoRA")
    for method, rate, seed in itertools.product(methods, ("3e-3", "3e-4"), range(3)):
        options = f"{options_of(method)} --lr {rate} {FIVE_EPOCHS}"
        yield Job("rates", f"{method}, {rate}", "rte,sst2", seed, options)


def three_tuning():
    """Three real tasks in one model: three learning rates for every method, on training rows
    that are held out."""
    for method, rate in itertools.product(THREE_METHODS, RATES):
        options = f"{options_of(method)} --lr {rate} {THREE_STEPS}"
        yield Job("three-tuning", f"{method}, {rate}", THREE, 100, f"{options} --held-out 400")


def best_rates():
    """-> {method: the rate of `three-tuning` that ends highest}, of methods with all its rates."""
    found = curves("three-tuning")
    best = {}
    for method in THREE_METHODS:
        by_rate = {rate: found.get((THREE, f"{method}, {rate}")) for rate in RATES}
        if all(by_rate.values()):
            best[method] = max(RATES, key=lambda rate: last_values(by_rate[rate]).item())
    return best


def three_tasks():
    """The methods at their best rates, on all training rows. Nothing is chosen on the validation
    rows."""
    for (method, rate), seed in itertools.product(best_rates().items(), range(3)):
        options = f"{options_of(method)} --lr {rate} {THREE_STEPS}"
        yield Job("three-tasks", method, THREE, seed, options)


def new_task():
    """`rte` with few examples: from nothing, or from a run of `two-tasks` that has learned
    `sst2`. The same 200 steps for all."""
    for (method, options), seed in itertools.product(ALONE.items(), range(3)):
        source = Job("two-tasks", method, "sst2", seed, options).folder.relative_to(ROOT)
        starts = {"": "", " from sst2": f"--init-from {source} --init-task sst2"}
        if method == "hyperpelt":
            starts[" from sst2, only z"] = f"{starts[' from sst2']} {ONLY_Z}"
        for start, size in itertools.product(starts, SIZES):
            settings = f"{options} {FEW} --max-train-examples {size} {starts[start]}".strip()
            yield Job("new-task", f"{size} {method}{start}", "rte", seed, settings)


def budgets():
    """Prefixes against adapters with about the same number of trained parameters."""
    sizes = ("hyperprefix prefix_length=49", "hyperadapter prefix_length=1 bottleneck=16",
             "hyperprefix prefix_length=1", "hyperadapter prefix_length=1 bottleneck=1",
             "hyperprefix prefix_length=8", "hyperadapter prefix_length=1 bottleneck=3")
    for label, seed in itertools.product(sizes, range(3)):
        method, values = label.split(" ", 1)
        yield Job("budgets", label, "sst2", seed, f"--method {method} --set {values}")


def blocks():
    """Prefixes in one kind of attention only, and in none."""
    for block, seed in itertools.product((*ATTENTION_BLOCKS, "norms"), range(3)):
        settings = f"--method hyperprefix --set 'prefix_blocks={block}'"
        settings = "--method norms" if block == "norms" else settings
        yield Job("blocks", block, "sst2", seed, settings)


def vision():
    """What an image gives: the sample's questions, by their type. Three seeds of each mode, one of
    the control and of the modes with maps."""
    ways = WAYS | {"shuffled": "--vision shuffled"}
    for seed, (way, options) in itertools.product(range(3), ways.items()):
        if seed == 0 or way in VISION:
            yield Job("vision", way, "vqa", seed, f"{options} --eval-every 10000")


def sides():
    """On which side a thing is: alone in its scene, or with another on the other side."""
    steps = {"one": "--max-steps 200 --eval-every 25", "two": "--max-steps 1000 --eval-every 250"}
    for name, seed, (way, options) in itertools.product(steps, range(3), WAYS.items()):
        files = (SIDES / name).relative_to(ROOT)
        settings = f"{options} {steps[name]} --data-dir {files} --features {files}/features"
        yield Job("sides", f"{way}, {name}", "vqa", seed, settings)


def make_sides():
    """The files of `sides`, unless they are there."""
    if (SIDES / "two" / "features" / "val2014.npy").exists():
        return
    shutil.rmtree(SIDES, ignore_errors=True)
    call = functools.partial(subprocess.run, check=True)
    call([sys.executable, SAMPLE / "make" / "sides.py", "--out", SIDES])
    for name, subset in itertools.product(("one", "two"), ("train2014.npy", "val2014.npy")):
        call([sys.executable, ROOT / "clip_features.py", "--model", SAMPLE / "mini-clip",
              "--images", SIDES / name / "vqa" / "images" / subset,
              "--out", SIDES / name / "features" / subset])


EXPERIMENTS = {"speed": speed, "ladder-tuning": ladder_tuning, "ladder": ladder,
               "hyper-embedding": hyper_embedding, "two-tasks": two_tasks, "rates": rates,
               "three-tuning": three_tuning, "three-tasks": three_tasks, "new-task": new_task,
               "budgets": budgets, "blocks": blocks, "vision": vision, "sides": sides}
REAL = {"speed", "three-tuning", "three-tasks"}


# ---- running -------------------------------------------------------------------------------------

def run(names, model, data_dir, workers):
    """Run the jobs that results.tsv lacks. Model and data_dir are for those on real data."""
    for name in names:
        done = {tuple(row[column] for column in JOB_COLUMNS) for row in read_results(name)}
        jobs = [job for job in EXPERIMENTS[name]() if tuple(map(str, astuple(job))) not in done]
        print(f"{name}: {len(jobs)} jobs are left", flush=True)
        options = ["--model", model, "--data-dir", data_dir] if name in REAL else []
        if name == "sides":
            make_sides()
        with ThreadPoolExecutor(workers) as pool:
            failed = sum(pool.map(functools.partial(run_job, options=options), jobs))
        if failed:
            raise data.UserError(f"{failed} jobs failed")


def run_job(job, options):
    """Train, and add the evaluations to results.tsv -> whether it failed."""
    folder = job.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                         text=True)
    command = [sys.executable, __file__, "train", "--run", folder]
    settings = ["--resume", "--task", job.tasks, "--seed", str(job.seed), "--protocol", "official",
                *options, *shlex.split(job.settings)]
    # More threads would add up in another order, so that the numbers would differ.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    with open(f"{folder}.log", "w") as log:
        call = functools.partial(subprocess.run, cwd=ROOT, stdout=log, stderr=log, env=environment)
        failed = call([*command, *settings]).returncode
        if job.tasks == "vqa" and not failed:
            failed = call([*command, "--predict", "validation"]).returncode
    seconds = round(time.perf_counter() - start)
    if failed:
        print(f"{folder}: failed, see {folder}.log", flush=True)
        return True

    origin = seconds, git.stdout.strip(), machine(folder)
    rows = [[*astuple(job), step, metric, f"{value:.4f}", *origin]
            for step, metric, value in read_evaluations(folder)]
    with open(RESULTS, "a", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
    print(f"{folder}: {seconds} s", flush=True)
    return False


def machine(folder):
    """-> the processor, and the precision of a run's frozen weights."""
    name = platform.processor()
    cpu = Path("/proc/cpuinfo")
    if train.DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    elif cpu.exists():
        name = re.search("model name.*: (.*)", cpu.read_text())[1]
    settings = json.loads((folder / "config.json").read_text())["settings"]
    return f"{name}, {settings['dtype']}"


def train_changed(arguments):
    """train.py with four more options: parts of the model that are 0, parts that stay as they
    are, LoRA of a rank on q and v, by peft, and a number of each task's training rows that are
    held out and become its validation rows."""
    parser = argparse.ArgumentParser(add_help=False)
    parts = ("task", "layer", "block", "hypernetworks", "t5")
    parser.add_argument("--zero", nargs="+", default=[], choices=parts[:3])
    parser.add_argument("--freeze", nargs="+", default=[], choices=parts)
    parser.add_argument("--lora", type=int)
    parser.add_argument("--held-out", type=int)
    changes, sys.argv[1:] = parser.parse_known_args(arguments)

    class Changed(HyperPELT):
        def __init__(self, *args):
            super().__init__(*args)
            if changes.lora:
                add_lora(self, changes.lora)
            for name, parameter in self.trained().items():
                part = name.split(".")[0]
                if part in changes.zero:
                    parameter.data.zero_()
                if part in changes.zero + changes.freeze:
                    # Without a gradient, AdamW moves nothing. The checkpoint still holds it.
                    parameter.register_hook(torch.zeros_like)

    read_splits = data.make_splits

    def hold_out(*args):
        rows = data.permutation(read_splits(*args)["train"])
        return {"train": rows[changes.held_out:], "validation": rows[:changes.held_out]}

    train.HyperPELT = Changed
    if changes.held_out:
        data.make_splits = hold_out
    train.main()


def add_lora(model, rank):
    import peft

    norms = model.trained()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q", "v"])
    peft.inject_adapter_in_model(config, model.t5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in norms or "lora" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


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
        settings = json.loads((folder / "config.json").read_text())["settings"]
        files = ROOT / settings["data_dir"] / "vqa" / "v2_mscoco_val2014_annotations.json"
        for row in json.loads(files.read_text())["annotations"]:
            is_right = answers[row["question_id"]] == row["multiple_choice_answer"]
            right["all"].append(is_right)
            right[row["question_type"]].append(is_right)
            if is_choice(row):
                right["which of two"].append(is_right)
        for question_type, values in right.items():
            yield "best", f"vqa, {question_type}", np.mean(values)


def is_choice(annotation):
    """Whether a question asks in what the two things of a scene differ, as of which colour one
    is. Who only names what an image holds is right about half of these."""
    words = annotation["question_type"].split()
    things, _ = scenes.sample_scene(annotation["image_id"])
    return words[0] == "what" and len({getattr(thing, words[1]) for thing in things}) > 1


def read_results(experiment):
    """-> lines of results.tsv: of these, the ones of an experiment."""
    with open(RESULTS, newline="") as file:
        return [row for row in csv.DictReader(file, delimiter="\t")
                if row["experiment"] == experiment]


# ---- tables and a picture ------------------------------------------------------------------------

def curves(experiment, test=False, task=""):
    """-> {(tasks, method): {seed: {step: value}}}. A value is the mean over the tasks (task: of
    this one) of the mean of their metrics on validation; test: of the best checkpoint on test."""
    metrics = defaultdict(lambda: defaultdict(list))
    for row in read_results(experiment):
        name = row["metric"].split()[0]
        if test == (row["step"] == "best") and task in ("", name):
            place = row["tasks"], row["method"], int(row["seed"]), row["step"]
            metrics[place][name].append(float(row["value"]))
    found = {}
    for (tasks, method, seed, step), by_task in metrics.items():
        by_seed = found.setdefault((tasks, method), {})
        value = np.mean([np.mean(values) for values in by_task.values()])
        by_seed.setdefault(seed, {})[step] = value
    return {run: dict(sorted(by_seed.items())) for run, by_seed in found.items()}


def last_values(by_seed):
    """{seed: {step: value}} -> the last value of each seed."""
    return np.array([list(by_step.values())[-1] for by_step in by_seed.values()])


def first_steps(by_seed, goal):
    """-> for each seed, the step of the first evaluation that reaches the goal, or a dash."""
    return " ".join(next((step for step, value in by_step.items() if value >= goal), "-")
                    for by_step in by_seed.values())


def spread(values):
    """Numbers from 0 to 1 -> their mean and sample standard deviation in percent."""
    if len(values) == 0:
        return ""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"


def each(by_seed):
    """-> the last value of each seed, in percent."""
    return " ".join(f"{100 * value:.1f}" for value in last_values(by_seed))


def difference(by_seed, others):
    """-> mean difference of the last values of the same seeds, and its standard error, in
    percent. Empty for a run and itself, and while seeds are missing."""
    if by_seed is others or by_seed.keys() != others.keys():
        return ""
    paired = 100 * (last_values(by_seed) - last_values(others))
    return f"{paired.mean():+.1f} ± {np.std(paired, ddof=1) / len(paired) ** 0.5:.1f}"


def speed_table():
    yield "task", "method", "seeds", "95 % of full's last value at step", "last value"
    found = curves("speed")
    for (task, method), by_seed in sorted(found.items()):
        steps = "full not run"
        if full := found.get((task, "full")):
            steps = first_steps(by_seed, 0.95 * last_values(full).mean())
        seeds = " ".join(map(str, by_seed))
        yield task, method, seeds, steps, spread(last_values(by_seed))


def ladder_table():
    yield "rung", "rate", "test accuracy", "minus norms", "90 % on validation at step"
    test, validation = curves("ladder", test=True), curves("ladder")
    settings = {row["method"]: row["settings"] for row in read_results("ladder")}
    for rung in (*RUNGS, AT_DEFAULT):
        by_seed = test["rte", rung]
        rate = re.search("--lr (.*?) ", settings[rung])[1]
        yield (f"`{rung}`", rate, spread(last_values(by_seed)),
               difference(by_seed, test["rte", "norms"]),
               first_steps(validation["rte", rung], 0.9))


def hyper_embedding_table():
    yield "variant", "mean of both tasks", "minus hyperpelt", "`rte`", "`sst2`"
    found = curves("hyper-embedding")
    of_task = [curves("hyper-embedding", task=task) for task in ("rte", "sst2")]
    for run, by_seed in found.items():
        whole = found["rte,sst2", "hyperpelt"]
        yield (run[1], spread(last_values(by_seed)), difference(by_seed, whole),
               *(each(values[run]) for values in of_task))


def two_tasks_table():
    yield ("method", "mean", "minus hyperpelt", "minus alone", "minus adapters alone", "`rte`",
           "`rte` alone", "`sst2`", "`sst2` alone")
    found = {task: curves("hyper-embedding", task=task) | curves("two-tasks", task=task)
             for task in ("", "rte", "sst2")}
    variants = {row["method"] for row in read_results("hyper-embedding")} - {"hyperpelt"}
    together = {method: by_seed for (tasks, method), by_seed in found[""].items()
                if tasks == "rte,sst2" and method not in variants}
    alone = {}
    for method in ALONE:
        values = last_values(found["rte"]["rte", method])
        values = (values + last_values(found["sst2"]["sst2", method])) / 2
        alone[method] = {seed: {"": value} for seed, value in enumerate(values)}
    for method, by_seed in together.items():
        runs = [found[task].get((tasks, method), {})
                for task in ("rte", "sst2") for tasks in ("rte,sst2", task)]
        yield (f"`{method}`", spread(last_values(by_seed)),
               difference(by_seed, together["hyperpelt"]),
               difference(by_seed, alone[method]) if method in alone else "",
               difference(by_seed, alone["adapter"]),
               *(spread(last_values(run)) for run in runs))


def rate_rows(cells):
    """{(method, rate): cell} -> rows of a table with a column for each rate."""
    yield "method", *RATES
    for method in dict.fromkeys(method for method, _ in cells):
        yield f"`{method}`", *(cells.get((method, rate), "") for rate in RATES)


def rates_table():
    found = curves("hyper-embedding") | curves("two-tasks")
    cells = {}
    for (_, label), by_seed in curves("rates").items():
        method, rate = label.split(", ")
        cells[method, rate] = spread(last_values(by_seed))
        cells[method, "1e-3"] = spread(last_values(found["rte,sst2", method]))
    return rate_rows(cells)


def three_tuning_table():
    cells = {}
    for (_, label), by_seed in curves("three-tuning").items():
        method, rate = label.rsplit(", ", 1)
        cells[method, rate] = spread(last_values(by_seed))
    return rate_rows(cells)


def three_tasks_table():
    yield "task", "method", "rate", "value", "minus hyperpelt", "minus norms"
    settings = {row["method"]: row["settings"] for row in read_results("three-tasks")}
    for task in ("", *THREE.split(",")):
        found = {run[1]: by_seed for run, by_seed in curves("three-tasks", task=task).items()}
        for method, by_seed in found.items():
            # The settings of full have its usual rate before the chosen one.
            rate = re.findall(r"--lr (\S+)", settings[method])[-1]
            others = [found.get(other, {}) for other in ("hyperpelt", "norms")]
            yield (f"`{task}`" if task else "mean", f"`{method}`", rate,
                   spread(last_values(by_seed)), *(difference(by_seed, other) for other in others))


def new_task_table():
    yield "start", *(f"{size} examples" for size in SIZES)
    rows = defaultdict(dict)
    for (_, label), by_seed in curves("new-task").items():
        size, _, start = label.partition(" ")
        rows[start][int(size)] = spread(last_values(by_seed))
    for start, cells in rows.items():
        yield start, *(cells[size] for size in SIZES)


def budgets_table():
    yield "method and sizes", "trained parameters", "accuracy", "90 % at step"
    t5_config = T5Config.from_file(SAMPLE / "mini-t5" / "config.json")
    for (_, label), by_seed in curves("budgets").items():
        method, *sizes = label.split()
        values = {name: int(size) for name, size in (text.split("=") for text in sizes)}
        with torch.device("meta"):
            model = HyperPELT(T5(t5_config), ["rte"], HyperPELTConfig(method, **values))
        yield (f"`{method}`, {', '.join(sizes)}", f"{count(model.trained().values()):,}",
               spread(last_values(by_seed)), first_steps(by_seed, 0.9))


def blocks_table():
    yield "prefixes in", "accuracy", "90 % at step"
    found = {block: by_seed for (_, block), by_seed in curves("blocks").items()}
    whole = curves("budgets")["sst2", "hyperprefix prefix_length=49"]
    for block, by_seed in {"all three": whole, **found}.items():
        yield block, spread(last_values(by_seed)), first_steps(by_seed, 0.9)


def vision_table():
    values = defaultdict(lambda: defaultdict(list))
    for row in read_results("vision"):
        if row["step"] == "best":
            question_type = row["metric"].removeprefix("vqa, ")
            values[row["method"]][question_type].append(float(row["value"]))
    columns = values["both"]
    yield "mode", *columns
    for mode, by_type in values.items():
        yield mode, *(spread(by_type[question_type]) for question_type in columns)


def sides_table():
    yield "images by", "things", "accuracy", "90 % at step"
    for (_, label), by_seed in curves("sides").items():
        yield *label.split(", "), spread(last_values(by_seed)), first_steps(by_seed, 0.9)


TABLES = {"speed": speed_table, "ladder": ladder_table, "hyper-embedding": hyper_embedding_table,
          "two-tasks": two_tasks_table, "rates": rates_table,
          "three-tuning": three_tuning_table, "three-tasks": three_tasks_table,
          "new-task": new_task_table, "budgets": budgets_table, "blocks": blocks_table,
          "vision": vision_table, "sides": sides_table}


def jobs_of(name):
    """-> for each job of an experiment, one of its lines: all have the same origin."""
    rows = read_results(name)
    return {tuple(row[column] for column in JOB_COLUMNS): row for row in rows}.values()


def core_hours(names):
    """-> hours of all jobs of these experiments."""
    return sum(int(row["seconds"]) for name in names for row in jobs_of(name)) / 3600


def origin_of(name):
    """-> what an experiment took, on which machines and at which commits."""
    commits = defaultdict(list)
    for row in jobs_of(name):
        commits[row["machine"]].append(row["commit"])
    parts = [f"jobs on {place}: {len(found)} (commit {', '.join(dict.fromkeys(found))})"
             for place, found in commits.items()]
    return textwrap.fill(f"{core_hours([name]):.1f} core-hours; {'; '.join(parts)}.", 100)


def fill(page):
    """A page with its core-hours, and its tables between <!-- NAME --> and <!-- end -->, anew.
    Below each table is where its numbers come from."""
    hours = f"{core_hours(EXPERIMENTS):.1f}"
    page = re.sub(r"(took\s+)\S+(\s+core-hours)", rf"\g<1>{hours}\2", page)
    for name in re.findall("<!-- (.*) -->\n", page):
        if name in TABLES:
            header, *rows = TABLES[name]()
            lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
            between = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            table = "\n".join(lines)
            page = between.sub(rf"\1\n{table}\n\n{origin_of(name)}\n\n\2", page)
    return page


def draw_ladder():
    """figures/ladder.png: accuracy over steps of every rung, mean and range of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    found = curves("ladder")
    for rung in (*RUNGS, AT_DEFAULT):
        runs = np.array([list(by_step.values()) for by_step in found["rte", rung].values()])
        steps = [int(step) for step in next(iter(found["rte", rung].values()))]
        axes.plot(steps, runs.mean(0), label=rung)
        axes.fill_between(steps, runs.min(0), runs.max(0), alpha=0.1)
    axes.set(xlabel="step", ylabel="accuracy on validation")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(SAMPLE / "figures" / "ladder.png", dpi=100)


# ---- the command line ----------------------------------------------------------------------------

def main():
    if sys.argv[1:2] == ["train"]:
        return train_changed(sys.argv[2:])
    parser = argparse.ArgumentParser(description="Run experiments, or print their tables.")
    parser.add_argument("command", choices=["run", "print"])
    parser.add_argument("names", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--model", default="", help="of real tasks: folder of a T5")
    parser.add_argument("--data-dir", default="", help="of real tasks: folder of GLUE's files")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default: 2")
    args = parser.parse_intermixed_args()
    names = args.names or list(EXPERIMENTS)
    if unknown := set(names) - EXPERIMENTS.keys():
        parser.error(f"found {', '.join(unknown)}, expected some of {', '.join(EXPERIMENTS)}")
    if args.command == "run":
        if REAL.intersection(names) and not (args.model and args.data_dir):
            parser.error(f"{', '.join(sorted(REAL))} need --model and --data-dir")
        return run(names, args.model, args.data_dir, args.jobs)
    page = SAMPLE / "RESULTS.md"
    page.write_text(fill(page.read_text()))
    draw_ladder()


if __name__ == "__main__":
    data.run(main)
