"""Train, evaluate and use a HyperPELT.

    python train.py                                                                         # the bundled small T5 on bundled rows of RTE
    python train.py --ask "A man is eating." "A man eats."                                  # what that run answers
    python train.py --task rte --model google/flan-t5-small --data-dir glue --download --out runs/rte    # train, then evaluate
    python train.py --out runs/rte-hyperpelt --resume                                       # go on after an interruption
    python train.py --out runs/rte-hyperpelt --eval-only                                    # evaluate the best checkpoint
    python train.py --out runs/rte-hyperpelt --predict submission                           # write a GLUE submission file
    python train.py --task vqa --features features --data-dir vl ...                        # images; --task rte,vqa: both kinds
    python train.py --task cb --n-train 16 --init-from runs/glue-hyperpelt --seeds 5 ...    # few rows, from a trained run, five times
    python train.py --out runs/rte-hyperpelt --export rte.safetensors                       # plain prefixes, adapters and norms
    python train.py --table runs/rte-hyperpelt runs/rte-prefix                              # runs side by side, as Markdown
    torchrun --nproc_per_node=2 train.py ...                                                # one process a GPU

A run's folder (--out) holds config.json (all settings), log.jsonl (a row for every few steps and every evaluation),
metrics.json (the result), last.safetensors (what is trained, optimiser, generators, step: a run resumes from it, on a CPU to the same bytes)
and best.safetensors (what is trained, nothing else). With neither --model nor --data-dir a run
uses the folder sample/ beside this file.

A first reading: `run_once` is the story of a run, `train` its loop; tasks are drawn in `draw_tasks`, batches made in `make_batches`, weights
of a task made once for an evaluation in `answer`. The order of the code: settings, data, processes, evaluation, checkpoints and what
begins from them, the loop, runs, what people are shown. `complete_settings`, processes and checkpoints can wait.
Marks as in hyperpelt.py: [P] printed in the paper, [D] derived, [X] borrowed, [R] reconstructed, [C] our choice.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save
from tqdm import tqdm

import data
from data import UserError
from clip_features import load_features
from hyperpelt import METHODS, VISION, Adapter, HyperPELT, HyperPELTConfig, Prefix, deployed
from t5 import T5, Tokenizer, public_name
from torch.nn.parallel import DistributedDataParallel

try:
    import resource
except ImportError:                                       # Windows has none
    resource = None

SAMPLE = Path(__file__).resolve().parent / "sample"   # a small T5 and small data sets: what runs without a download
SAMPLE_DEFAULTS = dict(split="official", lr=1e-3)   # of options, in their own types, where the data are the sample's
SIZES = HyperPELTConfig()
GRADIENT_CLIP = 1.0        # largest norm of the whole gradient [C]
LOG_EVERY = 10             # steps
EVAL_BATCH = 64            # rows; as many choose the nearest task in start_from [C]
FORMAT = 2                 # of a run's folder: what another version of this program has written otherwise is refused
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))    # torchrun sets them


# -------------------------------------------------------------------------------------------------------- settings

OPTIONS = [  # name, type or choices, default, help
    ("task", str, "rte", f"task, or several with commas between; alone, glue stands for the paper's eight, vl for vqa, gqa and caption [R; gqa P]: {', '.join([*data.TASKS, *data.IMAGE_TASKS])}"),
    ("model", str, "", "folder of a T5 checkpoint, or a public name, which is downloaded (default: the bundled sample/mini-t5)"),
    ("data-dir", str, "", "folder with RTE/train.tsv or glue/RTE/train.tsv (default: the bundled sample; with --model or --download: glue)"),
    ("features", str, "", "folder with the images' features as clip_features.py writes them: train2014.npy, train2014.json, ... (default: none; the sample has its own)"),
    ("vision", [*VISION, "shuffled"], "both", "what an image gives: visual prefix and adapter, one of them, or tokens before the text; shuffled: both, of another image"),
    ("method", list(METHODS), "hyperpelt", "hyperprefix: no adapters; hyperadapter: no prefixes; hyperformer: a vector as hyper-embedding, no prefixes; "
     "prefix, adapter, mam (both): learned for each task without a hypernetwork; norms: neither; full: fine-tune all"),
    ("out", str, "", "folder of the run (default: runs/TASK-METHOD)"),
    ("split", ["paper", "official"], "paper", "paper: validation halved, or 1,000 training rows held out [P]; official: as the files are"),
    ("steps", data.in_range(int, 1), 0, "training steps (default: what --epochs gives) [R: 2^18]"),
    ("epochs", data.in_range(float, 0.001), 6.0, "passes over the training rows; of several tasks as many steps as that takes, which --temperature shares out [C]"),
    ("batch-size", data.in_range(int, 1), 32, "rows of a step, of all processes together [C; R: 128]"),
    ("lr", data.in_range(float, 0), 2e-3, "learning rate of AdamW, without weight decay [C; R: 1e-3]"),
    ("schedule", ["constant", "linear"], "linear", "after the warm-up: constant [R], or linear to 0 [X: HyperFormer]"),
    ("warmup-steps", data.in_range(int, 0), 10, "steps in which the learning rate rises to its full value [C; X: HyperFormer 500, VL-Adapter a tenth of all]"),
    ("label-smoothing", data.in_range(float, 0, 0.99), 0.0, "share of the target's probability spread over the vocabulary [C; X: 0.1]"),
    ("temperature", data.in_range(float, 1), 2.0, "T of several tasks' sampling, p ~ rows^(1/T) [R]"),
    ("max-source-length", data.in_range(int, 32), 128, "tokens; the longest field of a longer text is cut [X: HyperFormer]"),
    ("n-train", data.in_range(int, 1), 0, "training rows of each task, drawn by the seed (default: all)"),
    ("init-from", str, "", "folder of a run whose trained weights this one begins with (default: none)"),
    ("init-task", str, "", "its task whose embedding a new task begins with (default: the one with the least loss on training rows of the new one)"),
    ("prefix-length", data.in_range(int, 1, 10**5), SIZES.prefix_length, "N, rows of a generated prefix [R]"),
    ("bottleneck", data.in_range(int, 1, 10**5), SIZES.bottleneck, "width of a generated adapter [R]"),
    ("embedding-dim", data.in_range(int, 1, 10**5), SIZES.embedding_dim, "d_t, width of the task, layer and block embeddings [R]"),
    ("hyper-dim", data.in_range(int, 1, 10**5), SIZES.hyper_dim, "d_I, width of a hyper-embedding [R]"),
    ("seed", data.in_range(int, 0, 2**31), 0, "of initial weights, dropout and the order of the rows"),
    ("precision", ["auto", "fp32", "bf16"], "auto", "bf16: frozen weights and activations in bfloat16; auto: where the machine is fast at it"),
    ("eval-every", data.in_range(int, 1), 0, "steps between evaluations on validation (default: an epoch, or with --steps an eighth of them) [C; X: 1,000 or 2,000]"),
]
DEFAULTS = {name.replace("-", "_"): default for name, _, default, _ in OPTIONS}
PLACES = "out", "data_dir", "model", "features"    # these may differ from the saved run's: what lies there is compared instead


def parse_arguments():
    """Command line -> {option: value}, of those that are given."""
    parser = data.Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for name, kind, default, text in OPTIONS:
        kind = dict(choices=kind) if isinstance(kind, list) else dict(type=kind, metavar=name.upper())
        here = f"; on the sample {SAMPLE_DEFAULTS[name.replace('-', '_')]}" if name.replace("-", "_") in SAMPLE_DEFAULTS else ""
        parser.add_argument(f"--{name}", **kind, help=text if "default:" in text else f"{text} (default: {default}{here})")
    parser.add_argument("--image-tokens", dest="vision", action="store_const", const="tokens", help="short for --vision tokens")
    parser.add_argument("--download", action="store_true", help="fetch the official data files if they are not there")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument("--eval-only", action="store_true", help="evaluate best.safetensors of the run in --out")
    group.add_argument("--predict", metavar="SPLIT", choices=["validation", "test", "submission"],
                       help="write the answers of best.safetensors on a split as a GLUE submission file")
    group.add_argument("--ask", metavar="TEXT", nargs="+", help="answer by the run in --out: the texts of a task, of an image task then an image's id "
                       "(17, or val2014:17); the first task of the run that fits, or the one whose name stands before them")
    group.add_argument("--export", metavar="FILE", help="write what best.safetensors of the run in --out generates for a task (--task) as plain tensors")
    group.add_argument("--table", metavar="RUN", nargs="+", help="print runs as a table, Markdown: methods x tasks, mean and standard deviation over seeds")
    parser.add_argument("--seeds", metavar="COUNT", type=data.in_range(int, 1, 1000), help="as many runs, from --seed on, in OUT/seed-...; with --resume those that are not finished")
    return vars(parser.parse_args())


def default_out(given):
    """{option: value} of the command line -> the folder of a run that was given no --out."""
    option = DEFAULTS | given
    return f"runs/{option['task'].replace(',', '-')}-{option['method']}"


def complete_settings(given):
    """{option: value} of the command line -> settings (Namespace). For a run that exists they are the saved ones; another value is refused."""
    given, commands = dict(given), dict(resume=False, eval_only=False, predict="", ask=[], export="")
    if given.get("precision") == "auto":
        del given["precision"]                                               # nothing that could differ from a saved run
    settings = {**DEFAULTS, "download": False, **commands, **given}
    settings["sample"] = not (settings["data_dir"] or settings["model"] or settings["download"])
    settings["sample"] |= bool(settings["data_dir"]) and Path(settings["data_dir"]).resolve() == SAMPLE
    if settings["sample"]:
        settings.update({**SAMPLE_DEFAULTS, **given, "data_dir": ""})        # "": the bundled sample, wherever it lies
    elif not settings["data_dir"]:
        settings["data_dir"] = "glue"
    out = Path(settings["out"] or default_out(given))
    settings["existing_run"] = any(settings[command] for command in commands)
    settings["export_task"] = given.pop("task", "") if settings["export"] else ""        # chooses one of the run's
    if settings["existing_run"]:
        settings.update(saved_settings(out, given))
        settings["sample"] = not settings["data_dir"]
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out}: found a file, expected a folder for the run, or nothing yet")
    elif any((out / name).exists() for name in ("config.json", "last.safetensors", "best.safetensors")):
        raise UserError(f"{out}: holds a run already; go on with it by --resume, or choose another --out")
    settings["out"] = str(out)
    if settings["precision"] == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
        settings["precision"] = "bf16" if fast else "fp32"
    if settings["init_task"] and not settings["init_from"]:
        raise UserError(f"--init-task {settings['init_task']}: expected --init-from too, the run whose task that is")
    settings["record"] = {name: settings[name] for name in DEFAULTS}         # as config.json is to have them
    settings["bundled"] = not settings["model"]
    if settings["sample"] and settings["download"]:
        raise UserError(f"{SAMPLE}: nothing is downloaded into the bundled sample; choose another --data-dir")
    if settings["bundled"]:
        settings["model"] = str(SAMPLE / "mini-t5")
        if not Path(settings["model"]).is_dir():
            raise UserError(f"{settings['model']}: no such folder, expected a small T5 (sample/make.py makes it); or choose --model and --data-dir")
    if settings["sample"]:
        settings.update(data_dir=str(SAMPLE), features=settings["features"] or str(SAMPLE / "vqa" / "features"))
    return argparse.Namespace(**settings)


def saved_settings(out, given):
    """Folder of a run, {option: value} of the command line -> the run's settings but for the places that were given. Raises UserError
    where there is no run, and where it was given other settings."""
    if not (out / "config.json").exists():
        chosen = [f"--{name} {shlex.quote(given[name])}" for name in ("task", "method", "out") if name in given]
        raise UserError(f"{out}/config.json: no such file, expected a run; this trains one: {' '.join(['python train.py', *chosen])}")
    saved = read_run(out)["settings"]
    compared = {name: value for name, value in given.items() if name in DEFAULTS and name not in PLACES}
    differences = [f"--{name.replace('_', '-')} was {saved[name]}, is {value}" for name, value in compared.items() if saved[name] != value]
    if differences:
        raise UserError(f"{out}/config.json: the run has other settings: {'; '.join(differences)}")
    return {name: value for name, value in saved.items() if name not in given}


# ------------------------------------------------------------------------------------------------------------ data

def find_tasks(text):
    """What --task takes -> {name: Task or ImageTask}"""
    names = {"glue": data.GLUE, "vl": data.VL}.get(text) or text.split(",")
    return {name: data.find_task(name) for name in names}


def load_data(settings, tasks, tokenizer):
    """-> {task name: {split: [Example]}}, {task name: {split: [Row]}}; ids are made once."""
    splits, rows = {}, {}
    for name, task in tasks.items():
        if settings.download:
            data.download_task(task, settings.data_dir)
        splits[name] = data.make_splits(task, settings.data_dir, settings.split)
        if settings.n_train > len(splits[name]["train"]):
            raise UserError(f"--n-train: found {settings.n_train}, {name} has {len(splits[name]['train'])} training rows")
        if settings.n_train:
            splits[name]["train"] = data.draw_rows(splits[name]["train"], settings.n_train, settings.seed)
        rows[name] = {split: encode(examples, tokenizer, settings) for split, examples in splits[name].items()}
    return splits, rows


def encode(examples, tokenizer, settings):
    return data.encode_examples(examples, tokenizer.encode, settings.max_source_length)


def image_sets(splits):
    """-> {image set: number of examples about its images}"""
    every = [example for by_split in splits.values() for examples in by_split.values() for example in examples]
    return dict(sorted(Counter(example.image[0] for example in every if example.image).items()))


def open_features(settings, wanted):
    """Names of image sets -> {name: (features [images, N, V], {id: row}, about)}, width V (0: nothing is wanted), fingerprint.

    Raises UserError for a missing or damaged file, features of unlike models, a grid that does not fit.
    """
    if not wanted:
        return {}, 0, {}
    if not settings.features:
        raise UserError(f"--features: found nothing, expected the folder with {', '.join(f'{name}.npy' for name in wanted)};"
                        " clip_features.py makes them")
    found, kinds = {name: load_features(Path(settings.features) / f"{name}.npy") for name in wanted}, {}
    for name, (array, _, meta) in found.items():
        path = Path(settings.features) / f"{name}.npy"
        kinds[name] = f"{list(array.shape[1:])} of {meta.get('kind')}, weights {meta.get('weights')}, {meta.get('preprocessing')}"
        if kinds[name] != kinds[wanted[0]]:
            raise UserError(f"{path}: found features {kinds[name]}; expected {kinds[wanted[0]]}, as in {wanted[0]}.npy")
        if settings.vision != "tokens" and array.shape[1] != settings.prefix_length:     # eq. (7): position by position [R]
            raise UserError(f"{path}: found {array.shape[1]} grid cells for each image, expected {settings.prefix_length}, one for each"
                            " of --prefix-length positions")
    mark = hashlib.sha256()
    for array, ids, meta in found.values():                                  # of the features themselves a few images
        mark.update(json.dumps([meta.get("sha256"), list(ids)]).encode())
        mark.update(array[:: max(1, len(array) // 50)].tobytes())
    return found, array.shape[2], {"features": mark.hexdigest()[:16]}


def load_images(settings, splits, rows):
    """Give every row of an image task its place in the feature files -> their width and fingerprint, as open_features does.
    Raises UserError, also for a question without features."""
    found, width, mark = open_features(settings, list(image_sets(splits)))
    for task, by_split in splits.items():
        for split, examples in by_split.items():
            if examples and examples[0].image:
                if absent := ["/".join(e.image) for e in examples if e.image[1] not in found[e.image[0]][1]]:
                    raise UserError(f"{len(absent)} of {len(examples)} examples of {task} {split} have no features in {settings.features}:"
                                    f" {data.named(absent)}")
                images = [(found[image_set][0], found[image_set][1][key]) for image_set, key in (e.image for e in examples)]
                if settings.vision == "shuffled":                            # answers from the question alone: what a prior can do
                    images = [images[i] for i in np.random.default_rng([settings.seed, len(images)]).permutation(len(images))]
                for row, image in zip(rows[task][split], images):
                    row.image = image
    return width, mark


def gather_images(rows):
    """Rows of an image task -> their features [B, N, V], float16; of a text task -> None. Raises UserError for a feature that is no number."""
    if not rows[0].image:
        return None
    features = np.stack([array[i] for array, i in (row.image for row in rows)])
    if not np.isfinite(features).all():
        array, i = next((array, i) for array, i in (row.image for row in rows) if not np.isfinite(array[i]).all())
        raise UserError(f"{getattr(array, 'filename', 'features')}: row {i} (from 0): found numbers that are not finite")
    return torch.from_numpy(features)


def draw_tasks(counts, steps, temperature, seed):
    """Numbers of training rows -> the task (its number) of each step, drawn with p ~ rows^(1/temperature) [T = 2: R]."""
    weights = np.array(counts) ** (1 / temperature)
    return np.random.default_rng([seed, 0]).choice(len(counts), size=steps, p=weights / weights.sum())


@dataclasses.dataclass
class Batch:
    task: str
    numbers: list         # which of the task's training rows (from 0), of all processes together
    input_ids: object     # tensor [B, S], 0 where padded
    labels: object        # tensor [B, T], -100 where padded
    features: object      # tensor [B, N, V], or None
    share: float          # weight of this process' mean loss: processes * its tokens / all tokens of the batch (alone: 1); the average of
                          # share * loss over the processes is then the mean over all tokens


def make_batches(rows, settings):
    """-> number of steps, and batch(step) -> Batch: a function of seed and step alone, so that a resumed run sees what the uninterrupted
    one would have seen. Of several processes each gets its own rows of the same batch."""
    rows = {name: by_split["train"] for name, by_split in rows.items()}
    names, size = list(rows), settings.batch_size
    per_epoch = {name: -(-len(rows[name]) // size) for name in names}
    steps = settings.steps or max(1, round(settings.epochs * sum(per_epoch.values())))
    turns = draw_tasks([len(rows[name]) for name in names], steps, settings.temperature, settings.seed)
    lengths = {name: np.array([len(row.source) for row in rows[name]]) for name in names}

    @lru_cache(maxsize=len(names))
    def plan(turn, epoch):
        return data.plan_epoch(lengths[names[turn]], size, [settings.seed, 1 + turn, epoch])

    def batch(step):
        turn = int(turns[step])
        epoch, position = divmod(int(np.sum(turns[:step] == turn)), per_epoch[names[turn]])
        numbers = plan(turn, epoch)[position].tolist()
        chosen = [rows[names[turn]][i] for i in numbers]
        draws = np.random.default_rng([settings.seed, 2**20, step]).random(len(chosen))  # which of its answers each row is to learn
        targets = [row.draw_target(draw) for row, draw in zip(chosen, draws)]
        tokens, own = sum(map(len, targets)), slice(RANK, None, WORLD)
        share = WORLD * sum(map(len, targets[own])) / tokens
        chosen, targets = chosen[own] or chosen[:1], targets[own] or targets[:1]         # no row left for this process: any, with share 0
        ids = torch.from_numpy(data.pad([row.source for row in chosen], 0))
        labels = torch.from_numpy(data.pad(targets, -100))
        return Batch(names[turn], numbers, ids, labels, gather_images(chosen), share)

    return steps, batch


def backbone_mark(t5):
    """A hash of the backbone, to compare what is saved with: of config, the start of every tensor, and the sum of all its bits."""
    backbone = hashlib.sha256(repr(t5.config).encode())
    for tensor in t5.state_dict().values():
        bits = tensor.float().contiguous().view(torch.int32)
        backbone.update(bits.flatten()[:256].numpy().tobytes() + str(bits.sum(dtype=torch.int64).item()).encode())
    return backbone.hexdigest()[:16]


def data_mark(splits, rows):
    """A hash of the data: of every row its ids, answers and image."""
    texts = hashlib.sha256()
    for name, by_split in rows.items():
        for split, own in by_split.items():
            texts.update(f"{name} {split}".encode())
            for row, example in zip(own, splits[name][split]):
                texts.update(b"".join(ids.tobytes() for ids in (row.source, *row.targets)))
                texts.update(repr((example.gold, example.index, example.image)).encode())
    return texts.hexdigest()[:16]


# ------------------------------------------------------------------------- several processes, under torchrun: one a device
# All of them compute the same but for their rows of a batch; only the first one writes and prints.

def join_processes():
    """Begin when all are there; from here on only the first one prints."""
    if WORLD > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        try:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        except ValueError as error:
            raise UserError(f"RANK and WORLD_SIZE are set, but {error}; torchrun sets them all") from None
        if RANK:
            sys.stdout = open(os.devnull, "w")


def gather(value):
    """-> the values of all processes, in a list."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def write_first(path, content):
    """The first process' file; all wait for it, since the next thing may be to read it."""
    if RANK == 0:
        data.write_whole(path, content)
    gather(None)


def leave_first(message, code):
    sys.exit(code) if RANK else data.leave(message, code)


# ------------------------------------------------------------------------------------------------------ evaluation

def longest_answer(tokenizer, task):
    """-> the most tokens that an answer may have, the beams to look for it with."""
    if isinstance(task, data.ImageTask) and not task.labels:                 # answers in free words
        return task.max_answer, task.beams
    # Tokens of the longest right answer with its eos: whatever goes on beyond that is wrong anyway.
    words = task.labels.values() or [data.stsb_target(i / 5) for i in range(26)]
    return max(len(tokenizer.encode(word)) for word in words), 1


def answer(model, tokenizer, task, rows, stop):
    """Rows -> answers as texts, or None when the user stops it. The task's generated weights are made once; several processes
    share the batches out, and do not look at `stop`, which may be meant for one of them."""
    model.eval()
    device = next(model.parameters()).device
    longest, beams = longest_answer(tokenizer, task)
    order, texts = np.argsort([len(row.source) for row in rows], kind="stable"), {}
    with torch.no_grad():
        sites = model.generate_sites(task.name)
        starts = range(EVAL_BATCH * RANK, len(order), EVAL_BATCH * WORLD)
        for start in tqdm(starts, desc=f"evaluate {task.name}", leave=False, disable=True if RANK else None):
            if stop and WORLD == 1:
                return None
            chosen = order[start:start + EVAL_BATCH]
            ids = torch.from_numpy(data.pad([rows[i].source for i in chosen], 0)).to(device)
            features = gather_images([rows[i] for i in chosen])
            injected = model.inject(sites, None if features is None else features.to(device))
            outputs = model.t5.generate(ids, max_new_tokens=longest, num_beams=beams, **injected)
            for i, output in zip(chosen, outputs):
                texts[i] = tokenizer.decode(output.tolist())
    texts = {i: text for part in gather(texts) for i, text in part.items()}
    return [texts[i] for i in range(len(rows))]


def answer_all(model, tokenizer, tasks, splits, rows, names, stop, known):
    """-> {(task, split): texts} on the named splits, {task: {split: {metric: value}}}; or None, None when the user stops it.
    `known`: answers made already, {(task, split): texts}."""
    answers, metrics = {}, {name: {} for name in tasks}
    for name, task in tasks.items():
        for split in (split for split in rows[name] if split in names):
            texts = known.get((name, split)) or answer(model, tokenizer, task, rows[name][split], stop)
            if texts is None:
                return None, None
            answers[name, split], metrics[name][split] = texts, data.score(task, texts, splits[name][split])
    return answers, metrics


def averages(tasks, metrics, split):
    """{task: {split: {metric: value}}} -> means of those metrics that choose the checkpoint: {"metrics": over all of them, on GLUE the
    average over 11 that papers print [X], "tasks": over the tasks' own means}. CIDEr counts as it is, 0 to 10 [C]."""
    values = [[metrics[name][split][metric] for metric in task.metrics] for name, task in tasks.items()]
    return {"metrics": float(np.mean(sum(values, []))), "tasks": float(np.mean([np.mean(part) for part in values]))}


def answer_loss(model, name, rows):
    """Rows of a task -> logits [B, T, vocabulary] of each one's (first) right answer, their loss, the answers [B, T]."""
    tensors = torch.from_numpy(data.pad([r.source for r in rows], 0)), torch.from_numpy(data.pad([r.targets[0] for r in rows], -100)), gather_images(rows)
    ids, labels, features = (None if tensor is None else tensor.to(model.layer_ids.device) for tensor in tensors)
    return *model(ids, ids != 0, labels, name, features=features), labels


@torch.no_grad()
def count_right(logits, labels):
    """Logits [B, T, vocabulary], labels [B, T] -> rows whose every token of the answer is the likeliest: a tensor, so that a GPU is not waited for."""
    told = logits.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]        # [B, T]
    return ((told == logits.amax(2)) | (labels < 0)).all(1).sum()            # on a CPU argmax takes ten times as long; ties are right


def show(result):
    return "   ".join(f"{task} {split} " + " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
                      for task, by_split in result.items() for split, metrics in by_split.items())


# ----------------------------------------------------------------------------------------------------- checkpoints

def save_tensors(path, tensors, metadata):
    """safetensors, written aside and renamed: the previous file stays until the new one is whole."""
    # One key of metadata: with several, safetensors writes them in an order that differs from run to run.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_first(path, save(tensors, {"hyperpelt": json.dumps(metadata)}))


def load_tensors(path, expected, keys):
    """-> tensors, metadata. Raises UserError unless the file holds exactly the expected names, shapes, types and keys."""
    tensors, metadata = data.read_tensors([path], expected, "a checkpoint of this run")
    found = data.parse_json(metadata.get("hyperpelt", "null"), f"{path}: metadata: hyperpelt")
    if not isinstance(found, dict) or any(type(found.get(key)) is not kind for key, kind in keys.items()):
        raise UserError(f"{path}: metadata: hyperpelt: found {str(found)[:40]}, expected an object with {', '.join(keys)}")
    return tensors, found


def training_state(model, optimiser):
    """All tensors of last.safetensors. The optimiser's and the model's own are views: to load is to copy into them."""
    tensors = {}
    for name, parameter in model.trained().items():
        state = optimiser.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors[f"trained.{name}"] = parameter
        tensors.update({f"{part}.{name}": state[part] for part in ("step", "exp_avg", "exp_avg_sq")})
    tensors["generator.cpu"] = torch.stack(gather(torch.get_rng_state()))    # a row a process
    if torch.cuda.is_available():
        tensors["generator.cuda"] = torch.stack(gather(torch.cuda.get_rng_state()))
    return tensors


def save_last(path, model, optimiser, progress):
    save_tensors(path, training_state(model, optimiser), progress)


@torch.no_grad()
def load_last(path, model, optimiser, steps):
    """-> progress, as it was saved; everything else goes back to where it was."""
    tensors = training_state(model, optimiser)
    found, progress = load_tensors(path, tensors, dict(step=int, evaluated=int, best_step=int, best=float, right=int, seen=int))
    if not (0 <= progress["best_step"] <= progress["evaluated"] <= progress["step"] <= steps and 0 <= progress["right"] <= progress["seen"] < 2**53
            and math.isfinite(progress["best"])):
        raise UserError(f"{path}: metadata: hyperpelt: found {progress}, expected counts that fit a run of {steps} steps")
    for name, tensor in tensors.items():
        tensor.copy_(found[name])
    try:
        torch.set_rng_state(found["generator.cpu"][RANK].clone())            # a row's place in memory would not do
        if "generator.cuda" in found:
            torch.cuda.set_rng_state(found["generator.cuda"][RANK].clone())
    except RuntimeError as error:
        raise UserError(f"{path}: tensor generator: {error}") from None
    return progress


@torch.no_grad()
def load_best(path, model):
    """-> the step at which it was saved."""
    found, metadata = load_tensors(path, model.trained(), dict(step=int))
    for name, parameter in model.trained().items():
        parameter.copy_(found[name])
    return metadata["step"]


def read_run(folder):
    """config.json of a run's folder -> dict. Raises UserError where it is missing or lacks a part."""
    record = data.read_json(Path(folder) / "config.json", "settings", "fingerprints", "hyperpelt", "image_sets")
    if type(record.get("format")) is not int or record["format"] != FORMAT:
        raise UserError(f"{folder}/config.json: format: found {record.get('format')!r}, expected {FORMAT}:"
                        " another version of train.py wrote this run")
    for name, kind, default, _ in OPTIONS:
        value, problem = record["settings"].get(name.replace("-", "_")), f"expected {type(default).__name__}"
        if isinstance(kind, list):
            problem = "" if value in kind else f"expected one of {', '.join(kind)}"
        elif type(value) is type(default):
            with contextlib.suppress(argparse.ArgumentTypeError):
                problem = "" if value == default or kind(str(value)) == value else "expected another"
        if problem:
            raise UserError(f"{folder}/config.json: settings: {name}: found {str(value)[:40]!r}, {problem}")
    counts, tasks = ("trained_parameters", "backbone_parameters"), list(find_tasks(record["settings"]["task"]))
    for name, value, good, expected in (
            ("tasks", record.get("tasks"), record.get("tasks") == tasks, ", ".join(tasks)),
            *((name, record.get(name), type(record.get(name)) is int and record[name] > 0, "a number of at least 1") for name in counts)):
        if not good:
            raise UserError(f"{folder}/config.json: {name}: found {str(value)[:40]}, expected {expected}")
    return record


@torch.no_grad()
def start_from(model, rows, marks, settings):
    """Copy what another run has trained (--init-from). A task's own part is taken from the run's task of that name, from --init-task,
    or from the nearest one: that with which the loss on some of the new task's training rows is the least [a similar task: R, X; this way: C]."""
    folder = Path(settings.init_from)
    record = read_run(folder)
    old, own = record["tasks"], json.loads(json.dumps(dataclasses.asdict(model.config)))
    differences = [f"{k} was {record['hyperpelt'].get(k)}, is {v}" for k, v in own.items() if record["hyperpelt"].get(k) != v]
    if record["fingerprints"].get("backbone") != marks["backbone"]:
        differences.append("it had another backbone")
    if differences:
        raise UserError(f"{folder}/config.json: a run to begin with must be like this one; {'; '.join(differences)}")
    if settings.init_task not in ["", *old]:
        raise UserError(f"--init-task: found {settings.init_task}, {folder} has {', '.join(old)}")
    by_task = model.by_task()
    expected = {name: torch.empty(len(old), *p.shape[1:], device="meta") if name in by_task else p for name, p in model.trained().items()}
    found, _ = load_tensors(folder / "best.safetensors", expected, dict(step=int))
    for name, parameter in model.trained().items():
        if name not in by_task:
            parameter.copy_(found[name])

    def place(task, source):
        for name, parameter in by_task.items():
            parameter[model.tasks.index(task)].copy_(found[name][old.index(source)])

    model.eval()
    for task in model.tasks if by_task else []:
        candidates = [task] if task in old else [settings.init_task] if settings.init_task else old
        first = data.draw_rows(rows[task]["train"], EVAL_BATCH, settings.seed)           # files may be sorted by label
        losses = {}
        for source in candidates:
            place(task, source)
            losses[source] = answer_loss(model, task, first)[1].item()
        nearest = min(losses, key=losses.get)
        place(task, nearest)
        shown = ", ".join(f"{source} {loss:.3f}" for source, loss in losses.items())
        print(f"{task} begins as {nearest}; loss on {len(first)} training rows: {shown}")


def pack_sites(sites):
    """Sites of a task without images -> {name: tensor}, such as "encoder FFN.3.up_bias"."""
    return {f"{kind}.{layer}.{name}": tensor for (kind, layer), site in sites.items() for name, tensor in zip(site.names, *site.parts)}


def export(model, tasks, mark, settings):
    """Write one task's weights as they are after generation, and the layer norms: nothing of the hypernetworks is left."""
    name = settings.export_task or list(tasks)[0]
    if name not in tasks or len(tasks) > 1 and not settings.export_task or name in data.IMAGE_TASKS:
        raise UserError(f"--export: found --task {settings.export_task or 'not given'}; expected one of the run's tasks without images,"
                        f" whose weights differ from image to image: {', '.join(task for task in tasks if task not in data.IMAGE_TASKS)}")
    if Path(settings.export).exists():
        raise UserError(f"{settings.export}: exists already; choose another --export")
    model.t5.dtype = torch.float32                                           # as they are generated, not as a bf16 run uses them
    with torch.no_grad():
        tensors = pack_sites(model.generate_sites(name))
    tensors |= {public_name(key.removeprefix("t5.")): p for key, p in model.trained().items() if key.startswith("t5.")}
    save_tensors(Path(settings.export), tensors, dict(task=name, method=settings.method, backbone=mark))
    print(f"{settings.export}: {name}, {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} deployed parameters (float32)")


def load_exported(path, t5):
    """What --export wrote, for its own T5 as T5.from_pretrained gives it -> sites for T5.forward and T5.generate. The T5 gets the trained
    layer norms. Raises UserError for a damaged file and another T5."""
    own = {public_name(name): parameter for name, parameter in t5.named_parameters()}
    tensors, metadata = data.read_safetensors(path, "a file that --export wrote")
    sites = {}
    metadata = data.parse_json(metadata.get("hyperpelt", "null"), f"{path}: metadata: hyperpelt")
    try:
        backbone = metadata["backbone"]
        for name in tensors.keys() - own.keys():
            kind, layer, part = name.split(".")
            for cls in (Prefix, Adapter):
                if part == cls.names[0]:
                    sites[kind, int(layer)] = cls([tensors[f"{kind}.{layer}.{part}"].to(t5.dtype) for part in cls.names])
        if wrong := [name for name in own.keys() & tensors.keys() if tensors[name].shape != own[name].shape]:
            raise ValueError(f"tensor {wrong[0]} has shape {list(tensors[wrong[0]].shape)}, expected {list(own[wrong[0]].shape)}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a file that --export wrote ({error})") from None
    if backbone != backbone_mark(t5):
        raise UserError(f"{path}: was made for another T5: found {backbone}, this one is {backbone_mark(t5)}")
    with torch.no_grad():
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name])
    return sites


# ------------------------------------------------------------------------------------------------------------ loop

def read_log(path, last_step, last_evaluated=math.inf):
    """-> the lines of log.jsonl up to a step, and up to the last evaluation that was saved. A crash may have left others, and a torn one."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            if row["step"] > (last_evaluated if "validation" in row else last_step):
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    return kept


def learning_rate(step, steps, settings):
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * (steps - step) / max(1, steps - settings.warmup_steps)


def peak_memory_mb():
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if resource is None:                                                     # Windows has no such count
        return 0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def steps_between_evaluations(steps, settings):
    if settings.eval_every:
        return settings.eval_every
    return max(1, steps // 8 if settings.steps else round(steps / settings.epochs))


def step_once(model, together, batch, optimiser, settings, at):
    """One step on a Batch: forward, backward, clip, update. `together`: the model, or what joins the gradients of several processes;
    `at`: where in the run, for a message -> loss, rows answered right (tensors)."""
    device = model.layer_ids.device
    input_ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    features = None if batch.features is None else batch.features.to(device)
    logits, loss = together(input_ids, input_ids != 0, labels, batch.task, settings.label_smoothing, features)
    (batch.share * loss).backward()
    norm = torch.nn.utils.clip_grad_norm_(list(model.trained().values()), GRADIENT_CLIP)
    if not torch.isfinite(norm):
        raise UserError(f"{at}, task {batch.task}, training rows {data.named(map(str, batch.numbers))} (from 0): loss {loss.item()},"
                        f" gradient norm {norm.item()}: the run diverged; the last checkpoint before it stays in {settings.out}; start again in"
                        " another --out with a lower --lr or a longer warm-up")
    optimiser.step()
    optimiser.zero_grad()
    return loss.detach(), count_right(logits, labels)


def train(model, tokenizer, tasks, splits, rows, settings, stop):
    """The loop: evaluate and save when it is time, stop when asked, else one step -> the answers of the best evaluation, as
    answer_all gives them; {} if that took place before a --resume."""
    out, log_path = Path(settings.out), Path(settings.out) / "log.jsonl"
    steps, batch = make_batches(rows, settings)
    eval_every = steps_between_evaluations(steps, settings)
    optimiser = torch.optim.AdamW(model.trained().values(), lr=settings.lr, weight_decay=0.0, fused=True)      # [R: AdamW, no decay]
    # Metrics are at least -1. Of the `seen` training rows since the last row of the log `right` were answered right.
    progress, best_answers = dict(step=0, evaluated=0, best_step=0, best=-2.0, right=0, seen=0), {}
    if settings.resume:
        progress = load_last(out / "last.safetensors", model, optimiser, steps)
        kept = read_log(log_path, progress["step"], progress["evaluated"])
        write_first(log_path, "".join(line + "\n" for line in kept).encode())
        print(f"resumed at step {progress['step']} of {steps}")
    else:
        save_last(out / "last.safetensors", model, optimiser, progress)      # from here on there is something to resume
    device, together = model.layer_ids.device, model
    if WORLD > 1:
        together = DistributedDataParallel(model, [device] if device.type == "cuda" else None, broadcast_buffers=False,
                                           find_unused_parameters=len(tasks) > 1)
    if RANK:
        progress.update(right=0, seen=0)                                     # the saved counts, sums over all, go to the first process
    right = torch.tensor(progress["right"], device=device)                   # on the device, so that no step waits for it
    log = open(log_path if RANK == 0 else os.devnull, "ab", buffering=0)
    bar = tqdm(total=steps, initial=progress["step"], unit="step", disable=True if RANK else None)

    def note(**row):
        try:
            log.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{log_path}: cannot be written: {error.strerror}; go on with: python train.py --out {out} --resume") from None

    def save_progress():
        rights, seen = map(sum, zip(*gather((int(right), progress["seen"]))))
        save_last(out / "last.safetensors", model, optimiser, {**progress, "right": rights, "seen": seen})

    examples, since = 0, time.perf_counter()                                 # for the rate of the steps since then
    while True:
        step = progress["step"]

        if step > progress["evaluated"] and (step % eval_every == 0 or step == steps):
            answers, result = answer_all(model, tokenizer, tasks, splits, rows, ["validation"], stop, {})
            if answers is not None:
                mean = averages(tasks, result, "validation")["tasks"]        # chooses the checkpoint [X: HyperFormer]
                if mean > progress["best"]:
                    progress.update(best=mean, best_step=step)
                    best_answers = answers
                    save_tensors(out / "best.safetensors", model.trained(), dict(step=step))
                progress.update(evaluated=step)
                note(step=step, validation=result, mean=mean)
                tqdm.write(f"step {step} of {steps}   {show(result)}")
                save_progress()
            examples, since = 0, time.perf_counter()

        stopping = list(stop)
        if WORLD > 1:                                                        # all stop at the same step: look now and then, together
            stopping = sum(gather(stop), []) if step % LOG_EVERY == 0 else []
        if stopping:
            save_progress()
            bar.close()
            leave_first(f"stopped at step {step}; go on with: python train.py --out {out} --resume", 128 + stopping[0])
        if step == steps:
            break

        model.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, settings)
        now = batch(step)
        loss, rows_right = step_once(model, together, now, optimiser, settings, f"step {step + 1}")
        progress["step"] += 1
        bar.update()
        if now.share:
            right += rows_right
            progress["seen"] += len(now.input_ids)
            examples += len(now.input_ids)

        if progress["step"] % LOG_EVERY == 0:
            # Sums over the processes; of one process these are its own numbers.
            own = now.share / WORLD * loss.item(), int(right), progress["seen"], examples
            mean_loss, rights, seen, examples = map(sum, zip(*gather(own)))
            rate = examples / (time.perf_counter() - since)
            row = dict(step=progress["step"], task=now.task, loss=round(mean_loss, 5), accuracy=round(rights / seen, 5),
                       lr=optimiser.param_groups[0]["lr"], examples_per_s=round(rate, 1), peak_memory_mb=peak_memory_mb())
            note(**row)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.3f}, {rate:.0f} examples/s,"
                                f" {row['peak_memory_mb']} MB, best {max(progress['best'], 0):.3f}")
            examples, since = 0, time.perf_counter()
            right.zero_()
            progress["seen"] = 0
    bar.close()
    return best_answers


# ------------------------------------------------------------------------------------------------------------ runs

def main():
    try:
        command(parse_arguments())
        if dist.is_initialized():
            gather(None)                                                     # nobody leaves while another one still writes
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)                                                      # at an orderly end PyTorch's threads abort once in a while
    except (UserError, OSError):
        if RANK:                                                             # if the first one says the same, torchrun ends this one now
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        raise
    except RuntimeError as error:
        if WORLD == 1 or not re.search("gloo|NCCL", str(error)):
            raise
        raise UserError(f"process {RANK} of {WORLD}: another one has gone ({str(error)[:120]})") from None


def command(given):
    if "table" in given:
        return print(table(given["table"]))
    if "seeds" not in given:
        return run_once(complete_settings(given))
    out, seed = given.get("out") or default_out(given), given.get("seed", 0)
    folders = [Path(out) / f"seed-{i}" for i in range(seed, seed + given.pop("seeds"))]
    for folder in folders:
        resume, started = given.get("resume", False), (folder / "config.json").exists()
        if not (resume and (folder / "metrics.json").exists()):
            run_once(complete_settings({**given, "out": str(folder), "seed": int(folder.name.removeprefix("seed-")), "resume": resume and started}))
    print("\n" + table(folders))


def prepare(settings, saved):
    """Settings and, of a run that exists, its config.json -> tokenizer, tasks, splits, rows, images ({} but for --ask), model, marks
    (hashes of what the run depends on). The model is on its device. Raises UserError where the run had another backbone, data, ..."""
    torch.manual_seed(settings.seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    fetching = settings.download or not Path(settings.model).is_dir()
    if fetching and RANK:
        gather(None)                                                         # the first process fetches, the others find what it put there
    tokenizer, tasks = Tokenizer.from_pretrained(settings.model), find_tasks(settings.task)
    without_data, images = bool(settings.ask or settings.export), {}
    splits, rows = ({}, {}) if without_data else load_data(settings, tasks, tokenizer)
    t5 = T5.from_pretrained(settings.model)
    if fetching and not RANK:
        gather(None)
    if tokenizer.first_sentinel >= t5.config.vocab_size:
        raise UserError(f"{settings.model}: spiece.model and sentinels give {tokenizer.first_sentinel + 1} ids,"
                        f" config.json says vocab_size {t5.config.vocab_size}")
    if without_data:
        images, width, feature_mark = open_features(settings, list(saved["image_sets"]))
    else:
        width, feature_mark = load_images(settings, splits, rows)
    devices = device.type if WORLD == 1 else f"{device.type} x {WORLD}"
    marks = {"backbone": backbone_mark(t5), "tokenizer": tokenizer.mark, "data": data_mark(splits, rows), **feature_mark, "device": devices}
    unchecked = {"device": not settings.resume, "data": without_data}
    compared = [what for what in marks if settings.existing_run and not unchecked.get(what)]
    others = [f"another {what}: found {marks[what]}, expected {saved['fingerprints'].get(what)}"
              for what in compared if marks[what] != saved["fingerprints"].get(what)]
    if others:
        raise UserError(f"{settings.out}/config.json: the run had {'; '.join(others)}")
    sizes = {f.name: getattr(settings, f.name) for f in dataclasses.fields(HyperPELTConfig) if hasattr(settings, f.name)}
    sizes.update(visual_width=width, vision="both" if settings.vision == "shuffled" else settings.vision)
    model = HyperPELT(t5, list(tasks), HyperPELTConfig(**sizes), torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    if RANK:
        torch.manual_seed(settings.seed + 2**32 * RANK)                      # the same weights, but dropout of its own
    return tokenizer, tasks, splits, rows, images, model.to(device), marks


def run_once(settings):
    """One run: train, or go on; or what else the command line asks of a trained one."""
    started, out = time.perf_counter(), Path(settings.out)
    join_processes()
    saved = read_run(out) if settings.existing_run else {}
    tokenizer, tasks, splits, rows, images, model, marks = prepare(settings, saved)
    trained, whole = (sum(p.numel() for p in part) for part in (model.trained().values(), model.t5.parameters()))
    size = f"{trained:,} trained parameters, {trained / whole:.1%} of the T5's"
    if settings.ask:
        load_best(out / "best.safetensors", model)
        return ask(model, tokenizer, tasks, images, settings)
    if settings.export:
        load_best(out / "best.safetensors", model)
        print(f"{settings.method}: {size}")
        return export(model, tasks, marks["backbone"], settings)
    training = settings.resume or not settings.existing_run
    if training:
        out.mkdir(parents=True, exist_ok=True)
    held = data.lock(out) if training and RANK == 0 else None
    settings.resume &= any((out / name).exists() for name in ("last.safetensors", "best.safetensors", "log.jsonl"))     # else killed before
    if training and settings.init_from and not settings.resume:
        start_from(model, rows, marks, settings)
    if not settings.existing_run:
        if RANK == 0 and (out / "config.json").exists():                     # since complete_settings looked
            raise UserError(f"{out}: another process has begun a run here")
        record = dict(format=FORMAT, settings=settings.record, fingerprints=marks, image_sets=image_sets(splits), tasks=list(tasks),
                      trained_parameters=trained, deployed_parameters=deployed(model), backbone_parameters=whole,
                      hyperpelt=dataclasses.asdict(model.config), torch=torch.__version__)
        write_first(out / "config.json", json.dumps(record, indent=1).encode() + b"\n")
    introduce(model.t5, splits, settings)
    print(f"{settings.method}, {settings.precision}, {model.layer_ids.device.type}: {size}")
    if settings.predict:
        load_best(out / "best.safetensors", model)
        return predict(model, tokenizer, tasks, splits, rows, settings)
    stop = data.catch_signals()
    known = train(model, tokenizer, tasks, splits, rows, settings, stop) if training else {}
    best_step = evaluate(model, tokenizer, tasks, splits, rows, settings, stop, known)
    print(f"{size}; best step {best_step:,}, saved in {out}; {time.perf_counter() - started:.0f} s")
    if held is not None:
        os.close(held)


def evaluate(model, tokenizer, tasks, splits, rows, settings, stop, known):
    """The best checkpoint on every split with labels, into metrics.json and on the screen -> its step; `known` as in answer_all."""
    out = Path(settings.out)
    best_step = load_best(out / "best.safetensors", model)
    answers, metrics = answer_all(model, tokenizer, tasks, splits, rows, ["validation", "test", "mismatched"], stop, known)
    if answers is None:
        leave_first(f"stopped; evaluate with: python train.py --out {out} --eval-only", 128 + stop[0])
    majority = {name: {split: data.majority(tasks[name], splits[name]["train"], splits[name][split]) for split in by_split}
                for name, by_split in metrics.items()}
    shared = [split for split in ("validation", "test") if all(split in by_split for by_split in metrics.values())]
    means = {split: averages(tasks, metrics, split) for split in shared}
    record = dict(best_step=best_step, **metrics, average=means, majority=majority)
    write_first(out / "metrics.json", json.dumps(record, indent=1).encode() + b"\n")
    report(tasks, splits, answers, metrics, majority, means, settings)
    if RANK == 0:
        try:
            draw(model, tasks, majority, out)
        except Exception as error:                                           # whatever it is, the run is whole without a picture
            print(f"note: {out}/curves.png could not be drawn: {error}", file=sys.stderr)
    return best_step


def predict(model, tokenizer, tasks, splits, rows, settings):
    """Write a GLUE submission file for a split of every task (mnli: one for each genre set), or an image task's results file."""
    for task in tasks.values():
        if settings.predict != "submission" and settings.predict not in splits[task.name]:
            raise UserError(f"--predict {settings.predict}: found no such split of {task.name} with --split {settings.split};"
                            f" expected {', '.join(splits[task.name])} or submission")
        files = {settings.predict: f"{task.folder}-{settings.predict}.tsv"}
        if task.name in data.IMAGE_TASKS:
            files = {settings.predict: f"{settings.predict}-{task.results}"}
        elif settings.predict == "submission":
            files = {"submission": f"{task.folder}.tsv"}
            if task.name == "mnli":
                files = {"submission": "MNLI-m.tsv", "submission_mismatched": "MNLI-mm.tsv"}
        for split, file in files.items():
            visual, known = task.name in data.IMAGE_TASKS, splits[task.name]
            if split not in known:
                known[split] = data.read_unlabelled(task, settings.data_dir) if visual else data.read_split(task, settings.data_dir, split)
                rows[task.name][split] = encode(known[split], tokenizer, settings)
                load_images(settings, {task.name: known}, rows)              # all once more: their features must be alike
            examples, path = known[split], Path(settings.out) / file
            texts = answer(model, tokenizer, task, rows[task.name][split], [])
            write = data.write_results if visual else data.write_submission
            unknown = write(path, task, texts, examples) if RANK == 0 else 0
            print(f"{path}: {len(examples):,} predictions" + (f"; {unknown} answers were no label" if unknown else ""))


# ------------------------------------------------------------------------------------------------- what people are shown

def introduce(t5, splits, settings):
    """What the run works on; of a small one also the command line that does it in earnest."""
    name = "mini-t5 (bundled, " if settings.bundled else f"{settings.model} ("
    counts = [f"{task} " + ", ".join(f"{split} {len(examples):,}" for split, examples in by_split.items()) for task, by_split in splits.items()]
    print(f"{name}{sum(p.numel() for p in t5.parameters()) / 1e6:.1f} M parameters)"
          f" on {'bundled sample data' if settings.sample else settings.data_dir}: {'; '.join(counts)}")
    if settings.bundled and not settings.existing_run:
        visual = [name in data.IMAGE_TASKS for name in splits]
        folder = "vl --features features" if all(visual) else "DIR --features features" if any(visual) else "glue --download"
        print(f"for real: python train.py --task {settings.task} --method {settings.method} --model t5-base --data-dir {folder} --out {settings.out}-t5-base")


def align(rows):
    """Rows of strings -> lines, with columns as wide as they have to be."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


def report(tasks, splits, answers, metrics, majority, means, settings):
    """Print the metrics beside those of a constant answer, five answers of every task, and how to go on."""
    print("\n" + align([("task", "split", "metric", "value", "majority", "rows"), *(
        (name, split, metric, f"{value:.4f}", f"{majority[name][split][metric]:.4f}", f"{len(answers[name, split]):,}")
        for name, by_split in metrics.items() for split, values in by_split.items() for metric, value in values.items())]))
    for split, mean in means.items() if len(tasks) > 1 else []:
        count = sum(len(task.metrics) for task in tasks.values())
        print(f"\nmean of the {count} metrics on {split} {mean['metrics']:.4f}, of the {len(tasks)} tasks {mean['tasks']:.4f}")
    for name, task in tasks.items():
        split = "test" if (name, "test") in answers else "validation"
        texts, examples = answers[name, split], splits[name][split]
        drawn = np.random.default_rng(settings.seed).permutation(len(texts))[:5]
        print(f"\n{len(drawn)} of the {len(texts):,} answers of {name}, {split}:")
        for example, text in ((examples[i], texts[i]) for i in drawn):
            right = data.rightness(task, text, example)
            mark = "" if right is None else {0: "(wrong) ", 1: "(right) "}.get(right, f"({right:.1f} right) ")
            lines = [*zip(task.fields, example.parts[1::2]), ("image", ":".join(example.image or "")),
                     ("predicted", text or "(nothing)"), ("gold", mark + example.target)]
            print("\n" + align([(f"  {field}", textwrap.shorten(value, 120, placeholder=" ...")) for field, value in lines if value]))
        shortest = min((examples[i] for i in drawn), key=lambda example: len(example.source))
        asked = [*shortest.parts[1::2], *([":".join(shortest.image)] if shortest.image else [])]
    asked = [name, *asked] if len(tasks) > 1 else asked                      # the last task's
    print(f"\nask it:    python train.py --out {settings.out} --ask {shlex.join(asked)}")
    print(f"evaluate:  python train.py --out {settings.out} --eval-only")


def find_image(images, text, settings):
    """17 or val2014:17 -> (features, row) and "val2014:17", or None. Without a set, val... is looked at first; a set that the run
    does not know is opened if its features lie beside the others and are like them."""
    image_set, _, key = text.rpartition(":")
    if images and image_set and os.path.exists(f"{settings.features}/{image_set}.npy"):        # no error for a long text
        images = open_features(settings, [*images, image_set])[0]
    for name in sorted(images, key=lambda name: not name.startswith("val")):
        if image_set in ("", name) and key in images[name][1]:
            return (images[name][0], images[name][1][key]), f"{name}:{key}"


@torch.no_grad()
def ask(model, tokenizer, tasks, images, settings):
    """Print the answer to --ask, and of a task with label words the probability of each."""
    inputs = {name: [*task.fields, "image id"] if name in data.IMAGE_TASKS else [*task.fields] for name, task in tasks.items()}
    texts, image = settings.ask, find_image(images, settings.ask[-1], settings)
    if len(texts) > 1 and texts[0] in tasks:
        inputs, texts = {texts[0]: inputs[texts[0]]}, texts[1:]
    fitting = sorted((name for name in inputs if len(inputs[name]) == len(texts)), key=lambda name: name not in data.IMAGE_TASKS)
    name = next((name for name in fitting if image or name not in data.IMAGE_TASKS), None)     # an id is not taken for a text
    if name is None:
        found = f"image {texts[-1]}, which is in none of {', '.join(images)}" if fitting else f"texts: {len(texts)}"
        expected = " or ".join(f"{name}: " + ", ".join(fields) for name, fields in inputs.items())
        raise UserError(f"--ask: found {found}; expected {expected}")
    task, visual = tasks[name], name in data.IMAGE_TASKS
    parts, words = data.source_parts(task, texts[:len(task.fields)]), list(task.labels.values())
    rows = encode([data.Example(parts, word, None, "") for word in words or [""]], tokenizer, settings)
    for row in rows:
        row.image = image[0] if visual else None
    print(" ".join(parts) + (f"   [{image[1]}]" if visual else ""))
    print(answer(model, tokenizer, task, rows[:1], [])[0])
    if words:
        logits, _, labels = answer_loss(model, name, rows)                                           # [words, T, vocabulary]
        surprise = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")       # [words, T]
        print(align([(f"  {word}", f"{chance:.4f}") for word, chance in zip(words, (-surprise.sum(1)).softmax(0).tolist())]))


def table(folders):
    """Folders of finished runs, or of their seed-... folders -> a Markdown table: a row for each method (and other settings), a column
    for each task, mean and standard deviation over seeds in percent. Runs of one task each share a row. Raises UserError."""
    runs = []
    for folder in map(Path, folders):
        runs += [folder] if (folder / "config.json").exists() else sorted(folder.glob("seed-*")) or [folder]
    columns, groups = {}, {}      # {(task, split): heading}, {settings: {seed: {(task, split): (values, trained, share of the T5)}}}
    for run in runs:
        config, metrics = read_run(run), data.read_json(run / "metrics.json", "average")
        settings = {k: v for k, v in config["settings"].items() if k not in ("out", "seed", "data_dir", "features")}
        settings["task"] = settings["task"] if len(config["tasks"]) > 1 else "one each"
        trained = config["trained_parameters"] / len(config["tasks"])
        results = groups.setdefault(json.dumps(settings), {}).setdefault(config["settings"].get("seed"), {})
        for name, task in ((name, data.find_task(name)) for name in config["tasks"]):
            own = metrics[name] if isinstance(metrics.get(name), dict) else {}
            split = "test" if "test" in own else "validation"
            if not isinstance(own.get(split), dict) or any(type(own[split].get(metric)) is not float for metric in task.metrics):
                raise UserError(f"{run}/metrics.json: {name}: {split}: found {str(own.get(split))[:40]}, expected {', '.join(task.metrics)} as numbers")
            columns[name, split] = f"{name} {', '.join(task.metrics)}, {split}"
            if (name, split) in results:
                raise UserError(f"{run}: another of these runs has its settings, seed and task; expected each once")
            values = [own[split][metric] for metric in task.metrics]
            results[name, split] = values, trained, trained / config["backbone_parameters"]

    def percent(values):
        if len(values) < 2:
            return f"{100 * values[0]:.2f}" if values else "-"
        return f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}"

    lines = [["method", "trained", "of the T5", "seeds", *columns.values(), "mean of metrics", "mean of tasks"]]
    lines.append(["---"] * len(lines[0]))
    for key, by_seed in groups.items():
        own, first = json.loads(key), next(iter(by_seed.values()))
        others = [other for other in map(json.loads, groups) if other["method"] == own["method"]]
        label = own["method"] + "".join(f", {k} {'none' if v == '' else v}" for k, v in own.items() if any(other.get(k) != v for other in others))
        _, trained, shares = zip(*first.values())
        line = [label, f"{sum(trained):,.0f}", f"{sum(shares):.2%}", str(len(by_seed))]
        for column in columns:
            values = [results[column][0] for results in by_seed.values() if column in results]      # [seeds][metrics]
            line.append(" / ".join(map(percent, zip(*values))) or "-")
        whole = [[values for values, *_ in results.values()] for results in by_seed.values()          # of those who have all tasks
                 if {name for name, _ in results} == {name for name, _ in columns}]
        line.append(percent([np.mean(sum(values, [])) for values in whole]))
        line.append(percent([np.mean([np.mean(v) for v in values]) for values in whole]))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cosines(vectors):
    """[names, ...] -> the cosines of all with each other [names, names]."""
    z = torch.nn.functional.normalize(vectors.detach().flatten(1), dim=1)
    return (z @ z.T).cpu()


def draw_cosines(axes, vectors, names, title):
    axes.imshow(cosines(vectors), vmin=-1, vmax=1, cmap="coolwarm")
    axes.set(title=title, yticks=range(len(names)), yticklabels=names)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    for (i, j), cosine in np.ndenumerate(cosines(vectors).numpy()):
        axes.text(j, i, f"{cosine:.2f}", ha="center", va="center")


def draw(model, tasks, majority, out):
    """RUN/curves.png from log.jsonl, and for several tasks RUN/task_similarity.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("for curves.png: pip install matplotlib")
    if log := [json.loads(line) for line in read_log(out / "log.jsonl", math.inf)]:
        steps, evaluations = [row for row in log if "loss" in row], [row for row in log if "validation" in row]
        figure = Figure(figsize=(12, 4.5), layout="constrained")
        for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy")):
            axes.plot([row["step"] for row in steps], [row.get(key) for row in steps], color="0.6", label=f"training {key}")
            axes.set(xlabel="step", ylabel=key)
        for name, metric in ((name, metric) for name, task in tasks.items() for metric in task.metrics):
            values = [row["validation"][name]["validation"][metric] for row in evaluations]
            line, = axes.plot([row["step"] for row in evaluations], values, "o-", label=f"{name} validation {metric}")
            axes.axhline(majority[name]["validation"][metric], linestyle="--", color=line.get_color(),
                         label=f"{name} {metric}, majority")
        axes.legend(fontsize="small", bbox_to_anchor=(1, 1))
        figure.savefig(out / "curves.png", dpi=120)
    if len(tasks) > 1 and hasattr(model, "hyper_embedding"):
        figure = Figure(figsize=(2 + 0.8 * len(tasks),) * 2, layout="constrained")
        draw_cosines(figure.subplots(), model.hyper_embedding.task, list(tasks), "cosine of the task embeddings")     # z_tau [M, N, Z]
        figure.savefig(out / "task_similarity.png", dpi=120)


if __name__ == "__main__":
    data.run(main)
