"""Train, evaluate and use a HyperPELT.

    python train.py --task rte --model google/flan-t5-small --data-dir glue --download      # train, then evaluate
    python train.py --out runs/rte-hyperpelt --resume                                       # go on after an interruption
    python train.py --out runs/rte-hyperpelt --eval-only                                    # evaluate the best checkpoint
    python train.py --out runs/rte-hyperpelt --predict submission                           # write a GLUE submission file

A run's folder (--out) holds config.json (all settings), log.jsonl (a row for every few steps and every evaluation),
metrics.json (the result), last.safetensors (what is trained, optimiser, generators, step: a run resumes from it exactly)
and best.safetensors (what is trained, nothing else). The order of the code: settings, data, evaluation, checkpoints, loop.
"""
import argparse
import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
from data import UserError
from hyperpelt import METHODS, HyperPELT, HyperPELTConfig
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

def at_least(kind, low):
    def number(text):
        if kind(text) < low:
            raise ValueError
        return kind(text)
    number.__name__ = f"{kind.__name__} of at least {low}"
    return number


OPTIONS = [  # name, type or choices, default, help
    ("task", str, "rte", f"task, several with commas between, or glue for the paper's eight: {', '.join(data.TASKS)}"),
    ("model", str, "t5-base", "folder of a T5 checkpoint, or a public name, which is downloaded"),
    ("data-dir", str, "glue", "folder with RTE/train.tsv or glue/RTE/train.tsv"),
    ("method", list(METHODS), "hyperpelt", "hyperprefix: no adapters; hyperadapter: no prefixes; norms: neither; full: fine-tune all"),
    ("out", str, "", "folder of the run (default: runs/TASK-METHOD)"),
    ("split", ["paper", "official"], "paper", "paper: validation halved, or 1,000 training rows held out; official: as the files are"),
    ("steps", at_least(int, 1), 0, "training steps (default: what --epochs gives)"),
    ("epochs", at_least(float, 0), 6.0, "passes over the training rows"),
    ("batch-size", at_least(int, 1), 32, "rows of a step"),
    ("lr", at_least(float, 0), 2e-3, "learning rate of AdamW, without weight decay"),
    ("schedule", ["constant", "linear"], "constant", "after the warm-up: constant, or linear to 0"),
    ("warmup-steps", at_least(int, 0), 10, "steps in which the learning rate rises from 0"),
    ("label-smoothing", at_least(float, 0), 0.0, "share of the target's probability that is spread over the vocabulary"),
    ("temperature", at_least(float, 1), 2.0, "T of several tasks' sampling, p ~ rows^(1/T)"),
    ("max-source-length", at_least(int, 8), 128, "tokens; the longest field of a longer text is cut"),
    ("prefix-length", at_least(int, 1), SIZES.prefix_length, "N, rows of a generated prefix"),
    ("bottleneck", at_least(int, 1), SIZES.bottleneck, "R, width of a generated adapter"),
    ("embedding-dim", at_least(int, 1), SIZES.embedding_dim, "width of the task, layer and block embeddings"),
    ("hyper-dim", at_least(int, 1), SIZES.hyper_dim, "width of a hyper-embedding"),
    ("seed", at_least(int, 0), 0, "of initial weights, dropout and the order of the rows"),
    ("precision", ["auto", "fp32", "bf16"], "auto", "bf16: frozen weights and activations in bfloat16; auto: where the machine is fast at it"),
    ("eval-every", at_least(int, 1), 0, "steps between evaluations on validation (default: once an epoch)"),
]
FLAGS = [("download", "fetch the official data files if they are not there"), ("resume", "go on with the run in --out"),
         ("eval-only", "evaluate best.safetensors of the run in --out")]
FREE = {"out", "data_dir", "model", "predict", "download", "resume", "eval_only"}  # may differ from the saved run's; the
# backbone's and the data's contents are compared by fingerprint instead


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse_settings():
    """Command line -> settings (Namespace). For a run that exists they are the saved ones; another value is refused."""
    parser = Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for name, kind, default, text in OPTIONS:
        kind = dict(choices=kind) if isinstance(kind, list) else dict(type=kind, metavar=name.upper())
        parser.add_argument(f"--{name}", **kind, help=text if "default:" in text else f"{text} (default: {default})")
    for name, text in FLAGS:
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--predict", metavar="SPLIT", choices=["validation", "test", "submission"],
                        help="write the answers of best.safetensors on a split as a GLUE submission file")
    given = vars(parser.parse_args())
    settings = {**{name.replace("-", "_"): default for name, _, default, _ in OPTIONS},
                **dict(download=False, resume=False, eval_only=False, predict=""), **given}
    out = Path(settings["out"] or f"runs/{settings['task'].replace(',', '-')}-{settings['method']}")
    if settings["resume"] or settings["eval_only"] or settings["predict"]:
        saved = data.read_json(out / "config.json").get("settings", {})
        differences = [f"--{k.replace('_', '-')} was {saved.get(k)}, is {v}" for k, v in given.items() if k not in FREE and saved.get(k) != v]
        if differences:
            raise UserError(f"{out}/config.json: the run has other settings: {'; '.join(differences)}")
        settings.update({k: v for k, v in saved.items() if k not in given})
    elif any((out / name).exists() for name in ("config.json", "last.safetensors", "best.safetensors")):
        raise UserError(f"{out}: holds a run already; go on with it by --resume, or choose another --out")
    settings["out"] = str(out)
    if settings["precision"] == "auto":
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported() or torch.cpu._is_avx512_bf16_supported()
        settings["precision"] = "bf16" if fast else "fp32"
    return argparse.Namespace(**settings)


# ------------------------------------------------------------------------------------------------------------ data

def load_tasks(settings, tokenizer):
    """-> {task name: Task}, {name: {split: [Example]}}, {name: [(source ids, target ids)] of the training rows}."""
    names = data.GLUE if settings.task == "glue" else settings.task.split(",")
    tasks = {name: data.find_task(name) for name in names}
    splits, rows = {}, {}
    for name, task in tasks.items():
        if settings.download:
            data.download_task(task, settings.data_dir)
        splits[name] = data.make_splits(task, settings.data_dir, settings.split)
        rows[name] = data.encode_examples(splits[name]["train"], tokenizer.encode, settings.max_source_length, MAX_TARGET_LENGTH)
    return tasks, splits, rows


def make_batches(rows, settings):
    """-> number of steps, and batch(step) -> task name, input ids [B, S], labels [B, T]. A function of seed and step
    alone, so that a resumed run sees what the uninterrupted one would have seen."""
    names, size = list(rows), settings.batch_size
    per_epoch = {name: -(-len(rows[name]) // size) for name in names}
    steps = settings.steps or max(1, round(settings.epochs * sum(per_epoch.values())))
    share = np.array([len(rows[name]) for name in names]) ** (1 / settings.temperature)
    turns = np.random.default_rng([settings.seed, 0]).choice(len(names), size=steps, p=share / share.sum())  # task of each step
    lengths = {name: np.array([len(source) for source, _ in rows[name]]) for name in names}

    @lru_cache(maxsize=len(names))
    def plan(turn, epoch):
        return data.plan_epoch(lengths[names[turn]], size, [settings.seed, 1 + turn, epoch])

    def batch(step):
        turn = turns[step]
        epoch, place = divmod(int(np.sum(turns[:step] == turn)), per_epoch[names[turn]])
        chosen = [rows[names[turn]][i] for i in plan(int(turn), epoch)[place]]
        return names[turn], *(torch.from_numpy(data.pad(part, value)) for part, value in zip(zip(*chosen), (0, -100)))

    return steps, batch


def fingerprint(t5, rows):
    """Hashes of the backbone (config and the start of every tensor) and of the training data, to compare on --resume."""
    backbone, texts = hashlib.sha256(repr(t5.config).encode()), hashlib.sha256()
    for tensor in t5.state_dict().values():
        backbone.update(tensor.flatten()[:256].float().numpy().tobytes())
    for name, pairs in rows.items():
        texts.update(b"".join([name.encode(), *(ids.tobytes() for pair in pairs for ids in pair)]))
    return {"backbone": backbone.hexdigest()[:16], "training data": texts.hexdigest()[:16]}


# ------------------------------------------------------------------------------------------------------ evaluation

def answer(model, tokenizer, task, examples, settings, stop):
    """Greedy answers -> list of texts, or None when the user stops it. The generated weights are made once."""
    model.eval()
    device = next(model.parameters()).device
    # An answer that has not ended one token after the longest label word is none of them: longer ones are not asked for.
    words = list(task.labels.values()) or [data.stsb_target(i / 5) for i in range(26)]
    longest = max(len(tokenizer.encode(word)) for word in words)
    sources = [data.encode_source(e.parts, tokenizer.encode, settings.max_source_length) for e in examples]
    order, texts = np.argsort([len(ids) for ids in sources], kind="stable"), [""] * len(sources)
    with torch.no_grad():
        sites = model.sites(task.name)
        for start in tqdm(range(0, len(order), EVAL_BATCH), desc=f"evaluate {task.name}", leave=False, disable=None):
            if stop:
                return None
            chosen = order[start:start + EVAL_BATCH]
            ids = torch.from_numpy(data.pad([sources[i] for i in chosen], 0)).to(device)
            for i, output in zip(chosen, model.t5.generate(ids, max_new_tokens=longest, sites=sites)):
                texts[i] = tokenizer.decode(output.tolist())
    return texts


def evaluate(model, tokenizer, tasks, splits, names, settings, stop):
    """-> {task: {split: {metric: value}}} on the named splits, or None when the user stops it."""
    result = {}
    for task in tasks.values():
        for split in (name for name in splits[task.name] if name in names):
            texts = answer(model, tokenizer, task, splits[task.name][split], settings, stop)
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
    aside = f"{path}.tmp"
    # One key of metadata: with several, safetensors writes them in an order that differs from run to run.
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside, {"hyperpelt": json.dumps(metadata)})
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_tensors(path, expected):
    """-> tensors, metadata. Raises UserError unless the file holds exactly the expected names and shapes."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            for name in sorted(shapes.keys() ^ expected.keys()):
                raise UserError(f"{path}: tensor {name} is {'unknown' if name in shapes else 'missing'}")
            for name, shape in shapes.items():
                if shape != tuple(expected[name].shape):
                    raise UserError(f"{path}: tensor {name} has shape {shape}, expected {tuple(expected[name].shape)}")
            return {name: file.get_tensor(name) for name in shapes}, json.loads((file.metadata() or {}).get("hyperpelt", "{}"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected a checkpoint of this run") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def training_state(model, optimiser):
    """All tensors of last.safetensors. The optimiser's and the model's own are views: to load is to copy into them."""
    tensors = {}
    for name, parameter in model.trained().items():
        state = optimiser.state[parameter]
        if not state:
            state.update(step=torch.zeros((), device=parameter.device), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        tensors.update({f"trained.{name}": parameter, f"exp_avg.{name}": state["exp_avg"], f"exp_avg_sq.{name}": state["exp_avg_sq"]})
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
    found, metadata = load_tensors(path, tensors)
    if set(metadata) != {"step", "evaluated", "best_step", "best"}:
        raise UserError(f"{path}: metadata: found {', '.join(metadata) or 'nothing'}, expected step, evaluated, best_step and best")
    for name, tensor in tensors.items():
        tensor.copy_(found[name])
    for state in optimiser.state.values():
        state["step"].fill_(metadata["step"])
    torch.set_rng_state(found["generator.cpu"])
    if "generator.cuda" in found:
        torch.cuda.set_rng_state(found["generator.cuda"])
    return metadata


@torch.no_grad()
def load_best(path, model):
    found, _ = load_tensors(path, model.trained())
    for name, parameter in model.trained().items():
        parameter.copy_(found[name])


# ------------------------------------------------------------------------------------------------------------ loop

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
        lines = log_path.read_text().splitlines() if log_path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= progress["step"]]
        data.write_whole(log_path, "".join(line + "\n" for line in kept).encode())
        print(f"resumed at step {progress['step']} of {steps}")
    bar = tqdm(total=steps, initial=progress["step"], unit="step", disable=None)
    log = open(log_path, "a", buffering=1)
    losses, examples, since = [], 0, time.perf_counter()
    while True:
        step = progress["step"]
        if step > progress["evaluated"] and (step % eval_every == 0 or step == steps):
            result = evaluate(model, tokenizer, tasks, splits, ["validation"], settings, stop)
            if result is not None:
                mean = float(np.mean([np.mean(list(by_split["validation"].values())) for by_split in result.values()]))
                if mean > progress["best"]:
                    progress.update(best=mean, best_step=step)
                    save_tensors(out / "best.safetensors", model.trained(), dict(step=step))
                progress["evaluated"] = step
                log.write(json.dumps(dict(step=step, validation=result, mean=mean)) + "\n")
                tqdm.write(f"step {step} of {steps}   {show(result)}")
                save_last(out / "last.safetensors", model, optimiser, progress)
            since = time.perf_counter()
        if stop:
            save_last(out / "last.safetensors", model, optimiser, progress)
            bar.close()
            sys.exit(print(f"stopped at step {step}; go on with: python train.py --out {out} --resume", file=sys.stderr) or 128 + stop[0])
        if step == steps:
            break
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, settings)
        name, input_ids, labels = batch(step)
        input_ids, labels = input_ids.to(device), labels.to(device)
        _, loss = model(input_ids, input_ids != 0, labels, name, settings.label_smoothing)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        if not torch.isfinite(norm):
            raise UserError(f"step {step + 1}, task {name}: loss {loss.item()}, gradient norm {norm.item()}: the run diverged; "
                            f"the last good checkpoint is in {out}; a lower --lr or a longer --warmup-steps may help")
        optimiser.step()
        optimiser.zero_grad()
        progress["step"] += 1
        bar.update()
        losses, examples = losses + [loss.item()], examples + len(input_ids)
        if progress["step"] % LOG_EVERY == 0:
            rate = examples / (time.perf_counter() - since)
            row = dict(step=progress["step"], task=name, loss=round(float(np.mean(losses)), 5), lr=optimiser.param_groups[0]["lr"],
                       examples_per_s=round(rate, 1), peak_memory_mb=peak_memory_mb())
            log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {rate:.0f} examples/s, {row['peak_memory_mb']} MB, best {max(progress['best'], 0):.3f}")
            losses, examples, since = [], 0, time.perf_counter()
    bar.close()
    return progress


def main():
    settings = parse_settings()
    out, stop = Path(settings.out), []                                       # stop: the signals received so far

    def on_signal(number, frame):
        if stop:                                                             # asked twice: at once
            raise KeyboardInterrupt
        stop.append(number)
        tqdm.write("stopping after this step", file=sys.stderr)

    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_pretrained(settings.model)
    tasks, splits, rows = load_tasks(settings, tokenizer)
    t5 = T5.from_pretrained(settings.model)
    marks = fingerprint(t5, rows)
    sizes = {f.name: getattr(settings, f.name) for f in dataclasses.fields(HyperPELTConfig) if hasattr(settings, f.name)}
    model = HyperPELT(t5, list(tasks), HyperPELTConfig(**sizes), torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    model.to(device)
    count = sum(parameter.numel() for parameter in model.trained().values())
    existing = settings.resume or settings.eval_only or settings.predict
    if existing:
        saved = data.read_json(out / "config.json").get("fingerprints", {})
        for what in marks:
            if saved.get(what) != marks[what]:
                raise UserError(f"{out}/config.json: the run had another {what}: found {marks[what]}, expected {saved.get(what)}")
    else:
        out.mkdir(parents=True, exist_ok=True)
        record = dict(settings={k: v for k, v in vars(settings).items() if k not in ("resume", "eval_only", "predict", "download")},
                      fingerprints=marks, trained_parameters=count, hyperpelt=dataclasses.asdict(model.config), torch=torch.__version__)
        data.write_whole(out / "config.json", json.dumps(record, indent=1).encode() + b"\n")
    print(f"{settings.method} on {settings.model}, {settings.precision}, {device.type}: {count:,} trained parameters; "
          + "; ".join(f"{name} " + " / ".join(f"{split} {len(examples):,}" for split, examples in by_split.items())
                      for name, by_split in splits.items()))
    if settings.predict:
        load_best(out / "best.safetensors", model)
        return predict(model, tokenizer, tasks, splits, settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    best_step = data.read_json(out / "metrics.json")["best_step"] if settings.eval_only and (out / "metrics.json").exists() else None
    if not settings.eval_only:
        best_step = train(model, tokenizer, tasks, splits, rows, settings, stop)["best_step"]
    load_best(out / "best.safetensors", model)
    result = evaluate(model, tokenizer, tasks, splits, ["validation", "test", "mismatched"], settings, stop)
    if result is None:
        sys.exit(print(f"stopped; evaluate with: python train.py --out {out} --eval-only", file=sys.stderr) or 128 + stop[0])
    data.write_whole(out / "metrics.json", json.dumps(dict(best_step=best_step, **result), indent=1).encode() + b"\n")
    print(f"best step {best_step}:   {show(result)}\nsaved in {out}")


def predict(model, tokenizer, tasks, splits, settings):
    """Write a GLUE submission file for a split of every task (mnli: one for each genre set)."""
    for task in tasks.values():
        if settings.predict != "submission" and settings.predict not in splits[task.name]:
            raise UserError(f"--predict {settings.predict}: with --split official there are only {', '.join(splits[task.name])} and submission")
        files = {settings.predict: f"{task.folder}-{settings.predict}.tsv"}
        if settings.predict == "submission":
            files = {"submission": f"{task.folder}.tsv"}
            if task.name == "mnli":
                files = {"submission": "MNLI-m.tsv", "submission_mismatched": "MNLI-mm.tsv"}
        for split, file in files.items():
            examples = splits[task.name].get(split) or data.read_split(task, settings.data_dir, split)
            texts = answer(model, tokenizer, task, examples, settings, [])
            path = Path(settings.out) / file
            unknown = data.write_submission(path, task, texts, examples)
            print(f"{path}: {len(examples):,} predictions" + (f"; {unknown} answers were no label" if unknown else ""))


if __name__ == "__main__":
    data.run(main)
