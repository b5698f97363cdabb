"""Train, evaluate and use a HyperPELT.

    python train.py --task rte --model google/flan-t5-small --data-dir glue --download      # train, then evaluate
    python train.py --out runs/rte-hyperpelt --resume                                       # go on after an interruption
    python train.py --out runs/rte-hyperpelt --eval-only                                    # evaluate the best checkpoint
    python train.py --out runs/rte-hyperpelt --predict submission                           # write a GLUE submission file
    python train.py --task vqa --features features --data-dir vl ...                        # images; --task rte,vqa: both kinds

A run's folder (--out) holds config.json (all settings), log.jsonl (a row for every few steps and every evaluation),
metrics.json (the result), last.safetensors (what is trained, optimiser, generators, step: a run resumes from it exactly)
and best.safetensors (what is trained, nothing else). The order of the code: settings, data, evaluation, checkpoints, loop.
"""
import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import data
from data import UserError
from clip_features import load_features
from hyperpelt import METHODS, VISION, HyperPELT, HyperPELTConfig
from t5 import T5, Tokenizer

try:
    import resource
except ImportError:
    resource = None

SIZES = HyperPELTConfig()
GRADIENT_CLIP = 1.0        # largest norm of the whole gradient [C]
MAX_TARGET_LENGTH = 128    # [X: HyperFormer]
LOG_EVERY = 10             # steps
EVAL_BATCH = 64


# -------------------------------------------------------------------------------------------------------- settings

def number(kind, low, high=10**9):
    """-> a converter for argparse that takes low to high, and so no nan."""
    def convert(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    convert.__name__ = f"{kind.__name__} from {low} to {high}"               # argparse puts it into its message
    return convert


OPTIONS = [  # name, type or choices, default, help
    ("task", str, "rte", f"task, several with commas between, glue for the paper's eight, or vl for vqa, gqa and caption [R]: {', '.join([*data.TASKS, *data.IMAGE_TASKS])}"),
    ("model", str, "t5-base", "folder of a T5 checkpoint, or a public name, which is downloaded"),
    ("data-dir", str, "glue", "folder with RTE/train.tsv or glue/RTE/train.tsv"),
    ("features", str, "", "folder with the images' features as clip_features.py writes them: train2014.npy, train2014.json, ... (default: none)"),
    ("vision", [*VISION, "shuffled"], "both", "what an image gives: visual prefix and adapter, one of them, or tokens before the text; shuffled: both, of another image"),
    ("method", list(METHODS), "hyperpelt", "hyperprefix: no adapters; hyperadapter: no prefixes; norms: neither; full: fine-tune all"),
    ("out", str, "", "folder of the run (default: runs/TASK-METHOD)"),
    ("split", ["paper", "official"], "paper", "paper: validation halved, or 1,000 training rows held out; official: as the files are"),
    ("steps", number(int, 1), 0, "training steps (default: what --epochs gives)"),
    ("epochs", number(float, 0.001), 6.0, "passes over the training rows"),
    ("batch-size", number(int, 1), 32, "rows of a step"),
    ("lr", number(float, 0), 2e-3, "learning rate of AdamW, without weight decay [C; the paper's: 1e-3, R]"),
    ("schedule", ["constant", "linear"], "linear", "after the warm-up: constant, or linear to 0"),
    ("warmup-steps", number(int, 0), 10, "steps in which the learning rate rises from 0"),
    ("label-smoothing", number(float, 0, 0.99), 0.0, "share of the target's probability spread over the vocabulary [C; X: 0.1]"),
    ("temperature", number(float, 1), 2.0, "T of several tasks' sampling, p ~ rows^(1/T) [R]"),
    ("max-source-length", number(int, 8), 128, "tokens; the longest field of a longer text is cut [X: HyperFormer]"),
    ("prefix-length", number(int, 1), SIZES.prefix_length, "N, rows of a generated prefix"),
    ("bottleneck", number(int, 1), SIZES.bottleneck, "R, width of a generated adapter"),
    ("embedding-dim", number(int, 1), SIZES.embedding_dim, "width of the task, layer and block embeddings"),
    ("hyper-dim", number(int, 1), SIZES.hyper_dim, "width of a hyper-embedding"),
    ("seed", number(int, 0, 2**31), 0, "of initial weights, dropout and the order of the rows"),
    ("precision", ["auto", "fp32", "bf16"], "auto", "bf16: frozen weights and activations in bfloat16; auto: where the machine is fast at it"),
    ("eval-every", number(int, 1), 0, "steps between evaluations on validation (default: an epoch, or with --steps an eighth of them)"),
]
FLAGS = [("download", "fetch the official data files if they are not there"), ("resume", "go on with the run in --out"),
         ("eval-only", "evaluate best.safetensors of the run in --out")]
FREE = ("out", "data_dir", "model", "features", "download", "resume", "eval_only", "predict")  # may differ from the saved run's settings:
# the contents of backbone and data are compared instead


def parse_settings():
    """Command line -> settings (Namespace). For a run that exists they are the saved ones; another value is refused."""
    parser = data.Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for name, kind, default, text in OPTIONS:
        kind = dict(choices=kind) if isinstance(kind, list) else dict(type=kind, metavar=name.upper())
        parser.add_argument(f"--{name}", **kind, help=text if "default:" in text else f"{text} (default: {default})")
    for name, text in FLAGS:
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--image-tokens", dest="vision", action="store_const", const="tokens", help="short for --vision tokens")
    parser.add_argument("--predict", metavar="SPLIT", choices=["validation", "test", "submission"],
                        help="write the answers of best.safetensors on a split as a GLUE submission file")
    given = vars(parser.parse_args())
    if given.get("precision", "auto") == "auto":
        given.pop("precision", None)                                         # nothing that could differ from a saved run
    settings = {**{name.replace("-", "_"): default for name, _, default, _ in OPTIONS},
                **dict(download=False, resume=False, eval_only=False, predict=""), **given}
    out = Path(settings["out"] or f"runs/{settings['task'].replace(',', '-')}-{settings['method']}")
    if settings["resume"] or settings["eval_only"] or settings["predict"]:
        saved = data.read_json(out / "config.json", "settings")["settings"]
        for name in (name for name in settings if name not in FREE and type(saved.get(name)) is not type(settings[name])):
            raise UserError(f"{out}/config.json: settings: {name}: found {saved.get(name)!r}, expected {type(settings[name]).__name__}")
        differences = [f"--{k.replace('_', '-')} was {saved.get(k)}, is {v}" for k, v in given.items() if k not in FREE and saved.get(k) != v]
        if differences:
            raise UserError(f"{out}/config.json: the run has other settings: {'; '.join(differences)}")
        settings.update({k: v for k, v in saved.items() if k not in given})
    elif any((out / name).exists() for name in ("config.json", "last.safetensors", "best.safetensors")):
        raise UserError(f"{out}: holds a run already; go on with it by --resume, or choose another --out")
    settings["out"] = str(out)
    if settings["precision"] == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
        settings["precision"] = "bf16" if fast else "fp32"
    return argparse.Namespace(**settings)


# ------------------------------------------------------------------------------------------------------------ data

def load_tasks(settings, tokenizer):
    """-> {task name: Task or ImageTask}, {name: {split: [Example]}}, {name: {split: [Row]}}; ids are made once."""
    names = {"glue": data.GLUE, "vl": data.VL}.get(settings.task) or settings.task.split(",")
    tasks = {name: data.find_task(name) for name in names}
    splits, rows = {}, {}
    for name, task in tasks.items():
        if settings.download:
            data.download_task(task, settings.data_dir)
        splits[name] = data.make_splits(task, settings.data_dir, settings.split)
        rows[name] = {split: encode(examples, tokenizer, settings) for split, examples in splits[name].items()}
    return tasks, splits, rows


def encode(examples, tokenizer, settings):
    return data.encode_examples(examples, tokenizer.encode, settings.max_source_length, MAX_TARGET_LENGTH)


def load_images(settings, splits, rows):
    """Give every row of an image task its place in the feature files -> width V of the features (0: no image task), fingerprint.

    Raises UserError for a missing or damaged file, features of unlike models, a grid that does not fit, a question without features.
    """
    wanted = sorted({example.image[0] for by_split in splits.values() for examples in by_split.values() for example in examples if example.image})
    if not wanted:
        return 0, {}
    if not settings.features:
        raise UserError(f"--features: found nothing, expected the folder with {', '.join(f'{name}.npy' for name in wanted)}; clip_features.py makes them")
    found = {name: load_features(Path(settings.features) / f"{name}.npy") for name in wanted}
    arrays, ids, kinds = {}, {}, {}
    for name, (array, places, meta) in found.items():
        path = Path(settings.features) / f"{name}.npy"
        arrays[name], ids[name] = array, places
        kinds[name] = f"{list(array.shape[1:])} of {meta.get('kind')}, weights {meta.get('weights')}, {meta.get('preprocessing')}"
        if kinds[name] != kinds[wanted[0]]:
            raise UserError(f"{path}: found features {kinds[name]}; expected {kinds[wanted[0]]}, as in {wanted[0]}.npy")
        if settings.vision != "tokens" and array.shape[1] != settings.prefix_length:     # eq. (7): position by position [R]
            raise UserError(f"{path}: found {array.shape[1]} grid cells for each image, expected {settings.prefix_length}, one for each of --prefix-length positions")
    for task, by_split in splits.items():
        for split, examples in by_split.items():
            if examples and examples[0].image:
                order = data.join_features(examples, ids, f"{task} {split}", settings.features)
                places = [(arrays[example.image[0]], int(row)) for example, row in zip(examples, order)]
                if settings.vision == "shuffled":                            # answers from the question alone: what a prior can do
                    places = [places[i] for i in np.random.default_rng([settings.seed, len(places)]).permutation(len(places))]
                for row, place in zip(rows[task][split], places):
                    row.image = place
    return arrays[wanted[0]].shape[2], {"features": hashlib.sha256("".join(str(found[name][2].get("sha256")) for name in wanted).encode()).hexdigest()[:16]}


def gather_images(rows):
    """Rows of an image task -> their features [B, N, V], float16; of a text task -> None."""
    return torch.from_numpy(np.stack([array[i] for array, i in (row.image for row in rows)])) if rows[0].image else None


def make_batches(rows, settings):
    """-> number of steps, and batch(step) -> task name, input ids [B, S], labels [B, T], features [B, N, V] or None. A function
    of seed and step alone, so that a resumed run sees what the uninterrupted one would have seen."""
    rows = {name: by_split["train"] for name, by_split in rows.items()}
    names, size = list(rows), settings.batch_size
    per_epoch = {name: -(-len(rows[name]) // size) for name in names}
    steps = settings.steps or max(1, round(settings.epochs * sum(per_epoch.values())))
    share = np.array([len(rows[name]) for name in names]) ** (1 / settings.temperature)
    turns = np.random.default_rng([settings.seed, 0]).choice(len(names), size=steps, p=share / share.sum())  # task of each step
    lengths = {name: np.array([len(row.source) for row in rows[name]]) for name in names}

    @lru_cache(maxsize=len(names))
    def plan(turn, epoch):
        return data.plan_epoch(lengths[names[turn]], size, [settings.seed, 1 + turn, epoch])

    def batch(step):
        turn = turns[step]
        epoch, place = divmod(int(np.sum(turns[:step] == turn)), per_epoch[names[turn]])
        chosen = [rows[names[turn]][i] for i in plan(int(turn), epoch)[place]]
        draws = np.random.default_rng([settings.seed, 2**20, step]).random(len(chosen))  # which of its answers each row is to learn
        targets = [row.target(draw) for row, draw in zip(chosen, draws)]
        return names[turn], *map(torch.from_numpy, (data.pad([row.source for row in chosen], 0), data.pad(targets, -100))), gather_images(chosen)

    return steps, batch


def fingerprint(t5, rows):
    """Hashes of the backbone (config and the start of every tensor) and of the data's ids, to compare on --resume."""
    backbone, texts = hashlib.sha256(repr(t5.config).encode()), hashlib.sha256()
    for tensor in t5.state_dict().values():
        backbone.update(tensor.flatten()[:256].float().numpy().tobytes())
    for name, by_split in rows.items():
        for split, examples in by_split.items():
            texts.update(b"".join([f"{name} {split}".encode(), *(ids.tobytes() for row in examples for ids in (row.source, *row.targets))]))
    return {"backbone": backbone.hexdigest()[:16], "data": texts.hexdigest()[:16]}


# ------------------------------------------------------------------------------------------------------ evaluation

def answer(model, tokenizer, task, rows, stop):
    """Rows -> answers as texts, or None when the user stops it. The task's generated weights are made once."""
    model.eval()
    device = next(model.parameters()).device
    # An answer that has not ended one token after the longest label word is none of them: longer ones are not asked for.
    words = list(task.labels.values()) or [data.stsb_target(i / 5) for i in range(26)]
    longest, beams = max(len(tokenizer.encode(word)) for word in words), 1
    if task.name in data.IMAGE_TASKS and not task.labels:                    # answers in free words
        longest, beams = task.max_answer, task.beams
    order, texts = np.argsort([len(row.source) for row in rows], kind="stable"), [""] * len(rows)
    with torch.no_grad():
        sites = model.generate_sites(task.name)
        for start in tqdm(range(0, len(order), EVAL_BATCH), desc=f"evaluate {task.name}", leave=False, disable=None):
            if stop:
                return None
            chosen = order[start:start + EVAL_BATCH]
            ids, features = torch.from_numpy(data.pad([rows[i].source for i in chosen], 0)).to(device), gather_images([rows[i] for i in chosen])
            injected = model.inject(sites, None if features is None else features.to(device))
            outputs = model.t5.generate(ids, max_new_tokens=longest, num_beams=beams, **injected)
            for i, output in zip(chosen, outputs):
                texts[i] = tokenizer.decode(output.tolist())
    return texts


def evaluate(model, tokenizer, tasks, splits, rows, names, stop):
    """-> {task: {split: {metric: value}}} on the named splits, or None when the user stops it."""
    result = {}
    for task in tasks.values():
        for split in (name for name in splits[task.name] if name in names):
            texts = answer(model, tokenizer, task, rows[task.name][split], stop)
            if texts is None:
                return None
            result.setdefault(task.name, {})[split] = data.score(task, texts, splits[task.name][split])
    return result


def show(result):
    return "   ".join(f"{task} {split} " + " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
                      for task, by_split in result.items() for split, metrics in by_split.items())


# ----------------------------------------------------------------------------------------------------- checkpoints

def save_tensors(path, tensors, metadata):
    """safetensors, written aside and renamed: the previous file stays until the new one is whole."""
    # One key of metadata: with several, safetensors writes them in an order that differs from run to run.
    data.write_whole(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"hyperpelt": json.dumps(metadata)}))


def load_tensors(path, expected, keys):
    """-> tensors, metadata. Raises UserError unless the file holds exactly the expected names, shapes, types and keys."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            for name in sorted(shapes.keys() ^ expected.keys()):
                raise UserError(f"{path}: tensor {name} is {'unknown' if name in shapes else 'missing'}")
            for name, shape in shapes.items():
                if shape != tuple(expected[name].shape):
                    raise UserError(f"{path}: tensor {name} has shape {shape}, expected {tuple(expected[name].shape)}")
            tensors, metadata = {name: file.get_tensor(name) for name in shapes}, json.loads((file.metadata() or {})["hyperpelt"])
            for name, tensor in tensors.items():
                if tensor.dtype != expected[name].dtype:
                    raise UserError(f"{path}: tensor {name} is {tensor.dtype}, expected {expected[name].dtype}")
            if not isinstance(metadata, dict) or any(type(metadata.get(key)) is not kind for key, kind in keys.items()):
                raise ValueError
            return tensors, metadata
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected a checkpoint of this run") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    except (KeyError, ValueError):
        raise UserError(f"{path}: metadata: expected a key hyperpelt with {', '.join(keys)} as JSON") from None


def training_state(model, optimiser):
    """All tensors of last.safetensors. The optimiser's and the model's own are views: to load is to copy into them."""
    tensors = {}
    for name, parameter in model.trained().items():
        state = optimiser.state[parameter]
        if not state:
            state.update(step=torch.zeros((), device=parameter.device), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        tensors.update({f"trained.{name}": parameter, **{f"{part}.{name}": state[part] for part in ("step", "exp_avg", "exp_avg_sq")}})
    tensors["generator.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["generator.cuda"] = torch.cuda.get_rng_state()
    return tensors


def save_last(path, model, optimiser, progress):
    save_tensors(path, training_state(model, optimiser), progress)


@torch.no_grad()
def load_last(path, model, optimiser):
    """-> progress, as it was saved; everything else goes back to where it was."""
    tensors = training_state(model, optimiser)
    found, progress = load_tensors(path, tensors, dict(step=int, evaluated=int, best_step=int, best=float))
    for name, tensor in tensors.items():
        tensor.copy_(found[name])
    try:
        torch.set_rng_state(found["generator.cpu"])
        if "generator.cuda" in found:
            torch.cuda.set_rng_state(found["generator.cuda"])
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


# ------------------------------------------------------------------------------------------------------------ loop

def read_log(path, last_step):
    """-> the lines of log.jsonl up to a step; a crash may have left a torn line at the end."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] > last_step:
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


def train(model, tokenizer, tasks, splits, rows, settings, stop):
    """The loop: evaluate and save when it is time, stop when asked, else one step."""
    out = Path(settings.out)
    steps, batch = make_batches(rows, settings)
    eval_every = settings.eval_every or max(1, round(steps / settings.epochs) if not settings.steps else steps // 8)
    parameters, device = list(model.trained().values()), next(model.parameters()).device
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=True)
    progress = dict(step=0, evaluated=0, best_step=0, best=-2.0)             # metrics are at least -1
    log_path = out / "log.jsonl"
    if settings.resume:
        progress = load_last(out / "last.safetensors", model, optimiser)
        data.write_whole(log_path, "".join(line + "\n" for line in read_log(log_path, progress["step"])).encode())
        print(f"resumed at step {progress['step']} of {steps}")
    else:
        save_last(out / "last.safetensors", model, optimiser, progress)      # from here on there is something to resume
    bar = tqdm(total=steps, initial=progress["step"], unit="step", disable=None)
    log = open(log_path, "a", buffering=1)
    examples, since = 0, time.perf_counter()
    while True:
        step = progress["step"]
        if step > progress["evaluated"] and (step % eval_every == 0 or step == steps):
            result = evaluate(model, tokenizer, tasks, splits, rows, ["validation"], stop)
            if result is not None:
                mean = float(np.mean([np.mean([by_split["validation"][metric] for metric in tasks[name].metrics]) for name, by_split in result.items()]))
                if mean > progress["best"]:
                    progress.update(best=mean, best_step=step)
                    save_tensors(out / "best.safetensors", model.trained(), dict(step=step))
                progress["evaluated"] = step
                log.write(json.dumps(dict(step=step, validation=result, mean=mean)) + "\n")
                tqdm.write(f"step {step} of {steps}   {show(result)}")
                save_last(out / "last.safetensors", model, optimiser, progress)
            examples, since = 0, time.perf_counter()
        if stop:
            save_last(out / "last.safetensors", model, optimiser, progress)
            bar.close()
            data.leave(f"stopped at step {step}; go on with: python train.py --out {out} --resume", 128 + stop[0])
        if step == steps:
            break
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, settings)
        name, *tensors = batch(step)
        input_ids, labels, features = (None if tensor is None else tensor.to(device) for tensor in tensors)
        _, loss = model(input_ids, input_ids != 0, labels, name, settings.label_smoothing, features)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        if not torch.isfinite(norm):
            raise UserError(f"step {step + 1}, task {name}: loss {loss.item()}, gradient norm {norm.item()}: the run diverged; "
                            f"the last good checkpoint stays in {out}; start again in another --out with a lower --lr or a longer warm-up")
        optimiser.step()
        optimiser.zero_grad()
        progress["step"] += 1
        bar.update()
        examples += len(input_ids)
        if progress["step"] % LOG_EVERY == 0:
            rate = examples / (time.perf_counter() - since)
            row = dict(step=progress["step"], task=name, loss=round(loss.item(), 5), lr=optimiser.param_groups[0]["lr"],
                       examples_per_s=round(rate, 1), peak_memory_mb=peak_memory_mb())
            log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {rate:.0f} examples/s, {row['peak_memory_mb']} MB, best {max(progress['best'], 0):.3f}")
            examples, since = 0, time.perf_counter()
    bar.close()


def main():
    settings = parse_settings()
    out = Path(settings.out)
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_pretrained(settings.model)
    tasks, splits, rows = load_tasks(settings, tokenizer)
    t5 = T5.from_pretrained(settings.model)
    if tokenizer.first_sentinel >= t5.config.vocab_size:
        raise UserError(f"{settings.model}: spiece.model and sentinels give {tokenizer.first_sentinel + 1} ids, config.json says vocab_size {t5.config.vocab_size}")
    width, feature_mark = load_images(settings, splits, rows)
    marks = {**fingerprint(t5, rows), **feature_mark, "device": device.type}
    sizes = {f.name: getattr(settings, f.name) for f in dataclasses.fields(HyperPELTConfig) if hasattr(settings, f.name)}
    sizes.update(visual_width=width, vision="both" if settings.vision == "shuffled" else settings.vision)
    model = HyperPELT(t5, list(tasks), HyperPELTConfig(**sizes), torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    model.to(device)
    count = sum(parameter.numel() for parameter in model.trained().values())
    if settings.resume or settings.eval_only or settings.predict:
        saved = data.read_json(out / "config.json", "fingerprints")["fingerprints"]
        for what in marks:
            if saved.get(what) != marks[what] and (what != "device" or settings.resume):
                raise UserError(f"{out}/config.json: the run had another {what}: found {marks[what]}, expected {saved.get(what)}")
    else:
        out.mkdir(parents=True, exist_ok=True)
        record = dict(settings={k: v for k, v in vars(settings).items() if k not in FREE[4:]},
                      fingerprints=marks, trained_parameters=count, hyperpelt=dataclasses.asdict(model.config), torch=torch.__version__)
        data.write_whole(out / "config.json", json.dumps(record, indent=1).encode() + b"\n")
    print(f"{settings.method} on {settings.model}, {settings.precision}, {device.type}: {count:,} trained parameters; "
          + "; ".join(f"{name} " + " / ".join(f"{split} {len(examples):,}" for split, examples in by_split.items())
                      for name, by_split in splits.items()))
    if settings.predict:
        load_best(out / "best.safetensors", model)
        return predict(model, tokenizer, tasks, splits, rows, settings)
    stop = data.catch_signals()
    if not settings.eval_only:
        train(model, tokenizer, tasks, splits, rows, settings, stop)
    best_step = load_best(out / "best.safetensors", model)
    result = evaluate(model, tokenizer, tasks, splits, rows, ["validation", "test", "mismatched"], stop)
    if result is None:
        data.leave(f"stopped; evaluate with: python train.py --out {out} --eval-only", 128 + stop[0])
    data.write_whole(out / "metrics.json", json.dumps(dict(best_step=best_step, **result), indent=1).encode() + b"\n")
    print(f"best step {best_step}:   {show(result)}\nsaved in {out}")


def predict(model, tokenizer, tasks, splits, rows, settings):
    """Write a GLUE submission file for a split of every task (mnli: one for each genre set), or an image task's results file."""
    for task in tasks.values():
        if settings.predict != "submission" and settings.predict not in splits[task.name]:
            raise UserError(f"--predict {settings.predict}: with --split official there are only {', '.join(splits[task.name])} and submission")
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
            unknown = (data.write_results if visual else data.write_submission)(path, task, texts, examples)
            print(f"{path}: {len(examples):,} predictions" + (f"; {unknown} answers were no label" if unknown else ""))


if __name__ == "__main__":
    data.run(main)
