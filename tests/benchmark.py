"""Measure this project against transformers and peft, on the same examples of RTE.

    python tests/benchmark.py --model google/flan-t5-small --data-dir glue

The programs compute the same loss and outputs, and take turns. The tables show medians over the
rounds; a time is relative to that of hyperpelt in the same round.
    as it comes     transformers in float32, batches of shuffled examples
    tuned           transformers with autocast to bfloat16, SDPA and our length-sorted batches
    all others      ours: frozen weights in bfloat16, length-sorted batches
Start-up ends with the first step; memory is the peak of two steps of 32 x 128 tokens, in a process
of its own. LoRA is peft's, with r = 8. All use our tokenizer and data.
"""

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from hyperpelt import HyperPELT, HyperPELTConfig
from t5 import T5, Tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RTE = data.TASKS["rte"]


def our_model(folder, method, dtype=torch.bfloat16):
    t5 = T5.from_pretrained(folder)
    return HyperPELT(t5, ["rte"], HyperPELTConfig(method), dtype).to(DEVICE)


def their_model(folder, method):
    """A T5 of transformers of which the layer norms are trained, or LoRA on q and v."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    if method == "LoRA":
        import peft

        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=16, target_modules=["q", "v"]
            ),
        )
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layer_norm" in name)
    return model.to(DEVICE)


def measure(programs, rounds):
    """{name: function} -> {name: seconds of each round}. A first round warms up."""
    seconds = {name: [] for name in programs}
    for _ in range(1 + rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def print_table(title, seconds, examples):
    print(f"\n{title:22}{'examples/s':>12}{'time / hyperpelt':>18}")
    for name, values in seconds.items():
        speed = examples / np.median(values)
        ratio = np.median(values / seconds["hyperpelt"])
        print(f"{name:22}{speed:12.1f}{ratio:18.2f}")


def make_run(args, protocol="paper", split="train"):
    """-> what train.py needs of a run to make batches, and the examples of a split."""
    splits = data.make_splits(RTE, args.data_dir, protocol)
    settings = train.make_parser().parse_args(["--batch-size", "32"])
    encode = Tokenizer.from_pretrained(args.model).encode
    run = SimpleNamespace(args=settings, tasks={"rte": RTE}, splits={"rte": splits}, encode=encode)
    return run, splits[split]


def make_batches(run, examples, size=32):
    """-> [(input_ids [B, S], labels [B, T])]."""
    batches = []
    for start in range(0, len(examples), size):
        chosen = examples[start : start + size]
        labels = train.make_labels(run, [example.target for example in chosen])
        batches.append((train.make_inputs(run, chosen)[0], labels))
    return batches


def loss_of(model, input_ids, labels, autocast=False):
    if isinstance(model, HyperPELT):
        return model(input_ids, input_ids != 0, labels, "rte")[1]
    mask = (input_ids != 0).long()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        return model(input_ids=input_ids, attention_mask=mask, labels=labels).loss


@torch.no_grad()
def check_losses(args, batch):
    """Fail unless ours and theirs, in float32, compute the same loss."""
    ours = loss_of(our_model(args.model, "norms", torch.float32).eval(), *batch).item()
    theirs = loss_of(their_model(args.model, "norms").eval(), *batch).item()
    assert abs(ours / theirs - 1) < 1e-4, (ours, theirs)
    print(f"{DEVICE.type}: the loss of a batch is {ours:.5f} in ours, {theirs:.5f} in theirs")


def prepare_steps(model, batches, autocast=False):
    """-> a function that takes a training step on each batch."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def take_steps():
        for batch in batches:
            loss_of(model, *batch, autocast).backward()
            optimiser.step()
            optimiser.zero_grad()

    return take_steps


def compare_training(args):
    run, examples = make_run(args)
    chosen = np.concatenate(train.Batches(run).plan_epoch(0, 0)[: args.batches])
    ours = make_batches(run, [examples[i] for i in chosen])
    np.random.default_rng(0).shuffle(chosen)
    plain = make_batches(run, [examples[i] for i in chosen])
    check_losses(args, ours[0])

    programs = {}
    for method in ("hyperpelt", "norms"):
        programs[method] = prepare_steps(our_model(args.model, method), ours)
    for method in ("LoRA", "norms"):
        programs[f"{method}, as it comes"] = prepare_steps(their_model(args.model, method), plain)
        programs[f"{method}, tuned"] = prepare_steps(their_model(args.model, method), ours, True)
    print_table("training", measure(programs, args.rounds), len(chosen))


@torch.no_grad()
def generate(model, batches, length, autocast=False):
    """-> ids of the greedy outputs, without the start token and padding."""
    if isinstance(model, HyperPELT):
        injected = model.inject(model.generate_weights("rte"))
        call = partial(model.t5.generate, **injected)
    else:
        call = partial(model.generate, do_sample=False, num_beams=1)
    outputs = []
    for input_ids, _ in batches:
        mask = (input_ids != 0).long()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            ids = call(input_ids=input_ids, attention_mask=mask, max_new_tokens=length)
        outputs += [[i for i in row if i > 0] for row in ids.tolist()]
    return outputs


def compare_evaluation(args):
    """Generate the outputs of RTE's validation file, sorted by length."""
    run, examples = make_run(args, "official", "validation")
    examples = sorted(examples[: 64 * args.batches], key=lambda example: len(example.source))
    batches = make_batches(run, examples, 64)
    length = max(len(run.encode(word)) for word in RTE.label_words())
    models = {
        "hyperpelt": our_model(args.model, "hyperpelt"),
        "norms, float32": our_model(args.model, "norms", torch.float32),
        "transformers": their_model(args.model, "norms"),
    }
    programs = {}
    for name, model in models.items():
        programs[name] = partial(generate, model.eval(), batches, length)
    programs["transformers, tuned"] = partial(programs["transformers"], autocast=True)
    assert programs["norms, float32"]() == programs["transformers"]()
    print_table("evaluation", measure(programs, args.rounds), len(examples))


def work_alone(args):
    """Print a line after a first step, and the peak of memory in MB after two of 32 x 128."""
    build = our_model if args.alone == "hyperpelt" else their_model
    model = build(args.model, args.alone)
    run, examples = make_run(args)
    prepare_steps(model, make_batches(run, examples[:32]))()
    print("ready", flush=True)
    examples.sort(key=lambda example: len(example.source))
    prepare_steps(model, make_batches(run, examples[-64:]))()

    # The peak that getrusage tells begins with that of the parent process.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**10
    print(torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else peak)


def compare_processes(args):
    command = [sys.executable, __file__, "--model", args.model, "--data-dir", args.data_dir]
    rows = {"hyperpelt": [], "LoRA": []}
    for _ in range(args.rounds):
        for name in rows:
            start = time.perf_counter()
            with subprocess.Popen([*command, "--alone", name], stdout=subprocess.PIPE) as process:
                process.stdout.readline()
                seconds = time.perf_counter() - start
                rows[name].append([seconds, float(process.stdout.read())])
    print(f"\n{'process':22}{'start-up, s':>14}{'peak memory, MB':>18}")
    for name, found in rows.items():
        seconds, peak = np.median(found, axis=0)
        print(f"{name:22}{seconds:14.1f}{peak:18.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="T5: folder or public name")
    parser.add_argument("--data-dir", required=True, help="folder that holds RTE/")
    parser.add_argument("--batches", type=int, default=10, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        return work_alone(args)
    compare_training(args)
    compare_evaluation(args)
    compare_processes(args)


if __name__ == "__main__":
    main()
