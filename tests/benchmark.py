"""Time of a training step, on the same batches in one run: this project's methods against transformers' T5.

    python tests/benchmark.py --model DIR --data-dir DIR [--rounds 3]

All models are frozen but for what they train (transformers: the layer norms), take the same length-bucketed RTE batches of
32 rows and run forward, backward and AdamW; bfloat16 (transformers: autocast). The programs take turns on every batch; the
ratio of a pair is the median over the batches. transformers runs with SDPA where its version has it for T5 (5 and newer).
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
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
