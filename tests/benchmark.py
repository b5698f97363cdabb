"""Time of a training step, on the same batches in one run: this project's methods against transformers' T5.

    python tests/benchmark.py --model DIR --data-dir DIR [--rounds 3]
    python tests/benchmark.py --model DIR --data-dir VL --features DIR       # batches of vqa: with images against without

All models are frozen but for what they train (transformers: the layer norms), take the same length-bucketed RTE batches of
32 rows and run forward, backward and AdamW; bfloat16 (transformers: autocast). The programs take turns on every batch; the
ratio of a pair is the median over the batches. transformers runs with SDPA where its version has it for T5 (5 and newer).
With images there is no transformers to compare with: each way of vision is compared with the same questions without images.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from hyperpelt import HyperPELT, HyperPELTConfig
from t5 import T5, Tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a T5")
    parser.add_argument("--data-dir", required=True, help="folder with RTE")
    parser.add_argument("--batches", type=int, default=10, help="different batches (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="times that all batches are run (default: 3)")
    parser.add_argument("--features", help="folder of image features: compare the ways of vision on vqa")
    args = parser.parse_args()
    if args.features:
        return images(args)
    import transformers

    task, tokenizer = data.TASKS["rte"], Tokenizer.from_pretrained(args.model)
    rows = data.encode_examples(data.read_split(task, args.data_dir, "train"), tokenizer.encode, 128, 16)
    plan = data.plan_epoch(np.array([len(row.source) for row in rows]), 32, [0])[:args.batches]
    batches = [[torch.from_numpy(data.pad(part, value)) for part, value in (([rows[i].source for i in chosen], 0), ([rows[i].targets[0] for i in chosen], -100))] for chosen in plan]

    models = {method: HyperPELT(T5.from_pretrained(args.model), ["rte"], HyperPELTConfig(method), torch.bfloat16)
              for method in ("norms", "hyperpelt", "hyperprefix", "hyperadapter")}
    losses = {name: lambda ids, labels, model=model: model(ids, ids != 0, labels, "rte")[1] for name, model in models.items()}
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(args.model)
    attention = getattr(theirs.config, "_attn_implementation", "eager") if transformers.__version__ >= "5" else "eager"
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad = "layer_norm" in name
    models["transformers"] = theirs

    def their_loss(ids, labels):
        with torch.autocast("cpu", torch.bfloat16):
            return theirs(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss

    losses["transformers"] = their_loss
    with torch.no_grad():                                        # first of all: the same numbers from the same weights
        a, b = (models[name].eval() and losses[name](*batches[0]).item() for name in ("norms", "transformers"))
        assert abs(a - b) < 0.02 * abs(b), (a, b)
    optimisers, times = {}, {name: [] for name in models}
    for name, model in models.items():
        model.train()
        optimisers[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0, fused=True)

    def step(name, batch):
        start = time.perf_counter()
        losses[name](*batch).backward()
        optimisers[name].step()
        optimisers[name].zero_grad()
        return time.perf_counter() - start

    for name in models:
        step(name, batches[0])                                   # warm up
    for _ in range(args.rounds):
        for batch in batches:
            for name in models:
                times[name].append(step(name, batch))
    print(f"transformers {transformers.__version__} ({attention}), torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'program':16}{'time / norms':>14}{'time / transformers':>21}")
    for name in models:
        ratio = lambda other: statistics.median(a / b for a, b in zip(times[name], times[other]))
        print(f"{name:16}{ratio('norms'):>14.2f}{ratio('transformers'):>21.2f}")


def images(args):
    """Forward and backward of batches of 32 questions: with each way of vision, and without images (task side only)."""
    import train
    tokenizer = Tokenizer.from_pretrained(args.model)
    splits = {"vqa": {"validation": data.read_questions(data.find_task("vqa"), data.find_folder(data.find_task("vqa"), args.data_dir), "val2014")}}
    settings = argparse.Namespace(features=args.features, vision="tokens", prefix_length=49, seed=0)
    rows = {"vqa": {"validation": data.encode_examples(splits["vqa"]["validation"], tokenizer.encode, 128, 16)}}
    width, _ = train.load_images(settings, splits, rows)
    rows = rows["vqa"]["validation"]
    plan = data.plan_epoch(np.array([len(row.source) for row in rows]), 32, [0])[:args.batches]
    batches = [[torch.from_numpy(data.pad([rows[i].source for i in chosen], 0)), torch.from_numpy(data.pad([rows[i].targets[0] for i in chosen], -100)),
                train.gather_images([rows[i] for i in chosen])] for chosen in plan]
    names = ["task side only", "both", "prefix", "adapter", "tokens"]
    models = {name: HyperPELT(T5.from_pretrained(args.model), ["vqa"], HyperPELTConfig(visual_width=width, vision=name), torch.bfloat16).train()
              for name in names[1:]}
    models["task side only"], times = models["both"], {name: [] for name in names}
    for _ in range(args.rounds + 1):                         # the first round warms up
        for ids, labels, features in batches:
            for name in names:
                start = time.perf_counter()
                models[name](ids, ids != 0, labels, "vqa", features=None if name == "task side only" else features)[1].backward()
                times[name].append(time.perf_counter() - start)
                models[name].zero_grad()
    with torch.no_grad():
        sites = models["both"].inject(models["both"].generate_sites("vqa"), batches[0][2])["sites"].values()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; questions of {batches[0][0].size(1)} to {max(b[0].size(1) for b in batches)} tokens")
    for name in names:
        print(f"{name:16}{statistics.median(a / b for a, b in list(zip(times[name], times['task side only']))[len(batches):]):>10.2f}")
    size = sum(part.numel() * part.element_size() for site in sites for part in site.parts[1]) / len(batches[0][2])
    print(f"generated weights of an image: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
