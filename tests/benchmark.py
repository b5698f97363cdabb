"""This project against transformers and peft, on the same rows in one run: training, evaluation, memory, start-up.

    python tests/benchmark.py --model DIR --data-dir DIR [--rounds 3] [--quick]          # also: pip install peft
    python tests/benchmark.py --model DIR --data-dir VL --features DIR       # batches of vqa: with images against without
    python tests/benchmark.py --model DIR --data-dir DIR --curves FILE.png   # cost over tasks, N, length; drawn with matplotlib

Training: forward, backward and AdamW on the same RTE rows; a backbone that is frozen but for what is trained. The programs take turns, a batch
each; a program's time is the sum over the batches of a round, a ratio the median over the rounds.
    ours            bfloat16, batches of rows of like length
    as it comes     transformers in float32, batches of shuffled rows
    tuned           transformers with autocast to bfloat16, SDPA (transformers 5 and newer has it for T5), our batches
Evaluation: greedy answers to RTE's validation rows, against transformers' generate with its cache. Memory: the peak of a process of its own that takes
two steps of 32 rows of 128 tokens. Start-up: from the start of a process to the end of its first step. First of all it checks that all compute the same.
Curves: batches of random tokens, 32 rows of 80 where length does not vary, 8 rows where it does; each against the same T5 with its norms trained only.
With images there is nothing to compare with: each way of vision is compared with the same questions without images.
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from hyperpelt import HyperPELT, HyperPELTConfig
from t5 import T5, Tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = ["hyperpelt", "norms", "hyperprefix", "hyperadapter"]
THEIRS = ["norms", "LoRA", "prefix"]                             # peft's LoRA of rank 8 on q and v, peft's prefix of 49


def synchronise():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def our_model(method, folder):
    """-> model, its loss function of (ids, labels)."""
    model = HyperPELT(T5.from_pretrained(folder), ["rte"], HyperPELTConfig(method), torch.bfloat16).to(DEVICE)
    return model, lambda ids, labels: model(ids, ids != 0, labels, "rte")[1]


def their_model(method, folder, autocast):
    """-> model of transformers (and peft), its loss function."""
    import transformers
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    if method != "norms":
        import peft
        config = dict(LoRA=lambda: peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=16, target_modules=["q", "v"]),
                      prefix=lambda: peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=49, num_attention_heads=model.config.num_heads,
                                                             token_dim=model.config.num_heads * model.config.d_kv))[method]()
        model = peft.get_peft_model(model, config)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "layer_norm" in name
    model.to(DEVICE)

    def loss(ids, labels):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
    return model, loss


def optimiser_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0, fused=True)


def make_batches(rows, plan):
    return [[torch.from_numpy(data.pad(part, value)).to(DEVICE) for part, value in (([rows[i].source for i in chosen], 0), ([rows[i].targets[0] for i in chosen], -100))]
            for chosen in plan]


def product_rate(dtype):
    """-> this machine's own products of matrices, in 10^9 operations a second: 2,048 x 512 x 1,024, as a T5's."""
    a, b = torch.randn(2048, 512, device=DEVICE, dtype=dtype), torch.randn(512, 1024, device=DEVICE, dtype=dtype)
    times = []
    for _ in range(30):
        synchronise()
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        synchronise()
        times.append(time.perf_counter() - start)
    return 20 * 2 * 2048 * 512 * 1024 / statistics.median(times) / 1e9


def operations(config, batches):
    """-> products of the T5 alone, forward and towards its inputs (2 x 2 operations a weight and token), of all batches."""
    inner, gates = config.num_heads * config.d_kv, 2 if config.feed_forward_proj == "gated-gelu" else 1
    attention, ffn = 4 * config.d_model * inner, (gates + 1) * config.d_model * config.d_ff
    total = 0
    for ids, labels in batches:
        (rows, s), t = ids.shape, labels.size(1)
        total += 4 * rows * s * (config.num_layers * (attention + ffn) + config.num_decoder_layers * attention / 2)     # encoder; k and v of cross-attention
        total += 4 * rows * t * (config.num_decoder_layers * (1.5 * attention + ffn) + config.vocab_size * config.d_model)
        total += 8 * rows * inner * (config.num_layers * s * s + config.num_decoder_layers * (t * t + t * s))           # scores and sums
    return total


def train_steps(args, rows):
    plan = data.plan_epoch(np.array([len(row.source) for row in rows]), 32, [0], pool=args.batches)[:args.batches]
    shuffled = np.random.default_rng(0).permutation(np.concatenate(plan))
    ours, plain = make_batches(rows, plan), make_batches(rows, [shuffled[i:i + 32] for i in range(0, len(shuffled), 32)])
    programs = {method: (*our_model(method, args.model), ours) for method in OURS}
    for method in THEIRS if not args.quick else THEIRS[:2]:
        try:
            programs[f"{method}, as it comes"] = *their_model(method, args.model, False), plain
            programs[f"{method}, tuned"] = *their_model(method, args.model, True), ours
        except ImportError:
            print(f"{method}: left out, peft is not installed")
    with torch.no_grad():                                        # first of all: the same numbers from the same weights
        expected = programs["norms, as it comes"][0].eval() and programs["norms, as it comes"][1](*ours[0]).item()
        exact = HyperPELT(T5.from_pretrained(args.model), ["rte"], HyperPELTConfig("norms")).to(DEVICE).eval()(ours[0][0], ours[0][0] != 0, ours[0][1], "rte")[1].item()
        assert abs(exact - expected) < 1e-4 * expected, (exact, expected)
        for name in ("norms", "norms, tuned"):
            found = programs[name][0].eval() and programs[name][1](*ours[0]).item()
            assert abs(found - expected) < 0.02 * expected, (name, found, expected)
    optimisers, times = {name: optimiser_of(model.train()) for name, (model, *_) in programs.items()}, {name: [] for name in programs}
    for turn in range(args.rounds + 1):                          # the first round warms up
        spent = dict.fromkeys(programs, 0.0)
        for i in range(len(ours) if turn else min(2, len(ours))):
            for name, (_, loss, batches) in programs.items():
                synchronise()
                start = time.perf_counter()
                loss(*batches[i]).backward()
                optimisers[name].step()
                optimisers[name].zero_grad()
                synchronise()
                spent[name] += time.perf_counter() - start
        for name in programs if turn else ():
            times[name].append(spent[name])
    count, rates = 32 * len(ours), {dtype: product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ceiling = {dtype: count / (operations(programs["norms"][0].t5.config, ours) / 1e9 / rate) for dtype, rate in rates.items()}
    print(f"products of matrices: {rates[torch.float32]:.0f} GFLOP/s in float32, {rates[torch.bfloat16]:.0f} in bfloat16; so at most "
          f"{ceiling[torch.float32]:.0f} and {ceiling[torch.bfloat16]:.0f} examples/s of this T5's own products\n")
    print(f"{'training':24}{'time / norms':>14}{'speed / as it comes':>21}{'speed / tuned':>15}{'examples/s':>12}{'of the ceiling':>16}")
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b]))
    for name in programs:
        rate = count / statistics.median(times[name])
        print(f"{name:24}{ratio(name, 'norms'):>14.2f}{ratio('norms, as it comes', name):>21.2f}{ratio('norms, tuned', name):>15.2f}{rate:>12.1f}{rate / ceiling[torch.bfloat16]:>16.2f}")


@torch.no_grad()
def evaluation(args, tokenizer):
    """Greedy answers to the validation rows: the time of all of them, ours and theirs in turn."""
    rows = data.encode_examples(data.read_split(data.TASKS["rte"], args.data_dir, "validation"), tokenizer.encode, 128)[:64 if args.quick else None]
    order = np.argsort([len(row.source) for row in rows], kind="stable")
    batches = [ids for ids, _ in make_batches(rows, [order[i:i + 64] for i in range(0, len(order), 64)])]
    longest = max(len(tokenizer.encode(word)) for word in data.TASKS["rte"].labels.values())
    ours = {dtype: HyperPELT(T5.from_pretrained(args.model), ["rte"], HyperPELTConfig("norms"), dtype).to(DEVICE).eval() for dtype in (torch.float32, torch.bfloat16)}
    full, (theirs, _) = HyperPELT(T5.from_pretrained(args.model), ["rte"], HyperPELTConfig(), torch.bfloat16).to(DEVICE).eval(), their_model("norms", args.model, False)
    theirs.eval()

    def generate(model):
        sites = model.generate_sites("rte")
        return [model.t5.generate(ids, max_new_tokens=longest, sites=sites) for ids in batches]

    def their_generate(autocast):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return [theirs.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=longest, do_sample=False, num_beams=1)[:, 1:] for ids in batches]

    programs = {"norms, float32": lambda: generate(ours[torch.float32]), "norms": lambda: generate(ours[torch.bfloat16]), "hyperpelt": lambda: generate(full),
                "transformers": lambda: their_generate(False), "transformers, tuned": lambda: their_generate(True)}
    times, outputs = {name: [] for name in programs}, {}
    for _ in range(args.rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            outputs[name] = program()
            synchronise()
            times[name].append(time.perf_counter() - start)
    decode = lambda name: [tokenizer.decode(line.tolist()) for ids in outputs[name] for line in ids]
    assert decode("norms, float32") == decode("transformers"), "the answers differ"
    print(f"\n{'evaluation':24}{'speed / transformers':>22}{'speed / tuned':>15}{'rows/s':>10}")
    for name in programs:
        ratio = lambda other: statistics.median(b / a for a, b in zip(times[name][1:], times[other][1:]))
        print(f"{name:24}{ratio('transformers'):>22.2f}{ratio('transformers, tuned'):>15.2f}{len(rows) / statistics.median(times[name][1:]):>10.1f}")


def alone(args, name, what):
    """In a process of its own: peak memory of two steps of 32 x 128 (MB), or the seconds from its start to the end of the first step."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, "--model", args.model, "--data-dir", args.data_dir, "--alone", name, "--what", what], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1]) if what == "memory" else time.perf_counter() - start


def be_alone(args):
    """What `alone` runs: load, tokenise RTE, take the first step(s)."""
    method, theirs = args.alone.removesuffix(", transformers"), args.alone.endswith("transformers")
    if theirs:
        import transformers
        tokenizer = transformers.T5Tokenizer.from_pretrained(args.model, legacy=True)
        model, loss = their_model(method, args.model, False)
        encode = lambda text: tokenizer(text).input_ids
    else:
        encode = Tokenizer.from_pretrained(args.model).encode
        model, loss = our_model(method, args.model)
    rows = data.encode_examples(data.read_split(data.TASKS["rte"], args.data_dir, "train"), encode, 128)
    optimiser, model = optimiser_of(model), model.train()
    long = [row for row in rows if len(row.source) == 128] if args.what == "memory" else rows
    for start in (0, 32)[:2 if args.what == "memory" else 1]:
        ids, labels = make_batches(long, [range(start, start + 32)])[0]
        loss(ids, labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    if args.what == "memory":
        status = Path("/proc/self/status").read_text()           # not getrusage: its peak begins with that of the process that started this one
        print(torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else int(status.split("VmHWM:")[1].split()[0]) / 2**10)


def processes(args):
    for what, unit in (("memory", "MB"), ("start", "s")):
        names = ["hyperpelt", "LoRA, transformers", "norms, transformers"]
        found = {name: [] for name in names}
        for _ in range(1 if args.quick else 3):
            for name in names:
                try:
                    found[name].append(alone(args, name, what))
                except subprocess.CalledProcessError as error:
                    print(f"{name}: left out ({error.stderr.strip().splitlines()[-1]})")
        found = {name: values for name, values in found.items() if values}
        print(f"\n{'peak memory' if what == 'memory' else 'start-up':24}" + "".join(f"{name:>24}" for name in found) + "\n" + f"{unit:24}"
              + "".join(f"{statistics.median(values):>24.1f}" for values in found.values()) + f"\n{'hyperpelt / it':24}"
              + "".join(f"{statistics.median(found['hyperpelt']) / statistics.median(values):>24.2f}" for values in found.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a T5")
    parser.add_argument("--data-dir", required=True, help="folder with RTE")
    parser.add_argument("--batches", type=int, default=10, help="different batches (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="times that all batches are run (default: 3)")
    parser.add_argument("--quick", action="store_true", help="fewer of all: about three minutes")
    parser.add_argument("--features", help="folder of image features: compare the ways of vision on vqa")
    parser.add_argument("--curves", metavar="FILE", help="measure and draw the cost over tasks, N and length")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.features:
        return images(args)
    if args.curves:
        return curves(args)
    if args.alone:
        return be_alone(args)
    import transformers
    if args.quick:
        args.batches, args.rounds = 2, 1
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name() if DEVICE.type == 'cuda' else f'{torch.get_num_threads()} threads'}")
    tokenizer = Tokenizer.from_pretrained(args.model)
    train_steps(args, data.encode_examples(data.read_split(data.TASKS["rte"], args.data_dir, "train"), tokenizer.encode, 128))
    evaluation(args, tokenizer)
    processes(args)


def curves(args):
    """The time of a training step over the number of tasks, over N and over the length of the text, each as a share of norms' alone."""
    from matplotlib.figure import Figure
    generator, vocabulary = torch.Generator().manual_seed(0), 1000

    def times_of(settings):
        """{x: (rows, length, tasks, N)} -> {x: seconds of a step of hyperpelt, of norms alone}, medians of rounds in turn."""
        programs = {}
        for x, (rows, length, tasks, n) in settings.items():
            batch = torch.randint(3, vocabulary, (rows, length), generator=generator).to(DEVICE), torch.randint(3, vocabulary, (rows, 4), generator=generator).to(DEVICE)
            for name, config in (("hyperpelt", HyperPELTConfig(prefix_length=n)), ("norms", HyperPELTConfig("norms"))):
                model = HyperPELT(T5.from_pretrained(args.model), [f"task {i}" for i in range(tasks)], config, torch.bfloat16).to(DEVICE).train()
                programs[x, name] = model, optimiser_of(model), batch
        times = {key: [] for key in programs}
        for turn in range(3 * args.rounds + 1):
            for key, (model, optimiser, (ids, labels)) in programs.items():
                synchronise()
                start = time.perf_counter()
                model(ids, ids != 0, labels, model.tasks[turn % len(model.tasks)])[1].backward()
                optimiser.step()
                optimiser.zero_grad()
                synchronise()
                times[key].append(time.perf_counter() - start)
        return {x: [statistics.median(times[x, name][1:]) for name in ("hyperpelt", "norms")] for x in settings}

    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (title, settings) in zip(figure.subplots(1, 3), {"number of tasks": {t: (32, 80, t, 49) for t in (1, 4, 16, 64)},
                                                               "prefix length N": {n: (32, 80, 1, n) for n in (1, 25, 49, 100, 200)},
                                                               "length of the text, tokens": {s: (8, s, 1, 49) for s in (32, 64, 128, 256, 512)}}.items()):
        found = times_of(settings)
        print(f"\n{title:28}" + "".join(f"{x:>9}" for x in found) + f"\n{'time / norms alone':28}" + "".join(f"{ours / plain:>9.2f}" for ours, plain in found.values())
              + f"\n{'time / its first':28}" + "".join(f"{ours / next(iter(found.values()))[0]:>9.2f}" for ours, _ in found.values()))
        first = next(iter(found.values()))[1]                    # norms alone at the first point is the unit
        for name, which in (("hyperpelt", 0), ("norms alone", 1)):
            axes.plot(list(found), [pair[which] / first for pair in found.values()], "o-", label=name)
        axes.set(xlabel=title, ylabel="time of a step, in that of norms alone at the left end" if axes.get_subplotspec().is_first_col() else None, ylim=(0, None))
        axes.legend()
    figure.savefig(args.curves, dpi=110)
    print(f"\ndrawn: {args.curves}")


def images(args):
    """Forward and backward of batches of 32 questions: with each way of vision, and without images (task side only)."""
    import train
    tokenizer = Tokenizer.from_pretrained(args.model)
    splits = {"vqa": {"validation": data.read_questions(data.find_task("vqa"), data.find_folder(data.find_task("vqa"), args.data_dir), "val2014")}}
    settings = argparse.Namespace(features=args.features, vision="tokens", prefix_length=49, seed=0)
    rows = {"vqa": {"validation": data.encode_examples(splits["vqa"]["validation"], tokenizer.encode, 128)}}
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
