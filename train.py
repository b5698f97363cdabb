"""Train, evaluate and use HyperPELT. `python train.py --help` lists the options.

Read `train` first: it is the loop. `Batches` chooses what it learns from, `evaluate` measures it.
A command goes through main, read_settings (the options), load_run (data and model), train and
finish; ask, predict, export and table use runs that exist.

A run's folder holds config.json (settings, HyperPELTConfig, hashes of what the run depends on),
log.jsonl (a line for every ten steps and every evaluation), last.pt (a run resumes from it),
best.safetensors (what is trained, at the best evaluation), metrics.json (the result), curves.png
and predictions.
"""
import signal

if __name__ == "__main__":
    # Ctrl-C ends the program at once, also while torch is imported. A run resumes from last.pt.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import datetime
import functools
import hashlib
import io
import json
import math
import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from clip_features import load_features
from data import UserError, read_json_file, reading
from hyperpelt import METHODS, VISION, HyperPELT, HyperPELTConfig, count, seam_of
from t5 import T5, Tokenizer

SAMPLE = Path(__file__).resolve().parent / "sample"
GRADIENT_CLIP = 1.0
LOG_EVERY = 10
SAVE_EVERY = 200
EVAL_BATCH_SIZE = 64
# torchrun sets these two for each of its processes.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---- settings ------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python train.py --task rte                                  train on the bundled sample
  python train.py --ask "A man is eating." "A man eats."      ask that run
  python train.py --run runs/rte-hyperpelt --resume           go on after an interruption
  python train.py --task glue --model t5-base --data-dir glue --download
  python train.py --task vqa --data-dir vl --features features --model google/flan-t5-base
  python train.py --task cb --model t5-base --data-dir superglue --init-from runs/glue-hyperpelt
    --init-task mnli
  python train.py --table runs/rte-hyperpelt runs/rte-prefix
  torchrun --nproc_per_node=2 -- train.py --task glue         one process per GPU
"""


def fast_dtypes():
    """bfloat16 first where the machine multiplies fast in it, else float32."""
    if DEVICE == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    return ("bfloat16", "float32") if fast else ("float32", "bfloat16")


# Every option: default and help. The default tells the type: False is a switch, a list takes one
# text or more, and a tuple holds the choices, the default first.
OPTIONS = {
    "model and data": {
        "task": ("rte", "names with commas between, or glue, or vl"),
        "model": (str(SAMPLE / "mini-t5"), "T5: folder or public name"),
        "data_dir": (str(SAMPLE), "folder of the tasks' official files"),
        "features": (str(SAMPLE / "vqa" / "features"), "folder of image features"),
        "protocol": (("paper", "official"), "splits as in the paper, or the official files"),
        "max_train_examples": (0, "per task; 0: all"),
        "max_eval_examples": (0, "per task and split; 0: all"),
        "max_source_length": (128, "in tokens"),
    },
    "method": {
        "method": (tuple(METHODS), "hypernetworks, or a baseline"),
        "vision": ((*VISION, "shuffled"), "what an image gives; the last: both, of another image"),
        "set": ([], "fields of HyperPELTConfig, such as prefix_length=20 hyper_norm=true"),
        "init_from": ("", "folder of a run: start from what it has trained"),
        "init_task": ("", "task of that run whose embedding initialises the new tasks"),
    },
    # The paper's numbers are reconstructed: 2^18 steps of 128 at a constant 1e-3. These are ours,
    # for one task on a small machine.
    "training": {
        "epochs": (6.0, "passes over the data of all tasks"),
        "max_steps": (0, "if not 0, overrides --epochs"),
        "batch_size": (32, "examples per step, of all processes"),
        "accumulate": (1, "parts of a process's examples, computed one after the other"),
        "recompute": (False, "activations in the backward pass, which needs less memory"),
        "lr": (1e-3, "learning rate of AdamW"),
        "norm_rate": (3.0, "the T5's layer norms learn so many times as fast"),
        "schedule": (("linear", "constant"), "after the warm-up"),
        "warmup_steps": (50, "steps in which the rate rises"),
        "label_smoothing": (0.0, "probability that is spread over all tokens"),
        "task_temperature": (2.0, "T: the task of a batch is drawn with p ~ examples^(1/T)"),
        "eval_every": (0, "in steps; 0: every epoch"),
        "dtype": (fast_dtypes(), "of frozen weights"),
        "seed": (0, "of every random choice"),
    },
    # These say what to do with a run. They are not saved in it.
    "runs": {
        "run": ("", "the run's folder; empty: runs/TASK-METHOD"),
        "download": (False, "fetch official files into --data-dir"),
        "resume": (False, "go on with the run, if it exists"),
        "eval_only": (False, "evaluate the run's best checkpoint"),
        "predict": ("", "write the outputs on validation, test or submission"),
        "ask": ([], "[TASK] the texts of one example [SET:IMAGE]"),
        "export": ("", "folder: write the generated weights of each task into it"),
        "table": ([], "print these runs as a Markdown table"),
        "num_seeds": (0, "so many runs, in RUN/seed-0, RUN/seed-1, ..."),
    },
}
# These say where things lie. With other values of them, a run is still the same run.
PATHS = ("model", "data_dir", "features")
ABOVE_ZERO = ("batch_size", "accumulate", "max_source_length", "epochs", "task_temperature")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python train.py --help")


def make_parser():
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)
    parser = Parser(usage="python train.py [options]", epilog=EXAMPLES, formatter_class=formatter)
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, (default, text) in options.items():
            kind = {"type": type(default), "metavar": "X"}
            if default is False:
                kind = {"action": "store_true"}
            elif isinstance(default, list):
                kind = {"nargs": "+", "metavar": "X"}
            elif isinstance(default, tuple):
                kind = {"choices": default, "metavar": "X"}
                text = f"{text}: {', '.join(default)}"
                default = default[0]
            group.add_argument(f"--{name.replace('_', '-')}", default=default,
                               help=f"{text} (default: %(default)s)", **kind)
    return parser


def read_settings(arguments):
    """Command line -> settings. Those of an existing run are the defaults of its options.

    Raises UserError for a run that is not there, and for one that would be overwritten.
    """
    parser = make_parser()
    args = parser.parse_args(arguments)
    folder = args.run or f"runs/{args.task.replace(',', '-')}-{args.method}"
    path = Path(folder, "config.json")
    uses_run = args.eval_only or args.predict or args.ask or args.export
    if (uses_run and not args.num_seeds) or (path.exists() and args.resume):
        # Parse again: what the command line does not say is as the run had it.
        parser.set_defaults(**read_record(folder)["settings"])
        args = parser.parse_args(arguments)
    elif path.exists() and not args.table:
        raise UserError(f"{folder}: holds a run already; --resume goes on, --run names another")
    args.run = folder
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):
            limit = 1 if name == "label_smoothing" else 2 ** 31
            if not 0 <= value < limit or value == 0 and name in ABOVE_ZERO:
                least = "above" if name in ABOVE_ZERO else "from"
                raise UserError(f"--{name.replace('_', '-')}: found {value},"
                                f" expected a number {least} 0, below {limit:,}")
    return args


def make_config(args):
    """Settings -> HyperPELTConfig, still without images. Raises UserError."""
    defaults = vars(HyperPELTConfig())
    parsers = {bool: lambda text: json.loads(text.lower()), tuple: lambda text: text.split(",")}
    values = {}
    with reading(f"--set {' '.join(args.set)}") as where:
        where.found = defaults
        for assignment in args.set:
            name, _, text = assignment.partition("=")
            kind = type(defaults[name])
            values[name] = parsers.get(kind, kind)(text)
        vision = "both" if args.vision == "shuffled" else args.vision
        return HyperPELTConfig(method=args.method, vision=vision, **values)


def read_record(folder):
    """-> config.json of a run. Raises UserError for a folder that holds none."""
    path = Path(folder, "config.json")
    record = read_json_file(path)
    if not isinstance(record, dict) or "hashes" not in record:
        raise UserError(f"{path}: not the config.json of a run")
    return record


def check_same(saved, record, message):
    """Raises UserError where two contents of config.json differ, so that they are of two runs.
    Paths may differ. Only what `record` has is compared: --ask, for one, reads no examples."""
    found = []
    for section in ("settings", "config", "hashes"):
        for name, value in record.get(section, {}).items():
            before = saved[section].get(name)
            if value != before and name not in PATHS:
                found.append(f"{name} was {before}, is {value}")
    if found:
        raise UserError(f"{message}: {'; '.join(found)}")


# ---- what a run works on -------------------------------------------------------------------------

@dataclass
class Run:
    args: argparse.Namespace
    folder: Path
    tasks: dict             # {name: data.Task}
    splits: dict            # {task name: {split: [data.Example]}}
    images: dict            # {(image set, id): (features of the set [images, N, V], row)}
    tokenizer: Tokenizer
    encode: object          # text -> ids, kept for the last texts: every epoch needs them again
    model: HyperPELT
    record: dict            # config.json: settings, config (HyperPELTConfig), hashes, ...
    started: float          # in seconds, by time.perf_counter


def load_run(args):
    """Settings -> Run, its model with initial weights. Raises UserError where the run exists and
    its settings, HyperPELTConfig, data, features or backbone were others."""
    saved = read_record(args.run) if Path(args.run, "config.json").exists() else None
    tasks = data.find_tasks(args.task)
    tokenizer, t5 = load_backbone(args, tasks)

    # Examples and the features of their images. To ask or export, the model is enough.
    hashes = {"backbone": hash_backbone(t5),
              "tokenizer": short_hash([tokenizer.pieces.serialized_model_proto()])}
    splits, images = {}, {}
    if (args.ask or args.export) and not args.predict:
        image_encoder = saved["image_encoder"]
    else:
        splits = load_splits(args, tasks)
        examples = [example for by_split in splits.values() for split in by_split.values()
                    for example in split]
        images, image_encoder, hashes["image features"] = open_features(args, examples)
        hashes["examples"] = short_hash(repr(example).encode() for example in examples)

    # The model. All processes start from the same weights.
    torch.manual_seed(args.seed)
    config = make_config(args)
    config.visual_width = image_encoder["width"] if image_encoder else 0
    try:
        model = HyperPELT(t5, list(tasks), config, getattr(torch, args.dtype))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--method, --set: {error}") from None

    settings = {name: value for name, value in vars(args).items() if name not in OPTIONS["runs"]}
    record = {"settings": settings, "config": vars(model.config), "hashes": hashes,
              "image_encoder": image_encoder, "trained_parameters": count(model.trained().values()),
              "torch": torch.__version__}
    # As the file gives it back: tuples become lists.
    record = json.loads(json.dumps(record))
    if saved:
        check_same(saved, record, f"{args.run}/config.json: this is another run")
    encode = functools.lru_cache(maxsize=2 ** 16)(tokenizer.encode)
    return Run(args, Path(args.run), tasks, splits, images, tokenizer, encode, model.to(DEVICE),
               record, time.perf_counter())


def load_backbone(args, tasks):
    """-> tokenizer, T5. The first process downloads what is missing, the others wait for it."""
    if RANK > 0:
        wait_for_all()
    for task in tasks.values() if args.download else ():
        data.download(task, args.data_dir)
    with reading(args.model):
        tokenizer = Tokenizer.from_pretrained(args.model)
        t5 = T5.from_pretrained(args.model)
        t5.encoder.recompute = t5.decoder.recompute = args.recompute
    if RANK == 0:
        wait_for_all()
    return tokenizer, t5


def load_splits(args, tasks):
    """-> {task name: {split: [Example]}}. Raises UserError."""
    splits = {}
    for name, task in tasks.items():
        splits[name] = data.make_splits(task, args.data_dir, args.protocol)
        for split, examples in splits[name].items():
            limit = args.max_train_examples if split == "train" else args.max_eval_examples
            if limit:
                splits[name][split] = data.sample_examples(examples, limit, args.seed)
    return splits


def open_features(args, examples, image_encoder=None):
    """-> {(image set, id): (features of the set [images, N, V], row)}, the encoder that made them
    (kind, weights, preprocessing, width), a hash.

    Raises UserError for a missing file or image, features of another encoder than the others or
    `image_encoder`, and an N that does not fit.
    """
    wanted = {example.image for example in examples if example.image}
    images, hashed = {}, []
    prefix_length = make_config(args).prefix_length
    for name in sorted({image_set for image_set, _ in wanted}):
        path = Path(args.features) / f"{name}.npy"
        with reading(path):
            features, row_of, about = load_features(path)
            encoder = {key: about[key] for key in ("kind", "weights", "preprocessing")}
        _, cells, encoder["width"] = features.shape
        image_encoder = image_encoder or encoder
        if encoder != image_encoder:
            raise UserError(f"{path}: found features of {encoder}, expected {image_encoder}")
        if args.vision != "tokens" and cells != prefix_length:
            raise UserError(f"{path}: found {cells} grid cells, expected {prefix_length},"
                            " one for each position of the prefix (--set prefix_length=...)")
        images |= {(name, image_id): (features, row) for image_id, row in row_of.items()}
        # About fifty images stand for all of them.
        hashed += [repr(row_of).encode(), features[::max(1, len(features) // 50)].tobytes()]
    if missing := sorted(wanted - images.keys()):
        raise UserError(f"{args.features}: {len(missing)} images have no features,"
                        f" such as {', '.join(map(':'.join, missing[:5]))}")
    if args.vision == "shuffled":
        images = shuffle_images(images, args.seed)
    return images, image_encoder, short_hash(hashed)


def shuffle_images(images, seed):
    """Give every image the features of another one. What is answered then needs no image."""
    names = list(images)
    np.random.default_rng(seed).shuffle(names)
    others = names[-1:] + names[:-1]
    return {name: images[other] for name, other in zip(names, others, strict=True)}


def short_hash(chunks):
    """Bytes, piece by piece -> 16 hexadecimal digits of their sha256."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:16]


def hash_backbone(t5):
    # The layer norms are left out, because training and load_exported change them.
    tensors = [tensor.contiguous().numpy() for name, tensor in t5.state_dict().items()
               if "norm" not in name]
    return short_hash([repr(t5.config).encode(), *tensors])


# ---- batches -------------------------------------------------------------------------------------

def pad(rows, value):
    """Lists of ids -> [B, longest], padded on the right."""
    length = max(map(len, rows))
    if length > 64:
        # A CPU keeps a compiled product for every shape: fewer lengths need less memory.
        length += -length % 8
    return torch.tensor([ids + [value] * (length - len(ids)) for ids in rows])


def make_inputs(run, examples):
    """Examples of one task -> ids [B, S] and, where they have images, features [B, N, V]."""
    ids = [data.encode_source(example.parts, run.encode, run.args.max_source_length)
           for example in examples]
    features = None
    if examples[0].image:
        found = [run.images[example.image] for example in examples]
        features = np.stack([of_set[row] for of_set, row in found])
        features = torch.from_numpy(features).to(DEVICE)
    return pad(ids, 0).to(DEVICE), features


def make_labels(run, texts):
    """Target texts -> ids [B, T], -100 where padded."""
    return pad([run.encode(text) for text in texts], -100).to(DEVICE)


class Batches:
    """The batch of every step, a function of seed and step alone. A batch holds one task, drawn
    with p ~ (number of training examples)^(1/T) (paper: section 3.2; the rule is borrowed)."""

    def __init__(self, run):
        self.args = run.args
        self.names = list(run.tasks)
        self.examples = [run.splits[name]["train"] for name in self.names]
        counts = np.array([len(examples) for examples in self.examples])
        self.per_epoch = np.ceil(counts / self.args.batch_size).astype(int)
        self.steps = self.args.max_steps or max(1, round(self.args.epochs * self.per_epoch.sum()))

        weights = counts ** (1 / self.args.task_temperature)
        # Other numbers beside the seed keep draws apart: 0 is for tasks, 1 and up for epochs.
        rng = np.random.default_rng([self.args.seed, 0])
        self.task_of_step = rng.choice(len(counts), self.steps, p=weights / weights.sum())
        self.plan = functools.lru_cache(maxsize=len(counts))(self.plan_epoch)

    def plan_epoch(self, task, epoch):
        """-> batches, arrays of example numbers. Each example of the task is in one of them.

        Examples are dealt into pools of 16 batches. Within a pool, a batch holds texts of similar
        length, so that little of it is padding.
        """
        rng = np.random.default_rng([self.args.seed, 1 + task, epoch])
        lengths = [len(example.source) for example in self.examples[task]]
        places = rng.permutation(len(lengths))
        size = self.args.batch_size
        # Sorted by pool, within it by length, then by place: lexsort takes the first key last.
        order = np.lexsort([places, lengths, places // (16 * size)])
        batches = np.split(order, range(size, len(order), size))
        rng.shuffle(batches)
        return batches

    def __call__(self, step):
        """-> name of the task, examples, a target text for each."""
        task = self.task_of_step[step]
        earlier = np.sum(self.task_of_step[:step] == task)
        epoch, position = divmod(earlier, self.per_epoch[task])
        examples = [self.examples[task][i] for i in self.plan(task, epoch)[position]]
        rng = random.Random(f"{self.args.seed} {step}")
        return self.names[task], examples, [draw_target(example, rng) for example in examples]


def draw_target(example, rng):
    """Of several right answers, one is drawn by its weight, as VL-T5 does."""
    if not example.targets:
        return example.target
    texts, weights = zip(*example.targets, strict=True)
    return rng.choices(texts, weights)[0]


# ---- several processes, under torchrun -----------------------------------------------------------

def start_processes():
    """All processes compute the same, except for their part of a batch. The first one prints."""
    if WORLD_SIZE > 1:
        # Were it imported later, its functions would keep the group of processes alive until the
        # end of the program, where a thread of the group can crash.
        import torch.distributed.nn
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The others wait as long as the first one downloads.
        backend = "nccl" if DEVICE == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")


def gather(value):
    """-> the values of all processes."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def wait_for_all():
    gather(None)


def sum_gradients(parameters):
    """Replace every gradient by its sum over the processes, all of which have the same task."""
    if WORLD_SIZE > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)


def write_file(path, content):
    """The first process writes. All wait, because the next step may be to read the file."""
    if RANK == 0:
        data.write_file(path, content)
    wait_for_all()


# ---- evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def generate_outputs(run, task, examples):
    """-> the generated text of every example. The weights of the task are generated once."""
    run.model.eval()
    weights = run.model.generate_weights(task.name)
    order = np.argsort([len(example.source) for example in examples], kind="stable")
    starts = range(EVAL_BATCH_SIZE * RANK, len(order), EVAL_BATCH_SIZE * WORLD_SIZE)
    outputs = {}
    for start in tqdm(starts, f"evaluate {task.name}", leave=False, file=sys.stdout, disable=None):
        chosen = order[start:start + EVAL_BATCH_SIZE]
        input_ids, features = make_inputs(run, [examples[i] for i in chosen])
        ids = run.model.t5.generate(input_ids, max_new_tokens=task.max_answer,
                                    num_beams=task.beams, **run.model.inject(weights, features))
        for i, row in zip(chosen, ids.tolist(), strict=True):
            outputs[i] = run.tokenizer.decode(row)

    for others in gather(outputs):
        outputs |= others
    return [outputs[i] for i in range(len(examples))]


def evaluate(run, splits):
    """Evaluate these splits of every task -> {task: {split: {metric: value}}}."""
    metrics = {}
    for name, task in run.tasks.items():
        metrics[name] = {}
        for split, examples in run.splits[name].items():
            if split in splits:
                outputs = generate_outputs(run, task, examples)
                metrics[name][split] = data.score(task, outputs, examples)
    return metrics


def mean_metric(tasks, metrics, split):
    """-> mean over the metrics of all tasks, 11 on GLUE: HyperFormer selects and reports by it."""
    return float(np.mean([metrics[name][split][metric]
                          for name, task in tasks.items() for metric in task.metrics]))


# ---- checkpoints ---------------------------------------------------------------------------------

def trained_tensors(model):
    return {name: p.detach().cpu().contiguous() for name, p in model.trained().items()}


def save_last(run, optimiser, progress):
    """What a run resumes from. Random states need no saving: they follow from seed and step."""
    buffer = io.BytesIO()
    torch.save({"trained": trained_tensors(run.model), "optimiser": optimiser.state_dict(),
                "progress": progress}, buffer)
    write_file(run.folder / "last.pt", buffer.getbuffer())


def load_last(run, optimiser):
    """-> progress as it was saved. Raises UserError for a damaged file."""
    with reading(run.folder / "last.pt"):
        saved = torch.load(run.folder / "last.pt", map_location=DEVICE, weights_only=True)
        load_trained(run.model, saved["trained"])
        optimiser.load_state_dict(saved["optimiser"])
    return saved["progress"]


def load_best(run):
    """Raises UserError where there is no best checkpoint, and for a damaged one."""
    with reading(run.folder / "best.safetensors"):
        load_trained(run.model, safetensors.torch.load_file(run.folder / "best.safetensors"))


def load_trained(model, tensors):
    """Copy {name: tensor} into the trained parameters. Raises an error unless all of them fit."""
    different = model.trained().keys() ^ tensors.keys()
    if different:
        raise ValueError(f"tensors missing or not expected: {sorted(different)[:3]}")
    model.load_state_dict(tensors, strict=False)


def start_from(run):
    """Initialise with what another run has trained (--init-from). A task that is new starts with
    the parameters of --init-task. Raises UserError for a run of another kind."""
    args, folder = run.args, Path(run.args.init_from)
    saved = read_record(folder)
    backbone = {"backbone": run.record["hashes"]["backbone"]}
    needed = {"config": run.record["config"], "hashes": backbone}
    check_same(saved, needed, f"{folder}/config.json: no run to start from")
    old_tasks = data.find_tasks(saved["settings"]["task"])
    new_tasks = run.tasks.keys() - old_tasks.keys()
    if new_tasks and args.init_task not in old_tasks:
        raise UserError(f"--init-task: found {args.init_task!r}, expected the task whose embedding"
                        f" starts the new ones, of {', '.join(old_tasks)}")

    with reading(folder / "best.safetensors"):
        tensors = safetensors.torch.load_file(folder / "best.safetensors")
        renamed = {}
        for name in run.model.trained():
            # A task's parameters have its name in theirs: task.cb comes from task.mnli.
            words = [args.init_task if word in new_tasks else word for word in name.split(".")]
            renamed[name] = tensors[".".join(words)]
        load_trained(run.model, renamed)


# ---- the training loop ---------------------------------------------------------------------------

def learning_rate(args, step, steps):
    """Linear warm-up, then constant or linear to 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.schedule == "constant":
        return args.lr
    return args.lr * (steps - step) / (steps - args.warmup_steps)


def make_optimiser(model, args):
    """AdamW, with a learning rate of its own for the T5's layer norms [C].

    A step moves them by lr, but a generated weight by up to lr times the sum of |I|, about 50 lr.
    """
    norms, others = [], []
    for name, parameter in model.trained().items():
        is_norm = name.startswith("t5.") and "norm" in name
        (norms if is_norm else others).append(parameter)
    groups = [{"params": norms, "rate": args.norm_rate}, {"params": others, "rate": 1.0}]
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0, fused=True)


def add_gradients(run, task, examples, targets):
    """Forward and backward pass of a batch -> this process's share of the loss.

    The batch is cut into parts. Each process takes --accumulate of them, one after the other.
    """
    lengths = [len(run.encode(target)) for target in targets]
    parts = WORLD_SIZE * run.args.accumulate
    total = 0.0
    for first in range(RANK, parts, WORLD_SIZE):
        mine = slice(first, None, parts)
        # Where there are fewer examples than parts, some part has none. It computes one with share
        # 0, because every process must take part in the sum of the gradients.
        input_ids, features = make_inputs(run, examples[mine] or examples[:1])
        labels = make_labels(run, targets[mine] or targets[:1])
        _, loss = run.model(input_ids, None, labels, task, run.args.label_smoothing, features)
        # The sum over all parts is the mean over the tokens of the whole batch.
        share = sum(lengths[mine]) / sum(lengths)
        loss = share * loss
        loss.backward()
        total += loss.detach()
    return total


def train(run):
    """Each pass of the loop begins after `step` updates. It saves and evaluates if that is due,
    then makes one more update. The last pass only saves and evaluates."""
    args, model = run.args, run.model
    batches = Batches(run)
    eval_every = args.eval_every or batches.per_epoch.sum()
    trained = list(model.trained().values())
    optimiser = make_optimiser(model, args)
    progress = {"step": 0, "best": -math.inf, "log": []}
    if args.resume and (run.folder / "last.pt").exists():
        progress = load_last(run, optimiser)
        print(f"resumed at step {progress['step']} of {batches.steps}")
    elif args.init_from:
        start_from(run)
    gradient_norm = torch.zeros(())

    # No bar where the output is not a terminal.
    steps = range(progress["step"], batches.steps + 1)
    bar = tqdm(steps, initial=progress["step"], total=batches.steps, file=sys.stdout, disable=None)
    for step in bar:
        progress["step"] = step
        is_last = step == batches.steps
        is_due = step > 0 and (step % eval_every == 0 or is_last)

        # Save before the evaluation: a run that is killed in it evaluates again when it resumes.
        if is_due or step % SAVE_EVERY == 0:
            check_finite(run, step, gradient_norm)
            save_last(run, optimiser, progress)
        if is_due:
            score_checkpoint(run, progress)
        if is_last:
            break

        # One step: forward, backward, clip, update.
        task, examples, targets = batches(step)
        model.train()
        # Dropout, too, is a function of seed and step (and process).
        torch.manual_seed((args.seed << 32) + step * WORLD_SIZE + RANK)
        lr = learning_rate(args, step, batches.steps)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["rate"]
        loss = add_gradients(run, task, examples, targets)
        sum_gradients(trained)
        gradient_norm = torch.nn.utils.clip_grad_norm_(trained, GRADIENT_CLIP)
        optimiser.step()
        optimiser.zero_grad()

        if (step + 1) % LOG_EVERY == 0:
            # To read a number is to wait for the device.
            check_finite(run, step + 1, gradient_norm)
            row = {"step": step + 1, "task": task, "loss": sum(gather(loss.item())), "lr": lr,
                   "seconds": time.perf_counter() - run.started}
            progress["log"].append(row)
            bar.set_postfix(loss=row["loss"], best=progress["best"])

    if RANK == 0:
        draw_curves(run.folder / "curves.png", progress["log"])


def score_checkpoint(run, progress):
    """Evaluate on validation, keep the checkpoint if it is the best one, and write the log."""
    metrics = evaluate(run, ["validation"])
    mean = mean_metric(run.tasks, metrics, "validation")
    if mean > progress["best"]:
        progress["best"] = mean
        content = safetensors.torch.save(trained_tensors(run.model))
        write_file(run.folder / "best.safetensors", content)
    row = {"step": progress["step"], "validation": metrics, "validation mean": mean}
    progress["log"].append(row)
    lines = "\n".join(map(json.dumps, progress["log"]))
    write_file(run.folder / "log.jsonl", f"{lines}\n".encode())
    shown = [f"{name} {metric} {metrics[name]['validation'][metric]:.4f}"
             for name, task in run.tasks.items() for metric in task.metrics]
    tqdm.write(f"step {progress['step']}   validation   {'   '.join(shown)}")


def check_finite(run, step, gradient_norm):
    """Raises UserError for a run that diverged."""
    if not gradient_norm.isfinite():
        raise UserError(f"{run.folder}: step {step}: the norm of the gradient is {gradient_norm}:"
                        " the run diverged; start another one with a lower --lr")


# ---- results -------------------------------------------------------------------------------------

def finish(run):
    """Evaluate the best checkpoint on validation and test splits; write metrics.json; print all."""
    load_best(run)
    metrics = evaluate(run, ["validation", "test", "mismatched"])
    mean = {split: mean_metric(run.tasks, metrics, split) for split in ("validation", "test")
            if all(split in by_split for by_split in metrics.values())}
    result = json.dumps({"metrics": metrics, "mean": mean}, indent=1)
    write_file(run.folder / "metrics.json", result.encode())

    print(f"\n{'task':9}{'split':12}{'metric':10}{'value':>8}{'majority':>10}{'examples':>10}")
    for name, task in run.tasks.items():
        for split, values in metrics[name].items():
            examples = run.splits[name][split]
            majority = data.majority(task, run.splits[name]["train"], examples)
            for metric, value in values.items():
                print(f"{name:9}{split:12}{metric:10}{value:8.4f}{majority[metric]:10.4f}"
                      f"{len(examples):10,}")
    for split, value in mean.items() if len(run.tasks) > 1 else ():
        print(f"{'mean':9}{split:22}{value:8.4f}")
    for task in run.tasks.values():
        print_outputs(run, task)


def print_outputs(run, task):
    """Three outputs of a task, beside their labels."""
    split = "test" if "test" in run.splits[task.name] else "validation"
    examples = data.sample_examples(run.splits[task.name][split], 3, run.args.seed)
    print(f"\n{task.name}, three examples of {split}:")
    for example, output in zip(examples, generate_outputs(run, task, examples), strict=True):
        print(f"  {example.source[:200]} {':'.join(example.image or '')}")
        print(f"    output {output!r}, label {example.target!r}")


def draw_curves(path, log):
    """A picture of training loss and mean validation metric, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("loss", "validation mean"), strict=True):
        points = [(row["step"], row[key]) for row in log if key in row]
        axes.plot(*zip(*points, strict=True), marker=".")
        axes.set(xlabel="step", ylabel=key)
    figure.savefig(path, dpi=120)


# ---- using a trained run -------------------------------------------------------------------------

def predict(run):
    """Write the outputs on a split, in the format of each task's evaluation server or program."""
    split = run.args.predict
    for name, task in run.tasks.items():
        if split == "submission":
            files = data.read_submission(task, run.args.data_dir)
            examples = sum(files.values(), [])
            run.images |= open_features(run.args, examples, run.record["image_encoder"])[0]
        elif split in run.splits[name]:
            files = {data.predictions_name(task, split): run.splits[name][split]}
        else:
            raise UserError(f"--predict {split}: {name} has {', '.join(run.splits[name])}")
        for file, examples in files.items():
            outputs = generate_outputs(run, task, examples)
            if RANK == 0:
                unknown = data.write_predictions(run.folder / file, task, outputs, examples)
                print(f"{run.folder / file}: {len(outputs):,} outputs, {unknown} of them no label")


@torch.no_grad()
def ask(run):
    """Print the output for --ask, and the probability of each label of the task."""
    texts = list(run.args.ask)
    name = texts.pop(0) if texts[0] in run.tasks else list(run.tasks)[0]
    task = run.tasks[name]
    # The image comes last, as SET:ID.
    image = tuple(texts.pop().split(":", 1)) if task.is_visual and texts else ()
    if len(texts) != len(task.fields) or len(image) != 2 * task.is_visual:
        raise UserError(f"--ask: {name} takes {'; '.join(task.fields)}"
                        f"{'; image, as SET:ID' * task.is_visual}; found {run.args.ask}")
    example = data.Example(data.source_parts(task, texts), "", None, "", image or None)
    run.images = open_features(run.args, [example], run.record["image_encoder"])[0]

    print(example.source)
    print(generate_outputs(run, task, [example])[0])
    input_ids, features = make_inputs(run, [example])
    for word in task.label_words():
        labels = make_labels(run, [word])
        _, loss = run.model(input_ids, None, labels, name, features=features)
        # The loss is the mean of -log p over the tokens of the word.
        print(f"  {word:20}{math.exp(-loss.item() * labels.numel()):.4f}")


@torch.no_grad()
def export(run):
    """Write DIR/TASK.safetensors for every task without images: its generated weights and the
    layer norms. Nothing of the hypernetworks is left. load_exported is for your own programs."""
    trained = trained_tensors(run.model).items()
    norms = {name: tensor for name, tensor in trained if name.startswith("t5.")}
    metadata = {"backbone": run.record["hashes"]["backbone"]}
    folder = Path(run.args.export)
    folder.mkdir(parents=True, exist_ok=True)
    # As they are generated, not as a bfloat16 run uses them.
    run.model.t5.dtype = torch.float32
    for task in run.tasks.values():
        if task.is_visual:
            print(f"{task.name}: left out, because its weights depend on the image")
            continue
        tensors = dict(norms)
        for (block, layer), weights in run.model.generate_weights(task.name).items():
            for part, tensor in zip(seam_of(block).names, weights, strict=True):
                tensors[f"{block}.{layer}.{part}"] = tensor.cpu().contiguous().clone()
        path = folder / f"{task.name}.safetensors"
        write_file(path, safetensors.torch.save(tensors, metadata))
        print(f"{path}: {count(tensors.values()):,} deployed parameters")


@torch.no_grad()
def load_exported(path, t5):
    """A file that --export wrote, and its T5 as T5.from_pretrained gives it -> sites for T5.forward
    and T5.generate. The T5 gets the trained layer norms. Raises UserError for another T5."""
    with reading(path), safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if (file.metadata() or {}).get("backbone") != hash_backbone(t5):
            raise ValueError("was exported for another T5")
        for name, parameter in t5.named_parameters():
            if f"t5.{name}" in tensors:
                parameter.copy_(tensors.pop(f"t5.{name}"))
        sites = {}
        for block, layer in {tuple(name.split(".")[:2]) for name in tensors}:
            seam = seam_of(block)
            weights = [tensors[f"{block}.{layer}.{part}"].to(t5.dtype) for part in seam.names]
            sites[block, int(layer)] = seam([weights])
    return sites


def table(folders):
    """Folders of finished runs, or of several seeds of a run -> a Markdown table in percent.

    Raises UserError for seeds that differ in more than the seed.
    """
    rows = {}
    for folder in folders:
        first = None
        cells = rows[folder] = defaultdict(list)
        for path in sorted(Path(folder).glob("seed-*")) or [Path(folder)]:
            record = read_record(path)
            # Another seed draws other examples for --max-train-examples.
            del record["settings"]["seed"], record["hashes"]["examples"]
            first = first or record
            check_same(first, record, f"{path}: is no other seed of the same run")
            result = read_json_file(path / "metrics.json")
            for name, by_split in result["metrics"].items():
                split = "test" if "test" in by_split else "validation"
                for metric, value in by_split[split].items():
                    cells[f"{name} {metric}, {split}"].append(value)
            for split, value in result["mean"].items():
                cells[f"mean, {split}"].append(value)

    columns = dict.fromkeys(column for cells in rows.values() for column in cells)
    lines = [["run", *columns], ["---"] * (len(columns) + 1)]
    for folder, cells in rows.items():
        shown = [mean_and_deviation(cells[column]) for column in columns]
        lines.append([folder, *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_deviation(values):
    """Numbers from 0 to 1, one per seed -> their mean and sample standard deviation in percent."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{100 * values[0]:.2f}"
    return f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f} ({len(values)} runs)"


# ---- the command line ----------------------------------------------------------------------------

def run_once(args):
    """One run: train it, or use it."""
    run = load_run(args)
    trained = run.record["trained_parameters"]
    total = count(run.model.t5.parameters())
    print(f"{Path(args.model).name} ({total / 1e6:.1f} M parameters),"
          f" data in {Path(args.data_dir).name}")
    for name, by_split in run.splits.items():
        sizes = [f"{split} {len(examples):,}" for split, examples in by_split.items()]
        print(f"{name}: {', '.join(sizes)}")
    print(f"{args.method}, {args.dtype}, {DEVICE}: {trained:,} trained parameters,"
          f" {trained / total:.1%} of the T5's")

    uses = {ask: args.ask, predict: args.predict, export: args.export}
    if any(uses.values()):
        load_best(run)
        for use, option in uses.items():
            if option:
                use(run)
        return
    if not args.eval_only:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_file(run.folder / "config.json", json.dumps(run.record, indent=1).encode())
        train(run)
    finish(run)
    print(f"\n{run.folder}: {time.perf_counter() - run.started:.0f} s")


def run_seeds(args):
    """One run per seed, and their table."""
    for seed in range(args.seed, args.seed + args.num_seeds):
        own = ["--num-seeds", "0", "--seed", str(seed), "--run", f"{args.run}/seed-{seed}"]
        run_once(read_settings([*sys.argv[1:], *own]))
    print(f"\n{table([args.run])}")


def main():
    args = read_settings(sys.argv[1:])
    start_processes()
    if args.table:
        print(table(args.table))
    elif args.num_seeds:
        run_seeds(args)
    else:
        run_once(args)
    if WORLD_SIZE > 1:
        wait_for_all()
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
