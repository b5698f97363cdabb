"""What a GPU must show, in one command of less than half an hour. Needs tests/requirements.txt.

    python tests/stress/gpu.py               # on a CPU: the same at small size, which checks it

It runs the tests and the sample on the device. Then it measures training steps of a T5-base of
true size (weights and tokens are noise, lengths are GLUE's), in bfloat16: every method,
transformers with LoRA and prefixes of peft, images of 49 x 2048 features, and torch.compile. The
programs take turns, and the tables show medians. At the end it computes from them how long the
paper's runs would take.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from hyperpelt import METHODS, HyperPELT, HyperPELTConfig
from t5 import T5, T5Config

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SMALL = T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
# About so many tokens per source text, and training rows, of the eight GLUE tasks.
LENGTHS = {
    "cola": 12,
    "sst2": 14,
    "mrpc": 55,
    "qqp": 34,
    "stsb": 34,
    "mnli": 46,
    "qnli": 54,
    "rte": 76,
}
ROWS = {
    "cola": 8551,
    "sst2": 66349,
    "mrpc": 3668,
    "qqp": 362846,
    "stsb": 5749,
    "mnli": 391702,
    "qnli": 103743,
    "rte": 2490,
}
TARGET_LENGTH = 4
# Reconstructed: steps of 128 examples on GLUE. Borrowed from VL-Adapter: 20 epochs, here of VQAv2,
# GQA and COCO captions, one of an image's captions each time.
GLUE_STEPS = 2**18
VL_STEPS = 20 * (443757 + 943000 + 113287) // 128


# ---- programs ------------------------------------------------------------------------------------


def draw_lengths(steps):
    """Source lengths of so many batches of GLUE, each of one task with p ~ sqrt(rows)."""
    weights = np.sqrt([*ROWS.values()])
    rng = np.random.default_rng(0)
    return rng.choice([*LENGTHS.values()], steps, p=weights / weights.sum()).tolist()


def draw_batch(config, size, length):
    """-> input_ids [B, S], labels [B, T]: ids without pad and eos."""
    generator = torch.Generator().manual_seed(length)
    shapes = ((size, length), (size, TARGET_LENGTH))
    return [
        torch.randint(2, config.vocab_size, shape, generator=generator).to(DEVICE)
        for shape in shapes
    ]


@torch.no_grad()
def fill(model):
    """Weights with which the activations stay of a size, so that no time is that of NaN."""
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def our_program(config, method, visual_width=0, compiled=False):
    t5 = fill(T5(config))
    settings = HyperPELTConfig(method, visual_width=visual_width)
    model = HyperPELT(t5, ["glue"], settings, torch.bfloat16).to(DEVICE).train()
    if compiled:
        for block in [*t5.encoder.blocks, *t5.decoder.blocks]:
            block.compile(dynamic=True)

    def loss_of(input_ids, labels, features=None):
        return model(input_ids, None, labels, "glue", features=features)[1]

    return model, loss_of


def their_program(config, method):
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    their_config = transformers.T5Config(**vars(config), decoder_start_token_id=0)
    model = fill(transformers.T5ForConditionalGeneration(their_config)).to(torch.bfloat16)
    if method == "LoRA":
        settings = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, target_modules=["q", "v"])
    else:
        settings = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=49)
    model = peft.get_peft_model(model, settings).to(DEVICE).train()

    def loss_of(input_ids, labels):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            mask = torch.ones_like(input_ids)
            return model(input_ids=input_ids, attention_mask=mask, labels=labels).loss

    return model, loss_of


# ---- measurements --------------------------------------------------------------------------------


def wait():
    if CUDA:
        torch.cuda.synchronize()


class Program:
    """A model with its optimiser. Its memory is its own and the peak of its steps."""

    def __init__(self, name, build):
        self.name = name
        before = torch.cuda.memory_allocated() if CUDA else 0
        self.model, self.loss_of = build()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
        self.own_memory = (torch.cuda.memory_allocated() if CUDA else 0) - before
        self.seconds, self.peak = [], 0

    def take_steps(self, batches):
        wait()
        before = torch.cuda.memory_allocated() if CUDA else 0
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for batch in batches:
            self.loss_of(*batch).backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
        wait()
        self.seconds.append((time.perf_counter() - start) / len(batches))
        if CUDA:
            peak = torch.cuda.max_memory_allocated() - before + self.own_memory
            self.peak = max(self.peak, peak / 2**30)


def compare(title, programs, batches, rounds):
    """-> {name: seconds of a step}. The first round warms up."""
    size = len(batches[0][0])
    for _ in range(1 + rounds):
        for program in programs:
            program.take_steps(batches)
    print(f"\n{title}, {size} examples a step; time is relative to {programs[0].name}")
    print(f"{'':28}{'steps/s':>9}{'examples/s':>12}{'time':>10}{'peak, GiB':>11}")
    medians = {}
    reference = np.array(programs[0].seconds[-rounds:])
    for program in programs:
        seconds = np.array(program.seconds[-rounds:])
        medians[program.name] = np.median(seconds)
        median = medians[program.name]
        print(
            f"{program.name:28}{1 / median:9.2f}{size / median:12.0f}"
            f"{np.median(seconds / reference):10.2f}{program.peak:11.2f}",
            flush=True,
        )
    return medians


def profile(title, program, batches):
    """Print the operations that take most of the time of the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if CUDA:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        program.take_steps(batches)
    order = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
    print(f"\n{title}\n{found.key_averages().table(sort_by=order, row_limit=25)}")


def measure_text(config, args):
    """All methods and peft on GLUE's lengths -> seconds of a step of hyperpelt at 128 examples."""
    names = [name for name in METHODS if name != "full"]
    programs = [Program(name, lambda name=name: our_program(config, name)) for name in names]
    for name in ("LoRA", "prefix"):
        programs.append(Program(f"{name}, peft", lambda name=name: their_program(config, name)))
    for size in args.batch_sizes:
        batches = [draw_batch(config, size, length) for length in draw_lengths(args.steps)]
        medians = compare("GLUE's lengths, bfloat16", programs, batches, args.rounds)
    profile("hyperpelt on GLUE's lengths", programs[0], batches)
    del programs[1:]
    programs.append(
        Program("hyperpelt, torch.compile", lambda: our_program(config, "hyperpelt", compiled=True))
    )
    compare("torch.compile of the blocks", programs, batches, args.rounds)
    return medians["hyperpelt"]


def measure_images(config, args):
    """-> seconds of a step with images, of the largest number of examples."""
    width = 2048 if CUDA else 64
    program = Program("hyperpelt, images", lambda: our_program(config, "hyperpelt", width))
    for size in args.batch_sizes:
        features = torch.rand(size, 49, width, device=DEVICE).half()
        batches = [[*draw_batch(config, size, 16), features]] * args.steps
        medians = compare(
            f"questions of 16 tokens, 49 x {width} features", [program], batches, args.rounds
        )
    profile("hyperpelt with images", program, batches)
    return medians["hyperpelt, images"]


def check_programs(args):
    """The tests of models and training, and the sample with two seeds, on this device -> what
    failed. The measurements follow all the same, because time on a GPU is dear."""
    failed = []
    tests = ["tests/test_t5.py", "tests/test_hyperpelt.py", "tests/test_train.py"]
    if subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT).returncode:
        failed.append("a test failed")
    run = Path(args.work, "sample").resolve()
    command = ["train.py", "--task", "rte", "--num-seeds", "2", "--run", run]
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        return [*failed, "the sample did not train"]
    for seed in (0, 1):
        metrics = json.loads((run / f"seed-{seed}" / "metrics.json").read_text())
        accuracy = metrics["mean"]["validation"]
        if accuracy < 0.97:
            failed.append(f"seed {seed} of the sample reached {accuracy:.4f}, expected 0.97")
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", default="runs/gpu", help="folder for the sample's runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20 if CUDA else 2, help="in a round")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128] if CUDA else [4, 8])
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if CUDA else "no GPU: a small model on the CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    failed = [] if args.skip_tests else check_programs(args)

    torch.manual_seed(0)
    config = T5Config() if CUDA else SMALL
    text = measure_text(config, args)
    images = measure_images(config, args)
    if CUDA:
        print(
            "\nThe paper's runs at these speeds, without evaluation"
            f"\nGLUE, {GLUE_STEPS:,} steps of 128 [R]: {GLUE_STEPS * text / 3600:.1f} hours"
            f"\nVL, {VL_STEPS:,} steps of 128 [X]: {VL_STEPS * images / 3600:.1f} hours"
        )
    if failed:
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()
